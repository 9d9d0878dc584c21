"""How the server listens, how many connections it has, and how it stops and starts again."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
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
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from harness import (
    LOCK_KEY,
    PAGE,
    PATIENCE,
    ROOT,
    TICKET_KEY,
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
    resident,
    serve,
    server_of_many_tests,
    settings_for,
    signature_of,
    tickets_for,
    until,
)
from tornado.iostream import IOStream
from tornado.web import Application, RequestHandler

import server
from wechat_sign import process
from wechat_sign.errors import ConfigError
from wechat_sign.settings import Limits, ServerSettings

REQUEST = f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n".encode()
RECEIVED = b"HTTP/1.1 100 (Continue)\r\n\r\n"
"""What the server answers at once, so that a test knows that a request is in flight."""
STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
FILES = 256
"""So few file descriptors leave room for 192 connections."""
LONG_STOP = Limits(drain=2 * PATIENCE)
"""A stop that waits for somebody takes longer than the test does."""
Connect = Callable[[Server, int], list[socket.socket]]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(scope="module")
def small(shared_wechat: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same with room for 192 connections."""
    yield from server_of_many_tests(shared_wechat, tmp_path_factory.mktemp("small"), files=FILES)


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
def many_files() -> Iterator[int]:
    """How many file descriptors this process may have: as many as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def listen() -> list[socket.socket]:
    return process.listen(ServerSettings(address="127.0.0.1", port=0))


def bind(opened: ExitStack, family: socket.AddressFamily, name: Any) -> socket.socket:
    """A listening socket of any family, to be handed over as systemd does."""
    listening = opened.enter_context(socket.socket(family))
    listening.bind(name)
    listening.listen()
    return listening


def connect_to(opened: ExitStack, held: socket.socket) -> socket.socket:
    connection = opened.enter_context(socket.socket(held.family))
    connection.settimeout(PATIENCE)
    connection.connect(held.getsockname())
    return connection


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


async def open_connections(address: Any, number: int) -> list[Connection]:
    return [await asyncio.open_connection(*address) for _ in range(number)]


async def ask(connection: Connection) -> None:
    """Has the server answer once: that there is no such page."""
    reader, writer = connection
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    await asyncio.wait_for(reader.readuntil(b"</html>"), PATIENCE)


async def begin_on(connection: Connection) -> None:
    """Sends a request for a signature; returns when the server has received it."""
    connection[1].write(REQUEST)
    await asyncio.wait_for(connection[0].readuntil(RECEIVED), PATIENCE)


async def assert_closed(connection: Connection) -> None:
    """The server has closed it, or does so now."""
    assert await asyncio.wait_for(connection[0].read(), PATIENCE) == b""
    connection[1].close()


def begin(connection: socket.socket, request: bytes = REQUEST) -> None:
    """Sends a request for a signature; returns when the server has received it."""
    connection.sendall(request)
    assert connection.recv(len(RECEIVED), socket.MSG_WAITALL) == RECEIVED


def response_on(connection: socket.socket, method: str = "GET") -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    return response


def answer_on(connection: socket.socket) -> dict[str, Any]:
    response = response_on(connection)
    body: dict[str, Any] = json.loads(response.read())
    assert response.status == 200, body
    return body


def test_restarts_under_load_lose_and_refuse_nothing_on_a_socket_that_systemd_holds(
    start: Start, wechat: Sandbox, opened: ExitStack
) -> None:
    held = bind(opened, socket.AF_INET, ("127.0.0.1", 0))
    clients = [Client(wechat, held.getsockname(), keeps=bool(number % 2)) for number in range(8)]
    running = start(sockets=[held], verbose=False)
    for client in clients:
        client.start()
    for _ in range(3):
        before = [client.served for client in clients]
        eventually(
            "every client is served",
            lambda before=before: all(  # type: ignore[misc]
                client.served > served + 5 for client, served in zip(clients, before, strict=True)
            ),
        )
        assert running.stop() == 0
        running = start(sockets=[held], verbose=False)
    for client in clients:
        client.over.set()
    for client in clients:
        client.join(PATIENCE)
    assert [loss for client in clients for loss in client.lost] == []
    assert running.stop() == 0


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
    told = re.search("listening on (.*) for appid", running.says(" for appid"))
    assert told is not None
    ports = [held.getsockname()[1] for held in listening[:2]]
    addresses = [f"http://127.0.0.1:{ports[0]}", f"http://[::1]:{ports[1]}"]
    assert told[1].split(" and ") == [*addresses, f"unix:{path}", f"unix:@{path}"]
    for held in listening:
        connection = connect_to(opened, held)
        begin(connection)
        body = answer_on(connection)
        assert body["signature"] == signature_of(body, wechat.ticket, PAGE), held
        held.close()
    assert running.stop() == 0


def test_the_sandbox_s_curl_line_names_a_unix_socket(tmp_path: Path, opened: ExitStack) -> None:
    path = f"{tmp_path}/socket"
    held = bind(opened, socket.AF_UNIX, path)
    sandboxed = Server("--sandbox", sockets=[held], limits=Limits(grace=0))
    sandboxed.says(f'curl --unix-socket {path} "http://localhost/getApi?url=')
    connection = connect_to(opened, held)
    begin(connection)
    assert answer_on(connection)["appId"] == "wxsandbox"
    assert sandboxed.stop() == 0


def handed_over(number: int) -> dict[str, str]:
    """What systemd says in the environment."""
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(number), "LISTEN_FDNAMES": "http"}


@pytest.mark.parametrize("kind", ["datagram", "connected", "seqpacket", "file"])
def test_what_is_no_listening_stream_socket_is_refused(
    tmp_path: Path, opened: ExitStack, kind: str
) -> None:
    if kind == "datagram":
        given = socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()
    elif kind == "connected":
        ours, theirs = socket.socketpair()
        opened.enter_context(ours)
        given = theirs.detach()
    elif kind == "seqpacket":
        packets = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        packets.bind(str(tmp_path / "socket"))
        packets.listen()
        given = packets.detach()
    else:
        given = opened.enter_context((tmp_path / "file").open("w")).fileno()
    with pytest.raises(ConfigError, match=f"can't listen on file descriptor {given}, which LISTEN"):
        process.take_handed_over(handed_over(1), first=given)


def test_a_socket_that_is_refused_is_a_sentence_and_status_1() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held:
        refused = Server("--sandbox", sockets=[held])
        assert refused.wait() == 1
    assert "can't listen on file descriptor 3" in refused.output
    assert refused.output.count("\n") == 1


def test_sockets_for_another_process_are_left_alone(start: Start, wechat: Sandbox) -> None:
    running = start(LISTEN_PID="1", LISTEN_FDS="1")
    assert_signs(running, wechat)


def test_a_child_inherits_no_socket_and_takes_none_for_its_own(opened: ExitStack) -> None:
    held = bind(opened, socket.AF_INET, ("127.0.0.1", 0))
    environ = handed_over(1)
    given = os.dup(held.fileno())
    os.set_inheritable(given, True)
    [taken] = process.take_handed_over(environ, first=given)
    with taken:
        assert taken.getsockname() == held.getsockname()
        assert not taken.get_inheritable()
        assert not taken.getblocking()
    assert not environ


@pytest.mark.parametrize("number", ["", "0", "-1", "many"])
def test_no_sockets_are_none(number: str) -> None:
    assert process.take_handed_over({**handed_over(0), "LISTEN_FDS": number}) == []


def test_the_log_has_the_peer_and_what_it_says_whom_it_asks_for(
    start: Start, tmp_path: Path, opened: ExitStack
) -> None:
    held = [
        bind(opened, socket.AF_INET, ("127.0.0.1", 0)),
        bind(opened, socket.AF_UNIX, f"{tmp_path}/socket"),
    ]
    running = start(sockets=held)
    chain = "198.51.100.1, 203.0.113.7"
    for path, headers, client in (
        ("/1", {}, ""),
        ("/2", {"X-Real-IP": "203.0.113.8"}, " (203.0.113.8)"),
        ("/3", {"X-Forwarded-For": chain, "X-Real-IP": "::2"}, f" ({chain}; ::2)"),
        ("/4", {"X-Forwarded-For": f"{'1' * 999}, ::2"}, f" ({'1' * 95}, ::2)"),
    ):
        fetch(f"{running.url}{path}", **headers)
        running.says(f"404 GET {path} from 127.0.0.1{client}, ")
    connection = connect_to(opened, held[1])
    connection.sendall(b"GET /5 HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: ::2\r\n\r\n")
    running.says("404 GET /5 from a unix socket (::2), ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_the_requests_in_flight(wechat: Sandbox, number: signal.Signals) -> None:
    settings = settings_for(wechat, limits=Limits(grace=0, drain=PATIENCE))
    hold = threading.Event()
    wechat.faults["getticket"] = Fault(hold=hold)

    async def scenario() -> None:
        [listening] = listen()
        address = listening.getsockname()
        serving = asyncio.ensure_future(serve(settings, [listening]))
        callers = await open_connections(address, 20)
        for caller in callers:
            await begin_on(caller)
        signal.raise_signal(number)
        await until("the listener is closed", lambda: listening.fileno() == -1)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)
        hold.set()
        for reader, writer in callers:
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert b"Connection: close" in answer
            writer.close()
        await serving

    asyncio.run(scenario())


def test_a_request_on_its_way_when_the_server_is_stopped_is_answered(wechat: Sandbox) -> None:
    """On a new connection and on a kept one."""
    settings = settings_for(wechat, limits=Limits(grace=PATIENCE, drain=PATIENCE))

    async def scenario() -> None:
        [listening] = listen()
        serving = asyncio.ensure_future(serve(settings, [listening]))
        (new, to_new), (kept, to_kept) = await open_connections(listening.getsockname(), 2)
        to_kept.write(REQUEST)
        assert b"signature" in await kept.readuntil(b"}")
        signal.raise_signal(signal.SIGTERM)
        await until("the listener is closed", lambda: listening.fileno() == -1)
        for reader, writer in ((new, to_new), (kept, to_kept)):
            writer.write(REQUEST)
            answer = await reader.readuntil(b"}")
            assert b"HTTP/1.1 200 OK" in answer
            assert b"Connection: close" in answer
            writer.close()
        await serving

    asyncio.run(scenario())


def test_a_stop_waits_so_long_for_the_newest_connection_though_others_are_idle(
    clock: MovedClock,
) -> None:
    async def scenario() -> None:
        async with bounded(clock=clock, limits=Limits(grace=7)) as (serving, address):
            [(_, first)] = await open_connections(address, 1)
            await until("it is there", lambda: serving.busy)
            clock.advance(7)
            await until("it is idle", lambda: not serving.busy)
            [(_, second)] = await open_connections(address, 1)
            await until("a request may be on its way", lambda: serving.busy)
            clock.advance(6.9)
            before = serving.busy
            clock.advance(0.1)
            assert (before, serving.busy) == (True, False)
            first.close()
            second.close()

    asyncio.run(scenario())


def test_a_stop_waits_for_no_request_past_its_deadline() -> None:
    async def scenario() -> None:
        async with bounded(lambda request: None) as (serving, address):  # answers none
            [connection] = await open_connections(address, 1)
            await begin_on(connection)
            draining = process.drain(serving, deadline=time.monotonic() + 0.1)
            await asyncio.wait_for(draining, PATIENCE)
            await assert_closed(connection)

    asyncio.run(scenario())


def test_after_the_server_the_signals_are_whose_they_were() -> None:
    before = [signal.getsignal(number) for number in STOPS]

    async def scenario() -> None:
        with process.stop_signals():
            assert signal.getsignal(signal.SIGTERM) not in before

    asyncio.run(scenario())
    assert [signal.getsignal(number) for number in STOPS] == before


def test_a_stop_under_load_loses_nothing_of_those_who_keep_their_connection(
    start: Start, wechat: Sandbox
) -> None:
    """A new connection may be reset by a stop while it waits in the kernel's queue: only a
    socket that outlives the process saves that."""
    running = start(verbose=False)
    assert_signs(running, wechat)
    clients = [Client(wechat, running.address, only_one=True) for _ in range(8)]
    for client in clients:
        client.start()
    eventually("all are served", lambda: min(client.served for client in clients) > 50)
    running.process.terminate()
    for client in clients:
        client.join(PATIENCE)
    assert [loss for client in clients for loss in client.lost] == []
    assert all(client.over.is_set() for client in clients)
    assert running.wait() == 0


def test_a_stop_is_bounded_though_wechat_hangs_and_a_client_reads_nothing(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    """Pages are told in time when to come again."""
    wechat.faults["token"] = Fault(hold=threading.Event())
    running = start("timeout = 60", limits=Limits(drain=0.5, grace=0))
    callers = connect(running, 5)
    for caller in callers:
        begin(caller)
    connect(running, 1)[0].sendall(1000 * b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    eventually("it has asked for much", lambda: "200 GET / " in running.output)
    began = time.monotonic()
    running.process.terminate()
    for caller in callers:
        response = response_on(caller)
        assert (response.status, response.getheader("Retry-After")) == (503, "1")
    assert 0.37 < time.monotonic() - began < 4
    assert running.wait() == 0
    assert 0.37 < time.monotonic() - began < 4


@contextmanager
def disposition(number: signal.Signals, handler: Any) -> Iterator[None]:
    """What this process does at the signal, and one that is started meanwhile until it decides
    for itself."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_a_hangup_drains_and_so_does_the_second_one_of_a_closing_terminal(
    start: Start, wechat: Sandbox
) -> None:
    hold = threading.Event()
    wechat.faults["getticket"] = Fault(hold=hold)
    with disposition(signal.SIGHUP, signal.SIG_DFL):
        running = start(limits=LONG_STOP)
    with running.connect() as caller:
        begin(caller)
        running.process.send_signal(signal.SIGHUP)
        running.says("stopping")
        running.process.send_signal(signal.SIGHUP)
        hold.set()
        assert answer_on(caller)
    assert running.wait() == 0


def test_under_nohup_it_outlives_a_hangup(start: Start, wechat: Sandbox) -> None:
    with disposition(signal.SIGHUP, signal.SIG_IGN):
        running = start()
    assert running.url
    running.process.send_signal(signal.SIGHUP)
    for _ in range(3):
        assert_signs(running, wechat)
    assert "stopping" not in running.output
    assert running.stop() == 0


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_in_the_moment_the_log_says_listening_drains(
    wechat: Sandbox, caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    def stop(record: logging.LogRecord) -> bool:
        if "listening on" in record.getMessage():
            signal.raise_signal(number)
        return True

    def too_early(*_: Any) -> None:
        raise AssertionError("the server does not yet take the signal")

    log = logging.getLogger("server")
    log.addFilter(stop)
    try:
        with disposition(number, too_early):
            asyncio.run(serve(settings_for(wechat), listen()))
    finally:
        log.removeFilter(stop)
    assert "stopping" in caplog.text


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_while_the_settings_are_read_ends_it_without_a_word(
    tmp_path: Path, number: signal.Signals
) -> None:
    settings = tmp_path / "settings.ini"
    os.mkfifo(settings)
    with disposition(signal.SIGHUP, signal.SIG_DFL):
        starting = Server("--config", str(settings))

    def opened_by_the_server() -> int:
        with suppress(OSError):
            return os.open(settings, os.O_WRONLY | os.O_NONBLOCK)
        return 0

    writing = eventually("the server reads its settings", opened_by_the_server)
    starting.process.send_signal(number)
    assert (starting.wait(), starting.output) == (-number, "")
    os.close(writing)


@pytest.mark.parametrize("module", ["argparse", "redis"])
def test_an_interrupt_while_modules_are_imported_ends_it_without_a_word(
    start: Start, tmp_path: Path, module: str
) -> None:
    """Python finds this module first. The server imports argparse before all others, and redis
    after them, where one is named."""
    (tmp_path / f"{module}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    interrupted = start("[redis]", "host = 127.0.0.1", PYTHONPATH=str(tmp_path))
    assert (interrupted.wait(), interrupted.output) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
def test_a_second_stop_signal_ends_it_at_once(
    start: Start, wechat: Sandbox, first: signal.Signals, second: signal.Signals
) -> None:
    wechat.faults["token"] = Fault(hold=threading.Event())
    with disposition(signal.SIGHUP, signal.SIG_DFL):
        running = start("timeout = 60", limits=LONG_STOP)
    with running.connect() as caller:
        begin(caller)
        running.process.send_signal(first)
        running.says("stopping")
        running.process.send_signal(second)
        assert running.wait() == -second


def test_a_stop_does_not_wait_for_what_is_idle(start: Start, wechat: Sandbox) -> None:
    running = start(limits=Limits(grace=0, drain=2 * PATIENCE))
    with running.connect():
        assert_signs(running, wechat)
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 0


def test_the_ticket_is_looked_at_without_a_page_that_asks(
    wechat: Sandbox, clock: MovedClock
) -> None:
    wechat.faults["token"] = Fault(errcode=-1)  # an error is not the end of it
    limits = Limits(look_interval=0.1, look_soon=0.1)
    tickets = tickets_for(wechat, clock=clock, limits=limits)

    def fetched_twice() -> bool:
        clock.advance(100)
        return wechat.calls["getticket"] >= 2

    async def scenario() -> None:
        looking = asyncio.ensure_future(server.refresh_regularly(tickets))
        await until("WeChat was asked", lambda: wechat.calls["token"])
        wechat.faults.clear()
        await until("the ticket is fetched again and again", fetched_twice)
        looking.cancel()
        await tickets.close(timeout=PATIENCE)

    asyncio.run(scenario())


def test_a_first_ticket_of_unknown_age_is_asked_about_before_a_page_comes(
    start: Start, wechat: Sandbox, redis_server: RedisServer
) -> None:
    redis_server.run("SET", TICKET_KEY, "dead")
    running = start(*redis_server.ini)
    eventually("WeChat was asked", lambda: redis_server.run("GET", TICKET_KEY) == wechat.ticket)
    health = f"{running.url}/healthz"
    eventually("it is known", lambda: fetch(health)[1].get("ticket_usable_for", 0) > 7000)
    assert_signs(running, wechat)
    assert wechat.calls["getticket"] == 1


def test_a_server_that_stops_while_wechat_hangs_leaves_no_lock(
    start: Start, wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["getticket"] = Fault(hold=threading.Event())
    running = start(*redis_server.ini, limits=Limits(drain=0.3))
    eventually("it asks", lambda: wechat.calls["getticket"])
    assert redis_server.run("EXISTS", LOCK_KEY)
    assert running.stop() == 0
    assert not redis_server.run("EXISTS", LOCK_KEY)


def test_thousands_of_idle_and_half_connections_harm_no_other(
    start: Start, wechat: Sandbox, connect: Connect, many_files: int
) -> None:
    running = start()
    assert_signs(running, wechat)
    before = resident(running.process)
    number = min(2000, many_files // 2)
    for place, connection in enumerate(connect(running, number)):
        connection.sendall(
            (b"", b"GET /getApi?url=", b"GET / HTTP/1.1\r\nHost: a\r\nX: ")[place % 3]
        )
    assert_signs(running, wechat)
    assert resident(running.process) - before < 30 * number
    assert_signs(running, wechat)


def cpu_time(running: Server) -> float:
    """Seconds."""
    fields = Path(f"/proc/{running.process.pid}/stat").read_text().split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells it in /proc")
def test_long_heads_that_come_a_byte_at_a_time_keep_no_other_waiting(
    shared: Server, shared_wechat: Sandbox, connect: Connect, many_files: int
) -> None:
    assert_signs(shared, shared_wechat)
    slow, rounds = connect(shared, min(1000, many_files // 2)), 3
    for connection in slow:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 30_000)
    assert_signs(shared, shared_wechat)
    before = cpu_time(shared)
    for _ in range(rounds):
        for connection in slow:
            connection.sendall(b"x")
        assert_signs(shared, shared_wechat)
    assert (cpu_time(shared) - before) / (rounds * len(slow)) < 0.0003


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\n", b"\r\n\n", b"\n\r\n"])
def test_a_head_ends_with_an_empty_line_of_any_kind(shared: Server, end: bytes) -> None:
    with shared.connect() as connection:
        for _ in range(2):
            connection.sendall(f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a".encode() + end)
            assert answer_on(connection)


def test_for_a_new_connection_the_one_that_is_idle_longest_is_closed(
    small: Server, shared_wechat: Sandbox, connect: Connect
) -> None:
    active = http.client.HTTPConnection(*small.address, timeout=PATIENCE)
    held = []
    for _ in range(8):
        held += connect(small, 50)
        active.request("GET", f"/getApi?url={PAGE}")  # the same connection all the time
        assert active.getresponse().read()
    for caller in (callers := connect(small, 20)):
        begin(caller)
    for caller in callers:
        assert answer_on(caller)
    assert_signs(small, shared_wechat)
    assert held[0].recv(1) == b""  # closed by the server
    assert "Too many open files" not in small.output
    active.close()


def test_no_newcomer_takes_the_place_of_a_connection_that_waits_for_wechat(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    """Where all wait it is closed at once, until one is answered."""
    hold = threading.Event()
    wechat.faults["getticket"] = Fault(hold=hold)
    running = start("timeout = 60", files=FILES)
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
    assert "Too many open files" not in running.output


class Answering(RequestHandler):
    """A page, once it may be answered, and what is done in the moment when it is answered: the
    connection does not yet wait for its next request."""

    def initialize(self, may_answer: asyncio.Event, then: Callable[[], None]) -> None:
        self.may_answer = may_answer
        self.then = then

    async def get(self) -> None:
        await self.may_answer.wait()
        await self.finish("</html>")

    def on_finish(self) -> None:
        self.then()


@asynccontextmanager
async def at_an_answer(
    newcomer: socket.socket, *, limit: int
) -> AsyncIterator[tuple[Any, asyncio.Event]]:
    """A server's address, and the event that has it answer: with the first answer comes a
    newcomer."""
    arriving, may_answer = [newcomer], asyncio.Event()

    def arrive() -> None:
        while arriving:
            serving.handle_stream(IOStream(arriving.pop()), "")

    routes = [("/getApi", Answering, {"may_answer": may_answer, "then": arrive})]
    async with bounded(Application(routes), limit=limit) as (serving, address):
        yield address, may_answer


def test_no_request_costs_a_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of what it relies on in Tornado: without a header_timeout it sets none."""
    timers: list[object] = []
    monkeypatch.setattr("tornado.gen.with_timeout", lambda *given, **_: timers.append(given))

    async def scenario() -> None:
        async with bounded() as (_, address):
            [connection] = await open_connections(address, 1)
            await ask(connection)
            connection[1].close()

    asyncio.run(scenario())
    assert timers == []


def test_a_newcomer_is_served_in_the_moment_when_another_is_answered() -> None:
    ours, theirs = socket.socketpair()

    async def scenario() -> None:
        async with at_an_answer(theirs, limit=1) as (address, may_answer):
            [only] = await open_connections(address, 1)
            await ask(only)  # so that it was idle once
            await begin_on(only)
            [early] = await open_connections(address, 1)
            await assert_closed(early)
            may_answer.set()
            await only[0].readuntil(b"</html>")
            await assert_closed(only)
            await ask(newcomer := await asyncio.open_connection(sock=ours))
            newcomer[1].close()

    asyncio.run(scenario())


def test_no_newcomer_takes_the_place_of_what_still_receives_its_answer() -> None:
    class Long(RequestHandler):
        def get(self) -> None:
            self.finish(bytes(10_000_000) + b"</html>")

    async def scenario() -> None:
        async with bounded(Application([("/", Long)]), limit=1) as (_, address):
            [(reader, writer)] = await open_connections(address, 1)
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            await reader.readexactly(1)
            [newcomer] = await open_connections(address, 1)
            await assert_closed(newcomer)
            assert (await reader.read()).endswith(b"</html>")
            writer.close()

    asyncio.run(scenario())


def test_a_newcomer_takes_the_place_of_what_was_idle_when_another_is_answered() -> None:
    ours, theirs = socket.socketpair()

    async def scenario() -> None:
        async with at_an_answer(theirs, limit=2) as (address, may_answer):
            [waiting] = await open_connections(address, 1)
            await begin_on(waiting)
            [idle] = await open_connections(address, 1)
            await ask(idle)
            may_answer.set()
            await waiting[0].readuntil(b"</html>")
            await assert_closed(idle)
            await ask(newcomer := await asyncio.open_connection(sock=ours))
            await ask(waiting)
            newcomer[1].close()
            waiting[1].close()

    asyncio.run(scenario())


def test_connections_that_are_gone_count_no_longer(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    """Neither those that left while they waited for an answer, nor idle ones."""
    hold = threading.Event()
    wechat.faults["token"] = Fault(hold=hold)
    running = start("timeout = 60", files=FILES)
    for _ in range(300):
        with suppress(OSError), running.connect() as leaving:
            leaving.sendall(f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\n\r\n".encode())

    def serves() -> bool:
        with suppress(OSError):
            return fetch(f"{running.url}/healthz")[0] == 503
        return False

    eventually("there is room for a new connection", serves)
    hold.set()
    assert_signs(running, wechat)
    (oldest,) = connect(running, 1)
    for _ in range(300):
        running.connect().close()
    begin(oldest)
    assert answer_on(oldest)


def descriptors(running: Server) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def unsent(running: Server) -> int:
    """Bytes that the kernel holds for clients that don't read."""
    port = running.address[1]
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(at[4][:8], 16) for at in lines if at[1].endswith(f":{port:04X}"))


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux tells it in /proc")
def test_clients_that_never_read_make_room_for_newcomers(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    running = start(verbose=False, files=FILES, limits=Limits(unread=0.2))
    assert_signs(running, wechat)
    requests = 500 * b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    for connection in connect(running, FILES):
        with suppress(OSError):  # of those for which there is no room
            connection.sendall(requests)
    most = 0

    def served() -> bool:
        nonlocal most
        most = max(most, unsent(running))
        with suppress(OSError):
            assert_signs(running, wechat)
            return True
        return False

    for _ in range(50):
        eventually("a newcomer is served", served)
    assert most < 4 * process.SEND_BUFFER * FILES  # else up to 4 MiB each


def test_a_client_that_reads_slowly_gets_all_of_its_answers(
    shared: Server, connect: Connect
) -> None:
    (slow,) = connect(shared, 1)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    slow.sendall(500 * b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    slow.sendall(b"GET /end HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    received = b"".join(iter(lambda: slow.recv(4096), b""))
    assert received.count(b"HTTP/1.1 200 OK") == 500
    assert b"HTTP/1.1 404 Not Found" in received


def test_a_burst_of_newcomers_makes_room_for_itself(connect: Connect) -> None:
    """What was accepted in this very turn of the loop does not read yet, but is idle."""

    async def scenario() -> None:
        async with bounded(limit=8) as (_, address):
            waiting = [socket.create_connection(address) for _ in range(100)]
            await ask(visitor := await asyncio.open_connection(*address))
            visitor[1].close()
            for one in waiting:
                one.close()

    asyncio.run(scenario())


def test_a_stop_closes_all_at_its_end_though_clients_have_much_more_to_ask(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    running = start(verbose=False, limits=Limits(drain=1))
    assert_signs(running, wechat)
    for connection in connect(running, 300):
        connection.sendall(400 * b"GET /nope HTTP/1.1\r\nHost: a\r\n\r\n")
    began = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - began < 3


def test_while_it_stops_a_connection_ends_after_its_answer(wechat: Sandbox) -> None:
    """Before its request came, and after."""
    settings = settings_for(wechat, limits=Limits(grace=PATIENCE, drain=PATIENCE))

    async def scenario() -> None:
        [listening] = listen()
        serving = asyncio.ensure_future(serve(settings, [listening]))
        [(reader, writer)] = await open_connections(listening.getsockname(), 1)
        writer.write(REQUEST)
        assert b"signature" in await reader.readuntil(b"}")
        signal.raise_signal(signal.SIGTERM)
        await until("the listener is closed", lambda: listening.fileno() == -1)
        writer.write(3 * REQUEST)
        answers = await reader.read()  # to the end
        assert 1 <= answers.count(b"Connection: close") == answers.count(b"HTTP/1.1 200 OK") <= 2
        writer.close()
        await serving

    asyncio.run(scenario())


def test_what_is_idle_for_longer_than_the_limit_is_closed_and_nothing_else(
    clock: MovedClock,
) -> None:
    """It is looked for 15 times in that time, so here it takes 0.2 s."""

    async def scenario() -> None:
        async with bounded(clock=clock, limits=Limits(idle_timeout=3)) as (_, address):
            [new, old] = await open_connections(address, 2)
            await ask(old)
            clock.advance(2.5)
            [young] = await open_connections(address, 1)
            await ask(young)
            clock.advance(0.6)
            await assert_closed(new)
            await assert_closed(old)
            await ask(young)
            young[1].close()

    asyncio.run(scenario())


def test_what_is_idle_for_long_is_closed_and_what_waits_for_wechat_is_not(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    hold = threading.Event()
    wechat.faults["getticket"] = Fault(hold=hold)
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
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    hold = threading.Event()
    wechat.faults["token"] = Fault(hold=hold)
    running = start("timeout = 60")
    (leaving,) = connect(running, 1)
    leaving.sendall(REQUEST + 50 * b"GET /unread HTTP/1.1\r\nHost: a\r\n\r\n")
    assert leaving.recv(len(RECEIVED), socket.MSG_WAITALL) == RECEIVED
    leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    leaving.close()  # with a reset: the server's next write fails
    hold.set()
    running.says("200 GET /getApi")
    for path in ("/one", "/other"):
        assert fetch(running.url + path)[0] == 404
        running.says(path)
    assert "/unread" not in running.output


@pytest.mark.parametrize("size", [process.SIZES["max_header_size"], 200_000])
def test_a_head_over_the_limit_is_answered_before_the_connection_closes(
    shared: Server, shared_wechat: Sandbox, size: int
) -> None:
    for head in (b"GET /getApi?url=%b HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nCookie: %b\r\n\r\n"):
        with shared.connect() as connection:
            connection.sendall(head % (b"x" * size))
            response = response_on(connection)
            assert (response.status, response.getheader("Connection")) == (400, "close")
            assert "a head of 32 KiB" in json.loads(response.read())["error"]
            assert connection.recv(1) == b""
    assert_signs(shared, shared_wechat)


UNREADABLE = {
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "an odd Host": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "an odd head": b"GET / HTTP/1.1\r\nHost: a\r\nSECRET\r\n\r\n",
    "another version": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "no request": b"SECRET\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "a long body": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 33000\r\n\r\n" + bytes(33_000),
    "a body in long chunks": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"80E8\r\n" + bytes(33_000),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_can_not_be_read_is_answered_with_a_sentence_and_logged(
    shared: Server, shared_wechat: Sandbox, kind: str
) -> None:
    """A test of what it relies on in Tornado: such an answer is a status line alone."""
    before = len(shared.output)
    with shared.connect() as connection:
        connection.sendall(UNREADABLE[kind])
        response = response_on(connection)
        assert (response.status, response.getheader("Connection")) == (400, "close")
        assert "one Host header" in json.loads(response.read())["error"]
        assert connection.recv(1) == b""
    end = f"/after-{kind.replace(' ', '-')}"
    assert fetch(shared.url + end)[0] == 404
    said = shared.says(f"404 GET {end} ")[before:]
    assert said.count("WARNING 400 from 127.0.0.1: this is no HTTP/1.1 request with one Host") == 1
    assert "SECRET" not in said
    assert_signs(shared, shared_wechat)


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
def test_a_body_is_read_and_goes_nowhere(shared: Server, method: str) -> None:
    status = {"GET": 200, "OPTIONS": 204, "POST": 405}[method]
    request = f"{method} /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\n".encode()
    with shared.connect() as connection:
        for body in (
            b"Content-Length: 0\r\n\r\n",  # as some proxies send with every request
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"Content-Length: 32000\r\n\r\n" + b"\x16" * 32_000,
            b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        ):
            connection.sendall(request + body)
            response = response_on(connection)
            response.read()
            assert response.status == status
        connection.sendall(b"GET /%b HTTP/1.1\r\n\r\n" % bytes(40_000))
        assert response_on(connection).status == 400


@pytest.mark.parametrize(("method", "path"), [(b"GET", b"/"), (b"POST", b"/getApi")])
def test_what_is_not_printable_in_a_path_stays_out_of_answer_and_log(
    shared: Server, method: bytes, path: bytes
) -> None:
    target = path + b"\x9b31m\x85FORGED-" + method + b"x" * 5000
    with shared.connect() as connection:
        connection.sendall(method + b" " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        response = response_on(connection)
        assert response.status in (404, 405)
        assert len(response.read()) < 400
    shared.says(f"FORGED-{method.decode()}")
    assert "\x9b" not in shared.output
    assert "\x85" not in shared.output


@pytest.mark.parametrize("origin", ["http://sign.example.com", "HTTPS://[::1]:8060"])
def test_a_target_in_absolute_form_is_the_same_as_without_its_origin(
    shared: Server, shared_wechat: Sandbox, origin: str
) -> None:
    with shared.connect() as connection:
        begin(connection, REQUEST.replace(b"GET /", f"GET {origin}/".encode()))
        answer = answer_on(connection)
        assert answer["signature"] == signature_of(answer, shared_wechat.ticket, PAGE)
        connection.sendall(f"HEAD {origin}/ HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert response_on(connection, "HEAD").status == 200


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("before", "after"), [("unlimited", "1"), ("0", "0")])
def test_no_core_is_dumped_to_a_file_or_piped_to_a_program(before: str, after: str) -> None:
    command = f"ulimit -c {before}; exec {sys.executable} server.py --sandbox --port 0"
    shell = ["bash", "-c", command]
    with subprocess.Popen(
        shell, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as running:
        assert running.stderr is not None
        assert b"listening on" in running.stderr.readline()
        limits = Path(f"/proc/{running.pid}/limits").read_text(encoding="ascii")
        running.terminate()
    assert re.search(rf"^Max core file size +{after} +{after} ", limits, re.MULTILINE)


def test_the_limit_of_file_descriptors_is_raised_for_the_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        assert process.raise_file_limit(600) == 600
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 800
        assert process.raise_file_limit(90) == 90
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 800  # never lowered
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
