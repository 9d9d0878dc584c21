from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from harness import LOCK_KEY, TICKET_KEY, TOKEN_KEY, RedisServer, settings_for

import server
from wechat_sign import tickets as tickets_module
from wechat_sign.credentials import WeChat
from wechat_sign.errors import SigningError, StillWaiting, WeChatRefused, WeChatUnreachable
from wechat_sign.sandbox import Fault, Sandbox
from wechat_sign.tickets import JsapiTickets

T = TypeVar("T")


def running(scenario: Callable[[], Awaitable[T]]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(scenario(), 30)

    return asyncio.run(limited())


def tickets_for(
    wechat: Sandbox, redis_server: RedisServer | None = None, **more: Any
) -> JsapiTickets:
    return server.make_tickets(settings_for(wechat, redis_server, **more))


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.01)


async def called(wechat: Sandbox, endpoint: str, times: int) -> None:
    await until(lambda: wechat.calls[endpoint] >= times)


async def settled(tickets: JsapiTickets) -> None:
    """Once no look-up is under way."""
    await until(lambda: tickets._task is None)


@pytest.mark.parametrize("token_api", ["token", "stable_token"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_thousand_callers_share_one_look_up(
    wechat: Sandbox, redis_server: RedisServer, shared: bool, token_api: str
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server if shared else None, token_api=token_api)
        got = await asyncio.gather(*(tickets.current() for _ in range(1000)))
        assert set(got) == {wechat.ticket}
        assert await tickets.current() == wechat.ticket

    before = redis_server.commands
    running(scenario)
    assert redis_server.commands - before < 50
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
        assert hold.hold is not None
        hold.hold.set()
        assert await second == wechat.ticket
        assert first.cancelled()

    running(scenario)
    assert wechat.calls["token"] == 1


def test_a_restart_asks_wechat_nothing(wechat: Sandbox, redis_server: RedisServer) -> None:
    async def scenario() -> None:
        await tickets_for(wechat, redis_server).current()
        calls = wechat.calls.copy()
        assert await tickets_for(wechat, redis_server).current() == wechat.ticket
        assert wechat.calls == calls

    running(scenario)
    for key in (TICKET_KEY, TOKEN_KEY):
        assert redis_server.run("TYPE", key) == "string"
        assert 7000 < redis_server.run("TTL", key) <= 7100
    assert redis_server.run("GET", TICKET_KEY) == wechat.ticket


def test_eight_cold_instances_make_one_call_of_each_kind(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["token"] = wechat.faults["getticket"] = Fault(delay=0.1)

    async def scenario() -> None:
        instances = [tickets_for(wechat, redis_server) for _ in range(8)]
        got = await asyncio.gather(*(tickets.current() for tickets in instances))
        assert set(got) == {wechat.ticket}

    running(scenario)
    assert wechat.calls == {"token": 1, "getticket": 1}


@pytest.mark.usefixtures("look_always")
@pytest.mark.parametrize("recheck", [600, 0])
def test_an_older_ticket_serves_while_wechat_is_asked_again(
    wechat: Sandbox, redis_server: RedisServer, recheck: int
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server, recheck=recheck)
        old = await tickets.current()
        wechat.rotate_ticket()
        redis_server.run("EXPIRE", TICKET_KEY, 6501)
        await tickets.current()
        await settled(tickets)
        assert wechat.calls["getticket"] == 1
        redis_server.run("EXPIRE", TICKET_KEY, 6499)
        assert await tickets.current() == old  # it starts a look-up and does not wait for it
        await settled(tickets)
        assert wechat.calls["getticket"] == (2 if recheck else 1)
        assert (await tickets.current() == wechat.ticket) is (recheck > 0)
        assert (redis_server.run("TTL", TICKET_KEY) > 7000) is (recheck > 0)

    running(scenario)
    assert wechat.calls["token"] == 1


def test_an_older_ticket_is_not_waited_for_while_another_instance_asks(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    redis_server.run("SET", TICKET_KEY, "old", "EX", 100)
    redis_server.run("SET", LOCK_KEY, "another", "EX", 100)

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server)
        assert await asyncio.wait_for(tickets.current(), 5) == "old"

    running(scenario)
    assert not wechat.calls


@pytest.mark.usefixtures("look_always")
@pytest.mark.parametrize("life", ["of unknown age", "old"])
def test_a_new_instance_serves_an_older_ticket_at_once_and_replaces_it(
    wechat: Sandbox, redis_server: RedisServer, life: str
) -> None:
    redis_server.run("SET", TICKET_KEY, "older", *(() if life != "old" else ("EX", 100)))
    wechat.faults["token"] = hold = Fault(hold=threading.Event())

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server)
        for _ in range(100):
            assert await asyncio.wait_for(tickets.current(), 1) == "older"
        await called(wechat, "token", 1)
        assert await asyncio.wait_for(tickets.current(), 1) == "older"
        assert hold.hold is not None
        hold.hold.set()
        await settled(tickets)
        assert await tickets.current() == wechat.ticket

    running(scenario)
    assert 7000 < redis_server.run("TTL", TICKET_KEY) <= 7100


@pytest.mark.usefixtures("look_always")
def test_it_serves_where_wechat_refuses_to_renew_it(
    wechat: Sandbox, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    redis_server.run("SET", TICKET_KEY, "of-unknown-age")
    wechat.faults["token"] = Fault(errcode=-1)

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server)
        for _ in range(3):
            assert await tickets.current() == "of-unknown-age"
            await settled(tickets)

    running(scenario)
    assert "the ticket in hand serves on: WeChat refused token with errcode -1" in caplog.text


@pytest.mark.parametrize("errcode", [40001, 40014, 42001])
def test_a_refused_token_is_replaced_once(
    wechat: Sandbox, redis_server: RedisServer, errcode: int
) -> None:
    async def heal() -> None:
        await tickets_for(wechat, redis_server).current()
        wechat.replace_token()
        redis_server.run("DEL", TICKET_KEY)
        assert await tickets_for(wechat, redis_server).current() == wechat.ticket

    running(heal)
    assert wechat.calls == {"token": 2, "getticket": 3}

    redis_server.run("FLUSHALL")
    wechat.calls.clear()
    wechat.faults["getticket"] = Fault(errcode=errcode)

    async def give_up() -> None:
        tickets = tickets_for(wechat, redis_server)
        for _ in range(10):
            with pytest.raises(WeChatRefused):
                await tickets.current()

    running(give_up)
    assert wechat.calls == {"token": 2, "getticket": 2}


def test_another_instances_newer_token_is_tried_before_a_third_is_fetched(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    good = WeChat(settings_for(wechat).wechat).fetch_access_token().value
    redis_server.run("SET", TOKEN_KEY, good, "EX", 7000)

    async def scenario() -> None:
        assert await tickets_for(wechat, redis_server).current() == wechat.ticket

    running(scenario)
    assert wechat.calls == {"token": 1, "getticket": 1}


def test_one_instance_in_trouble_does_not_drop_anothers_token(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    redis_server.run("SET", TOKEN_KEY, "refused", "EX", 7000)
    wechat.faults["getticket"] = hold = Fault(hold=threading.Event())

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server)
        waiting = asyncio.ensure_future(tickets.current())
        await called(wechat, "getticket", 1)
        newer = WeChat(settings_for(wechat).wechat).fetch_access_token().value
        redis_server.run("SET", TOKEN_KEY, newer, "EX", 7000)
        assert hold.hold is not None
        hold.hold.set()
        assert await waiting == wechat.ticket
        assert redis_server.run("GET", TOKEN_KEY) == newer

    running(scenario)
    assert wechat.calls == {"token": 1, "getticket": 2}


def test_an_instance_that_was_too_slow_asks_wechat_no_further(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["token"] = hold = Fault(hold=threading.Event())

    async def scenario() -> None:
        waiting = asyncio.ensure_future(tickets_for(wechat, redis_server).current())
        await called(wechat, "token", 1)
        redis_server.run("SET", LOCK_KEY, "another", "EX", 100)
        assert hold.hold is not None
        hold.hold.set()
        with pytest.raises(StillWaiting):
            await waiting
        assert redis_server.run("GET", LOCK_KEY) == "another"
        assert redis_server.run("GET", TOKEN_KEY) is None

    running(scenario)
    assert wechat.calls == {"token": 1}


@pytest.mark.parametrize(
    ("expires_in", "kept"), [(7200, 7100), (9999, 7100), (7199, 7099), (345, 245), (300, 200)]
)
def test_a_credential_is_kept_100_s_less_than_wechat_grants(
    wechat: Sandbox, redis_server: RedisServer, expires_in: int, kept: int
) -> None:
    body = b'{"ticket": "t", "expires_in": %d}' % expires_in
    wechat.faults["getticket"] = Fault(body=body)
    running(tickets_for(wechat, redis_server).current)
    assert kept - 2 <= redis_server.run("TTL", TICKET_KEY) <= kept


@pytest.mark.usefixtures("look_always")
def test_a_ticket_granted_for_less_is_not_asked_for_again_at_once(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["getticket"] = Fault(body=b'{"ticket": "t", "expires_in": 3000}')

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server)
        for _ in range(3):
            await tickets.current()
            await settled(tickets)

    running(scenario)
    assert wechat.calls["getticket"] == 1


@pytest.mark.usefixtures("look_always")
@pytest.mark.parametrize("shared", [True, False])
def test_no_caller_waits_while_an_expired_ticket_is_replaced(
    wechat: Sandbox, redis_server: RedisServer, shared: bool
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server if shared else None, expire=1, recheck=0)
        old = await tickets.current()
        wechat.rotate_ticket()
        hold = wechat.faults["getticket"] = Fault(hold=threading.Event())

        async def asked_again() -> bool:
            assert await tickets.current() == old
            return wechat.calls["getticket"] == 2

        deadline = time.monotonic() + 20
        while not await asked_again():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert await tickets.current() == old
        assert hold.hold is not None
        hold.hold.set()
        await settled(tickets)
        assert await tickets.current() == wechat.ticket != old

    running(scenario)


def test_the_ticket_in_hand_has_an_end(wechat: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets_module, "MARGIN", 0.0)

    async def scenario() -> None:
        tickets = tickets_for(wechat, expire=1)
        await tickets.current()
        wechat.faults["getticket"] = wechat.faults["token"] = Fault(errcode=40164)

        async def fails() -> bool:
            try:
                await tickets.current()
            except WeChatRefused:
                return True
            return False

        deadline = time.monotonic() + 20
        while not await fails():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    running(scenario)


@pytest.mark.usefixtures("look_always")
def test_after_a_refusal_wechat_is_left_alone_for_a_minute(wechat: Sandbox) -> None:
    wechat.faults["token"] = Fault(errcode=40125)

    async def scenario() -> None:
        tickets = tickets_for(wechat)
        for _ in range(1000):
            with pytest.raises(WeChatRefused):
                await tickets.current()
        assert 55 <= tickets.retry_after <= 60

    running(scenario)
    assert wechat.calls == {"token": 1}


def test_while_there_is_no_ticket_callers_have_the_error_at_once(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["token"] = Fault(errcode=40164)

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server)
        with pytest.raises(WeChatRefused):
            await tickets.current()
        before = redis_server.commands
        for _ in range(1000):
            with pytest.raises(WeChatRefused):
                await tickets.current()
        after = redis_server.commands
        assert after - before < 50  # a look every 0.5 s, not one for each caller

    running(scenario)
    assert wechat.calls == {"token": 1}


@pytest.mark.usefixtures("look_always")
def test_what_may_pass_is_tried_again_after_1_s_then_2_s(wechat: Sandbox) -> None:
    wechat.faults["token"] = Fault(errcode=-1)

    async def scenario() -> None:
        tickets = tickets_for(wechat)
        pauses = []
        for turn in range(1, 9):
            with pytest.raises(WeChatRefused):
                await tickets.current()
            assert wechat.calls["token"] == turn
            pauses.append(tickets._cool_down)
            tickets._ask_again_at = 0.0  # the pause is over
        assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
        del wechat.faults["token"]
        assert await tickets.current() == wechat.ticket
        assert tickets._cool_down == 0

    running(scenario)


def test_it_recovers_by_itself_within_the_pause(wechat: Sandbox) -> None:
    wechat.faults["token"] = Fault(status=502)

    async def scenario() -> None:
        tickets = tickets_for(wechat)
        with pytest.raises(WeChatUnreachable):
            await tickets.current()
        assert tickets.retry_after == 1
        del wechat.faults["token"]
        began = time.monotonic()
        while True:
            try:
                assert await tickets.current() == wechat.ticket
                break
            except SigningError:
                assert time.monotonic() < began + 5
                await asyncio.sleep(0.05)

    running(scenario)


@pytest.mark.usefixtures("look_always")
def test_during_the_pause_a_ticket_that_another_instance_got_is_used(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["token"] = Fault(errcode=40164)

    async def scenario() -> None:
        tickets = tickets_for(wechat, redis_server)
        with pytest.raises(WeChatRefused):
            await tickets.current()
        redis_server.run("SET", TICKET_KEY, "theirs", "EX", 7100)
        assert await tickets.current() == "theirs"

    running(scenario)


def test_an_error_raised_again_and_again_does_not_grow(wechat: Sandbox) -> None:
    wechat.faults["token"] = Fault(errcode=40164)

    async def scenario() -> None:
        tickets = tickets_for(wechat)
        lengths = set()
        for _ in range(50):
            try:
                await tickets.current()
            except SigningError as error:
                length, trace = 0, error.__traceback__
                while trace is not None:
                    length, trace = length + 1, trace.tb_next
                lengths.add(length)
        assert max(lengths) < 10

    running(scenario)


@pytest.mark.parametrize("how", ["killed", "paused"])
def test_with_redis_gone_from_the_start_pages_are_signed(
    wechat: Sandbox, own_redis: RedisServer, how: str
) -> None:
    own_redis.kill() if how == "killed" else own_redis.pause()
    assert running(tickets_for(wechat, own_redis).current) == wechat.ticket
    assert wechat.calls == {"token": 1, "getticket": 1}


@pytest.mark.usefixtures("look_always")
def test_with_redis_gone_later_the_ticket_in_hand_serves_without_delay(
    wechat: Sandbox, own_redis: RedisServer
) -> None:
    async def scenario() -> None:
        tickets = tickets_for(wechat, own_redis)
        ticket = await tickets.current()
        own_redis.pause()
        for _ in range(100):
            task = asyncio.ensure_future(tickets.current())
            await asyncio.sleep(0)
            assert task.done()
            assert task.result() == ticket

    running(scenario)


def test_the_second_look_up_of_a_failing_cold_start_waits_for_no_redis(
    wechat: Sandbox, own_redis: RedisServer
) -> None:
    own_redis.pause()
    wechat.faults["token"] = Fault(errcode=40164)

    async def scenario() -> None:
        tickets = tickets_for(wechat, own_redis)
        with pytest.raises(WeChatRefused):
            await tickets.current()
        for _ in range(100):
            with pytest.raises(WeChatRefused):
                await asyncio.wait_for(tickets.current(), 0.5)

    running(scenario)
