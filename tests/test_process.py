"""How the server listens, how many connections it has, and how it stops and starts again."""

from __future__ import annotations

import asyncio
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_network
from pathlib import Path
from typing import IO, Any

import pytest
from harness import (
    LOCK_KEY,
    PAGE,
    PATIENCE,
    ROOT,
    TICKET_KEY,
    Client,
    Fault,
    RedisServer,
    Sandbox,
    Server,
    Start,
    assert_signs,
    eventually,
    fetch,
    resident,
    settings_for,
    signature_of,
    until,
)
from tornado.web import Application, RequestHandler

import server
from wechat_sign import process
from wechat_sign.cache import Cache
from wechat_sign.settings import LOOPBACK, ServerSettings, Settings

REQUEST = f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n".encode()
RECEIVED = b"HTTP/1.1 100 (Continue)\r\n\r\n"
"""What the server answers at once, so that a test knows that a request is in flight."""
STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
Connect = Callable[[Server, int], list[socket.socket]]


async def serve(settings: Settings, sockets: list[socket.socket]) -> None:
    await server.serve(settings, Cache(settings), sockets)


@pytest.fixture
def held() -> Iterator[socket.socket]:
    """A listening socket, held as systemd does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Opens so many connections; they are closed at the test's end."""
    with ExitStack() as opened:
        yield lambda running, number: [
            opened.enter_context(running.connect()) for _ in range(number)
        ]


def begin(connection: socket.socket) -> None:
    """Sends a request for a signature; returns when the server has received it."""
    connection.sendall(REQUEST)
    assert connection.recv(len(RECEIVED), socket.MSG_WAITALL) == RECEIVED


def answer_on(connection: socket.socket) -> dict[str, Any]:
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    body: dict[str, Any] = json.loads(answer.read())
    assert answer.status == 200, body
    return body


def test_restarts_under_load_lose_and_refuse_nothing_on_a_socket_that_systemd_holds(
    start: Start, wechat: Sandbox, held: socket.socket
) -> None:
    clients = [Client(wechat, held.getsockname(), keeps=bool(number % 2)) for number in range(8)]
    running = start(sockets=[held], verbose=False)
    for client in clients:
        client.start()
    for _ in range(5):
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


@pytest.mark.parametrize("kind", ["IPv4", "IPv6", "unix", "abstract unix", "two"])
def test_it_answers_on_whatever_systemd_listens_on(
    start: Start, wechat: Sandbox, tmp_path: Path, kind: str
) -> None:
    path = str(tmp_path / "socket")
    families_and_names: dict[str, list[tuple[socket.AddressFamily, Any]]] = {
        "IPv4": [(socket.AF_INET, ("127.0.0.1", 0))],
        "IPv6": [(socket.AF_INET6, ("::1", 0))],
        "unix": [(socket.AF_UNIX, path)],
        "abstract unix": [(socket.AF_UNIX, f"\0{path}")],
        "two": [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, path)],
    }
    listening = []
    for family, name in families_and_names[kind]:
        listening.append(socket.socket(family))
        listening[-1].bind(name)
        listening[-1].listen()
    running = start(sockets=listening)
    told = {"IPv4": "http://127.0.0.1:", "IPv6": "http://[::1]:", "unix": f"unix:{path} "}
    told |= {"abstract unix": f"unix:@{path} ", "two": f" and unix:{path} "}
    running.says("listening on")
    assert told[kind] in running.says("for appid")
    for held in listening:
        with socket.socket(held.family) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(held.getsockname())
            begin(connection)
            body = answer_on(connection)
            assert body["signature"] == signature_of(body, wechat.ticket, PAGE)
        held.close()
    assert running.stop() == 0


def test_the_sandbox_s_curl_line_names_a_unix_socket(tmp_path: Path) -> None:
    path = f"{tmp_path}/socket"
    with socket.socket(socket.AF_UNIX) as held, socket.socket(socket.AF_UNIX) as connection:
        held.bind(path)
        held.listen()
        sandboxed = Server("--sandbox", sockets=[held])
        sandboxed.says(f'curl --unix-socket {path} "http://localhost/getApi?url=')
        connection.connect(path)
        begin(connection)
        assert answer_on(connection)["appId"] == "wxsandbox"
        assert sandboxed.stop() == 0


@pytest.mark.parametrize("kind", ["datagram", "connected", "seqpacket", "file"])
def test_what_is_no_listening_stream_socket_is_a_sentence_and_status_1(
    tmp_path: Path, kind: str
) -> None:
    held: socket.socket | IO[Any]
    if kind == "datagram":
        held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    elif kind == "connected":
        held, _other = socket.socketpair()
        _other.close()
    elif kind == "seqpacket":
        held = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        held.bind(str(tmp_path / "socket"))
        held.listen()
    else:
        held = (tmp_path / "file").open("w")
    with held:
        refused = Server("--sandbox", sockets=[held])
        assert refused.wait() == 1
    assert "can't listen on file descriptor 3" in refused.output
    assert refused.output.count("\n") == 1


def test_sockets_for_another_process_are_left_alone(start: Start, wechat: Sandbox) -> None:
    running = start(LISTEN_PID="1", LISTEN_FDS="1")
    assert_signs(running, wechat)


def test_a_child_inherits_no_socket_and_takes_none_for_its_own(held: socket.socket) -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"}
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
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": number}
    assert process.take_handed_over(environ) == []


PROXIES = LOOPBACK + (ip_network("10.0.0.0/8"),)
ON_A_UNIX_SOCKET = "0.0.0.0"


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "203.0.113.7", "203.0.113.7"),
        ("127.0.0.1", "2001:db8::7", "2001:db8::7"),
        ("::ffff:127.0.0.1", "203.0.113.7", "203.0.113.7"),
        ("::1", " 198.51.100.1,  203.0.113.7 ,10.0.0.5", "203.0.113.7"),
        ("127.0.0.1", "198.51.100.1, unknown, 10.0.0.5", "10.0.0.5"),
        ("127.0.0.1", "203.0.113.7:4711", "127.0.0.1"),
        ("127.0.0.1", "\x1b[2J", "127.0.0.1"),
        ("127.0.0.1", "10.0.0.6, 10.0.0.5", "10.0.0.6"),
        ("127.0.0.1", "fe80::1%\x85forged", "127.0.0.1"),
        ("127.0.0.1", "198.51.100.1, 0.0.0.0", "127.0.0.1"),
        ("203.0.113.7", "198.51.100.1", "203.0.113.7"),
        ("203.0.113.7", "127.0.0.1, 10.0.0.5", "203.0.113.7"),
        ("fe80::1%eth0", "198.51.100.1", "fe80::1%eth0"),
        (ON_A_UNIX_SOCKET, "", "a unix socket"),
        (ON_A_UNIX_SOCKET, "unix:", "a unix socket"),
        (ON_A_UNIX_SOCKET, "203.0.113.7", "203.0.113.7"),
    ],
)
def test_the_client_is_who_the_nearest_trusted_proxies_say_and_nobody_else(
    peer: str, forwarded: str, client: str
) -> None:
    assert process.client_address(peer, forwarded, PROXIES) == client


def test_the_log_has_the_clients_address_and_only_a_proxy_can_name_it(
    start: Start, tmp_path: Path
) -> None:
    forged = {"X-Forwarded-For": "198.51.100.1, 203.0.113.7", "X-Real-IP": "198.51.100.2"}
    behind, apart = start(), start("[server]", "trusted_proxies = 10.0.0.0/8")
    for running, path, client in (
        (behind, "/1", "203.0.113.7"),
        (apart, "/2", "127.0.0.1"),
    ):
        fetch(f"{running.url}{path}", **forged)
        running.says(f"404 GET {path} from {client}, ")
    fetch(f"{behind.url}/3", **{"X-Real-IP": "203.0.113.8"})
    behind.says("404 GET /3 from 203.0.113.8, ")
    fetch(f"{behind.url}/4")
    behind.says("404 GET /4 from 127.0.0.1, ")
    with socket.socket(socket.AF_UNIX) as held, socket.socket(socket.AF_UNIX) as connection:
        held.bind(f"{tmp_path}/socket")
        held.listen()
        running = start(sockets=[held])
        connection.connect(f"{tmp_path}/socket")
        connection.sendall(b"GET /5 HTTP/1.1\r\nHost: a\r\n\r\n")
        running.says("404 GET /5 from a unix socket, ")
        connection.sendall(b"GET /6 HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: ::2\r\n\r\n")
        running.says("404 GET /6 from ::2, ")


async def open_connections(
    address: tuple[str, int], number: int
) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    return [await asyncio.open_connection(*address) for _ in range(number)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_the_requests_in_flight(
    wechat: Sandbox, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(process, "GRACE", 0)
    hold = threading.Event()
    wechat.faults["getticket"] = Fault(hold=hold)

    async def scenario() -> None:
        [listening] = process.listen(ServerSettings("127.0.0.1", 0))
        address = listening.getsockname()
        serving = asyncio.ensure_future(serve(settings_for(wechat), [listening]))
        callers = await open_connections(address, 20)
        for reader, writer in callers:
            writer.write(REQUEST)
            await reader.readuntil(RECEIVED)
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


def test_a_request_on_its_way_when_the_server_is_stopped_is_answered(
    wechat: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a new connection and on a kept one; none is waited for longer than DRAIN."""
    monkeypatch.setattr(process, "GRACE", PATIENCE)

    async def scenario() -> None:
        [listening] = process.listen(ServerSettings("127.0.0.1", 0))
        serving = asyncio.ensure_future(serve(settings_for(wechat), [listening]))
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


def test_a_stop_waits_for_the_newest_connection_though_others_are_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "GRACE", 0.1)

    async def scenario() -> None:
        listening = process.listen(ServerSettings("127.0.0.1", 0))
        bounded = process.BoundedServer(Application())
        bounded.add_sockets(listening)
        (_, first), *_ = await open_connections(listening[0].getsockname(), 1)
        await until("it is there", lambda: bounded.busy)
        await until("it is idle", lambda: not bounded.busy)
        (_, second), *_ = await open_connections(listening[0].getsockname(), 1)
        await until("a request may be on its way", lambda: bounded.busy)
        bounded.stop()
        await bounded.close_all_connections()
        first.close()
        second.close()

    asyncio.run(scenario())


def test_a_stop_waits_for_no_request_past_its_deadline() -> None:
    async def scenario() -> None:
        listening = process.listen(ServerSettings("127.0.0.1", 0))
        bounded = process.BoundedServer(lambda request: None)  # answers nobody
        bounded.add_sockets(listening)
        [(reader, writer)] = await open_connections(listening[0].getsockname(), 1)
        writer.write(REQUEST)
        await reader.readuntil(RECEIVED)
        draining = process.drain(bounded, deadline=time.monotonic() + process.GRACE + 0.1)
        await asyncio.wait_for(draining, PATIENCE)
        assert await reader.read() == b""
        writer.close()

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


def test_a_stop_is_bounded_though_wechat_hangs_and_tells_pages_when_to_come_again(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    wechat.faults["token"] = Fault(hold=threading.Event())
    running = start("timeout = 60")
    callers = connect(running, 5)
    for caller in callers:
        begin(caller)
    began = time.monotonic()
    running.process.terminate()
    for caller in callers:
        answer = http.client.HTTPResponse(caller)
        answer.begin()
        assert (answer.status, answer.getheader("Retry-After")) == (503, "1")
    assert running.wait() == 0
    assert time.monotonic() - began < process.DRAIN + 5


@contextmanager
def disposition(number: signal.Signals, handler: signal.Handlers) -> Iterator[None]:
    """What a process started meanwhile does at the signal until it decides for itself."""
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
        running = start()
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
    start: Start, number: signal.Signals
) -> None:
    with disposition(signal.SIGHUP, signal.SIG_DFL):
        running = start()
    deadline = time.monotonic() + PATIENCE
    while "listening" not in running.output and time.monotonic() < deadline:
        time.sleep(0)  # eventually() would come too late to see it fail
    running.process.send_signal(number)
    assert running.wait() == 0
    assert "stopping" in running.output


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


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("first", STOPS)
def test_a_second_stop_signal_ends_it_at_once(
    start: Start, wechat: Sandbox, first: signal.Signals, second: signal.Signals
) -> None:
    wechat.faults["token"] = Fault(hold=threading.Event())
    with disposition(signal.SIGHUP, signal.SIG_DFL):
        running = start("timeout = 60")
    with running.connect() as caller:
        begin(caller)
        running.process.send_signal(first)
        running.says("stopping")
        began = time.monotonic()
        running.process.send_signal(second)
        assert running.wait() == -second
        assert time.monotonic() - began < process.DRAIN / 2


def test_a_stop_waits_for_nobody_who_is_idle(start: Start, wechat: Sandbox) -> None:
    running = start()
    with running.connect():
        assert_signs(running, wechat)
        began = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - began < process.DRAIN


def test_the_ticket_is_looked_at_without_a_page_that_asks(wechat: Sandbox) -> None:
    settings = settings_for(wechat, expire=1)
    wechat.faults["token"] = Fault(errcode=-1)  # an error is not the end of it

    async def scenario() -> None:
        sockets = process.listen(ServerSettings("127.0.0.1", 0))
        serving = asyncio.ensure_future(serve(settings, sockets))
        await until("WeChat was asked", lambda: wechat.calls["token"])
        wechat.faults.clear()
        await until("the ticket is fetched again", lambda: wechat.calls["getticket"] >= 2)
        signal.raise_signal(signal.SIGTERM)
        await serving

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
    running = start(*redis_server.ini)
    eventually("it asks", lambda: wechat.calls["getticket"])
    assert redis_server.run("EXISTS", LOCK_KEY)
    assert running.stop() == 0
    assert not redis_server.run("EXISTS", LOCK_KEY)


def test_thousands_of_idle_and_half_connections_harm_nobody(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    running = start()
    assert_signs(running, wechat)
    before = resident(running.process)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = min(3000, hard // 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = connect(running, number)
    for place, connection in enumerate(held):
        connection.sendall(
            (b"", b"GET /getApi?url=", b"GET / HTTP/1.1\r\nHost: a\r\nX: ")[place % 3]
        )
    assert_signs(running, wechat)
    assert resident(running.process) - before < 30 * number
    assert_signs(running, wechat)


def test_callers_are_served_at_once_though_idle_connections_take_all_there_may_be(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    running = start(files=256)
    idle = connect(running, 400)
    callers = connect(running, 20)
    for caller in callers:
        begin(caller)
    for caller in callers:
        assert answer_on(caller)
    assert idle[0].recv(1) == b""  # closed by the server


def cpu_time(running: Server) -> float:
    """Seconds."""
    fields = Path(f"/proc/{running.process.pid}/stat").read_text().split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells it in /proc")
def test_long_heads_that_come_a_byte_at_a_time_keep_nobody_waiting(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    running = start(verbose=False)
    assert_signs(running, wechat)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    slow, rounds = connect(running, min(1000, hard // 2)), 3
    for connection in slow:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 30_000)
    assert_signs(running, wechat)
    before = cpu_time(running)
    for _ in range(rounds):
        for connection in slow:
            connection.sendall(b"x")
        assert_signs(running, wechat)
    assert (cpu_time(running) - before) / (rounds * len(slow)) < 0.0003


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\n", b"\r\n\n", b"\n\r\n"])
def test_a_head_ends_with_an_empty_line_of_any_kind(
    start: Start, wechat: Sandbox, connect: Connect, end: bytes
) -> None:
    (connection,) = connect(start(), 1)
    for _ in range(2):
        connection.sendall(f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a".encode() + end)
        assert answer_on(connection)


def test_for_a_new_connection_the_one_that_is_idle_longest_is_closed(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    running = start(files=256)
    active = http.client.HTTPConnection(*running.address, timeout=PATIENCE)
    held = []
    for _ in range(8):
        held += connect(running, 50)
        active.request("GET", f"/getApi?url={PAGE}")  # the same connection all the time
        assert active.getresponse().read()
    assert_signs(running, wechat)
    assert held[0].recv(1) == b""  # closed by the server
    assert "Too many open files" not in running.output
    active.close()


def waiting(
    start: Start, wechat: Sandbox, connect: Connect, number: int
) -> tuple[Server, list[socket.socket], threading.Event]:
    """A server, so many callers who wait for WeChat, and the event that has it answer."""
    hold = threading.Event()
    wechat.faults["getticket"] = Fault(hold=hold)
    running = start("timeout = 60", files=256)
    callers = connect(running, number)
    for caller in callers:
        begin(caller)
    return running, callers, hold


def test_whoever_waits_for_an_answer_is_not_idle(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    running, callers, hold = waiting(start, wechat, connect, 20)
    connect(running, 400)
    hold.set()
    for caller in callers:
        assert answer_on(caller)
    assert "Too many open files" not in running.output


def test_where_all_are_answered_newcomers_are_closed_until_one_is_idle(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    running, callers, hold = waiting(start, wechat, connect, 192)
    for newcomer in connect(running, 20):
        with suppress(ConnectionResetError):
            assert newcomer.recv(1) == b""
    hold.set()
    for caller in callers:
        assert answer_on(caller)
    assert_signs(running, wechat)


def test_no_answer_waits_until_the_one_before_is_acknowledged(wechat: Sandbox) -> None:
    nodelay: list[int] = []

    class Signing(server.SigningApplication):
        def log_request(self, handler: RequestHandler) -> None:
            connection: Any = handler.request.connection
            accepted = connection.stream.socket
            nodelay.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    async def scenario() -> None:
        settings = settings_for(wechat)
        application = Signing(settings, server.make_tickets(settings, Cache(settings)))
        bounded = process.BoundedServer(application)
        bounded.add_sockets(listening := process.listen(ServerSettings("127.0.0.1", 0)))
        [(reader, writer)] = await open_connections(listening[0].getsockname(), 1)
        for _ in range(2):
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"}"), PATIENCE)
        writer.close()
        bounded.stop()

    asyncio.run(scenario())
    assert len(nodelay) == 2
    assert all(nodelay)


def test_connections_that_are_gone_count_no_longer(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    """Neither idle ones nor those that left while they waited for an answer."""
    hold = threading.Event()
    running = start("timeout = 60", files=256)
    assert_signs(running, wechat)
    (oldest,) = connect(running, 1)
    for _ in range(300):
        running.connect().close()
    begin(oldest)
    assert answer_on(oldest)

    wechat.faults["token"] = Fault(hold=hold)
    waiting = start("timeout = 60", files=256)
    assert waiting.url
    for _ in range(300):
        with suppress(OSError), waiting.connect() as leaving:
            leaving.sendall(f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\n\r\n".encode())

    def serves() -> bool:
        with suppress(OSError):
            return fetch(f"{waiting.url}/healthz")[0] == 503
        return False

    eventually("there is room for a new connection", serves)
    hold.set()


def test_while_all_wait_for_an_answer_a_new_connection_is_closed(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    hold = threading.Event()
    wechat.faults["getticket"] = Fault(hold=hold)
    running = start("timeout = 60", files=256)
    callers = connect(running, 256 * 3 // 4)
    for caller in callers:
        begin(caller)
    for newcomer in connect(running, 100):
        assert newcomer.recv(1) == b""  # closed by the server
    hold.set()
    for caller in callers:
        assert answer_on(caller)
    begin(callers[0])
    assert answer_on(callers[0])


def descriptors(running: Server) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def unsent(running: Server) -> int:
    """Bytes that the kernel holds for clients that don't read."""
    port = running.address[1]
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(at[4][:8], 16) for at in lines if at[1].endswith(f":{port:04X}"))


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux tells it in /proc")
def test_clients_that_never_read_are_closed_and_one_that_reads_slowly_is_not(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    running = start(verbose=False, write_timeout=2, files=256)
    assert_signs(running, wechat)
    (slow,) = connect(running, 1)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    begin(slow)
    assert answer_on(slow)
    before, number, requests = descriptors(running), 150, 1000
    ask = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    for connection in connect(running, number):
        connection.sendall(requests * ask)
    slow.sendall(requests * ask + b"GET /end HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    most, received = 0, bytearray()

    def closed() -> bool:
        nonlocal most
        received.extend(slow.recv(128 * 1024))
        most = max(most, unsent(running))
        assert_signs(running, wechat)
        return descriptors(running) <= before + 1  # which that of assert_signs may be

    eventually("those that never read are closed", closed)
    assert most < 3 * process.SEND_BUFFER * number
    received.extend(b"".join(iter(lambda: slow.recv(1024 * 1024), b"")))
    assert received.count(b"HTTP/1.1 200 OK") == requests
    assert b"HTTP/1.1 404 Not Found" in received
    callers = connect(running, number)
    for caller in callers:
        begin(caller)
    for caller in callers:
        assert answer_on(caller)


def test_what_is_idle_for_long_is_closed_and_what_waits_for_wechat_is_not(
    start: Start, wechat: Sandbox, connect: Connect
) -> None:
    hold = threading.Event()
    wechat.faults["getticket"] = Fault(hold=hold)
    running = start("timeout = 60", idle_timeout=0.5)
    new, half, kept, waiting = connect(running, 4)
    half.sendall(b"GET / HT")
    kept.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
    answer = http.client.HTTPResponse(kept)
    answer.begin()
    answer.read()
    begin(waiting)
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


@pytest.mark.parametrize("size", [process.LIMITS["max_header_size"], 200_000])
def test_a_head_over_the_limit_is_answered_before_the_connection_closes(
    start: Start, wechat: Sandbox, size: int
) -> None:
    running = start()
    for head in (b"GET /getApi?url=%b HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nCookie: %b\r\n\r\n"):
        with running.connect() as connection:
            connection.sendall(head % (b"x" * size))
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, answer.getheader("Connection")) == (431, "close")
            assert "longer than 32 KiB" in json.loads(answer.read())["error"]
            assert connection.recv(1) == b""
    assert_signs(running, wechat)


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
def test_a_request_with_a_body_is_refused_in_json(
    start: Start, wechat: Sandbox, method: str
) -> None:
    running = start()
    head = f"{method} /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\n".encode()
    for body in (
        b"Content-Length: 1\r\n\r\nx",
        b"Content-Length: 500000\r\n\r\n" + bytes(500_000),
        b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 100 + b"\r\nx\r\n0\r\n\r\n",
    ):
        with running.connect() as connection:
            connection.sendall(head + body)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, answer.getheader("Connection")) == (400, "close")
            assert "has a body" in json.loads(answer.read())["error"]
            assert connection.recv(1) == b""
    assert_signs(running, wechat)


def test_an_empty_body_is_none(start: Start, wechat: Sandbox, connect: Connect) -> None:
    """Some proxies send one with every request."""
    (connection,) = connect(start(), 1)
    request = f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\n".encode()
    for body in (b"Content-Length: 0\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"):
        connection.sendall(request + body)
        assert answer_on(connection)
    connection.sendall(b"GET /%b HTTP/1.1\r\n\r\n" % bytes(40_000))
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    assert answer.status == 431


def test_what_is_not_printable_in_a_path_stays_out_of_answer_and_log(
    start: Start, wechat: Sandbox
) -> None:
    running = start()
    for method in (b"GET", b"POST"):
        with running.connect() as connection:
            path = b"/getApi" if method == b"POST" else b"/"
            connection.sendall(
                method
                + b" "
                + path
                + b"\x9b31m\x85FORGED"
                + b"x" * 5000
                + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
            )
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            body = answer.read()
            assert answer.status in (404, 405)
            assert len(body) < 400
    running.says("FORGED")
    assert "\x9b" not in running.output
    assert "\x85" not in running.output


@pytest.mark.parametrize("origin", ["http://sign.example.com", "HTTPS://[::1]:8060"])
def test_a_target_in_absolute_form_is_the_same_as_without_its_origin(
    start: Start, wechat: Sandbox, origin: str
) -> None:
    running = start()
    with running.connect() as connection:
        connection.sendall(REQUEST.replace(b"GET /", f"GET {origin}/".encode()))
        assert connection.recv(len(RECEIVED), socket.MSG_WAITALL) == RECEIVED
        answer = answer_on(connection)
        assert answer["signature"] == signature_of(answer, wechat.ticket, PAGE)
        for target in (origin, f"{origin}?x=1/y", f"{origin}/"):
            connection.sendall(f"HEAD {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            response = http.client.HTTPResponse(connection, method="HEAD")
            response.begin()
            assert response.status == 200
            assert response.getheader("Content-Type") == "text/html; charset=UTF-8"


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
