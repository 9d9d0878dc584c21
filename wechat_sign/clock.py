"""Time, as everything here counts it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

Clock = Callable[[], float]
"""Seconds since some moment, which never go back."""
STEP: Final = 60.0
"""Seconds by which the wall clock must run ahead of the steady one before time was skipped."""
_BOOTTIME: Final = getattr(time, "CLOCK_BOOTTIME", None)


def boottime() -> float:
    """Seconds that go on while the machine sleeps; those of `time.monotonic` do not on Linux."""
    return time.monotonic() if _BOOTTIME is None else time.clock_gettime(_BOOTTIME)


class SystemClock:
    """Seconds that go on while the machine sleeps, and jump where it stood still without knowing:
    a virtual machine that was paused is told the time of day afterwards, and nothing else.

    A class because it carries how far the wall clock was ahead, which only grows. For several
    threads.
    """

    def __init__(
        self, steady: Callable[[], float] = boottime, wall: Callable[[], float] = time.time
    ) -> None:
        self._steady, self._wall = steady, wall
        self._apart = self._first = wall() - steady()

    def __call__(self) -> float:
        now = self._steady()
        apart = self._wall() - now
        if apart > self._apart + STEP:
            self._apart = apart
        return now + self._apart - self._first
