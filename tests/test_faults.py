"""Faults of Redis, WeChat, other instances and clients, on real parts."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from functools import partial

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
    unwritable,
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


ADVICE = {
    "killed": "start Redis, or correct",
    "paused": "whether Redis hangs",
    "full": "maxmemory",
    "read-only": "replica",
}


@pytest.mark.parametrize("fault", ADVICE)
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
    breaks, mends = {
        "killed": (own_redis.kill, own_redis.start),
        "paused": (own_redis.pause, own_redis.resume),
    }.get(fault) or (partial(own_redis.run, *words) for words in unwritable(own_redis)[fault])
    breaks()
    asked_until("the log says it", lambda: "going on without" in running.output)
    assert ADVICE[fault] in running.output
    is_reached = fault in ("full", "read-only")
    assert fetch(f"{running.url}/healthz")[1]["cache"] == (
        "failing" if is_reached else "unreachable"
    )
    calls = wechat.calls["getticket"]
    asked_until("WeChat is asked again", lambda: wechat.calls["getticket"] > calls)
    mends()
    asked_until("the log says it", lambda: "works again" in running.output)
    asked_until("Redis has it", lambda: own_redis.run("GET", TICKET_KEY) == wechat.ticket)
    assert slowest < often.redis_timeout  # so none has waited for Redis
