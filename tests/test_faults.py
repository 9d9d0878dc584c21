"""Faults of Redis, WeChat, other instances and clients, on real parts."""

from __future__ import annotations

import asyncio
import http.client
import json
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import (
    LOCK_KEY,
    PAGE,
    PATIENCE,
    TICKET_KEY,
    TOKEN_KEY,
    RedisServer,
    Start,
    assert_signs,
    eventually,
    fetch,
    resident,
    settings_for,
    signature_of,
)

import server
from wechat_sign import tickets as tickets_module
from wechat_sign.errors import SigningError
from wechat_sign.sandbox import Fault, Sandbox
from wechat_sign.tickets import JsapiTickets


def tickets_for(wechat: Sandbox, redis_server: RedisServer, **more: Any) -> JsapiTickets:
    return server.make_tickets(settings_for(wechat, redis_server, **more))


async def until(tickets: JsapiTickets, wanted: Callable[[], bool]) -> None:
    """Keeps asking for the ticket, as pages do, none of which may fail."""
    deadline = time.monotonic() + PATIENCE
    while not wanted():
        assert time.monotonic() < deadline, "it never came to that"
        assert await tickets.current()
        await asyncio.sleep(0.01)


@pytest.fixture(
    params=["killed", "paused", "wrong password", "read-only", "full", "no such command"]
)
def broken_redis(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A Redis in one kind of trouble from the start."""
    trouble = request.param
    options = {
        "wrong password": ("--requirepass", "another"),
        "no such command": ("--rename-command", "SET", "NO-SET"),
    }
    redis_server = RedisServer(*options.get(trouble, ()))
    if trouble == "killed":
        redis_server.kill()
    elif trouble == "paused":
        redis_server.pause()
    elif trouble == "read-only":
        redis_server.run("REPLICAOF", "127.0.0.1", redis_server.port)
    elif trouble == "full":
        redis_server.run("CONFIG", "SET", "maxmemory", "1")
    yield redis_server
    redis_server.stop()


def test_pages_are_signed_with_redis_in_any_trouble_and_wechat_is_asked_once(
    wechat: Sandbox, broken_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, broken_redis, password="mine")
        for _ in range(20):
            assert await tickets.current() == wechat.ticket
            tickets._look_again_at = 0.0
        assert tickets._task is not None
        await tickets._task

    asyncio.run(scenario())
    assert wechat.calls == {"token": 1, "getticket": 1}
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert 1 <= len(warnings) <= 2
    assert all("going on without" in warning for warning in warnings)
    assert "Traceback" not in caplog.text


@pytest.mark.usefixtures("look_always")
@pytest.mark.parametrize(
    "command",
    [
        ("HSET", TICKET_KEY, "x", "y"),
        ("SADD", TICKET_KEY, "x"),
        ("SET", TICKET_KEY, ""),
        ("SET", TICKET_KEY, "undefined"),
        ("SET", TICKET_KEY, b"\xff\xfe\x00"),
        ("SET", TICKET_KEY, "without expiry"),
        ("SET", TICKET_KEY, "WithoutExpiry"),
        ("HSET", TOKEN_KEY, "x", "y"),
        ("SET", TOKEN_KEY, b"\xff"),
        ("SET", TOKEN_KEY, "refused"),
        ("SET", LOCK_KEY, "left by a killed one", "PX", 300),
    ],
)
def test_whatever_stands_in_the_keys_is_healed(
    wechat: Sandbox, redis_server: RedisServer, command: tuple[Any, ...]
) -> None:
    redis_server.run(*command)

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server)
        await tickets.current()
        await until(tickets, lambda: redis_server.run("GET", TICKET_KEY) == wechat.ticket)

    asyncio.run(scenario())
    assert 7000 < redis_server.run("TTL", TICKET_KEY) <= 7100
    assert 7000 < redis_server.run("TTL", TOKEN_KEY) <= 7100


@pytest.mark.usefixtures("look_always")
@pytest.mark.parametrize("wechat_is_down", [False, True])
def test_flushed_while_warm_nobody_notices_and_redis_has_it_again(
    wechat: Sandbox, redis_server: RedisServer, wechat_is_down: bool
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server)
        ticket = await tickets.current()
        if wechat_is_down:
            wechat.faults = dict.fromkeys(("token", "getticket"), Fault(hang_up=True))
        redis_server.run("FLUSHALL")
        await until(tickets, lambda: redis_server.run("GET", TICKET_KEY) == ticket)
        assert await tickets_for(wechat, redis_server).current() == ticket

    asyncio.run(scenario())
    assert wechat.calls["token"] == 1


@pytest.mark.usefixtures("look_always")
def test_after_redis_returns_the_instances_agree_again(
    wechat: Sandbox, own_redis: RedisServer
) -> None:
    async def scenario() -> None:
        own_redis.kill()
        one, other = tickets_for(wechat, own_redis), tickets_for(wechat, own_redis)
        await one.current()
        wechat.rotate_ticket()
        assert await one.current() != await other.current()
        own_redis.start()
        deadline = time.monotonic() + PATIENCE
        while {await one.current(), await other.current()} != {wechat.ticket}:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert own_redis.run("GET", TICKET_KEY) == wechat.ticket

    asyncio.run(scenario())


BROKEN = {
    "down": Fault(hang_up=True),
    "hanging": Fault(delay=3),
    "HTTP 502": Fault(status=502, body=b"<html>"),
    "HTML": Fault(body=b"<!doctype html><title>portal</title>"),
    "truncated": Fault(body=b'{"access_token": "abc", "ticket'),
    "no object": Fault(body=b'["ticket"]'),
    "empty": Fault(body=b'{"errcode": 0, "ticket": "", "access_token": "", "expires_in": 7200}'),
    "missing": Fault(body=b'{"errcode": 0, "errmsg": "ok", "expires_in": 7200}'),
    "no life": Fault(body=b'{"errcode": 0, "ticket": "t", "access_token": "t"}'),
    "life 0": Fault(body=b'{"ticket": "t", "access_token": "t", "expires_in": 0}'),
    "life -1": Fault(body=b'{"ticket": "t", "access_token": "t", "expires_in": -1}'),
    "life text": Fault(body=b'{"ticket": "t", "access_token": "t", "expires_in": "7200"}'),
    "busy": Fault(errcode=-1),
    "busy too": Fault(errcode=-1000),
    "quota": Fault(errcode=45009),
    "too often": Fault(errcode=45011),
    "whitelist": Fault(errcode=40164),
}


@pytest.mark.usefixtures("look_always")
@pytest.mark.parametrize("endpoint", ["token", "getticket"])
@pytest.mark.parametrize("name", BROKEN)
def test_wechat_in_any_trouble_is_asked_once_a_pause_and_recovered_from(
    wechat: Sandbox, redis_server: RedisServer, name: str, endpoint: str
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server, timeout=0.2)
        wechat.faults[endpoint] = BROKEN[name]
        for _ in range(10):
            with pytest.raises(SigningError):
                await tickets.current()
        assert wechat.calls[endpoint] == 1
        assert not redis_server.run("EXISTS", TICKET_KEY)
        assert not redis_server.run("EXISTS", LOCK_KEY)
        del wechat.faults[endpoint]
        tickets._ask_again_at = 0.0  # the pause is over
        ticket = await tickets.current()
        assert ticket == wechat.ticket

        wechat.faults[endpoint] = BROKEN[name]
        redis_server.run("PERSIST", TICKET_KEY)
        if endpoint == "token":
            redis_server.run("DEL", TOKEN_KEY)
            tickets._cache._memory.drop(TOKEN_KEY, redis_server.run("GET", TOKEN_KEY) or "")  # type: ignore[union-attr]
        for _ in range(10):
            assert await tickets.current() == ticket

    asyncio.run(scenario())


@pytest.mark.usefixtures("look_always")
def test_a_token_replaced_by_another_program_costs_one_refusal_and_no_page(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server)
        await tickets.current()
        wechat.replace_token()
        redis_server.run("EXPIRE", TICKET_KEY, 6000)  # old enough to be asked for again
        await until(tickets, lambda: redis_server.run("TTL", TICKET_KEY) > 7000)

    asyncio.run(scenario())
    assert wechat.calls == {"token": 2, "getticket": 3}


def test_a_ticket_rotated_early_is_noticed_by_every_instance(
    wechat: Sandbox, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tickets_module, "LOOK_AGAIN", 0.5)

    async def scenario() -> None:
        instances = [tickets_for(wechat, redis_server, recheck=1) for _ in range(3)]
        old = {await tickets.current() for tickets in instances}
        wechat.rotate_ticket()
        began = time.monotonic()
        while {await tickets.current() for tickets in instances} != {wechat.ticket}:
            assert time.monotonic() < began + 1 + 0.5 + 2  # recheck, memory, a noisy machine
            await asyncio.sleep(0.02)
        assert old != {wechat.ticket}

    asyncio.run(scenario())
    assert wechat.calls["token"] == 1


def test_two_accounts_on_one_redis_do_not_meet(redis_server: RedisServer) -> None:
    accounts = [Sandbox(appid="wxone").start(), Sandbox(appid="wxtwo").start()]

    async def scenario() -> None:
        for wechat in accounts:
            assert await tickets_for(wechat, redis_server).current() == wechat.ticket

    asyncio.run(scenario())
    assert accounts[0].ticket != accounts[1].ticket
    assert len(redis_server.run("KEYS", "*")) == 4
    for wechat in accounts:
        wechat.stop()


@pytest.mark.usefixtures("look_always")
@pytest.mark.parametrize("hours", [1, -1])
@pytest.mark.parametrize("shared", [True, False])
def test_a_jump_of_the_system_clock_changes_nothing(
    wechat: Sandbox,
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    hours: int,
    shared: bool,
) -> None:
    wall = time.time

    async def scenario() -> None:
        tickets = server.make_tickets(settings_for(wechat, redis_server if shared else None))
        ticket = await tickets.current()
        monkeypatch.setattr(time, "time", lambda: wall() + hours * 3600)
        for _ in range(5):
            assert await tickets.current() == ticket
            assert tickets._task is not None
            await tickets._task

    asyncio.run(scenario())
    assert wechat.calls == {"token": 1, "getticket": 1}


# From here on the server is a process of its own.


def lines_for(redis_server: RedisServer, *more: str) -> list[str]:
    return ["timeout = 0.5", *redis_server.ini, *more]


def test_when_the_one_that_asks_is_killed_another_takes_over_within_the_lease(
    start: Start, wechat: Sandbox, redis_server: RedisServer
) -> None:
    hold = threading.Event()
    wechat.faults["token"] = Fault(hold=hold)
    first = start(*lines_for(redis_server))
    eventually("the first asks WeChat", lambda: wechat.calls["token"])
    second = start(*lines_for(redis_server))
    assert second.url
    first.kill()
    lease = redis_server.run("PTTL", LOCK_KEY) / 1000
    assert 0 < lease <= 4  # 2 * timeout + 3
    wechat.faults.clear()
    began = time.monotonic()
    assert_signs(second, wechat)
    assert time.monotonic() - began < lease + 1
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
    own_redis.start() if fault == "killed" else own_redis.resume()
    running.says("works again")
    eventually("Redis has the ticket", lambda: own_redis.run("GET", TICKET_KEY) == wechat.ticket)
    over.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert max(slowest) < 1.0  # the time-out that nobody may have waited for


def test_thousands_of_idle_and_half_connections_harm_nobody(start: Start, wechat: Sandbox) -> None:
    running = start()
    assert_signs(running, wechat)
    before = resident(running.process)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = min(3000, hard // 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = []
    for place in range(number):
        connection = running.connect()
        connection.sendall(
            (b"", b"GET /getApi?url=", b"GET / HTTP/1.1\r\nHost: a\r\nX: ")[place % 3]
        )
        held.append(connection)
    assert_signs(running, wechat)
    assert resident(running.process) - before < 30 * number
    for connection in held:
        connection.close()
    assert_signs(running, wechat)


def test_more_connections_than_file_descriptors_close_the_quietest(
    start: Start, wechat: Sandbox
) -> None:
    running = start(files=256)
    active = http.client.HTTPConnection(*running.address, timeout=PATIENCE)
    held = []
    for place in range(400):
        held.append(running.connect())
        if place % 50 == 0:  # the same connection all the time: it is not the quietest
            active.request("GET", f"/getApi?url={PAGE}")
            assert active.getresponse().read()
    assert_signs(running, wechat)
    assert held[0].recv(1) == b""  # closed by the server
    assert "Too many open files" not in running.output
    active.close()
    for connection in held:
        connection.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /getApi?url=https://a/" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /getApi HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 50_000,
        b"POST /getApi HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffff\r\n"
        + b"x" * 50_000,
        b"POST /getApi HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\r\n\r\n\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /getApi?url=https://a/ HTTP/9.9\r\nHost: a\r\n\r\n",
        b"GET /getApi?url=https://a/ HTTP/1.1\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_hostile_requests_are_refused_and_others_notice_nothing(
    start: Start, wechat: Sandbox, request_bytes: bytes
) -> None:
    running = start()
    assert running.url
    with running.connect() as connection:
        try:
            connection.sendall(request_bytes)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
        except ConnectionError:
            answer = b""
    assert answer == b"" or b" 400 " in answer or b" 413 " in answer or b" 405 " in answer
    assert_signs(running, wechat)
    assert "Traceback" not in running.output


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
