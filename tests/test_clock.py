from __future__ import annotations

import sys
import time

import pytest
from harness import TICKET_KEY, Fault, RedisServer, Sandbox, instance_for

from wechat_sign.clock import STEP, SystemClock, boottime
from wechat_sign.errors import WeChatUnreachable


class Hands:
    """A steady clock and a wall clock, which only the test moves."""

    def __init__(self) -> None:
        self.steady, self.wall = 1000.0, 1_700_000_000.0
        self.clock = SystemClock(lambda: self.steady, lambda: self.wall)
        self.began = self.clock()

    def passed(self, steady: float, wall: float) -> float:
        """Seconds since the beginning, after both moved so far."""
        self.steady += steady
        self.wall += wall
        return self.clock() - self.began


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the monotonic clock does not stop")
def test_it_goes_on_while_the_machine_sleeps() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= boottime() <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_it_follows_the_wall_clock_over_more_than_a_minute_and_never_back() -> None:
    paused = Hands()
    assert paused.passed(10, 10 + 3 * 3600) == 10 + 3 * 3600
    assert paused.passed(10, 10) == 20 + 3 * 3600
    set_back = Hands()
    assert set_back.passed(10, -3600) == 10
    assert set_back.passed(10, 3600) == 20
    assert Hands().passed(10, 10 + STEP) == 10
    assert Hands().passed(10, 11 + STEP) == 11 + STEP


def test_a_paused_machine_neither_serves_what_died_meanwhile_nor_puts_it_back(
    wechat: Sandbox, redis_server: RedisServer
) -> None:
    hands = Hands()
    one = instance_for(wechat, redis_server, clock=hands.clock, recheck=0)
    dead = one.look()
    wechat.rotate_ticket()
    redis_server.run("FLUSHALL")  # all is over there
    hands.wall += 3 * 3600
    wechat.faults["token"] = Fault(hang_up=True)
    with pytest.raises(WeChatUnreachable):
        one.look()
    assert not redis_server.run("EXISTS", TICKET_KEY)
    wechat.faults.clear()
    hands.steady += 2
    assert one.look() == redis_server.run("GET", TICKET_KEY) == wechat.ticket != dead
