"""The jsapi_ticket held for pages, and one look that all who wait for it share.

What becomes of a ticket, and when, stands in `renewal`; here is only when to look, who waits, and
when a look is given up.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from .errors import LockedElsewhere, LookHangs, SigningError, Stopping, Unexpected
from .renewal import CALLS, Known, Renewal
from .settings import Limits

log = logging.getLogger(__name__)
T = TypeVar("T")


def pause_after(known: Known, now: float, limits: Limits) -> float:
    """Seconds from a look to the next one."""
    ticket, soon, interval = known.usable(now), limits.look_soon, limits.look_interval
    if ticket is None:
        return soon
    if now < ticket.fresh_until:
        pause = max(soon, min(interval, ticket.expires - now))
    else:  # WeChat is left alone, or to be asked
        pause = interval if now < known.quiet_until else soon
    return min(pause, ticket.usable_until - now)


class JsapiTickets:
    """The account's jsapi_ticket, now. A class because it carries what is known, and the look in
    flight, which runs in a thread. One that does not end is left behind: it can't be cancelled."""

    def __init__(self, renewal: Renewal) -> None:
        self._renewal = renewal
        self.clock = renewal.clock
        self._limits = renewal.settings.limits
        self._longest = CALLS * renewal.settings.lease
        # One for each look that is left behind, and one to close its connections.
        self._threads = ThreadPoolExecutor(2 * self._limits.left_behind, "look")
        self._left_behind: set[asyncio.Future[Known]] = set()
        self.known = Known()
        """What came of the last look."""
        self._look: asyncio.Task[Known] | None = None
        self._look_at = -math.inf

    def held(self) -> str | None:
        """The ticket held, if it is usable. Where a look is due, one begins."""
        now = self.clock()
        if self._look is None or now >= self._look_at:
            self._looking()
        return ticket.value if (ticket := self.known.usable(now)) else None

    async def current(self) -> str:
        """A ticket to sign with. Waits only where no usable one is held. Raises SigningError, the
        same one for all who ask until the next look."""
        if held := self.held():
            return held
        look = self._look or self._looking()
        try:
            known = await asyncio.shield(look)
        except asyncio.CancelledError:
            if look.cancelled():
                raise Stopping from None
            raise
        if ticket := known.usable(self.clock()):
            return ticket.value
        raise (known.error or LockedElsewhere()).with_traceback(None)

    async def refresh(self) -> None:
        """Looks now, whether that is due or not, and waits for it."""
        await asyncio.shield(self._looking())

    @property
    def look_in(self) -> float:
        """Seconds until the next look; 0 or less where it is due."""
        return self._look_at - self.clock()

    @property
    def cache_state(self) -> str:
        """Whether credentials are shared: see `Cache.state`."""
        return self._renewal.cache.state

    @property
    def retry_after(self) -> int:
        """Whole seconds, at least 1, until WeChat may be asked again."""
        return math.ceil(max(1.0, self.known.quiet_until - self.clock()))

    async def close(self, *, timeout: float) -> None:
        """Waits up to `timeout` seconds for the look in flight, whose outcome is in Redis; then
        who still waits for it gets Stopping, and other instances need not wait for its lock."""
        if self._look is not None:
            _, in_flight = await asyncio.wait({self._look}, timeout=timeout)
            self._look.cancel()
            if in_flight:
                ending = self._in_thread(self._renewal.cache.release_lock)
                await asyncio.wait({ending}, timeout=self._limits.redis_timeout)
            self._look_at = math.inf  # no other begins
        self._threads.shutdown(wait=False)

    def _in_thread(self, call: Callable[..., T], *given: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, call, *given)

    def _looking(self) -> asyncio.Task[Known]:
        """The look in flight, or a new one: all who wait share it, its error included."""
        if self._look is None or self._look.done():
            self._look = asyncio.ensure_future(self._look_up())
        return self._look

    async def _look_up(self) -> Known:
        """One look, and more while there is no ticket and another instance asks for it."""
        end = self.clock() + self._longest
        while True:
            before, began = self.known, self.clock()
            try:
                self.known = await self._one_look(before)
            except SigningError as error:
                if began >= before.quiet_until:  # said and counted once a pause
                    log.error("looking for the ticket failed: %s", error)
                    self.known = before.failed(error, self.clock())
            now = self.clock()
            ticket = self.known.usable(now)
            self._look_at = now + pause_after(self.known, now, self._limits)
            log.debug("looked for the ticket in %.3f s", now - began)
            if ticket is not None or now < self.known.quiet_until or now >= end:
                return self.known
            await asyncio.sleep(self._limits.lock_wait)

    async def _one_look(self, known: Known) -> Known:
        """What is known after a look. Raises SigningError where it hangs, or does not begin."""
        if len(self._left_behind) >= self._limits.left_behind:
            raise LookHangs(self._longest)
        try:
            look = self._in_thread(self._renewal.look_up, known)
        except RuntimeError as error:  # no thread could be started
            raise Unexpected(error) from None
        await asyncio.wait({look}, timeout=self._longest)
        if look.done():
            return look.result()
        self._left_behind.add(look)
        look.add_done_callback(self._left_behind.discard)
        hangs, self._renewal = self._renewal, self._renewal.successor()
        with suppress(RuntimeError):  # no thread could be started
            self._in_thread(hangs.cache.close)
        # Till it ends, OpenSSL may read from a descriptor that a new connection has by now.
        await asyncio.wait({look}, timeout=self._limits.redis_timeout)
        if self._renewal.cache.is_left_alone:  # Redis is what hangs: at once without it
            return await self._one_look(known)
        raise LookHangs(self._longest)
