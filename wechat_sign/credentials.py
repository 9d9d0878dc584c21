"""The calls to WeChat."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from dataclasses import dataclass, field
from typing import Any, Final

import requests

from .errors import WeChatRefused, WeChatUnreachable
from .settings import WeChatSettings

# What urllib3 logs has the whole URL in it, secret included.
logging.getLogger("urllib3").setLevel(logging.CRITICAL)

_LARGEST_ANSWER: Final = 8192
"""Bytes; WeChat's are below 1000."""


def is_credential(value: object) -> bool:
    """Whether it can be a token or a ticket: visible ASCII, and no program's word for nothing."""
    return (
        isinstance(value, str)
        and re.fullmatch(r"[!-~]+", value) is not None
        and value.lower() not in ("undefined", "null", "none", "nil", "false")
    )


@dataclass(frozen=True)
class Grant:
    """A token or a ticket as WeChat granted it, for `expires_in` seconds."""

    value: str = field(repr=False)
    expires_in: float


class WeChat:
    """WeChat's API for one account. A class because it carries the account and the connection.

    Methods raise WeChatRefused for an errcode, and WeChatUnreachable for anything that is not
    WeChat's answer. A call takes twice the settings' `timeout` at the most: once to connect and
    once to answer. Not for several threads at once.
    """

    def __init__(self, settings: WeChatSettings) -> None:
        self._settings = settings
        self._session = requests.Session()
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
        if isinstance(expires_in, str) and expires_in.isdecimal():  # by way of some gateways
            expires_in = int(expires_in)
        if type(expires_in) not in (int, float) or not 0 < expires_in < math.inf:
            raise WeChatUnreachable("its expires_in is no number of seconds", endpoint=endpoint)
        return Grant(str(value), expires_in)

    def _call(
        self, endpoint: str, method: str, *, folder: str = "", **parameters: Any
    ) -> dict[str, Any]:
        began = time.monotonic()
        body = self._request(endpoint, method, folder, parameters)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise WeChatUnreachable("it is not JSON", endpoint=endpoint) from None
        if not isinstance(answer, dict):
            raise WeChatUnreachable("it is not a JSON object", endpoint=endpoint)
        errcode = answer.get("errcode", 0)
        if not isinstance(errcode, int):
            raise WeChatUnreachable("its errcode is no number", endpoint=endpoint)
        if errcode != 0:
            errmsg = self._redacted(str(answer.get("errmsg", "")), parameters)
            raise WeChatRefused(errcode, errmsg, endpoint=endpoint)
        self.took[endpoint] = time.monotonic() - began
        return answer

    def _request(
        self, endpoint: str, method: str, folder: str, parameters: dict[str, Any]
    ) -> bytes:
        try:
            with self._session.request(
                method,
                f"{self._settings.api}/cgi-bin/{folder}{endpoint}",
                timeout=self._settings.timeout,
                allow_redirects=False,
                stream=True,
                **parameters,
            ) as response:
                status, body = response.status_code, self._read(response)
        except (requests.RequestException, ValueError) as error:  # ValueError: for an odd url
            # Its text, and that of its cause, has the whole URL in it, secret included.
            raise WeChatUnreachable(_cause(error), endpoint=endpoint) from None
        if status != 200:
            raise WeChatUnreachable(f"HTTP {status}", endpoint=endpoint)
        return body

    def _read(self, response: requests.Response) -> bytes:
        """The body, within `timeout` in all: requests' own timeout starts anew with every byte."""
        deadline = time.monotonic() + self._settings.timeout
        body = bytearray()
        for byte in response.iter_content(1):
            body += byte
            if time.monotonic() > deadline:
                raise requests.ReadTimeout
            if len(body) > _LARGEST_ANSWER:
                raise requests.exceptions.ContentDecodingError
        return bytes(body)

    def _redacted(self, errmsg: str, parameters: dict[str, Any]) -> str:
        """The message on one line, without the credentials that a proxy's page might repeat."""
        sent = {**parameters.get("params", {}), **parameters.get("json", {})}
        for name in ("secret", "access_token"):
            if name in sent:
                errmsg = errmsg.replace(sent[name], "***")
        return " ".join(errmsg.split())[:300]


def _cause(error: BaseException) -> str:
    """The class of the failure and of what is at its bottom, with the system's words for that."""
    bottom: BaseException = error
    while (deeper := bottom.__cause__ or bottom.__context__) is not None:
        bottom = deeper
    names = dict.fromkeys([type(error).__name__, type(bottom).__name__])
    words = getattr(bottom, "verify_message", "") or getattr(bottom, "strerror", None)
    return "/".join(names) + (f" ({words})" if words else "")
