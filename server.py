"""The signing server: routes, request handlers, command line."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Python's own handler prints a traceback where the signal comes during the imports below.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import gzip
import hashlib
import io
import json
import logging
import os
import re
import secrets
import socket
import sys
import time
from asyncio import Future
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from tornado.httputil import HTTPConnection, HTTPHeaders, HTTPMessageDelegate, HTTPServerRequest
from tornado.log import access_log
from tornado.web import Application, HTTPError, RequestHandler

from wechat_sign import process
from wechat_sign.cache import Cache
from wechat_sign.credentials import WeChat
from wechat_sign.errors import (
    CAUSES,
    BadPageUrl,
    ConfigError,
    PageHostNotAllowed,
    SigningError,
    WeChatRefused,
)
from wechat_sign.logs import LONGEST_LINE, LineFormatter, Throttle, printable
from wechat_sign.page_url import (
    MAX_LENGTH,
    asked_for,
    difference,
    host_is_listed,
    host_of,
    page_url,
    shown,
    url_in,
)
from wechat_sign.renewal import Renewal
from wechat_sign.safety import warnings_for
from wechat_sign.sentences import say
from wechat_sign.settings import (
    Limits,
    ServerSettings,
    Settings,
    WeChatSettings,
    load_settings,
)
from wechat_sign.signature import WxConfig
from wechat_sign.tickets import JsapiTickets

log = logging.getLogger("server")

PAGES_REMEMBERED = 256
"""Pages whose changed urls are not warned about again."""

FORWARDED = ("X-Forwarded-For", "X-Real-Ip", "X-Forwarded-Host", "Forwarded", "Via")
"""What tells that a request came by a proxy."""
ORIGIN = re.compile(r"https?://([\w.-]+|\[[0-9a-f:.]+\])(:[0-9]+)?", re.ASCII | re.IGNORECASE)
ABSOLUTE_FORM = re.compile(r"https?://[^/]*/?", re.IGNORECASE)
ACCEPTS_GZIP = re.compile(r"\bgzip\b(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))")

_FILES = Path(__file__).with_name("wechat_sign")
SCRIPT = (_FILES / "wechat-sign.js").read_text(encoding="utf-8")
VERSION = hashlib.sha256(SCRIPT.encode()).hexdigest()[:12]
PAGE = (
    (_FILES / "page.html")
    .read_text(encoding="utf-8")
    .replace("{{causes}}", json.dumps(CAUSES, ensure_ascii=False).replace("<", "\\u003c"))
    .replace("{{version}}", VERSION)  # for caches
    .replace("{{max_length}}", str(MAX_LENGTH))
)
PAGE_POLICY = (
    "default-src 'none'; style-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; "
    "script-src 'nonce-{nonce}' https://res.wx.qq.com https://res2.wx.qq.com; "
    "form-action 'none'; frame-ancestors 'none'; "
    # WeChat's script talks to the app through frames and reports through images.
    "frame-src weixin: wvjbscheme:; img-src data: https://open.weixin.qq.com"
)


class SigningApplication(Application):
    """The routes, and what the handlers share. A class because Tornado's handlers ask for one."""

    def __init__(self, settings: Settings, tickets: JsapiTickets) -> None:
        self.jssdk = settings.jssdk
        self.tickets = tickets
        self.wx_config = WxConfig(settings.wechat.appid, settings.jssdk)
        self._trusted_proxies = settings.server.trusted_proxies
        self._page = settings.server.page
        self.stopping = False
        self._throttle = Throttle()
        self.warned: dict[str, None] = {}
        """The last pages that the log has a warning about."""
        self._routes: dict[str, type[BaseHandler]] = {
            "/getApi": GetApi,
            "/healthz": Healthz,
            "/wechat-sign.js": Script,
        }
        if settings.server.page:
            self._routes["/"] = Page
        super().__init__()

    def start_request(self, server_conn: object, request_conn: HTTPConnection) -> Reception:
        """Tornado calls it when a connection begins to wait for its next request."""
        return Reception(self, server_conn, request_conn)

    def find_handler(self, request: HTTPServerRequest, **_: Any) -> Any:
        """In place of Tornado's, which looks for a pattern that matches."""
        return self.get_handler_delegate(request, self._routes.get(request.path, NotFound))

    def log_request(self, handler: RequestHandler) -> None:
        """Failures at WARNING and ERROR with the reason, of each status one in a second; where
        all is logged, the rest at INFO. Never a query: that may have what is secret in it."""
        status = handler.get_status()
        level = logging.INFO if status < 400 else logging.WARNING if status < 500 else logging.ERROR
        if not access_log.isEnabledFor(level):
            return
        request, refusal = handler.request, getattr(handler, "refusal", "")
        took = 1000 * request.request_time()

        def write(like_it: str) -> None:
            what = f"{status} {printable(str(request.method), 20)} {asked_for(request.path)}"
            page = asked_for(url_in(request.query)) if isinstance(handler, GetApi) else ""
            what += f" for {page}" if page else ""
            what += f" from {self.client_of(request)}, {took:.1f} ms"
            what += f": {refusal}" if refusal else ""
            if refusal and "Referer" in request.headers:
                what += f"; Referer {shown(request.headers['Referer'])}"
            access_log.log(level, "%s%s", what, like_it)

        self.log_one(status, write)

    def log_one(self, kind: str | int, write: Callable[[str], None]) -> None:
        """Has it logged; one of a kind in a second, but where all is logged."""
        if access_log.isEnabledFor(logging.INFO):
            write("")
        else:
            self._throttle.log(kind, write)

    def client_of(self, request: HTTPServerRequest) -> str:
        """The client's address."""
        headers = request.headers
        forwarded = headers.get("X-Forwarded-For") or headers.get("X-Real-Ip", "")
        return process.client_address(str(request.remote_ip), forwarded, self._trusted_proxies)

    def tells_address(self, request: HTTPServerRequest) -> bool:
        """Whether the caller may know this host's address: who asks on this host, by no proxy."""
        proxied = any(name in request.headers for name in FORWARDED)
        is_here = not proxied and process.is_loopback(self.client_of(request))
        return self._page == "address" or is_here


class Reception(HTTPMessageDelegate):
    """Takes a request in and finds its handler. Tornado's own also parses the query's arguments
    and copies them deeply, for handlers that ask for them; here that were a twentieth of a request
    for nothing."""

    def __init__(
        self, application: SigningApplication, server_conn: object, request_conn: HTTPConnection
    ) -> None:
        self._application = application
        self._connections: dict[str, Any] = {
            "server_connection": server_conn,
            "connection": request_conn,
        }
        self._delegate: Any = None

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> Any:
        """`GET http://host/path`, as proxies may ask, is taken for `GET /path`."""
        path, _, query = start_line.path.partition("?")
        if not path.startswith("/"):
            path = ABSOLUTE_FORM.sub("/", path, count=1)
        start_line = start_line._replace(path=path)
        request = HTTPServerRequest(start_line=start_line, headers=headers, **self._connections)
        request.query = query
        self._delegate = self._application.find_handler(request)
        return self._delegate.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> Any:
        return self._delegate.data_received(chunk)

    def finish(self) -> None:
        self._delegate.finish()


class BaseHandler(RequestHandler):
    """What all answers have in common: they are not cached, and errors are JSON that repeats
    nothing of the request but what was to be signed."""

    application: SigningApplication
    refusal = ""
    """Why the request was refused, for the log."""

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")
        page_hosts = self.application.jssdk.page_hosts
        if page_hosts:
            self.set_header("Vary", "Origin")
            origin = self.request.headers.get("Origin", "")
            if ORIGIN.fullmatch(origin) and host_is_listed(host_of(origin), page_hosts):
                self.set_header("Access-Control-Allow-Origin", origin)
                # No answer depends on cookies; some pages send them with every request.
                self.set_header("Access-Control-Allow-Credentials", "true")
                self.set_header("Access-Control-Expose-Headers", "Signed-Url, Retry-After")

    def head(self) -> Awaitable[None] | None:
        return self.get()  # Tornado sends no body

    def options(self) -> None:
        self.set_status(204)
        self.set_header("Allow", "GET, HEAD, OPTIONS")
        if "Access-Control-Allow-Origin" in self._headers:
            self.set_header("Access-Control-Allow-Methods", "GET, HEAD")
            self.set_header("Access-Control-Max-Age", "600")
            wanted = self.request.headers.get("Access-Control-Request-Headers")
            if wanted:
                self.set_header("Access-Control-Allow-Headers", wanted)

    def finish(self, chunk: Any = None) -> Future[None]:
        if self.application.stopping:
            self.set_header("Connection", "close")
        return super().finish(chunk)

    def compute_etag(self) -> str | None:
        """None: no answer is the same twice."""
        return None

    def check_etag_header(self) -> bool:
        """Tornado looks for one that matches even where there is none."""
        return "Etag" in self._headers and super().check_etag_header()

    def finish_compressed(self, text: str) -> None:
        """Ends with a long text, gzipped for clients that accept it. Tornado's
        compress_response would cost every signature something."""
        body = text.encode()
        self.add_header("Vary", "Accept-Encoding")
        if ACCEPTS_GZIP.search(self.request.headers.get("Accept-Encoding", "")):
            self.set_header("Content-Encoding", "gzip")
            body = gzip.compress(body, 6)
        self.finish(body)

    def finish_json(self, told: dict[str, Any]) -> None:
        """Ends with what is told; Chinese stays readable in a terminal."""
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.finish(json.dumps(told, ensure_ascii=False))

    def refuse(self, status: int, /, error: str, *, reason: str = "", **more: Any) -> None:
        self.set_status(status)
        self.refusal = reason or error
        self.finish_json({"error": error, **more})

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        if status_code == 405:
            self.set_header("Allow", "GET, HEAD, OPTIONS")
        self.refuse(status_code, self._reason)

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, HTTPError):  # the access log has those
            log.error("%s failed", type(self).__name__, exc_info=(typ, value, tb))


class NotFound(BaseHandler):
    """Every path that is not a route."""

    def prepare(self) -> None:
        # A browser shows a page the 404 only if the preflight before it was answered.
        if self.request.method == "OPTIONS" and "Access-Control-Allow-Origin" in self._headers:
            return
        self.refuse(404, "there is nothing here; try /getApi?url=")


class GetApi(BaseHandler):
    """`GET /getApi?url=PAGE`: what the page hands to `wx.config`."""

    def get(self) -> Awaitable[None] | None:
        try:
            query = self.request.query.encode("latin-1")
            referer = self.request.headers.get("Referer", "")
            url = page_url(query, self.application.jssdk.page_hosts, referer)
        except SigningError as error:
            self.refuse_for(error)
            return None
        ticket = self.application.tickets.held()
        if ticket is None:
            return self.wait(url, referer)
        self.sign(url, referer, ticket)
        return None

    async def wait(self, url: str, referer: str) -> None:
        try:
            ticket = await self.application.tickets.current()
        except SigningError as error:
            self.refuse_for(error)
        else:
            self.sign(url, referer, ticket)

    def sign(self, url: str, referer: str, ticket: str) -> None:
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        # What was signed, for comparing; the JSON has wx.config's keys and no others.
        self.set_header("Signed-Url", url[:2048])  # nginx takes 4 KiB of headers by default
        self.finish(self.application.wx_config.sign(url, ticket))
        if referer not in ("", url):
            self.compare(url, referer)

    def refuse_for(self, error: SigningError) -> None:
        status, answer = http_error(error)
        if status >= 500:
            self.set_header("Retry-After", str(self.application.tickets.retry_after))
        self.refuse(status, **answer, reason=error.kind)

    def compare(self, url: str, referer: str) -> None:
        """Warns, once for a page, where the Referer shows that its url was changed on its way."""
        page, warned = shown(referer), self.application.warned
        # On iOS a single-page app rightly signs another url: the one it was entered by.
        ios = re.search("iPhone|iPad", self.request.headers.get("User-Agent", ""))
        change = "" if ios or page in warned else difference(url, referer)
        if not change:
            return

        def write(like_it: str) -> None:
            if len(warned) == PAGES_REMEMBERED:
                del warned[next(iter(warned))]
            warned[page] = None
            log.warning(
                "signed for the page %s another url than its own: %s. Send it as "
                "encodeURIComponent(location.href.split('#')[0]), and let no proxy change it%s",
                *(page, change, like_it),
            )

        self.application.log_one("changed url", write)


def http_error(error: SigningError) -> tuple[int, dict[str, Any]]:
    """Status and answer. The caller learns the kind and the errcode; the log has all of it."""
    match error:
        case BadPageUrl():
            return 400, {"error": str(error)}
        case PageHostNotAllowed():
            return 403, {"error": str(error)}
        case WeChatRefused(errcode=errcode):
            text = f"WeChat refuses with errcode {errcode}; the server's log says what to do"
            return 502, {"error": text, "errcode": errcode}
    return 503, {"error": "no ticket to sign with just now; the server's log says why"}


class Healthz(BaseHandler):
    """`GET /healthz`: whether pages can be signed, for load balancers and monitors. No I/O."""

    def get(self) -> None:
        tickets = self.application.tickets
        known, now = tickets.known, tickets.clock()
        told: dict[str, Any] = {"cache": tickets.cache_state}
        if known.error is not None:
            knows = self.application.tells_address(self.request)
            advice = known.error.advice if knows else known.error.public_advice
            told |= {"error": known.error.kind, "advice": advice.en, "advice_zh": advice.zh}
        if isinstance(known.error, WeChatRefused):
            told["errcode"] = known.error.errcode
        ticket = known.usable(now)
        if ticket is not None:
            ages = {"ticket_age": int(now - known.fresh_at)}
            ages["ticket_usable_for"] = int(ticket.usable_until - now)
            self.finish_json({"status": "ok", **ages, **told})
        else:
            self.refuse(503, **{"error": "no ticket yet", "status": "failing", **told})


class Page(BaseHandler):
    """`GET /`: the page that, opened on a phone inside WeChat, shows what works."""

    def get(self) -> None:
        nonce = secrets.token_urlsafe(12)
        self.set_header("Content-Type", "text/html; charset=UTF-8")
        self.set_header("Content-Security-Policy", PAGE_POLICY.format(nonce=nonce))
        self.set_header("X-Frame-Options", "DENY")
        self.set_header("Referrer-Policy", "same-origin")  # /getApi compares it with the url
        self.finish_compressed(PAGE.replace("{{nonce}}", nonce))


class Script(BaseHandler):
    """`GET /wechat-sign.js`: the page's half, for any origin to load."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/javascript; charset=UTF-8")
        self.set_header("Cache-Control", "public, max-age=3600")
        if "Access-Control-Allow-Origin" not in self._headers:
            self.set_header("Access-Control-Allow-Origin", "*")
        self.finish_compressed(SCRIPT)

    def compute_etag(self) -> str:
        return f'W/"{VERSION}"'  # weak: the same for what is compressed and what is not


def make_tickets(settings: Settings, cache: Cache) -> JsapiTickets:
    """The ticket for pages, and all that is behind it."""
    return JsapiTickets(Renewal(WeChat(settings.wechat), cache, settings))


async def serve(settings: Settings, cache: Cache, sockets: list[socket.socket]) -> None:
    """Runs until SIGTERM, SIGINT or SIGHUP, then finishes what was begun, within `drain` s."""
    tickets = make_tickets(settings, cache)
    application = SigningApplication(settings, tickets)
    limit = process.raise_file_limit(process.MAX_CONNECTIONS)
    limits = settings.limits
    server = process.BoundedServer(application, limit=limit, limits=limits, **process.SIZES)
    with process.stop_signals() as stop:
        announce(settings, sockets)
        server.add_sockets(sockets)
        refreshing = asyncio.create_task(refresh_regularly(tickets))
        await stop.wait()
        log.info("stopping")
        deadline = time.monotonic() + limits.drain
        refreshing.cancel()
        application.stopping = True
        # Who waits for WeChat gets a 503 before the end, so that drain can close what is idle.
        await asyncio.gather(
            process.drain(server, deadline=deadline), tickets.close(timeout=0.9 * limits.drain)
        )


async def refresh_regularly(tickets: JsapiTickets) -> None:
    """Looks at the ticket without waiting for a page to ask for it."""
    while True:
        if tickets.look_in <= 0:
            # What goes wrong is logged where it happens.
            await asyncio.gather(tickets.refresh(), return_exceptions=True)
        await asyncio.sleep(max(0.1, tickets.look_in))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="server.py", description="Signs pages for WeChat's JS-SDK: GET /getApi?url=PAGE"
    )
    source = parser.add_mutually_exclusive_group()
    text = "the INI file (default: %(default)s)"
    source.add_argument("--config", type=Path, default=Path("config.ini"), help=text)
    source.add_argument(
        "--sandbox", action="store_true", help="try it: no INI file, WeChat account or Redis"
    )
    parser.add_argument("--address", help="listen here instead of [server] address")
    parser.add_argument("--port", type=port_number, help="listen here instead of [server] port")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check every step from the settings to a signature, say what to do, and exit",
    )
    parser.add_argument("--verbose", action="store_true", help="log every request, and details")
    return parser.parse_args(arguments)


def port_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError("is not a port: a number from 0 to 65535")
    return int(text)


def log_to_stderr(*, verbose: bool) -> None:
    # Never DEBUG for all: what libraries log there has credentials in it. Nor what Tornado says of
    # a request that it can't read: a header's value.
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("tornado").setLevel(logging.WARNING)
    if verbose:
        access_log.setLevel(logging.INFO)
        for name in ("server", "wechat_sign"):
            logging.getLogger(name).setLevel(logging.DEBUG)


def settings_from(given: argparse.Namespace, limits: Limits) -> Settings:
    """Those of the INI file or the sandbox, with --address and --port. Raises ConfigError."""
    if given.sandbox:
        from wechat_sign.sandbox import Sandbox  # no server in earnest needs it in memory

        wechat = Sandbox().start()
        account = WeChatSettings(appid=wechat.appid, secret=wechat.secret, api=wechat.url)
        settings = Settings(wechat=account, server=ServerSettings(address="127.0.0.1"))
    else:
        settings = load_settings(given.config, os.environ)
    given_here = {"address": given.address, "port": given.port}
    overrides = {name: value for name, value in given_here.items() if value is not None}
    return replace(settings, server=replace(settings.server, **overrides), limits=limits)


def cache_for(settings: Settings, given: argparse.Namespace) -> Cache:
    try:
        return Cache(settings)
    except ConfigError as error:  # it does not know the file
        raise ConfigError(f"{given.config}: {error}") from None


def main(arguments: Sequence[str] | None = None, limits: Limits = Limits()) -> int:
    """Exit status: 0 when told to stop, 1 where it can't listen or a check found something,
    2 for a bad configuration."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # advice has Chinese in it, some consoles do not
    given = parse_arguments(arguments)
    log_to_stderr(verbose=given.verbose)
    process.forbid_core_dumps()
    try:
        settings = settings_from(given, limits)
        cache = cache_for(settings, given)
    except ConfigError as error:
        if given.check:
            from wechat_sign.check import Finding, print_findings

            name = say("settings")
            return print_findings(Finding(name, False, problem) for problem in error.problems)
        complain(error)
        return 2
    if given.check:
        from wechat_sign.check import print_check

        return print_check(settings, cache, None if given.sandbox else given.config)
    try:
        sockets = process.listen(settings.server)
    except ConfigError as error:
        complain(error)
        return 1
    if given.sandbox:
        from wechat_sign.sandbox import print_banner

        print_banner(process.address_of(sockets[0]))
    else:
        for warning in warnings_for(settings, given.config, sockets):
            log.warning("%s", warning)
    asyncio.run(serve(settings, cache, sockets))
    return 0


def complain(error: ConfigError) -> None:
    with suppress(OSError):  # the exit status says it, too
        for problem in error.problems:
            print(printable(problem, LONGEST_LINE), file=sys.stderr)


def announce(settings: Settings, sockets: list[socket.socket]) -> None:
    here = " and ".join(map(process.address_of, sockets))
    where = f"Redis {settings.redis.place}" if settings.redis.is_set else "this process only"
    appid = settings.wechat.appid
    log.info("listening on %s for appid %s, credentials in %s", here, appid, where)


def run(limits: Limits = Limits()) -> NoReturn:
    """The whole program; `limits` are for tests."""
    status = main(limits=limits)
    logging.shutdown()
    # A call to WeChat in flight can't be cancelled, and no page waits for it any more.
    os._exit(status)


if __name__ == "__main__":
    run()
