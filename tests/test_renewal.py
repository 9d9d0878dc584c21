"""The life of a ticket, on a real Redis and the sandbox, with a clock that the test moves.

Redis has its own clock: what is over there is deleted here, as Redis would.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from harness import (
    BACK_OFF_KEY,
    CHECKED_KEY,
    LOCK_KEY,
    TICKET_KEY,
    TOKEN_KEY,
    Fault,
    MovedClock,
    RedisServer,
    Sandbox,
    eventually,
    renewal_for,
    settings_for,
)

from wechat_sign.breaker import REDIS_PAUSE
from wechat_sign.cache import Cache
from wechat_sign.credentials import Credential, WeChat
from wechat_sign.errors import LockedElsewhere, SigningError, WeChatRefused, WeChatUnreachable
from wechat_sign.renewal import BackOff, Renewal
from wechat_sign.store import UNDATED_LIFE

EXPIRED = ("DEL", TICKET_KEY, CHECKED_KEY)
DUE = ("DEL", CHECKED_KEY)
"""What Redis does by itself when `expire`, or `recheck`, is over."""


def marker(value: str, *, beyond: int = 100_000) -> str:
    """The marker of a ticket that WeChat granted for so many ms beyond its TTL."""
    return f"{hashlib.sha1(value.encode()).hexdigest()} {beyond}"


def write(redis_server: RedisServer, value: str, life: int, *, checked: bool = False) -> None:
    """A ticket in Redis that WeChat did not just grant."""
    redis_server.run("SET", TICKET_KEY, value, "EX", life)
    if checked:
        redis_server.run("SET", CHECKED_KEY, marker(value), "EX", min(life, 600))


class Background:
    """Looks a ticket up in a thread of its own, as the server does."""

    def __init__(self, renewal: Renewal, held: Credential | None = None) -> None:
        self.ticket = ""
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._look_up, args=(renewal, held))
        self._thread.start()

    def _look_up(self, renewal: Renewal, held: Credential | None) -> None:
        try:
            self.ticket = renewal.look_up(held).value
        except SigningError as error:
            self.error = error

    def join(self) -> Background:
        self._thread.join(20)
        return self


def called(wechat: Sandbox, endpoint: str, times: int) -> None:
    eventually(f"{endpoint} is called", lambda: wechat.calls[endpoint] >= times)


NAMED: dict[str, Any] = {"access_token_key": "wx:token", "jsapi_ticket_key": "wx:ticket"}


def shares_of(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, count: int, **more: Any
) -> list[tuple[Renewal, Credential]]:
    """Instances on one Redis, each with the ticket that it holds after two looks."""
    instances = [renewal_for(wechat, redis_server, clock=clock, **more) for _ in range(count)]
    return [(one, one.look_up(one.look_up(None))) for one in instances]


# Granted, kept, and shared.


def test_a_ticket_of_another_account_under_the_same_named_key_is_not_signed_with(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    """As after a change of the appid, and where two accounts share the names."""
    other = Sandbox(appid="wxother").start()
    old = renewal_for(wechat, redis_server, **NAMED).look_up(None)
    renewal = renewal_for(other, redis_server, **NAMED)
    assert renewal.look_up(None).value == other.ticket
    redis_server.run("DEL", "wechat:wxother:checked")  # asked again, by whose token?
    held = renewal.look_up(None)
    assert renewal.look_up(held).value == other.ticket
    assert other.calls == {"token": 1, "getticket": 2}
    assert redis_server.run("GET", "wx:ticket") == other.ticket != old.value
    other.stop()


def test_two_accounts_under_the_same_named_keys_do_not_fight(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    accounts = [wechat, Sandbox(appid="wxother").start()]
    renewals = [renewal_for(account, redis_server, **NAMED) for account in accounts]
    held = [renewal.look_up(None) for renewal in renewals]
    for _ in range(10):
        held = [renewal.look_up(one) for renewal, one in zip(renewals, held, strict=True)]
        assert [one.value for one in held] == [account.ticket for account in accounts]
    assert [account.calls["token"] for account in accounts] == [1, 1]
    assert [account.calls["getticket"] for account in accounts] == [1, 1]
    accounts[1].stop()


def test_four_instances_keep_one_ticket_by_two_commands_a_look(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    shares = shares_of(wechat, redis_server, clock, 4)
    commands = redis_server.counting()
    for _ in range(50):
        for one, held in shares:
            assert one.look_up(held) == held
    assert commands() == 50 * 4 * 2
    assert wechat.calls == {"token": 1, "getticket": 1}


def test_an_evicting_redis_costs_no_call(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    shares = shares_of(wechat, redis_server, clock, 4)
    for turn in range(20):
        for one, held in shares:
            redis_server.run("DEL", *[(TICKET_KEY, TOKEN_KEY), (CHECKED_KEY, TICKET_KEY)][turn % 2])
            assert one.look_up(held).value == wechat.ticket
    assert wechat.calls == {"token": 1, "getticket": 1}


@pytest.mark.parametrize("same", [True, False])
def test_a_program_that_rewrites_the_key_without_a_life_costs_one_call_at_the_most(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, same: bool
) -> None:
    shares = shares_of(wechat, redis_server, clock, 3)
    for _ in range(10):
        redis_server.run("SET", TICKET_KEY, wechat.ticket if same else "dead")
        for one, held in shares:
            assert one.look_up(held).value == wechat.ticket
    assert wechat.calls["token"] == 1
    assert wechat.calls["getticket"] <= (1 if same else 2)


def test_a_ticket_is_fetched_once_and_shared(wechat: Sandbox, redis_server: RedisServer) -> None:
    assert renewal_for(wechat, redis_server).look_up(None).value == wechat.ticket
    assert renewal_for(wechat, redis_server).look_up(None).value == wechat.ticket
    assert wechat.calls == {"token": 1, "getticket": 1}
    for key in (TICKET_KEY, TOKEN_KEY):
        assert redis_server.run("TYPE", key) == "string"
        assert 7000 < redis_server.run("TTL", key) <= 7100
    assert redis_server.run("GET", TICKET_KEY) == wechat.ticket


def test_a_marker_beside_the_ticket_says_which_one_was_confirmed_lately(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    renewal_for(wechat, redis_server).look_up(None)
    assert redis_server.run("GET", CHECKED_KEY) == marker(wechat.ticket)
    assert 590 < redis_server.run("TTL", CHECKED_KEY) <= 600


@pytest.mark.parametrize(
    ("expires_in", "kept"),
    [(7200, 7100), (9999, 7100), (7199, 7099), (345, 245), (300, 200), (190, 95), (60, 30)],
)
@pytest.mark.parametrize("expire", [7100, 7200])
def test_a_credential_is_kept_for_less_than_wechat_grants(
    wechat: Sandbox, redis_server: RedisServer, expires_in: int, kept: float, expire: int
) -> None:
    wechat.faults["getticket"] = Fault(body=b'{"ticket": "t", "expires_in": %d}' % expires_in)
    renewal_for(wechat, redis_server, expire=expire).look_up(None)
    assert kept - 2 <= redis_server.run("PTTL", TICKET_KEY) / 1000 <= kept


@pytest.mark.parametrize("expires_in", [60, 150, 345, 3000, 7200])
@pytest.mark.parametrize("shared", [True, False])
def test_nobody_uses_a_ticket_for_longer_than_wechat_granted(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, expires_in: int, shared: bool
) -> None:
    wechat.faults["getticket"] = Fault(body=b'{"ticket": "t", "expires_in": %d}' % expires_in)
    cache = redis_server if shared else None
    fetched = renewal_for(wechat, cache, clock=clock).look_up(None)
    assert fetched.expires < fetched.usable_until <= clock.now + expires_in
    if shared:
        clock.advance(expires_in / 10)  # more than Redis, which has a clock of its own, counts
        read = renewal_for(wechat, redis_server, clock=clock).look_up(None)
        assert read.value == "t"
        assert read.usable_until <= clock.now + expires_in


def test_how_long_an_answer_took_is_no_life_of_the_ticket(
    wechat: Sandbox, clock: MovedClock
) -> None:
    hold = wechat.faults["getticket"] = Fault(hold=threading.Event())
    renewal = renewal_for(wechat, clock=clock)
    waiting = Background(renewal)
    called(wechat, "getticket", 1)
    clock.advance(4)
    assert hold.hold is not None
    hold.hold.set()
    waiting.join()
    assert renewal.look_up(None).expires == clock.now - 4 + 7100


# Fresh, or due.


@pytest.mark.parametrize("recheck", [600, 0])
def test_a_ticket_whose_marker_is_over_is_asked_for_again(
    wechat: Sandbox, redis_server: RedisServer, recheck: int
) -> None:
    renewal = renewal_for(wechat, redis_server, recheck=recheck)
    held = renewal.look_up(None)
    assert redis_server.run("TTL", CHECKED_KEY) > (590 if recheck else 7000)
    wechat.rotate_ticket()
    assert renewal.look_up(held).value == held.value
    assert wechat.calls == {"token": 1, "getticket": 1}
    redis_server.run("EXPIRE", TICKET_KEY, 100)
    redis_server.run(*DUE)
    assert renewal.look_up(held).value == wechat.ticket != held.value
    assert wechat.calls == {"token": 1, "getticket": 2}
    assert redis_server.run("TTL", TICKET_KEY) > 7000
    assert redis_server.run("GET", CHECKED_KEY) == marker(wechat.ticket)


@pytest.mark.parametrize("life", [(), ("EX", 100), ("EX", 99999)])
@pytest.mark.parametrize("named", [None, "another ticket"])
def test_another_programs_ticket_serves_and_then_wechat_is_asked(
    wechat: Sandbox, redis_server: RedisServer, life: tuple[Any, ...], named: str | None
) -> None:
    redis_server.run("SET", TICKET_KEY, "theirs", *life)
    if named:
        redis_server.run("SET", CHECKED_KEY, marker(named), "EX", 600)
    renewal = renewal_for(wechat, redis_server)
    held = renewal.look_up(None)
    assert held.value == "theirs"
    assert not wechat.calls
    assert renewal.look_up(held).value == wechat.ticket
    assert redis_server.run("GET", TICKET_KEY) == wechat.ticket
    assert 7000 < redis_server.run("TTL", TICKET_KEY) <= 7100


def test_a_marker_that_never_ends_confirms_nothing(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    renewal = renewal_for(wechat, redis_server)
    held = renewal.look_up(None)
    redis_server.run("PERSIST", CHECKED_KEY)
    renewal.look_up(held)
    assert wechat.calls["getticket"] == 2


def test_a_ticket_of_no_known_life_serves_while_it_is_seen(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    redis_server.run("SET", TICKET_KEY, "undated")
    held = renewal_for(wechat, redis_server, clock=clock).look_up(None)
    assert held.usable_until == clock.now + UNDATED_LIFE


def test_instances_may_differ_in_expire_and_recheck(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    instances = [
        renewal_for(wechat, redis_server, expire=expire, recheck=recheck)
        for expire, recheck in ((7100, 600), (3600, 600), (7100, 0), (1800, 60))
    ]
    for first in instances:
        redis_server.run("FLUSHALL")
        wechat.calls.clear()
        wechat.rotate_ticket()
        held = {first: renewal_for(wechat, redis_server).look_up(None)}
        for _ in range(3):
            held = {renewal: renewal.look_up(held.get(renewal)) for renewal in instances}
        assert {ticket.value for ticket in held.values()} == {wechat.ticket}
        # Another's longer recheck is not this one's: one more call, and all agree.
        assert wechat.calls["token"] == 1
        assert wechat.calls["getticket"] <= 2


def test_a_short_grant_is_not_asked_for_again_at_once(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["getticket"] = Fault(body=b'{"ticket": "t", "expires_in": 3000}')
    renewal = renewal_for(wechat, redis_server)
    held = renewal.look_up(None)
    for _ in range(3):
        held = renewal.look_up(held)
    assert wechat.calls["getticket"] == 1


# What is held is not given up for less.


@pytest.mark.parametrize("checked", [True, False])
def test_a_redis_that_went_back_to_an_older_ticket_makes_the_one_held_due_and_no_more(
    wechat: Sandbox, redis_server: RedisServer, checked: bool
) -> None:
    instances = [renewal_for(wechat, redis_server) for _ in range(4)]
    held = [renewal.look_up(None) for renewal in instances]
    write(redis_server, "older", 5000, checked=checked)
    wechat.faults = dict.fromkeys(("token", "getticket"), Fault(errcode=-1))
    for renewal, ticket in zip(instances, held, strict=True):
        assert renewal.look_up(ticket) == ticket
    wechat.faults.clear()
    fresh = renewal_for(wechat, redis_server)  # it has not backed off
    assert fresh.look_up(held[0]).value == wechat.ticket
    assert redis_server.run("GET", TICKET_KEY) == wechat.ticket
    calls = wechat.calls.copy()
    for renewal, ticket in zip(instances, held, strict=True):
        assert renewal.look_up(ticket).value == wechat.ticket
    assert wechat.calls == calls


def test_of_two_that_are_due_the_one_that_lasts_longer_serves(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    wechat.faults["token"] = Fault(errcode=-1)
    renewal = renewal_for(wechat, redis_server, clock=clock)
    for value, life, serves in (("held", 100, "held"), ("held", 20, "in-redis")):
        write(redis_server, "in-redis", 50)
        held = Credential(value, clock.now + life, clock.now + life)
        assert renewal.look_up(held).value == serves


def test_the_same_ticket_seen_again_lives_as_long_as_it_was_known_to(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    renewal = renewal_for(wechat, redis_server, clock=clock)
    held = renewal.look_up(None)
    redis_server.run("PEXPIRE", TICKET_KEY, 1000)
    assert renewal.look_up(held).usable_until == held.usable_until


@pytest.mark.parametrize("trouble", ["full", "read-only"])
@pytest.mark.parametrize("life", [7200, 7150])
def test_a_redis_that_takes_nothing_does_not_bring_a_dead_ticket_back(
    wechat: Sandbox, own_redis: RedisServer, trouble: str, life: int
) -> None:
    """It lasts longer than the one that WeChat just granted, and nobody confirmed it."""
    write(own_redis, "dead", life)
    if trouble == "full":
        own_redis.run("CONFIG", "SET", "maxmemory", "1")
    else:
        own_redis.run("REPLICAOF", "127.0.0.1", own_redis.port)
    renewal = renewal_for(wechat, own_redis)
    held = renewal.look_up(None)
    for _ in range(5):
        held = renewal.look_up(held)
        assert held.value == wechat.ticket
    assert wechat.calls == {"token": 1, "getticket": 1}


def test_a_fresh_ticket_is_taken_from_an_instance_that_keeps_it_for_less(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    long, short = (
        renewal_for(wechat, redis_server, clock=clock, expire=expire) for expire in (7100, 3600)
    )
    held = long.look_up(None)
    wechat.rotate_ticket()
    redis_server.run(*DUE)
    clock.advance(600)
    assert short.look_up(held).value == wechat.ticket
    wechat.faults = dict.fromkeys(("token", "getticket"), Fault(hang_up=True))
    assert long.look_up(held).value == wechat.ticket
    assert wechat.calls == {"token": 1, "getticket": 2}


def test_a_ticket_that_ended_while_wechat_was_asked_serves_nobody(
    wechat: Sandbox, clock: MovedClock
) -> None:
    renewal = renewal_for(wechat, clock=clock)
    held = renewal.look_up(None)
    clock.advance(7150)
    wechat.faults["token"] = hold = Fault(hold=threading.Event(), errcode=-1)
    waiting = Background(renewal, held)
    called(wechat, "token", 2)
    clock.advance(100)
    assert hold.hold is not None
    hold.hold.set()
    assert isinstance(waiting.join().error, WeChatRefused)


# Refused, and backing off.


def test_what_may_pass_is_tried_again_after_1_s_then_2_s_and_so_on(clock: MovedClock) -> None:
    back_off = BackOff(clock)
    pauses = []
    for _ in range(8):
        back_off.failed(WeChatRefused(-1, "busy", endpoint="token"))
        pauses.append(back_off.remaining)
        clock.advance(back_off.remaining)
        back_off.check()
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    back_off.succeeded()
    back_off.failed(WeChatUnreachable("down", endpoint="token"))
    assert back_off.remaining == 1


def test_what_a_person_must_mend_is_tried_again_after_a_minute_then_two_up_to_ten(
    clock: MovedClock,
) -> None:
    back_off = BackOff(clock)
    calls, night = 0, clock.now + 12 * 3600
    pauses = []
    while clock.now < night:
        error = WeChatRefused(40125, "invalid appsecret", endpoint="token")
        back_off.failed(error)
        calls += 1
        pauses.append(back_off.remaining)
        clock.advance(back_off.remaining - 0.001)
        with pytest.raises(WeChatRefused) as caught:
            back_off.check()
        assert caught.value is error
        clock.advance(0.002)
        back_off.check()
    assert [round(pause) for pause in pauses[:6]] == [60, 120, 240, 480, 600, 600]
    assert calls < 100  # of 2000 a day, or 200 on a test account


@pytest.mark.parametrize(("errcode", "pause"), [(40125, 60), (40164, 60), (-1, 1)])
def test_while_it_backs_off_wechat_is_left_alone(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, errcode: int, pause: float
) -> None:
    wechat.faults["token"] = Fault(errcode=errcode)
    renewal = renewal_for(wechat, redis_server, clock=clock)
    for _ in range(10):
        with pytest.raises(WeChatRefused):
            renewal.look_up(None)
    assert wechat.calls == {"token": 1}
    assert renewal.back_off.remaining == pytest.approx(pause)
    clock.advance(pause)
    redis_server.run("DEL", BACK_OFF_KEY)
    with pytest.raises(WeChatRefused):
        renewal.look_up(None)
    assert wechat.calls == {"token": 2}


def test_while_it_backs_off_a_ticket_that_another_instance_got_is_used(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    renewal = renewal_for(wechat, redis_server)
    with pytest.raises(WeChatRefused):
        renewal.look_up(None)
    write(redis_server, "theirs", 7100, checked=True)
    assert renewal.look_up(None).value == "theirs"
    assert renewal.back_off.error is None


def test_the_ticket_held_serves_where_wechat_refuses_to_renew_it(
    wechat: Sandbox, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    redis_server.run("SET", TICKET_KEY, "of-unknown-age")
    wechat.faults["token"] = Fault(errcode=-1)
    renewal = renewal_for(wechat, redis_server)
    held = renewal.look_up(None)
    for _ in range(3):
        assert renewal.look_up(held).value == "of-unknown-age"
    assert caplog.text.count("the ticket in hand serves on: WeChat refused token") == 1
    assert isinstance(renewal.back_off.error, WeChatRefused)


# The access_token.


def test_a_token_that_another_program_replaced_is_fetched_anew(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    held = renewal_for(wechat, redis_server).look_up(None)
    wechat.replace_token()
    redis_server.run(*DUE)
    assert renewal_for(wechat, redis_server).look_up(held).value == wechat.ticket
    assert wechat.calls == {"token": 2, "getticket": 3}


@pytest.mark.parametrize("errcode", [40001, 40014, 42001])
def test_a_token_that_is_refused_is_replaced_once_and_never_used_again(
    wechat: Sandbox, redis_server: RedisServer, errcode: int
) -> None:
    wechat.faults["getticket"] = Fault(errcode=errcode)
    renewal = renewal_for(wechat, redis_server)
    for _ in range(10):
        with pytest.raises(WeChatRefused):
            renewal.look_up(None)
    assert wechat.calls == {"token": 2, "getticket": 2}
    assert not redis_server.run("EXISTS", TOKEN_KEY)


def test_another_errcode_of_getticket_is_no_reason_for_another_token(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["getticket"] = Fault(errcode=45009)
    with pytest.raises(WeChatRefused):
        renewal_for(wechat, redis_server).look_up(None)
    assert wechat.calls == {"token": 1, "getticket": 1}
    assert redis_server.run("EXISTS", TOKEN_KEY)


def test_a_read_only_redis_does_not_bring_a_refused_token_back(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock, caplog: pytest.LogCaptureFixture
) -> None:
    renewal = renewal_for(wechat, own_redis, clock=clock)
    renewal.look_up(None)
    own_redis.run(*DUE)
    own_redis.run("REPLICAOF", "127.0.0.1", own_redis.port)
    held = renewal.look_up(None)
    for turn in range(1, 4):
        wechat.replace_token()
        clock.advance(1201)
        assert renewal.look_up(held).value == wechat.ticket
        assert wechat.calls == {"token": 1 + turn, "getticket": 1 + 2 * turn}
    assert caplog.text.count("going on without") == 1
    assert "works again" not in caplog.text


def test_another_instances_newer_token_is_tried_before_a_third_is_fetched(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    good = WeChat(settings_for(wechat).wechat).fetch_access_token().value
    redis_server.run("SET", TOKEN_KEY, good, "EX", 7000)
    assert renewal_for(wechat, redis_server).look_up(None).value == wechat.ticket
    assert wechat.calls == {"token": 1, "getticket": 1}


def test_one_instance_in_trouble_does_not_drop_anothers_token(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    redis_server.run("SET", TOKEN_KEY, "refused", "EX", 7000)
    wechat.faults["getticket"] = hold = Fault(hold=threading.Event())
    waiting = Background(renewal_for(wechat, redis_server))
    called(wechat, "getticket", 1)
    newer = WeChat(settings_for(wechat).wechat).fetch_access_token().value
    redis_server.run("SET", TOKEN_KEY, newer, "EX", 7000)
    assert hold.hold is not None
    hold.hold.set()
    assert waiting.join().ticket == wechat.ticket
    assert redis_server.run("GET", TOKEN_KEY) == newer
    assert wechat.calls == {"token": 1, "getticket": 2}


# The lock.


def test_a_ticket_that_is_due_is_not_waited_for_while_another_instance_asks(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    write(redis_server, "old", 100)
    redis_server.run("SET", LOCK_KEY, "another", "EX", 100)
    renewal = renewal_for(wechat, redis_server)
    held = renewal.look_up(None)
    commands = redis_server.commands
    assert renewal.look_up(held).value == "old"
    assert redis_server.commands - commands < 20  # it tried once
    assert not wechat.calls


def test_without_a_ticket_the_one_that_another_instance_gets_is_waited_for(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    redis_server.run("SET", LOCK_KEY, "another", "EX", 100)
    commands = redis_server.commands
    waiting = Background(renewal_for(wechat, redis_server))
    eventually("it tries to get the lock", lambda: redis_server.commands > commands + 10)
    write(redis_server, "theirs", 7100, checked=True)
    redis_server.run("DEL", LOCK_KEY)
    assert waiting.join().ticket == "theirs"
    assert not wechat.calls
    assert not redis_server.run("EXISTS", LOCK_KEY)


def test_an_instance_that_lost_the_lock_asks_no_further(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["token"] = hold = Fault(hold=threading.Event())
    waiting = Background(renewal_for(wechat, redis_server))
    called(wechat, "token", 1)
    redis_server.run("SET", LOCK_KEY, "another", "EX", 100)
    write(redis_server, "theirs", 7100, checked=True)
    redis_server.run("SET", TOKEN_KEY, "their-token", "EX", 7200)
    assert hold.hold is not None
    hold.hold.set()
    assert isinstance(waiting.join().error, LockedElsewhere)
    assert redis_server.run("GET", LOCK_KEY) == "another"
    assert redis_server.run("GET", TOKEN_KEY) == "their-token"
    assert wechat.calls == {"token": 1}


def test_an_instance_whose_token_is_refused_fetches_no_other_after_it_lost_the_lock(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["getticket"] = hold = Fault(hold=threading.Event(), errcode=40001)
    waiting = Background(renewal_for(wechat, redis_server))
    called(wechat, "getticket", 1)
    redis_server.run("SET", LOCK_KEY, "another", "EX", 100)
    assert hold.hold is not None
    hold.hold.set()
    assert isinstance(waiting.join().error, LockedElsewhere)
    assert wechat.calls == {"token": 1, "getticket": 1}


@pytest.mark.parametrize("why", ["the lease was over", "Redis was away"])
def test_a_late_answer_never_replaces_a_newer_one(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock, why: str
) -> None:
    """Nor does whoever got it go on with it."""
    late = Fault(hold=threading.Event(), body=b'{"ticket": "late", "expires_in": 7200}')
    wechat.faults["getticket"] = late
    if why == "Redis was away":
        own_redis.kill()
    waiting = Background(renewal_for(wechat, own_redis, clock=clock))
    called(wechat, "getticket", 1)
    if why == "Redis was away":
        own_redis.start()
        clock.advance(REDIS_PAUSE)
    own_redis.run("DEL", LOCK_KEY)
    del wechat.faults["getticket"]
    newer = renewal_for(wechat, own_redis, expire=3600).look_up(None)
    assert late.hold is not None
    late.hold.set()
    assert waiting.join().ticket == newer.value
    assert own_redis.run("GET", TICKET_KEY) == newer.value == wechat.ticket
    assert wechat.calls["getticket"] == 2


# Faults of Redis and of WeChat.


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
    wechat: Sandbox,
    broken_redis: RedisServer,
    clock: MovedClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    renewal = renewal_for(wechat, broken_redis, clock=clock, password="mine")
    held = None
    for _ in range(3):
        held = renewal.look_up(held)
        assert held.value == wechat.ticket
        clock.advance(REDIS_PAUSE)
    assert wechat.calls == {"token": 1, "getticket": 1}
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert 1 <= len(warnings) <= 2
    assert all("going on without" in warning for warning in warnings)
    assert "Traceback" not in caplog.text


class Nonsense:
    """Answers every command of Redis with the same bytes, whatever they mean."""

    def __init__(self, answer: bytes) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._answer = answer
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                with connection, suppress(OSError):
                    while connection.recv(65536):
                        connection.sendall(self._answer * 8)

    def stop(self) -> None:
        self._listening.close()


@pytest.mark.parametrize(
    "answer",
    [
        b":5\r\n",
        b"*1\r\n:1\r\n",
        b"$abc\r\n",
        b"$-1\r\n",
        b"+s3cr3t\r\n",
        b"!s3cr3t\r\n",
        b"*1\r\n" * 3000,
    ],
)
def test_a_redis_that_answers_nonsense_costs_no_page(
    wechat: Sandbox, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    nonsense = Nonsense(answer)
    settings = settings_for(wechat, host="127.0.0.1", port=nonsense.port)
    renewal = Renewal(WeChat(settings.wechat), Cache(settings), settings)
    held = renewal.look_up(None)
    assert renewal.look_up(held).value == wechat.ticket
    nonsense.stop()
    assert wechat.calls == {"token": 1, "getticket": 1}
    assert "Traceback" not in caplog.text
    assert "s3cr3t" not in caplog.text


@pytest.mark.parametrize("host", ["redis..internal", "x" * 64])
def test_a_name_that_can_be_no_hosts_is_a_redis_that_is_not_reached(
    wechat: Sandbox, host: str, caplog: pytest.LogCaptureFixture
) -> None:
    renewal = renewal_for(wechat, host=host)
    assert renewal.look_up(None).value == wechat.ticket
    assert renewal.cache.state == "unreachable"
    assert "Traceback" not in caplog.text


def test_a_redis_that_hangs_is_waited_for_once(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock
) -> None:
    own_redis.pause()
    wechat.faults["token"] = Fault(errcode=40164)
    renewal = renewal_for(wechat, own_redis, clock=clock)
    with pytest.raises(WeChatRefused):
        renewal.look_up(None)
    own_redis.resume()
    before = own_redis.commands
    for _ in range(100):
        with pytest.raises(WeChatRefused):
            renewal.look_up(None)
    assert own_redis.commands - before <= 5  # those of the test's own look


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
        ("HSET", LOCK_KEY, "x", "y"),
        ("HSET", CHECKED_KEY, "x", "y"),
        ("SET", CHECKED_KEY, b"\xff\xfe\x00"),
    ],
)
def test_whatever_the_keys_hold_is_healed(
    wechat: Sandbox, redis_server: RedisServer, command: tuple[Any, ...]
) -> None:
    redis_server.run(*command)
    if command[:2] == ("HSET", LOCK_KEY):
        redis_server.run("PEXPIRE", LOCK_KEY, 300)
    renewal = renewal_for(wechat, redis_server)
    assert renewal.look_up(renewal.look_up(None)).value == wechat.ticket
    assert redis_server.run("GET", TICKET_KEY) == wechat.ticket
    assert redis_server.run("GET", CHECKED_KEY) == marker(wechat.ticket)
    assert 7000 < redis_server.run("TTL", TICKET_KEY) <= 7100
    assert 7000 < redis_server.run("TTL", TOKEN_KEY) <= 7100


@pytest.mark.parametrize("wechat_is_down", [False, True])
def test_a_redis_that_lost_everything_has_it_again_at_the_next_look(
    wechat: Sandbox, redis_server: RedisServer, wechat_is_down: bool
) -> None:
    renewal = renewal_for(wechat, redis_server)
    held = renewal.look_up(None)
    if wechat_is_down:
        wechat.faults = dict.fromkeys(("token", "getticket"), Fault(hang_up=True))
    redis_server.run("FLUSHALL")
    assert renewal.look_up(held).value == held.value
    assert redis_server.run("GET", TICKET_KEY) == held.value
    assert 590 < redis_server.run("TTL", CHECKED_KEY) <= 600
    assert renewal_for(wechat, redis_server).look_up(None).value == held.value
    assert wechat.calls == {"token": 1, "getticket": 1}


def test_after_redis_returns_the_instances_agree_again(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock
) -> None:
    own_redis.kill()
    one, other = (renewal_for(wechat, own_redis, clock=clock) for _ in range(2))
    old = one.look_up(None)
    wechat.rotate_ticket()
    clock.advance(1)
    new = other.look_up(None)
    assert old.value != new.value == wechat.ticket
    own_redis.start()
    clock.advance(REDIS_PAUSE)
    for _ in range(3):
        old, new = one.look_up(old), other.look_up(new)
    assert old.value == new.value == own_redis.run("GET", TICKET_KEY) == wechat.ticket


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
    "life text": Fault(body=b'{"ticket": "t", "access_token": "t", "expires_in": "soon"}'),
    "busy": Fault(errcode=-1),
    "busy too": Fault(errcode=-1000),
    "quota": Fault(errcode=45009),
    "too often": Fault(errcode=45011),
    "whitelist": Fault(errcode=40164),
}


@pytest.mark.parametrize("endpoint", ["token", "getticket"])
@pytest.mark.parametrize("name", BROKEN)
def test_wechat_in_any_trouble_is_asked_once_a_pause_and_recovered_from(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, name: str, endpoint: str
) -> None:
    renewal = renewal_for(wechat, redis_server, clock=clock, timeout=0.5)
    wechat.faults[endpoint] = BROKEN[name]
    for _ in range(10):
        with pytest.raises(SigningError):
            renewal.look_up(None)
    assert wechat.calls[endpoint] == 1
    assert not redis_server.run("EXISTS", TICKET_KEY, CHECKED_KEY, LOCK_KEY)
    del wechat.faults[endpoint]
    clock.advance(renewal.back_off.remaining)
    redis_server.run("DEL", BACK_OFF_KEY)
    held = renewal.look_up(None)
    assert held.value == wechat.ticket

    wechat.faults[endpoint] = BROKEN[name]
    redis_server.run(*DUE)
    if endpoint == "token":
        wechat.replace_token()
    for _ in range(10):
        assert renewal.look_up(held).value == held.value


def test_two_accounts_on_one_redis_do_not_meet(redis_server: RedisServer) -> None:
    accounts = [Sandbox(appid="wxone").start(), Sandbox(appid="wxtwo").start()]
    for wechat in accounts:
        assert renewal_for(wechat, redis_server).look_up(None).value == wechat.ticket
    assert accounts[0].ticket != accounts[1].ticket
    assert len(redis_server.run("KEYS", "*")) == 6
    for wechat in accounts:
        wechat.stop()


# Redis is away, and `token` makes the others' tokens void.


def test_while_redis_is_away_the_instances_go_on_with_the_token_that_they_share(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock
) -> None:
    shares = shares_of(wechat, own_redis, clock, 4)
    own_redis.kill()
    for _ in range(10):
        clock.advance(600)
        shares = [(one, one.look_up(held)) for one, held in shares]
        assert {held.value for _, held in shares} == {wechat.ticket}
    assert wechat.calls == {"token": 1, "getticket": 1 + 10 * 4}


def test_while_redis_is_away_a_refused_token_is_not_replaced_at_every_recheck(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock
) -> None:
    """Each that is fetched makes void what the three others have."""
    shares = shares_of(wechat, own_redis, clock, 4)
    own_redis.kill()
    wechat.replace_token()
    clock.advance(600)
    shares = [(one, one.look_up(held)) for one, held in shares]
    assert wechat.calls == {"token": 1, "getticket": 1 + 4}
    for _ in range(9):
        clock.advance(600)
        shares = [(one, one.look_up(held)) for one, held in shares]
        assert {held.value for _, held in shares} == {wechat.ticket}
    assert wechat.calls["token"] <= 1 + 4 * 5


@pytest.mark.parametrize("count", [1, 4])
def test_while_redis_is_away_for_hours_a_ticket_that_died_is_replaced(
    wechat: Sandbox, clock: MovedClock, count: int
) -> None:
    """Whatever the token: WeChat lets both go after 7200 s, and says 7200 s of either again."""
    gone: dict[str, Any] = {"host": "127.0.0.1", "port": 1}
    instances = [renewal_for(wechat, clock=clock, **gone) for _ in range(count)]
    held: list[Credential | None] = [None] * count
    for second in range(0, 20_000, 100):
        if second % 7200 == 7100:
            wechat.rotate_ticket()
            rotated = second
        held = [one.look_up(ticket) for one, ticket in zip(instances, held, strict=True)]
        if second < 7100 or second - rotated > 2 * 600 + 700:
            assert {ticket.value for ticket in held if ticket} == {wechat.ticket}, second
        clock.advance(100)


def test_a_marker_that_lasts_longer_than_recheck_tells_not_when_wechat_was_asked(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    renewal_for(wechat, redis_server, clock=clock, recheck=0).look_up(None)
    wechat.rotate_ticket()
    often = renewal_for(wechat, redis_server, clock=clock, recheck=60)
    assert often.look_up(often.look_up(None)).value == wechat.ticket


def test_another_programs_newer_ticket_is_not_overwritten_while_wechat_fails(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    [(one, held)] = shares_of(wechat, redis_server, clock, 1)
    wechat.faults["getticket"] = Fault(status=500)
    for life in ((), ("EX", 5000)):
        redis_server.run(*DUE)
        redis_server.run("SET", TICKET_KEY, "newer", *life)
        for _ in range(3):
            clock.advance(60)
            one.look_up(held)
        assert redis_server.run("GET", TICKET_KEY) == "newer"


def test_a_token_that_was_dropped_does_not_come_back_from_anothers_memory(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    (_, _), (other, held) = shares_of(wechat, redis_server, clock, 2)
    redis_server.run("DEL", TOKEN_KEY)  # the first one dropped it
    for _ in range(3):
        other.look_up(held)
    assert not redis_server.run("EXISTS", TOKEN_KEY)
    redis_server.run(*DUE)
    other.look_up(held)
    assert redis_server.run("GET", TOKEN_KEY)  # WeChat took it
    assert wechat.calls == {"token": 1, "getticket": 2}


# What one instance meets, the others need not.


def refused(renewal: Renewal) -> None:
    with pytest.raises(WeChatRefused):
        renewal.look_up(None)


@pytest.mark.parametrize(("errcode", "shared"), [(40125, True), (40164, False), (61004, False)])
def test_what_is_the_accounts_fault_holds_all_instances_back_and_what_is_a_hosts_only_it(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, errcode: int, shared: bool
) -> None:
    wechat.faults["token"] = Fault(errcode=errcode)
    one, other = (renewal_for(wechat, redis_server, clock=clock) for _ in range(2))
    refused(one)
    refused(other)  # whoever starts asks at once
    assert wechat.calls == {"token": 2}
    assert redis_server.run("EXISTS", BACK_OFF_KEY) == shared
    clock.advance(60)
    refused(one)
    assert wechat.calls == {"token": 2 if shared else 3}
    if shared:
        assert 115 < one.back_off.remaining <= 120
        error = one.back_off.error
        assert isinstance(error, WeChatRefused)
        assert error.errcode == errcode


def test_a_night_of_a_wrong_secret_costs_four_instances_what_it_costs_one(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    wechat.faults["token"] = Fault(errcode=40125)
    instances = [renewal_for(wechat, redis_server, clock=clock) for _ in range(4)]
    over = 0.0
    while clock.now < 1_000_000 + 36_000:
        for one in instances:
            before = wechat.calls["token"]
            refused(one)
            if wechat.calls["token"] > before:
                over = clock.now + one.back_off.pause
        clock.advance(30)
        if clock.now >= over:
            redis_server.run("DEL", BACK_OFF_KEY)  # as Redis does by itself
    assert wechat.calls["token"] < 4 + 36_000 / 600 + 10


def test_an_instance_with_another_secret_holds_nobody_back(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    """As while a new secret is rolled out, one instance after the other."""
    [(good, held)] = shares_of(wechat, redis_server, clock, 1)
    settings = settings_for(wechat, redis_server)
    settings = replace(settings, wechat=replace(settings.wechat, secret="old"))
    redis_server.run("DEL", TICKET_KEY, TOKEN_KEY, CHECKED_KEY)
    refused(Renewal(WeChat(settings.wechat), Cache(settings, clock), settings))
    assert redis_server.run("EXISTS", BACK_OFF_KEY)
    clock.advance(601)
    assert good.look_up(held).value == wechat.ticket
    assert good.back_off.error is None


def test_what_an_instance_got_meanwhile_is_taken_and_ends_the_pause_of_all(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    wechat.faults["token"] = Fault(errcode=40125)
    one = renewal_for(wechat, redis_server, clock=clock)
    refused(one)
    wechat.faults.clear()
    restarted = renewal_for(wechat, redis_server, clock=clock)
    assert restarted.look_up(None).value == wechat.ticket
    assert not redis_server.run("EXISTS", BACK_OFF_KEY)
    assert one.look_up(None).value == wechat.ticket
    assert one.back_off.error is None


@pytest.mark.parametrize(
    "text",
    ["x", "[]", "7", '{"errcode": 1}', '{"errcode": [], "errmsg": 1, "endpoint": 2}', "\xff"]
    + [
        f'{{"errcode": {code}, "errmsg": "", "endpoint": "{endpoint}", "pause": 9, "account": "A"}}'
        for code, endpoint in ((40013, "<b>"), ("9" * 40, "token"))
    ],
)
def test_nonsense_under_the_key_of_the_pause_holds_nobody_back(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, text: str
) -> None:
    renewal = renewal_for(wechat, redis_server, clock=clock)
    text = text.replace('"A"', json.dumps(renewal._account))
    redis_server.run("SET", BACK_OFF_KEY, text, "EX", 600)
    held = renewal.look_up(None)
    redis_server.run("SET", BACK_OFF_KEY, text)
    redis_server.run(*DUE)
    renewal.look_up(held)
    assert wechat.calls == {"token": 1, "getticket": 2}


def test_a_day_in_which_wechat_refuses_each_token_that_it_grants_costs_no_days_quota(
    clock: MovedClock,
) -> None:
    back_off, calls = BackOff(clock), 0
    while clock.now < 1_000_000 + 86_400:
        back_off.failed(WeChatRefused(40001, "", endpoint="getticket"))
        calls += 1
        clock.advance(back_off.remaining)
    assert calls < 200


# Waiting for another instance.


def test_whoever_waits_does_not_give_up_before_the_one_that_asks_can_have_an_answer(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    """It takes all the time that three calls may take, of which the first finds a dead token."""
    redis_server.run("SET", TOKEN_KEY, "dead", "EX", 7000)
    for endpoint in ("token", "getticket"):
        wechat.faults[endpoint] = Fault(delay=1.4)
    asking = Background(renewal_for(wechat, redis_server, timeout=1.5))
    called(wechat, "getticket", 1)
    waiting = Background(renewal_for(wechat, redis_server, timeout=0.1))
    assert waiting.join().ticket == asking.join().ticket == wechat.ticket
    assert wechat.calls == {"token": 1, "getticket": 2}


def test_a_ticket_that_appears_is_taken_though_the_lock_is_held_on(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    redis_server.run("SET", LOCK_KEY, "another's", "EX", 100)
    waiting = Background(renewal_for(wechat, redis_server))
    write(redis_server, "theirs", 7100, checked=True)
    assert waiting.join().ticket == "theirs"
    assert redis_server.run("GET", LOCK_KEY) == "another's"
    assert not wechat.calls
