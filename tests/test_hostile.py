"""What answers in the place of WeChat or Redis, and means harm or makes no sense."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import random
import shutil
import socket
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
from harness import (
    LOCK_KEY,
    PAGE,
    PATIENCE,
    TICKET_KEY,
    TOKEN_KEY,
    Fault,
    Instance,
    MovedClock,
    RedisServer,
    Sandbox,
    Start,
    assert_no_credential,
    assert_signs,
    eventually,
    fetch,
    instance_for,
    resident,
    run_check,
    tickets_for,
    write_ini,
)
from topologies import Certificates

from wechat_sign.credentials import WeChat
from wechat_sign.errors import (
    LockedElsewhere,
    LookHangs,
    SigningError,
    Unexpected,
    WeChatRefused,
    WeChatUnreachable,
)
from wechat_sign.settings import Limits, RedisUrl, WeChatSettings, load_settings
from wechat_sign.tickets import JsapiTickets

Behaviour = Callable[[socket.socket], None]
TIMEOUT = 0.3
DRIP = 0.02
"""Seconds between two bytes; each is in time, all together are not."""


class Impostor:
    """Listens, and does with each connection what it is told to."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.over = threading.Event()
        self.connections = 0
        self._open: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    @property
    def port(self) -> int:
        return int(self._listening.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        with ExitStack() as stack:
            while not self.over.is_set():
                connection, _ = self._listening.accept()
                self.connections += 1
                stack.callback(self._serve(connection).join, PATIENCE)

    def _serve(self, connection: socket.socket) -> threading.Thread:
        def serve() -> None:
            # Who is cut off, or not listened to, is not hurt.
            with connection, suppress(OSError):
                connection.settimeout(PATIENCE)
                self.behave(connection)

        self._open.append(connection)
        thread = threading.Thread(target=serve)
        thread.start()
        return thread

    def stop(self) -> None:
        self.over.set()
        socket.create_connection(("127.0.0.1", self.port)).close()
        for connection in self._open:
            with suppress(OSError):  # most are closed by now
                connection.shutdown(socket.SHUT_RDWR)
        self._accepting.join(PATIENCE)
        self._listening.close()

    def drip(self, connection: socket.socket, pattern: bytes) -> None:
        """Sends it over and over, a byte at a time, until it is cut off."""
        for byte in cycle(pattern):
            connection.sendall(bytes([byte]))
            if self.over.wait(DRIP):
                return

    def pour(self, connection: socket.socket, block: bytes) -> None:
        """Sends it over and over, until it is cut off."""
        while not self.over.is_set():
            connection.sendall(block)


@contextmanager
def impostor(behave: Behaviour) -> Iterator[Impostor]:
    started = Impostor(behave)
    try:
        yield started
    finally:
        started.stop()


OK = b"HTTP/1.1 200 OK\r\n"
FOUND = b"HTTP/1.1 302 Found\r\nLocation: /\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
DRIPPED = {
    "status line": (b"", b"HTTP/1.1 200 " + b"O" * 60_000),
    "header": (OK, b"X: " + b"x" * 60_000),
    "headers": (OK, b"X: x\r\n"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": (OK + b"Content-Length: 8000\r\n\r\n", b" "),
    "body that closes": (OK + b"Connection: close\r\n\r\n", b" "),
    "chunk size": (OK + CHUNKED, b"0" * 60_000),
    "chunk extension": (OK + CHUNKED + b"1;", b"x" * 60_000),
    "chunks": (OK + CHUNKED, b"1\r\n \r\n"),
    "trailer": (OK + CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: x\r\n"),
    "redirect's body": (FOUND + b"Content-Length: 8000\r\n\r\n", b" "),
}


def client(url: str, timeout: float = TIMEOUT) -> WeChat:
    account = {"appid": "wx1", "secret": "s3cr3t", "token_api": "token"}
    return WeChat(WeChatSettings(**account, api=url, timeout=timeout))


def ask(url: str, timeout: float = TIMEOUT) -> None:
    client(url, timeout).fetch_access_token()


@contextmanager
def no_thread_is_left() -> Iterator[None]:
    """Every thread that begins within has ended soon after, and what it began."""
    before = set(threading.enumerate())
    yield
    eventually("all that began has ended", lambda: set(threading.enumerate()) <= before)


QUICK = Limits(lease_margin=0.1)
"""With TIMEOUT a look ends after three times 0.7 s."""


def looking(tickets: JsapiTickets, scenario: Callable[[JsapiTickets], Awaitable[None]]) -> None:
    """The scenario, after which no thread may be left."""

    async def whole() -> None:
        await scenario(tickets)
        await tickets.close(timeout=0)

    with no_thread_is_left():
        asyncio.run(asyncio.wait_for(whole(), 3 * PATIENCE))


@pytest.mark.parametrize("part", DRIPPED)
def test_whatever_part_of_an_answer_drips_a_look_has_an_end_and_so_has_the_next(part: str) -> None:
    head, dripped = DRIPPED[part]

    def behave(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(head)
        hostile.drip(connection, dripped)

    async def scenario(tickets: JsapiTickets) -> None:
        for _ in range(2):
            with pytest.raises((WeChatUnreachable, LookHangs)):
                await tickets.current()
            clock.advance(60)
        hostile.stop()

    clock, limits = MovedClock(), Limits(lease_margin=0.1)
    hostile = Impostor(behave)
    wechat = Sandbox()
    wechat.url = hostile.url
    looking(tickets_for(wechat, clock=clock, timeout=0.1, limits=limits), scenario)


def test_a_body_that_drips_is_given_up_by_the_call_itself() -> None:
    def behave(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(DRIPPED["body"][0])
        hostile.drip(connection, b" ")

    with impostor(behave) as hostile, pytest.raises(WeChatUnreachable, match="ReadTimeout"):
        ask(hostile.url)


def test_no_cookie_is_kept(wechat: Sandbox, clock: MovedClock) -> None:
    """What answers in WeChat's place, a captive portal for one, may set as many as it likes."""
    asked: list[bytes] = []
    odd = cycle([b"a=b", b"\xff=;;=", b"a=b; expires=x; Max-Age=-1; Domain=.", b"=;"])

    def behave(connection: socket.socket) -> None:
        asked.append(connection.recv(65536))
        large = b"".join(b"Set-Cookie: c%d=%b\r\n" % (n, b"x" * 900) for n in range(20))
        head = OK + b"Set-Cookie: " + next(odd) + b"\r\n" + large
        connection.sendall(head + b"Content-Length: 2\r\n\r\n{}")

    with impostor(behave) as portal:
        wechat.url = portal.url
        instance = instance_for(wechat, clock=clock)
        for _ in range(12):
            with pytest.raises(WeChatUnreachable, match="no access_token"):
                instance.look()
            clock.advance(60)
        assert len(asked) == 12
    assert not [request for request in asked if b"cookie:" in request.lower()]


def test_a_cookie_that_python_stumbles_over_puts_no_traceback_into_the_log(
    start: Start, wechat: Sandbox
) -> None:
    def behave(connection: socket.socket) -> None:
        connection.recv(65536)
        cookie = b"Set-Cookie: a=b; Max-Age=" + b"9" * 500 + b"\r\n"
        connection.sendall(OK + cookie + b"Content-Length: 2\r\n\r\n{}")

    with impostor(behave) as portal:
        wechat.url = portal.url
        output = start().says("it has no access_token in it")
        assert all(line.startswith("20") for line in output.splitlines())


BOMB = gzip.compress(bytes(50_000_000))
ENDLESS = {
    "plain": (b"\r\n", b"x" * 65536),
    "sized": (b"Content-Length: 1000000000\r\n\r\n", b"x" * 65536),
    "chunked": (CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    "gzip": (b"Content-Encoding: gzip\r\n\r\n", BOMB),
    "gzip of gzip": (b"Content-Encoding: gzip, gzip\r\n\r\n", gzip.compress(BOMB)),
}


@pytest.mark.parametrize("first", [OK, FOUND, b"HTTP/1.1 502 Bad Gateway\r\n"])
@pytest.mark.parametrize("kind", ENDLESS)
def test_an_answer_without_end_is_not_read(first: bytes, kind: str) -> None:
    head, block = ENDLESS[kind]
    poured = threading.Event()

    def behave(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(first + head)
        try:
            wechat.pour(connection, block)
        finally:
            poured.set()

    with impostor(behave) as wechat:
        with pytest.raises(WeChatUnreachable, match=r"HTTP|ContentDecodingError"):
            ask(wechat.url, timeout=PATIENCE)
        assert poured.wait(PATIENCE)  # it was cut off


def test_a_server_is_no_larger_after_redirects_with_bodies_of_gigabytes(
    start: Start, wechat: Sandbox
) -> None:
    def behave(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(FOUND + b"Content-Encoding: gzip\r\nContent-Length: 1000000000\r\n\r\n")
        portal.pour(connection, BOMB)

    usual = start()
    assert_signs(usual, wechat)
    with impostor(behave) as portal:
        wechat.url = portal.url
        running = start()
        assert fetch(f"{running.url}/getApi?url={PAGE}")[0] == 503
        running.says("HTTP 302")
        assert resident(running.process) - resident(usual.process) < 8_000


def relay(connection: socket.socket, port: int) -> None:
    """Hands on to the port whatever comes, and back."""

    def copy(source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            for received in iter(lambda: source.recv(65536), b""):
                to.sendall(received)
            to.shutdown(socket.SHUT_WR)

    with socket.create_connection(("127.0.0.1", port)) as onward:
        back = threading.Thread(target=copy, args=(onward, connection))
        back.start()
        copy(connection, onward)
        back.join(PATIENCE)


def port_of(wechat: Sandbox) -> int:
    return int(wechat.url.rpartition(":")[2])


def test_who_waits_for_an_answer_that_drips_is_told_so_and_the_next_call_is_answered(
    start: Start, wechat: Sandbox
) -> None:
    port, dripping = port_of(wechat), True

    def behave(connection: socket.socket) -> None:
        if dripping:
            connection.recv(65536)
            hostile.drip(connection, OK[:1] * 60_000)
        else:
            relay(connection, port)

    with impostor(behave) as hostile:
        wechat.url = hostile.url
        running = start(f"timeout = {TIMEOUT}", limits=QUICK)
        assert fetch(f"{running.url}/getApi?url={PAGE}")[0] == 503  # it would drip for 20 minutes
        running.says("a look did not end within 2.1 s")
        dripping = False
        eventually("it signs", lambda: fetch(f"{running.url}/getApi?url={PAGE}")[0] == 200)
        assert_signs(running, wechat)


@pytest.mark.parametrize(
    "location", [b"/", b"http://[::1", b"http://\xd6\xd0/", b"http://\xd6\xd0\xb9\xfa/", b"\xff"]
)
def test_a_redirect_is_not_followed_and_backs_off_like_any_other_failure(
    wechat: Sandbox, clock: MovedClock, location: bytes
) -> None:
    def behave(connection: socket.socket) -> None:
        while connection.recv(65536):
            head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: "
            connection.sendall(head + location + b"\r\n\r\n")

    with impostor(behave) as portal:
        wechat.url = portal.url
        instance = instance_for(wechat, clock=clock)
        for _ in range(20):
            with pytest.raises(WeChatUnreachable, match="HTTP 302"):
                instance.look()
        assert portal.connections == 1
        clock.advance(instance.pause)
        with pytest.raises(WeChatUnreachable, match="HTTP 302"):
            instance.look()
        assert portal.connections == 2


def test_netrc_is_not_sent_and_proxies_of_the_environment_are_used(
    wechat: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password s3cr3t\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    asked: list[bytes] = []

    def behave(connection: socket.socket) -> None:
        asked.append(connection.recv(65536))
        connection.sendall(OK + b"Content-Length: 2\r\n\r\n{}")

    with impostor(behave) as other:
        for proxy, host in ((None, other.url), (other.url, "http://api.weixin.qq.com")):
            if proxy:
                monkeypatch.setenv("http_proxy", proxy)
            with pytest.raises(WeChatUnreachable, match="no access_token"):
                ask(host, PATIENCE)
        assert asked[1].startswith(b"GET http://api.weixin.qq.com/cgi-bin/token?")
        assert not [request for request in asked if b"authorization:" in request.lower()]


BODY = b'{"access_token": "t0ken", "ticket": "t1cket-of_0", "expires_in": 7200}'
GOOD = OK + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
ODD = [
    *(b"\r\n", b"\0", b"\xff\xfe", b"\x85", b"\x1b[2J", b"-1", b"9" * 400, b"[" * 2000, b'"'),
    *(b"null", b"NaN", b"1e999", b"{}", b"\\ud800", b'errcode": 40001, "', b"chunked", b": "),
    *(b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"HTTP/1.1 100\r\n\r\n"),
    *(b"Content-Encoding: gzip\r\n", b"Set-Cookie: \xff=;;=\r\n", b"Location: http://\xd6\r\n"),
]


def mutated(answer: bytes, chance: random.Random) -> bytes:
    """With some of its bytes changed, lost, doubled, or something odd in between."""
    for _ in range(chance.choice([1, 1, 2, 5])):
        at, size = chance.randrange(len(answer) + 1), chance.choice([0, 1, 1, 4, 40])
        middle = chance.choice([b"", bytes([chance.randrange(256)]), chance.choice(ODD)])
        answer = answer[:at] + middle + answer[at + size :]
    return answer


def test_no_answer_raises_what_is_not_foreseen_or_is_asked_for_again_too_soon(
    wechat: Sandbox, clock: MovedClock, mutations: int, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(12)
    answer = b""

    def behave(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(answer)

    got = 0
    with impostor(behave) as hostile:
        wechat.url = hostile.url
        for _ in range(mutations):
            instance = instance_for(wechat, clock=clock, timeout=PATIENCE)
            answer = mutated(GOOD, chance)
            try:
                instance.look()
                got += 1
            except SigningError as error:
                assert type(error) in (WeChatRefused, WeChatUnreachable)  # noqa: PT017
                before = hostile.connections
                clock.advance(instance.pause / 2)
                with pytest.raises(type(error)):
                    instance.look()
                assert hostile.connections == before
    assert mutations / 10 < got < mutations / 2
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_an_unforeseen_error_backs_off_and_costs_no_page_that_has_a_ticket(
    wechat: Sandbox,
    clock: MovedClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def break_down(*_given: object, **_more: object) -> None:
        raise OverflowError(wechat.secret)

    instance = instance_for(wechat, clock=clock)
    instance.look()
    held = instance.ticket
    monkeypatch.setattr(requests.Session, "request", break_down)
    caplog.clear()
    clock.advance(601)
    instance.look()
    assert instance.ticket == held
    clock.advance(0.5)
    instance.look()
    assert instance.ticket == held
    [record] = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert "OverflowError in test_hostile.py, line" in record.getMessage()
    assert record.exc_info is None
    clock.advance(7200)
    with pytest.raises(Unexpected):
        instance.look()
    monkeypatch.undo()
    clock.advance(instance.pause)
    assert instance.look() == wechat.ticket
    assert instance.error is None


NONSENSE = {
    "a number that is none": b":abc\r\n",
    "nested arrays": b"*1\r\n" * 3000 + b":1\r\n",
    "nested arrays without an end": b"*1\r\n" * 3000,
    "a length below zero": b"$-7\r\n",
    "a length that is none": b"$x\r\n",
    "a length of letters": b"$abc\r\n",
    "no type that there is": b"?\r\n",
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "binary": bytes(range(256)),
    "OK to all": b"+OK\r\n" * 20,
    "a word to all": b"+s3cr3t\r\n" * 20,
    "nothing to all": b"$-1\r\n" * 20,
    "numbers to all": b":1\r\n" * 20,
    "empty arrays": b"*0\r\n" * 20,
    "arrays of a number": b"*1\r\n:1\r\n" * 20,
    "another type": b"%1\r\n+a\r\n:1\r\n" * 20,
    "another type of error": b"!s3cr3t\r\n" * 20,
    "an error with ESC in it": b"-ERR \x1b[2J\xc2\x9b\xe2\x80\xae\r\n" * 20,
}


@contextmanager
def nonsense(reply: str) -> Iterator[Impostor]:
    """A Redis that answers whatever it is sent with the same bytes."""

    def behave(connection: socket.socket) -> None:
        while connection.recv(65536):
            connection.sendall(NONSENSE[reply])

    with impostor(behave) as started:
        yield started


@pytest.mark.parametrize("reply", NONSENSE)
def test_a_redis_that_answers_nonsense_is_done_without(
    wechat: Sandbox, clock: MovedClock, caplog: pytest.LogCaptureFixture, reply: str
) -> None:
    with nonsense(reply) as hostile:
        limits = Limits(redis_timeout=TIMEOUT)
        port = hostile.port
        instance = instance_for(wechat, host="127.0.0.1", port=port, clock=clock, limits=limits)
        for look in range(1, 4):
            assert instance.look() == wechat.ticket
            assert instance.state in ("unreachable", "failing")
            assert instance.trouble.isprintable()
            assert hostile.connections >= look
            clock.advance(10)
        assert wechat.calls == {"token": 1, "getticket": 1}
        assert "going on without" in caplog.text
        assert "Traceback" not in caplog.text
        assert "s3cr3t" not in caplog.text + instance.trouble


def test_the_server_signs_beside_a_redis_whose_nonsense_spoils_no_line_of_the_log(
    start: Start, wechat: Sandbox
) -> None:
    with nonsense("an error with ESC in it") as hostile:
        running = start("[redis]", "host = 127.0.0.1", f"port = {hostile.port}")
        for _ in range(20):
            assert_signs(running, wechat)
        assert "going on without" in running.output
        assert all(line.isprintable() for line in running.output.split("\n"))
        assert wechat.calls == {"token": 1, "getticket": 1}


def test_a_redis_that_drips_is_left_behind_and_a_later_look_finds_it_well_again(
    wechat: Sandbox, clock: MovedClock, redis_server: RedisServer
) -> None:
    dripping = True

    def behave(connection: socket.socket) -> None:
        if dripping:
            connection.recv(65536)
            hostile.drip(connection, b"$8000\r\n" + b"x" * 8000)
        else:
            relay(connection, redis_server.port)

    async def scenario(tickets: JsapiTickets) -> None:
        nonlocal dripping
        assert await tickets.current() == wechat.ticket  # by a second look, which left Redis alone
        assert tickets.cache_state == "unreachable"
        wechat.rotate_ticket()
        clock.advance(601)
        await tickets.refresh()
        assert tickets.held() == wechat.ticket
        assert tickets.known.error is None
        dripping = False
        clock.advance(10)
        await tickets.refresh()
        assert tickets.cache_state == "redis"
        assert redis_server.run("GET", TICKET_KEY) == wechat.ticket

    with impostor(behave) as hostile:
        where: dict[str, Any] = {"host": "127.0.0.1", "port": hostile.port}
        tickets = tickets_for(wechat, clock=clock, timeout=TIMEOUT, limits=QUICK, **where)
        asyncio.run(asyncio.wait_for(scenario(tickets), 3 * PATIENCE))


def test_a_redis_that_drips_is_left_alone_also_where_its_ca_file_is_gone(
    wechat: Sandbox, certificates: Certificates, tmp_path: Path
) -> None:
    authorities = Path(shutil.copy(certificates.path("ca.pem"), tmp_path))
    secure = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    secure.load_cert_chain(certificates.path("server.pem"), certificates.path("server.key"))

    def behave(connection: socket.socket) -> None:
        with secure.wrap_socket(connection, server_side=True) as wrapped:
            wrapped.recv(65536)
            authorities.unlink(missing_ok=True)
            hostile.drip(wrapped, b"$8000\r\n" + b"x" * 8000)

    async def scenario(tickets: JsapiTickets) -> None:
        assert await tickets.current() == wechat.ticket
        assert tickets.cache_state == "unreachable"

    with impostor(behave) as hostile:
        url = f"rediss://127.0.0.1:{hostile.port}?ssl_ca_certs={authorities}"
        where = RedisUrl("", (url,), "", "here")
        tickets = tickets_for(wechat, timeout=TIMEOUT, limits=QUICK, url=where)
        asyncio.run(asyncio.wait_for(scenario(tickets), 3 * PATIENCE))
        assert hostile.connections == 1


def test_what_redis_or_the_command_line_says_does_nothing_to_a_terminal(
    wechat: Sandbox, tmp_path: Path
) -> None:
    def behave(connection: socket.socket) -> None:
        while connection.recv(65536):
            error = b"-ERR \x1b[2J\xc2\x9b\xe2\x80\xae" + b"x" * 9000 + b"\r\n"
            connection.sendall(error * 20)

    with impostor(behave) as hostile:
        ini = tmp_path / "\x1b[2J\u202e.ini"
        status, said = run_check(
            wechat, ini, "[redis]", "host = 127.0.0.1", f"port = {hostile.port}"
        )
        assert status == 1
        assert all(line.isprintable() for line in said.split("\n"))
        assert max(map(len, said.split("\n"))) < 1000
        assert r"\x1b[2J\x9b\u202exxx" in said


@pytest.mark.parametrize("key", [TICKET_KEY, TOKEN_KEY, LOCK_KEY])
def test_what_is_as_long_as_no_credential_is_not_even_read(
    wechat: Sandbox, redis_server: RedisServer, key: str
) -> None:
    redis_server.run("SET", key, "x" * 1025)
    redis_server.run("SETRANGE", key, 50_000_000, "x")
    before = redis_server.run("INFO", "stats")["total_net_output_bytes"]
    if key == LOCK_KEY:
        with pytest.raises(LockedElsewhere):
            instance_for(wechat, redis_server).look()
        redis_server.run("DEL", key)
    assert instance_for(wechat, redis_server).look() == wechat.ticket
    assert redis_server.run("INFO", "stats")["total_net_output_bytes"] - before < 100_000
    assert redis_server.run("STRLEN", key) <= 1024


def test_a_grant_of_a_second_is_not_asked_for_every_second(
    wechat: Sandbox, clock: MovedClock
) -> None:
    body = {"access_token": "t0ken", "ticket": "t1cket", "expires_in": 1}
    for endpoint in ("token", "getticket"):
        wechat.faults[endpoint] = Fault(body=json.dumps(body).encode())
    instance = instance_for(wechat, clock=clock)
    for _ in range(600):
        with pytest.raises(WeChatUnreachable):
            instance.look()
        clock.advance(1)
    assert wechat.calls["token"] < 20  # 1 s, doubling to 60


def test_what_wechat_repeats_of_a_credential_is_not_shown(
    wechat: Sandbox, clock: MovedClock
) -> None:
    instance = instance_for(wechat, clock=clock)
    instance.look()
    old = next(iter(wechat.issued - {wechat.secret, wechat.ticket}))
    escaped = "".join(f"%{ord(letter):02X}" for letter in old)
    for repeated in (old, old.upper(), escaped, wechat.secret.upper(), f"x{old}x"):
        body = {"errcode": 40013, "errmsg": f"no {repeated} here"}
        wechat.faults["getticket"] = Fault(body=json.dumps(body).encode())
        clock.advance(7200)
        with pytest.raises(SigningError) as caught:
            instance.look()
        shown = str(caught.value) + repr(caught.value)
        assert_no_credential(shown.lower(), {repeated.lower()})
        assert "*** here" in shown or "***x here" in shown
    for _ in range(10):  # each with a token of its own
        body = {"errcode": 40013, "errmsg": f"no {wechat.secret} here"}
        wechat.faults["getticket"] = Fault(body=json.dumps(body).encode())
        clock.advance(7200)
        with pytest.raises(SigningError, match=r"no \*\*\* here"):
            instance.look()


@pytest.fixture
def unresolved(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The name localhost is not resolved until this is set."""
    over, resolve = threading.Event(), socket.getaddrinfo

    def hang(host: str, *given: object, **more: object) -> object:
        if host == "localhost":
            over.wait(PATIENCE)
        return resolve(host, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    yield over
    over.set()


def test_a_name_that_is_never_resolved_is_left_behind(
    wechat: Sandbox, clock: MovedClock, unresolved: threading.Event
) -> None:
    async def scenario(tickets: JsapiTickets) -> None:
        with pytest.raises(LookHangs):
            await tickets.current()
        unresolved.set()
        while tickets.held() is None:  # the one that was left behind may fetch a token just now
            clock.advance(1)
            await tickets.refresh()
        assert tickets.held() == wechat.ticket

    wechat.url = wechat.url.replace("127.0.0.1", "localhost")
    looking(tickets_for(wechat, clock=clock, timeout=TIMEOUT, limits=QUICK), scenario)


def test_while_too_many_looks_hang_no_other_begins(
    wechat: Sandbox, clock: MovedClock, unresolved: threading.Event
) -> None:
    async def scenario(tickets: JsapiTickets) -> None:
        before = threading.active_count()
        for _ in range(5):
            with pytest.raises(LookHangs):
                await tickets.current()
            clock.advance(60)
        assert 2 <= threading.active_count() - before <= 4  # and what closes Redis
        unresolved.set()
        while tickets.held() is None:
            clock.advance(60)
            await tickets.refresh()

    wechat.url = wechat.url.replace("127.0.0.1", "localhost")
    limits = Limits(lease_margin=0.1, left_behind=2)
    looking(tickets_for(wechat, clock=clock, timeout=0.1, limits=limits), scenario)


@contextmanager
def blackhole() -> Iterator[int]:
    """A port that takes no further connection, and refuses none."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as waiting:
        for _ in range(3):
            connection = waiting.enter_context(socket.socket())
            connection.setblocking(False)
            with suppress(BlockingIOError):
                connection.connect(full.getsockname())
        yield full.getsockname()[1]


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels refuse what a full queue gets")
def test_a_host_is_reached_past_dead_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def behave(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(GOOD)

    with impostor(behave) as alive, ExitStack() as stack:
        ports = [stack.enter_context(blackhole()) for _ in range(2)] + [alive.port]

        def all_of_them(host: str, *given: object, **more: object) -> object:
            if host != "many.test":
                return resolve(host, *given, **more)  # type: ignore[arg-type]
            kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
            return [(*kind, ("127.0.0.1", port)) for port in ports]

        monkeypatch.setattr(socket, "getaddrinfo", all_of_them)
        ask("http://many.test", 2 * TIMEOUT)


def test_what_redis_repeats_of_what_it_was_sent_is_not_shown(
    wechat: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    password = "hunter2/hunter2"

    def behave(connection: socket.socket) -> None:
        for asked in iter(lambda: connection.recv(65536), b""):
            words = asked.replace(b"\r\n", b" ")
            connection.sendall(b"-ERR bad request: %b\r\n" % words * 10)

    with impostor(behave) as talkative:
        place = f"127.0.0.1:{talkative.port}"
        for lines in (
            [f"url = redis://:{quote(password, safe='')}@{place}"],
            ["host = 127.0.0.1", f"port = {talkative.port}", f"password = {password}"],
        ):
            ini = write_ini(tmp_path / "config.ini", wechat, "[redis]", *lines)
            instance = Instance(load_settings(ini, {}))
            instance.looks(2)
            assert "***" in instance.trouble
            assert_no_credential(instance.trouble + caplog.text, {password, *wechat.issued})


@pytest.mark.parametrize(
    ("name", "authority", "words"),
    [
        ("server", False, "unable to get local issuer|self.signed"),
        ("stranger", True, "IP address mismatch.*127.0.0.1"),
        ("server", True, ""),
    ],
)
def test_nothing_is_sent_to_a_host_whose_certificate_is_not_right(
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    authority: bool,
    words: str,
) -> None:
    asked: list[bytes] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.path(f"{name}.pem"), certificates.path(f"{name}.key"))

    def behave(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as encrypted:
            asked.append(encrypted.recv(65536))
            encrypted.sendall(GOOD)

    if authority:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.path("ca.pem")))
    with impostor(behave) as other:
        url = other.url.replace("http:", "https:")
        if words:
            cause = rf"SSLError/SSLCertVerificationError \(({words})"
            with pytest.raises(WeChatUnreachable, match=cause):
                ask(url, PATIENCE)
        else:
            ask(url, PATIENCE)
    assert bool(b"".join(asked)) is not bool(words)


def test_a_ca_bundle_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/file")
    with pytest.raises(WeChatUnreachable, match="/no/such/file"):
        ask("https://127.0.0.1:1")


def test_where_no_thread_can_be_started_pages_are_told_and_it_is_tried_again(
    wechat: Sandbox,
    clock: MovedClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def scenario() -> None:
        tickets, interval = tickets_for(wechat, clock=clock), Limits().look_interval
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(20):
                with pytest.raises(Unexpected, match="RuntimeError"):
                    await tickets.current()
                clock.advance(interval / 25)
        records = [one for one in caplog.records if one.levelno >= logging.WARNING]
        assert 1 <= len(records) <= 4  # 1 s, then 2 and 4 and 8
        assert not [one for one in records if one.exc_info]
        clock.advance(interval)
        assert await tickets.current() == wechat.ticket

    asyncio.run(scenario())
