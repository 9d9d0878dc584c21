"""What pages get, and who waits. The life of a ticket itself is tested in test_renewal.py."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from harness import (
    CHECKED_KEY,
    DUE,
    LOCK_KEY,
    TICKET_KEY,
    Fault,
    MovedClock,
    RedisServer,
    Sandbox,
    assert_no_credential,
    tickets_for,
    until,
)

from wechat_sign.clock import SystemClock
from wechat_sign.errors import (
    LockedElsewhere,
    SigningError,
    Stopping,
    WeChatRefused,
    WeChatUnreachable,
)
from wechat_sign.settings import Limits
from wechat_sign.tickets import JsapiTickets

T = TypeVar("T")
LOOK_INTERVAL, LOOK_SOON = Limits().look_interval, Limits().look_soon


def running(scenario: Callable[[], Awaitable[T]]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(scenario(), 30)

    return asyncio.run(limited())


async def called(wechat: Sandbox, endpoint: str, times: int) -> None:
    await until(f"{endpoint} is called", lambda: wechat.calls[endpoint] >= times)


async def at_once(awaitable: Awaitable[str]) -> str:
    """Its result, if it has one without waiting for anything."""
    task = asyncio.ensure_future(awaitable)
    await asyncio.sleep(0)
    assert task.done()
    return task.result()


async def served(tickets: JsapiTickets) -> tuple[str, bool]:
    """The ticket that a page gets without waiting for anything, and whether a look began by it."""
    before = asyncio.all_tasks()
    ticket = await at_once(tickets.current())
    return ticket, asyncio.all_tasks() != before


def let_go(fault: Fault) -> None:
    assert fault.hold is not None
    fault.hold.set()


# One refresh, shared.


@pytest.mark.parametrize("token_api", ["token", "stable_token"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_thousand_callers_share_one_look_up(
    wechat: Sandbox, redis_server: RedisServer, shared: bool, token_api: str
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server if shared else None, token_api=token_api)
        got = await asyncio.gather(*(tickets.current() for _ in range(1000)))
        assert set(got) == {wechat.ticket}
        assert await at_once(tickets.current()) == wechat.ticket

    with redis_server.watching() as sent:
        running(scenario)
        assert len(sent()) < 100
    assert wechat.calls == {token_api: 1, "getticket": 1}


def test_all_callers_share_the_error_too(wechat: Sandbox) -> None:
    wechat.faults["token"] = Fault(errcode=40164)

    async def scenario() -> None:
        tickets = tickets_for(wechat)
        got = await asyncio.gather(*(tickets.current() for _ in range(100)), return_exceptions=True)
        assert {type(error) for error in got} == {WeChatRefused}

    running(scenario)
    assert wechat.calls == {"token": 1}


def test_a_cancelled_caller_harms_nobody(wechat: Sandbox) -> None:
    hold = wechat.faults["token"] = Fault(hold=threading.Event())

    async def scenario() -> None:
        tickets = tickets_for(wechat)
        first = asyncio.ensure_future(tickets.current())
        second = asyncio.ensure_future(tickets.current())
        await called(wechat, "token", 1)
        first.cancel()
        let_go(hold)
        assert await second == wechat.ticket
        assert first.cancelled()

    running(scenario)
    assert wechat.calls["token"] == 1


def test_no_look_starts_a_thread_nor_does_a_renewal(
    wechat: Sandbox, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def note(thread: threading.Thread) -> None:
        if "process_request" not in thread.name:  # the sandbox's
            started.append(thread)
        start(thread)

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server)
        await tickets.current()
        monkeypatch.setattr(threading.Thread, "start", note)
        for command in (("PING",), DUE) * 8:  # and the thread is nearly always idle by then
            redis_server.run(*command)
            await tickets.refresh()

    running(scenario)
    assert len(started) < 4
    assert wechat.calls == {"token": 1, "getticket": 9}


def test_what_a_look_gives_shows_no_credential(wechat: Sandbox, redis_server: RedisServer) -> None:
    """As asyncio's debug mode shows a task's result in the log."""

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server)
        look = asyncio.ensure_future(tickets.refresh())
        shown = [repr(asyncio.all_tasks())]
        await look
        shown += [repr(look), repr(tickets.known), repr(vars(tickets))]
        assert_no_credential("".join(shown), wechat.issued)
        assert tickets.known.ticket is not None

    running(scenario)


# Fresh, due a look, over.


def test_a_fresh_ticket_serves_for_10_s_without_a_look(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server, clock=clock)
        await tickets.current()
        clock.advance(LOOK_INTERVAL - 0.1)
        with redis_server.watching() as sent:
            for _ in range(100):
                assert await served(tickets) == (wechat.ticket, False)
            assert sent() == []
            clock.advance(0.1)
            assert await served(tickets) == (wechat.ticket, True)
            await until("it looks", sent)

    running(scenario)
    assert wechat.calls == {"token": 1, "getticket": 1}


def test_a_ticket_that_is_due_serves_while_wechat_is_asked(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server, clock=clock)
        old = await tickets.current()
        wechat.rotate_ticket()
        redis_server.run("DEL", CHECKED_KEY)
        hold = wechat.faults["getticket"] = Fault(hold=threading.Event())
        clock.advance(LOOK_INTERVAL)
        for _ in range(100):
            assert await at_once(tickets.current()) == old
        await called(wechat, "getticket", 2)
        assert await at_once(tickets.current()) == old
        let_go(hold)
        await tickets.refresh()
        assert await at_once(tickets.current()) == wechat.ticket != old

    running(scenario)
    assert wechat.calls == {"token": 1, "getticket": 2}


@pytest.mark.parametrize("shared", [True, False])
def test_nobody_waits_while_a_ticket_that_expired_is_replaced(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, shared: bool
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server if shared else None, clock=clock, recheck=0)
        old = await tickets.current()
        wechat.rotate_ticket()
        redis_server.run("FLUSHALL")
        hold = wechat.faults["token"] = Fault(hold=threading.Event())
        clock.advance(7199)
        assert await at_once(tickets.current()) == old
        await called(wechat, "token", 2)
        let_go(hold)
        await tickets.refresh()
        assert await at_once(tickets.current()) == wechat.ticket != old

    running(scenario)


def test_what_is_over_is_waited_for(wechat: Sandbox, clock: MovedClock) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, clock=clock)
        await tickets.current()
        wechat.rotate_ticket()
        clock.advance(7201)
        assert await tickets.current() == wechat.ticket
        wechat.faults["getticket"] = wechat.faults["token"] = Fault(errcode=40164)
        clock.advance(7201)
        with pytest.raises(WeChatRefused):
            await tickets.current()

    running(scenario)


def test_a_ticket_that_nobody_renews_is_looked_at_every_10_s_all_the_same(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    redis_server.run("SET", TICKET_KEY, "theirs", "EX", 1000)

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server, clock=clock)
        await tickets.current()
        await tickets.refresh()
        clock.advance(LOOK_INTERVAL - 0.1)
        assert await served(tickets) == ("theirs", False)
        clock.advance(0.1)
        assert await served(tickets) == ("theirs", True)
        await tickets.refresh()

    running(scenario)


@pytest.mark.parametrize(("expires_in", "later"), [(60, 31), (60, 61)])
def test_a_ticket_that_ends_soon_is_replaced_in_time(
    wechat: Sandbox, clock: MovedClock, expires_in: float, later: float
) -> None:
    body = b'{"ticket": "brief", "expires_in": %.1f}' % expires_in
    wechat.faults["getticket"] = Fault(body=body)

    async def scenario() -> None:
        tickets = tickets_for(wechat, clock=clock)
        assert await tickets.current() == "brief"
        wechat.faults.clear()
        clock.advance(later)
        if later < expires_in:
            assert await served(tickets) == ("brief", True)
            await tickets.refresh()
        else:
            assert await tickets.current() == wechat.ticket
        assert await at_once(tickets.current()) == wechat.ticket
        assert wechat.calls["getticket"] == 2

    running(scenario)


def test_the_last_look_comes_no_later_than_the_tickets_end(
    wechat: Sandbox, clock: MovedClock
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, clock=clock)
        await tickets.current()
        wechat.faults = dict.fromkeys(("token", "getticket"), Fault(errcode=40164))
        clock.advance(7199.8)
        assert await served(tickets) == (wechat.ticket, True)
        await tickets.refresh()
        assert tickets.look_in == pytest.approx(0.2)

    running(scenario)


@pytest.mark.parametrize("life", [(), ("EX", 100)])
def test_a_new_instance_serves_an_older_ticket_at_once_and_replaces_it(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, life: tuple[object, ...]
) -> None:
    redis_server.run("SET", TICKET_KEY, "older", *life)  # type: ignore[arg-type]
    wechat.faults["token"] = hold = Fault(hold=threading.Event())

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server, clock=clock)
        assert await tickets.current() == "older"
        assert not wechat.calls
        clock.advance(LOOK_SOON)
        for _ in range(100):
            assert await at_once(tickets.current()) == "older"
        await called(wechat, "token", 1)
        let_go(hold)
        await tickets.refresh()
        assert await at_once(tickets.current()) == wechat.ticket

    running(scenario)
    assert 7000 < redis_server.run("TTL", TICKET_KEY) <= 7100


def test_a_ticket_rotated_early_is_noticed_by_every_instance(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    async def scenario() -> None:
        instances = [tickets_for(wechat, redis_server, clock=clock) for _ in range(3)]
        old = {await tickets.current() for tickets in instances}
        wechat.rotate_ticket()
        redis_server.run("DEL", CHECKED_KEY)  # recheck is over
        for _ in range(2):  # one look asks WeChat, the next finds what it wrote
            clock.advance(LOOK_INTERVAL)
            for tickets in instances:
                await tickets.refresh()
        assert {await at_once(tickets.current()) for tickets in instances} == {wechat.ticket}
        assert old != {wechat.ticket}

    running(scenario)
    assert wechat.calls == {"token": 1, "getticket": 2}


def test_a_night_that_the_machine_slept_through_is_noticed(
    wechat: Sandbox, clock: MovedClock
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, clock=clock, recheck=0)
        await tickets.current()
        wechat.rotate_ticket()
        clock.advance(8 * 3600)
        assert await tickets.current() == wechat.ticket

    running(scenario)


# Waiting for another instance.


async def looked(sent: Callable[[], list[str]], times: int = 2) -> None:
    """Once the lock was tried so often."""
    tries = 0
    while tries < times:
        tries += sum(command.startswith(f"SET {LOCK_KEY}") for command in sent())
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("released", [True, False])
def test_without_a_ticket_the_one_that_another_instance_gets_is_waited_for(
    wechat: Sandbox, redis_server: RedisServer, released: bool
) -> None:
    async def scenario() -> None:
        redis_server.run("SET", LOCK_KEY, "another's", "EX", 100)
        waiting = asyncio.ensure_future(tickets_for(wechat, redis_server).current())
        with redis_server.watching() as sent:
            await looked(sent)
        assert not waiting.done()
        redis_server.put_ticket("theirs", 7100, checked=True)
        if released:
            redis_server.run("DEL", LOCK_KEY)
        assert await waiting == "theirs"
        assert redis_server.run("EXISTS", LOCK_KEY) is not released

    running(scenario)
    assert not wechat.calls


def test_it_is_waited_for_as_long_as_three_calls_take(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    async def scenario() -> None:
        redis_server.run("SET", LOCK_KEY, "another's", "EX", 100)
        tickets = tickets_for(wechat, redis_server, clock=clock)
        waiting = asyncio.ensure_future(tickets.current())
        with redis_server.watching() as sent:
            await looked(sent)
            clock.advance(38.9)
            await looked(sent)
            assert not waiting.done()
            clock.advance(0.1)
            with pytest.raises(LockedElsewhere):
                await waiting
        assert tickets.retry_after == 1

    running(scenario)
    assert not wechat.calls


def test_a_cold_instance_asks_when_the_one_that_asked_is_gone(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    async def scenario() -> None:
        redis_server.run("SET", LOCK_KEY, "a dead one's", "PX", 300)
        assert await tickets_for(wechat, redis_server).current() == wechat.ticket

    running(scenario)
    assert wechat.calls == {"token": 1, "getticket": 1}


# Failing.


def test_while_there_is_no_ticket_callers_have_the_error_at_once(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    wechat.faults["token"] = Fault(errcode=40164)

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server, clock=clock)
        with pytest.raises(WeChatRefused):
            await tickets.current()
        with redis_server.watching() as sent:
            for _ in range(1000):
                with pytest.raises(WeChatRefused):
                    await at_once(tickets.current())
            assert sent() == []
        assert tickets.retry_after == 60

    running(scenario)
    assert wechat.calls == {"token": 1}


def test_it_recovers_by_itself(wechat: Sandbox, clock: MovedClock) -> None:
    wechat.faults["token"] = Fault(status=502)

    async def scenario() -> None:
        tickets = tickets_for(wechat, clock=clock)
        with pytest.raises(WeChatUnreachable):
            await tickets.current()
        assert tickets.retry_after == 1
        del wechat.faults["token"]
        clock.advance(LOOK_SOON)
        with pytest.raises(WeChatUnreachable):
            await tickets.current()
        clock.advance(LOOK_SOON)
        assert await tickets.current() == wechat.ticket

    running(scenario)


def test_an_error_raised_again_and_again_does_not_grow(wechat: Sandbox, clock: MovedClock) -> None:
    wechat.faults["token"] = Fault(errcode=40164)

    async def scenario() -> None:
        tickets = tickets_for(wechat, clock=clock)
        lengths = set()
        for _ in range(50):
            clock.advance(LOOK_SOON / 2)
            try:
                await tickets.current()
            except SigningError as error:
                length, trace = 0, error.__traceback__
                while trace is not None:
                    length, trace = length + 1, trace.tb_next
                lengths.add(length)
        assert max(lengths) < 20

    running(scenario)


def test_with_redis_gone_the_ticket_held_serves_without_delay(
    wechat: Sandbox, own_redis: RedisServer, clock: MovedClock
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, own_redis, clock=clock)
        ticket = await tickets.current()
        own_redis.pause()
        for _ in range(100):
            clock.advance(LOOK_INTERVAL)
            assert await at_once(tickets.current()) == ticket

    running(scenario)


class Hands:
    """The clocks of a machine, which only the test moves."""

    def __init__(self) -> None:
        self.steady, self.wall = 1000.0, 1_700_000_000.0
        self.clock = SystemClock(lambda: self.steady, lambda: self.wall)


@pytest.mark.parametrize("fails", [True, False])
def test_a_paused_machine_neither_serves_what_died_meanwhile_nor_puts_it_back(
    wechat: Sandbox, redis_server: RedisServer, fails: bool
) -> None:
    hands = Hands()

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server, clock=hands.clock, recheck=0)
        dead = await tickets.current()
        wechat.rotate_ticket()
        redis_server.run("FLUSHALL")  # all is over there
        hands.wall += 3 * 3600
        if fails:
            wechat.faults["token"] = Fault(hang_up=True)
            with pytest.raises(WeChatUnreachable):
                await tickets.current()
            assert not redis_server.run("EXISTS", TICKET_KEY)
        else:
            assert await tickets.current() == wechat.ticket != dead
            assert redis_server.run("GET", TICKET_KEY) == wechat.ticket

    running(scenario)


# What is told of it.


def test_what_is_known_tells_how_it_stands(wechat: Sandbox, clock: MovedClock) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, clock=clock, recheck=0)
        assert tickets.known.usable(clock.now) is None
        await tickets.current()
        assert tickets.cache_state == "memory"
        clock.advance(7100)
        assert not tickets.known.error
        wechat.faults["getticket"] = wechat.faults["token"] = Fault(errcode=40164)
        await tickets.refresh()
        ticket = tickets.known.usable(clock.now)
        assert ticket is not None
        assert ticket.usable_until - clock.now == 100
        assert clock.now - tickets.known.fresh_at == 7100
        error = tickets.known.error
        assert isinstance(error, WeChatRefused)
        clock.advance(100)
        assert tickets.known.usable(clock.now) is None

    running(scenario)


@pytest.mark.parametrize("expire", [3600, 7200])
def test_the_age_is_never_negative_whatever_wrote_the_ticket(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, expire: int
) -> None:
    async def scenario() -> None:
        await tickets_for(wechat, redis_server, clock=clock, expire=7100).current()
        tickets = tickets_for(wechat, redis_server, clock=clock, expire=expire)
        await tickets.current()
        assert tickets.known.fresh_at == clock.now

    running(scenario)


def test_the_age_of_a_ticket_that_was_never_confirmed_counts_from_the_first_look(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    redis_server.put_ticket("theirs", 1000)

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server, clock=clock)
        await tickets.current()
        clock.advance(30)
        await tickets.refresh()
        assert clock.now - tickets.known.fresh_at == 30

    running(scenario)


def test_a_stop_waits_for_the_refresh_in_flight_but_not_for_ever(wechat: Sandbox) -> None:
    hold = wechat.faults["token"] = Fault(hold=threading.Event())

    async def scenario() -> None:
        tickets = tickets_for(wechat)
        waiting = asyncio.ensure_future(tickets.current())
        await called(wechat, "token", 1)
        await tickets.close(timeout=0.05)
        with pytest.raises(Stopping):
            await waiting
        let_go(hold)
        tickets = tickets_for(wechat)
        looking = asyncio.ensure_future(tickets.refresh())
        await asyncio.sleep(0)
        await tickets.close(timeout=10)
        await looking
        assert tickets.held() == wechat.ticket

    running(scenario)


def test_after_the_stop_no_look_begins(
    wechat: Sandbox, clock: MovedClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, clock=clock)
        ticket = await tickets.current()
        await tickets.close(timeout=10)
        clock.advance(LOOK_INTERVAL)
        assert await served(tickets) == (ticket, False)

    running(scenario)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
