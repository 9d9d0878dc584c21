"""An end for calls that block: a socket's own time-out begins anew with every byte."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


class Overdue(TimeoutError):
    """A call did not end in time, and was left behind."""


def within(seconds: float, call: Callable[[], T], cut: Callable[[], object]) -> T:
    """The call's result, or what it raises. It runs in a thread of its own, because a thread
    can't be cancelled: where it does not end within `seconds`, `cut` is to close what it waits
    for, in another thread still, and Overdue is raised whether that ends it or not."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # it is the caller's
            outcome.set_exception(error)

    threading.Thread(target=run, name="call", daemon=True).start()
    if not wait({outcome}, seconds).done:
        threading.Thread(target=cut, name="cut", daemon=True).start()
        raise Overdue(f"timeout: not done within {seconds:g} s")
    return outcome.result()
