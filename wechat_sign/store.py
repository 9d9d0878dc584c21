"""Redis, by redis-py's own means: one server, the primary of a Sentinel set, or a Cluster.

A credential is a plain string under a key with an expiry, so that other programs can read it: the
TTL tells its life, and nothing else. That WeChat was asked lately is told by a marker beside the
ticket, which names it by its SHA-1 and says for how many ms WeChat granted it beyond its TTL.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.connection import parse_url
from redis.exceptions import RedisClusterException
from redis.lock import Lock
from redis.retry import Retry

from .clock import Clock
from .credentials import Credential, is_credential
from .deadline import Overdue
from .errors import ConfigError
from .sentences import Sentence, say
from .settings import GRANTED_LIFE, SECRET, RedisSettings, RedisUrl, Settings

log = logging.getLogger(__name__)
Client = redis.Redis | redis.RedisCluster

_POLL: Final = 0.05
"""Seconds between two tries to get the lock."""
_LAST_BYTE: Final = 4095
"""Of a key's value that is read. What is longer is no credential: there may be anything."""
_MARKER: Final = re.compile(rb"([0-9a-f]{40}) ([0-9]{1,7})")
"""SHA-1 of the ticket, and the ms for which WeChat granted it beyond its TTL."""

# KEYS: the credential's, the lock's, and what is set with it. ARGV: the lock's token, what the
# first key held when it was judged, and a value and its ms for each key but the lock's.
_SET: Final = f"""
    local function get(key)
        local value = redis.pcall('getrange', key, 0, {_LAST_BYTE})
        return type(value) == 'string' and value or ''
    end
    if get(KEYS[2]) ~= ARGV[1] and get(KEYS[1]) ~= ARGV[2] then return 0 end
    local done = redis.pcall('set', KEYS[1], ARGV[3], 'px', ARGV[4])
    for n = 3, #KEYS do
        if done.err then break end
        done = redis.pcall('set', KEYS[n], ARGV[2 * n - 1], 'px', ARGV[2 * n])
    end
    return done
"""
_GET_SECOND: Final = f"return redis.pcall('getrange', KEYS[2], 0, {_LAST_BYTE})"


def connect(settings: RedisSettings, timeout: float) -> Callable[[], Client]:
    """What makes a client, which tries everything once: what fails is left alone for a while, and
    pages do not wait for a third try. One exchange takes `timeout` seconds at the most. Raises
    ConfigError for a url that redis-py does not take."""
    common: dict[str, Any] = {
        "username": settings.username or None,
        "password": settings.password or None,
        "protocol": 2,
    }
    once: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "decode_responses": False,
        # Some proxies hang up on CLIENT SETINFO; redis-py 7 sends it unless both are empty.
        "driver_info": redis.DriverInfo(name="", lib_version=""),
    }
    url = settings.url
    if url is None:
        common |= {"host": settings.host, "port": settings.port, "db": settings.db}
        common |= {"ssl": settings.tls, "ssl_check_hostname": True}
        client = redis.Redis(**common, **once)
        return lambda: client
    try:
        nodes = [parse_url(node) for node in url.nodes]
        given = common | nodes[0] | once
        if given.get("connection_class") is redis.SSLConnection:
            given.setdefault("ssl_check_hostname", True)
        for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
            if name in given and not Path(given[name]).is_file():
                raise ValueError(say("{name}: there is no such file", name=name))
        make: Callable[[], Client] = _CLIENTS[url.kind](url.service, nodes, given)
        return make
    except (TypeError, ValueError, AttributeError, redis.RedisError) as error:
        problem = _what_is_wrong(error, url)
        raise ConfigError(say("[redis] url, after the ?: {problem}", problem=problem)) from None


def _what_is_wrong(error: Exception, url: RedisUrl) -> str:
    """redis-py's words, which name an option that it does not know; not where a secret may be in
    them, by the option's name or its value."""
    words = str(error).rpartition("() ")[2]
    values = [value for _, value in parse_qsl(urlsplit(url.nodes[0]).query)]
    if SECRET.search(words) or any(value in words for value in values if len(value) > 3):
        return say("redis-py does not take an option that is there, or its value")
    return words


def _one(_service: str, _nodes: list[dict[str, Any]], given: dict[str, Any]) -> Any:
    pool = redis.ConnectionPool(**given)
    pool.make_connection()  # it does not connect, but looks at its arguments
    return lambda: redis.Redis(connection_pool=pool)


def _sentinel(service: str, nodes: list[dict[str, Any]], given: dict[str, Any]) -> Any:
    _tls(given)
    theirs = {name: value for name, value in given.items() if name.split("_")[0] in _SHARED}
    for name in ("username", "password"):
        theirs[name] = given.pop(f"sentinel_{name}", None)
    hosts = [(node.get("host", "localhost"), node.get("port", 26379)) for node in nodes]
    sentinel = redis.Sentinel(hosts, sentinel_kwargs=theirs, **given)
    client = sentinel.master_for(service)
    client.connection_pool.make_connection()
    return lambda: client


def _cluster(_service: str, nodes: list[dict[str, Any]], given: dict[str, Any]) -> Any:
    _tls(given)
    hosts = [ClusterNode(node.get("host", "localhost"), node.get("port", 6379)) for node in nodes]
    once = given.pop("retry")

    def connected() -> redis.RedisCluster:
        # It asks a node at random as soon as it is made; of those, one may hang.
        another = Retry(NoBackoff(), len(hosts))
        cluster = redis.RedisCluster(
            startup_nodes=hosts, require_full_coverage=False, retry=another, **given
        )
        cluster.set_retry(once)
        return cluster

    return connected


_CLIENTS: Final = {"": _one, "sentinel": _sentinel, "cluster": _cluster}
_SHARED: Final = {"ssl", "socket", "retry", "protocol", "driver"}
"""How options begin that are the same for a Sentinel and for what it watches."""


def _tls(given: dict[str, Any]) -> None:
    """Options that name one connection become those of a client that makes its own."""
    for name in ("host", "port"):
        given.pop(name, None)
    if given.pop("connection_class", None):
        given["ssl"] = True


def _pools(client: Client) -> Iterator[Any]:
    if isinstance(client, redis.RedisCluster):
        yield from (node.redis_connection.connection_pool for node in client.get_nodes())
        return
    pool: Any = client.connection_pool
    if isinstance(pool, redis.sentinel.SentinelConnectionPool):
        yield from (sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels)
    yield pool


def explain(error: Exception) -> tuple[bool, str]:
    """Whether Redis was reached and refused; and its words or redis-py's, "" where a reply makes no
    sense: then it is repeated, and credentials may be among it."""
    shown = redis.ConnectionError | redis.TimeoutError | redis.ResponseError
    shown |= RedisClusterException | Overdue
    nonsense = isinstance(error, redis.InvalidResponse) or not isinstance(error, shown)
    return isinstance(error, redis.ResponseError), "" if nonsense else words_of(error)


def words_of(error: Exception) -> str:
    """The error's text without the arguments of the failed command, which redis-py and Redis
    repeat, credentials among them, and without a Sentinel's whole connection."""
    reason = str(error).rpartition("caused error: ")[2].partition(", with args")[0]
    return reason.partition(" : <")[0]


class RedisStore:
    """What is read from Redis and written to it. A class because it carries the connection, the
    lock, and whether scripts work. Methods raise what redis-py raises, and give False where
    nothing was written. For one thread at a time, but for `release`."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._clock = clock
        self._connect = connect(settings.redis, settings.limits.redis_timeout)
        self._undated_life = settings.limits.undated_life
        self._made: Client | None = None
        self._ticket_key = settings.jsapi_ticket_key
        self._token_key = settings.access_token_key
        self._checked_key = settings.checked_key
        self._appid = settings.wechat.appid
        self._owner_keys = settings.owner_keys
        self._lock_key = settings.lock_key
        self._lock_token = secrets.token_hex(16)
        self._lease = settings.lease
        self._fresh_for = settings.redis.fresh_for
        self.locked = False
        """Whether this process holds the lock, for all that it knows."""
        self.maybe_locked = False
        """The same, or Redis was asked for the lock and gave no answer."""
        self._scripts: bool | None = None
        self._warned: set[str] = set()
        self.loss = ""
        """What is lost where scripts don't work, or "" where they do."""

    @property
    def _client(self) -> Client:
        if self._made is None:
            self._made = self._connect()
        return self._made

    def cut(self) -> None:
        """Closes the connections, so that what another thread waits for ends; not those of a
        Cluster whose nodes are just being found out."""
        made = self._made
        # What the other thread changes meanwhile makes this fail in several ways.
        with suppress(redis.RedisError, OSError, AttributeError, RuntimeError):
            for pool in _pools(made) if made is not None else ():
                pool.disconnect()

    def where(self) -> str:
        """Host and port of the node that has the credentials, as far as that is to be found out;
        "" for the one that the settings name."""
        client = self._client
        if isinstance(client, redis.RedisCluster):
            node: Any = client.get_node_from_key(self._ticket_key)
            return f"{node.host}:{node.port}"
        pool: Any = client.connection_pool
        if isinstance(pool, redis.sentinel.SentinelConnectionPool):
            return "{}:{}".format(*pool.get_master_address())
        return ""

    def read(self, key: str, known: Credential | None) -> Credential | None:
        """What the key holds; None for what can't be a credential, or is another account's.

        Where it is `known` to be fresh, and nothing was written since, that takes two commands.
        """
        marked = key == self._ticket_key
        if marked and known is not None and self._clock() < known.fresh_until:
            value, fresh_for = self._all(("GETRANGE", key), ("PTTL", self._checked_key))
            changed = abs(self._clock() + fresh_for / 1000 - known.fresh_until)
            if value == known.value.encode() and changed < 1.0:
                return known
        return self._read(key)[1]

    def _read(self, key: str) -> tuple[bytes, Credential | None]:
        """The bytes under the key, and the credential that they are."""
        # The life first: where the key changes in between, the newer value gets the shorter life.
        commands = [("PTTL", key), ("GETRANGE", key)]
        if key == self._ticket_key:
            commands += [("PTTL", self._checked_key), ("GETRANGE", self._checked_key)]
        if key in self._owner_keys:
            commands.append(("GETRANGE", self._owner_keys[key]))
        life, value, *more = self._all(*commands)
        owner = more.pop() if key in self._owner_keys else None
        text = (value or b"").decode("ascii", "replace")
        if not is_credential(text):
            return value or b"", None
        digest = hashlib.sha1(value).hexdigest()
        if owner is not None and self._is_anothers(owner, digest):
            self._warn(
                f"the Redis key {key} holds what was fetched for another appid, and is not used"
            )
            return value, None
        # WeChat grants no more: whoever wrote a longer life did not get it from there.
        life = life / 1000 if 0 <= life <= GRANTED_LIFE * 1000 else self._undated_life
        expires = self._clock() + life
        fresh_for, marker = more or (0, b"")
        named = _MARKER.fullmatch(marker or b"")
        if named is None or named[1].decode() != digest:
            return value, Credential(text, expires, expires)
        usable_until = expires + int(named[2]) / 1000
        if fresh_for / 1000 > self._fresh_for + 1.0:  # when WeChat was asked, it does not tell
            return value, Credential(text, expires, usable_until)
        fresh_until = self._clock() + fresh_for / 1000
        return value, Credential(text, expires, usable_until, fresh_until)

    def _is_anothers(self, owner: bytes, digest: str) -> bool:
        appid, _, theirs = owner.decode("ascii", "replace").partition(" ")
        return theirs == digest and appid != self._appid

    def _all(self, *commands: tuple[str, str]) -> list[Any]:
        """The answers; for a key that holds no string, None."""
        # No transaction: a Redis that is out of memory refuses those, even to read.
        with self._client.pipeline(transaction=False) as pipe:
            for name, key in commands:
                pipe.execute_command(name, key, *((0, _LAST_BYTE) if name == "GETRANGE" else ()))
            answers: list[Any] = pipe.execute(raise_on_error=False)
        for place, answer in enumerate(answers):
            if isinstance(answer, redis.ResponseError) and str(answer).startswith("WRONGTYPE"):
                self._warn(f"the Redis key {commands[place][1]} does not hold a string")
                answers[place] = None
            elif isinstance(answer, Exception):
                raise answer
            elif not isinstance(answer, int if commands[place][0] == "PTTL" else bytes | None):
                raise redis.InvalidResponse
        return answers

    def write(self, key: str, credential: Credential) -> bool:
        """Sets the credential and what belongs to it.

        Without the lock (Redis was away, or the lease is over) a late answer must not replace a
        newer one: one that WeChat confirmed lately or, where this one was not confirmed lately
        itself, one that lives longer; nor what is another account's.
        """
        now = self._clock()
        digest = hashlib.sha1(credential.value.encode()).hexdigest()
        life = max(1, int(1000 * (credential.expires - now)))
        values: dict[str, tuple[str, int]] = {key: (credential.value, life)}
        if now < credential.fresh_until:
            beyond = round(1000 * (credential.usable_until - credential.expires))
            fresh_for = max(1, int(1000 * (credential.fresh_until - now)))
            values[self._checked_key] = (f"{digest} {beyond}", fresh_for)
        if key in self._owner_keys:
            values[self._owner_keys[key]] = (f"{self._appid} {digest}", life)
        there, theirs = self._read(key)
        if theirs is None:  # nothing, or another account's
            stays = is_credential(there.decode("ascii", "replace"))
        else:
            outlasts = now >= credential.fresh_until and theirs.expires >= credential.expires
            stays = now < theirs.fresh_until or outlasts
        if not self._scripts:
            if stays and not self._holds(self._lock_key, self._lock_token):
                return False
            for name, (text, ms) in values.items():
                self._client.set(name, text, px=ms)
            return True
        judged = secrets.token_hex(16) if stays else there
        keys = [key, self._lock_key, *[name for name in values if name != key]]
        arguments = [self._lock_token, judged]
        for text, ms in values.values():
            arguments += [text, str(ms)]
        return bool(self._client.eval(_SET, len(keys), *keys, *arguments))

    def delete(self, key: str, value: str) -> bool:
        """Deletes the key if it still holds this value."""
        return self._if_it_holds(key, value, Lock.LUA_RELEASE_SCRIPT, self._client.delete)

    def acquire(self, wait: float) -> bool:
        """Whether the lock could be had within `wait` seconds."""
        lock = Lock(self._client, self._lock_key, timeout=self._lease, sleep=_POLL)
        self.maybe_locked = True
        self.locked = lock.acquire(blocking=wait > 0, blocking_timeout=wait, token=self._lock_token)
        if not self.locked and self._client.pttl(self._lock_key) == -1:
            self._client.pexpire(self._lock_key, int(1000 * self._lease))  # as all locks here have
        self.locked = self.locked or self.extend()  # it is ours where an earlier answer was lost
        self.maybe_locked = self.locked
        if self.locked and self._scripts is None:
            self._scripts = self._scripts_work()
        return self.locked

    def extend(self) -> bool:
        """A full lease from now on; False where the lock is not, or no longer, this process's."""
        lease = int(1000 * self._lease)
        return self._if_it_holds(
            self._lock_key,
            self._lock_token,
            Lock.LUA_REACQUIRE_SCRIPT,
            lambda key: self._client.pexpire(key, lease),
            lease,
        )

    def release(self) -> bool:
        """Ends the lock if this process holds it."""
        released = self.delete(self._lock_key, self._lock_token)
        self.locked = self.maybe_locked = False
        return released

    def note(self, key: str, text: str, life: float) -> bool:
        """Sets a key for `life` seconds."""
        return bool(self._client.set(key, text, px=int(1000 * life)))

    def noted(self, key: str) -> tuple[str, float]:
        """What `note` set, and for how many seconds more; an empty text where nothing is there."""
        life, value = self._all(("PTTL", key), ("GETRANGE", key))
        return ((value or b"").decode("utf-8", "replace"), life / 1000)

    def forget(self, key: str) -> bool:
        """Deletes what `note` set."""
        return bool(self._client.delete(key))

    def _holds(self, key: str, value: str) -> bool:
        return self._client.getrange(key, 0, _LAST_BYTE) == value.encode()

    def _if_it_holds(
        self,
        key: str,
        value: str,
        script: str,
        command: Callable[[str], Any],
        *arguments: int,
    ) -> bool:
        """Does it if the key holds the value; by a script, so that nothing comes in between, or
        else by two commands."""
        if self._scripts:
            return bool(self._client.eval(script, 1, key, value, *map(str, arguments)))
        return self._holds(key, value) and bool(command(key))

    def _scripts_work(self) -> bool | None:
        """Whether a script sees, with each of the keys, the lock that was just set. It does not
        where scripts are not permitted or not known, and where the keys are not on one server."""
        reason: str = Sentence("the keys are not on one server")
        for key in (
            self._ticket_key,
            self._token_key,
            self._checked_key,
            *self._owner_keys.values(),
        ):
            try:
                there = self._client.eval(_GET_SECOND, 2, key, self._lock_key)
            except (redis.TimeoutError, redis.exceptions.ClusterError):
                return None  # it may pass: the next lock tells
            except (redis.RedisError, RedisClusterException) as error:
                if not self._holds(self._lock_key, self._lock_token):
                    raise
                there, reason = None, type(error).__name__
                if isinstance(error, redis.ResponseError):
                    reason = words_of(error)
            if there != self._lock_token.encode():
                self.loss = Sentence(
                    "without scripts ({reason}) an answer that comes late may replace a newer one",
                    reason=reason,
                )
                self._warn(f"Redis is shared, but {self.loss}")
                return False
        self.loss = ""
        return True

    def _warn(self, text: str) -> None:
        """Once for each text."""
        if text not in self._warned:
            self._warned.add(text)
            log.warning(text)
