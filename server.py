"""The signing server: routes, request handlers, command line."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # Python's own handler prints a traceback where the signal comes during the imports below.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import base64
import gzip
import hashlib
import io
import json
import logging
import os
import re
import socket
import sys
import time
from asyncio import Future
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from tornado.httputil import HTTPServerRequest
from tornado.log import access_log
from tornado.web import Application, HTTPError, RequestHandler

from wechat_sign import __version__, check, errors, page_url, process
from wechat_sign.cache import Cache
from wechat_sign.credentials import WeChat
from wechat_sign.errors import ConfigError, SigningError
from wechat_sign.logs import LONGEST_LINE, LineFormatter, Throttle, sanitize
from wechat_sign.page_url import for_log, host_is_listed, host_of
from wechat_sign.renewal import Renewal
from wechat_sign.settings import Limits, Settings, load_settings
from wechat_sign.signature import WxConfig
from wechat_sign.texts import Text, local
from wechat_sign.tickets import JsapiTickets

log = logging.getLogger("server")

METHODS = "GET, HEAD, OPTIONS"
APPID = re.compile("(?:^|&)(?:appid=([^&]+)|url=https?://.*)", re.IGNORECASE)
"""In a query, but not in that of a page's raw url."""
PAGE_IN_QUERY = re.compile("(?:^|&)url=(.*)", re.DOTALL)

_FILES = Path(__file__).with_name("wechat_sign")


class Compressed:
    """A constant text, its gzip and its hash."""

    def __init__(self, text: str) -> None:
        self.text = text.encode()
        self.gzipped = gzip.compress(self.text, 9)
        self.version = hashlib.sha256(self.text).hexdigest()[:12]


def hashes_of(tag: str, html: str) -> str:
    """The hashes by which a Content-Security-Policy lets inline `<tag>` elements in."""
    inside = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(one.encode()).digest()) for one in inside)
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)


_script = (_FILES / "wechat-sign.js").read_text(encoding="utf-8")
# Without its indentation, and its comments but the one at its top.
SCRIPT = Compressed(re.sub(r"(?m)^ +(?://.*\n)?| +// .*$", "", _script))
TYPES = Compressed((_FILES / "wechat-sign.d.ts").read_text(encoding="utf-8"))
_page = (
    (_FILES / "page.html")
    .read_text(encoding="utf-8")
    .replace("{{causes}}", json.dumps(errors.CAUSES, ensure_ascii=False).replace("<", "\\u003c"))
    .replace("{{version}}", SCRIPT.version)  # for caches
    .replace("{{max_length}}", str(page_url.MAX_LENGTH))
)
PAGE = Compressed(_page)
PAGE_POLICY = (
    f"default-src 'none'; style-src {hashes_of('style', _page)}; connect-src 'self'; "
    f"script-src {hashes_of('script', _page)} 'self' https://res.wx.qq.com "
    "https://res2.wx.qq.com; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    # WeChat's script talks to the app through frames and reports through images.
    "frame-src weixin: wvjbscheme:; img-src data: https://open.weixin.qq.com"
)


class SigningApplication(Application):
    """The routes, and what the handlers share."""

    def __init__(self, settings: Settings, tickets: JsapiTickets) -> None:
        routes: list[Any] = [
            ("/getApi", GetApi),
            ("/healthz", Healthz),
            (r"/wechat-sign\.js", Script, {"kind": "text/javascript", "body": SCRIPT}),
            (r"/wechat-sign\.d\.ts", Script, {"kind": "text/plain", "body": TYPES}),
        ]
        if settings.server.page:
            routes.append(("/", Page))
        # `GET http://host/path`, as proxies may ask, is taken for `GET /path`.
        routes = [(f"(?:(?i:https?)://[^/]*)?{path}", *rest) for path, *rest in routes]
        super().__init__(routes, default_handler_class=NotFound)
        self.page_hosts = hosts = settings.jssdk.page_hosts
        self.allows = lru_cache(lambda origin: host_is_listed(host_of(origin.lower()), hosts))
        self.tickets = tickets
        self.appid = settings.wechat.appid
        self.wx_config = WxConfig(settings.wechat.appid, settings.jssdk)
        self.stopping = False

    def log_request(self, handler: RequestHandler) -> None:
        """Logs failures at WARNING and ERROR with the reason, the rest at INFO. It logs no query,
        which may hold a secret."""
        status, request = handler.get_status(), handler.request
        level = logging.INFO if status < 400 else logging.WARNING if status < 500 else logging.ERROR
        if not access_log.isEnabledFor(level):
            return
        what = f"{status} {sanitize(str(request.method), 20)} {for_log(request.path)}"
        page = PAGE_IN_QUERY.search(request.query) if isinstance(handler, GetApi) else None
        what += f" for {for_log(page[1])}" if page else ""
        what += f" from {client_of(request)}, {1000 * request.request_time():.1f} ms"
        refusal = getattr(handler, "refusal", "")
        what += f": {refusal}" if refusal else ""
        if refusal and "Referer" in request.headers:
            what += f"; Referer {for_log(request.headers['Referer'])}"
        access_log.log(level, "%s", what, extra={"kind": f"{status}s"})


def client_of(request: HTTPServerRequest) -> str:
    """The peer, and in brackets for whom it says it asks. A proxy writes that at the end of its
    header; what stands before it, or in another header, may be anything."""
    named = {name: request.headers.get(name, "") for name in ("X-Forwarded-For", "X-Real-IP")}
    shown = "; ".join(f"{name} {sanitize(one[-75:])}" for name, one in named.items() if one)
    # Tornado calls the peer on a unix socket 0.0.0.0; no other has that address.
    peer = "a unix socket" if request.remote_ip == "0.0.0.0" else str(request.remote_ip)
    return peer.removeprefix("::ffff:") + (f" ({shown})" if shown else "")


class BaseHandler(RequestHandler):
    """What all answers have in common: they are not cached, and errors are JSON."""

    application: SigningApplication
    refusal = ""
    """Why the request was refused, for the log."""
    usage = "send a GET, without a body"

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")
        if self.application.page_hosts:
            self.set_header("Vary", "Origin")
            origin = self.request.headers.get("Origin", "")
            if origin and self.application.allows(origin):
                self.set_header("Access-Control-Allow-Origin", origin)
                # No answer depends on cookies; some pages send them with every request.
                self.set_header("Access-Control-Allow-Credentials", "true")
                self.set_header("Access-Control-Expose-Headers", "Signed-Url, Retry-After")

    def head(self) -> Awaitable[None] | None:
        return self.get()  # Tornado sends no body

    def options(self) -> None:
        self.set_status(204)
        self.set_header("Allow", METHODS)
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
        """None: answers are not cached."""
        return None

    def check_etag_header(self) -> bool:
        """Tornado looks for one that matches even where there is none."""
        return "Etag" in self._headers and super().check_etag_header()

    def finish_compressed(self, body: Compressed) -> None:
        """Ends with a long text, gzipped for clients that accept it."""
        self.add_header("Vary", "Accept-Encoding")
        accepted = "gzip" in self.request.headers.get("Accept-Encoding", "")
        if accepted:
            self.set_header("Content-Encoding", "gzip")
        self.finish(body.gzipped if accepted else body.text)

    def finish_json(self, body: dict[str, Any]) -> None:
        """Ends with this; Chinese stays readable in a terminal."""
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.finish(json.dumps(body, ensure_ascii=False))

    def refuse(self, status: int, body: dict[str, Any], reason: str = "") -> None:
        self.set_status(status)
        self.refusal = reason or body["error"]
        self.finish_json(body)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        if status_code == 405:
            self.set_header("Allow", METHODS)
        # Tornado raises 400 for a body that is not what its Content-Type says.
        texts = {405: self.usage, 400: "send no body, and no Content-Type: it is not read here"}
        self.refuse(status_code, {"error": texts.get(status_code, self._reason)})

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, HTTPError):  # the access log has those
            log.error("%s failed", type(self).__name__, exc_info=(typ, value, tb))


class NotFound(BaseHandler):
    """Every path that is not a route."""

    def prepare(self) -> None:
        # A browser shows a page the 404 only if the preflight before it was answered.
        if self.request.method == "OPTIONS" and "Access-Control-Allow-Origin" in self._headers:
            return
        self.refuse(404, {"error": "there is nothing here; try /getApi?url="})


class GetApi(BaseHandler):
    """`GET /getApi?url=PAGE`: what the page hands to `wx.config`."""

    usage = "send GET /getApi?url=, with the page's url in the query and no body"

    async def get(self) -> None:
        shared, headers = self.application, self.request.headers
        referer = headers.get("Referer", "")
        agent = headers.get("User-Agent", "")
        # These may sign the url of entry, not the Referer. An iPad may call itself a Macintosh.
        is_entry = "iPhone" in agent or "iPad" in agent or "Macintosh" in agent
        try:
            query = self.request.query.encode("latin-1")
            named = "appid=" in self.request.query.lower() and APPID.findall(self.request.query)
            if named and {*named} - {"", shared.appid}:
                raise errors.BadPageUrl("appid is another account's than this server signs for")
            url = page_url.page_url(query, shared.page_hosts, referer, is_entry=is_entry)
            ticket = await shared.tickets.current()
        except SigningError as error:
            self.refuse_for(error)
            return
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        # What was signed, for comparing; the JSON has wx.config's keys and no others.
        self.set_header("Signed-Url", url[:2048])  # nginx takes 4 KiB of headers by default
        self.finish(shared.wx_config.sign(url, ticket))
        if not is_entry and referer not in ("", url):
            self.warn_of_change(url, referer)
        if "Origin" in headers and "Access-Control-Allow-Origin" not in self._headers:
            self.warn_of_origin(headers["Origin"])

    def refuse_for(self, error: SigningError) -> None:
        """Tells the caller the kind and the errcode; the log has all of it."""
        status = 503
        body: dict[str, Any] = {"error": "no ticket to sign with just now; see the server's log"}
        match error:
            case errors.BadPageUrl():
                status, body = 400, {"error": str(error)}
            case errors.PageHostNotAllowed():
                status, body = 403, {"error": str(error)}
            case errors.WeChatRefused(errcode=errcode):
                text = f"WeChat refuses with errcode {errcode}; the server's log says what to do"
                status, body = 502, {"error": text, "errcode": errcode}
        if status >= 500:
            self.set_header("Retry-After", str(self.application.tickets.retry_after))
        self.refuse(status, body, error.kind)

    def warn_of_change(self, url: str, referer: str) -> None:
        """Warns where the url is the Referer's, cut or with something added."""
        change = page_url.cut_or_added(url, referer)
        if change:
            access_log.warning(
                "signed for the page %s another url than its own: %s. Send it as "
                "encodeURIComponent(location.href.split('#')[0]), and let no proxy change it",
                *(for_log(referer), change),
                extra={"kind": "changed urls"},
            )

    def warn_of_origin(self, origin: str) -> None:
        """Warns where CORS keeps the page from reading the answer."""
        host = sanitize(host_of(origin.lower()) or "the page's host", 253)
        access_log.warning(
            "signed for a page on %s, whose browser will not let it read this answer: "
            "list %s in page_hosts",
            *(host, host),
            extra={"kind": "origins"},
        )


class Healthz(BaseHandler):
    """`GET /healthz`: whether pages can be signed, for load balancers and monitors. No I/O."""

    def get(self) -> None:
        tickets = self.application.tickets
        known, now = tickets.known, tickets.clock()
        body: dict[str, Any] = {"cache": tickets.cache_state}
        if known.error is not None:
            advice = known.error.advice
            body |= {"error": known.error.kind, "advice": advice, "advice_zh": advice.zh}
        if isinstance(known.error, errors.WeChatRefused):
            body["errcode"] = known.error.errcode
        ticket = known.usable(now)
        if ticket is None:
            self.refuse(503, {"error": "no ticket yet", "status": "failing", **body})
            return
        ages = {"ticket_age": int(now - known.fresh_at)}
        ages["ticket_usable_for"] = int(ticket.usable_until - now)
        self.finish_json({"status": "ok", **ages, **body})


class Page(BaseHandler):
    """`GET /`: the page that, opened on a phone inside WeChat, shows what works."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=UTF-8")
        self.set_header("Content-Security-Policy", PAGE_POLICY)
        self.set_header("Referrer-Policy", "same-origin")  # /getApi compares it with the url
        self.finish_compressed(PAGE)


class Script(BaseHandler):
    """`GET /wechat-sign.js`, the page's half, for any origin to load; and its types."""

    def initialize(self, kind: str, body: Compressed) -> None:
        self.kind, self.body = kind, body

    def set_default_headers(self) -> None:
        super().set_default_headers()
        # The same for all, since some CDNs take no notice of Vary.
        self.set_header("Access-Control-Allow-Origin", "*")
        self.clear_header("Access-Control-Allow-Credentials")
        self.clear_header("Vary")

    def get(self) -> None:
        self.set_header("Content-Type", f"{self.kind}; charset=UTF-8")
        self.set_header("Cache-Control", "public, max-age=3600")
        self.finish_compressed(self.body)

    def compute_etag(self) -> str:
        return f'W/"{self.body.version}"'  # weak: the same for what is compressed and what is not


async def serve(settings: Settings, cache: Cache, sockets: list[socket.socket]) -> None:
    """Runs until SIGTERM, SIGINT or SIGHUP, then finishes what was begun, within `drain` s."""
    tickets = JsapiTickets(Renewal(WeChat(settings.wechat), cache, settings))
    application = SigningApplication(settings, tickets)
    limit = process.raise_file_limit(process.MAX_CONNECTIONS)
    limits = settings.limits
    server = process.BoundedServer(application, limit=limit, limits=limits, **process.SIZES)
    with process.stop_signals() as stop:
        here = " and ".join(map(process.address_of, sockets))
        where = f"Redis {settings.redis.place}" if settings.redis.is_set else "this process only"
        appid = settings.wechat.appid
        text = "version %s, listening on %s for appid %s, credentials in %s"
        log.info(text, __version__, here, appid, where)
        server.add_sockets(sockets)
        refreshing = asyncio.create_task(refresh_regularly(tickets))
        await stop.wait()
        log.info("stopping")
        deadline = time.monotonic() + limits.drain
        refreshing.cancel()
        application.stopping = True
        # Requests that wait for WeChat get a 503 before the end; then drain can close them.
        closing = tickets.close(timeout=0.75 * limits.drain)  # then it tells Redis
        await asyncio.gather(process.drain(server, deadline=deadline), closing)


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
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--verbose", action="store_true", help="log every request, and details")
    return parser.parse_args(arguments)


def port_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError("is not a port: a number from 0 to 65535")
    return int(text)


def log_to_stderr(*, verbose: bool) -> None:
    # Libraries log credentials at DEBUG, and Tornado a header's value at INFO.
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("tornado").setLevel(logging.WARNING)
    if not verbose:
        access_log.addFilter(Throttle())
    else:
        access_log.setLevel(logging.INFO)
        for name in ("server", "wechat_sign"):
            logging.getLogger(name).setLevel(logging.DEBUG)


def settings_from(given: argparse.Namespace, limits: Limits) -> Settings:
    """Those of the INI file or the sandbox, with --address and --port. Raises ConfigError."""
    if given.sandbox:
        from wechat_sign import sandbox  # no server in earnest needs it in memory

        settings = sandbox.start_with_settings()
    else:
        settings = load_settings(given.config, os.environ)
    given_here = {"address": given.address, "port": given.port}
    overrides = {name: value for name, value in given_here.items() if value is not None}
    return replace(settings, server=replace(settings.server, **overrides), limits=limits)


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
        cache = Cache(settings)
    except ConfigError as error:
        problems = [problem.at(given.config) for problem in error.problems]
        return check.print_problems(problems) if given.check else complain(problems, 2)
    if given.check:
        return check.print_check(settings, cache, None if given.sandbox else given.config)
    try:
        sockets = process.listen(settings.server)
    except ConfigError as error:
        return complain(error.problems, 1)
    if given.sandbox:
        from wechat_sign import sandbox

        sandbox.print_banner(process.address_of(sockets[0]))
    else:
        for what, advice in check.risks(settings, given.config):
            log.warning("%s. What to do: %s", what, advice.both)
    asyncio.run(serve(settings, cache, sockets))
    return 0


def complain(problems: Iterable[Text], status: int) -> int:
    with suppress(OSError):  # the exit status says it, too
        for problem in problems:
            print(sanitize(local(problem), LONGEST_LINE), file=sys.stderr)
    return status


def run(limits: Limits = Limits()) -> NoReturn:
    """The whole program; `limits` are for tests."""
    status = main(limits=limits)
    logging.shutdown()
    # A call to WeChat in flight can't be cancelled, and no page waits for it any more.
    os._exit(status)


if __name__ == "__main__":
    run()
