"""An end for calls that block: a socket's own time-out begins anew with every byte."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Final, TypeVar

T = TypeVar("T")

MOST_LEFT_BEHIND: Final = 16
"""Calls that were not ended by cutting them off; while there are as many, no other begins."""


class Overdue(TimeoutError):
    """A call did not end in time, and was left behind."""


class Deadline:
    """Has calls end within so many seconds. A class because it carries what was left behind."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._left_behind: list[threading.Thread] = []

    def call(self, call: Callable[[], T], cut: Callable[[], object]) -> T:
        """The call's result, or what it raises. It runs in a thread of its own, because a thread
        can't be cancelled: where it does not end in time, `cut` is to close what it waits for, in
        another thread still, and Overdue is raised whether that ends it or not."""
        self._left_behind = [thread for thread in self._left_behind if thread.is_alive()]
        if len(self._left_behind) >= MOST_LEFT_BEHIND:
            raise Overdue(f"timeout: {len(self._left_behind)} calls hang")
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(call())
            except BaseException as error:  # it is the caller's
                outcome.set_exception(error)

        thread = threading.Thread(target=run, name="call", daemon=True)
        thread.start()
        if not wait({outcome}, self._seconds).done:
            self._left_behind.append(thread)
            with suppress(RuntimeError):  # no thread is to be had
                threading.Thread(target=cut, name="cut", daemon=True).start()
            raise Overdue(f"timeout: not done within {self._seconds:g} s")
        return outcome.result()
