"""The calls to WeChat."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
import warnings
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Final

import requests

from .errors import WeChatRefused, WeChatUnreachable
from .logs import redacted, sanitize
from .settings import WeChatSettings
from .texts import Text

# What urllib3 logs has the whole URL in it, secret included.
logging.getLogger("urllib3").setLevel(logging.CRITICAL)
# requests reads each answer's cookies; of odd ones this prints a traceback.
warnings.filterwarnings("ignore", "http.cookiejar bug!")

_LARGEST_ANSWER: Final = 8192
"""Bytes; WeChat's are below 1000."""
SHORTEST_LIFE: Final = 60
"""Seconds; WeChat grants 7200, and less only of a token that `stable_token` handed out before.
A life shorter than this would have WeChat asked at every other page view."""
LONGEST_CREDENTIAL: Final = 1024
"""Characters; WeChat's tokens have up to 512."""


def is_credential(value: object) -> bool:
    """Whether it can be a token or a ticket: of WeChat's characters, and no program's word for
    nothing."""
    return (
        isinstance(value, str)
        and re.fullmatch(rf"[A-Za-z0-9_.-]{{1,{LONGEST_CREDENTIAL}}}", value) is not None
        and value.lower() not in ("undefined", "null", "none", "nil", "false")
    )


@dataclass(frozen=True)
class Grant:
    """A token or a ticket as WeChat granted it, for `expires_in` seconds."""

    value: str = field(repr=False)
    expires_in: float


@dataclass(frozen=True)
class Credential:
    """A token or a ticket, three moments on the clock, and whether Redis has it.

    The cache lets it go when it `expires`; WeChat granted it until `usable_until`, which is the
    same where nothing more is known. Until `fresh_until` WeChat need not be asked whether it is
    still the one.
    """

    value: str = field(repr=False)
    expires: float
    usable_until: float
    fresh_until: float = 0.0
    in_redis: bool = False


class WeChat:
    """WeChat's API for one account. A class because it carries the account, and what it sent of
    late, to find it in what comes back.

    Methods raise WeChatRefused for an errcode, and WeChatUnreachable for anything that is not
    WeChat's answer.
    """

    def __init__(self, settings: WeChatSettings) -> None:
        self._settings = settings
        self._sent: deque[str] = deque([settings.secret], maxlen=8)
        self.took: dict[str, float] = {}
        """Seconds that the last good answer of an endpoint took."""
        self.ahead = 0.0
        """Seconds by which this host's clock is ahead of WeChat's, by its last answer's Date."""

    def fetch_access_token(self) -> Grant:
        """A token by the endpoint that `token_api` names.

        `token` makes every earlier token of `token` void within 5 minutes; `stable_token` hands
        out the same one until it is about to expire.
        """
        account = {
            "grant_type": "client_credential",
            "appid": self._settings.appid,
            "secret": self._settings.secret,
        }
        if self._settings.token_api == "stable_token":
            answer = self._call("stable_token", "POST", json=account)
        else:
            answer = self._call("token", "GET", params=account)
        return self._grant(answer, "access_token", endpoint=self._settings.token_api)

    def fetch_jsapi_ticket(self, access_token: str) -> Grant:
        """The ticket. Within its life WeChat hands out the same one and says 7200 s each time."""
        if access_token not in self._sent:
            self._sent.append(access_token)
        query = {"access_token": access_token, "type": "jsapi"}
        answer = self._call("getticket", "GET", folder="ticket/", params=query)
        return self._grant(answer, "ticket", endpoint="getticket")

    def _grant(self, answer: dict[str, Any], name: str, *, endpoint: str) -> Grant:
        value, expires_in = answer.get(name), answer.get("expires_in", 0)
        if not is_credential(value):
            raise WeChatUnreachable(Text("it has no {name} in it", name=name), endpoint=endpoint)
        if re.fullmatch("[0-9]{1,9}", str(expires_in)):  # a string by way of some gateways
            expires_in = int(expires_in)
        if type(expires_in) not in (int, float) or not SHORTEST_LIFE <= expires_in < math.inf:
            cause = "its expires_in is no number of seconds, {least} or more"
            raise WeChatUnreachable(Text(cause, least=SHORTEST_LIFE), endpoint=endpoint)
        return Grant(str(value), expires_in)

    def _call(
        self, endpoint: str, method: str, *, folder: str = "", **parameters: Any
    ) -> dict[str, Any]:
        began = time.monotonic()
        url = f"{self._settings.api}/cgi-bin/{folder}{endpoint}"
        try:
            body = self._exchange(method, url, parameters)
        except (OSError, ValueError) as error:  # of requests; ValueError: for an odd url
            # Its text, and that of its cause, has the whole URL in it, secret included.
            cause = _by_proxy(self._redacted(_cause(error)), url)
            raise WeChatUnreachable(cause, endpoint=endpoint) from None
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise WeChatUnreachable(Text("it is not JSON"), endpoint=endpoint) from None
        if not isinstance(answer, dict):
            raise WeChatUnreachable(Text("it is not a JSON object"), endpoint=endpoint)
        errcode = answer.get("errcode", 0)
        if type(errcode) is not int or abs(errcode) > 10**9:  # WeChat's have up to seven digits
            raise WeChatUnreachable(Text("its errcode is no number"), endpoint=endpoint)
        if errcode != 0:
            errmsg = self._redacted(str(answer.get("errmsg", "")))
            raise WeChatRefused(errcode, errmsg, endpoint=endpoint)
        self.took[endpoint] = time.monotonic() - began
        return answer

    def _redacted(self, words: str) -> str:
        """A far end's words on one line, without what was sent, now or earlier."""
        words = redacted(words, [self._settings.secret, *self._sent])
        return sanitize(" ".join(words.split()))

    def _exchange(self, method: str, url: str, parameters: dict[str, Any]) -> bytes:
        """The body of a 200. Connecting and each part of the answer have `timeout` seconds, the
        body twice that in all."""
        timeout = self._settings.timeout
        limits = (timeout / 2, timeout)  # the first for each address that a host has
        with (
            _Session() as session,
            session.request(method, url, timeout=limits, stream=True, **parameters) as response,
        ):
            if response.status_code != 200:
                raise requests.HTTPError(None, f"HTTP {response.status_code}")
            with suppress(Exception):  # it may be missing, or any text
                date = parsedate_to_datetime(response.headers["Date"])
                self.ahead = time.time() - date.timestamp()
            body, end = bytearray(), time.monotonic() + timeout
            for byte in response.iter_content(1):  # of gzip, a byte is at most 1 KB
                body += byte
                if len(body) > _LARGEST_ANSWER:
                    raise requests.exceptions.ContentDecodingError
                if time.monotonic() > end:
                    raise requests.ReadTimeout
            return bytes(body)


class _Session(requests.Session):
    """requests' session, which takes nothing from .netrc and follows no redirect. For one call,
    since it keeps cookies."""

    def __init__(self) -> None:
        super().__init__()
        self.auth = lambda request: request  # in place of .netrc's, which may have a `default`

    def get_redirect_target(self, _response: Any) -> None:
        """None: to read a body without end, and to parse any Location, is not worth a status."""


def _cause(error: BaseException) -> str:
    """The class of the failure and of what is at its bottom, with the system's words for that."""
    bottom: BaseException = error
    while (deeper := bottom.__cause__ or bottom.__context__) is not None:
        bottom = deeper
    names = dict.fromkeys([type(error).__name__, type(bottom).__name__])
    words = getattr(bottom, "verify_message", "") or getattr(bottom, "strerror", None)
    if type(bottom) is OSError and bottom.errno is None:  # requests' own, about files
        words = str(bottom)
    return "/".join(names) + (f" ({words})" if words else "")


def _by_proxy(cause: str, url: str) -> str:
    """The cause, with the name of the variable whose proxy the call went by. Its value may have a
    password in it."""
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url, None))
    names = [name for name in os.environ if "proxy" in name.lower() and os.environ[name] == proxy]
    if not proxy or not names:
        return cause
    variable = " = ".join(names)
    if proxy.startswith("socks"):
        socks = "{variable} is a SOCKS proxy, which is not taken: give an http:// one"
        return Text(socks, variable=variable)
    if proxy.startswith("https:") and "SSL" in cause:
        ours = "{cause}; {variable} begins with https://, and its proxy with http:// most likely"
        return Text(ours, cause=cause, variable=variable)
    return Text("{cause}; by the proxy of {variable}", cause=cause, variable=variable)
