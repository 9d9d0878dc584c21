"""Credentials in Redis and in this process. Redis's own clock runs: what is over there is deleted
here, as Redis would; the cache's clock is moved by the test."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from harness import (
    CHECKED_KEY,
    LOCK_KEY,
    TICKET_KEY,
    TOKEN_KEY,
    MovedClock,
    RedisServer,
    eventually,
    marker,
    settings_for,
)

from wechat_sign.cache import Cache
from wechat_sign.credentials import Credential
from wechat_sign.errors import LockedElsewhere
from wechat_sign.settings import Limits

KEY, OTHER_KEY = TICKET_KEY, TOKEN_KEY
REDIS_PAUSE = Limits().redis_pause


def cache_on(server: RedisServer | None, clock: MovedClock, **more: Any) -> Cache:
    """With None, the cache is this process's own."""
    appid = more.pop("appid", "wxsandbox")
    account: Any = SimpleNamespace(appid=appid, secret="s", url="")
    return Cache(settings_for(account, server, **more), clock)


def lasting(clock: MovedClock, value: str, life: float, fresh_for: float = 0) -> Credential:
    """Where it is fresh, this program wrote it, and WeChat granted 100 s more."""
    expires = clock.now + life
    usable_until = expires + (100 if fresh_for else 0)
    return Credential(value, expires, usable_until, clock.now + fresh_for)


@pytest.fixture(autouse=True)
def _log_from_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def value_of(credential: Credential | None) -> str | None:
    return credential.value if credential else None


def test_a_credential_does_not_show_itself(clock: MovedClock) -> None:
    assert "s3cr3t" not in repr(lasting(clock, "s3cr3t", 100))


def test_memory_keeps_for_the_time_given(clock: MovedClock) -> None:
    cache = cache_on(None, clock)
    assert cache.get(KEY) is None
    cache.put(KEY, lasting(clock, "t", 100))
    clock.advance(99)
    assert value_of(cache.get(KEY)) == "t"
    clock.advance(1)
    assert cache.get(KEY) is None


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_only_the_credential_that_was_refused_is_dropped(
    redis_server: RedisServer, clock: MovedClock, kind: str
) -> None:
    cache = cache_on(None if kind == "memory" else redis_server, clock)
    cache.put(KEY, lasting(clock, "new", 100))
    cache.drop(KEY, "old")
    assert value_of(cache.get(KEY)) == "new"
    cache.drop(KEY, "new")
    cache.drop(KEY, "new")
    assert cache.get(KEY) is None


def test_redis_holds_a_plain_string_with_an_expiry_and_the_marker_its_digest(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    cache_on(redis_server, clock).put(KEY, lasting(clock, "t1cket", 7100, fresh_for=600))
    assert redis_server.run("GET", KEY) == "t1cket"
    assert 7_099_000 < redis_server.run("PTTL", KEY) <= 7_100_000
    assert redis_server.run("GET", CHECKED_KEY) == marker("t1cket")
    assert 599_000 < redis_server.run("PTTL", CHECKED_KEY) <= 600_000


def test_without_freshness_there_is_no_marker(redis_server: RedisServer, clock: MovedClock) -> None:
    cache_on(redis_server, clock).put(KEY, lasting(clock, "t", 100))
    assert redis_server.run("KEYS", "*") == [KEY]


def test_another_instance_reads_value_life_and_freshness(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    cache_on(redis_server, clock).put(KEY, lasting(clock, "t", 1000, fresh_for=100))
    found = cache_on(redis_server, clock).get(KEY)
    assert found is not None
    assert found.value == "t"
    assert 999 < found.expires - clock.now <= 1000
    assert found.usable_until == found.expires + 100
    assert 99 < found.fresh_until - clock.now <= 100


def test_what_is_known_to_be_fresh_is_looked_at_by_two_commands(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    one, other = cache_on(redis_server, clock), cache_on(redis_server, clock)
    one.put(KEY, lasting(clock, "t", 1000, fresh_for=100))
    for cache in (one, other):
        cache.get(KEY)
        with redis_server.watching() as sent:
            assert value_of(cache.get(KEY)) == "t"
            assert len(sent()) == 2


@pytest.mark.parametrize(
    ("command", "value", "fresh_for"),
    [
        (("SET", KEY, "other", "EX", 50), "other", 0),
        (("DEL", CHECKED_KEY), "t", 0),
        (("PEXPIRE", CHECKED_KEY, 500_000), "t", 500),
        (("DEL", KEY), "t", 100),
    ],
)
def test_whatever_changes_of_what_is_known_is_noticed(
    redis_server: RedisServer,
    clock: MovedClock,
    command: tuple[Any, ...],
    value: str,
    fresh_for: float,
) -> None:
    cache = cache_on(redis_server, clock)
    cache.put(KEY, lasting(clock, "t", 1000, fresh_for=100))
    cache.get(KEY)
    redis_server.run(*command)
    found = cache.get(KEY)
    assert found is not None
    assert found.value == value
    assert max(0.0, found.fresh_until - clock.now) == pytest.approx(fresh_for, abs=1)


def test_of_another_programs_credential_nothing_is_known_but_its_life(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    redis_server.run("SET", KEY, "t", "EX", 100)
    found = cache_on(redis_server, clock).get(KEY)
    assert found is not None
    assert 99 < found.expires - clock.now <= 100
    assert found.usable_until == found.expires
    assert found.fresh_until <= clock.now


@pytest.mark.parametrize("life", [(), ("EX", 99999)])
def test_a_life_that_is_not_wechats_says_nothing(
    redis_server: RedisServer, clock: MovedClock, life: tuple[Any, ...]
) -> None:
    redis_server.run("SET", KEY, "t", *life)
    found = cache_on(redis_server, clock).get(KEY)
    assert found is not None
    assert found.expires == clock.now + Limits().undated_life


@pytest.mark.parametrize(
    "command",
    [
        ("SET", KEY, ""),
        ("SET", KEY, "undefined"),
        ("SET", KEY, b"\xff\xfe"),
        ("SET", KEY, "中"),
        ("HSET", KEY, "ticket", "t"),
        ("LPUSH", KEY, "t"),
    ],
)
def test_what_is_no_credential_counts_as_absent_and_is_replaced(
    redis_server: RedisServer, clock: MovedClock, command: tuple[Any, ...]
) -> None:
    redis_server.run(*command)
    cache = cache_on(redis_server, clock)
    assert cache.get(KEY) is None
    cache.put(KEY, lasting(clock, "t", 100))
    assert redis_server.run("GET", KEY) == "t"


def test_reading_writes_nothing(redis_server: RedisServer, clock: MovedClock) -> None:
    cache = cache_on(redis_server, clock)
    cache.put(KEY, lasting(clock, "t", 100))
    redis_server.run("FLUSHALL")
    assert value_of(cache.get(KEY)) == "t"
    assert redis_server.run("KEYS", "*") == []


def test_a_redis_that_lost_a_credential_gets_it_back_as_it_was(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    cache = cache_on(redis_server, clock)
    cache.put(KEY, lasting(clock, "t", 7100, fresh_for=600))
    cache.put(OTHER_KEY, lasting(clock, "o", 5000))
    redis_server.run("FLUSHALL")
    clock.advance(100)
    assert value_of(cache.get(KEY)) == "t"
    assert value_of(cache.get(OTHER_KEY)) == "o"
    cache.sync(KEY)
    assert not redis_server.run("EXISTS", OTHER_KEY)
    cache.sync(OTHER_KEY)
    assert redis_server.run("GET", KEY) == "t"
    assert 6990 < redis_server.run("TTL", KEY) <= 7000
    assert 490 < redis_server.run("TTL", CHECKED_KEY) <= 500
    assert redis_server.run("GET", OTHER_KEY) == "o"
    assert 4890 < redis_server.run("TTL", OTHER_KEY) <= 4900


def test_what_another_wrote_is_not_overwritten_by_what_this_one_remembers(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    cache = cache_on(redis_server, clock)
    cache.put(KEY, lasting(clock, "mine", 7100))
    redis_server.run("SET", KEY, "theirs", "EX", 50)
    assert value_of(cache.get(KEY)) == "theirs"
    cache.sync(KEY)
    assert redis_server.run("GET", KEY) == "theirs"


@pytest.mark.parametrize(
    ("theirs", "checked", "fresh", "stays"),
    [
        (50, False, False, False),
        (200, False, False, True),
        (200, False, True, False),
        (50, True, True, True),
        (50, True, False, True),
    ],
)
def test_without_the_lock_only_what_is_newer_is_written(
    redis_server: RedisServer,
    clock: MovedClock,
    theirs: int,
    checked: bool,
    fresh: bool,
    stays: bool,
) -> None:
    """A fresh one is newer than one that nobody confirmed, however long that lasts."""
    cache_on(redis_server, clock).put(KEY, lasting(clock, "theirs", theirs, checked * 50))
    cache_on(redis_server, clock).put(KEY, lasting(clock, "mine", 100, fresh * 100))
    assert redis_server.run("GET", KEY) == ("theirs" if stays else "mine")


def test_with_the_lock_it_is_written_whatever_is_there(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    cache_on(redis_server, clock).put(KEY, lasting(clock, "theirs", 200, fresh_for=200))
    cache = cache_on(redis_server, clock)
    with cache.lock(wait=0):
        cache.put(KEY, lasting(clock, "mine", 100, fresh_for=100))
    assert redis_server.run("GET", KEY) == "mine"


def test_with_redis_down_the_process_remembers_and_redis_gets_it_later(
    own_redis: RedisServer, clock: MovedClock, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_on(own_redis, clock)
    assert cache.get(KEY) is None
    assert cache.state == "redis"
    own_redis.kill()
    with cache.lock(wait=0):
        cache.put(KEY, lasting(clock, "t", 7100, fresh_for=600))
    for _ in range(3):
        clock.advance(REDIS_PAUSE)
        assert value_of(cache.get(KEY)) == "t"
    assert cache.state == "unreachable"
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "Connection refused" in warnings[0].getMessage()

    own_redis.start()
    clock.advance(REDIS_PAUSE)
    assert cache.get(KEY) is not None
    cache.sync(KEY)
    assert own_redis.run("GET", KEY) == "t"
    assert 7000 < own_redis.run("TTL", KEY) <= 7100
    assert own_redis.run("EXISTS", CHECKED_KEY)
    assert cache.state == "redis"


def test_what_redis_did_not_take_gives_way_to_what_is_newer(
    own_redis: RedisServer, clock: MovedClock
) -> None:
    cache = cache_on(own_redis, clock)
    own_redis.kill()
    cache.put(KEY, lasting(clock, "mine", 100))
    own_redis.start()
    own_redis.run("SET", KEY, "theirs", "EX", 200)
    clock.advance(REDIS_PAUSE)
    assert value_of(cache.get(KEY)) == "theirs"
    cache.sync(KEY)
    assert own_redis.run("GET", KEY) == "theirs"


def test_what_redis_did_not_take_serves_where_redis_has_what_ends_sooner(
    own_redis: RedisServer, clock: MovedClock
) -> None:
    cache = cache_on(own_redis, clock)
    own_redis.kill()
    cache.put(KEY, lasting(clock, "mine", 200))
    own_redis.start()
    own_redis.run("SET", KEY, "theirs", "EX", 50)
    clock.advance(REDIS_PAUSE)
    assert value_of(cache.get(KEY)) == "mine"
    cache.sync(KEY)
    assert own_redis.run("GET", KEY) == "mine"


def test_what_was_last_read_serves_while_redis_is_down(
    own_redis: RedisServer, clock: MovedClock
) -> None:
    own_redis.run("SET", KEY, "theirs", "EX", 50)
    cache = cache_on(own_redis, clock)
    cache.get(KEY)
    own_redis.kill()
    assert value_of(cache.get(KEY)) == "theirs"


NAMED = {"access_token_key": "wx:token", "jsapi_ticket_key": "wx:ticket"}


@pytest.mark.parametrize("key", NAMED.values())
def test_under_a_named_key_another_accounts_credential_is_not_used_and_not_fought_over(
    redis_server: RedisServer, clock: MovedClock, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    one, same, other = (cache_on(redis_server, clock, appid=appid, **NAMED) for appid in "aab")
    one.put(key, lasting(clock, "of-a", 100))
    assert value_of(same.get(key)) == "of-a"
    assert other.get(key) is None
    other.put(key, lasting(clock, "late", 200))
    assert redis_server.run("GET", key) == "of-a"
    with other.lock(wait=0):
        other.put(key, lasting(clock, "of-b", 50))
    assert redis_server.run("GET", key) == "of-b"
    for _ in range(3):
        assert value_of(one.get(key)) == "of-a"
        one.sync(key)
        assert value_of(other.get(key)) == "of-b"
        other.sync(key)
    assert redis_server.run("GET", key) == "of-b"
    assert caplog.text.count("another appid") == 2


def test_under_a_named_key_another_programs_credential_is_used(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    cache = cache_on(redis_server, clock, **NAMED)
    cache.put("wx:ticket", lasting(clock, "mine", 100))
    redis_server.run("SET", "wx:ticket", "theirs", "EX", 200)
    assert value_of(cache.get("wx:ticket")) == "theirs"


def test_the_tickets_marker_protects_no_token(redis_server: RedisServer, clock: MovedClock) -> None:
    cache = cache_on(redis_server, clock)
    cache.put(KEY, lasting(clock, "t", 7100, fresh_for=600))
    redis_server.run("SET", OTHER_KEY, "theirs", "EX", 50)
    cache.put(OTHER_KEY, lasting(clock, "mine", 100))
    assert redis_server.run("GET", OTHER_KEY) == "mine"


def test_an_unreachable_redis_is_left_alone_for_a_while(
    own_redis: RedisServer, clock: MovedClock
) -> None:
    cache = cache_on(own_redis, clock)
    own_redis.kill()
    assert cache.get(KEY) is None
    own_redis.start()
    own_redis.run("SET", KEY, "t", "EX", 100)
    clock.advance(REDIS_PAUSE - 0.1)
    assert cache.get(KEY) is None
    clock.advance(0.1)
    assert value_of(cache.get(KEY)) == "t"


def test_a_full_redis_is_read_and_warned_of_without_showing_the_credential(
    own_redis: RedisServer, clock: MovedClock, caplog: pytest.LogCaptureFixture
) -> None:
    own_redis.run("SET", OTHER_KEY, "t", "EX", 100)
    own_redis.run("CONFIG", "SET", "maxmemory", "1")
    cache = cache_on(own_redis, clock)
    cache.put(KEY, lasting(clock, "s3cr3t", 100))
    assert value_of(cache.get(KEY)) == "s3cr3t"
    assert value_of(cache.get(OTHER_KEY)) == "t"
    assert "writing to Redis" in caplog.text
    assert "command not allowed when used memory" in caplog.text
    assert "s3cr3t" not in caplog.text
    assert cache.state == "failing"
    own_redis.run("CONFIG", "SET", "maxmemory", "0")
    cache.sync(KEY)
    assert own_redis.run("GET", KEY) == "s3cr3t"
    assert "writing to Redis works again" in caplog.text


def test_what_was_replaced_does_not_come_back_whoever_writes_it(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    redis_server.run("SET", KEY, "dead", "EX", 7000)
    cache = cache_on(redis_server, clock)
    cache.get(KEY)
    cache.put(KEY, lasting(clock, "new", 100, fresh_for=50))
    for _ in range(3):
        redis_server.run("SET", KEY, "dead")
        assert value_of(cache.get(KEY)) == "new"
        cache.sync(KEY)
        assert redis_server.run("GET", KEY) == "new"


def test_who_has_nothing_to_write_notices_that_redis_can_be_written_again(
    own_redis: RedisServer, clock: MovedClock
) -> None:
    cache = cache_on(own_redis, clock)
    own_redis.run("CONFIG", "SET", "maxmemory", "1")
    with cache.lock(wait=0):
        pass
    cache.sync(KEY)
    assert cache.state == "failing"
    own_redis.run("CONFIG", "SET", "maxmemory", "0")
    cache.sync(KEY)
    assert cache.state == "redis"


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_refused_credential_that_redis_does_not_let_go_counts_as_absent(
    own_redis: RedisServer, clock: MovedClock, trouble: str
) -> None:
    cache = cache_on(own_redis, clock)
    cache.put(KEY, lasting(clock, "refused", 100))
    if trouble == "full":
        own_redis.run("CONFIG", "SET", "maxmemory", "1")
    else:
        own_redis.run("REPLICAOF", "127.0.0.1", own_redis.port)
    cache.drop(KEY, "refused")
    assert cache.get(KEY) is None
    cache.put(KEY, lasting(clock, "new", 100))
    assert value_of(cache.get(KEY)) == "new"


def test_what_wechat_grants_again_is_not_refused_any_longer(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    cache = cache_on(redis_server, clock)
    cache.put(KEY, lasting(clock, "t", 100))
    cache.drop(KEY, "t")
    cache.put(KEY, lasting(clock, "t", 100))
    assert value_of(cache.get(KEY)) == "t"
    redis_server.run("DEL", KEY)
    cache.sync(KEY)
    assert not redis_server.run("EXISTS", KEY)  # it was taken for what Redis has


def test_without_scripts_it_is_shared_all_the_same_and_the_log_says_once_what_is_lost(
    clock: MovedClock, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer("--rename-command", "EVAL", "OTHER")
    try:
        one, other = cache_on(server, clock), cache_on(server, clock)
        for _ in range(2):
            with one.lock(wait=0) as mine, other.lock(wait=0) as free:
                assert mine
                assert not free
                one.extend_lock()
                one.put(KEY, lasting(clock, "s3cr3t", 100, fresh_for=50))
        assert value_of(other.get(KEY)) == value_of(one.get(KEY)) == "s3cr3t"
        other.put(KEY, lasting(clock, "late", 200))
        assert value_of(one.get(KEY)) == "s3cr3t"
        one.drop(KEY, "s3cr3t")
        assert server.run("KEYS", "*") == [CHECKED_KEY]
        assert one.state == "redis"
    finally:
        server.stop()
    assert caplog.text.count("WARNING") == 1
    assert "unknown command" in caplog.text
    assert "without scripts" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_a_wrong_password_is_warned_of_without_showing_it(
    clock: MovedClock, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer("--requirepass", "right")
    try:
        assert cache_on(server, clock, password="wr0ng").get(KEY) is None
        assert "invalid username-password pair" in caplog.text
        assert "wr0ng" not in caplog.text
        good = cache_on(server, clock, password="right")
        good.put(KEY, lasting(clock, "t", 100))
        assert good.get(KEY) is not None
        assert good.state == "redis"
    finally:
        server.stop()


def test_one_instance_at_a_time_holds_the_lock(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    one, other = cache_on(redis_server, clock), cache_on(redis_server, clock)
    with one.lock(wait=0):
        assert 12 < redis_server.run("TTL", LOCK_KEY) <= 13
        for wait in (0, 0.1):
            with other.lock(wait=wait) as free:
                assert not free
            assert redis_server.run("EXISTS", LOCK_KEY)
    with other.lock(wait=0) as free:
        assert free
        assert redis_server.run("EXISTS", LOCK_KEY)
    assert not redis_server.run("EXISTS", LOCK_KEY)


def test_the_lock_is_released_when_something_goes_wrong(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    with pytest.raises(ValueError, match="wrong"), cache_on(redis_server, clock).lock(wait=0):
        raise ValueError("wrong")
    assert not redis_server.run("EXISTS", LOCK_KEY)


def test_a_lock_that_is_extended_holds_for_a_full_lease(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    cache = cache_on(redis_server, clock)
    with cache.lock(wait=0):
        redis_server.run("EXPIRE", LOCK_KEY, 5)
        cache.extend_lock()
        assert 12 < redis_server.run("TTL", LOCK_KEY) <= 13


def test_whoever_lost_the_lock_neither_overwrites_nor_releases(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    slow, other = cache_on(redis_server, clock), cache_on(redis_server, clock)
    with slow.lock(wait=0):
        redis_server.run("DEL", LOCK_KEY)  # the lease is over
        with other.lock(wait=0):
            with pytest.raises(LockedElsewhere):
                slow.extend_lock()
            other.put(KEY, lasting(clock, "newer", 50, fresh_for=50))
            slow.put(KEY, lasting(clock, "older", 100, fresh_for=100))
            assert redis_server.run("GET", KEY) == "newer"
    with other.lock(wait=0), slow.lock(wait=0) as free:
        assert not free
    assert value_of(slow.get(KEY)) == "newer"


def test_a_lock_whose_answer_was_lost_is_ended_all_the_same(
    own_redis: RedisServer, clock: MovedClock
) -> None:
    cache, other = cache_on(own_redis, clock), cache_on(own_redis, clock)
    cache.get(KEY)  # so that only the lock's own command is lost
    own_redis.pause()
    with cache.lock(wait=0) as mine:
        assert mine  # nobody can be asked
        cache.extend_lock()
    own_redis.resume()
    eventually("Redis did it after all", lambda: own_redis.run("EXISTS", LOCK_KEY))
    clock.advance(REDIS_PAUSE)
    cache.release_lock()
    with other.lock(wait=0) as free:
        assert free


def test_a_lock_that_was_got_without_knowing_it_is_ones_own(
    own_redis: RedisServer, clock: MovedClock
) -> None:
    cache = cache_on(own_redis, clock)
    cache.get(KEY)
    own_redis.pause()
    with cache.lock(wait=0):
        pass
    own_redis.resume()
    eventually("Redis did it after all", lambda: own_redis.run("EXISTS", LOCK_KEY))
    clock.advance(REDIS_PAUSE)
    with cache.lock(wait=0) as mine:
        assert mine
    assert not own_redis.run("EXISTS", LOCK_KEY)


def test_whoever_lost_the_lock_does_not_end_anothers(
    redis_server: RedisServer, clock: MovedClock
) -> None:
    with cache_on(redis_server, clock).lock(wait=0):
        redis_server.run("SET", LOCK_KEY, "another's", "EX", 100)
    assert redis_server.run("GET", LOCK_KEY) == "another's"


def test_a_redis_that_hangs_is_given_up_after_a_second(
    own_redis: RedisServer, clock: MovedClock
) -> None:
    cache = cache_on(own_redis, clock)
    cache.put(KEY, lasting(clock, "t", 100))
    own_redis.pause()
    assert value_of(cache.get(KEY)) == "t"
    assert cache.state == "unreachable"
    own_redis.resume()

    def back() -> bool:
        clock.advance(REDIS_PAUSE)
        return cache.get(KEY) is not None and cache.state == "redis"

    eventually("Redis is back", back)
