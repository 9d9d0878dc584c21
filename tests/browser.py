"""What the tests of page and script run on: real browsers, WeChat's real script, a phone's bridge.

Chromium is driven by playwright, WebKit, which iOS has, by WebDriver. In both the one thing that
is stubbed is WeixinJSBridge (bridge.js): what the WeChat app gives to a page.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import Any, Final, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from harness import (
    PATIENCE,
    Sandbox,
    Server,
    assert_no_credential,
    eventually,
    free_port,
    signature_of,
    unavailable,
    write_ini,
)

from server import hashes_of

NPM = Path(__file__).with_name(".npm")
"""The packages that were fetched; no part of the project."""
WEIXIN = ("weixin-js-sdk@1.6.0", "index.original.js")
"""jweixin-1.6.0.js as res.wx.qq.com has it: it sets window.wx."""
WEIXIN_COMMONJS = ("weixin-js-sdk@1.6.0", "index.js")
BRIDGE = Path(__file__).with_name("bridge.js").read_text(encoding="utf-8")
BRIDGE_TAG = (
    '<!doctype html><meta charset="utf-8"><title>的 page</title><script src="/bridge.js"></script>'
)
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def npm_file(package: str, path: str) -> str:
    """The text of a file of a package, fetched by `npm pack` once."""
    folder = NPM / package.replace("/", "+")
    if not folder.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            unavailable(f"no npm to get {package} with: apt-get install npm")
        NPM.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=NPM) as made:
            command = [str(npm), "pack", "--silent", package]
            packed = subprocess.run(command, cwd=made, stdout=PIPE, stderr=STDOUT, text=True)
            archives = list(Path(made).glob("*.tgz"))
            if not archives:
                unavailable(f"npm pack {package} brings nothing: {packed.stdout[-500:]}")
            shutil.unpack_archive(archives[0], made)
            with suppress(OSError):  # another run was quicker
                (Path(made) / "package").rename(folder)
    return (folder / path).read_text(encoding="utf-8")


def made_by_chromium_69(url: str, kind: str) -> str:
    """The document that a page becomes, 320 px wide, in an engine as old as some phones have."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("npm has that engine for x86_64 alone")
    package = "chrome-aws-lambda@1.6.3"
    npm_file(package, "package.json")
    program = NPM / package / "chromium"
    if not program.exists():
        packed = NPM / package / "bin" / "chromium-69.0.3494.0.br"
        unpack = """const [from, to] = process.argv.slice(1), fs = require('fs')
            const made = require('zlib').brotliDecompressSync(fs.readFileSync(from))
            fs.writeFileSync(to, made, {mode: 0o755})"""
        node = str(shutil.which("node"))
        subprocess.run([node, "-e", unpack, str(packed), str(program)], check=True)
    flags = (
        "headless no-sandbox single-process no-zygote disable-gpu disable-dev-shm-usage dump-dom"
    )
    flags += " window-size=320,800 virtual-time-budget=9000"
    command = [str(program), *(f"--{flag}" for flag in flags.split())]
    command += [f"--user-agent={KINDS[kind].agent}", url]
    ended = subprocess.run(command, stdout=PIPE, stderr=DEVNULL, timeout=60, check=True)
    return ended.stdout.decode()


class Kind(NamedTuple):
    """A kind of phone: its user agent, whether WeChat there takes the url of entry for the page's,
    whatever the route is, and whether it deals with one call at a time."""

    agent: str
    keeps_entry: bool = False
    queue: bool = False


_ANDROID = "Mozilla/5.0 (Linux; Android 14; PJD110) AppleWebKit/537.36 (KHTML, like Gecko) "
_MAC = "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/"
KINDS: Final = {
    "iOS": Kind(
        "Mozilla/5.0 (iPhone; CPU iPhone OS 17_0 like Mac OS X) AppleWebKit/605.1.15 "
        "(KHTML, like Gecko) Mobile/15E148 MicroMessenger/8.0.50(0x18003237) NetType/WIFI",
        keeps_entry=True,
    ),
    "Android": Kind(
        _ANDROID + "Version/4.0 Chrome/116.0.0.0 Mobile Safari/537.36 XWEB/1160117 "
        "MicroMessenger/8.0.50.2701(0x28003256) WeChat/arm64 NetType/WIFI",
        queue=True,
    ),
    "HarmonyOS": Kind(
        "Mozilla/5.0 (Phone; OpenHarmony 5.0) AppleWebKit/537.36 (KHTML, like Gecko) "
        "Chrome/114.0.0.0 Safari/537.36 ArkWeb/4.1.6.1 Mobile MicroMessenger/8.0.9.33(0xf4080933)",
    ),
    "Windows": Kind(
        "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
        "Chrome/116.0.0.0 Safari/537.36 NetType/WIFI MicroMessenger/7.0.20.1781(0x6700143B) "
        "WindowsWechat(0x63090b19) XWEB/11275",
    ),
    "Mac": Kind(
        _MAC + "537.36 (KHTML, like Gecko) Chrome/116.0.0.0 Safari/537.36 NetType/WIFI "
        "MicroMessenger/6.8.0(0x16080000) MacWechat/3.8.9(0x13080910) XWEB/1227",
    ),
    "iPad": Kind(
        _MAC + "605.1.15 (KHTML, like Gecko) MicroMessenger/8.0.50(0x18003237) NetType/WIFI",
        keeps_entry=True,
    ),
    "desktop": Kind("Mozilla/5.0 (X11; Linux x86_64) Chrome/116.0"),
    "WeCom": Kind(
        "Mozilla/5.0 (iPhone; CPU iPhone OS 17_0 like Mac OS X) AppleWebKit/605.1.15 "
        "Mobile/15E148 wxwork/4.1.36 MicroMessenger/7.0.1 Language/zh",
        keeps_entry=True,
        queue=True,
    ),
}
IN_WECHAT = [kind for kind in KINDS if kind not in ("desktop", "WeCom")]


def bridge_for(kind: str, wechat: Sandbox, **more: Any) -> str:
    """bridge.js for a kind of phone that asks this WeChat. `more` goes to its setup:
    `when` the bridge comes (early, late, never), `problems` to find before any check of its own,
    `lacks` and `silent`: functions, `answers` and `delays` in ms by function, `sealed`,
    and whether it `tells` the url that it took."""
    setup = {
        "ticket": wechat.ticket,
        "appid": wechat.appid,
        "android": "Android" in KINDS[kind].agent,
        "keepsEntry": KINDS[kind].keeps_entry,
        "queue": KINDS[kind].queue,
        "when": "never" if kind == "desktop" else "early",
        "delay": 5,
        "delays": {"preVerifyJSAPI": 30},
        "problems": [],
        "lacks": [],
        "silent": [],
        "answers": {},
    }
    return BRIDGE.replace("__SETUP__", json.dumps({**setup, **more}))


class Signing(NamedTuple):
    wechat: Sandbox
    url: str
    """The server's."""


def signing_server() -> Iterator[Signing]:
    """One for all tests that change nothing about it."""
    wechat = Sandbox().start()
    with tempfile.TemporaryDirectory() as folder:
        lines = ("[jssdk]", "page_hosts = 127.0.0.1", "debug = false")
        ini = write_ini(Path(folder) / "c.ini", wechat, *lines)
        server = Server("--config", str(ini), "--address", "127.0.0.1", "--port", "0")
        yield Signing(wechat, server.url)
        server.kill()
        wechat.stop()
        assert_no_credential(server.output, wechat.issued)
        assert "Traceback" not in server.output


def launched() -> Iterator[Any]:
    """Chromium."""
    npm_file(*WEIXIN)
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        unavailable("no browser for these tests: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=binary, args=[*QUIET, "--disable-quic"])
        yield browser
        browser.close()


class Phone:
    """A tab in WeChat: what the page did with the phone, and what friends would get."""

    def __init__(self, tab: Chromium | WebKitTab, wechat: Sandbox) -> None:
        self.tab, self.wechat = tab, wechat
        self.open, self.js = tab.open, tab.js

    @property
    def chromium(self) -> Chromium:
        assert isinstance(self.tab, Chromium)
        return self.tab

    def push(self, route: str) -> None:
        self.js(f"history.pushState({{}}, '', {route!r})")

    def waits(self, condition: str) -> Any:
        """The expression's first true value."""
        try:
            return eventually(condition, lambda: self.js(condition))
        except AssertionError as never:
            calls = self.js("window.phone && phone.calls.map(call => [call.name, call.page])")
            raise AssertionError(f"{never}; the phone was asked {calls}") from None

    def outcome(self, name: str = "outcome") -> str:
        """What became of the Promise that the page has there."""
        soon = "new Promise(resolve => setTimeout(resolve, 100))"
        return str(self.waits(f"Promise.race([window.{name}, {soon}])"))

    def calls(self, name: str) -> list[dict[str, Any]]:
        return list(self.js(f"phone.calls.filter(call => call.name === '{name}')"))

    def configs(self) -> list[dict[str, Any]]:
        """Each wx.config that arrived. What the phone accepted is recomputed here."""
        calls = self.calls("preVerifyJSAPI")
        for call in calls:
            if call["problem"] == "":
                args = call["args"]
                said = {"nonceStr": args["verifyNonceStr"], "timestamp": args["verifyTimestamp"]}
                expected = signature_of(said, self.wechat.ticket, call["url"])
                assert args["verifySignature"] == expected
        return calls

    def asked(self) -> list[str]:
        """The urls that a server was asked to sign."""
        loaded = "performance.getEntriesByType('resource').map(entry => new URL(entry.name))"
        urls = ".filter(at => at.pathname === '/getApi').map(at => at.searchParams.get('url'))"
        return list(self.js(loaded + urls))

    def shared(self, **expected: str) -> dict[str, Any]:
        """What a friend gets, once it is that."""
        same = "phone.timeline && phone.friend && phone.timeline.link === phone.friend.link"
        conditions = [
            f"phone.{whom}.{key} === {json.dumps(value)}"
            for key, value in expected.items()
            for whom in ("friend", "timeline")
            if whom == "friend" or key in ("title", "link")
        ]
        self.waits(" && ".join([same, *conditions]))
        return dict(self.js("phone.friend"))

    def verdict(self) -> str:
        """What the server's page says in the end."""
        return str(self.waits("(v => v !== 'checking' && v)(document.body.dataset.verdict)"))

    def text(self) -> str:
        return str(self.js("document.querySelector('main').innerText"))


def unescaping_in_part(route: Any) -> None:
    """What a proxy does that takes one level of escapes away; a route of playwright."""
    address, _, query = route.request.url.partition("?")
    route.continue_(url=f"{address}?{query.replace('%25', '%')}")


class Chromium:
    """A tab of Chromium: `page` is playwright's; what went to the console, was said in alerts, and
    was asked for."""

    def __init__(self, context: Any, bridge: str) -> None:
        context.set_default_timeout(PATIENCE * 1000)
        context.add_init_script(bridge)
        self.page = context.new_page()
        self.console: list[str] = []
        self.alerts: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("dialog", self._accept)
        self.page.on("request", lambda request: self.asked.append(request.url))
        script = {"body": npm_file(*WEIXIN), "content_type": "text/javascript"}
        self.page.route("https://*.wx.qq.com/**", lambda route: route.fulfill(**script))
        self.page.route("https://open.weixin.qq.com/**", lambda route: route.fulfill(body=""))

    def _accept(self, dialog: Any) -> None:
        self.alerts.append(dialog.message)
        dialog.accept()

    def open(self, url: str) -> None:
        self.page.goto(url)

    def js(self, expression: str) -> Any:
        return self.page.evaluate(expression)


class WebKit:
    """WebKitGTK's browser behind its WebDriver, one user agent for each session."""

    def __init__(self) -> None:
        npm_file(*WEIXIN)
        driver = shutil.which("WebKitWebDriver")
        folders = Path("/usr/lib").glob("*/webkit2gtk-4*/MiniBrowser")
        self._binary = next(map(str, folders), "")
        screen = shutil.which("Xvfb")
        if not (driver and screen and self._binary):
            unavailable("no WebKit: apt-get install webkit2gtk-driver xvfb")
        self._home = tempfile.TemporaryDirectory(prefix="webkit-")
        read, write = os.pipe()
        command = [screen, "-displayfd", str(write), "-screen", "0", "800x900x24"]
        command += ["-nolisten", "tcp"]
        self._screen = subprocess.Popen(command, pass_fds=[write], stdout=DEVNULL, stderr=DEVNULL)
        os.close(write)
        with open(read) as told:
            display = told.readline().strip()
        self._environ = {**os.environ, "DISPLAY": f":{display}", "HOME": self._home.name}
        self._program = str(driver)
        self._start_driver()
        self._session = self._agent = ""

    def _start_driver(self) -> None:
        self.port = free_port()
        command = [self._program, "-p", str(self.port)]
        self._driver = subprocess.Popen(command, env=self._environ, stdout=DEVNULL, stderr=DEVNULL)
        eventually("WebKitWebDriver answers", self._ready)

    def _ready(self) -> bool:
        try:
            return bool(self.call("GET", "/status"))
        except URLError:
            return False

    def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float = 60
    ) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        try:
            with urlopen(request, timeout=timeout) as answer:  # noqa: S310
                return json.load(answer)["value"]
        except HTTPError as refused:
            with refused:
                raise AssertionError(json.load(refused)["value"]) from None

    def tab(self, agent: str) -> WebKitTab:
        """A tab with this user agent; what was open is left for it."""
        if agent != self._agent:
            self.close()
            arguments = ["--automation", f"--user-agent={agent}"]
            options = {"binary": self._binary, "args": arguments}
            wished = {"webkitgtk:browserOptions": options}
            body = {"capabilities": {"alwaysMatch": wished}}
            try:
                answer = self.call("POST", "/session", body, timeout=PATIENCE)
            except TimeoutError:  # now and then it hangs here; another one does not
                self._driver.kill()
                self._driver.wait()
                self._start_driver()
                answer = self.call("POST", "/session", body)
            self._session, self._agent = answer["sessionId"], agent
        return WebKitTab(self, self._session)

    def close(self) -> None:
        if self._session:
            self.call("DELETE", f"/session/{self._session}")
        self._session = self._agent = ""

    def stop(self) -> None:
        self.close()
        for process in (self._driver, self._screen):
            process.terminate()
            process.wait(PATIENCE)
        self._home.cleanup()


class WebKitTab:
    def __init__(self, driver: WebKit, session: str) -> None:
        self._driver = driver
        self._path = f"/session/{session}"

    def open(self, url: str) -> None:
        self._driver.call("POST", f"{self._path}/url", {"url": url})

    def back(self) -> None:
        """As by the button, and when the page is there."""
        self._driver.call("POST", f"{self._path}/back", {})

    def js(self, expression: str) -> Any:
        script = f"""const done = arguments[arguments.length - 1]
            Promise.resolve().then(() => ({expression}))
            .then(value => done({{value}}), error => done({{error: String(error)}}))"""
        path = f"{self._path}/execute/async"
        answer = self._driver.call("POST", path, {"script": script, "args": []})
        assert isinstance(answer, dict), (expression, answer)
        assert "error" not in answer, (expression, answer)
        return answer.get("value")


@dataclass
class Site:
    """Another origin than the server's, which answers the same page to every path that it has
    nothing else for: a single-page app."""

    port: int = 0
    files: dict[str, str] = field(default_factory=lambda: {"/bridge.js": ""})
    """Scripts by path; the page itself is at ""."""
    broken: tuple[int, str] | None = None
    """What it answers to /getApi, as a proxy may that reaches no signing server."""
    hold: threading.Event = field(default_factory=threading.Event)
    """Without an answer, /getApi waits for this."""
    server: str = ""
    """Where it is given, its page at / is shown, with the bridge and WeChat's script from here."""

    def __call__(self, html: str) -> str:
        """Its origin."""
        self.files[""] = html
        return f"http://127.0.0.1:{self.port}"

    def answer(self, path: str) -> tuple[int, str, str]:
        """Status, type and body."""
        if path == "/getApi":
            if self.broken is None:
                self.hold.wait()
            status, body = self.broken or (500, "")
            return status, "text/html", body
        if path.startswith("/npm/"):
            package, _, file = path.removeprefix("/npm/").replace("+", "/").partition("//")
            return 200, "text/javascript", npm_file(package, file)
        if path == "/jweixin.js":
            return 200, "text/javascript", npm_file(*WEIXIN)
        if path in self.files:
            return 200, "text/javascript", self.files[path]
        return 200, "text/html; charset=utf-8", self.files[""]

    def passed_on(self, path: str, headers: Message) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and body of the server's answer."""
        sent = {name: headers[name] for name in ("Host", "Referer", "User-Agent") if headers[name]}
        policy = ["-", "-"]
        with urlopen(Request(self.server + path, headers=sent), timeout=PATIENCE) as answer:  # noqa: S310
            body = answer.read()
            if path.partition("?")[0] == "/":
                text = body.decode().replace(
                    "https://res.wx.qq.com/open/js/jweixin-1.6.0.js", "/jweixin.js"
                )
                policy = [hashes_of("script", html) for html in (body.decode(), text)]
                body = text.replace("<main>", '<script src="/bridge.js"></script><main>').encode()
            dropped = ("content-length", "connection", "date", "server")
            kept = [h for h in answer.getheaders() if h[0].lower() not in dropped]
            return 200, [(name, value.replace(*policy)) for name, value in kept], body


def serving(site: Site) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if site.server and path not in (*site.files, "/jweixin.js"):
                status, headers, body = site.passed_on(self.path, self.headers)
            else:
                status, kind, text = site.answer(path)
                headers, body = [("Content-Type", kind)], text.encode()
            self.send_response(status)
            for header in headers:
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield site
    site.hold.set()
    server.shutdown()
    server.server_close()
