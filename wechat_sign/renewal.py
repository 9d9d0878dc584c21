"""Where a ticket comes from: the cache, or WeChat. Plain and blocking.

The promise: a page never waits for WeChat while a usable ticket exists anywhere, and WeChat is
never asked more than it must be.

| the ticket held is                  | the page gets       | behind it                            |
|-------------------------------------|---------------------|--------------------------------------|
| fresh: seen so within 10 s          | the ticket          | nothing                              |
| due a look                          | the ticket, at once | one refresh: the cache; WeChat where |
|                                     |                     | nobody asked it for `recheck`        |
| over, or there is none              | waits, with all who | the cache; WeChat under the lock     |
|                                     | wait, for a refresh |                                      |
| over, and WeChat failed lately      | the error, at once  | nothing until the back-off is over   |

What ends when, in seconds, by default:

    10           the server looks at the cache again, and so does whatever page comes (tickets.py)
    600          `recheck`: the marker beside the ticket is over, so WeChat is asked for it again
    7100         `expire`: the cache lets ticket and token go
    7200         WeChat lets them go; the 100 in between are for fetching the next ones
    1 to 60      back-off after what may pass, doubling
    1 to 600     back-off where WeChat refuses a token that it has just granted
    60 to 600    back-off after what a person must mend, doubling
    10           a call to WeChat: twice `timeout`; what takes longer is cut off (deadline.py)
    6            whatever is asked of Redis at once, the same; most takes a millisecond
    13           the lock's lease: one call, and 3
    39           the wait for the lock, while there is no ticket: whoever has it makes three calls
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from .cache import Cache
from .clock import Clock
from .credentials import ENDPOINTS, LARGEST_ERRCODE, Credential, Grant, WeChat
from .errors import (
    ABOUT_THE_HOST,
    TOKEN_REFUSED,
    LockedElsewhere,
    SigningError,
    Unexpected,
    WeChatRefused,
)
from .settings import GRANTED_LIFE, Settings

log = logging.getLogger(__name__)

TRANSIENT_BACK_OFF, TOKEN_BACK_OFF, BACK_OFF = (1.0, 60.0), (1.0, 600.0), (60.0, 600.0)
"""Seconds, the first and the longest, during which WeChat is left alone: after what may pass,
after a refused token, and after what a person must mend. A night of either of the last two must
not use up the day's 2000 tokens."""
MARGIN: Final = 100.0
"""Seconds by which the cache lets a credential go before WeChat does, at the least."""
CALLS: Final = 3
"""To WeChat in one look-up, at the most: a token that it refuses, another, and the ticket."""


class BackOff:
    """When WeChat may be asked again after it failed. A class because it carries the failure,
    and how long the last pause was."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._over = 0.0
        self.pause = 0.0
        """Seconds that the last one took, or takes."""
        self.error: SigningError | None = None
        """What last went wrong, if nothing has gone right since."""

    @property
    def remaining(self) -> float:
        """Seconds until WeChat may be asked; 0 or less where it may be."""
        return self._over - self._clock()

    def check(self) -> None:
        """Raises the last error where it is too early to ask again."""
        if self.error is not None and self.remaining > 0:
            raise self.error.with_traceback(None)

    def failed(self, error: SigningError) -> None:
        """Begins a pause, twice as long as the last one."""
        first, longest = BACK_OFF
        if error.transient:
            token_refused = getattr(error, "errcode", 0) in TOKEN_REFUSED
            first, longest = TOKEN_BACK_OFF if token_refused else TRANSIENT_BACK_OFF
        self.pause = min(longest, max(first, 2 * self.pause))
        self.adopt(error, self.pause)

    def adopt(self, error: SigningError, remaining: float) -> None:
        """Leaves WeChat alone for `remaining` seconds because of the error, whoever met it."""
        self._over = self._clock() + remaining
        self.error = error

    def succeeded(self) -> None:
        """Ends it all."""
        self.pause, self._over, self.error = 0.0, 0.0, None


class Renewal:
    """Looks a ticket up, and has WeChat renew it where that is due. A class because it carries
    the back-off, and what to doubt since the clock made a step. For one thread at a time."""

    def __init__(self, wechat: WeChat, cache: Cache, settings: Settings) -> None:
        self._wechat = wechat
        self.cache = cache
        self._settings = settings
        self.limits = settings.limits
        self.clock = cache.clock
        self.back_off = BackOff(self.clock)
        account = f"{settings.wechat.appid} {settings.wechat.secret}"
        self._account = hashlib.sha256(account.encode()).hexdigest()[:8]
        self._answered = False
        self._steps = self.clock.steps
        self._doubts = False
        """Whether the clock made a step, so that no marker is believed until WeChat was asked."""

    def look_up(self, held: Credential | None) -> Credential:
        """The best ticket there is: from the cache, from WeChat, or the usable one that is held.

        Raises SigningError where there is none, and nothing else.
        """
        try:
            if isinstance(self.back_off.error, Unexpected):
                self.back_off.check()
            return self._look_up(held)
        except Exception as error:
            failure = error if isinstance(error, SigningError) else self._unexpected(error)
            if held is None or self.clock() >= held.usable_until:
                raise failure from None
            return held

    def _unexpected(self, error: Exception) -> Unexpected:
        failure = Unexpected(error)
        self.back_off.failed(failure)
        log.error("looking for the ticket failed: %s", failure)
        return failure

    def _look_up(self, held: Credential | None) -> Credential:
        found = self._cached(held)
        self.cache.sync(self._settings.jsapi_ticket_key)
        self.cache.release_lock()  # where the last look could not
        if self.clock.steps != self._steps:
            self._steps, self._doubts = self.clock.steps, True
        if found is not None and self._is_fresh(found, held):
            return self._good(found)
        if found is not None and held is None:
            return found  # nobody waits for WeChat now: the next look asks
        usable = max(filter(None, (found, held)), key=lambda one: one.usable_until, default=None)
        try:
            self.back_off.check()
            return self._good(self._renewed(held, usable))
        except SigningError:
            if usable is None or self.clock() >= usable.usable_until:
                raise
            return usable

    def _cached(self, held: Credential | None) -> Credential | None:
        """The cache's ticket; where it is the one held, that may have been known for longer."""
        found = self.cache.get(self._settings.jsapi_ticket_key)
        if found is not None and held is not None and found.value == held.value:
            found = replace(found, usable_until=max(found.usable_until, held.usable_until))
        if found is not None and found != held:
            # Known here before Redis goes away: fetching another would void the others'.
            self.cache.get(self._settings.access_token_key)
        return found

    def _is_fresh(self, found: Credential, held: Credential | None) -> bool:
        """Whether WeChat was asked lately. An older ticket that came back (from a dump, or from a
        replica that lagged) may still say so: it is not taken for one that lasts longer."""
        outlasts = held is None or found.usable_until >= held.usable_until
        return outlasts and not self._doubts and self.clock() < found.fresh_until

    def _good(self, ticket: Credential) -> Credential:
        self.back_off.succeeded()
        return ticket

    def _renewed(self, held: Credential | None, usable: Credential | None) -> Credential:
        """WeChat's ticket, or the one that another instance got while this one waited."""
        wait = self.limits.lock_wait
        waits = math.ceil(CALLS * self._settings.lease / wait) if usable is None else 0
        for left in range(waits, -1, -1):
            with self.cache.lock(wait=wait if left else 0.0) as mine:
                found = self._cached(held)
                if found is not None and (usable is None or self._is_fresh(found, held)):
                    return found
                if mine:
                    self._heed_others()
                    return self._ask(usable)
        raise LockedElsewhere

    def _heed_others(self) -> None:
        """Raises the failure that another instance shared, which this account would meet again.
        Not before WeChat answered this process once: whoever starts anew may have mended it."""
        text, remaining = self.cache.shared_failure()
        with suppress(ValueError, TypeError, LookupError, OverflowError, RecursionError):
            told = json.loads(text)
            errcode, errmsg = int(told["errcode"]), str(told["errmsg"])[:300]
            error = WeChatRefused(errcode, errmsg, endpoint=told["endpoint"])
            if told["account"] != self._account:  # as while a new secret is rolled out
                return
            if told["endpoint"] not in ENDPOINTS or abs(errcode) > LARGEST_ERRCODE:
                return
            self.back_off.pause = max(self.back_off.pause, min(told["pause"], BACK_OFF[1]))
            if self._answered:
                self.back_off.adopt(error, min(remaining, BACK_OFF[1]))
        self.back_off.check()

    def _ask(self, usable: Credential | None) -> Credential:
        """WeChat's ticket, with the lock held."""
        try:
            ticket = self._fetch_jsapi_ticket(usable)
        except LockedElsewhere:
            raise
        except SigningError as error:
            self.back_off.failed(error)
            if isinstance(error, WeChatRefused):
                self._answered = True
                self._tell_others(error)
            if usable is None:
                log.error("no page can be signed: %s", error)
            else:
                log.warning("the ticket in hand serves on: %s", error)
            raise
        finally:
            self._wechat.close()
        self._answered, self._doubts = True, False
        self.cache.forget_failure()
        return ticket

    def _tell_others(self, error: WeChatRefused) -> None:
        if error.errcode not in ABOUT_THE_HOST:
            told: dict[str, Any] = {
                "errcode": error.errcode,
                "errmsg": error.errmsg,
                "endpoint": error.endpoint,
            }
            told |= {"pause": self.back_off.pause, "account": self._account}
            self.cache.share_failure(json.dumps(told), self.back_off.pause)

    def _fetch_jsapi_ticket(self, usable: Credential | None) -> Credential:
        """With the cached access_token; where WeChat refuses that, once more with another."""
        key = self._settings.access_token_key
        for last_try in (False, True):
            access_token = self._access_token()
            self.cache.extend_lock()
            began = self.clock()
            try:
                grant = self._wechat.fetch_jsapi_ticket(access_token)
            except WeChatRefused as refusal:
                if refusal.errcode not in TOKEN_REFUSED:
                    raise
                self.cache.drop(key, access_token)
                if last_try or self._is_patient(usable):
                    raise
                log.warning("%s; trying once more with a new access_token", refusal)
            else:
                break
        self.cache.sync(key)
        fresh_for = self._settings.redis.fresh_for
        return self._keep(self._settings.jsapi_ticket_key, grant, began, fresh_for=fresh_for)

    def _access_token(self) -> str:
        key = self._settings.access_token_key
        cached = self.cache.get(key)
        if cached is None:
            self.cache.extend_lock()
            began = self.clock()
            cached = self._keep(key, self._wechat.fetch_access_token(), began)
        return cached.value

    def _is_patient(self, usable: Credential | None) -> bool:
        """Whether a token that was refused is not replaced just to see if a ticket is still the
        one, for as long again as `recheck`. Where Redis is away or takes nothing, each `token`
        that one instance fetches makes void what the others have."""
        alone = self.cache.state in ("unreachable", "failing")
        voids = alone and self._settings.wechat.token_api == "token"
        recheck = self._settings.redis.recheck
        return voids and usable is not None and self.clock() < usable.fresh_until + recheck

    def _keep(self, key: str, grant: Grant, began: float, *, fresh_for: int = 0) -> Credential:
        """Puts it into the cache, with its life counted from before WeChat was asked; gives what
        the cache has then, which is another one where this answer came too late."""
        granted = min(grant.expires_in, GRANTED_LIFE)
        life = min(self._settings.redis.expire, max(granted - MARGIN, granted / 2))
        fresh_until = began + min(fresh_for, life)
        credential = Credential(grant.value, began + life, began + granted, fresh_until)
        self.cache.put(key, credential)
        name = "jsapi_ticket" if fresh_for else "access_token"
        log.info("%s fetched from WeChat, kept for %d s", name, life)
        return self.cache.get(key) or credential
