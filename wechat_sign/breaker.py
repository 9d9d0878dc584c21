"""A circuit breaker around Redis."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from .clock import Clock
from .errors import redis_advice
from .logs import printable

log = logging.getLogger(__name__)
T = TypeVar("T")

READING, WRITING, REACHING = "reading from Redis", "writing to Redis", "reaching Redis"
"""What may not work, as the log says it."""


class Unavailable(Exception):
    """Redis did not do what it was asked; the reason is in the log."""


class CircuitBreaker:
    """Leaves a Redis alone that can't be reached, and logs when trouble begins and when it ends.
    A class because it carries what is wrong, in `trouble`, and until when Redis is left alone.
    `explain` tells of an error whether Redis was reached, and the words for it; `pause` is in
    seconds."""

    def __init__(
        self,
        place: str,
        clock: Clock,
        explain: Callable[[Exception], tuple[bool, str]],
        *,
        pause: float,
    ) -> None:
        self._place = place
        self._pause = pause
        self._clock = clock
        self._explain = explain
        self._open_until = 0.0
        self.trouble: dict[str, str] = {}

    def call(self, what: str, operation: Callable[[], T]) -> T:
        """The operation's result. Raises Unavailable where Redis gives none, or is left alone."""
        if self._clock() < self._open_until:
            raise Unavailable
        try:
            result = operation()
        except Exception as error:  # also what redis-py raises for a reply that makes no sense
            reached, words = self._explain(error)
            if not reached:
                self._open_until = self._clock() + self._pause
                what = REACHING
            self._failed(what, type(error).__name__ + (f": {printable(words)}" if words else ""))
            raise Unavailable from None
        self._works(REACHING)
        if result is not False:
            self._works(what)
        return result

    def _works(self, what: str) -> None:
        if what in self.trouble:
            del self.trouble[what]
            log.info("%s works again", what)

    def _failed(self, what: str, cause: str) -> None:
        if what not in self.trouble:
            advice = redis_advice(cause)
            log.warning(
                "%s at %s fails, going on without: %s. What to do: %s",
                *(what, self._place, cause, advice),
            )
        self.trouble[what] = cause
