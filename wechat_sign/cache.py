"""Redis as far as there is one and it works. No method raises an error of Redis's."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from .clock import Clock, SystemClock
from .credentials import Credential
from .errors import ConfigError, redis_advice
from .logs import redacted, sanitize
from .settings import Settings
from .texts import Text

if TYPE_CHECKING:
    from .store import Found, RedisStore

log = logging.getLogger(__name__)
T = TypeVar("T")
Call = Callable[["RedisStore"], T]
REACHING, READING = Text("reaching Redis"), Text("reading from Redis")
WRITING = Text("writing to Redis")
"""What may not work, as the log says it."""


class Cache:
    """The account's keys in Redis. Raises ConfigError for a url that redis-py does not take. It is
    for one thread at a time; `release_lock`, `close` and what is only read are for any."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self._settings = settings
        self._store: RedisStore | None = None
        if settings.redis.is_set:
            from . import store  # redis-py takes 6 MB

            self._store = store.RedisStore(settings, self.clock)
        self._left_alone_until = -math.inf
        self._attempting = self._asked = False
        self._causes, self._failed = dict[Text, str](), dict[Text, str]()
        """What does not work, and why: up to the last look, and in this one."""

    def successor(self) -> Cache:
        """Another one, with connections of its own, for when a look with this one does not end."""
        try:
            other = Cache(self._settings, self.clock)
        except ConfigError:  # a file that the url names is gone since the start
            other = self
        other._causes = self._causes | self._failed
        if self._attempting:
            other._fails(REACHING, "timeout: a look at Redis does not end")
        return other

    @property
    def is_left_alone(self) -> bool:
        """Whether Redis is not asked just now."""
        return self.clock() < self._left_alone_until

    def close(self) -> None:
        """Closes the connections, so that what another thread waits for ends."""
        if self._store is not None:
            with suppress(Exception):  # what the other thread does meanwhile makes it fail oddly
                self._store.client.close()

    @property
    def trouble(self) -> list[Text]:
        """What does not work, and how Redis or redis-py words it."""
        causes = self._causes | self._failed
        return [Text("{place}: {text}", place=what, text=why) for what, why in causes.items()]

    @property
    def state(self) -> str:
        """ "redis" where credentials are shared; "unreachable"; "failing" where it answers and does
        not do all that it is asked; "memory" where there is none."""
        if self._store is None:
            return "memory"
        causes = self._causes | self._failed
        return "unreachable" if REACHING in causes else "failing" if causes else "redis"

    def read(self) -> Found | None:
        """What Redis has; None where it can't be read."""
        return self.attempt(READING, lambda store: store.read(), None)

    def write(self, key: str, new: Credential, *, only_if_absent: bool = False) -> Credential:
        """Gives the credential, which tells whether Redis has it now."""
        in_redis = self.attempt(
            WRITING, lambda store: store.write(key, new, only_if_absent), False, sent=new.value
        )
        return replace(new, in_redis=in_redis)

    def delete(self, key: str, value: str) -> None:
        """Deletes the credential where it is still there."""
        self.attempt(WRITING, lambda store: store.delete(key, value), False)

    @contextmanager
    def lock(self) -> Iterator[float | None]:
        """Gives until when this instance may ask WeChat and write: without Redis it may ask now,
        and write nothing. Gives None where another has the lock."""
        began = self.clock()
        lease = self.attempt(WRITING, lambda store: store.acquire(), None)
        try:
            yield None if lease == 0 else began + (lease or 0.0)
        finally:
            if lease:
                self.release_lock()

    def release_lock(self) -> None:
        """Ends the lock where this process has it; from any thread, for a stop in mid-call."""
        self.attempt(WRITING, lambda store: store.release(), False)

    def settle(self) -> None:
        """Ends a look, and tells what works again: of writing, by taking the lock once more."""
        if WRITING in self._causes and WRITING not in self._failed:
            with self.lock():
                pass
        if self._asked and not self.is_left_alone:
            for what in self._causes.keys() - self._failed.keys():
                log.info("%s works again", what)
            self._causes = {}
        self._causes, self._failed, self._asked = self._causes | self._failed, {}, False

    def attempt(self, what: Text, call: Call[T], otherwise: T, *, sent: str = "") -> T:
        """What the call gives, or `otherwise`. No log line shows what was `sent`."""
        if self._store is None or self.is_left_alone:
            return otherwise
        self._attempting = self._asked = True
        try:
            return call(self._store)
        except Exception as error:  # also what redis-py raises for a reply that makes no sense
            reached, words = self._store.explain(error)
            words = sanitize(redacted(words, [*self._settings.redis.passwords, sent]))
            cause = type(error).__name__ + (f": {words}" if words else "")
            self._fails(what if reached else REACHING, cause)
            return otherwise
        finally:
            self._attempting = False

    def _fails(self, what: Text, cause: str) -> None:
        """Notes a failure; logs the first of its kind. Who does not answer is left alone."""
        if what == REACHING:
            self._left_alone_until = self.clock() + self._settings.limits.redis_pause
        if what not in self._causes | self._failed:
            shown = (what, self._settings.redis.place, cause, redis_advice(cause).both)
            log.warning("%s at %s fails, going on without: %s. What to do: %s", *shown)
        self._failed[what] = cause
