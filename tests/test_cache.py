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
    TOKEN_KEY,
    Fault,
    Instance,
    MovedClock,
    RedisServer,
    Sandbox,
    eventually,
    instance_for,
    marker,
    unwritable,
)

from wechat_sign.credentials import Credential
from wechat_sign.renewal import Known, decide, decide_token
from wechat_sign.settings import Limits
from wechat_sign.tickets import pause_after

NOW = 1000.0
STATES = {
    "none": None,
    "over": (NOW - 100, NOW, NOW - 600),
    "due": (NOW + 400, NOW + 500, NOW),
    "due, lasts longer": (NOW + 500, NOW + 600, NOW),
    "fresh": (NOW + 450, NOW + 550, NOW + 0.1),
    "fresh, lasts longer": (NOW + 550, NOW + 650, NOW + 0.1),
}
"""A ticket by when the cache lets it go, when WeChat does, and until when it is fresh."""
LASTS = {"due": 1, "fresh": 2, "due, lasts longer": 3, "fresh, lasts longer": 4}
"""Which of two lasts longer."""


def credential(value: str, state: str, *, in_redis: bool) -> Credential | None:
    moments = STATES[state]
    return Credential(value, *moments, in_redis=in_redis) if moments else None


@pytest.mark.parametrize("was_in_redis", [True, False])
@pytest.mark.parametrize(("held", "found"), list(product(STATES, STATES)))
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
    ours = credential("held", held, in_redis=was_in_redis)
    theirs = credential("found", found, in_redis=True)
    serves, asks = decide(NOW, ours, theirs)
    assert (serves.value if serves else None, asks) == expected


def test_a_fresh_one_that_redis_never_had_stays_where_redis_has_it_without_its_marker() -> None:
    ours, theirs = credential("t", "fresh", in_redis=False), credential("t", "due", in_redis=True)
    assert decide(NOW, ours, theirs) == (ours, False)


@pytest.mark.parametrize("fresh_until", [NOW + 1, NOW - 1])
def test_an_older_one_that_came_back_does_not_serve_though_its_key_lasts_longer(
    fresh_until: float,
) -> None:
    """As after a fail-over to a replica that lagged, with or without the marker."""
    ours = Credential("newer", NOW + 30, NOW + 7130, NOW - 50, in_redis=True)
    theirs = Credential("older", NOW + 45, NOW + 6600, fresh_until, in_redis=True)
    assert decide(NOW, ours, theirs) == (ours, True)


OURS, THEIRS = Credential("ours", NOW + 100, NOW + 200), Credential("theirs", NOW + 100, NOW + 100)


@pytest.mark.parametrize(
    ("held", "found", "used"),
    [
        (None, None, None),
        (None, THEIRS, THEIRS),
        (OURS, None, OURS),
        (OURS, THEIRS, THEIRS),  # it was written as late as ours, or later
        (OURS, replace(THEIRS, expires=NOW + 99), OURS),
        (replace(OURS, in_redis=True), None, None),  # it may have been refused to another instance
        (replace(OURS, in_redis=True), replace(THEIRS, expires=NOW + 1), "found"),
        (replace(OURS, expires=NOW), None, None),
    ],
)
def test_which_access_token_is_used(
    held: Credential | None, found: Credential | None, used: Credential | str | None
) -> None:
    assert decide_token(NOW, held, found) == (found if used == "found" else used)


WELL = Known()
QUIET = Known(quiet_until=NOW + 60)


@pytest.mark.parametrize(
    ("known", "pause"),
    [
        (WELL, 0.5),
        (QUIET, 0.5),
        (replace(WELL, ticket=Credential("t", NOW + 7100, NOW + 7200, NOW + 600)), 10),
        (replace(WELL, ticket=Credential("t", NOW + 3, NOW + 103, NOW + 3)), 3),
        (replace(WELL, ticket=Credential("t", NOW + 0.1, NOW + 100, NOW + 0.1)), 0.5),
        (replace(WELL, ticket=Credential("t", NOW + 7100, NOW + 7200, NOW)), 0.5),
        (replace(QUIET, ticket=Credential("t", NOW + 7100, NOW + 7200, NOW)), 10),
        (replace(QUIET, ticket=Credential("t", NOW - 97, NOW + 3, NOW)), 3),
        (replace(WELL, ticket=Credential("t", NOW - 100, NOW, NOW)), 0.5),
    ],
)
def test_how_long_it_is_to_the_next_look(known: Known, pause: float) -> None:
    assert pause_after(known, NOW, Limits()) == pytest.approx(pause)


@pytest.mark.parametrize("found", LASTS)
@pytest.mark.parametrize("held", LASTS)
def test_the_same_ticket_lives_as_long_as_it_was_known_to(held: str, found: str) -> None:
    ours, theirs = (credential("t", state, in_redis=True) for state in (held, found))
    assert ours is not None
    assert theirs is not None
    serves, asks = decide(NOW, ours, theirs)
    assert serves is not None
    assert serves.usable_until == max(ours.usable_until, theirs.usable_until)
    assert asks is not ("fresh" in found)


@pytest.mark.parametrize("seconds", [0.001, 0.5])
def test_a_ticket_serves_to_its_last_moment(seconds: float) -> None:
    ours = Credential("t", NOW, NOW + seconds)
    assert decide(NOW, ours, None) == (ours, True)
    assert decide(NOW + seconds, ours, None) == (None, True)


def test_a_credential_does_not_show_itself() -> None:
    assert "s3cr3t" not in repr(Credential("s3cr3t", 1, 2))


# What stands under the keys.


def test_redis_holds_plain_strings_with_an_expiry_and_the_marker_a_digest(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    instance_for(wechat, redis_server).look()
    assert redis_server.run("GET", TICKET_KEY) == wechat.ticket
    assert redis_server.run("GET", TOKEN_KEY) in wechat.issued
    for key in (TICKET_KEY, TOKEN_KEY):
        assert 7_090_000 < redis_server.run("PTTL", key) <= 7_100_000
    assert redis_server.run("GET", CHECKED_KEY) == marker(wechat.ticket)
    assert 590_000 < redis_server.run("PTTL", CHECKED_KEY) <= 600_000
    assert not redis_server.run("EXISTS", LOCK_KEY)
    assert redis_server.run("DBSIZE") == 3


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
    assert one.ticket.in_redis


def test_a_marker_that_another_wrote_lengthens_no_life(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    """As where another program writes the same ticket anew beside the marker of an instance that
    keeps it for less."""
    instance_for(wechat, redis_server, clock=clock, expire=1800).look()
    redis_server.run("SET", TICKET_KEY, wechat.ticket, "EX", 7100)
    one = instance_for(wechat, redis_server, clock=clock)
    one.look()
    assert one.ticket.usable_until <= clock.now + 7200


@pytest.mark.parametrize("life", [0, 99999])
def test_a_life_that_is_not_wechats_says_nothing(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, life: int
) -> None:
    redis_server.put_ticket("t", life)
    one = instance_for(wechat, redis_server, clock=clock)
    one.look()
    assert one.ticket.expires == one.ticket.usable_until == clock.now + Limits().undated_life


def test_the_time_that_redis_takes_is_no_life_of_the_ticket(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    """What Redis tells was true some time before it arrives."""

    class Slow(MovedClock):
        def __call__(self) -> float:
            self.now += 0.5
            return self.now

    redis_server.put_ticket("t", 100)
    clock = Slow()
    one = instance_for(wechat, redis_server, clock=clock)
    one.look()
    assert one.ticket.expires <= clock.now - 0.5 + 100


NAMED: dict[str, Any] = {"access_token_key": "wx:token", "jsapi_ticket_key": "wx:ticket"}
FOREIGN: dict[str, tuple[Any, ...]] = {
    "a PHP-serialised value": ("SET", 's:9:"s3cr3t-xx";'),
    "JSON without a credential": ("SET", '{"appid": "s3cr3t xx"}'),
    "text that is no credential": ("SET", "s3cr3t xx\n"),
    "no string": ("HSET", "ticket", "s3cr3t"),
}


def dumped(redis_server: RedisServer, key: str) -> Any:
    with redis_server.client() as client:
        return client.hgetall(key) if client.type(key) == "hash" else client.get(key)


@pytest.mark.parametrize("shape", FOREIGN)
@pytest.mark.parametrize("key", NAMED.values())
def test_what_another_program_keeps_under_a_named_key_is_never_overwritten(
    wechat: Sandbox,
    redis_server: RedisServer,
    clock: MovedClock,
    caplog: pytest.LogCaptureFixture,
    key: str,
    shape: str,
) -> None:
    command, *value = FOREIGN[shape]
    redis_server.run(command, key, *value)
    before = dumped(redis_server, key)
    one = instance_for(wechat, redis_server, clock=clock, **NAMED)
    for _ in range(5):
        assert one.look() == wechat.ticket
        clock.advance(601)
    assert dumped(redis_server, key) == before
    [warning] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"the Redis key {key} holds {shape}" in warning.getMessage()
    assert "s3cr3t" not in caplog.text
    assert wechat.calls["token"] == 1


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ("jsapi_ticket_key", '"{}"'),
        ("jsapi_ticket_key", '{{"ticket": "{}", "expires_in": 7200}}'),
        ("access_token_key", '"{}"'),
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
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("named", [True, False])
def test_under_its_own_keys_whatever_is_no_credential_is_replaced(
    wechat: Sandbox, redis_server: RedisServer, named: bool
) -> None:
    """And under a named key what another program keeps as a plain string, once it is due."""
    keys = tuple(NAMED.values()) if named else (TOKEN_KEY, TICKET_KEY)
    for key in keys:
        redis_server.run("SET", key, "plain" if named else '{"ticket": "t"}')
    assert instance_for(wechat, redis_server, **(NAMED if named else {})).looks(2) == wechat.ticket
    assert redis_server.run("GET", keys[1]) == wechat.ticket
    assert redis_server.run("GET", keys[0]) in wechat.issued


@pytest.mark.parametrize("garbage", [("SET", ""), ("SET", "{}"), ("RPUSH", "x")])
def test_what_is_held_replaces_garbage_under_its_own_key(
    wechat: Sandbox, redis_server: RedisServer, garbage: tuple[str, str]
) -> None:
    one = instance_for(wechat, redis_server)
    one.look()
    redis_server.run("DEL", TICKET_KEY)
    redis_server.run(garbage[0], TICKET_KEY, garbage[1])
    one.look()
    assert redis_server.run("GET", TICKET_KEY) == wechat.ticket
    assert wechat.calls == {"token": 1, "getticket": 1}


# What Redis lost, or did not take.


def test_who_fetched_while_redis_was_away_offers_it_when_it_is_back(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock, caplog: pytest.LogCaptureFixture
) -> None:
    own_redis.kill()
    one = instance_for(wechat, own_redis, clock=clock)
    for _ in range(3):
        one.look()
        clock.advance(Limits().redis_pause)
    assert one.state == "unreachable"
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "Connection refused" in warning.getMessage()
    own_redis.start()
    clock.advance(Limits().redis_pause)
    one.look()
    assert one.state == "redis"
    assert own_redis.run("GET", TICKET_KEY) == wechat.ticket
    assert own_redis.run("GET", CHECKED_KEY) == marker(wechat.ticket)
    assert own_redis.run("GET", TOKEN_KEY) in wechat.issued
    assert "reaching Redis works again" in caplog.text
    assert wechat.calls == {"token": 1, "getticket": 1}


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_redis_that_takes_nothing_gets_it_when_it_does(
    wechat: Sandbox,
    own_redis: RedisServer,
    clock: MovedClock,
    caplog: pytest.LogCaptureFixture,
    trouble: str,
) -> None:
    broken, mended = unwritable(own_redis)[trouble]
    own_redis.run(*broken)
    one = instance_for(wechat, own_redis, clock=clock)
    one.looks(3)
    assert one.state == "failing"
    assert caplog.text.count("writing to Redis at") == 1
    own_redis.run(*mended)
    one.look()
    assert one.state == "redis"
    assert caplog.text.count("writing to Redis works again") == 1
    assert own_redis.run("GET", TICKET_KEY) == wechat.ticket
    assert own_redis.run("GET", TOKEN_KEY) in wechat.issued


def test_what_is_put_back_replaces_nothing_that_came_meanwhile(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock
) -> None:
    own_redis.kill()
    one = instance_for(wechat, own_redis, clock=clock)
    one.look()
    own_redis.start()
    own_redis.put_ticket("theirs", 7100, checked=True)
    clock.advance(Limits().redis_pause)
    assert one.look() == "theirs"
    assert own_redis.run("GET", TICKET_KEY) == "theirs"


def test_another_programs_newer_token_is_not_overwritten_by_ours(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock
) -> None:
    own_redis.kill()
    one = instance_for(wechat, own_redis, clock=clock)
    one.look()
    own_redis.start()
    clock.advance(50)
    newer = wechat.token_of_another_program()
    own_redis.run("SET", TOKEN_KEY, newer, "EX", 7100)
    one.look()
    assert own_redis.run("GET", TOKEN_KEY) == newer
    assert own_redis.run("GET", TICKET_KEY) == wechat.ticket


def test_a_token_that_redis_lost_costs_another(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    one = instance_for(wechat, redis_server, clock=clock)
    one.look()
    redis_server.run("FLUSHALL")
    one.look()
    redis_server.run("DEL", CHECKED_KEY)
    one.look()
    assert wechat.calls == {"token": 2, "getticket": 2}


def test_a_right_that_is_missing_for_one_key_is_warned_of_once(
    wechat: Sandbox, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    redis_server.run("ACL", "SETUSER", "reader", "on", ">s3cr3t", "+@all")
    redis_server.run("ACL", "SETUSER", "reader", "~wechat:wxsandbox:*", "%R~wx:*")
    caplog.set_level(logging.INFO)
    one = instance_for(wechat, redis_server, username="reader", password="s3cr3t", **NAMED)
    one.looks(5)
    redis_server.run("ACL", "DELUSER", "reader")
    assert one.state == "failing"
    assert caplog.text.count("writing to Redis at") == 1
    assert "works again" not in caplog.text


def test_a_wrong_password_is_warned_of_without_showing_it(
    wechat: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer(password="right")
    try:
        assert instance_for(wechat, server, password="wr0ng").look() == wechat.ticket
        assert "invalid username-password pair" in caplog.text
        assert "wr0ng" not in caplog.text
        good = instance_for(wechat, server, password="right")
        good.look()
        assert good.state == "redis"
    finally:
        server.stop()


# The lock.


def is_free(one: Instance) -> bool:
    with one.lock() as lease_over:
        return lease_over is not None


def test_one_instance_at_a_time_holds_the_lock_and_ends_no_others(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    one, other = (instance_for(wechat, redis_server) for _ in range(2))
    with one.lock():
        assert 12 < redis_server.run("TTL", LOCK_KEY) <= 13
        assert not is_free(other)
        assert redis_server.run("EXISTS", LOCK_KEY)
    assert not redis_server.run("EXISTS", LOCK_KEY)
    with one.lock():
        redis_server.run("SET", LOCK_KEY, "another's", "EX", 100)
    assert redis_server.run("GET", LOCK_KEY) == "another's"


def test_the_lock_is_released_when_something_goes_wrong(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    with pytest.raises(ValueError, match="wrong"), instance_for(wechat, redis_server).lock():
        raise ValueError("wrong")
    assert not redis_server.run("EXISTS", LOCK_KEY)


@pytest.mark.parametrize("command", [("SET", "another's"), ("RPUSH", "another's")])
def test_a_lock_without_an_expiry_gets_one(
    wechat: Sandbox, redis_server: RedisServer, command: tuple[str, str]
) -> None:
    redis_server.run(command[0], LOCK_KEY, command[1])
    assert not is_free(instance_for(wechat, redis_server))
    assert 12 < redis_server.run("TTL", LOCK_KEY) <= 13


def test_a_lock_that_was_got_without_knowing_it_is_ones_own(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock
) -> None:
    one = instance_for(wechat, own_redis, clock=clock, limits=Limits(redis_timeout=0.3))
    assert is_free(one)  # connected, so that only the lock's own command is lost
    own_redis.pause()
    with one.lock() as lease_over:
        assert lease_over == clock.now  # it may ask, and write nothing
    own_redis.resume()
    eventually("Redis did it after all", lambda: own_redis.run("EXISTS", LOCK_KEY))
    assert not is_free(instance_for(wechat, own_redis))
    clock.advance(Limits().redis_pause)
    own_redis.run("PEXPIRE", LOCK_KEY, 5000)
    with one.lock() as lease_over:
        assert lease_over is not None
        assert 0 < lease_over - clock.now <= 5  # what is left of it
    assert not own_redis.run("EXISTS", LOCK_KEY)


def test_a_redis_that_hangs_is_left_alone_for_a_while(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock
) -> None:
    wechat.faults["token"] = Fault(errcode=-1)
    limits = Limits(redis_timeout=0.3)
    held = Credential("held", clock.now + 7000, clock.now + 7000)
    one = instance_for(wechat, own_redis, clock=clock, limits=limits, held=held)
    own_redis.pause()
    assert one.look() == "held"
    assert one.state == "unreachable"
    own_redis.resume()
    own_redis.put_ticket("theirs", 7200, checked=True)
    clock.advance(limits.redis_pause - 0.1)
    assert one.look() == "held"
    clock.advance(0.1)
    assert one.look() == "theirs"
    assert one.state == "redis"
