"""A stand-in for WeChat's API, for trying the server out and for the tests.

It issues tokens and tickets, checks what is handed back, and answers as WeChat does.
Its credentials are made anew for every instance and are worth nothing anywhere else.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from .signature import sign

_MESSAGES: Final = {
    -1: "system error",
    -1000: "system error",
    40001: "invalid credential, access_token is invalid or not latest",
    40002: "invalid grant_type",
    40013: "invalid appid",
    40014: "invalid access_token",
    40125: "invalid appsecret",
    40164: "invalid ip 203.0.113.7 ipv6 ::ffff:203.0.113.7, not in whitelist",
    41001: "access_token missing",
    41002: "appid missing",
    41004: "appsecret missing",
    42001: "access_token expired",
    43002: "require POST method",
    45009: "reach max api daily quota limit",
    45011: "api minute-quota reach limit mustslower retry next minute",
    48001: "api unauthorized",
    61004: "access clientip is not registered, not in ip-white-list",
}


@dataclass(frozen=True)
class Fault:
    """How an endpoint misbehaves: what it waits for, and what it answers in place of the truth."""

    delay: float = 0
    """Seconds before the answer."""
    hold: threading.Event | None = None
    """The answer waits until this is set."""
    status: int = 200
    body: bytes | None = None
    errcode: int = 0
    """Refuses with this errcode and WeChat's message for it."""
    hang_up: bool = False
    """Closes the connection without an answer."""


@dataclass
class _Token:
    value: str
    until: float


class Sandbox:
    """WeChat's three endpoints on a free port of 127.0.0.1.

    A class because it is WeChat's state: which credentials are alive. `calls` counts requests
    by endpoint (token, stable_token, getticket); `faults` maps an endpoint to its Fault.
    Lives are in seconds. A `token` kills the one before it at once, where WeChat takes up to
    5 minutes: what survives this survives WeChat.
    """

    def __init__(
        self, *, appid: str = "wxsandbox", token_life: float = 7200, ticket_life: float = 7200
    ) -> None:
        self.appid = appid
        self.secret = secrets.token_hex(16)
        self.issued = {self.secret}
        """Every credential there has been: what no log or answer may show."""
        self.calls: Counter[str] = Counter()
        self.faults: dict[str, Fault] = {}
        self.called = threading.Condition()
        """Notified at every request, before it is answered."""
        self._token_life = token_life
        self._ticket_life = ticket_life
        self._state = threading.Lock()
        self._token: _Token | None = None
        self._stable: list[_Token] = []
        self._ticket: _Token | None = None
        sandbox = self

        class Handler(_Handler):
            wechat = sandbox

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> Sandbox:
        """Serves in a thread of its own until `stop`."""
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def stop(self) -> None:
        """Closes the port; again does no harm."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def ticket(self) -> str:
        """The jsapi_ticket that is alive now."""
        with self._state:
            now = time.monotonic()
            if self._ticket is None or now >= self._ticket.until:
                self._ticket = self._issue(64, self._ticket_life)
            return self._ticket.value

    def rotate_ticket(self) -> None:
        """Ends the ticket's life early; the next one asked for is another."""
        with self._state:
            self._ticket = None

    def replace_token(self) -> None:
        """What another program does that asks for a `token` with the same account."""
        with self._state:
            self._token = self._new_token()

    def verify(self, *, signature: str, noncestr: str, timestamp: int, url: str) -> bool:
        """What the phone decides: whether the signature is right for this page, now."""
        return signature == sign(
            jsapi_ticket=self.ticket, noncestr=noncestr, timestamp=timestamp, url=url
        )

    def answer(self, endpoint: str, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that WeChat would answer."""
        if endpoint == "getticket":
            return self._getticket(parameters)
        if endpoint == "stable_token" and method != "POST":
            return refusal(43002)
        wrong = self._wrong_account(parameters)
        if wrong:
            return refusal(wrong)
        with self._state:
            if endpoint == "stable_token":
                return self._stable_token(force=parameters.get("force_refresh") is True)
            self._token = self._new_token()
            return {"access_token": self._token.value, "expires_in": int(self._token_life)}

    def _wrong_account(self, parameters: dict[str, Any]) -> int:
        checks = (
            (not parameters.get("appid"), 41002),
            (not parameters.get("secret"), 41004),
            (parameters.get("grant_type") != "client_credential", 40002),
            (parameters.get("appid") != self.appid, 40013),
            (parameters.get("secret") != self.secret, 40125),
        )
        return next((errcode for wrong, errcode in checks if wrong), 0)

    def _stable_token(self, *, force: bool) -> dict[str, Any]:
        now = time.monotonic()
        self._stable = [token for token in self._stable[-2:] if token.until > now]
        if (
            force
            or not self._stable
            or self._stable[-1].until - now <= min(300, self._token_life / 2)
        ):
            self._stable = [*([] if force else self._stable), self._new_token()]
        token = self._stable[-1]
        return {"access_token": token.value, "expires_in": int(token.until - now)}

    def _getticket(self, parameters: dict[str, Any]) -> dict[str, Any]:
        access_token = parameters.get("access_token")
        if not access_token:
            return refusal(41001)
        with self._state:
            alive = [*self._stable, *([self._token] if self._token else [])]
            token = next((token for token in alive if token.value == access_token), None)
        if token is None:
            return refusal(40001)
        if time.monotonic() >= token.until:
            return refusal(42001)
        return {"errcode": 0, "errmsg": "ok", "ticket": self.ticket, "expires_in": 7200}

    def _new_token(self) -> _Token:
        return self._issue(96, self._token_life)

    def _issue(self, size: int, life: float) -> _Token:
        value = secrets.token_urlsafe(size)
        self.issued.add(value)
        return _Token(value, time.monotonic() + life)


def refusal(errcode: int) -> dict[str, Any]:
    """An error as WeChat words it, with a request id as it has."""
    rid = f"{secrets.token_hex(4)}-{secrets.token_hex(4)}-{secrets.token_hex(4)}"
    return {"errcode": errcode, "errmsg": f"{_MESSAGES.get(errcode, 'error')} rid: {rid}"}


def print_banner(address: str) -> None:
    """Says what the sandbox is, and how to call a server at `http://…` or `unix:PATH`."""
    curl, here = "curl", address.replace("/0.0.0.0:", "/127.0.0.1:").replace("/[::]:", "/[::1]:")
    if address.startswith("unix:"):
        curl, here = f"curl --unix-socket {address[5:]}", "http://localhost"
    print(
        "\n"
        "*** SANDBOX: a stand-in plays WeChat. These signatures are NOT VALID in WeChat. ***\n"
        "*** 沙箱模式：签名仅供试用，在微信中无效。 ***\n\n"
        "Paste this into another terminal:\n\n"
        f'    {curl} "{here}/getApi?url=https://h5.example.com/page?a=1&b=2"\n',
        flush=True,
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
            parameters = json.loads(body)
        except ValueError:
            parameters = {}
        self._answer(parameters)

    def _answer(self, parameters: dict[str, Any]) -> None:
        folder, _, endpoint = urlsplit(self.path).path.rpartition("/")
        known = {"token": "/cgi-bin", "stable_token": "/cgi-bin", "getticket": "/cgi-bin/ticket"}
        if known.get(endpoint) != folder:
            self._send(404, b"")
            return
        with self.wechat.called:
            self.wechat.calls[endpoint] += 1
            self.wechat.called.notify_all()
        fault = self.wechat.faults.get(endpoint, Fault())
        time.sleep(fault.delay)
        if fault.hold is not None:
            fault.hold.wait()
        if fault.hang_up:
            self.close_connection = True
        elif fault.body is not None or fault.status != 200:
            self._send(fault.status, fault.body or b"")
        else:
            answer = (
                refusal(fault.errcode)
                if fault.errcode
                else self.wechat.answer(endpoint, self.command, parameters)
            )
            self._send(200, json.dumps(answer).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json; encoding=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Says nothing: the request line has the secret in it."""
