"""Credentials in Redis, or in this process.

Both caches have the same methods, for one thread at a time; all blocking, none for long.
What is kept is a plain string under a key with an expiry, so that other programs can read it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import LockError, WatchError
from redis.retry import Retry

from .credentials import is_credential
from .settings import GRANTED_LIFE, RedisSettings

log = logging.getLogger(__name__)
T = TypeVar("T")

REDIS_TIMEOUT: Final = 1.0
"""Seconds for one exchange with Redis."""
REDIS_PAUSE: Final = 2.0
"""Seconds for which an unreachable Redis is left alone."""
UNDATED_LIFE: Final = 60.0
"""Seconds for which a credential without an expiry is used after it was last seen in Redis."""
_POLL: Final = 0.05
"""Seconds between two tries to get the lock."""
_SET_IF_LONGER: Final = """
    if redis.call('pttl', KEYS[1]) < tonumber(ARGV[2]) then
        redis.call('set', KEYS[1], ARGV[1], 'px', ARGV[2])
    end
"""
_DROP: Final = """
    if redis.call('get', KEYS[1]) == ARGV[1] then redis.call('del', KEYS[1]) end
"""


@dataclass(frozen=True)
class Cached:
    """A credential and the moment, on the monotonic clock, until which it is kept."""

    value: str = field(repr=False)
    until: float
    dated: bool = True
    """False where the key had no expiry, or none of WeChat's: its age is anybody's guess."""

    @classmethod
    def lasting(cls, value: str, seconds: float, *, dated: bool = True) -> Cached:
        return cls(value, time.monotonic() + seconds, dated)

    def remaining(self) -> float:
        """Seconds, never below 0."""
        return max(0.0, self.until - time.monotonic())


class MemoryCache:
    """Credentials in this process alone."""

    state = "memory"
    trouble = ""

    def __init__(self) -> None:
        self._entries: dict[str, Cached] = {}

    def get(self, key: str) -> Cached | None:
        """What is kept under the key, if its time is not over."""
        entry = self._entries.get(key)
        return entry if entry and entry.remaining() > 0 else None

    def entries(self) -> list[tuple[str, Cached]]:
        """All that is kept, and under which key."""
        return [(key, entry) for key, entry in self._entries.items() if entry.remaining() > 0]

    def put(self, key: str, entry: Cached) -> None:
        """Keeps the credential."""
        self._entries[key] = entry

    def drop(self, key: str, value: str) -> None:
        """Forgets the credential if it is still this one."""
        if key in self._entries and self._entries[key].value == value:
            del self._entries[key]

    def acquire(self, *, wait: float) -> bool:
        """Whether it is this instance's turn to ask WeChat; waits for it up to `wait` seconds."""
        return True

    def renew(self) -> bool:
        """Whether it still is this instance's turn; if so, for as long as one call may take."""
        return True

    def release(self) -> None:
        """Ends this instance's turn."""


class RedisCache:
    """Credentials in Redis, shared with other instances.

    It also keeps what it last saw in this process: where Redis fails, that serves instead, and
    where Redis comes back empty, it is put back. No method raises an error of Redis's; the log
    has a warning when trouble begins and a line when it ends.
    """

    def __init__(self, settings: RedisSettings, *, lock_key: str, lease: float) -> None:
        self._settings = settings
        self._lock_key = lock_key
        self._lease = lease
        self._client = redis.Redis(
            host=settings.host,
            port=settings.port,
            db=settings.db,
            username=settings.username or None,
            password=settings.password or None,
            ssl=settings.tls,
            ssl_check_hostname=True,
            protocol=2,
            socket_timeout=REDIS_TIMEOUT,
            socket_connect_timeout=REDIS_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )
        self._memory = MemoryCache()
        self._unsaved: set[str] = set()
        self._lock: redis.lock.Lock | None = None
        self._trouble: dict[str, str] = {}
        self._leave_alone_until = 0.0
        self._refused = ""

    @property
    def trouble(self) -> str:
        """What does not work, and how Redis or redis-py words it; "" where all works."""
        return "; ".join(f"{what}: {cause}" for what, cause in self._trouble.items())

    @property
    def state(self) -> str:
        """Either "redis" or "unreachable"."""
        return "unreachable" if "reaching Redis" in self._trouble else "redis"

    def get(self, key: str) -> Cached | None:
        """What is kept under the key; what this process remembers where Redis does not have it."""
        mine = self._memory.get(key)
        try:
            theirs = self._attempt("reading from Redis", lambda: self._read(key))
        except _UnusableError:
            return mine
        if mine and key in self._unsaved and (not theirs or theirs.remaining() < mine.remaining()):
            self._save(key, mine, only_if_longer=True)
            return mine
        if mine and not theirs:
            self._restore()
            return self._memory.get(key)
        if theirs:
            self._memory.put(key, theirs)
            self._unsaved.discard(key)
        return theirs

    def put(self, key: str, entry: Cached) -> None:
        """Keeps the credential, in Redis only while it is this instance's turn."""
        self._memory.put(key, entry)
        self._save(key, entry)

    def drop(self, key: str, value: str) -> None:
        """Forgets the credential if it is still this one."""
        self._memory.drop(key, value)
        self._refused = value  # for a Redis that does not let it be dropped
        with suppress(_UnusableError):
            self._attempt("writing to Redis", lambda: self._client.eval(_DROP, 1, key, value))

    def acquire(self, *, wait: float) -> bool:
        """Whether it is this instance's turn to ask WeChat; waits for it up to `wait` seconds.

        Without Redis there is nobody to agree with, and it always is.
        """
        lock = self._client.lock(self._lock_key, timeout=self._lease, sleep=_POLL)
        try:
            acquired = self._attempt(
                "writing to Redis", lambda: lock.acquire(blocking=wait > 0, blocking_timeout=wait)
            )
        except _UnusableError:
            return True
        if acquired:
            self._lock = lock
        return bool(acquired)

    def renew(self) -> bool:
        """Whether it still is this instance's turn; if so, for as long as one call may take."""
        if self._lock is None:
            return True
        try:
            self._attempt("writing to Redis", self._lock.reacquire)
        except _UnusableError:
            return True
        except LockError:
            return False
        return True

    def release(self) -> None:
        """Ends this instance's turn, and no other's."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with suppress(_UnusableError, LockError):
                self._attempt("writing to Redis", lock.release)

    def _restore(self) -> None:
        """Puts everything back that Redis lost, marked as old by its remaining life, so that
        WeChat is asked whether the ticket is still good."""
        old = self._settings.expire - self._settings.recheck
        for key, entry in self._memory.entries():
            life = min(entry.remaining(), old) if old > 0 else entry.remaining()
            aged = Cached.lasting(entry.value, life)
            self._memory.put(key, aged)
            self._save(key, aged, only_if_longer=True)

    def _read(self, key: str) -> Cached | None:
        # No transaction: a Redis that is out of memory refuses those, even to read. The life
        # first: where the key changes in between, the newer value gets the shorter life.
        with self._client.pipeline(transaction=False) as pipe:
            pipe.pttl(key)
            pipe.get(key)
            life, value = pipe.execute(raise_on_error=False)
        if isinstance(value, redis.ResponseError) and str(value).startswith("WRONGTYPE"):
            log.warning("the Redis key %s does not hold a string; it will be replaced", key)
            return None
        for answer in (value, life):
            if isinstance(answer, Exception):
                raise answer
        text = value.decode("ascii", "replace") if value is not None else ""
        if not is_credential(text) or text == self._refused:
            return None
        # WeChat grants no more: whoever wrote a longer life did not get it from there.
        if 0 <= life <= GRANTED_LIFE * 1000:
            return Cached.lasting(text, life / 1000)
        return Cached.lasting(text, UNDATED_LIFE, dated=False)

    def _save(self, key: str, entry: Cached, *, only_if_longer: bool = False) -> None:
        self._unsaved.add(key)
        with suppress(_UnusableError):
            self._attempt("writing to Redis", lambda: self._write(key, entry, only_if_longer))
            self._unsaved.discard(key)

    def _write(self, key: str, entry: Cached, only_if_longer: bool) -> None:
        life = max(1, int(entry.remaining() * 1000))
        if only_if_longer:
            self._client.eval(_SET_IF_LONGER, 1, key, entry.value, life)
            return
        pipe: Any
        with self._client.pipeline() as pipe:
            if self._lock is not None:
                pipe.watch(self._lock_key)
                if not self._lock.owned():
                    return
                pipe.multi()
            pipe.set(key, entry.value, px=life)
            with suppress(WatchError):
                pipe.execute()

    def _attempt(self, what: str, operation: Callable[[], T]) -> T:
        """The operation's result. Raises _UnusableError where Redis has none to give."""
        if time.monotonic() < self._leave_alone_until:
            raise _UnusableError
        try:
            result = operation()
        except LockError:
            raise
        except (redis.ConnectionError, redis.TimeoutError) as error:
            self._leave_alone_until = time.monotonic() + REDIS_PAUSE
            self._begin("reaching Redis", error)
            raise _UnusableError from None
        except redis.RedisError as error:
            self._begin(what, error)
            raise _UnusableError from None
        for over in ("reaching Redis", what):
            if self._trouble.pop(over, None):
                log.info("%s works again", over)
        return result

    def _begin(self, what: str, error: redis.RedisError) -> None:
        # redis-py and Redis repeat the arguments of a failed command, credentials among them.
        reason = str(error).rpartition("caused error: ")[2].partition(", with args")[0]
        cause = f"{type(error).__name__}: {reason}"
        if what not in self._trouble:
            place = f"{self._settings.host}:{self._settings.port}"
            log.warning("%s at %s fails, going on without: %s", what, place, cause)
        self._trouble[what] = cause


class _UnusableError(Exception):
    """Redis did not do what it was asked; the reason is in the log."""
