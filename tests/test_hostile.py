"""What answers in the place of WeChat or Redis, and means harm or makes no sense."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import random
import socket
import socketserver
import ssl
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import requests
from harness import (
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
    eventually,
    in_a_loop,
    instance_for,
    tickets_for,
    write_ini,
)
from topologies import Certificates

from wechat_sign.credentials import WeChat
from wechat_sign.errors import LookHangs, SigningError, Unexpected, WeChatRefused, WeChatUnreachable
from wechat_sign.settings import Limits, WeChatSettings, load_settings
from wechat_sign.tickets import JsapiTickets

TIMEOUT = 0.3


class Impostor(socketserver.ThreadingTCPServer):
    """Listens, and does with each connection what it is told to; to be used in a `with`."""

    request_queue_size = 128

    def __init__(self, behave: Callable[[socket.socket], object]) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.behave = behave
        self.over = threading.Event()
        self.seen: list[socket.socket] = []
        """All connections that there were."""
        self.port = int(self.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.seen.append(request)
        with suppress(OSError):  # who is cut off, or not listened to, is not hurt
            request.settimeout(PATIENCE)
            self.behave(request)

    def server_close(self) -> None:
        self.over.set()
        self.shutdown()
        for connection in self.seen:
            with suppress(OSError):  # most are closed by now
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def drip(self, connection: socket.socket, pattern: bytes) -> None:
        """Sends it over and over, a byte at a time, until it is cut off."""
        for byte in cycle(pattern):
            connection.sendall(bytes([byte]))
            if self.over.wait(0.02):  # each is in time, all together are not
                return


OK = b"HTTP/1.1 200 OK\r\n"
FOUND = b"HTTP/1.1 302 Found\r\nLocation: http://\xd6\xd0/\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
DRIPPED = {
    "status line": (b"", b"HTTP/1.1 200 " + b"O" * 60_000, LookHangs),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", LookHangs),
    "headers": (OK, b"X: x\r\n", LookHangs),
    "trailer": (OK + CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: x\r\n", LookHangs),
    "body": (OK + b"Content-Length: 8000\r\n\r\n", b" ", WeChatUnreachable),
    "chunks": (OK + CHUNKED, b"1\r\n \r\n", WeChatUnreachable),
    "redirect's body": (FOUND + b"Content-Length: 8000\r\n\r\n", b" ", WeChatUnreachable),
}


def answered(connection: socket.socket, answer: bytes) -> bytes:
    """What was asked, once the answer is sent."""
    asked = connection.recv(65536)
    connection.sendall(answer)
    return asked


def ask(url: str) -> None:
    account = WeChatSettings(appid="wx1", secret="s3cr3t", api=url, timeout=PATIENCE)
    WeChat(account).fetch_access_token()


def looking(tickets: JsapiTickets, scenario: Callable[[JsapiTickets], Awaitable[None]]) -> None:
    """The scenario, after which every thread that began within ends, and what it began."""

    async def whole() -> None:
        await scenario(tickets)
        await tickets.close(timeout=0)

    before = set(threading.enumerate())
    asyncio.run(asyncio.wait_for(whole(), 3 * PATIENCE))
    eventually("all that began has ended", lambda: set(threading.enumerate()) <= before)


@pytest.mark.parametrize("part", DRIPPED)
def test_whatever_part_of_an_answer_drips_a_look_has_an_end_and_so_has_the_next(part: str) -> None:
    head, dripped, error = DRIPPED[part]

    def behave(connection: socket.socket) -> None:
        answered(connection, head)
        hostile.drip(connection, dripped)

    async def scenario(tickets: JsapiTickets) -> None:
        for _ in range(2):
            with pytest.raises(error):
                await tickets.current()
            clock.advance(60)
        hostile.server_close()

    clock, limits = MovedClock(), Limits(lease_margin=0.1)
    with Impostor(behave) as hostile:
        wechat = Sandbox()
        wechat.url = hostile.url
        looking(tickets_for(wechat, clock=clock, timeout=0.1, limits=limits), scenario)


def test_no_cookie_is_kept_and_an_odd_one_puts_no_traceback_into_the_log(
    start: Start, wechat: Sandbox
) -> None:
    """What answers in WeChat's place, a captive portal for one, may set as many as it likes."""
    asked: list[bytes] = []
    odd = b"Set-Cookie: a=b\r\nSet-Cookie: \xff=;;=\r\nSet-Cookie: a=b; Max-Age=" + b"9" * 500
    answer = OK + odd + b"\r\nContent-Length: 2\r\n\r\n{}"
    with Impostor(lambda connection: asked.append(answered(connection, answer))) as portal:
        wechat.url = portal.url
        running = start()
        eventually("it asks again", lambda: len(asked) > 1)
        output = running.says("it has no access_token in it")
    assert all(line.startswith("20") for line in output.splitlines())
    assert not [request for request in asked if b"cookie:" in request.lower()]


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
        answered(connection, first + head)
        try:
            while not wechat.over.is_set():
                connection.sendall(block)
        finally:
            poured.set()

    with Impostor(behave) as wechat:
        with pytest.raises(WeChatUnreachable, match=r"HTTP|ContentDecodingError"):
            ask(wechat.url)
        assert poured.wait(PATIENCE)  # it was cut off


def test_netrc_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password s3cr3t\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    asked: list[bytes] = []
    with Impostor(lambda connection: asked.append(answered(connection, GOOD))) as other:
        ask(other.url)
    assert b"authorization:" not in asked[0].lower()


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
    wechat: Sandbox, clock: MovedClock, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(12)
    got = 0
    with Impostor(lambda connection: answered(connection, answer)) as hostile:
        wechat.url = hostile.url
        for _ in range(500):
            instance = instance_for(wechat, clock=clock, timeout=PATIENCE)
            answer = mutated(GOOD, chance)
            try:
                instance.look()
                got += 1
            except SigningError as error:
                assert type(error) in (WeChatRefused, WeChatUnreachable)  # noqa: PT017
                before = len(hostile.seen)
                clock.advance(instance.pause / 2)
                with pytest.raises(type(error)):
                    instance.look()
                assert len(hostile.seen) == before
    assert 50 < got < 250
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
    held = instance.look()
    monkeypatch.setattr(requests.Session, "request", break_down)
    for pause in (601, 0.5):
        clock.advance(pause)
        assert instance.look() == held
    [record] = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert "OverflowError in test_hostile.py, line" in record.getMessage()
    assert record.exc_info is None
    clock.advance(7200)
    with pytest.raises(Unexpected):
        instance.look()
    monkeypatch.undo()
    clock.advance(instance.pause)
    assert instance.look() == wechat.ticket
    assert instance.known.error is None


NONSENSE = {
    "a number that is none": b":abc\r\n",
    "nested arrays without an end": b"*1\r\n" * 3000,
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a word to all": b"+s3cr3t\r\n" * 20,
    "nothing to all": b"$-1\r\n" * 20,
    "empty arrays": b"*0\r\n" * 20,
    "another type": b"%1\r\n+a\r\n:1\r\n" * 20,
    "another type of error": b"!s3cr3t\r\n" * 20,
    "an error with ESC in it": b"-ERR \x1b[2J\xc2\x9b\xe2\x80\xae\r\n" * 20,
}


@pytest.mark.parametrize("reply", NONSENSE)
def test_a_redis_that_answers_nonsense_is_done_without(
    wechat: Sandbox, clock: MovedClock, caplog: pytest.LogCaptureFixture, reply: str
) -> None:
    def behave(connection: socket.socket) -> None:
        while connection.recv(65536):
            connection.sendall(NONSENSE[reply])

    with Impostor(behave) as hostile:
        where: dict[str, Any] = {"host": "127.0.0.1", "port": hostile.port}
        instance = instance_for(wechat, clock=clock, limits=Limits(redis_timeout=TIMEOUT), **where)
        for look in range(1, 4):
            assert instance.look() == wechat.ticket
            assert instance.cache.state in ("unreachable", "failing")
            assert instance.trouble.isprintable()
            assert len(hostile.seen) >= look
            clock.advance(10)
        assert wechat.calls == {"token": 1, "getticket": 1}
        assert "going on without" in caplog.text
        assert "Traceback" not in caplog.text
        assert "s3cr3t" not in caplog.text + instance.trouble


def test_a_redis_that_drips_is_left_behind_and_a_later_look_finds_it_well_again(
    wechat: Sandbox, clock: MovedClock
) -> None:
    def behave(connection: socket.socket) -> None:
        answered(connection, b"")
        hostile.drip(connection, b"$8000\r\n" + b"x" * 8000)

    async def scenario(tickets: JsapiTickets) -> None:
        assert await tickets.current() == wechat.ticket  # by a second look, which left Redis alone
        assert tickets.cache_state == "unreachable"
        wechat.rotate_ticket()
        clock.advance(601)
        await tickets.refresh()
        assert tickets.held() == wechat.ticket
        assert tickets.known.error is None
        hostile.server_close()
        well = RedisServer(port=hostile.port)
        clock.advance(10)
        await tickets.refresh()
        assert tickets.cache_state == "redis"
        assert well.run("GET", TICKET_KEY) == wechat.ticket
        well.stop()

    limits = Limits(lease_margin=0.1)  # with TIMEOUT a look ends after three times 0.7 s
    with Impostor(behave) as hostile:
        where: dict[str, Any] = {"host": "127.0.0.1", "port": hostile.port}
        looking(tickets_for(wechat, clock=clock, timeout=TIMEOUT, limits=limits, **where), scenario)


@pytest.mark.parametrize("key", [TICKET_KEY, TOKEN_KEY])
def test_what_is_as_long_as_no_credential_is_not_even_read(
    wechat: Sandbox, redis_server: RedisServer, key: str
) -> None:
    redis_server.run("SET", key, "x" * 1025)
    redis_server.run("SETRANGE", key, 50_000_000, "x")
    before = redis_server.run("INFO", "stats")["total_net_output_bytes"]
    assert instance_for(wechat, redis_server).look() == wechat.ticket
    assert redis_server.run("INFO", "stats")["total_net_output_bytes"] - before < 100_000
    assert redis_server.run("STRLEN", key) <= 1024


def test_what_wechat_repeats_of_a_credential_is_not_shown(
    wechat: Sandbox, clock: MovedClock
) -> None:
    """Neither of an old token nor, after ever so many tokens, of the secret."""
    instance = instance_for(wechat, clock=clock)
    instance.look()
    [old] = wechat.issued - {wechat.secret, wechat.ticket}
    for repeated in [old, *10 * [wechat.secret]]:
        body = {"errcode": 40013, "errmsg": f"no {repeated} here"}
        wechat.faults["getticket"] = Fault(body=json.dumps(body).encode())
        clock.advance(7200)
        with pytest.raises(SigningError, match=r"no \*\*\* here"):
            instance.look()


def test_while_too_many_looks_hang_no_other_begins(
    wechat: Sandbox, clock: MovedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hang in finding the address of a name."""
    resolved, resolve = threading.Event(), socket.getaddrinfo

    def hang(host: str, *given: Any, **more: Any) -> object:
        if host == "localhost":
            resolved.wait(PATIENCE)
        return resolve(host, *given, **more)

    async def scenario(tickets: JsapiTickets) -> None:
        before = threading.active_count()
        for _ in range(5):
            with pytest.raises(LookHangs):
                await tickets.current()
            clock.advance(60)
        assert 2 <= threading.active_count() - before <= 4  # and what closes Redis
        resolved.set()
        while tickets.held() is None:  # one that was left behind may fetch a token just now
            clock.advance(60)
            await tickets.refresh()
        assert tickets.held() == wechat.ticket

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    wechat.url = wechat.url.replace("127.0.0.1", "localhost")
    limits = Limits(lease_margin=0.1, left_behind=2)
    looking(tickets_for(wechat, clock=clock, timeout=0.1, limits=limits), scenario)


EMPTY = {b"AUTH": b"+OK\r\n", b"GETRANGE": b"$0\r\n\r\n", b"PTTL": b":-2\r\n", b":lock": b"+OK\r\n"}


@pytest.mark.parametrize("known", [{}, EMPTY])
def test_what_redis_repeats_of_what_it_was_sent_is_not_shown(
    wechat: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture, known: dict[bytes, bytes]
) -> None:
    def behave(connection: socket.socket) -> None:
        for asked in iter(lambda: connection.recv(65536), b""):
            repeated = b"-ERR bad request: %b\r\n" % asked.replace(b"\r\n", b" ") * 9
            connection.sendall(next((known[word] for word in known if word in asked), repeated))

    with Impostor(behave) as talkative:
        url = f"url = redis://:hunter2%2Fhunter2@127.0.0.1:{talkative.port}"
        instance = Instance(load_settings(write_ini(tmp_path / "ini", wechat, "[redis]", url), {}))
        instance.looks(2)
    assert "***" in instance.trouble
    assert_no_credential(instance.trouble + caplog.text, {"hunter2/hunter2", *wechat.issued})


@pytest.mark.parametrize("name", ["server", "stranger"])
def test_nothing_is_sent_to_a_host_whose_certificate_is_not_right(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[bytes] = []
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.path(f"{name}.pem"), certificates.path(f"{name}.key"))

    def behave(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as encrypted:
            asked.append(encrypted.recv(65536))

    words = "unable to get local issuer|self.signed"
    if name == "stranger":  # whose authority is trusted
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.path("ca.pem")))
        words = "IP address mismatch.*127.0.0.1"
    cause = rf"SSLError/SSLCertVerificationError \(({words})"
    with Impostor(behave) as other, pytest.raises(WeChatUnreachable, match=cause):
        ask(other.url.replace("http:", "https:"))
    assert b"".join(asked) == b""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/file")
    with pytest.raises(WeChatUnreachable, match="/no/such/file"):
        ask("https://127.0.0.1:1")


@in_a_loop
async def test_where_no_thread_can_be_started_pages_are_told_and_it_is_tried_again(
    wechat: Sandbox, clock: MovedClock, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    tickets, interval = tickets_for(wechat, clock=clock), Limits().look_interval
    with pytest.MonkeyPatch.context() as patch:
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
