"""The signing server: routes, handlers, command line, start and stop."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import hashlib
import io
import json
import logging
import os
import secrets
import signal
import socket
import struct
import sys
import time
from asyncio import Future
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.ioloop import PeriodicCallback
from tornado.iostream import IOStream
from tornado.log import access_log
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

if sys.platform != "win32":
    import resource

from wechat_sign.cache import Cache
from wechat_sign.check import Finding, check
from wechat_sign.credentials import WeChat
from wechat_sign.errors import (
    CAUSES,
    BadPageUrl,
    ConfigError,
    PageHostNotAllowed,
    SigningError,
    WeChatRefused,
)
from wechat_sign.page_url import MAX_LENGTH, host_is_listed, host_of, page_url
from wechat_sign.renewal import Renewal
from wechat_sign.sandbox import Sandbox
from wechat_sign.settings import ServerSettings, Settings, WeChatSettings, load_settings
from wechat_sign.signature import WxConfig
from wechat_sign.tickets import JsapiTickets

log = logging.getLogger("server")

LOOK_EVERY = 60
"""Seconds between the server's own looks at the ticket."""
DRAIN = 5.0
"""Seconds that answers under way have left when the server is told to stop."""
QUIET = 0.2
"""Seconds without a request after which a stopping server takes it that none is on its way."""
MOST_CONNECTIONS = 4096
"""Connections at once; an idle one takes some 10 KiB."""
BACKLOG = 1024
"""Connections that wait in the kernel's queue."""
LIMITS = {
    "max_header_size": 32 * 1024,  # an escaped url of 2048 Chinese characters is 18 KiB
    "max_body_size": 16 * 1024,  # no request here has one
    "max_buffer_size": 64 * 1024,
    "idle_connection_timeout": 75,  # seconds; more than the 60 of nginx, which must close first
    "body_timeout": 10,  # seconds
}
SO_ATTACH_FILTER = 26
"""Linux's number, which Python's socket module does not name."""

_FILES = Path(__file__).with_name("wechat_sign")
SCRIPT = (_FILES / "wechat-sign.js").read_text(encoding="utf-8")
PAGE = (
    (_FILES / "page.html")
    .read_text(encoding="utf-8")
    .replace("{{causes}}", json.dumps(CAUSES, ensure_ascii=False).replace("<", "\\u003c"))
    .replace("{{version}}", hashlib.sha256(SCRIPT.encode()).hexdigest()[:12])  # for caches
)
PAGE_POLICY = (
    "default-src 'none'; style-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; "
    "script-src 'nonce-{nonce}' https://res.wx.qq.com https://res2.wx.qq.com; "
    "form-action 'none'; frame-ancestors 'none'; "
    # WeChat's script talks to the app through frames and reports through images.
    "frame-src weixin: wvjbscheme:; img-src data: https://open.weixin.qq.com"
)
_STATUS: dict[type[SigningError], int] = {BadPageUrl: 400, PageHostNotAllowed: 403}


class SigningApplication(Application):
    """The routes, and what the handlers share; it counts requests, for a stop to wait for them."""

    def __init__(self, settings: Settings, tickets: JsapiTickets) -> None:
        self.config = settings
        self.tickets = tickets
        self.wx_config = WxConfig(settings.wechat.appid, settings.jssdk)
        self.under_way = 0
        self.last_end = 0.0
        self.stopping = False
        routes = [("/getApi", GetApi), ("/healthz", Healthz), ("/wechat-sign\\.js", Script)]
        if settings.server.page:
            routes.append(("/", Page))
        super().__init__(routes, default_handler_class=NotFound, log_function=log_request)


class BoundedServer(HTTPServer):
    """Has so many connections at the most, and closes the one that was quiet longest for a new
    one. A class because it carries them in that order."""

    def initialize(self, *arguments: Any, **more: Any) -> None:
        super().initialize(*arguments, **more)
        self._quiet_longest: dict[Any, None] = {}
        self._most = min(MOST_CONNECTIONS, file_descriptors() * 3 // 4)

    def start_request(self, server_conn: object, request_conn: Any) -> Any:
        """Tornado calls it when a connection begins to wait for a request."""
        self._quiet_longest.pop(server_conn, None)
        self._quiet_longest[server_conn] = None
        if len(self._quiet_longest) > self._most:
            quiet: Any = next(iter(self._quiet_longest))
            del self._quiet_longest[quiet]
            quiet.stream.close()
        return super().start_request(server_conn, request_conn)

    def on_close(self, server_conn: object) -> None:
        self._quiet_longest.pop(server_conn, None)
        super().on_close(server_conn)


def file_descriptors() -> int:
    """How many this process may have, after asking for more where it is a few."""
    if sys.platform == "win32":
        return MOST_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS * 4 // 3
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


class JsonHandler(RequestHandler):
    """Answers in JSON, errors included, and is never cached."""

    application: SigningApplication
    refusal = ""

    def initialize(self) -> None:
        self.application.under_way += 1

    def on_finish(self) -> None:
        self.application.under_way -= 1
        self.application.last_end = time.monotonic()

    def set_default_headers(self) -> None:
        self.set_header("Cache-Control", "no-store")

    def finish(self, chunk: Any = None) -> Future[None]:
        if self.application.stopping:
            self.set_header("Connection", "close")
        return super().finish(chunk)

    def compute_etag(self) -> None:
        """None: no answer is the same twice."""

    def check_etag_header(self) -> bool:
        return False

    def refuse(self, status: int, error: str, **more: Any) -> None:
        self.set_status(status)
        self.refusal = error
        self.finish({"error": error, **more})

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        if status_code == 405:
            self.set_header("Allow", "GET, OPTIONS")
        self.refuse(status_code, f"{self._reason}: {self.request.method} {self.request.path}")

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, HTTPError):  # those stand in the access log
            super().log_exception(typ, value, tb)


class NotFound(JsonHandler):
    """Every path that is not a route."""

    def prepare(self) -> None:
        self.refuse(404, f"there is nothing at {self.request.path}; try /getApi?url=")


class GetApi(JsonHandler):
    """`GET /getApi?url=PAGE`: what the page hands to `wx.config`."""

    def set_default_headers(self) -> None:
        super().set_default_headers()
        page_hosts = self.application.config.jssdk.page_hosts
        if page_hosts:
            self.set_header("Vary", "Origin")
            origin = self.request.headers.get("Origin", "")
            if host_is_listed(host_of(origin), page_hosts):
                self.set_header("Access-Control-Allow-Origin", origin)
                self.set_header("Access-Control-Expose-Headers", "Signed-Url, Retry-After")

    async def get(self) -> None:
        try:
            page_hosts = self.application.config.jssdk.page_hosts
            url = page_url(self.request.query.encode("latin-1"), page_hosts)
        except SigningError as error:
            self.refuse(_STATUS[type(error)], str(error))
            return
        try:
            ticket = await self.application.tickets.current()
        except SigningError as error:
            self.refuse_for(error)
        else:
            self.answer(url, ticket)

    def answer(self, url: str, ticket: str) -> None:
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        # What was signed, for comparing; the JSON has wx.config's keys and no others.
        told = url if url.isascii() else url.encode("ascii", "backslashreplace").decode()
        self.set_header("Signed-Url", told[:MAX_LENGTH])
        self.finish(self.application.wx_config.sign(url, ticket))

    def options(self) -> None:
        self.set_status(204)
        self.set_header("Allow", "GET, OPTIONS")
        if "Access-Control-Allow-Origin" in self._headers:
            self.set_header("Access-Control-Allow-Methods", "GET")
            self.set_header("Access-Control-Max-Age", "600")
            wanted = self.request.headers.get("Access-Control-Request-Headers")
            if wanted:
                self.set_header("Access-Control-Allow-Headers", wanted)

    def refuse_for(self, error: SigningError) -> None:
        """The caller learns the kind and the errcode; the whole story is in the log."""
        self.set_header("Retry-After", str(self.application.tickets.retry_after))
        if isinstance(error, WeChatRefused):
            self.refuse(
                502,
                f"WeChat refuses with errcode {error.errcode}; the server's log says what to do",
                errcode=error.errcode,
            )
        else:
            self.refuse(503, "no ticket to sign with just now; the server's log says why")


class Healthz(JsonHandler):
    """`GET /healthz`: whether pages can be signed, for load balancers and monitors. No I/O."""

    def get(self) -> None:
        health = self.application.tickets.health()
        error = health.error
        said: dict[str, Any] = {}
        if error is not None:
            advice = error.advice
            said = {"error": error.what, "advice": advice.en, "advice_zh": advice.zh}
        if isinstance(error, WeChatRefused):
            said["errcode"] = error.errcode
        if not health.usable:
            self.refusal = error.what if error else "no ticket yet"
            self.set_status(503)
            self.finish({"status": "failing", "cache": health.cache, "error": self.refusal, **said})
            return
        ages = {"ticket_age": int(health.age), "ticket_usable_for": int(health.remaining)}
        self.finish({"status": "ok", **ages, "cache": health.cache, **said})

    head = get


class Page(JsonHandler):
    """`GET /`: the page that, opened on a phone inside WeChat, shows what works."""

    def get(self) -> None:
        nonce = secrets.token_urlsafe(12)
        self.set_header("Content-Type", "text/html; charset=UTF-8")
        self.set_header("Content-Security-Policy", PAGE_POLICY.format(nonce=nonce))
        self.finish(PAGE.replace("{{nonce}}", nonce))


class Script(JsonHandler):
    """`GET /wechat-sign.js`: the page's half, for any origin to load."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/javascript; charset=UTF-8")
        self.set_header("Cache-Control", "public, max-age=3600")
        self.set_header("Access-Control-Allow-Origin", "*")
        self.finish(SCRIPT)


def log_request(handler: RequestHandler) -> None:
    """Failures at WARNING and ERROR with the reason, the rest at INFO."""
    status = handler.get_status()
    level = logging.INFO if status < 400 else logging.WARNING if status < 500 else logging.ERROR
    if access_log.isEnabledFor(level):
        request = handler.request
        took = 1000 * request.request_time()
        reason = getattr(handler, "refusal", "")
        line = "%d %s %r from %s, %.1f ms%s"
        access_log.log(
            level,
            line,
            status,
            request.method,
            request.uri,
            request.remote_ip,
            took,
            reason and f": {reason}",
        )


def make_tickets(settings: Settings) -> JsapiTickets:
    """The ticket for pages, and all that is behind it."""
    return JsapiTickets(Renewal(WeChat(settings.wechat), Cache(settings), settings))


def listen(settings: ServerSettings) -> list[socket.socket]:
    """Bound sockets. Raises ConfigError where the address or the port can't be had."""
    try:
        return bind_sockets(settings.port, settings.address, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"can't listen on {settings.address} port {settings.port}: {reason}. "
            "Choose another with --address and --port, or in [server]"
        ) from None


async def serve(settings: Settings, sockets: list[socket.socket]) -> None:
    """Runs until SIGTERM or SIGINT, then lets the answers under way finish."""
    application = SigningApplication(settings, make_tickets(settings))
    server = BoundedServer(application, **LIMITS)
    server.add_sockets(sockets)

    async def look() -> None:
        with suppress(SigningError):  # the look-up itself has logged it
            await application.tickets.refresh()

    looking = asyncio.ensure_future(look())
    look_again = PeriodicCallback(look, LOOK_EVERY * 1000)
    look_again.start()

    await told_to_stop()
    log.info("stopping")
    look_again.stop()
    looking.cancel()
    await drain(application, server, sockets)


async def told_to_stop() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, stop.set)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    await stop.wait()


async def drain(
    application: SigningApplication, server: HTTPServer, sockets: list[socket.socket]
) -> None:
    """Stops accepting, and waits up to DRAIN seconds for what was accepted."""
    last = [listening.dup() for listening in sockets]
    server.stop()
    for listening in last:
        # Connections that wait in the kernel's queue are accepted in their clients' eyes.
        with listening, suppress(BlockingIOError):
            let_nobody_in(listening)
            while True:
                connection, address = listening.accept()
                server.handle_stream(IOStream(connection), address)
    application.stopping = True
    begun = now = time.monotonic()
    while now < begun + DRAIN and (
        application.under_way or now < max(begun, application.last_end) + QUIET
    ):
        await asyncio.sleep(QUIET / 10)
        now = time.monotonic()
    await server.close_all_connections()
    await application.tickets.close(timeout=max(0.0, begun + DRAIN - now))


def let_nobody_in(listening: socket.socket) -> None:
    """Where the kernel can (Linux), from now on no connection joins the socket's queue.

    Otherwise one that comes between the last accept and the close is lost.
    """
    if sys.platform == "linux":
        drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF: return 0
        program = struct.pack("HP", 1, ctypes.addressof(drop))
        with suppress(OSError):
            listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="server.py", description="Signs pages for WeChat's JS-SDK: GET /getApi?url=PAGE"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--config",
        type=Path,
        default=Path("config.ini"),
        help="the INI file (default: %(default)s)",
    )
    source.add_argument(
        "--sandbox", action="store_true", help="try it: no INI file, WeChat account or Redis"
    )
    parser.add_argument("--address", help="listen here instead of [server] address")
    parser.add_argument("--port", type=port_number, help="listen here instead of [server] port")
    parser.add_argument(
        "--check",
        action="store_true",
        help="look from the settings to a signature what works, say what to do, and end",
    )
    parser.add_argument("--verbose", action="store_true", help="log every request, and details")
    return parser.parse_args(arguments)


def port_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: a number from 0 to 65535")
    return int(text)


def log_to_stderr(*, verbose: bool) -> None:
    # Never DEBUG for all: what libraries log there has credentials in it.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("tornado").setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose:
        for name in ("server", "wechat_sign"):
            logging.getLogger(name).setLevel(logging.DEBUG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when told to stop, 1 where it can't listen or a check found something,
    2 for a bad configuration."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # advice has Chinese in it, some consoles do not
    given = parse_arguments(arguments)
    log_to_stderr(verbose=given.verbose)
    try:
        if given.sandbox:
            wechat = Sandbox().start()
            settings = Settings(
                WeChatSettings(wechat.appid, wechat.secret, wechat.url),
                server=ServerSettings(address="127.0.0.1"),
            )
        else:
            settings = load_settings(given.config, os.environ)
    except ConfigError as error:
        if given.check:
            for problem in error.problems:
                print_step(Finding("settings", False, problem))
            return 1
        print(error, file=sys.stderr)
        return 2
    if given.check:
        return print_check(settings, "the sandbox" if given.sandbox else str(given.config))
    overrides = {"address": given.address, "port": given.port}
    settings = replace(
        settings,
        server=replace(settings.server, **{k: v for k, v in overrides.items() if v is not None}),
    )
    try:
        sockets = listen(settings.server)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    announce(settings, sockets)
    if given.sandbox:
        print_sandbox(sockets)
    asyncio.run(serve(settings, sockets))
    return 0


def print_check(settings: Settings, source: str) -> int:
    """Every step on a line, up to the first that fails; status 1 where one did."""
    logging.disable(logging.ERROR)  # the steps say it
    wechat = settings.wechat
    text = f"{source}: appid {wechat.appid}, {wechat.token_api} at {wechat.api}"
    print_step(Finding("settings", True, text))
    good = True
    for step in check(settings, Cache(settings)):
        print_step(step)
        good = good and step.ok
    return 0 if good else 1


def print_step(step: Finding) -> None:
    word = "ok  " if step.ok else "FAIL"
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        word = f"\033[{32 if step.ok else 31}m{word}\033[0m"
    what_to_do = f"\n      What to do: {step.advice}" if step.advice.en else ""
    print(f"{word}  {step.name:12}  {step.text}{what_to_do}", flush=True)


def base_url(sockets: list[socket.socket]) -> str:
    host, port = sockets[0].getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def announce(settings: Settings, sockets: list[socket.socket]) -> None:
    where = f"Redis {settings.redis.place}" if settings.redis.host else "this process only"
    appid = settings.wechat.appid
    log.info("listening on %s for appid %s, credentials in %s", base_url(sockets), appid, where)


def print_sandbox(sockets: list[socket.socket]) -> None:
    here = base_url(sockets).replace("/0.0.0.0:", "/127.0.0.1:").replace("/[::]:", "/[::1]:")
    print(
        "\n"
        "*** SANDBOX: a stand-in plays WeChat. These signatures are NOT VALID in WeChat. ***\n"
        "*** 沙箱模式：签名仅供试用，在微信中无效。 ***\n\n"
        "Paste this into another terminal:\n\n"
        f'    curl "{here}/getApi?url=https://h5.example.com/page?a=1&b=2"\n',
        flush=True,
    )


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    # A call to WeChat under way can't be cancelled, and nobody waits for it any more.
    os._exit(status)
