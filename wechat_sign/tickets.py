"""A good jsapi_ticket, now."""

from __future__ import annotations

import asyncio
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic
from typing import Final

from .cache import Cached, MemoryCache, RedisCache
from .credentials import Grant, WeChat
from .errors import TOKEN_REFUSED, SigningError, StillWaiting, WeChatRefused
from .settings import GRANTED_LIFE, Settings

log = logging.getLogger(__name__)

LOOK_AGAIN: Final = 10.0
"""Seconds for which the ticket in hand serves without a look at the cache."""
LOOK_SOON: Final = 0.5
"""Seconds, the same, while there is none, or a first one, or one whose time is over."""
LONGEST_COOL_DOWN: Final = 60.0
"""Seconds during which WeChat is not asked again after it failed; less where that may pass."""
MARGIN: Final = 100.0
"""Seconds by which the cache lets a credential go before WeChat does. The ticket in hand uses
them up while the next one is fetched, so that no page waits for that."""


@dataclass(frozen=True)
class Health:
    """Whether pages can be signed: `age` and `remaining` in seconds, the age None where not."""

    age: float | None
    remaining: float
    cache: str
    error: SigningError | None
    """What last went wrong with WeChat, if nothing has gone right since."""


class JsapiTickets:
    """The account's jsapi_ticket, whatever it takes to have one.

    A class because it carries the ticket in hand, the look-up under way and what is known of
    WeChat's state. Blocking work is done in one thread, one look-up at a time.
    """

    def __init__(self, wechat: WeChat, cache: MemoryCache | RedisCache, settings: Settings) -> None:
        self._wechat = wechat
        self._cache = cache
        self._settings = settings
        self._wait = settings.lease + 1.0
        self._expire = float(settings.redis.expire)
        self._grace = min(MARGIN, GRANTED_LIFE - self._expire)

        self._ticket: Cached | None = None
        self._usable_until = 0.0
        self._look_again_at = 0.0
        self._task: asyncio.Task[str] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="look-up")

        self._error: SigningError | None = None
        self._cool_down = 0.0
        self._ask_again_at = 0.0
        self._granted = ("", self._expire)

    def in_hand(self) -> str | None:
        """The ticket in hand, if it is usable; a look-up starts in the background if one is due."""
        now = monotonic()
        if self._ticket is None or now >= self._usable_until:
            return None
        if now >= self._look_again_at:
            self._look_up()
        return self._ticket.value

    async def current(self) -> str:
        """A ticket to sign with. It waits for WeChat only where no usable one exists.

        Raises SigningError, the same one for all who ask until the next look-up.
        """
        ticket = self.in_hand()
        if ticket is not None:
            return ticket
        error = self._error  # the thread may change it
        if error is not None and monotonic() < self._look_again_at:
            raise error.with_traceback(None)
        return await asyncio.shield(self._look_up())

    def health(self) -> Health:
        """What is known without asking Redis or WeChat."""
        usable = self._ticket is not None and monotonic() < self._usable_until
        return Health(
            age=self._age(self._ticket) if self._ticket is not None and usable else None,
            remaining=self._usable_until - monotonic(),
            cache=self._cache.state,
            error=self._error,
        )

    @property
    def retry_after(self) -> int:
        """Whole seconds, at least 1, until WeChat may be asked again."""
        return max(1, math.ceil(self._ask_again_at - monotonic()))

    async def close(self, *, timeout: float) -> None:
        """Waits up to `timeout` seconds for a look-up under way: what it gets goes to the cache."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=timeout)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _look_up(self) -> asyncio.Task[str]:
        """The look-up under way, or a new one: everybody shares it, its error included."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._renew())
            self._task.add_done_callback(self._settled)
        return self._task

    def _settled(self, task: asyncio.Task[str]) -> None:
        self._task = None
        if not task.cancelled():
            error = task.exception()
            if error is not None and not isinstance(error, SigningError):
                log.error("the look-up failed in a way that it should not", exc_info=error)

    async def _renew(self) -> str:
        in_hand = self._ticket if monotonic() < self._usable_until else None
        loop, began = asyncio.get_running_loop(), monotonic()
        try:
            ticket = await loop.run_in_executor(self._thread, self.find, in_hand)
        except SigningError as error:
            self._error = error
            raise
        finally:
            self._look_again_at = monotonic() + LOOK_SOON
        self._ticket = ticket
        self._usable_until = ticket.until + self._grace
        pause = LOOK_SOON if in_hand is None else min(LOOK_AGAIN, ticket.remaining())
        self._look_again_at = monotonic() + max(LOOK_SOON, pause)
        took, age, left = monotonic() - began, self._age(ticket), ticket.remaining()
        log.debug("looked for the ticket in %.3f s: %d s old, %d s left", took, age, left)
        return ticket.value

    def find(self, in_hand: Cached | None) -> Cached:
        """The best ticket there is: from the cache, from WeChat, or the one in hand.

        Blocks, so it is for the thread; one at a time. Raises SigningError where there is none.
        """
        key = self._settings.jsapi_ticket_key
        found = self._cache.get(key)
        if found is not None and not self._is_due(found):
            return self._recovered(found)
        if found is not None and in_hand is None:
            return found  # nobody waits for WeChat now: the next look asks
        usable = found or in_hand
        if self._error is not None and monotonic() < self._ask_again_at:
            if usable is None:
                raise self._error.with_traceback(None)
            return usable
        if not self._cache.acquire(wait=self._wait if usable is None else 0):
            if usable is None:
                raise StillWaiting
            return usable
        try:
            again = self._cache.get(key)
            if again is None or self._is_due(again):
                again = self._ask()
            return self._recovered(again)
        except SigningError as error:
            self._failed(error)
            if usable is None:
                log.error("no page can be signed: %s", error)
                raise
            log.warning("the ticket in hand serves on: %s", error)
            return usable
        finally:
            self._cache.release()
            self._wechat.close()

    def _is_due(self, ticket: Cached) -> bool:
        """Whether WeChat should be asked if it is still the same ticket: its answer of 7200 s
        says nothing of how long the ticket has been alive."""
        if not ticket.dated:
            return True
        return 0 < self._settings.redis.recheck <= self._age(ticket)

    def _age(self, ticket: Cached) -> float:
        """Seconds since WeChat was last asked for it, as its remaining life tells."""
        value, life = self._granted
        return (life if value == ticket.value else self._expire) - ticket.remaining()

    def _ask(self) -> Cached:
        token = self._access_token()
        try:
            grant = self._fetch_ticket(token)
        except WeChatRefused as refusal:
            if refusal.errcode not in TOKEN_REFUSED:
                raise
            log.warning("%s; trying once more with a new access_token", refusal)
            self._cache.drop(self._settings.access_token_key, token)
            grant = self._fetch_ticket(self._access_token())
        ticket = self._keep("jsapi_ticket", self._settings.jsapi_ticket_key, grant)
        self._granted = (ticket.value, ticket.remaining())
        return ticket

    def _access_token(self) -> str:
        kept = self._cache.get(self._settings.access_token_key)
        if kept is not None:
            return kept.value
        self._stay_on_turn()
        grant = self._wechat.fetch_access_token()
        return self._keep("access_token", self._settings.access_token_key, grant).value

    def _fetch_ticket(self, access_token: str) -> Grant:
        self._stay_on_turn()
        return self._wechat.fetch_jsapi_ticket(access_token)

    def _stay_on_turn(self) -> None:
        if not self._cache.renew():
            raise StillWaiting

    def _keep(self, name: str, key: str, grant: Grant) -> Cached:
        life = self._expire
        if grant.expires_in < GRANTED_LIFE:
            life = min(life, max(grant.expires_in - MARGIN, grant.expires_in / 2))
        entry = Cached.lasting(grant.value, life)
        self._cache.put(key, entry)
        log.info("%s fetched from WeChat, kept for %d s", name, life)
        return entry

    def _recovered(self, ticket: Cached) -> Cached:
        self._error, self._cool_down, self._ask_again_at = None, 0.0, 0.0
        return ticket

    def _failed(self, error: SigningError) -> None:
        longer = max(1.0, 2 * self._cool_down) if error.passing else LONGEST_COOL_DOWN
        self._cool_down = min(LONGEST_COOL_DOWN, longer)
        self._ask_again_at = monotonic() + self._cool_down
        self._error = error
