from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from harness import RedisServer, eventually

from wechat_sign import cache as cache_module
from wechat_sign.cache import UNDATED_LIFE, Cached, MemoryCache, RedisCache
from wechat_sign.settings import RedisSettings

KEY = "wechat:wx1:jsapi_ticket"
LOCK = "wechat:wx1:lock"


def cache_on(server: RedisServer, *, lease: float = 10, **more: Any) -> RedisCache:
    settings = RedisSettings(host="127.0.0.1", port=server.port)
    return RedisCache(replace(settings, **more), lock_key=LOCK, lease=lease)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cache_module, "REDIS_PAUSE", 0.0)


def test_memory_keeps_for_the_time_given() -> None:
    cache = MemoryCache()
    assert cache.get(KEY) is None
    cache.put(KEY, Cached.lasting("t", 100))
    assert cache.get(KEY) == cache._entries[KEY]
    cache.put(KEY, Cached.lasting("t", 0))
    assert cache.get(KEY) is None


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_only_the_credential_that_was_refused_is_dropped(
    redis_server: RedisServer, kind: str
) -> None:
    cache = MemoryCache() if kind == "memory" else cache_on(redis_server)
    cache.put(KEY, Cached.lasting("new", 100))
    cache.drop(KEY, "old")
    kept = cache.get(KEY)
    assert kept is not None
    assert kept.value == "new"
    cache.drop(KEY, "new")
    cache.drop(KEY, "new")
    assert cache.get(KEY) is None


def test_redis_holds_a_plain_string_with_an_expiry(redis_server: RedisServer) -> None:
    cache_on(redis_server).put(KEY, Cached.lasting("t1cket", 7100))
    assert redis_server.run("GET", KEY) == "t1cket"
    assert 7_099_000 < redis_server.run("PTTL", KEY) <= 7_100_000


def test_another_instance_reads_value_and_remaining_life(redis_server: RedisServer) -> None:
    redis_server.run("SET", KEY, "t", "EX", 100)
    found = cache_on(redis_server).get(KEY)
    assert found is not None
    assert (found.value, found.dated) == ("t", True)
    assert 99 < found.remaining() <= 100


@pytest.mark.parametrize("command", [("SET", KEY, "t"), ("SET", KEY, "t", "EX", 99999)])
def test_a_life_that_is_not_wechats_is_no_age(
    redis_server: RedisServer, command: tuple[str, ...]
) -> None:
    redis_server.run(*command)
    found = cache_on(redis_server).get(KEY)
    assert found is not None
    assert not found.dated
    assert found.remaining() <= UNDATED_LIFE


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
    redis_server: RedisServer, command: tuple[str, ...]
) -> None:
    redis_server.run(*command)
    cache = cache_on(redis_server)
    assert cache.get(KEY) is None
    cache.put(KEY, Cached.lasting("t", 100))
    assert redis_server.run("GET", KEY) == "t"


def test_a_redis_that_lost_everything_gets_it_back_marked_as_old(
    redis_server: RedisServer,
) -> None:
    cache = cache_on(redis_server)
    cache.put(KEY, Cached.lasting("t", 7100))
    cache.put("other:key", Cached.lasting("o", 50))
    redis_server.run("FLUSHALL")
    found = cache.get(KEY)
    assert found is not None
    assert found.value == redis_server.run("GET", KEY) == "t"
    assert redis_server.run("GET", "other:key") == "o"
    assert 48 < redis_server.run("TTL", "other:key") <= 50
    assert 6490 < redis_server.run("TTL", KEY) <= 6500


def test_what_came_back_does_not_overwrite_what_another_wrote(redis_server: RedisServer) -> None:
    cache = cache_on(redis_server)
    cache.put(KEY, Cached.lasting("mine", 7100))
    redis_server.run("SET", KEY, "theirs", "EX", 50)
    found = cache.get(KEY)
    assert found is not None
    assert found.value == redis_server.run("GET", KEY) == "theirs"


@pytest.mark.parametrize(("theirs", "stays"), [(50, False), (200, True)])
def test_of_two_that_put_back_at_once_the_longer_life_wins(
    redis_server: RedisServer, theirs: int, stays: bool
) -> None:
    """The other wrote between this one's look, which found nothing, and its putting back."""
    redis_server.run("SET", KEY, "theirs", "EX", theirs)
    cache_on(redis_server)._save(KEY, Cached.lasting("mine", 100), only_if_longer=True)
    assert redis_server.run("GET", KEY) == ("theirs" if stays else "mine")


def test_with_redis_down_the_process_remembers_and_redis_gets_it_later(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_on(own_redis)
    assert cache.get(KEY) is None
    assert cache.state == "redis"
    own_redis.kill()
    assert cache.acquire(wait=0)
    cache.put(KEY, Cached.lasting("t", 7100))
    cache.release()
    for _ in range(3):
        found = cache.get(KEY)
        assert found is not None
        assert found.value == "t"
    assert cache.state == "unreachable"
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "Connection refused" in warnings[0].getMessage()

    own_redis.start()
    assert cache.get(KEY) is not None
    assert own_redis.run("GET", KEY) == "t"
    assert 7000 < own_redis.run("TTL", KEY) <= 7100
    assert cache.state == "redis"


def test_what_could_not_be_saved_gives_way_to_what_is_newer(own_redis: RedisServer) -> None:
    cache = cache_on(own_redis)
    own_redis.kill()
    cache.put(KEY, Cached.lasting("mine", 100))
    own_redis.start()
    own_redis.run("SET", KEY, "theirs", "EX", 200)
    found = cache.get(KEY)
    assert found is not None
    assert found.value == own_redis.run("GET", KEY) == "theirs"


def test_an_unreachable_redis_is_left_alone_for_a_while(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "REDIS_PAUSE", 60.0)
    cache = cache_on(own_redis)
    own_redis.kill()
    assert cache.get(KEY) is None
    own_redis.start()
    own_redis.run("SET", KEY, "t", "EX", 100)
    assert cache.get(KEY) is None


def test_a_full_redis_is_read_and_warned_of_without_showing_the_credential(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    own_redis.run("SET", "other:key", "t", "EX", 100)
    own_redis.run("CONFIG", "SET", "maxmemory", "1")
    cache = cache_on(own_redis)
    cache.put(KEY, Cached.lasting("s3cr3t", 100))
    found = cache.get(KEY)
    assert found is not None
    assert found.value == "s3cr3t"
    other = cache.get("other:key")
    assert other is not None
    assert other.value == "t"
    assert "writing to Redis" in caplog.text
    assert "OutOfMemoryError" in caplog.text
    assert "s3cr3t" not in caplog.text
    assert cache.state == "redis"
    own_redis.run("CONFIG", "SET", "maxmemory", "0")
    cache.get(KEY)
    assert own_redis.run("GET", KEY) == "s3cr3t"
    assert "writing to Redis works again" in caplog.text


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_refused_credential_that_redis_does_not_let_go_counts_as_absent(
    own_redis: RedisServer, trouble: str
) -> None:
    cache = cache_on(own_redis)
    cache.put(KEY, Cached.lasting("refused", 100))
    if trouble == "full":
        own_redis.run("CONFIG", "SET", "maxmemory", "1")
    else:
        own_redis.run("REPLICAOF", "127.0.0.1", own_redis.port)
    cache.drop(KEY, "refused")
    assert cache.get(KEY) is None
    cache.put(KEY, Cached.lasting("new", 100))
    found = cache.get(KEY)
    assert found is not None
    assert found.value == "new"


def test_a_command_that_redis_does_not_know_is_not_repeated_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = RedisServer("--rename-command", "SET", "OTHER")
    try:
        cache_on(server).put(KEY, Cached.lasting("s3cr3t", 100))
    finally:
        server.stop()
    assert "unknown command" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_a_wrong_password_is_warned_of_without_showing_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = RedisServer("--requirepass", "right")
    try:
        assert cache_on(server, password="wr0ng").get(KEY) is None
        assert "invalid username-password pair" in caplog.text
        assert "wr0ng" not in caplog.text
        good = cache_on(server, password="right")
        good.put(KEY, Cached.lasting("t", 100))
        assert good.get(KEY) is not None
        assert good.state == "redis"
    finally:
        server.stop()


def test_one_instance_at_a_time_has_its_turn(redis_server: RedisServer) -> None:
    one, other = cache_on(redis_server), cache_on(redis_server)
    assert one.acquire(wait=0)
    assert not other.acquire(wait=0)
    assert not other.acquire(wait=0.1)
    one.release()
    assert other.acquire(wait=0)


def test_a_turn_that_was_not_renewed_in_time_is_over(redis_server: RedisServer) -> None:
    slow, other = cache_on(redis_server, lease=0.1), cache_on(redis_server)
    assert slow.acquire(wait=0)
    assert slow.renew()
    assert other.acquire(wait=5)
    assert not slow.renew()


def test_whoever_lost_its_turn_neither_overwrites_nor_ends_the_others(
    redis_server: RedisServer,
) -> None:
    slow, other = cache_on(redis_server, lease=0.1), cache_on(redis_server)
    assert slow.acquire(wait=0)
    assert other.acquire(wait=5)
    other.put(KEY, Cached.lasting("newer", 50))
    slow.put(KEY, Cached.lasting("older", 100))
    assert redis_server.run("GET", KEY) == "newer"
    slow.release()
    assert other.renew()
    found = slow.get(KEY)
    assert found is not None
    assert found.value == "newer"


def test_a_redis_that_hangs_is_given_up_after_a_second(own_redis: RedisServer) -> None:
    cache = cache_on(own_redis)
    cache.put(KEY, Cached.lasting("t", 100))
    own_redis.pause()
    found = cache.get(KEY)
    assert found is not None
    assert cache.state == "unreachable"
    own_redis.resume()
    eventually("Redis is back", lambda: cache.get(KEY) and cache.state == "redis")
