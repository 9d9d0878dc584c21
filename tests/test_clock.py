from __future__ import annotations

import sys
import threading
import time

import pytest

from wechat_sign.clock import STEP, SystemClock, boottime


class Hands:
    """A steady clock and a wall clock, which only the test moves."""

    def __init__(self) -> None:
        self.steady, self.wall = 1000.0, 1_700_000_000.0
        self.clock = SystemClock(lambda: self.steady, lambda: self.wall)

    def move(self, steady: float, wall: float) -> None:
        self.steady += steady
        self.wall += wall


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the monotonic clock does not stop")
def test_it_goes_on_while_the_machine_sleeps() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    now = boottime()
    assert before <= now <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_what_a_paused_machine_missed_has_passed() -> None:
    hands = Hands()
    began = hands.clock()
    hands.move(10, 10 + 3 * 3600)
    assert hands.clock() - began == 10 + 3 * 3600
    assert hands.clock.steps == 1
    hands.move(10, 10)
    assert hands.clock() - began == 20 + 3 * 3600
    assert hands.clock.steps == 1


def test_a_wall_clock_that_is_set_back_is_a_step_but_time_goes_on() -> None:
    hands = Hands()
    began = hands.clock()
    hands.move(10, 10 - 3600)
    assert hands.clock() - began == 10
    assert hands.clock.steps == 1


def test_a_wall_clock_that_is_corrected_bit_by_bit_is_no_step_before_a_minute() -> None:
    hands = Hands()
    for _ in range(int(STEP)):
        hands.move(1000, 1001)
        hands.clock()
    assert hands.clock.steps == 0
    hands.move(1000, 1001)
    hands.clock()
    assert hands.clock.steps == 1


def test_two_threads_that_see_a_step_at_once_count_one() -> None:
    hands = Hands()
    began = hands.clock()
    hands.move(0, 3600)
    both = threading.Barrier(8)

    def look() -> None:
        both.wait()
        hands.clock()

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hands.clock() - began == 3600
    assert hands.clock.steps == 1
