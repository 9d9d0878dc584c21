"""Which of two tickets serves, by a table; and what is under the keys in Redis."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from harness import (
    CHECKED_KEY,
    LOCK_KEY,
    TICKET_KEY,
    Fault,
    Instance,
    MovedClock,
    RedisServer,
    Sandbox,
    eventually,
    instance_for,
    marker,
    settings_for,
    unwritable,
)

from wechat_sign.cache import Cache
from wechat_sign.credentials import Credential
from wechat_sign.renewal import Known, decide, decide_token
from wechat_sign.settings import Limits
from wechat_sign.tickets import pause_after

NOW = 1000.0
STATES = {
    "over": (NOW - 100, NOW, NOW - 600),
    "due": (NOW + 400, NOW + 500, NOW),
    "due, lasts longer": (NOW + 500, NOW + 600, NOW),
    "fresh": (NOW + 450, NOW + 550, NOW + 0.1),
    "fresh, lasts longer": (NOW + 550, NOW + 650, NOW + 0.1),
}
"""A ticket by when the cache lets it go, when WeChat does, and until when it is fresh."""
LASTS = {"due": 1, "fresh": 2, "due, lasts longer": 3, "fresh, lasts longer": 4}
"""Which of two lasts longer."""


@pytest.mark.parametrize("was_in_redis", [True, False])
@pytest.mark.parametrize(("held", "found"), list(product(["none", *STATES], repeat=2)))
def test_which_ticket_serves_and_whether_wechat_is_asked(
    held: str, found: str, was_in_redis: bool
) -> None:
    usable, there = held in LASTS, found in LASTS
    is_fresh, comes_fresh = "fresh" in held, "fresh" in found
    if not usable:
        expected = ("found" if there else None, not there)
    elif comes_fresh and LASTS[found] >= LASTS[held]:
        expected = ("found", False)
    elif is_fresh and (not there or (not comes_fresh and not was_in_redis)):
        expected = ("held", False)
    else:
        lasts_longer = there and LASTS[found] >= LASTS[held]
        expected = ("found" if lasts_longer else "held", True)
    ours = Credential("held", *STATES[held], in_redis=was_in_redis) if held in STATES else None
    theirs = Credential("found", *STATES[found], in_redis=True) if found in STATES else None
    serves, asks = decide(NOW, ours, theirs)
    assert (serves.value if serves else None, asks) == expected


@pytest.mark.parametrize(("held", "found"), list(product(LASTS, LASTS)))
def test_the_same_ticket_lives_as_long_as_it_was_known_to(held: str, found: str) -> None:
    ours, theirs = (Credential("t", *STATES[state], in_redis=True) for state in (held, found))
    serves, asks = decide(NOW, ours, theirs)
    assert serves is not None
    assert serves.usable_until == max(ours.usable_until, theirs.usable_until)
    assert asks is not ("fresh" in found)


OURS, THEIRS = Credential("ours", NOW + 100, NOW + 200), Credential("theirs", NOW + 100, NOW + 100)


@pytest.mark.parametrize(
    ("held", "found", "used"),
    [
        (None, None, None),
        (None, THEIRS, "theirs"),
        (OURS, None, "ours"),
        (OURS, THEIRS, "theirs"),  # it was written as late as ours, or later
        (OURS, replace(THEIRS, expires=NOW + 99), "ours"),
        (replace(OURS, in_redis=True), None, None),  # it may have been refused to another instance
        (replace(OURS, in_redis=True), replace(THEIRS, expires=NOW + 1), "theirs"),
        (replace(OURS, expires=NOW), None, None),
    ],
)
def test_which_access_token_is_used(
    held: Credential | None, found: Credential | None, used: str | None
) -> None:
    token = decide_token(NOW, held, found)
    assert (token.value if token else None) == used


@pytest.mark.parametrize(
    ("ticket", "pause", "while_it_backs_off"),
    [
        (None, 0.5, 0.5),
        (Credential("over", NOW - 100, NOW, NOW), 0.5, 0.5),
        (Credential("fresh", NOW + 7100, NOW + 7200, NOW + 600), 10, 10),
        (Credential("fresh", NOW + 3, NOW + 103, NOW + 3), 3, 3),
        (Credential("fresh", NOW + 0.1, NOW + 100, NOW + 0.1), 0.5, 0.5),
        (Credential("due", NOW + 7100, NOW + 7200, NOW), 0.5, 10),
        (Credential("due", NOW - 97, NOW + 3, NOW), 0.5, 3),
    ],
)
def test_how_long_it_is_to_the_next_look(
    ticket: Credential | None, pause: float, while_it_backs_off: float
) -> None:
    for quiet_until, expected in ((NOW, pause), (NOW + 60, while_it_backs_off)):
        known = Known(ticket, quiet_until=quiet_until)
        assert pause_after(known, NOW, Limits()) == pytest.approx(expected)


# What stands under the keys.


def test_another_instance_reads_value_life_and_freshness(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    redis_server.run("SET", TICKET_KEY, "t", "EX", 1000)
    redis_server.run("SET", CHECKED_KEY, marker("t", beyond=970_000), "EX", 100)
    one = instance_for(wechat, redis_server, clock=clock)
    assert one.look() == "t"
    assert 999 < one.ticket.expires - clock.now <= 1000
    assert 1069 < one.ticket.usable_until - clock.now <= 1070
    assert 99 < one.ticket.fresh_until - clock.now <= 100


NAMED: dict[str, Any] = {"access_token_key": "wx:token", "jsapi_ticket_key": "wx:ticket"}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("shape", "command"),
    [
        ("a PHP-serialised value", ("SET", 's:9:"s3cr3t-xx";')),
        ("JSON without a credential", ("SET", '{"appid": "s3cr3t xx"}')),
        ("text that is no credential", ("SET", "s3cr3t xx\n")),
        ("no string", ("HSET", "ticket", "s3cr3t")),
    ],
)
@pytest.mark.parametrize("key", NAMED.values())
def test_what_another_program_keeps_under_a_named_key_is_never_overwritten(
    wechat: Sandbox,
    redis_server: RedisServer,
    clock: MovedClock,
    caplog: pytest.LogCaptureFixture,
    key: str,
    shape: str,
    command: tuple[str, ...],
) -> None:
    redis_server.run(command[0], key, *command[1:])
    reading = {"SET": "GET", "HSET": "HGETALL"}[command[0]]
    kept = redis_server.run(reading, key)
    one = instance_for(wechat, redis_server, clock=clock, **NAMED)
    for _ in range(5):
        assert one.look() == wechat.ticket
        clock.advance(601)
    assert redis_server.run(reading, key) == kept
    [warning] = warnings(caplog)
    assert f"the Redis key {key} holds {shape}" in warning
    assert "s3cr3t" not in caplog.text
    assert wechat.calls["token"] == 1


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ("jsapi_ticket_key", '"{}"'),
        ("jsapi_ticket_key", '{{"ticket": "{}", "expires_in": 7200}}'),
        ("access_token_key", '{{"access_token": "{}"}}'),
        ("access_token_key", '{{"accessToken": "{}", "expireTime": 1}}'),
    ],
)
def test_a_credential_in_json_is_read_and_left_alone(
    wechat: Sandbox,
    redis_server: RedisServer,
    clock: MovedClock,
    caplog: pytest.LogCaptureFixture,
    named: str,
    text: str,
) -> None:
    """As wechatpy, silenceper/wechat and node-webot write it."""
    key = NAMED[named]
    token = wechat.token_of_another_program()
    text = text.format(token if named == "access_token_key" else wechat.ticket)
    redis_server.run("SET", key, text, "EX", 7000)
    one = instance_for(wechat, redis_server, clock=clock, **NAMED)
    for _ in range(3):
        assert one.look() == wechat.ticket
        clock.advance(601)
    assert redis_server.run("GET", key) == text
    assert wechat.calls["token"] == (0 if named == "access_token_key" else 1)
    assert warnings(caplog) == []


def test_a_plain_string_of_another_program_under_a_named_key_is_replaced_once_it_is_due(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    for key in NAMED.values():
        redis_server.run("SET", key, "plain")
    assert instance_for(wechat, redis_server, **NAMED).looks(2) == wechat.ticket
    assert redis_server.run("GET", "wx:ticket") == wechat.ticket
    assert redis_server.run("GET", "wx:token") in wechat.issued


# Redis in trouble.


@pytest.mark.parametrize("host", ["redis..internal", "x" * 64])
def test_a_name_that_can_be_no_hosts_is_a_redis_that_is_not_reached(
    wechat: Sandbox, host: str
) -> None:
    one = instance_for(wechat, host=host)
    assert one.look() == wechat.ticket
    assert one.cache.state == "unreachable"


def test_a_right_that_is_missing_for_one_key_is_warned_of_once(
    wechat: Sandbox, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    redis_server.run("ACL", "SETUSER", "reader", "on", ">s3cr3t", "+@all")
    redis_server.run("ACL", "SETUSER", "reader", "~wechat:wxsandbox:*", "%R~wx:*")
    one = instance_for(wechat, redis_server, username="reader", password="s3cr3t", **NAMED)
    one.looks(5)
    redis_server.run("ACL", "DELUSER", "reader")
    assert one.cache.state == "failing"
    assert caplog.text.count("writing to Redis at") == 1
    assert "works again" not in caplog.text


def test_a_redis_that_hangs_is_left_alone_for_a_while(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock
) -> None:
    wechat.faults["token"] = Fault(errcode=-1)
    limits = Limits(redis_timeout=0.3)
    held = Credential("held", clock.now + 7000, clock.now + 7000)
    one = instance_for(wechat, own_redis, clock=clock, limits=limits, held=held)
    own_redis.pause()
    assert one.look() == "held"
    own_redis.resume()
    own_redis.put_ticket("theirs", 7200, checked=True)
    clock.advance(limits.redis_pause - 0.1)
    assert one.look() == "held"
    clock.advance(0.1)
    assert one.look() == "theirs"


# The lock.


def is_free(one: Instance) -> bool:
    with one.cache.lock() as lease_over:
        return lease_over is not None


def test_one_instance_at_a_time_holds_the_lock_and_ends_no_others(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    one, other = (instance_for(wechat, redis_server) for _ in range(2))
    with one.cache.lock():
        assert not is_free(other)
        assert 12 < redis_server.run("TTL", LOCK_KEY) <= 13
    assert not redis_server.run("EXISTS", LOCK_KEY)
    with one.cache.lock():
        redis_server.run("SET", LOCK_KEY, "another's", "EX", 100)
    assert redis_server.run("GET", LOCK_KEY) == "another's"
    redis_server.run("DEL", LOCK_KEY)
    with pytest.raises(ValueError, match="wrong"), one.cache.lock():
        raise ValueError("wrong")
    assert not redis_server.run("EXISTS", LOCK_KEY)


def test_a_lock_without_an_expiry_gets_one(wechat: Sandbox, redis_server: RedisServer) -> None:
    for command in ("SET", "RPUSH"):
        redis_server.run("DEL", LOCK_KEY)
        redis_server.run(command, LOCK_KEY, "another's")
        assert not is_free(instance_for(wechat, redis_server))
        assert 12 < redis_server.run("TTL", LOCK_KEY) <= 13


def test_a_lock_that_was_got_without_knowing_it_is_ones_own(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock
) -> None:
    one = instance_for(wechat, own_redis, clock=clock, limits=Limits(redis_timeout=0.3))
    assert is_free(one)  # connected, so that only the lock's own command is lost
    own_redis.pause()
    with one.cache.lock() as lease_over:
        assert lease_over == clock.now  # it may ask, and write nothing
    own_redis.resume()
    eventually("Redis did it after all", lambda: own_redis.run("EXISTS", LOCK_KEY))
    assert not is_free(instance_for(wechat, own_redis))
    clock.advance(Limits().redis_pause)
    own_redis.run("PEXPIRE", LOCK_KEY, 5000)
    with one.cache.lock() as lease_over:
        assert lease_over is not None
        assert 0 < lease_over - clock.now <= 5  # what is left of it
    assert not own_redis.run("EXISTS", LOCK_KEY)


def test_what_works_again_is_told_once_and_not_before(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_for(wechat, own_redis)
    cache = Cache(settings, clock)
    ticket = Credential("t", clock.now + 100, clock.now + 100)

    def look(state: str, working_again: int) -> None:
        cache.read()
        cache.settle()
        assert cache.state == state
        assert caplog.text.count("works again") == working_again

    full, _ = unwritable(own_redis)["full"]
    own_redis.run(*full)
    cache.write(TICKET_KEY, ticket)
    look("failing", 0)
    look("failing", 0)  # it wrote nothing by itself
    own_redis.kill()
    look("unreachable", 0)
    clock.advance(settings.limits.redis_pause)
    own_redis.start()
    look("redis", 2)
    own_redis.kill()
    look("unreachable", 2)
    look("unreachable", 2)
    clock.advance(settings.limits.redis_pause)
    cache.settle()  # it asked nothing
    assert cache.state == "unreachable"
    own_redis.start()
    look("redis", 3)
    assert caplog.text.count("going on without") == 3
