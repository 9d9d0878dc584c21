"""The life of a ticket, on a real Redis and the sandbox, with a clock that the test moves.

Redis has its own clock: what is over there is deleted here, as Redis would.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from harness import (
    CHECKED_KEY,
    DUE,
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

from wechat_sign.errors import SigningError, WeChatRefused, WeChatUnreachable
from wechat_sign.renewal import Known
from wechat_sign.settings import Limits

NAMED: dict[str, Any] = {"access_token_key": "wx:token", "jsapi_ticket_key": "wx:ticket"}


def refused(one: Instance) -> None:
    with pytest.raises(WeChatRefused):
        one.look()


@contextmanager
def waiting(
    one: Instance, wechat: Sandbox, endpoint: str, body: bytes | None = None, errcode: int = 0
) -> Iterator[Future[str]]:
    """Within it, a look of the instance waits for WeChat, which then answers this or the truth."""
    hold = threading.Event()
    wechat.faults[endpoint] = Fault(hold=hold, body=body, errcode=errcode)
    with ThreadPoolExecutor(1) as thread:
        look = thread.submit(one.look)
        try:
            eventually(f"{endpoint} is called", lambda: wechat.calls[endpoint])
            yield look
        finally:
            hold.set()


def shares_of(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, count: int
) -> list[Instance]:
    """Instances on one Redis that have looked twice."""
    instances = [instance_for(wechat, redis_server, clock=clock) for _ in range(count)]
    for one in instances:
        one.looks(2)
    return instances


# Granted, kept, and shared.


def test_two_accounts_under_the_same_named_keys_neither_mix_nor_fight(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    """As after a change of the appid, too."""
    accounts = [wechat, Sandbox(appid="wxother").start()]
    instances = [instance_for(account, redis_server, **NAMED) for account in accounts]
    for _ in range(10):
        for one, account in zip(instances, accounts, strict=True):
            assert one.look() == account.ticket
    redis_server.run("DEL", "wechat:wxother:checked")  # asked again, by its own token
    assert instances[1].looks(2) == accounts[1].ticket
    assert accounts[1].calls == {"token": 1, "getticket": 2}
    assert instance_for(wechat, redis_server, **NAMED).look() == wechat.ticket
    assert wechat.calls == {"token": 2, "getticket": 2}  # neither of them by the other's token
    accounts[1].stop()


def test_four_instances_keep_one_ticket_by_six_commands_a_look(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    shares = shares_of(wechat, redis_server, clock, 4)
    with redis_server.watching() as sent:
        sent()
        assert {one.look() for one in 50 * shares} == {wechat.ticket}
        assert len(sent()) == 50 * 4 * 6
    assert wechat.calls == {"token": 1, "getticket": 1}


@pytest.mark.parametrize(
    ("expires_in", "kept"),
    [(7200, 7100), (9999, 7100), (3000, 2900), (345, 245), (190, 95), (60, 30)],
)
def test_a_ticket_is_kept_for_less_than_wechat_grants_and_used_no_longer(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, expires_in: int, kept: float
) -> None:
    wechat.faults["getticket"] = Fault(body=b'{"ticket": "t", "expires_in": %d}' % expires_in)
    one = instance_for(wechat, redis_server, clock=clock, expire=7200)
    assert one.looks(4) == "t"
    assert kept - 2 <= redis_server.run("PTTL", TICKET_KEY) / 1000 <= kept
    assert one.ticket.usable_until == clock.now + min(expires_in, 7200)
    clock.advance(expires_in / 10)  # more than Redis, which has a clock of its own, counts
    other = instance_for(wechat, redis_server, clock=clock)
    assert other.look() == "t"
    assert other.ticket.usable_until <= clock.now + expires_in
    assert wechat.calls["getticket"] == 1


@pytest.mark.parametrize("endpoint", ["token", "getticket"])
def test_how_long_an_answer_took_is_no_life_of_it(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, endpoint: str
) -> None:
    with waiting(instance_for(wechat, redis_server, clock=clock), wechat, endpoint):
        clock.advance(4)
    late = {"token": TOKEN_KEY, "getticket": TICKET_KEY}[endpoint]
    assert 7090 < redis_server.run("TTL", late) <= 7096


# Fresh, or due.


@pytest.mark.parametrize("recheck", [600, 0])
def test_a_ticket_whose_marker_is_over_is_asked_for_again(
    wechat: Sandbox, redis_server: RedisServer, recheck: int
) -> None:
    one = instance_for(wechat, redis_server, recheck=recheck)
    old = one.look()
    assert redis_server.run("TTL", CHECKED_KEY) > (590 if recheck else 7000)
    wechat.rotate_ticket()
    assert one.look() == old
    redis_server.run("EXPIRE", TICKET_KEY, 100)
    redis_server.run(*DUE)
    assert one.look() == wechat.ticket != old
    assert wechat.calls == {"token": 1, "getticket": 2}
    assert redis_server.run("TTL", TICKET_KEY) > 7000
    beyond = 6_600_000 if recheck else 100_000
    assert redis_server.run("GET", CHECKED_KEY) == marker(wechat.ticket, beyond=beyond)


@pytest.mark.parametrize("life", [0, 100, 99999])
@pytest.mark.parametrize("named", [None, "another ticket"])
def test_another_programs_ticket_serves_and_then_wechat_is_asked(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, life: int, named: str | None
) -> None:
    """Where its life is none of WeChat's, it has a minute."""
    redis_server.put_ticket("theirs", life)
    if named:
        redis_server.run("SET", CHECKED_KEY, marker(named), "EX", 600)
    one = instance_for(wechat, redis_server, clock=clock)
    assert one.look() == "theirs"
    lives = (100 if life == 100 else 60) + clock.now
    assert lives - 1 < one.ticket.expires == one.ticket.usable_until <= lives
    assert not wechat.calls
    assert one.look() == redis_server.run("GET", TICKET_KEY) == wechat.ticket
    assert 7000 < redis_server.run("TTL", TICKET_KEY) <= 7100


def test_a_marker_that_lasts_longer_than_recheck_tells_not_when_wechat_was_asked(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    instance_for(wechat, redis_server, clock=clock, recheck=0).look()
    wechat.rotate_ticket()
    often = instance_for(wechat, redis_server, clock=clock, recheck=60)
    assert often.looks(2) == wechat.ticket


# What is held is not given up for less.


@pytest.mark.parametrize("checked", [True, False])
def test_a_redis_that_went_back_to_an_older_ticket_makes_the_one_held_due_and_no_more(
    wechat: Sandbox, redis_server: RedisServer, checked: bool
) -> None:
    instances = [instance_for(wechat, redis_server) for _ in range(4)]
    assert {one.look() for one in instances} == {wechat.ticket}
    held = instances[0].ticket
    redis_server.put_ticket("older", 5000, checked=checked)
    wechat.faults = dict.fromkeys(("token", "getticket"), Fault(errcode=-1))
    assert {one.look() for one in instances} == {wechat.ticket}
    wechat.faults.clear()
    fresh = instance_for(wechat, redis_server, held=held)  # it has not backed off
    assert fresh.look() == redis_server.run("GET", TICKET_KEY) == wechat.ticket
    calls = wechat.calls.copy()
    assert {one.look() for one in instances} == {wechat.ticket}
    assert wechat.calls == calls


def test_a_redis_that_takes_nothing_does_not_bring_a_dead_ticket_back(
    wechat: Sandbox, own_redis: RedisServer
) -> None:
    """It lasts longer than the one that WeChat just granted, and was not confirmed."""
    own_redis.put_ticket("dead", 7200)
    own_redis.run(*unwritable(own_redis)["read-only"][0])
    one = instance_for(wechat, own_redis)
    one.look()
    for _ in range(5):
        assert one.look() == wechat.ticket
    assert wechat.calls == {"token": 1, "getticket": 1}


def test_another_programs_newer_ticket_serves_before_wechat_is_asked_and_is_not_overwritten(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    """Though its marker is over as well, and WeChat hangs."""
    one = instance_for(wechat, redis_server, clock=clock)
    one.look()
    clock.advance(601)
    redis_server.run(*DUE)
    redis_server.put_ticket("newer", 7200)
    wechat.calls.clear()
    wechat.faults["getticket"] = Fault(errcode=-1)
    assert one.look() == "newer"
    assert not wechat.calls
    assert one.look() == "newer"
    assert wechat.calls == {"getticket": 1}
    for life in (0, 5000):
        redis_server.put_ticket("newest", life)
        for _ in range(3):
            clock.advance(60)
            one.look()
        assert redis_server.run("GET", TICKET_KEY) == "newest"


def test_a_ticket_that_came_while_wechat_failed_serves(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    one = instance_for(wechat, redis_server)
    with waiting(one, wechat, "token", errcode=-1) as look:
        redis_server.put_ticket("theirs", 44)
    assert look.result() == "theirs"
    assert isinstance(one.known.error, WeChatRefused)


# Refused, and backing off.


@pytest.mark.parametrize(
    ("error", "pauses"),
    [
        (WeChatUnreachable("down", endpoint="token"), [1, 2, 4, 8, 16, 32, 60, 60]),
        (WeChatRefused(-1, "", endpoint="token"), [1, 2, 4, 8, 16, 32, 60, 60]),
        (WeChatRefused(40001, "", endpoint="getticket"), [*(2**n for n in range(10)), 600, 600]),
        (WeChatRefused(40125, "", endpoint="token"), [60, 120, 240, 480, 600, 600]),
    ],
)
def test_the_pause_after_a_failure_doubles_up_to_its_end(
    error: SigningError, pauses: list[float]
) -> None:
    """So that a day of refusals does not use up a test account's 2000 tokens."""
    known, now = Known(), 0.0
    for pause in pauses:
        known = known.failed(error, now)
        now += pause
        assert (known.pause, known.quiet_until, known.error) == (pause, now, error)
    assert known.succeeded(now).failed(error, now).pause == pauses[0]


def test_while_it_backs_off_a_ticket_that_another_instance_got_is_used(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    one = instance_for(wechat, redis_server)
    refused(one)
    redis_server.put_ticket("theirs", 7100, checked=True)
    assert one.look() == "theirs"
    assert one.known.error is None


BROKEN = {
    "down": Fault(hang_up=True),
    "hanging": Fault(delay=1.5),
    "HTTP 502": Fault(status=502, body=b"<html>"),
    "empty": Fault(body=b'{"errcode": 0, "ticket": "", "access_token": "", "expires_in": 7200}'),
    "busy": Fault(errcode=-1),
    "whitelist": Fault(errcode=40164),
}


@pytest.mark.parametrize("endpoint", ["token", "getticket"])
@pytest.mark.parametrize("name", BROKEN)
def test_wechat_in_any_trouble_is_asked_once_a_pause_and_recovered_from(
    wechat: Sandbox,
    redis_server: RedisServer,
    clock: MovedClock,
    caplog: pytest.LogCaptureFixture,
    name: str,
    endpoint: str,
) -> None:
    one = instance_for(wechat, redis_server, clock=clock, timeout=0.2 if name == "hanging" else 5)
    wechat.faults[endpoint] = BROKEN[name]
    for _ in range(10):
        with pytest.raises(SigningError):
            one.look()
    assert wechat.calls == {"token": 1} | ({"getticket": 1} if endpoint == "getticket" else {})
    assert caplog.text.count("no page can be signed") == 1
    assert not redis_server.run("EXISTS", TICKET_KEY, CHECKED_KEY, LOCK_KEY)
    del wechat.faults[endpoint]
    clock.advance(one.pause)
    ticket = one.look()
    assert ticket == wechat.ticket

    wechat.faults[endpoint] = BROKEN[name]
    redis_server.run(*DUE)
    if endpoint == "token":
        wechat.replace_token()
    assert one.looks(10) == ticket
    assert caplog.text.count("the ticket in hand serves on") == 1


# The access_token.


@pytest.mark.parametrize("older", [0, 1])
@pytest.mark.parametrize("errcode", [40001, 40014, 42001])
def test_a_token_that_is_refused_is_never_used_again(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, errcode: int, older: int
) -> None:
    wechat.faults["getticket"] = Fault(errcode=errcode)
    if older:
        redis_server.run("SET", TOKEN_KEY, "older", "EX", 7000)
    one = instance_for(wechat, redis_server, clock=clock)
    for turn in (1, 2):
        with redis_server.watching() as sent:
            for _ in range(10):
                refused(one)
            deleted = sum(command.startswith(f"DEL {TOKEN_KEY}") for command in sent())
        assert deleted == 1 + (older and turn == 1)
        assert wechat.calls == {"token": turn, "getticket": turn + older}
        assert not redis_server.run("EXISTS", TOKEN_KEY)
        clock.advance(one.pause)


def test_a_token_that_was_dropped_does_not_come_back_from_anothers_memory(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    _, other = shares_of(wechat, redis_server, clock, 2)
    redis_server.run("DEL", TOKEN_KEY)  # the first one dropped it
    other.looks(3)
    assert not redis_server.run("EXISTS", TOKEN_KEY)
    redis_server.run(*DUE)
    other.look()
    assert redis_server.run("GET", TOKEN_KEY)
    assert wechat.calls == {"token": 2, "getticket": 2}


@pytest.mark.parametrize("fetched", [True, False])
def test_a_token_that_is_refused_gives_way_to_another_that_redis_has_by_then(
    wechat: Sandbox, redis_server: RedisServer, fetched: bool
) -> None:
    """Fetched in this look as well: Redis may have been emptied meanwhile, lock and all."""
    if not fetched:
        redis_server.run("SET", TOKEN_KEY, "refused", "EX", 7000)
    with waiting(instance_for(wechat, redis_server), wechat, "getticket") as look:
        theirs = wechat.token_of_another_program()
        redis_server.run("SET", TOKEN_KEY, theirs, "EX", 7000)
    assert look.result() == wechat.ticket
    assert redis_server.run("GET", TOKEN_KEY) == theirs
    assert (wechat.calls["token"], wechat.calls["getticket"]) == (int(fetched), 2)


def test_a_second_errcode_minus_1000_in_a_row_has_a_new_token_fetched_once(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    """WeChat answers it for a dead token, too: w7corp/easywechat#1780."""
    wechat.faults["getticket"] = Fault(errcode=-1000)
    one = instance_for(wechat, redis_server, clock=clock)
    calls = []
    for _ in range(5):
        refused(one)
        calls.append((wechat.calls["token"], wechat.calls["getticket"]))
        clock.advance(one.pause)
    assert calls == [(1, 1), (2, 3), (2, 4), (2, 5), (2, 6)]


# The lock.


def test_a_ticket_that_is_due_is_not_waited_for_while_another_instance_asks(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    redis_server.put_ticket("old", 100)
    redis_server.run("SET", LOCK_KEY, "another", "EX", 100)
    one = instance_for(wechat, redis_server)
    one.look()
    with redis_server.watching() as sent:
        assert one.look() == "old"
        assert sum(LOCK_KEY in command for command in sent() if "SET" in command) == 1
    assert not wechat.calls


@pytest.mark.parametrize("puts_back", [False, True])
def test_a_ticket_that_comes_between_a_look_and_its_write_is_not_asked_for_again_nor_overwritten(
    wechat: Sandbox, own_redis: RedisServer, puts_back: bool
) -> None:
    """The write is the lock's, or what puts back the ticket that Redis lost."""

    def waiting_writes() -> int:
        return sum("b" in one["flags"] for one in own_redis.run("CLIENT LIST"))

    one = instance_for(wechat, own_redis, limits=Limits(redis_timeout=5))
    if puts_back:
        one.look()
        own_redis.run("FLUSHALL")
    calls = wechat.calls.copy()
    own_redis.run("CLIENT", "PAUSE", 60_000, "WRITE")
    with ThreadPoolExecutor(2) as threads:
        threads.submit(own_redis.put_ticket, "theirs", 7100)
        eventually("another instance writes its ticket", lambda: waiting_writes() == 1)
        look = threads.submit(one.look)
        eventually("the look writes, too", lambda: waiting_writes() == 2)
        own_redis.run("CLIENT", "UNPAUSE")
    assert look.result() == (wechat.ticket if puts_back else "theirs")
    assert own_redis.run("GET", TICKET_KEY) == "theirs"
    assert wechat.calls == calls


@pytest.mark.parametrize(
    ("endpoint", "redis_was_away"), [("getticket", False), ("getticket", True), ("token", False)]
)
def test_a_late_answer_never_replaces_a_newer_one(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock, endpoint: str, redis_was_away: bool
) -> None:
    """Nor does the instance that got it go on with it."""
    if redis_was_away:
        own_redis.kill()
    one = instance_for(wechat, own_redis, clock=clock)
    body = b'{"access_token": "late", "ticket": "late", "expires_in": 7200}'
    with waiting(one, wechat, endpoint, body) as look:
        if redis_was_away:
            own_redis.start()
        clock.advance(Limits().redis_pause if redis_was_away else 13)
        own_redis.run("DEL", LOCK_KEY)
        del wechat.faults[endpoint]
        newer = instance_for(wechat, own_redis, expire=3600).look()
        token = own_redis.run("GET", TOKEN_KEY)
    assert look.result() == newer
    assert own_redis.run("GET", TICKET_KEY) == newer == wechat.ticket
    assert own_redis.run("GET", TOKEN_KEY) == token
    assert wechat.calls["getticket"] == 2 + (endpoint == "token")


# Redis lost, spoilt, or away; then `token` makes the others' tokens void.


SPOILT: dict[str, list[Any]] = {
    TICKET_KEY: ["", "undefined", b"\xff\xfe\x00", '{"ticket": "t"}', "WithoutExpiry"],
    TOKEN_KEY: [b"\xff", "refused"],
    CHECKED_KEY: [b"\xff\xfe\x00"],
}


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("key", SPOILT)
def test_whatever_the_keys_hold_is_healed(
    wechat: Sandbox, redis_server: RedisServer, key: str, held: bool
) -> None:
    for command in (("HSET", key, "x", "y"), *(("SET", key, value) for value in SPOILT[key])):
        redis_server.run("FLUSHALL")
        one = instance_for(wechat, redis_server)
        if held:
            one.look()
        redis_server.run("DEL", key)
        redis_server.run(*command)
        assert one.looks(2) == wechat.ticket, command
        assert redis_server.run("GET", TICKET_KEY) == wechat.ticket, command
        assert redis_server.run("GET", CHECKED_KEY) == marker(wechat.ticket), command
        assert 7000 < redis_server.run("TTL", TICKET_KEY) <= 7100
        if not held:
            assert redis_server.run("GET", TOKEN_KEY) in wechat.issued
            assert 7000 < redis_server.run("TTL", TOKEN_KEY) <= 7100


def test_a_redis_that_lost_everything_has_it_again_at_the_next_look(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    one = instance_for(wechat, redis_server)
    ticket = one.look()
    wechat.faults = dict.fromkeys(("token", "getticket"), Fault(hang_up=True))
    redis_server.run("FLUSHALL")
    assert one.look() == redis_server.run("GET", TICKET_KEY) == ticket
    assert 590 < redis_server.run("TTL", CHECKED_KEY) <= 600
    assert instance_for(wechat, redis_server).look() == ticket
    assert wechat.calls == {"token": 1, "getticket": 1}


def test_while_redis_is_away_the_instances_go_on_with_the_token_that_they_share(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock
) -> None:
    shares = shares_of(wechat, own_redis, clock, 4)
    own_redis.kill()
    for _ in range(10):
        clock.advance(600)
        assert {one.look() for one in shares} == {wechat.ticket}
    assert wechat.calls == {"token": 1, "getticket": 1 + 10 * 4}


@pytest.mark.parametrize("count", [1, 4])
def test_while_redis_is_away_for_hours_a_ticket_that_died_is_replaced(
    wechat: Sandbox, clock: MovedClock, count: int
) -> None:
    """Whatever the token: WeChat lets both go after 7200 s, and says 7200 s of either again."""
    gone: dict[str, Any] = {"host": "127.0.0.1", "port": 1}
    instances = [instance_for(wechat, clock=clock, **gone) for _ in range(count)]
    for second in range(0, 20_000, 300):
        if second % 7200 == 6900:
            wechat.rotate_ticket()
            rotated = second
        tickets = {one.look() for one in instances}
        if second < 6900 or second - rotated > 2 * 600 + 700:
            assert tickets == {wechat.ticket}, second
        clock.advance(300)
