"""What pages get, and who waits. The life of a ticket itself is tested in test_renewal.py."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable

import pytest
from harness import (
    CHECKED_KEY,
    LOCK_KEY,
    Fault,
    MovedClock,
    RedisServer,
    Sandbox,
    assert_no_credential,
    in_a_loop,
    tickets_for,
    until,
)

from wechat_sign.errors import LockedElsewhere, SigningError, Stopping, WeChatRefused
from wechat_sign.settings import Limits
from wechat_sign.tickets import JsapiTickets

LOOK_INTERVAL, LOOK_SOON = Limits().look_interval, Limits().look_soon


async def called(wechat: Sandbox, endpoint: str, times: int) -> None:
    await until(f"{endpoint} is called", lambda: wechat.calls[endpoint] >= times)


async def served(tickets: JsapiTickets) -> tuple[str, bool]:
    """The ticket that a page gets without waiting for anything, and whether a look began by it."""
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(tickets.current())
    await asyncio.sleep(0)
    assert task.done()
    return task.result(), asyncio.all_tasks() - {task} != before


async def at_once(tickets: JsapiTickets) -> str:
    return (await served(tickets))[0]


def let_go(fault: Fault) -> None:
    assert fault.hold is not None
    fault.hold.set()


# One look, shared.


@pytest.mark.parametrize("token_api", ["token", "stable_token"])
@in_a_loop
async def test_a_thousand_callers_share_one_look_up(
    wechat: Sandbox, redis_server: RedisServer, token_api: str
) -> None:
    tickets = tickets_for(wechat, redis_server, token_api=token_api)
    with redis_server.watching() as sent:
        got = await asyncio.gather(*(tickets.current() for _ in range(1000)))
        assert set(got) == {wechat.ticket}
        assert len(sent()) < 100
    assert wechat.calls == {token_api: 1, "getticket": 1}


@in_a_loop
async def test_all_share_the_error_too_and_have_it_at_once_until_the_next_look(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    tickets = tickets_for(wechat, redis_server, clock=clock)
    got = await asyncio.gather(*(tickets.current() for _ in range(100)), return_exceptions=True)
    assert {type(error) for error in got} == {WeChatRefused}
    with redis_server.watching() as sent:
        for _ in range(100):
            with pytest.raises(WeChatRefused):
                await at_once(tickets)
        assert sent() == []
    assert tickets.retry_after == 60
    assert wechat.calls == {"token": 1}


@in_a_loop
async def test_a_cancelled_caller_harms_nobody(wechat: Sandbox) -> None:
    hold = wechat.faults["token"] = Fault(hold=threading.Event())
    tickets = tickets_for(wechat)
    first, second, third = (
        asyncio.ensure_future(coroutine)
        for coroutine in (tickets.current(), tickets.current(), tickets.refresh())
    )
    await called(wechat, "token", 1)
    first.cancel()
    third.cancel()
    let_go(hold)
    assert await second == wechat.ticket
    assert first.cancelled()
    assert wechat.calls["token"] == 1


@in_a_loop
async def test_what_a_look_gives_shows_no_credential(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    """As asyncio's debug mode shows a task's result in the log."""
    tickets = tickets_for(wechat, redis_server)
    look = asyncio.ensure_future(tickets.refresh())
    shown = [repr(asyncio.all_tasks())]
    await look
    shown += [repr(look), repr(tickets.known), repr(vars(tickets))]
    assert_no_credential("".join(shown), wechat.issued)
    assert tickets.known.ticket is not None


@in_a_loop
async def test_an_error_raised_again_and_again_does_not_grow(
    wechat: Sandbox, clock: MovedClock
) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    tickets = tickets_for(wechat, clock=clock)
    for _ in range(50):
        clock.advance(LOOK_SOON / 2)
        with pytest.raises(SigningError) as caught:
            await tickets.current()
        assert len(list(traceback.walk_tb(caught.value.__traceback__))) < 20


# Fresh, due a look, over.


@in_a_loop
async def test_a_fresh_ticket_serves_for_10_s_without_a_look(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
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
    assert wechat.calls == {"token": 1, "getticket": 1}


@pytest.mark.parametrize("expired", [True, False])
@in_a_loop
async def test_a_ticket_that_is_due_serves_while_wechat_is_asked(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock, expired: bool
) -> None:
    tickets = tickets_for(wechat, redis_server, clock=clock)
    old = await tickets.current()
    wechat.rotate_ticket()
    redis_server.run(*(("FLUSHALL",) if expired else ("DEL", CHECKED_KEY)))
    hold = wechat.faults["getticket"] = Fault(hold=threading.Event())
    clock.advance(7199 if expired else LOOK_INTERVAL)
    for _ in range(100):
        assert await at_once(tickets) == old
    await called(wechat, "getticket", 2)
    assert await at_once(tickets) == old
    let_go(hold)
    await tickets.refresh()
    assert await at_once(tickets) == wechat.ticket != old
    assert wechat.calls == {"token": 1 + expired, "getticket": 2}


@in_a_loop
async def test_what_is_over_is_waited_for(wechat: Sandbox, clock: MovedClock) -> None:
    tickets = tickets_for(wechat, clock=clock)
    await tickets.current()
    wechat.rotate_ticket()
    clock.advance(8 * 3600)
    assert await tickets.current() == wechat.ticket
    assert wechat.calls == {"token": 2, "getticket": 2}
    wechat.faults = dict.fromkeys(("token", "getticket"), Fault(errcode=40164))
    clock.advance(7199.8)
    assert await served(tickets) == (wechat.ticket, True)
    await tickets.refresh()
    assert tickets.look_in == pytest.approx(0.2)
    clock.advance(0.2)
    with pytest.raises(WeChatRefused):
        await tickets.current()


@in_a_loop
async def test_the_age_of_a_ticket_counts_from_when_it_was_last_fresh_or_else_from_when_it_came(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    redis_server.put_ticket("theirs", 1000)
    wechat.faults["token"] = Fault(errcode=-1)
    tickets = tickets_for(wechat, redis_server, clock=clock)
    await tickets.current()
    clock.advance(30)
    await tickets.refresh()
    assert clock.now - tickets.known.fresh_at == 30
    del wechat.faults["token"]
    clock.advance(30)
    await tickets.refresh()
    assert clock.now - tickets.known.fresh_at == 0


# Waiting for another instance.


async def lock_is_tried(sent: Callable[[], list[str]]) -> None:
    """Twice: the second try began after this was called."""
    for _ in range(2):
        await until("it is tried", lambda: any(one.startswith(f"SET {LOCK_KEY}") for one in sent()))


@pytest.mark.parametrize("released", [True, False])
@in_a_loop
async def test_without_a_ticket_the_one_that_another_instance_gets_is_waited_for(
    wechat: Sandbox, redis_server: RedisServer, released: bool
) -> None:
    redis_server.run("SET", LOCK_KEY, "another's", "EX", 100)
    waiting = asyncio.ensure_future(tickets_for(wechat, redis_server).current())
    with redis_server.watching() as sent:
        await lock_is_tried(sent)
    assert not waiting.done()
    redis_server.put_ticket("theirs", 7100, checked=True)
    if released:
        redis_server.run("DEL", LOCK_KEY)
    assert await waiting == "theirs"
    assert redis_server.run("EXISTS", LOCK_KEY) is not released
    assert not wechat.calls


@in_a_loop
async def test_it_is_waited_for_as_long_as_three_calls_take(
    wechat: Sandbox, redis_server: RedisServer, clock: MovedClock
) -> None:
    redis_server.run("SET", LOCK_KEY, "another's", "EX", 100)
    tickets = tickets_for(wechat, redis_server, clock=clock)
    waiting = asyncio.ensure_future(tickets.current())
    with redis_server.watching() as sent:
        await lock_is_tried(sent)
        clock.advance(38.9)
        await lock_is_tried(sent)
        assert not waiting.done()
        clock.advance(0.1)
        with pytest.raises(LockedElsewhere):
            await waiting
    assert tickets.retry_after == 1
    assert not wechat.calls


# The stop.


@in_a_loop
async def test_a_stop_waits_for_the_look_in_flight_but_not_for_ever_and_none_begins_after_it(
    wechat: Sandbox, clock: MovedClock
) -> None:
    hold = wechat.faults["token"] = Fault(hold=threading.Event())
    tickets = tickets_for(wechat)
    waiting = asyncio.ensure_future(tickets.current())
    await called(wechat, "token", 1)
    await tickets.close(timeout=0.05)
    with pytest.raises(Stopping):
        await waiting
    let_go(hold)
    tickets = tickets_for(wechat, clock=clock)
    looking = asyncio.ensure_future(tickets.refresh())
    await asyncio.sleep(0)
    await tickets.close(timeout=10)
    await looking
    clock.advance(LOOK_INTERVAL)
    assert await served(tickets) == (wechat.ticket, False)
