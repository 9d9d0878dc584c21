"""A stand-in for WeChat's API, for trying the server out without an account.

It issues tokens and tickets, checks what is handed back, and answers as WeChat does.
Its credentials are made anew for every instance and are worth nothing anywhere else.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, TypeVar
from urllib.parse import parse_qs, urlsplit

from .settings import GRANTED_LIFE, JssdkSettings, ServerSettings, Settings, WeChatSettings

S = TypeVar("S", bound="Sandbox")
_FOLDERS: Final = {"token": "/cgi-bin", "stable_token": "/cgi-bin", "getticket": "/cgi-bin/ticket"}
_MESSAGES: Final = {
    40001: "invalid credential, access_token is invalid or not latest",
    40002: "invalid grant_type",
    40013: "invalid appid",
    40125: "invalid appsecret",
    41001: "access_token missing",
    41002: "appid missing",
    41004: "appsecret missing",
    42001: "access_token expired",
    43002: "require POST method",
}
_BANNER: Final = """
*** SANDBOX: a stand-in plays WeChat. These signatures are NOT VALID in WeChat. ***
*** 沙箱模式：签名仅供试用，在微信中无效。 ***

Paste this into another terminal（在另一个终端执行）:

    {}
"""


@dataclass(frozen=True)
class _Issued:
    value: str
    until: float


class Sandbox:
    """WeChat's three endpoints on a free port of 127.0.0.1; `token_life` is in seconds.

    A `token` kills the one before it at once, where WeChat takes up to 5 minutes: what survives
    this survives WeChat.
    """

    def __init__(self, *, appid: str = "wxsandbox", token_life: float = GRANTED_LIFE) -> None:
        self.appid = appid
        self.secret = secrets.token_hex(16)
        self.token_life = token_life
        self._state = threading.RLock()
        self._token: _Issued | None = None
        self._stable: list[_Issued] = []
        self._ticket: _Issued | None = None
        self._server = _Server(("127.0.0.1", 0), type("", (_Handler,), {"wechat": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def start(self: S) -> S:
        """Serves in a thread of its own until `stop`."""
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Closes the port; again does no harm."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def ticket(self) -> str:
        """The jsapi_ticket that is alive now."""
        with self._state:
            if self._ticket is None or time.monotonic() >= self._ticket.until:
                self._ticket = self.issue(64, GRANTED_LIFE)
            return self._ticket.value

    def rotate_ticket(self) -> None:
        """Ends the ticket's life early; the next one asked for is another."""
        with self._state:
            self._ticket = None

    def replace_token(self) -> None:
        """Does what another program does that asks for a `token` with the same account."""
        with self._state:
            self._token = self.issue(96, self.token_life)

    def issue(self, size: int, life: float) -> _Issued:
        """A new credential that lives for `life` seconds."""
        return _Issued(secrets.token_urlsafe(size), time.monotonic() + life)

    def respond(self, endpoint: str, method: str, parameters: dict[str, Any]) -> tuple[int, bytes]:
        """HTTP status and body, as WeChat would answer."""
        with self._state:
            if endpoint == "getticket":
                answer = self._getticket(parameters.get("access_token"))
            elif endpoint == "stable_token" and method != "POST":
                answer = refusal(43002)
            else:
                answer = self._access_token(parameters, stable=endpoint == "stable_token")
        return 200, json.dumps(answer).encode()

    def _getticket(self, access_token: str | None) -> dict[str, Any]:
        alive = [*self._stable, *([self._token] if self._token else [])]
        token = next((token for token in alive if token.value == access_token), None)
        if token is None:
            return refusal(40001 if access_token else 41001)
        if time.monotonic() >= token.until:
            return refusal(42001)
        return {"errcode": 0, "errmsg": "ok", "ticket": self.ticket, "expires_in": GRANTED_LIFE}

    def _access_token(self, parameters: dict[str, Any], *, stable: bool) -> dict[str, Any]:
        checks = (
            (parameters.get("appid"), 41002),
            (parameters.get("secret"), 41004),
            (parameters.get("grant_type") == "client_credential", 40002),
            (parameters.get("appid") == self.appid, 40013),
            (parameters.get("secret") == self.secret, 40125),
        )
        for right, errcode in checks:
            if not right:
                return refusal(errcode)
        now = time.monotonic()
        if stable:
            self._stable = [token for token in self._stable[-2:] if token.until > now]
            if not self._stable or self._stable[-1].until - now <= min(300, self.token_life / 2):
                self._stable.append(self.issue(96, self.token_life))
            token = self._stable[-1]
        else:
            token = self._token = self.issue(96, self.token_life)
        return {"access_token": token.value, "expires_in": round(token.until - now)}


def refusal(errcode: int) -> dict[str, Any]:
    """An error as WeChat words it, with a request id as it has."""
    rid = f"{secrets.token_hex(4)}-{secrets.token_hex(4)}-{secrets.token_hex(4)}"
    return {"errcode": errcode, "errmsg": f"{_MESSAGES.get(errcode, 'error')} rid: {rid}"}


def print_banner(address: str) -> None:
    """Says what the sandbox is, and how to call a server at `http://…` or `unix:PATH`."""
    curl, here = "curl", address.replace("/0.0.0.0:", "/127.0.0.1:").replace("/[::]:", "/[::1]:")
    if address.startswith("unix:"):
        curl, here = f"curl --unix-socket {address[5:]}", "http://localhost"
    with suppress(OSError):  # its reader may be gone
        line = f'{curl} "{here}/getApi?url=https://h5.example.com/page?a=1&b=2"'
        print(_BANNER.format(line), flush=True)


def start_with_settings() -> Settings:
    """Starts a sandbox; gives the settings of a server for it, which signs any page."""
    wechat = Sandbox().start()
    return Settings(
        wechat=WeChatSettings(appid=wechat.appid, secret=wechat.secret, api=wechat.url),
        jssdk=JssdkSettings(page_hosts=("*",)),
        server=ServerSettings(address="127.0.0.1"),
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that went away, as one does whose time is up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    wechat: Sandbox
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        fields = parse_qs(urlsplit(self.path).query)
        self._answer({name: values[0] for name, values in fields.items()})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            self._answer(json.loads(body))
        except ValueError:
            self._answer({})

    def _answer(self, parameters: dict[str, Any]) -> None:
        folder, _, endpoint = urlsplit(self.path).path.rpartition("/")
        status, body = 404, b""
        if _FOLDERS.get(endpoint) == folder:
            status, body = self.wechat.respond(endpoint, self.command, parameters)
        self.send_response(status)
        self.send_header("Content-Type", "application/json; encoding=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Says nothing: the request line has the secret in it."""
