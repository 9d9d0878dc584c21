"""A circuit breaker around Redis."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, TypeVar

import redis
from redis.exceptions import RedisClusterException

from .clock import Clock
from .deadline import Overdue
from .logs import printable

log = logging.getLogger(__name__)
T = TypeVar("T")

REDIS_PAUSE: Final = 2.0
"""Seconds for which an unreachable Redis is left alone."""
READING, WRITING, REACHING = "reading from Redis", "writing to Redis", "reaching Redis"
"""What may not work, as the log says it."""


class Unavailable(Exception):
    """Redis did not do what it was asked; the reason is in the log."""


def words_of(error: Exception) -> str:
    """The error's text without the arguments of the failed command, which redis-py and Redis
    repeat, credentials among them, and without a Sentinel's whole connection."""
    reason = str(error).rpartition("caused error: ")[2].partition(", with args")[0]
    return reason.partition(" : <")[0]


class CircuitBreaker:
    """Leaves a Redis alone that can't be reached, and logs when trouble begins and when it ends.
    A class because it carries what is wrong, in `trouble`, and until when Redis is left alone."""

    def __init__(self, place: str, clock: Clock, redact: Callable[[str], str]) -> None:
        self._place = place
        self._redact = redact
        self._clock = clock
        self._open_until = 0.0
        self.trouble: dict[str, str] = {}

    def call(self, what: str, operation: Callable[[], T]) -> T:
        """The operation's result. Raises Unavailable where Redis gives none, or is left alone."""
        if self._clock() < self._open_until:
            raise Unavailable
        try:
            result = operation()
        except Exception as error:  # also what redis-py raises for a reply that makes no sense
            if not isinstance(error, redis.ResponseError):
                self._open_until = self._clock() + REDIS_PAUSE
                what = REACHING
            self._failed(what, error)
            raise Unavailable from None
        self._works(REACHING)
        if result is not False:
            self._works(what)
        return result

    def _works(self, what: str) -> None:
        if what in self.trouble:
            del self.trouble[what]
            log.info("%s works again", what)

    def _failed(self, what: str, error: Exception) -> None:
        # What makes no sense in a reply is repeated, too; credentials may be among it.
        shown = redis.ConnectionError | redis.TimeoutError | redis.ResponseError
        shown |= RedisClusterException | Overdue
        nonsense = isinstance(error, redis.InvalidResponse) or not isinstance(error, shown)
        cause = type(error).__name__ + (
            "" if nonsense else f": {printable(self._redact(words_of(error)))}"
        )
        if what not in self.trouble:
            log.warning("%s at %s fails, going on without: %s", what, self._place, cause)
        self.trouble[what] = cause
