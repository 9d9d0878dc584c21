"""Faults of Redis, WeChat, other instances and clients, on real parts."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from harness import (
    LOCK_KEY,
    PAGE,
    TICKET_KEY,
    Fault,
    RedisServer,
    Sandbox,
    Server,
    Start,
    assert_signs,
    eventually,
    fetch,
    signature_of,
)

from wechat_sign.settings import Limits

SHORT_LEASE = Limits(lease_margin=0.1)


def test_when_the_one_that_asks_is_killed_another_takes_over_within_the_lease(
    start: Start, wechat: Sandbox, redis_server: RedisServer
) -> None:
    hold = threading.Event()
    wechat.faults["token"] = Fault(hold=hold)
    lines = ["timeout = 1", *redis_server.ini]
    first = start(*lines, limits=SHORT_LEASE)
    eventually("the first asks WeChat", lambda: wechat.calls["token"])
    first.kill()
    assert 0 < redis_server.run("PTTL", LOCK_KEY) <= 2100  # 2 * timeout + lease_margin
    wechat.faults.clear()
    second = start(*lines, limits=SHORT_LEASE)
    assert_signs(second, wechat)  # it waits for the lock no longer than a lease lasts
    hold.set()


def test_one_that_slept_past_its_lease_neither_overwrites_nor_releases(
    start: Start, wechat: Sandbox, redis_server: RedisServer
) -> None:
    hold = threading.Event()
    wechat.faults["getticket"] = Fault(hold=hold)
    lines = ["timeout = 0.5", *redis_server.ini]
    sleeper = start(*lines, limits=SHORT_LEASE)
    eventually("it asks for the ticket", lambda: wechat.calls["getticket"])
    sleeper.process.send_signal(signal.SIGSTOP)
    hold.set()  # the answer waits in the sleeper's socket
    eventually("its lease is over", lambda: not redis_server.run("EXISTS", LOCK_KEY))
    wechat.faults.clear()
    wechat.rotate_ticket()
    other = start(*lines)
    assert_signs(other, wechat)
    newer = redis_server.run("GET", TICKET_KEY)
    redis_server.run("SET", LOCK_KEY, "a third one's", "EX", 100)
    sleeper.process.send_signal(signal.SIGCONT)
    fetch(f"{sleeper.url}/getApi?url={PAGE}")
    assert redis_server.run("GET", TICKET_KEY) == newer == wechat.ticket
    assert redis_server.run("GET", LOCK_KEY) == "a third one's"


@pytest.mark.parametrize("fault", ["killed", "paused"])
def test_redis_gone_and_back_costs_no_page_anything(
    start: Start, wechat: Sandbox, own_redis: RedisServer, fault: str
) -> None:
    often = Limits(look_interval=0.1, look_soon=0.1, redis_pause=0.1)
    short = ["expire = 5", "recheck = 1"]
    running = start(*own_redis.ini, *short, verbose=False, limits=often)
    slowest = 0.0

    def asked_until(what: str, condition: Callable[[], bool]) -> None:
        def told() -> bool:
            nonlocal slowest
            began = time.monotonic()
            assert_signs(running, wechat)
            slowest = max(slowest, time.monotonic() - began)
            return condition()

        eventually(f"while pages ask: {what}", told)

    assert_signs(running, wechat)
    own_redis.kill() if fault == "killed" else own_redis.pause()
    asked_until("the log says it", lambda: "going on without" in running.output)
    assert {"killed": "start Redis, or correct", "paused": "whether Redis hangs"}[fault] in (
        running.output
    )
    calls = wechat.calls["getticket"]
    asked_until("WeChat is asked again", lambda: wechat.calls["getticket"] > calls)
    own_redis.start() if fault == "killed" else own_redis.resume()
    asked_until("the log says it", lambda: "works again" in running.output)
    asked_until("Redis has it", lambda: own_redis.run("GET", TICKET_KEY) == wechat.ticket)
    assert slowest < often.redis_timeout  # so none has waited for Redis


BAD_REQUEST = b"HTTP/1.1 400 Bad Request"
TOO_LONG = BAD_REQUEST


@pytest.mark.parametrize(
    ("request_bytes", "outcome"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", TOO_LONG),
        (
            b"GET /getApi?url=https://a/" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
            TOO_LONG,
        ),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", BAD_REQUEST),  # TLS
        (
            b"POST /getApi HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n"
            + b"x" * 50_000,
            BAD_REQUEST,
        ),
        (
            b"POST /getApi HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffff\r\n"
            + b"x" * 50_000,
            BAD_REQUEST,
        ),
        (b"POST /getApi HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", BAD_REQUEST),
        (b"\r\n\r\n\r\n\r\n", BAD_REQUEST),
        (b"GET\r\n\r\n", BAD_REQUEST),
        (b"GET /getApi?url=https://a/ HTTP/9.9\r\nHost: a\r\n\r\n", BAD_REQUEST),
        (b"GET /getApi?url=https://a/ HTTP/1.1\r\n\r\n", BAD_REQUEST),
        (b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n", BAD_REQUEST),
    ],
)
def test_hostile_requests_are_refused_and_others_notice_nothing(
    shared: Server, shared_wechat: Sandbox, request_bytes: bytes, outcome: bytes
) -> None:
    answer = b""
    with shared.connect() as connection:
        with suppress(OSError):  # the server may have closed it by now
            connection.sendall(request_bytes)
        with suppress(ConnectionError):
            for received in iter(lambda: connection.recv(65536), b""):
                answer += received
    assert answer.partition(b"\r\n")[0] == outcome
    assert_signs(shared, shared_wechat)


def test_clients_that_leave_in_mid_answer_harm_no_other(start: Start, wechat: Sandbox) -> None:
    wechat.faults["token"] = Fault(delay=0.3)
    running = start()
    assert running.url
    for _ in range(50):
        with running.connect() as connection:
            connection.sendall(f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    assert_signs(running, wechat)
    assert wechat.calls == {"token": 1, "getticket": 1}


def test_a_slow_sender_is_served_when_it_is_done(shared: Server, shared_wechat: Sandbox) -> None:
    request = f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with shared.connect() as connection:
        for character in request:
            connection.sendall(character.encode())
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert_signs(shared, shared_wechat)
    answer = json.loads(received.partition(b"\r\n\r\n")[2])
    assert answer["signature"] == signature_of(answer, shared_wechat.ticket, PAGE)
