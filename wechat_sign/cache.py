"""Credentials in Redis, or in this process. All methods block, none for long."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from .breaker import REACHING, READING, WRITING, CircuitBreaker, Unavailable
from .clock import Clock, SystemClock
from .credentials import Credential
from .deadline import Deadline, Overdue
from .errors import LockedElsewhere
from .logs import redacted
from .settings import Settings

if TYPE_CHECKING:
    from .store import RedisStore

T = TypeVar("T")


class Cache:
    """Credentials in Redis, shared with other instances; in this process alone where the settings
    name no Redis. No method raises an error of Redis's. Raises ConfigError for a url that
    redis-py does not take.

    A class because it carries a mirror: what this process last saw or wrote. The mirror serves
    where there is no Redis or it fails; what Redis lost or did not take, `sync` writes back.
    For one thread at a time, but for `release_lock`.
    """

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self._store: RedisStore | None = None
        pause = settings.limits.redis_pause
        self._breaker = CircuitBreaker(settings.redis.place, self.clock, self._explain, pause=pause)
        if settings.redis.is_set:
            from . import store  # redis-py takes 6 MB

            self._new_store = partial(store.RedisStore, settings, self.clock)
            self._store, self._words_for = self._new_store(), store.explain
        self._deadline = Deadline(settings.limits.redis_deadline)
        self._passwords = settings.redis.passwords
        self._back_off_key = settings.back_off_key
        self._probe_key = settings.probe_key
        self._mirror: dict[str, Credential] = {}
        self._dirty: set[str] = set()
        self._revoked: deque[str] = deque(maxlen=16)

    @property
    def trouble(self) -> str:
        """What does not work, and how Redis or redis-py words it; "" where all works."""
        return "; ".join(f"{what}: {cause}" for what, cause in self._breaker.trouble.items())

    @property
    def state(self) -> str:
        """ "redis" where credentials are shared; "unreachable", or "failing" where Redis answers
        but does not do all that it is asked; "memory" where none is set."""
        if self._store is None:
            return "memory"
        if REACHING in self._breaker.trouble:
            return "unreachable"
        return "failing" if self._breaker.trouble else "redis"

    @property
    def loss(self) -> str:
        """What is lost where Redis runs no scripts; "" where nothing is."""
        return self._store.loss if self._store is not None else ""

    def where(self) -> str:
        """Host and port of the Redis that has the credentials, where that is to be found out."""
        with suppress(Unavailable):
            return self._ask(READING, lambda store: store.where())
        return ""

    def get(self, key: str) -> Credential | None:
        """What Redis has; the mirror's where Redis fails, has none, or has one that is less fresh
        or ends sooner than what it did not take."""
        mine = self._mirror.get(key)
        if mine is not None and self.clock() >= mine.expires:
            del self._mirror[key]
            mine = None
        known = None if key in self._dirty else mine
        try:
            theirs = self._ask(READING, lambda store: store.read(key, known))
        except Unavailable:
            return mine
        if theirs is None or theirs.value in self._revoked:
            self._dirty.add(key)
            return mine
        if mine is not None and key in self._dirty and self._rank(mine) > self._rank(theirs):
            return mine
        if mine is not None and theirs.usable_until >= mine.usable_until and self._is_fresh(theirs):
            self._revoke(mine.value, unless=theirs.value)
        self._mirror[key] = theirs
        self._dirty.discard(key)
        return theirs

    def _is_fresh(self, credential: Credential) -> bool:
        return self.clock() < credential.fresh_until

    def _rank(self, credential: Credential) -> tuple[bool, float]:
        return self._is_fresh(credential), credential.expires

    def _revoke(self, value: str, *, unless: str) -> None:
        """What was replaced by a newer one does not come back, whoever writes it."""
        if value != unless and value not in self._revoked:
            self._revoked.append(value)

    def put(self, key: str, credential: Credential) -> None:
        """Keeps the credential; in Redis with the lock, or where nothing newer is there. What it
        replaces does not come back, whoever writes it, until WeChat grants it again."""
        if credential.value in self._revoked:
            self._revoked.remove(credential.value)
        self._revoke(self._mirror.get(key, credential).value, unless=credential.value)
        self._write(key, credential)

    def _write(self, key: str, credential: Credential) -> None:
        self._mirror[key] = credential
        self._dirty.add(key)
        with suppress(Unavailable):
            self._ask(WRITING, lambda store: store.write(key, credential))
            self._dirty.discard(key)

    def drop(self, key: str, value: str) -> None:
        """Forgets the credential, for good: Redis may not let it go, or get it back."""
        self._revoked.append(value)
        if key in self._mirror and self._mirror[key].value == value:
            del self._mirror[key]
        with suppress(Unavailable):
            self._ask(WRITING, lambda store: store.delete(key, value))

    def sync(self, key: str) -> None:
        """Writes back what Redis lost or did not take, where nothing newer is there by now."""
        if key in self._dirty and key in self._mirror:
            self._write(key, self._mirror[key])
        elif WRITING in self._breaker.trouble:  # who writes nothing for long must notice the end
            with suppress(Unavailable):
                self._ask(WRITING, lambda store: store.note(self._probe_key, "", 1.0))

    @contextmanager
    def lock(self, *, wait: float) -> Iterator[bool]:
        """Gives whether the lock, under which one instance at a time asks WeChat, was free within
        `wait` seconds. Without Redis there is nobody to lock out, so it is True."""
        mine = True
        with suppress(Unavailable):
            mine = self._ask(WRITING, lambda store: store.acquire(wait))
        try:
            yield mine
        finally:
            self.release_lock()

    def extend_lock(self) -> None:
        """Holds it for as long as one more call may take. Raises LockedElsewhere if it is lost."""
        if self._store is not None and self._store.locked:
            with suppress(Unavailable):
                if not self._ask(WRITING, lambda store: store.extend()):
                    raise LockedElsewhere

    def release_lock(self) -> None:
        """Ends it where this process may hold it; from any thread, for a stop in mid-call."""
        if self._store is not None and self._store.maybe_locked:
            with suppress(Unavailable):
                self._ask(WRITING, lambda store: store.release())

    def share_failure(self, text: str, pause: float) -> None:
        """Tells the other instances, for `pause` seconds, why WeChat need not be asked."""
        with suppress(Unavailable):
            self._ask(WRITING, lambda store: store.note(self._back_off_key, text, pause))

    def shared_failure(self) -> tuple[str, float]:
        """What an instance told, and for how many seconds more; ("", 0.0) where none did."""
        with suppress(Unavailable):
            return self._ask(READING, lambda store: store.noted(self._back_off_key))
        return "", 0.0

    def forget_failure(self) -> None:
        """Tells the others that WeChat may be asked again."""
        with suppress(Unavailable):
            self._ask(WRITING, lambda store: store.forget(self._back_off_key))

    def _explain(self, error: Exception) -> tuple[bool, str]:
        reached, words = self._words_for(error)
        # A Redis or a proxy may repeat what it was sent.
        known = [credential.value for credential in self._mirror.values()]
        return reached, redacted(words, [*self._passwords, *known, *self._revoked])

    def _ask(self, what: str, operation: Callable[[RedisStore], T]) -> T:
        store = self._store
        if store is None:
            raise Unavailable
        return self._breaker.call(what, partial(self._in_time, store, operation))

    def _in_time(self, store: RedisStore, operation: Callable[[RedisStore], T]) -> T:
        try:
            return self._deadline.call(partial(operation, store), store.cut)
        except Overdue:
            self._store = self._new_store()  # the other may still be at it, like a slow instance
            raise
