"""How the server listens, how many connections it has, and how it stops and starts again."""

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from harness import (
    LOCK_KEY,
    PAGE,
    PATIENCE,
    ROOT,
    Client,
    Fault,
    MovedClock,
    RedisServer,
    Sandbox,
    Server,
    Start,
    assert_signs,
    eventually,
    fetch,
    in_a_loop,
    settings_for,
    signature_of,
    until,
)
from tornado.web import Application, RequestHandler

import server
from wechat_sign import process
from wechat_sign.cache import Cache
from wechat_sign.errors import ConfigError
from wechat_sign.settings import Limits, ServerSettings

SIGN = f"/getApi?url={PAGE}"
REQUEST = f"GET {SIGN} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n".encode()
RECEIVED = b"HTTP/1.1 100 (Continue)\r\n\r\n"
"""What the server answers at once, so that a test knows that a request is in flight."""
STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
FILES = 256
"""So few file descriptors leave room for 192 connections."""
LONG_STOP = Limits(grace=0, drain=2 * PATIENCE)
"""A stop that waits for somebody takes longer than the test does."""
Connect = Callable[[Server, int], list[socket.socket]]


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """What is closed at the test's end."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def connect(opened: ExitStack) -> Connect:
    """Opens so many connections."""
    return lambda running, number: [opened.enter_context(running.connect()) for _ in range(number)]


@pytest.fixture
def hold(wechat: Sandbox) -> threading.Event:
    """Until it is set, WeChat gives no ticket."""
    event = threading.Event()
    wechat.faults["getticket"] = Fault(hold=event)
    return event


@pytest.fixture
def many_files() -> Iterator[int]:
    """How many file descriptors this process may have: as many as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def bind(opened: ExitStack, family: int, name: Any, kind: int = socket.SOCK_STREAM) -> Any:
    """A listening socket of any family, to be handed over as systemd does."""
    listening = opened.enter_context(socket.socket(family, kind))
    listening.bind(name)
    listening.listen()
    return listening


def connect_to(opened: ExitStack, held: socket.socket) -> socket.socket:
    connection = opened.enter_context(socket.socket(held.family))
    connection.settimeout(PATIENCE)
    connection.connect(held.getsockname())
    return connection


def listen() -> list[socket.socket]:
    return process.listen(ServerSettings(address="127.0.0.1", port=0))


def begin(connection: socket.socket, request: bytes = REQUEST) -> None:
    """Sends a request for a signature; returns when the server has received it."""
    connection.sendall(request)
    assert connection.recv(len(RECEIVED), socket.MSG_WAITALL) == RECEIVED


def response_on(connection: socket.socket) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response


def answer_on(connection: socket.socket) -> Any:
    response = response_on(connection)
    body = json.loads(response.read())
    assert response.status == 200, body
    return body


def restart_under_load(clients: list[Client], restarts: Iterable[Callable[[], None]]) -> None:
    """Does each of them once every client was served again. No client may lose a request."""
    for client in clients:
        client.start()
    for restart in restarts:
        goals = [(client, client.served + 5) for client in clients]
        eventually(
            "every client is served",
            lambda goals=goals: all(one.served > goal or one.lost for one, goal in goals),  # type: ignore[misc]
        )
        restart()
    for client in clients:
        client.over.set()
    for client in clients:
        client.join(PATIENCE)
    assert [loss for client in clients for loss in client.lost] == []


def test_restarts_under_load_lose_and_refuse_nothing_on_a_socket_that_systemd_holds(
    start: Start, wechat: Sandbox, opened: ExitStack
) -> None:
    held = bind(opened, socket.AF_INET, ("127.0.0.1", 0))
    running = [start(sockets=[held], verbose=False)]

    def restart() -> None:
        assert running[-1].stop() == 0
        running.append(start(sockets=[held], verbose=False))

    clients = [Client(wechat, held.getsockname(), keeps=bool(n % 2)) for n in range(8)]
    restart_under_load(clients, 3 * [restart])


def test_it_answers_on_whatever_systemd_listens_on(
    start: Start, wechat: Sandbox, tmp_path: Path, opened: ExitStack
) -> None:
    path = str(tmp_path / "socket")
    listening = [
        bind(opened, socket.AF_INET, ("127.0.0.1", 0)),
        bind(opened, socket.AF_INET6, ("::1", 0)),
        bind(opened, socket.AF_UNIX, path),
        bind(opened, socket.AF_UNIX, f"\0{path}"),
    ]
    running = start(sockets=listening, limits=Limits(grace=0))
    ports = [held.getsockname()[1] for held in listening[:2]]
    addresses = f"http://127.0.0.1:{ports[0]} and http://[::1]:{ports[1]}"
    running.says(f"listening on {addresses} and unix:{path} and unix:@{path} for appid")
    for held in listening:
        connection = connect_to(opened, held)
        begin(connection)
        body = answer_on(connection)
        assert body["signature"] == signature_of(body, wechat.ticket, PAGE), held
    assert running.stop() == 0


def handed_over(**other: str) -> dict[str, str]:
    """What systemd says in the environment."""
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http", **other}


def test_what_is_no_listening_stream_socket_is_refused(tmp_path: Path, opened: ExitStack) -> None:
    packets = bind(opened, socket.AF_UNIX, str(tmp_path / "socket"), socket.SOCK_SEQPACKET)
    connected, _other = map(opened.enter_context, socket.socketpair())
    file = opened.enter_context((tmp_path / "file").open("w"))
    for given in (packets, connected, file):
        number = os.dup(given.fileno())
        with pytest.raises(ConfigError, match=f"can't listen on file descriptor {number}, which"):
            process.take_handed_over(handed_over(), first=number)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        refused = Server("--sandbox", sockets=[datagrams])
        assert refused.wait() == 1
    assert "can't listen on file descriptor 3" in refused.output
    assert refused.output.count("\n") == 1


def test_a_child_inherits_no_socket_and_takes_none_for_its_own(opened: ExitStack) -> None:
    held = bind(opened, socket.AF_INET, ("127.0.0.1", 0))
    environ = handed_over()
    given = os.dup(held.fileno())
    os.set_inheritable(given, True)
    [taken] = process.take_handed_over(environ, first=given)
    with taken:
        assert taken.getsockname() == held.getsockname()
        assert not taken.get_inheritable()
        assert not taken.getblocking()
    assert not environ


@pytest.mark.parametrize("other", [{"LISTEN_FDS": "0"}, {"LISTEN_FDS": "x"}, {"LISTEN_PID": "1"}])
def test_no_sockets_and_another_process_s_are_none(other: dict[str, str]) -> None:
    assert process.take_handed_over(handed_over(**other)) == []


def test_the_log_has_the_peer_and_what_it_says_whom_it_asks_for(
    start: Start, tmp_path: Path, opened: ExitStack
) -> None:
    held = bind(opened, socket.AF_INET, ("127.0.0.1", 0))
    on_unix = bind(opened, socket.AF_UNIX, f"{tmp_path}/socket")
    on_both = bind(opened, socket.AF_INET6, ("::", 0))
    running = start(sockets=[held, on_unix, on_both])
    chain = "198.51.100.1, 203.0.113.7"
    brackets = f" (X-Forwarded-For {chain}"
    for path, headers, client in (
        ("/1", {}, ""),
        ("/2", {"X-Real-IP": "::2"}, " (X-Real-IP ::2)"),
        (
            "/3",
            {"X-Forwarded-For": chain, "X-Real-IP": "\u00854"},
            f"{brackets}; X-Real-IP \\x854)",
        ),
        ("/4", {"X-Forwarded-For": f"{chr(0x9B) * 999}, {chain}"}, f", {chain})"),
    ):
        fetch(f"{running.url}{path}", **headers)
        running.says(f"404 GET {path} from 127.0.0.1")
        running.says(f"{client}, ")
    connection = connect_to(opened, on_unix)
    connection.sendall(b"GET /5 HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: ::2\r\n\r\n")
    running.says("404 GET /5 from a unix socket (X-Forwarded-For ::2), ")
    mapped = opened.enter_context(socket.create_connection(("127.0.0.1", on_both.getsockname()[1])))
    mapped.sendall(b"GET /6 HTTP/1.1\r\nHost: a\r\n\r\n")
    running.says("404 GET /6 from 127.0.0.1, ")


@contextmanager
def disposition(number: signal.Signals, handler: Any) -> Iterator[None]:
    """What this process does at the signal, and one that is started meanwhile until it decides
    for itself."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_finishes_the_requests_in_flight(
    start: Start, connect: Connect, hold: threading.Event, number: signal.Signals
) -> None:
    with disposition(signal.SIGHUP, signal.SIG_DFL):
        running = start(limits=LONG_STOP)
    address = running.address
    idle, *callers = connect(running, 20)
    for caller in callers:
        begin(caller)
    running.process.send_signal(number)
    running.says("stopping")
    closed = [errno.ECONNREFUSED]
    eventually("the listener is closed", lambda: socket.socket().connect_ex(address) in closed)
    if number == signal.SIGHUP:
        running.process.send_signal(number)  # a terminal that closes may send it twice
    hold.set()
    for caller in callers:
        response = response_on(caller)
        assert (response.status, response.getheader("Connection")) == (200, "close")
    assert running.wait() == 0
    assert idle.recv(1) == b""


@in_a_loop
async def test_a_request_on_its_way_when_the_server_is_stopped_is_answered(wechat: Sandbox) -> None:
    """On a new connection and on a kept one, which ends after its answer.

    A test of what it relies on in Tornado: `no_keep_alive` counts from the next request on."""
    settings = settings_for(wechat, limits=Limits(grace=PATIENCE, drain=PATIENCE))
    [listening] = listen()
    address = listening.getsockname()
    serving = asyncio.ensure_future(server.serve(settings, Cache(settings), [listening]))
    kept, to_kept = await asyncio.open_connection(*address)
    to_kept.write(REQUEST)
    assert b"signature" in await kept.readuntil(b"}")
    new, to_new = await asyncio.open_connection(*address)
    signal.raise_signal(signal.SIGTERM)
    await until("the listener is closed", lambda: listening.fileno() == -1)
    to_new.write(REQUEST)
    to_kept.write(3 * REQUEST)
    for reader, writer, most in ((new, to_new, 1), (kept, to_kept, 2)):
        answers = await reader.read()  # to the end
        served = answers.count(b"HTTP/1.1 200 OK")
        assert 1 <= answers.count(b"Connection: close") == served <= most
        writer.close()
    await serving


def test_a_stop_is_bounded_though_wechat_hangs_and_a_client_reads_nothing(
    start: Start, connect: Connect, hold: threading.Event
) -> None:
    """Pages are told in time when to come again."""
    running = start("timeout = 60", limits=Limits(drain=0.5, grace=0))
    reads_nothing, *callers = connect(running, 21)
    reads_nothing.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reads_nothing.sendall(1000 * b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    running.says("200 GET / ")
    for caller in callers:
        begin(caller)
    began = time.monotonic()
    running.process.terminate()
    for caller in callers:
        response = response_on(caller)
        assert (response.status, response.getheader("Retry-After")) == (503, "1")
    assert 0.37 < time.monotonic() - began < 4
    assert running.wait() == 0
    assert time.monotonic() - began < 4


def test_under_nohup_it_outlives_a_hangup(start: Start, wechat: Sandbox) -> None:
    with disposition(signal.SIGHUP, signal.SIG_IGN):
        running = start()
    assert running.url
    running.process.send_signal(signal.SIGHUP)
    for _ in range(3):
        assert_signs(running, wechat)
    assert "stopping" not in running.output


def test_an_interrupt_while_modules_are_imported_ends_it_without_a_word(
    start: Start, tmp_path: Path
) -> None:
    """Python finds this argparse first. The server imports it before all others."""
    (tmp_path / "argparse.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    interrupted = start(PYTHONPATH=str(tmp_path))
    assert (interrupted.wait(), interrupted.output) == (-signal.SIGINT, "")


@pytest.mark.parametrize("first", STOPS)
def test_a_second_stop_signal_ends_it_at_once(
    start: Start, hold: threading.Event, first: signal.Signals
) -> None:
    second = signal.SIGINT if first == signal.SIGTERM else signal.SIGTERM
    with disposition(signal.SIGHUP, signal.SIG_DFL):
        running = start("timeout = 60", limits=LONG_STOP)
    with running.connect() as caller:
        begin(caller)
        running.process.send_signal(first)
        running.says("stopping")
        running.process.send_signal(second)
        assert running.wait() == -second


def test_a_stop_while_wechat_hangs_leaves_no_lock(
    start: Start, wechat: Sandbox, redis_server: RedisServer, hold: threading.Event
) -> None:
    running = start(*redis_server.ini, limits=Limits(drain=0.3))
    eventually("it asks", lambda: wechat.calls["getticket"])
    assert redis_server.run("EXISTS", LOCK_KEY)
    assert running.stop() == 0
    assert not redis_server.run("EXISTS", LOCK_KEY)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells it in /proc")
def test_long_heads_that_come_a_byte_at_a_time_keep_no_other_waiting(
    shared: Server, shared_wechat: Sandbox, connect: Connect, many_files: int
) -> None:
    """A test of what it relies on in Tornado: each head is read by `read_until_regex`."""

    def cpu_time() -> float:
        fields = Path(f"/proc/{shared.process.pid}/stat").read_text().split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")

    slow, rounds = connect(shared, min(1000, many_files // 2)), 3
    for connection in slow:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 30_000)
    assert_signs(shared, shared_wechat)
    before = cpu_time()
    for _ in range(rounds):
        for connection in slow:
            connection.sendall(b"x")
        assert_signs(shared, shared_wechat)
    assert (cpu_time() - before) / (rounds * len(slow)) < 0.0003


def test_for_a_new_connection_the_one_that_is_idle_longest_is_closed(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    running = start(files=FILES)
    active = http.client.HTTPConnection(*running.address, timeout=PATIENCE)
    held = []
    for _ in range(8):
        held += connect(running, 50)
        active.request("GET", SIGN)  # the same connection all the time
        assert active.getresponse().read()
    for caller in (callers := connect(running, 20)):
        begin(caller)
    for caller in callers:
        assert answer_on(caller)
    assert_signs(running, wechat)
    assert held[0].recv(1) == b""  # closed by the server
    assert "Too many open files" not in running.output
    active.close()


def test_no_newcomer_takes_the_place_of_a_connection_that_waits_for_wechat(
    start: Start, wechat: Sandbox, connect: Connect, hold: threading.Event
) -> None:
    """Where all wait it is closed at once, until one is answered."""
    running = start("timeout = 60", files=FILES, limits=Limits(unread=0))
    callers = connect(running, 20)
    for caller in callers:
        begin(caller)
    idle = connect(running, 400)
    callers += (others := connect(running, FILES * 3 // 4 - 20))
    for caller in others:
        begin(caller)
    for newcomer in [*idle, *connect(running, 100)]:
        with suppress(ConnectionResetError):
            assert newcomer.recv(1) == b""  # closed by the server
    hold.set()
    for caller in callers:
        assert answer_on(caller)
    assert_signs(running, wechat)
    begin(callers[-1])
    assert answer_on(callers[-1])


@asynccontextmanager
async def bounded(
    handle: Any = None, **more: Any
) -> AsyncIterator[tuple[process.BoundedServer, Any]]:
    """A server within this process, which handles requests so, and its address."""
    serving = process.BoundedServer(handle or Application(), **more)
    sockets = listen()
    serving.add_sockets(sockets)
    yield serving, sockets[0].getsockname()
    serving.stop()
    await serving.close_all_connections()


@in_a_loop
async def test_a_stop_waits_for_the_newest_connection_though_others_are_idle(
    clock: MovedClock,
) -> None:
    async with bounded(clock=clock, limits=Limits(grace=7)) as (serving, address):
        _, first = await asyncio.open_connection(*address)
        await until("it is there", lambda: serving.busy)
        clock.advance(7)
        await until("it is idle", lambda: not serving.busy)
        _, second = await asyncio.open_connection(*address)
        await until("a request may be on its way", lambda: serving.busy)
        first.close()
        second.close()


@in_a_loop
async def test_a_burst_of_newcomers_makes_room_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was accepted in this very turn of the loop does not read yet, but is idle.

    A test of what it relies on in Tornado, too: without a `header_timeout` it sets no timer."""
    timers: list[object] = []
    monkeypatch.setattr("tornado.gen.with_timeout", lambda *given, **_: timers.append(given))
    async with bounded(limit=8) as (_, address):
        waiting = [socket.create_connection(address) for _ in range(100)]
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"</html>"), PATIENCE)
        writer.close()
        for one in waiting:
            one.close()
    assert timers == []


@in_a_loop
async def test_no_newcomer_takes_the_place_of_what_still_receives_its_answer() -> None:
    class Long(RequestHandler):
        def get(self) -> None:
            self.finish(bytes(10_000_000) + b"</html>")

    async with bounded(Application([("/", Long)]), limit=1) as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        await reader.readexactly(1)
        newcomer, closing = await asyncio.open_connection(*address)
        assert await asyncio.wait_for(newcomer.read(), PATIENCE) == b""
        assert (await reader.read()).endswith(b"</html>")
        closing.close()
        writer.close()


def test_connections_that_are_gone_count_no_longer(start: Start, hold: threading.Event) -> None:
    """Neither those that left while they waited for an answer, nor idle ones."""
    running = start("timeout = 60", files=FILES)
    for _ in range(300):
        with suppress(OSError), running.connect() as leaving:
            leaving.sendall(f"GET {SIGN} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    health = f"{running.url}/healthz"
    eventually("there is room for a new connection", lambda: fetch(health)[0] == 503)
    hold.set()
    with running.connect() as oldest:
        for _ in range(300):
            running.connect().close()
        begin(oldest)
        assert answer_on(oldest)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux tells it in /proc")
def test_clients_that_never_read_make_room_for_newcomers(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    running = start(verbose=False, files=FILES, limits=Limits(unread=0.2))
    port = f":{running.address[1]:04X}"

    def unsent() -> int:
        """Bytes that the kernel holds for clients that don't read."""
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(int(at[4][:8], 16) for at in lines if at[1].endswith(port))

    assert_signs(running, wechat)
    for connection in connect(running, FILES):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with suppress(OSError):  # of those for which there is no room
            connection.sendall(500 * b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    eventually("none takes more", lambda: unsent() > process.SEND_BUFFER / 2 * FILES * 3 / 4)
    held = []

    def served() -> bool:
        held.append(unsent())
        assert_signs(running, wechat)
        return True

    for _ in range(50):
        eventually("a newcomer is served", served)
    assert max(held) < 4 * process.SEND_BUFFER * FILES  # else up to 4 MiB each


def test_what_is_idle_for_long_is_closed_and_what_waits_for_wechat_is_not(
    start: Start, connect: Connect, hold: threading.Event
) -> None:
    running = start("timeout = 60", limits=Limits(idle_timeout=0.5))
    waiting, kept, half, new = connect(running, 4)
    begin(waiting)
    kept.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
    response_on(kept).read()
    half.sendall(b"GET / HT")
    for idle in (new, half, kept):
        assert idle.recv(1) == b""
    hold.set()
    assert answer_on(waiting)
    assert waiting.recv(1) == b""


def test_what_a_client_that_left_has_asked_for_is_not_worked_on(
    start: Start, connect: Connect, hold: threading.Event
) -> None:
    running = start("timeout = 60")
    (leaving,) = connect(running, 1)
    begin(leaving, REQUEST + 50 * b"GET /unread HTTP/1.1\r\nHost: a\r\n\r\n")
    leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    leaving.close()  # with a reset: the server's next write fails
    hold.set()
    running.says("200 GET /getApi")
    for path in ("/one", "/other"):
        assert fetch(running.url + path)[0] == 404
        running.says(path)
    assert "/unread" not in running.output


POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
UNREADABLE = {
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "an odd head": b"GET / HTTP/1.1\r\nHost: a\r\nSECRET\r\n\r\n",
    "another version": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "a long head": b"GET /getApi?url=%b HTTP/1.1\r\n\r\n" % (b"x" * 32 * 1024),
    "a very long head": b"GET / HTTP/1.1\r\nHost: a\r\nCookie: " + b"x" * 200_000,
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "a long body": POST + b"Content-Length: 33000\r\n\r\n" + bytes(33_000),
    "a long chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n80E8\r\n" + bytes(33_000),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_can_not_be_read_is_answered_with_a_sentence_and_logged(
    shared: Server, shared_wechat: Sandbox, kind: str
) -> None:
    """A test of what it relies on in Tornado: such an answer is a status line alone; at a head that
    is too long `close_fd` closes the socket, and `error` is set by then."""
    before, after = (f"/{moment}-{kind.replace(' ', '-')}" for moment in ("before", "after"))
    assert fetch(shared.url + before)[0] == 404
    with shared.connect() as connection:
        connection.sendall(UNREADABLE[kind])
        response = response_on(connection)
        assert (response.status, response.getheader("Connection")) == (400, "close")
        assert "one Host header" in json.loads(response.read())["error"]
        assert connection.recv(1) == b""
    assert fetch(shared.url + after)[0] == 404
    said = shared.says(f"404 GET {after} ").partition(f"404 GET {before} ")[2]
    assert said.count("WARNING 400 from 127.0.0.1: this is no HTTP/1.1 request with one Host") == 1
    assert "SECRET" not in said
    assert_signs(shared, shared_wechat)


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("OPTIONS", 204), ("POST", 405)])
def test_a_body_is_read_and_goes_nowhere(shared: Server, method: str, status: int) -> None:
    """A test of what it relies on in Tornado: `read_until_regex` is called for heads alone."""
    head = f"{method} {SIGN} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n".encode()
    with shared.connect() as connection:
        for headers, body in (
            (b"Content-Length: 0", b""),  # as some proxies send with every request
            (b"Content-Length: 32000", b"\x16" * 32_000),
            (b"Transfer-Encoding: chunked", b"1\r\nx\r\n0\r\n\r\n"),
        ):
            begin(connection, head + headers + b"\r\n\r\n")
            connection.sendall(body)
            response = response_on(connection)
            response.read()
            assert response.status == status
        connection.sendall(b"GET /%b HTTP/1.1\r\n\r\n" % bytes(40_000))
        assert response_on(connection).status == 400


def test_a_head_may_end_with_any_empty_line_and_name_the_origin(shared: Server) -> None:
    with shared.connect() as connection:
        for origin in (b"", b"http://sign.example.com", b"HTTPS://[::1]:8060"):
            for end in (b"\r\n\r\n", b"\n\n", b"\r\n\n", b"\n\r\n"):
                target = origin + SIGN.encode()
                connection.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: a" + end)
                assert answer_on(connection)


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("before", "after"), [("unlimited", "1"), ("0", "0")])
def test_no_core_is_dumped_to_a_file_or_piped_to_a_program(before: str, after: str) -> None:
    command = f"ulimit -c {before}; exec {sys.executable} server.py --sandbox --port 0 2>&1"
    shell = ["bash", "-c", command]
    with subprocess.Popen(shell, cwd=ROOT, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert any(b"listening on" in line for line in running.stdout)
        limits = Path(f"/proc/{running.pid}/limits").read_text(encoding="ascii")
        running.terminate()
    assert re.search(rf"(?m)^Max core file size +{after} +{after} ", limits)


def test_the_limit_of_file_descriptors_is_raised_for_the_connections(many_files: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, many_files))
    for connections in (600, 90):  # never lowered
        assert process.raise_file_limit(connections) == connections
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 800
