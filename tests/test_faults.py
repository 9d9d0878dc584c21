"""Faults of Redis, WeChat, other instances and clients, on real parts."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from contextlib import suppress

import pytest
from harness import (
    LOCK_KEY,
    PAGE,
    TICKET_KEY,
    Fault,
    RedisServer,
    Sandbox,
    Start,
    assert_signs,
    eventually,
    fetch,
    signature_of,
)

# From here on the server is a process of its own.


def lines_for(redis_server: RedisServer, *more: str) -> list[str]:
    return ["timeout = 0.5", *redis_server.ini, *more]


def test_when_the_one_that_asks_is_killed_another_takes_over_within_the_lease(
    start: Start, wechat: Sandbox, redis_server: RedisServer
) -> None:
    hold = threading.Event()
    wechat.faults["token"] = Fault(hold=hold)
    lines = ["timeout = 2", *redis_server.ini]
    first = start(*lines)
    eventually("the first asks WeChat", lambda: wechat.calls["token"])
    first.kill()
    assert 0 < redis_server.run("PTTL", LOCK_KEY) <= 7000  # 2 * timeout + 3 s
    wechat.faults.clear()
    assert_signs(start(*lines), wechat)  # it waits for the lock no longer than a lease lasts
    hold.set()


def test_one_that_slept_past_its_lease_neither_overwrites_nor_releases(
    start: Start, wechat: Sandbox, redis_server: RedisServer
) -> None:
    hold = threading.Event()
    wechat.faults["getticket"] = Fault(hold=hold)
    sleeper = start(*lines_for(redis_server))
    eventually("it asks for the ticket", lambda: wechat.calls["getticket"])
    sleeper.process.send_signal(signal.SIGSTOP)
    hold.set()  # the answer waits in the sleeper's socket
    eventually("its lease is over", lambda: not redis_server.run("EXISTS", LOCK_KEY))
    wechat.faults.clear()
    wechat.rotate_ticket()
    other = start(*lines_for(redis_server))
    assert_signs(other, wechat)
    newer = redis_server.run("GET", TICKET_KEY)
    redis_server.run("SET", LOCK_KEY, "a third one's", "EX", 100)
    sleeper.process.send_signal(signal.SIGCONT)
    fetch(f"{sleeper.url}/getApi?url={PAGE}")
    assert redis_server.run("GET", TICKET_KEY) == newer == wechat.ticket
    assert redis_server.run("GET", LOCK_KEY) == "a third one's"


@pytest.mark.parametrize("fault", ["killed", "paused"])
def test_redis_gone_and_back_under_load_costs_no_request(
    start: Start, wechat: Sandbox, own_redis: RedisServer, fault: str
) -> None:
    running = start(*lines_for(own_redis, "expire = 2", "recheck = 1"))
    assert_signs(running, wechat)
    over = threading.Event()
    slowest, failed = [0.0], []

    def load() -> None:
        while not over.is_set():
            began = time.monotonic()
            status, answer = fetch(f"{running.url}/getApi?url={PAGE}")
            slowest.append(time.monotonic() - began)
            if status != 200 or answer["signature"] != signature_of(answer, wechat.ticket, PAGE):
                failed.append(answer)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    own_redis.kill() if fault == "killed" else own_redis.pause()
    running.says("going on without")
    running.says({"killed": "start Redis, or correct", "paused": "whether Redis hangs"}[fault])
    own_redis.start() if fault == "killed" else own_redis.resume()
    running.says("works again")
    eventually("Redis has the ticket", lambda: own_redis.run("GET", TICKET_KEY) == wechat.ticket)
    over.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert max(slowest) < 1.0  # the time-out that nobody may have waited for


BAD_REQUEST = b"HTTP/1.1 400 Bad Request"
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large"
CLOSED = b""


@pytest.mark.parametrize(
    ("request_bytes", "outcome"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", TOO_LONG),
        (
            b"GET /getApi?url=https://a/" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
            TOO_LONG,
        ),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", CLOSED),  # TLS
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
    start: Start, wechat: Sandbox, request_bytes: bytes, outcome: bytes
) -> None:
    running = start()
    answer = b""
    with running.connect() as connection:
        with suppress(OSError):  # the server may have closed it by now
            connection.sendall(request_bytes)
            if outcome == CLOSED:  # nothing more comes: it need not wait
                connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            for received in iter(lambda: connection.recv(65536), b""):
                answer += received
    assert answer.partition(b"\r\n")[0] == outcome
    assert_signs(running, wechat)


def test_clients_that_leave_in_mid_answer_harm_nobody(start: Start, wechat: Sandbox) -> None:
    wechat.faults["token"] = Fault(delay=0.3)
    running = start()
    assert running.url
    for _ in range(50):
        with running.connect() as connection:
            connection.sendall(f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    assert_signs(running, wechat)
    assert wechat.calls == {"token": 1, "getticket": 1}


def test_a_slow_sender_is_served_when_it_is_done(start: Start, wechat: Sandbox) -> None:
    running = start()
    request = f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with running.connect() as connection:
        for character in request:
            connection.sendall(character.encode())
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert_signs(running, wechat)
    answer = json.loads(received.partition(b"\r\n\r\n")[2])
    assert answer["signature"] == signature_of(answer, wechat.ticket, PAGE)
