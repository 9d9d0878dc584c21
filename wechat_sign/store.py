"""What Redis has: two credentials, a marker and a lock, by SET, GETRANGE, PTTL and DEL alone.

A credential is a plain string under a key with an expiry, so that other programs can read it: the
TTL tells its life, and nothing else. That WeChat was asked lately is told by a marker beside the
ticket, which names it by its SHA-1 and says for how many ms WeChat granted it beyond the marker's
own end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import redis

from .clock import Clock
from .credentials import Credential, is_credential
from .redis_client import Client, connect, explain
from .settings import GRANTED_LIFE, Settings
from .texts import Text

log = logging.getLogger(__name__)

_LAST_BYTE: Final = 4095
"""Of a key's value that is read. What is longer is no credential: there may be anything."""
_MARKER: Final = re.compile(rb"([0-9a-f]{40}) \+([0-9]{1,7})")
"""SHA-1 of the ticket, and the ms for which WeChat granted it beyond the marker's own end."""
ENDLESS, ABSENT = -0.001, -0.002
"""What PTTL tells of a key without an expiry, and of none."""
_NAMES: Final = ("access_token", "accessToken", "ticket")
"""What other libraries call a credential in a JSON object."""


@dataclass(frozen=True)
class Found:
    """What Redis had at a look."""

    ticket: Credential | None = None
    access_token: Credential | None = None


def with_marker(ticket: Credential, marker: bytes, ends: float, latest: float) -> Credential:
    """The ticket with what the marker tells, if it names this one. One that ends after `latest`
    does not tell when WeChat was asked."""
    named = _MARKER.fullmatch(marker)
    if named is None or named[1].decode() != _digest(ticket.value):
        return ticket
    usable_until = max(ticket.expires, ends + int(named[2]) / 1000)
    return replace(ticket, usable_until=usable_until, fresh_until=ends if ends <= latest else 0.0)


def of_a_named_key(raw: bytes | None, owner: bytes | None, appid: str) -> tuple[str, str]:
    """The credential under a key that other programs may write, in the formats that are known, and
    what is wrong; "" where nothing is."""
    value = _text(raw)
    if not is_credential(value):
        value = _in_json(raw or b"")
    if raw != b"" and not value:
        kept = "holds {shape}, which is neither used nor overwritten"
        return "", Text(kept, shape=_shape(raw))
    theirs, _, digest = _text(owner).partition(" ")
    if digest == _digest(value) and theirs != appid:
        return "", Text("holds what was fetched for another appid, and is not used")
    return value, ""


class RedisStore:
    """Reads and writes an account's keys. A class because it carries the connection and what was
    warned of. Methods raise what redis-py raises. For one thread at a time, but for `release`."""

    explain = staticmethod(explain)  # for Cache, which imports no redis

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._connect = connect(settings.redis, settings.limits.redis_timeout)
        self._client: Client | None = None
        self._lock_token = secrets.token_hex(16)
        self.unusable: dict[str, str] = {}
        """What is wrong with what a key that the INI names holds, by the key."""

    @property
    def client(self) -> Client:
        """Connects at its first use."""
        if self._client is None:
            self._client = self._connect()
        return self._client

    def read(self) -> Found:
        """Both credentials; None for what is none, or is another account's."""
        began, settings = self._clock(), self._settings
        ticket = self._credential(settings.jsapi_ticket_key, began)
        token = self._credential(settings.access_token_key, began)
        life = self._life(settings.checked_key)
        if ticket is not None and life > 0:
            marker = self._value(settings.checked_key) or b""
            latest = began + settings.redis.fresh_for + 1.0
            ticket = with_marker(ticket, marker, began + life, latest)
        return Found(ticket, token)

    def _credential(self, key: str, began: float) -> Credential | None:
        life, raw = self._life(key), self._value(key)  # in this order: what is over has no value
        value = self._of_a_named_key(key, raw) if key in self._settings.owner_keys else _text(raw)
        if not is_credential(value):
            return None
        # WeChat grants no more: a longer life does not come from there.
        undated = not 0 <= life <= GRANTED_LIFE
        expires = began + (self._settings.limits.undated_life if undated else life)
        return Credential(value, expires, expires, in_redis=True)

    def _of_a_named_key(self, key: str, raw: bytes | None) -> str:
        """What may be the credential under it. Warns once of what can't be."""
        owner = self._value(self._settings.owner_keys[key])
        value, problem = of_a_named_key(raw, owner, self._settings.wechat.appid)
        if problem and problem != self.unusable.get(key):
            log.warning("the Redis key %s %s", key, problem)
        self.unusable.pop(key, None)
        if problem:
            self.unusable[key] = problem
        return value

    def write(self, key: str, credential: Credential, only_if_absent: bool) -> bool:
        """Sets a credential and what belongs to it. Gives whether Redis has it now."""
        now, owner_key = self._clock(), self._settings.owner_keys.get(key)
        digest, life = _digest(credential.value), int(1000 * (credential.expires - now))
        if life <= 0:
            return False
        raw = self._value(key)
        is_bare = is_credential(_text(raw))
        written = False
        if owner_key is None or raw == b"" or is_bare:  # no other program would miss it
            absent = only_if_absent and (is_bare or self._life(key) == ABSENT)
            written = bool(self.client.set(key, credential.value, px=life, nx=absent))
        if written and owner_key is not None:
            self.client.set(owner_key, f"{self._settings.wechat.appid} {digest}", px=life)
        fresh_for = int(1000 * (credential.fresh_until - now))
        # Under another program's key nothing is written, but its ticket was confirmed all the same.
        if fresh_for > 0 and (written or not only_if_absent):
            beyond = round(1000 * (credential.usable_until - credential.fresh_until))
            self.client.set(self._settings.checked_key, f"{digest} +{beyond}", px=fresh_for)
        return written

    def delete(self, key: str, value: str) -> bool:
        """Deletes the key if it still holds this value, and gives whether it did."""
        return self._value(key) == value.encode() and bool(self.client.delete(key))

    def acquire(self) -> float:
        """Gives for how many seconds this process has the lock; 0 where another has it."""
        key, lease = self._settings.lock_key, int(1000 * self._settings.lease)
        if self.client.set(key, self._lock_token, nx=True, px=lease):
            return self._settings.lease
        life, holder = self._life(key), self._value(key)  # in this order: it may change hands
        if life == ENDLESS:
            self.client.set(key, "", px=lease)  # as all locks here have
        ours = holder == self._lock_token.encode()  # an earlier answer may have been lost
        return max(0.0, life) if ours else 0.0

    def release(self) -> bool:
        """Ends the lock if this process holds it, and gives whether it did."""
        return self.delete(self._settings.lock_key, self._lock_token)

    def _value(self, key: str) -> bytes | None:
        """The beginning of a string; None for a key of another type."""
        try:
            raw = self.client.getrange(key, 0, _LAST_BYTE)
        except redis.ResponseError as error:
            if str(error).startswith("WRONGTYPE"):
                return None
            raise
        if not isinstance(raw, bytes):
            raise redis.InvalidResponse
        return raw

    def _life(self, key: str) -> float:
        """Seconds; or ENDLESS, or ABSENT."""
        life = self.client.pttl(key)
        if not isinstance(life, int):
            raise redis.InvalidResponse
        return life / 1000


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("ascii", "replace")


def _digest(value: str) -> str:
    return hashlib.sha1(value.encode()).hexdigest()


def _shape(raw: bytes | None) -> Text:
    """What a value looks like that is no credential."""
    if raw is None:
        return Text("no string")
    if re.match(rb"[aOsib]:[0-9]", raw):
        return Text("a PHP-serialised value")
    if raw[:1] in b'{["':
        return Text("JSON without a credential")
    return Text("text that is no credential")


def _in_json(raw: bytes) -> str:
    """The credential in a JSON string or object, as other libraries write it; "" where none is."""
    with suppress(ValueError, RecursionError):
        found = json.loads(raw)
        if isinstance(found, dict):
            found = next((found[name] for name in _NAMES if name in found), "")
        if is_credential(found):
            return str(found)
    return ""
