"""The jsapi_ticket held for pages, and one refresh that all who wait for it share.

What becomes of a ticket, and when, stands in `renewal`; here is only when to look, and who waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .credentials import Credential
from .errors import SigningError, Stopping, Unexpected
from .renewal import Renewal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """Whether pages can be signed, as far as is known without asking anybody. `age` counts the
    seconds since the ticket was last seen to be fresh, or since the first look where it never was;
    `remaining` those for which it is usable. `error` is what last went wrong with WeChat."""

    usable: bool
    age: float
    remaining: float
    cache: str
    error: SigningError | None


class JsapiTickets:
    """The account's jsapi_ticket, now. A class because it carries the ticket held and the refresh
    in flight. What blocks is done in one thread, which alone touches what `renewal` carries."""

    def __init__(self, renewal: Renewal) -> None:
        self._renewal = renewal
        self._limits = renewal.limits
        self._clock = renewal.clock
        self._steps = self._clock.steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="refresh")
        self._refresh: asyncio.Task[str] | None = None
        self._ticket: Credential | None = None
        self._look_at = -math.inf
        self._fresh_at = -math.inf

    def held(self) -> str | None:
        """The ticket held, if it is usable. Where a look is due, one begins."""
        now = self._clock()
        if self._refresh is None or self._due_in(now) <= 0:
            self._refreshing()
        ticket = self._held(now)
        return ticket.value if ticket is not None else None

    async def current(self) -> str:
        """A ticket to sign with. It waits only where no usable one is held.

        Raises SigningError, the same one for all who ask until the next look.
        """
        held = self.held()
        if held is not None:
            return held
        refresh = self._refresh or self._refreshing()
        try:
            return await asyncio.shield(refresh)
        except asyncio.CancelledError:
            if refresh.cancelled():
                raise Stopping from None
            raise

    async def refresh(self) -> str:
        """Looks now, whether that is due or not, and waits for it. Raises SigningError."""
        return await asyncio.shield(self._refreshing())

    @property
    def look_in(self) -> float:
        """Seconds until the next look; 0 or less where it is due, as after a step of the clock."""
        return self._due_in(self._clock())

    def _due_in(self, now: float) -> float:
        return self._look_at - now if self._clock.steps == self._steps else 0.0

    def health(self) -> Health:
        """What is known without asking Redis or WeChat."""
        now = self._clock()
        held = self._held(now)
        return Health(
            usable=held is not None,
            age=now - self._fresh_at if held is not None else math.inf,
            remaining=held.usable_until - now if held is not None else 0.0,
            cache=self._renewal.cache.state,
            error=self._renewal.back_off.error,
        )

    @property
    def retry_after(self) -> int:
        """Whole seconds, at least 1, until WeChat may be asked again."""
        return max(1, math.ceil(self._renewal.back_off.remaining))

    async def close(self, *, timeout: float) -> None:
        """Waits up to `timeout` seconds for the refresh in flight, whose outcome is cached; then
        who still waits for it gets Stopping, and other instances need not wait for its lock."""
        if self._refresh is not None:
            _, in_flight = await asyncio.wait({self._refresh}, timeout=timeout)
            self._refresh.cancel()
            if in_flight:
                await asyncio.to_thread(self._renewal.cache.release_lock)

    def _held(self, now: float) -> Credential | None:
        ticket = self._ticket
        return ticket if ticket is not None and now < ticket.usable_until else None

    def _refreshing(self) -> asyncio.Task[str]:
        """The refresh in flight, or a new one: all who wait share it, its error included."""
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.ensure_future(self._look_up())
            # What goes wrong is logged where it happens.
            self._refresh.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._refresh

    async def _look_up(self) -> str:
        began = self._clock()
        held = self._held(began)
        self._steps = self._clock.steps
        pause = self._limits.look_soon
        try:
            loop = asyncio.get_running_loop()
            ticket = await loop.run_in_executor(self._thread, self._renewal.look_up, held)
            now = self._clock()
            fresh = now < ticket.fresh_until
            if fresh or self._ticket is None:
                self._fresh_at = now
            if fresh or held is not None:
                pause = max(pause, min(self._limits.look_interval, ticket.expires - now))
            self._ticket = ticket
            left = ticket.usable_until - now
            pause = min(pause, left)
            log.debug("looked for the ticket in %.3f s: usable for %d s", now - began, left)
            return ticket.value
        except RuntimeError as error:  # no thread could be started
            pause = self._limits.look_interval
            failure = Unexpected(error)
            log.error("looking for the ticket failed: %s", failure)
            raise failure from None
        finally:
            self._look_at = self._clock() + pause
