"""The calls to WeChat."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPResponse
from typing import Any, Final

import requests
from requests.adapters import HTTPAdapter

from .deadline import Overdue, within
from .errors import WeChatRefused, WeChatUnreachable
from .settings import WeChatSettings

# What urllib3 logs has the whole URL in it, secret included.
logging.getLogger("urllib3").setLevel(logging.CRITICAL)

_LARGEST_ANSWER: Final = 8192
"""Bytes; WeChat's are below 1000."""
_LARGEST_ERRCODE: Final = 10**9
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


class WeChat:
    """WeChat's API for one account. A class because it carries the account, the connection, and
    what it sent of late, to find it in what comes back.

    Methods raise WeChatRefused for an errcode, and WeChatUnreachable for anything that is not
    WeChat's answer. A call takes twice the settings' `timeout` at the most: once to connect and
    once to answer. Not for several threads at once.
    """

    def __init__(self, settings: WeChatSettings) -> None:
        self._settings = settings
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
            raise WeChatUnreachable(f"it has no {name} in it", endpoint=endpoint)
        if re.fullmatch("[0-9]{1,9}", str(expires_in)):  # a string by way of some gateways
            expires_in = int(expires_in)
        if type(expires_in) not in (int, float) or not SHORTEST_LIFE <= expires_in < math.inf:
            cause = f"its expires_in is no number of seconds, {SHORTEST_LIFE} or more"
            raise WeChatUnreachable(cause, endpoint=endpoint)
        return Grant(str(value), expires_in)

    def _call(
        self, endpoint: str, method: str, *, folder: str = "", **parameters: Any
    ) -> dict[str, Any]:
        began = time.monotonic()
        sent = {**parameters.get("params", {}), **parameters.get("json", {})}
        for name in ("secret", "access_token"):
            if name in sent and sent[name] not in self._sent:
                self._sent.append(sent[name])
        body = self._request(endpoint, method, folder, parameters)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise WeChatUnreachable("it is not JSON", endpoint=endpoint) from None
        if not isinstance(answer, dict):
            raise WeChatUnreachable("it is not a JSON object", endpoint=endpoint)
        errcode = answer.get("errcode", 0)
        if type(errcode) is not int or abs(errcode) > _LARGEST_ERRCODE:
            raise WeChatUnreachable("its errcode is no number", endpoint=endpoint)
        if errcode != 0:
            errmsg = self._redacted(str(answer.get("errmsg", "")))
            raise WeChatRefused(errcode, errmsg, endpoint=endpoint)
        self.took[endpoint] = time.monotonic() - began
        return answer

    def _request(
        self, endpoint: str, method: str, folder: str, parameters: dict[str, Any]
    ) -> bytes:
        url = f"{self._settings.api}/cgi-bin/{folder}{endpoint}"
        session, seconds = self._session, 2 * self._settings.timeout
        call = partial(self._exchange, session, method, url, parameters)
        try:
            return within(seconds, call, session.cut)
        except Overdue:
            self._session = _Session()
            cause = f"no whole answer within {seconds:g} s"
            raise WeChatUnreachable(cause, endpoint=endpoint) from None
        except (requests.RequestException, ValueError) as error:  # ValueError: for an odd url
            # Its text, and that of its cause, has the whole URL in it, secret included.
            raise WeChatUnreachable(_cause(error), endpoint=endpoint) from None

    def _exchange(
        self, session: requests.Session, method: str, url: str, parameters: dict[str, Any]
    ) -> bytes:
        with session.request(
            method,
            url,
            timeout=self._settings.timeout,
            allow_redirects=False,
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

    def _redacted(self, errmsg: str) -> str:
        """The message without the credentials that a proxy's page might repeat, the url-escaped
        ones and those of an earlier call included."""
        for value in self._sent:
            letters = (f"(?:{re.escape(letter)}|%{ord(letter):02x})" for letter in value)
            errmsg = re.sub("".join(letters), "***", errmsg, flags=re.IGNORECASE)
        return " ".join(errmsg.split())


class _Session(requests.Session):
    """requests' session, which takes nothing from .netrc, follows no redirect, and can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.auth = _no_auth  # in place of .netrc's, which may have a `default`
        self._receiving: list[socket.socket] = []
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter(self._receiving))

    def get_redirect_target(self, _response: Any) -> None:
        """None: to read a body without end, and to parse any Location, is not worth a status."""

    def cut(self) -> None:
        """Ends the exchange in another thread."""
        for receiving in self._receiving:
            with suppress(OSError):
                socket.socket.shutdown(receiving, socket.SHUT_RDWR)


class _Adapter(HTTPAdapter):
    """Notes the socket that an answer is awaited on. A class because it is requests' way."""

    def __init__(self, receiving: list[socket.socket]) -> None:
        self._receiving = receiving
        super().__init__()

    def get_connection_with_tls_context(self, *given: Any, **more: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*given, **more)
        methods = {"response_class": staticmethod(self._await_answer)}
        pool.ConnectionCls = type("Connection", (type(pool).ConnectionCls,), methods)
        return pool

    def _await_answer(self, receiving: socket.socket, *given: Any, **more: Any) -> HTTPResponse:
        self._receiving[:] = [receiving]
        return HTTPResponse(receiving, *given, **more)


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _cause(error: BaseException) -> str:
    """The class of the failure and of what is at its bottom, with the system's words for that."""
    bottom: BaseException = error
    while (deeper := bottom.__cause__ or bottom.__context__) is not None:
        bottom = deeper
    names = dict.fromkeys([type(error).__name__, type(bottom).__name__])
    words = getattr(bottom, "verify_message", "") or getattr(bottom, "strerror", None)
    return "/".join(names) + (f" ({words})" if words else "")
