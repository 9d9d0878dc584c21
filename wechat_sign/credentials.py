"""The calls to WeChat."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPResponse
from typing import Any, Final

import requests
from requests.adapters import HTTPAdapter

from .deadline import Deadline, Overdue
from .errors import WeChatRefused, WeChatUnreachable
from .logs import redacted
from .sentences import Sentence
from .settings import WeChatSettings

# What urllib3 logs has the whole URL in it, secret included.
logging.getLogger("urllib3").setLevel(logging.CRITICAL)

_LARGEST_ANSWER: Final = 8192
"""Bytes; WeChat's are below 1000."""
ENDPOINTS: Final = ("token", "stable_token", "getticket")
LARGEST_ERRCODE: Final = 10**9
"""WeChat's own have up to seven digits."""
SHORTEST_LIFE: Final = 60
"""Seconds; WeChat grants 7200, and less only of a token that `stable_token` handed out before.
Whoever grants less than this would be asked at every other page view."""
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
    """A token or a ticket, and three moments on the clock.

    The cache lets it go when it `expires`; WeChat granted it until `usable_until`, which is the
    same where nothing more is known. Until `fresh_until` nobody need ask WeChat whether it is
    still the one.
    """

    value: str = field(repr=False)
    expires: float
    usable_until: float
    fresh_until: float = 0.0


class WeChat:
    """WeChat's API for one account. A class because it carries the account, the connection, and
    what it sent of late, to find it in what comes back.

    Methods raise WeChatRefused for an errcode, and WeChatUnreachable for anything that is not
    WeChat's answer. A call takes twice the settings' `timeout` at the most: once to connect and
    once to answer. Not for several threads at once.
    """

    def __init__(self, settings: WeChatSettings) -> None:
        self._settings = settings
        self._deadline = Deadline(2 * settings.timeout)
        self._session = _Session()
        self._sent: deque[str] = deque(maxlen=8)
        self.took: dict[str, float] = {}
        """Seconds that the last good answer of an endpoint took."""

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
        query = {"access_token": access_token, "type": "jsapi"}
        answer = self._call("getticket", "GET", folder="ticket/", params=query)
        return self._grant(answer, "ticket", endpoint="getticket")

    def close(self) -> None:
        """Closes idle connections; a later call opens its own."""
        self._session.close()

    def _grant(self, answer: dict[str, Any], name: str, *, endpoint: str) -> Grant:
        value, expires_in = answer.get(name), answer.get("expires_in", 0)
        if not is_credential(value):
            raise WeChatUnreachable(
                Sentence("it has no {name} in it", name=name), endpoint=endpoint
            )
        if re.fullmatch("[0-9]{1,9}", str(expires_in)):  # a string by way of some gateways
            expires_in = int(expires_in)
        if type(expires_in) not in (int, float) or not SHORTEST_LIFE <= expires_in < math.inf:
            cause = "its expires_in is no number of seconds, {least} or more"
            raise WeChatUnreachable(Sentence(cause, least=SHORTEST_LIFE), endpoint=endpoint)
        return Grant(str(value), expires_in)

    def _call(
        self, endpoint: str, method: str, *, folder: str = "", **parameters: Any
    ) -> dict[str, Any]:
        began = time.monotonic()
        token = parameters.get("params", {}).get("access_token")
        if token is not None and token not in self._sent:
            self._sent.append(token)
        body = self._request(endpoint, method, folder, parameters)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise WeChatUnreachable(Sentence("it is not JSON"), endpoint=endpoint) from None
        if not isinstance(answer, dict):
            raise WeChatUnreachable(Sentence("it is not a JSON object"), endpoint=endpoint)
        errcode = answer.get("errcode", 0)
        if type(errcode) is not int or abs(errcode) > LARGEST_ERRCODE:
            raise WeChatUnreachable(Sentence("its errcode is no number"), endpoint=endpoint)
        if errcode != 0:
            # A proxy's page might repeat what was sent, now or earlier.
            errmsg = redacted(str(answer.get("errmsg", "")), [self._settings.secret, *self._sent])
            raise WeChatRefused(errcode, " ".join(errmsg.split()), endpoint=endpoint)
        self.took[endpoint] = time.monotonic() - began
        return answer

    def _request(
        self, endpoint: str, method: str, folder: str, parameters: dict[str, Any]
    ) -> bytes:
        url, session = f"{self._settings.api}/cgi-bin/{folder}{endpoint}", self._session
        call = partial(self._exchange, session, method, url, parameters)
        try:
            return self._deadline.call(call, session.cut)
        except Overdue:
            self._session = _Session()
            seconds = 2 * self._settings.timeout
            cause = Sentence("no whole answer within {seconds:g} s", seconds=seconds)
            raise WeChatUnreachable(cause, endpoint=endpoint) from None
        except (OSError, ValueError) as error:  # of requests; ValueError: for an odd url
            # Its text, and that of its cause, has the whole URL in it, secret included.
            raise WeChatUnreachable(_cause(error), endpoint=endpoint) from None

    def _exchange(
        self, session: _Session, method: str, url: str, parameters: dict[str, Any]
    ) -> bytes:
        timeout = self._settings.timeout
        with session.request(
            method,
            url,
            timeout=(timeout / 2, timeout),  # the first for each address that a host has
            stream=True,
            **parameters,
        ) as response:
            if response.status_code != 200:
                raise requests.HTTPError(None, f"HTTP {response.status_code}")
            body = bytearray()
            for byte in response.iter_content(1):  # of gzip, a byte is at most 1 KB
                body += byte
                if len(body) > _LARGEST_ANSWER:
                    raise requests.exceptions.ContentDecodingError
            return bytes(body)


class _Session(requests.Session):
    """requests' session, which takes nothing from .netrc, follows no redirect, and can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.auth = _no_auth  # in place of .netrc's, which may have a `default`
        self._is_cut = False
        self._connected: Any = None
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter(self._note))

    def get_redirect_target(self, _response: Any) -> None:
        """None: to read a body without end, and to parse any Location, is not worth a status."""

    def cut(self) -> None:
        """Ends the request in another thread: now, or as soon as it has connected."""
        self._is_cut = True
        self._shut_down()
        self.close()

    def _note(self, connected: Any) -> None:
        """Called before anything is sent, and when an answer is awaited."""
        self._connected = connected
        if self._is_cut:
            self._shut_down()

    def _shut_down(self) -> None:
        connected = self._connected
        while not isinstance(connected, socket.socket | None):  # TLS in a proxy's TLS
            connected = connected.socket
        if connected is not None:
            with suppress(OSError):
                socket.socket.shutdown(connected, socket.SHUT_RDWR)


class _Adapter(HTTPAdapter):
    """Tells of each socket that it uses. A class because it is requests' way."""

    def __init__(self, note: Callable[[Any], None]) -> None:
        self._note = note
        super().__init__()

    def get_connection_with_tls_context(self, *given: Any, **more: Any) -> Any:
        note = self._note
        pool: Any = super().get_connection_with_tls_context(*given, **more)
        kind: Any = type(pool).ConnectionCls

        def connect(connection: Any) -> None:
            kind.connect(connection)
            note(connection.sock)

        def response_class(connected: Any, *given: Any, **more: Any) -> HTTPResponse:
            note(connected)
            return HTTPResponse(connected, *given, **more)

        methods = {"connect": connect, "response_class": staticmethod(response_class)}
        pool.ConnectionCls = type("Connection", (kind,), methods)
        return pool


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


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
