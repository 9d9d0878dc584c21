"""Faults of Redis, WeChat, other instances and clients, on real parts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
from harness import (
    CHECKED_KEY,
    LOCK_KEY,
    TICKET_KEY,
    TOKEN_KEY,
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


SIGNER = ("ACL", "SETUSER", "signer", "on", ">s3cr3t", "allkeys", "allcommands")


@pytest.mark.parametrize(
    ("fault", "cold", "state", "advice"),
    [
        ("killed", True, "unreachable", "start Redis, or correct"),
        ("killed", False, "unreachable", "start Redis, or correct"),
        ("paused", False, "unreachable", "whether Redis hangs"),
        ("wrong password", True, "unreachable", "correct password"),
        ("no right", True, "failing", "this user lacks a right"),
        ("full", False, "failing", "give Redis more maxmemory"),
        ("read-only", True, "failing", "this one is a read-only replica"),
    ],
)
def test_redis_in_trouble_costs_no_page_anything_and_has_all_once_it_is_well(
    start: Start,
    wechat: Sandbox,
    own_redis: RedisServer,
    fault: str,
    cold: bool,
    state: str,
    advice: str,
) -> None:
    own_redis.run(*SIGNER)
    commands = unwritable(own_redis)
    commands["wrong password"] = (*SIGNER, "resetpass", ">another"), SIGNER
    commands["no right"] = (*SIGNER, "-set"), SIGNER
    breaks, mends = {
        "killed": (own_redis.kill, own_redis.start),
        "paused": (own_redis.pause, own_redis.resume),
    }.get(fault) or (partial(own_redis.run, *command) for command in commands[fault])
    often = Limits(look_interval=0.1, look_soon=0.1, redis_pause=0.1)
    lines = [*own_redis.ini, "username = signer", "password = s3cr3t", "recheck = 1"]
    slowest = 0.0

    def asked_until(what: str, condition: Callable[[], bool]) -> None:
        def told() -> bool:
            nonlocal slowest
            began = time.monotonic()
            assert_signs(running, wechat)
            slowest = max(slowest, time.monotonic() - began)
            return condition()

        eventually(f"while pages ask: {what}", told)

    if cold:
        breaks()
    running = start(*lines, verbose=False, limits=often)
    assert_signs(running, wechat)
    if not cold:
        breaks()
    asked_until("the log says it", lambda: "going on without" in running.output)
    assert advice in running.output
    assert fetch(f"{running.url}/healthz")[1]["cache"] == state
    calls = wechat.calls["getticket"]
    asked_until("WeChat is asked again", lambda: wechat.calls["getticket"] > calls)
    mends()
    own_redis.run(*SIGNER)  # a Redis that was killed knows no users
    asked_until("the log says it", lambda: "works again" in running.output)
    keys = (TICKET_KEY, TOKEN_KEY, CHECKED_KEY)
    asked_until("Redis has all", lambda: own_redis.run("EXISTS", *keys) == len(keys))
    assert own_redis.run("GET", TICKET_KEY) == wechat.ticket
    assert own_redis.run("GET", TOKEN_KEY) in wechat.issued
    assert fetch(f"{running.url}/healthz")[1]["cache"] == "redis"
    assert running.output.count("going on without") == running.output.count("works again") == 1
    assert "s3cr3t" not in running.output
    assert slowest < often.redis_timeout  # so none has waited for Redis
