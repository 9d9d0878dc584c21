"""The life of a ticket, in five sentences:

Every 10 s the server looks at what Redis has and compares it with what it holds. If Redis's ticket
is fresh, that one serves; if Redis has none, it gets ours back; if nobody asked WeChat for 10
minutes, one instance, which has the lock, asks, while all others serve what they hold. An instance
without a ticket waits for it. Whatever goes wrong, the ticket that lasts longest serves, and WeChat
is left alone for a pause that doubles. A look that does not end is left behind, and the next one
starts with new connections.

What ends when, in seconds, by default:

    10           the server looks at the cache again, and so does whatever page comes (tickets.py)
    600          `recheck`: the marker beside the ticket is over, so WeChat is asked for it again
    7100         `expire`: the cache lets ticket and token go
    7200         WeChat lets them go; the 100 in between are for fetching the next ones
    1 to 60      back-off after what may pass, doubling
    1 to 600     back-off where WeChat refuses a token that it has just granted
    60 to 600    back-off after what a person must mend, doubling
    10           a call to WeChat, if its answer does not drip: `timeout` to connect, and to answer
    13           the lock's lease: one call, and 3
    39           a look, and the wait for another instance's: three calls
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Final

from .cache import Cache
from .credentials import Credential, Grant, WeChat
from .errors import TOKEN_REFUSED, SigningError, Unexpected, WeChatRefused
from .settings import GRANTED_LIFE, RedisSettings, Settings

log = logging.getLogger(__name__)

TRANSIENT_BACK_OFF, TOKEN_BACK_OFF, BACK_OFF = (1.0, 60.0), (1.0, 600.0), (60.0, 600.0)
"""Seconds, the first and the longest, during which WeChat is left alone: after what may pass,
after a refused token, and after what a person must mend. A night of either of the last two must
not use up the day's 2000 tokens."""
MARGIN: Final = 100.0
"""Seconds by which the cache lets a credential go before WeChat does, at the least."""
CALLS: Final = 3
"""To WeChat in one look, at the most: a token that it refuses, another, and the ticket."""
BUSY_FOR_A_DEAD_TOKEN: Final = -1000
"""getticket's errcode that is busyness or, as w7corp/easywechat#1780 found, a dead token."""


@dataclass(frozen=True)
class Known:
    """What an instance knows. Each look makes another one of it."""

    ticket: Credential | None = None
    access_token: Credential | None = None
    error: SigningError | None = None
    """What last went wrong with WeChat, if nothing has gone right since."""
    pause: float = 0.0
    """Seconds, the length of the last pause."""
    quiet_until: float = -math.inf
    """Until when WeChat is left alone."""
    in_a_row: int = 0
    """How often the error came, one time after the other."""
    fresh_at: float = -math.inf
    """When the ticket was last seen fresh; if never, when it came."""

    def usable(self, now: float) -> Credential | None:
        """The ticket, if pages may be signed with it."""
        ticket = self.ticket
        return ticket if ticket is not None and now < ticket.usable_until else None

    def failed(self, error: SigningError, now: float) -> Known:
        """The same with a pause for WeChat that is twice as long as the last one."""
        first, longest = BACK_OFF
        errcode = getattr(error, "errcode", None)
        if error.transient:
            first, longest = TOKEN_BACK_OFF if errcode in TOKEN_REFUSED else TRANSIENT_BACK_OFF
        pause = min(longest, max(first, 2 * self.pause))
        again = errcode is not None and errcode == getattr(self.error, "errcode", None)
        count = self.in_a_row + 1 if again else 1
        return replace(self, error=error, pause=pause, quiet_until=now + pause, in_a_row=count)

    def succeeded(self, now: float) -> Known:
        """The same with nothing wrong."""
        return Known(self.ticket, self.access_token, fresh_at=now)

    def blames_the_token(self, refusal: WeChatRefused) -> bool:
        """Whether another access_token may help. Of busyness at its second time in a row, and then
        no more: each would cost a token."""
        if refusal.errcode != BUSY_FOR_A_DEAD_TOKEN:
            return refusal.errcode in TOKEN_REFUSED
        return getattr(self.error, "errcode", 0) == refusal.errcode and self.in_a_row == 1


def decide(
    now: float, held: Credential | None, found: Credential | None
) -> tuple[Credential | None, bool]:
    """The ticket that serves, and whether WeChat is to be asked for another.

    | held (usable)         | in Redis             |                                              |
    |-----------------------|----------------------|----------------------------------------------|
    | none                  | any                  | take it; not fresh: the next look asks       |
    | any                   | fresh, lasts as long | take it                                      |
    | fresh                 | none                 | keep ours; Redis gets it back                |
    | fresh, never in Redis | not fresh            | keep ours; offered again                     |
    | whatever else         |                      | ask; meanwhile what lasts longer serves      |
    """
    held, found = (one if one and now < one.usable_until else None for one in (held, found))
    if held and found and held.value == found.value:
        found = replace(found, usable_until=max(held.usable_until, found.usable_until))
    if held is None:
        return found, found is None
    if found is None:
        return held, now >= held.fresh_until
    if now < found.fresh_until and found.usable_until >= held.usable_until:
        return found, False
    if now < held.fresh_until and now >= found.fresh_until and not held.in_redis:
        return held, False
    return max(found, held, key=lambda one: one.usable_until), True


def decide_token(
    now: float, held: Credential | None, found: Credential | None
) -> Credential | None:
    """The access_token to ask with: Redis's, or ours where Redis never had it and it lasts longer.
    One that Redis had and has no more may have been refused to another instance."""
    if held is None or held.in_redis or now >= held.expires:
        return found
    return held if found is None or held.expires > found.expires else found


def credential_of(
    name: str, grant: Grant, began: float, redis: RedisSettings, *, fresh_for: float = 0.0
) -> Credential:
    """What WeChat granted when it was asked at `began`."""
    granted = min(grant.expires_in, GRANTED_LIFE)
    life = min(redis.expire, max(granted - MARGIN, granted / 2))
    fresh_until = began + min(fresh_for, life) if fresh_for else 0.0
    log.info("%s fetched from WeChat, kept for %d s", name, life)
    return Credential(grant.value, began + life, began + granted, fresh_until)


def log_failure(known: Known, now: float) -> None:
    """Says what went wrong with WeChat, and whether pages notice."""
    if known.error is not None and known.usable(now) is None:
        log.error("no page can be signed: %s", known.error)
    elif known.error is not None:
        log.warning("the ticket in hand serves on: %s", known.error)


class Renewal:
    """Looks at Redis, and asks WeChat where the ticket is due. It blocks. A class because it
    carries the connections; what is known is the caller's. For one thread at a time."""

    def __init__(self, wechat: WeChat, cache: Cache, settings: Settings) -> None:
        self._wechat = wechat
        self.cache = cache
        self.settings = settings
        self.clock = cache.clock
        self._is_left_behind = False

    def successor(self) -> Renewal:
        """Another one, with connections of its own. This one, left behind, asks WeChat no more."""
        other = Renewal(self._wechat, self.cache.successor(), self.settings)
        self._is_left_behind = True
        return other

    def look_up(self, known: Known) -> Known:
        """What is known after a look. Raises nothing."""
        try:
            if isinstance(known.error, Unexpected) and self.clock() < known.quiet_until:
                return known  # Redis is left alone, too: the fault may be in reading it
            looked = self._look_up(known)
            self.cache.settle()
            return looked
        except Exception as error:
            failure = Unexpected(error)
            log.error("looking for the ticket failed: %s", failure)
            return known.failed(failure, self.clock())

    def _look_up(self, known: Known) -> Known:
        known, ask = self._compared(known)
        if not ask or self.clock() < known.quiet_until:
            return known
        with self.cache.lock() as lease_over:
            if lease_over is None:
                return known
            known, ask = self._compared(known)  # the lock may have been another's till now
            if not ask or self._is_left_behind:
                return known
            known = self._asked(known, lease_over)
        now = self.clock()
        if now >= lease_over or known.usable(now) is None:
            known, _ = self._compared(known)  # a newer one may have come meanwhile
        log_failure(known, now)
        return known

    def _compared(self, known: Known) -> tuple[Known, bool]:
        """Reads Redis and puts back what it lost or never took. Gives what is known then, and
        whether to ask WeChat."""
        found, now, settings = self.cache.read(), self.clock(), self.settings
        held = known.usable(now)
        ticket, ask = decide(now, held, found.ticket if found is not None else None)
        if found is not None:
            lost = found.ticket is None
            if ticket is not None and (lost or not (ask or ticket.in_redis)):
                ticket = self.cache.write(settings.jsapi_ticket_key, ticket, only_if_absent=lost)
            token = decide_token(now, known.access_token, found.access_token)
            if token is not None and not token.in_redis and found.access_token is None:
                token = self.cache.write(settings.access_token_key, token, only_if_absent=True)
            known = replace(known, access_token=token)
            # Another ticket that Redis has serves first; then the next look asks.
            ask = ask and (ticket is None or (held is not None and ticket.value == held.value))
        known = replace(known, ticket=ticket, fresh_at=now if held is None else known.fresh_at)
        if ticket is not None and now < ticket.fresh_until and not ask:
            known = known.succeeded(now)
        return known, ask

    def _asked(self, known: Known, lease_over: float) -> Known:
        """What is known after WeChat was asked: twice, where it refuses the first access_token."""
        token, just_fetched = known.access_token, False
        try:
            if token is None or self.clock() >= token.expires:
                known, just_fetched = self._with_token(known, lease_over), True
            try:
                return self._with_ticket(known, lease_over)
            except WeChatRefused as refusal:
                if not known.blames_the_token(refusal):
                    raise
                known, other = self._without_token(known)
                if other is None and just_fetched:
                    raise
                log.warning("%s; trying once more with another access_token", refusal)
                known = replace(known, access_token=other)
                if other is None:
                    known = self._with_token(known, lease_over)
            return self._with_ticket(known, lease_over)
        except SigningError as error:
            if getattr(error, "errcode", 0) in TOKEN_REFUSED:
                known, _ = self._without_token(known)
            return known.failed(error, self.clock())

    def _without_token(self, known: Known) -> tuple[Known, Credential | None]:
        """Deletes the token here and in Redis. Gives the rest, and the token that Redis has if that
        is another one by now."""
        refused = known.access_token
        if refused is None:
            return known, None
        self.cache.delete(self.settings.access_token_key, refused.value)
        found = self.cache.read()
        other = found.access_token if found is not None else None
        is_other = other is not None and other.value != refused.value
        return replace(known, access_token=None), other if is_other else None

    def _with_token(self, known: Known, lease_over: float) -> Known:
        began, grant = self.clock(), self._wechat.fetch_access_token()
        token = credential_of("access_token", grant, began, self.settings.redis)
        if self.clock() < lease_over:  # or it may be a late answer
            token = self.cache.write(self.settings.access_token_key, token)
        return replace(known, access_token=token)

    def _with_ticket(self, known: Known, lease_over: float) -> Known:
        began, token = self.clock(), known.access_token
        grant = self._wechat.fetch_jsapi_ticket(token.value if token is not None else "")
        redis = self.settings.redis
        ticket = credential_of("jsapi_ticket", grant, began, redis, fresh_for=redis.fresh_for)
        if self.clock() < lease_over:
            ticket = self.cache.write(self.settings.jsapi_ticket_key, ticket)
        return replace(known, ticket=ticket).succeeded(self.clock())
