"""Time, as everything here counts it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

STEP: Final = 60.0
"""Seconds by which the wall clock must leave the steady one before that counts as a step."""
_BOOTTIME: Final = getattr(time, "CLOCK_BOOTTIME", None)


class Clock(Protocol):
    """Seconds since some moment, which never go back."""

    steps: int
    """How often more time has passed, or less, than the seconds tell."""

    def __call__(self) -> float: ...


def boottime() -> float:
    """Seconds that go on while the machine sleeps; those of `time.monotonic` do not on Linux."""
    return time.monotonic() if _BOOTTIME is None else time.clock_gettime(_BOOTTIME)


class SystemClock:
    """Seconds that go on while the machine sleeps, and jump where it stood still without knowing:
    a virtual machine that was paused is told the time of day afterwards, and nothing else.

    A class because it carries what was skipped. For several threads.
    """

    def __init__(
        self, steady: Callable[[], float] = boottime, wall: Callable[[], float] = time.time
    ) -> None:
        self._steady = steady
        self._wall = wall
        self._apart = wall() - steady()
        self._skipped = 0.0
        self._lock = threading.Lock()
        self.steps = 0

    def __call__(self) -> float:
        now = self._steady()
        if abs(self._wall() - now - self._apart) > STEP:
            self._step()
        return now + self._skipped

    def _step(self) -> None:
        with self._lock:
            step = self._wall() - self._steady() - self._apart
            if abs(step) > STEP:  # no other thread was first
                self._apart += step
                self._skipped += max(0.0, step)
                self.steps += 1
