from __future__ import annotations

import sys
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
    hands.move(10, 10)
    assert hands.clock() - began == 20 + 3 * 3600


def test_a_wall_clock_that_is_set_back_changes_nothing_nor_does_its_way_forth_again() -> None:
    hands = Hands()
    began = hands.clock()
    for wall in (-3600, 3600):
        hands.move(10, wall)
        hands.clock()
    assert hands.clock() - began == 20


@pytest.mark.parametrize(("ahead", "passed"), [(STEP, 10), (STEP + 1, 10 + STEP + 1)])
def test_a_wall_clock_that_is_corrected_bit_by_bit_skips_nothing_before_a_minute(
    ahead: float, passed: float
) -> None:
    hands = Hands()
    began = hands.clock()
    hands.move(10, 10 + ahead)
    assert hands.clock() - began == passed
