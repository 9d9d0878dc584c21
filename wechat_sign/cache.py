"""Credentials in Redis, or in this process.

A credential is a plain string under a key with an expiry, so that other programs can read it: the
TTL tells its life, and nothing else. That WeChat was asked lately is told by a marker beside the
ticket, which names it by its digest. All methods block, none for long; for one thread at a time.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import LockError
from redis.retry import Retry

from .credentials import is_credential
from .errors import LockedElsewhere
from .settings import GRANTED_LIFE, Settings

log = logging.getLogger(__name__)
T = TypeVar("T")
Clock = Callable[[], float]

UNDATED_LIFE: Final = 60.0
"""Seconds for which a credential without an expiry is used after it was last seen in Redis."""
REDIS_TIMEOUT: Final = 1.0
"""Seconds for one exchange with Redis."""
REDIS_PAUSE: Final = 2.0
"""Seconds for which an unreachable Redis is left alone."""
READING, WRITING, REACHING = "reading from Redis", "writing to Redis", "reaching Redis"
"""What may not work, as the log says it."""
_POLL: Final = 0.05
"""Seconds between two tries to get the lock."""

# Whoever holds the lock writes. Without it (Redis was away, or the lease is over) a late answer
# must not replace a newer one: one that WeChat confirmed lately, or, where this one was not
# confirmed lately itself, one that lives longer. The marker is the digest of the ticket, and the
# milliseconds for which WeChat granted it beyond its TTL.
_PUT: Final = """
    local function get(key)
        local value = redis.pcall('get', key)
        return type(value) == 'string' and value
    end
    local there = get(KEYS[1])
    local confirmed = there and (get(KEYS[2]) or ''):sub(1, 40) == redis.sha1hex(there)
    local fresh = tonumber(ARGV[3]) > 0
    local longer = not fresh and redis.call('pttl', KEYS[1]) >= tonumber(ARGV[2])
    if get(KEYS[3]) ~= ARGV[5] and (confirmed or longer) then return 0 end
    local done = redis.pcall('set', KEYS[1], ARGV[1], 'px', ARGV[2])
    if not done.err and fresh then
        local marker = redis.sha1hex(ARGV[1]) .. ' ' .. ARGV[4]
        done = redis.pcall('set', KEYS[2], marker, 'px', ARGV[3])
    end
    return done
"""
_DROP: Final = """
    return redis.pcall('get', KEYS[1]) == ARGV[1] and redis.pcall('del', KEYS[1]) or 0
"""
_BOOTTIME: Final = getattr(time, "CLOCK_BOOTTIME", None)


def boottime() -> float:
    """Seconds that go on while the machine sleeps; those of `time.monotonic` do not on Linux."""
    return time.monotonic() if _BOOTTIME is None else time.clock_gettime(_BOOTTIME)


@dataclass(frozen=True)
class Credential:
    """A token or a ticket, and three moments on the clock.

    The cache lets it go when it `expires`; WeChat granted it until `usable_until`, which is the
    same where nothing more is known. Until `fresh_until` nobody need ask WeChat whether it is
    still the one.
    """

    value: str = field(repr=False)
    expires: float
    usable_until: float
    fresh_until: float = 0.0


class Cache:
    """Credentials in Redis, shared with other instances; in this process alone where the settings
    name no Redis. No method raises an error of Redis's.

    A class because it carries a mirror: what this process last saw or wrote. The mirror serves
    where there is no Redis or it fails; what Redis lost or did not take, `sync` writes back.
    """

    def __init__(self, settings: Settings, clock: Clock = boottime) -> None:
        self._clock = clock
        self._store = RedisStore(settings, clock) if settings.redis.host else None
        self._breaker = CircuitBreaker(f"{settings.redis.host}:{settings.redis.port}", clock)
        self._mirror: dict[str, Credential] = {}
        self._dirty: set[str] = set()
        self._revoked: deque[str] = deque(maxlen=16)

    @property
    def trouble(self) -> str:
        """What does not work, and how Redis or redis-py words it; "" where all works."""
        return "; ".join(f"{what}: {cause}" for what, cause in self._breaker.trouble.items())

    @property
    def state(self) -> str:
        """Either "memory", "redis" or "unreachable"."""
        if self._store is None:
            return "memory"
        return "unreachable" if REACHING in self._breaker.trouble else "redis"

    def get(self, key: str) -> Credential | None:
        """What Redis has; the mirror's where Redis fails, has none, or has one that is less fresh
        or ends sooner than what it did not take."""
        mine = self._mirror.get(key)
        if mine is not None and self._clock() >= mine.expires:
            mine = None
        try:
            theirs = self._ask(READING, lambda store: store.read(key))
        except Unavailable:
            return mine
        if theirs is None or theirs.value in self._revoked:
            self._dirty.add(key)
            return mine
        if mine is not None and key in self._dirty and self._rank(mine) > self._rank(theirs):
            return mine
        self._mirror[key] = theirs
        self._dirty.discard(key)
        return theirs

    def _rank(self, credential: Credential) -> tuple[bool, float]:
        return self._clock() < credential.fresh_until, credential.expires

    def put(self, key: str, credential: Credential) -> None:
        """Keeps the credential; in Redis with the lock, or where nothing newer is there."""
        if credential.value in self._revoked:
            self._revoked.remove(credential.value)
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

    def sync(self) -> None:
        """Writes back what Redis lost or did not take, where nothing newer is there by now."""
        for key in self._dirty & self._mirror.keys():
            self.put(key, self._mirror[key])

    @contextmanager
    def lock(self, *, wait: float) -> Iterator[None]:
        """Holds the lock under which one instance at a time asks WeChat.

        Raises LockedElsewhere where it was not free within `wait` seconds. Without Redis there is
        nobody to lock out, and nothing is held.
        """
        with suppress(Unavailable):
            if not self._ask(WRITING, lambda store: store.acquire(wait)):
                raise LockedElsewhere
        try:
            yield
        finally:
            with suppress(Unavailable, LockError):
                self._ask(WRITING, lambda store: store.release())

    def extend_lock(self) -> None:
        """Holds it for as long as one more call may take. Raises LockedElsewhere if it is lost."""
        try:
            self._ask(WRITING, lambda store: store.extend())
        except Unavailable:
            pass
        except LockError:
            raise LockedElsewhere from None

    def _ask(self, what: str, operation: Callable[[RedisStore], T]) -> T:
        store = self._store
        if store is None:
            raise Unavailable
        return self._breaker.call(what, lambda: operation(store))


class RedisStore:
    """What is read from Redis and written to it. A class because it carries the connection and
    the lock. Methods raise what redis-py raises, and give False where nothing was written."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._clock = clock
        self._checked_key = settings.checked_key
        self._lock_key = settings.lock_key
        self._lock_token = secrets.token_hex(16)
        self._locked = False
        self._client = redis.Redis(
            host=settings.redis.host,
            port=settings.redis.port,
            db=settings.redis.db,
            username=settings.redis.username or None,
            password=settings.redis.password or None,
            ssl=settings.redis.tls,
            ssl_check_hostname=True,
            protocol=2,
            socket_timeout=REDIS_TIMEOUT,
            socket_connect_timeout=REDIS_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )
        self._lock = self._client.lock(self._lock_key, timeout=settings.lease, sleep=_POLL)

    def read(self, key: str) -> Credential | None:
        """What the key holds; None for what can't be a credential."""
        # No transaction: a Redis that is out of memory refuses those, even to read. The life
        # first: where the key changes in between, the newer value gets the shorter life.
        with self._client.pipeline(transaction=False) as pipe:
            for one in (key, self._checked_key):
                pipe.pttl(one)
                pipe.get(one)
            life, value, fresh_for, marker = pipe.execute(raise_on_error=False)
        if isinstance(value, redis.ResponseError) and str(value).startswith("WRONGTYPE"):
            log.warning("the Redis key %s does not hold a string; it will be replaced", key)
            return None
        for answer in (value, life):
            if isinstance(answer, Exception):
                raise answer
        text = value.decode("ascii", "replace") if value is not None else ""
        if not is_credential(text):
            return None
        # WeChat grants no more: whoever wrote a longer life did not get it from there.
        life = life / 1000 if 0 <= life <= GRANTED_LIFE * 1000 else UNDATED_LIFE
        expires = self._clock() + life
        named = re.fullmatch(
            rb"([0-9a-f]{40}) ([0-9]{1,7})", marker if type(marker) is bytes else b""
        )
        if named is None or named[1].decode() != hashlib.sha1(value).hexdigest():
            return Credential(text, expires, expires)
        fresh_until = self._clock() + fresh_for / 1000
        return Credential(text, expires, expires + int(named[2]) / 1000, fresh_until)

    def write(self, key: str, credential: Credential) -> bool:
        """Sets credential and marker at once, if the lock is held or nothing newer is there."""
        now = self._clock()
        life = max(1, int(1000 * (credential.expires - now)))
        fresh_for = int(1000 * (credential.fresh_until - now))
        more = int(1000 * (credential.usable_until - credential.expires))
        keys = (key, self._checked_key, self._lock_key)
        arguments = (credential.value, life, fresh_for, more, self._lock_token)
        return bool(self._client.eval(_PUT, len(keys), *keys, *arguments))

    def delete(self, key: str, value: str) -> bool:
        """Deletes the key if it still holds this value."""
        return bool(self._client.eval(_DROP, 1, key, value))

    def acquire(self, wait: float) -> bool:
        """Whether the lock could be had within `wait` seconds."""
        self._locked = self._lock.acquire(
            blocking=wait > 0, blocking_timeout=wait, token=self._lock_token
        )
        return self._locked

    def extend(self) -> bool:
        """A full lease from now on. Raises LockError where the lock is another's by now."""
        return self._locked and self._lock.reacquire()

    def release(self) -> bool:
        """Ends the lock. Raises LockError where it is another's by now."""
        locked, self._locked = self._locked, False
        if locked:
            self._lock.release()
        return locked


class CircuitBreaker:
    """Leaves a Redis alone that can't be reached, and logs when trouble begins and when it ends.
    A class because it carries what is wrong, in `trouble`, and until when Redis is left alone."""

    def __init__(self, place: str, clock: Clock) -> None:
        self._place = place
        self._clock = clock
        self._open_until = 0.0
        self.trouble: dict[str, str] = {}

    def call(self, what: str, operation: Callable[[], T]) -> T:
        """The operation's result. Raises Unavailable where Redis gives none, or is left alone."""
        if self._clock() < self._open_until:
            raise Unavailable
        try:
            result = operation()
        except LockError:
            raise
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

    def _failed(self, what: str, error: Any) -> None:
        # redis-py and Redis repeat the arguments of a failed command, and what makes no sense in
        # a reply; credentials may be among both.
        reason = str(error).rpartition("caused error: ")[2].partition(", with args")[0]
        shown = redis.ConnectionError | redis.TimeoutError | redis.ResponseError
        nonsense = isinstance(error, redis.InvalidResponse) or not isinstance(error, shown)
        cause = type(error).__name__ + ("" if nonsense else f": {reason}")
        if what not in self.trouble:
            log.warning("%s at %s fails, going on without: %s", what, self._place, cause)
        self.trouble[what] = cause


class Unavailable(Exception):
    """Redis did not do what it was asked; the reason is in the log."""
