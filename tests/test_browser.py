"""The page and the script in a real browser, with a phone's ideas of urls."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest
from harness import ROOT, Fault, Sandbox, Start, signature_of

from wechat_sign.errors import CAUSES

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip(
        "no browser for these tests: install one, for example with apt-get install chromium",
        allow_module_level=True,
    )

PHONES = {
    "iOS": "Mozilla/5.0 (iPhone; CPU iPhone OS 17_0 like Mac OS X) MicroMessenger/8.0.50",
    "Android": "Mozilla/5.0 (Linux; Android 14) Chrome/116.0 XWEB/1160 MicroMessenger/8.0.50",
    "desktop": "Mozilla/5.0 (X11; Linux x86_64) Chrome/116.0",
}
JWEIXIN = Path(__file__).with_name("jweixin.js").read_text(encoding="utf-8")
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, "--disable-quic"])
        yield browser
        browser.close()


class Phone:
    """A browser's tab that believes to be WeChat, and what it thinks of signatures."""

    def __init__(self, page: Any, wechat: Sandbox) -> None:
        self.page = page
        self.wechat = wechat
        self.problems: list[str] = []
        self.scripts: list[str] = []
        self.console: list[str] = []
        page.expose_function("phoneChecks", self._checks)
        page.route("https://*.wx.qq.com/**", self._script)
        page.on("console", lambda message: self.console.append(message.text))
        page.on("pageerror", lambda error: self.console.append(str(error)))

    def _checks(self, config: dict[str, Any]) -> str:
        """The next of `problems` if there is one, else what the phone itself finds."""
        if self.problems:
            return self.problems.pop(0)
        right = config["signature"] == signature_of(config, self.wechat.ticket, config["url"])
        return "" if right and config["appId"] == self.wechat.appid else "invalid signature"

    def _script(self, route: Any) -> None:
        self.scripts.append(route.request.url)
        route.fulfill(body=JWEIXIN, content_type="text/javascript")

    def open(self, url: str) -> None:
        self.page.goto(url)

    def verdict(self) -> str:
        """What the page says in the end."""
        self.page.wait_for_selector("body[data-verdict]:not([data-verdict=checking])")
        return str(self.page.evaluate("document.body.dataset.verdict"))

    def assert_failed(self, step: str, said: str, kind: str, code: str) -> None:
        """The step failed with these words, and has these causes in the reader's language."""
        assert self.verdict() == "failed"
        bad = self.page.eval_on_selector_all(".steps .bad", "items => items.map(i => i.id)")
        assert bad == [step]
        assert said in self.page.inner_text(f"#{step}")
        language = "zh" if self.page.evaluate("navigator.language") == "zh-CN" else "en"
        items = self.page.eval_on_selector_all(".causes li", "items => items.map(i => i.innerText)")
        assert items == [getattr(advice, language) for advice in CAUSES[kind][code]]
        assert "JS接口安全域名" not in self.text()

    def text(self) -> str:
        return str(self.page.inner_text("main"))

    def calls(self, name: str) -> list[dict[str, Any]]:
        return list(self.page.evaluate(f"wxCalls.filter(call => call.name === '{name}')"))

    def waits_for(self, name: str, count: int) -> list[dict[str, Any]]:
        script = f"wxCalls.filter(call => call.name === '{name}').length >= {count}"
        self.page.wait_for_function(script)
        return self.calls(name)


OpenPhone = Callable[..., Phone]


@pytest.fixture
def phone(chromium: Any, wechat: Sandbox) -> Iterator[OpenPhone]:
    contexts = []

    def new(kind: str = "Android", locale: str = "en-US", **more: Any) -> Phone:
        context = chromium.new_context(
            user_agent=PHONES[kind], locale=locale, viewport={"width": 390, "height": 844}, **more
        )
        context.set_default_timeout(20_000)
        contexts.append(context)
        return Phone(context.new_page(), wechat)

    yield new
    for context in contexts:
        context.close()


@pytest.mark.parametrize("kind", ["iOS", "Android"])
@pytest.mark.parametrize(
    "tail", ["/", "/?a=1&b=2", "/?q=%E4%B8%AD%2F&r=x+y", "/?名=值", "/#/route?x=1", "/?a=1#中"]
)
def test_inside_wechat_the_page_ticks_every_step(
    start: Start, phone: OpenPhone, kind: str, tail: str
) -> None:
    tab = phone(kind)
    tab.open(start().url + tail)
    assert tab.verdict() == "allWell"
    steps = tab.page.eval_on_selector_all("#steps > li", "items => items.map(i => i.className)")
    assert steps == ["good"] * 5
    assert "updateAppMessageShareData" in tab.text()
    assert [call["debug"] for call in tab.calls("config")] == [False]
    assert tab.console == []  # no violation of the Content-Security-Policy either


def test_wechats_second_host_serves_where_the_first_fails(start: Start, phone: OpenPhone) -> None:
    tab = phone()
    tab.page.route("https://res.wx.qq.com/**", lambda route: route.abort())
    tab.open(start().url + "/")
    assert tab.verdict() == "allWell"
    assert tab.scripts == ["https://res2.wx.qq.com/open/js/jweixin-1.6.0.js"]


def test_the_shipped_list_of_apis_passes(start: Start, phone: OpenPhone) -> None:
    """Though WeChat's script renames some of them in the list that it is given."""
    example = ConfigParser()
    example.read(ROOT / "config.example.ini", encoding="utf-8")
    names = example["jssdk"]["js_api_list"].replace("\n", " ")
    assert "onMenuShareTimeline" in names
    tab = phone()
    tab.open(start("[jssdk]", f"js_api_list = {names}").url + "/")
    assert tab.verdict() == "allWell"
    chips = tab.page.eval_on_selector_all(".chips span", "chips => chips.map(c => c.textContent)")
    assert chips == names.replace(" ", "").split(",")


Break = Callable[[Any], None]
"""What a route of playwright does to a request."""


def cut(route: Any) -> None:
    route.abort()


def answered(status: int, body: str) -> Break:
    return lambda route: route.fulfill(status=status, body=body)


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
@pytest.mark.parametrize(
    ("at", "broken", "step", "code", "en", "zh"),
    [
        ("getApi", cut, "sign", "no answer", "this server did not answer", "本服务没有响应"),
        ("getApi", answered(502, "<h1>"), "sign", "not json", "HTTP 502, not JSON", "HTTP 502，"),
        ("getApi", answered(200, "<h1>"), "sign", "not json", "HTTP 200, not JSON", "HTTP 200，"),
        ("getApi", answered(200, "{}"), "sign", "not json", "HTTP 200, not JSON", "HTTP 200，"),
        ("getApi", answered(404, '{"error": "none"}'), "sign", "404", "none", "none"),
        ("wechat-sign.js", cut, "sign", "no script", "wechat-sign.js could not", "无法从本服务"),
        ("wechat-sign.js", answered(404, ""), "sign", "no script", "could not", "无法从本服务"),
        ("wechat-sign.js", answered(200, "<h1>"), "sign", "no script", "could not", "无法从本服务"),
        ("jweixin", cut, "script", "else", "neither res.wx.qq.com nor res2.", "均无法加载"),
    ],
)
def test_each_step_that_fails_has_its_own_causes(
    start: Start,
    phone: OpenPhone,
    locale: str,
    at: str,
    broken: Break,
    step: str,
    code: str,
    en: str,
    zh: str,
) -> None:
    tab = phone(locale=locale)
    tab.page.route(re.compile(at), broken)
    tab.open(start().url + "/")
    tab.assert_failed(f"step{step.title()}", zh if locale == "zh-CN" else en, step, code)


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_wechat_that_never_answers_is_told(start: Start, phone: OpenPhone, locale: str) -> None:
    tab = phone(locale=locale)
    silent = "window.wx = {config() {}, ready() {}, error() {}}"
    tab.page.route("https://*.wx.qq.com/**", lambda route: route.fulfill(body=silent))
    tab.page.clock.install()
    tab.open(start().url + "/")
    tab.page.wait_for_selector("#stepScript.good")
    tab.page.clock.fast_forward(5_000)
    assert tab.page.evaluate("document.body.dataset.verdict") == "checking"
    tab.page.clock.fast_forward(15_000)
    said = {"en-US": "WeChat did not answer in time", "zh-CN": "微信未在规定时间内响应"}[locale]
    tab.assert_failed("stepConfig", said, "phone", "silent")


def test_a_url_that_can_not_be_signed_is_told(start: Start, phone: OpenPhone) -> None:
    tab = phone()
    tab.open(start().url + "/?" + "x" * 8192)
    tab.assert_failed("stepSign", "url is longer than 8192 characters", "sign", "400")


def test_advice_on_something_else_is_not_taken(
    start: Start, phone: OpenPhone, wechat: Sandbox
) -> None:
    """/healthz may be answered by another instance than /getApi."""
    wechat.faults["token"] = Fault(errcode=40164)
    tab = phone()
    other = {"errcode": 40125, "advice": "wrong", "advice_zh": "错"}
    tab.page.route("**/healthz", lambda route: route.fulfill(json=other))
    tab.open(start().url + "/")
    tab.assert_failed("stepSign", "errcode 40164", "sign", "else")


def test_a_dead_ticket_shows_as_invalid_signature_with_its_causes(
    start: Start, phone: OpenPhone, wechat: Sandbox
) -> None:
    tab = phone()
    url = start().url
    tab.open(url + "/healthz")
    tab.page.wait_for_function("fetch('/healthz').then(answer => answer.ok)")
    wechat.rotate_ticket()
    tab.open(url + "/?a=1")
    assert tab.verdict() == "failed"
    text = tab.text()
    assert "config:invalid signature" in text
    assert text.index("compare the two below") < text.index("proxy") < text.index("ticket is dead")
    assert "They are the same." in text


Mangle = Callable[[list[str]], str]
"""What a proxy makes of the last of the queries that it got."""


def mangling(mangle: Mangle) -> Break:
    queries: list[str] = []

    def proxy(route: Any) -> None:
        address, _, query = route.request.url.partition("?")
        queries.append(query)
        route.continue_(url=f"{address}?{mangle(queries)}")

    return proxy


def unescaping_in_part(queries: list[str]) -> str:
    return queries[-1].replace("%25", "%")


def marks(tab: Phone) -> list[str]:
    return list(tab.page.eval_on_selector_all("mark", "marks => marks.map(m => m.textContent)"))


@pytest.mark.parametrize(("sent", "signed"), [("x%2Fy", "/y"), ("x%2By", "+y")])
def test_a_url_changed_on_the_way_is_marked_where_it_differs(
    start: Start, phone: OpenPhone, sent: str, signed: str
) -> None:
    tab = phone()
    tab.page.route("**/getApi?*", mangling(unescaping_in_part))
    tab.open(f"{start().url}/?a={sent}&b=2")
    tab.assert_failed("stepUrls", "a proxy between this page and the server", "urls", "changed")
    assert marks(tab) == [f"{signed}&b=2", f"{sent[1:]}&b=2"]
    assert tab.scripts == []


TAIL = "&to=https%3A%2F%2Fexample.com%2F%3Fx%3D1%26y%3D2&e=&r=100%25"


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
@pytest.mark.parametrize(
    ("mangle", "marked"),
    [
        (unescaping_in_part, ["++" + unquote(TAIL), "%2B%2B" + TAIL]),
        (lambda queries: unquote(unquote(queries[-1])), ["++" + unquote(TAIL), "%2B%2B" + TAIL]),
        (lambda queries: unquote(queries[-1]) + "&v=1", ["&v=1"]),
        (lambda queries: queries[0], ["?d=1;2&s=a+b&p=c%2B%2B" + TAIL]),  # a cache
    ],
)
def test_a_mangling_proxy_shows_in_a_desktop_browser(
    start: Start, phone: OpenPhone, locale: str, mangle: Mangle, marked: list[str]
) -> None:
    tab = phone("desktop", locale=locale)
    tab.page.route("**/getApi?*", mangling(mangle))
    tab.open(start().url + "/")
    said = {"en-US": "the server changed the url", "zh-CN": "之间的代理改动了 url"}[locale]
    tab.assert_failed("stepUrls", said, "urls", "changed")
    assert marks(tab) == marked
    assert {"en-US": "changes the url", "zh-CN": "有环节改动了 url"}[locale] in tab.text()


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
@pytest.mark.parametrize(
    ("mangle", "step", "said"),
    [
        (lambda queries: unquote(queries[-1]), "urls", "seems to be appended to the url"),
        (lambda queries: quote(queries[-1], safe="="), "sign", "url was escaped twice"),
        (lambda queries: "&".join(queries[-1:] * 2), "sign", "more than one parameter url"),
    ],
)
def test_what_the_server_says_of_a_mangled_url_is_told(
    start: Start, phone: OpenPhone, locale: str, mangle: Mangle, step: str, said: str
) -> None:
    tab = phone("desktop", locale=locale)
    tab.page.route("**/getApi?*", mangling(mangle))
    url = start().url
    tab.open(url + "/")
    tab.assert_failed(f"step{step.title()}", said, step, "400")
    if step == "urls":
        assert {"en-US": "changed the url; of", "zh-CN": "改动了 url；"}[locale] in tab.text()
        assert f"{url}/%E6%B4%BB%E5%8A%A8?q=%22a%27&n=%E4%B8%AD" in tab.text()
    assert marks(tab) == []


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
@pytest.mark.parametrize(
    ("broken", "code", "en", "zh"),
    [
        (cut, "no answer", "this server did not answer", "本服务没有响应"),
        (answered(403, "<h1>"), "not json", "HTTP 403, not JSON", "HTTP 403，"),
        (answered(400, "<h1>"), "not json", "HTTP 400, not JSON", "HTTP 400，"),
    ],
)
def test_what_keeps_an_odd_url_alone_from_the_server_is_told(
    start: Start, phone: OpenPhone, locale: str, broken: Break, code: str, en: str, zh: str
) -> None:
    """A firewall that finds something in it."""
    tab = phone("desktop", locale=locale)
    tab.page.route(re.compile("getApi.*example"), broken)
    tab.open(start().url + "/")
    kind = "urls" if code in CAUSES["urls"] else "sign"
    tab.assert_failed("stepUrls", zh if locale == "zh-CN" else en, kind, code)
    assert TAIL in tab.text()


def test_urls_with_all_that_is_easily_spoilt_are_asked_for(start: Start, phone: OpenPhone) -> None:
    tab = phone("desktop")
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    url = start().url + "/?a=1"
    tab.open(url)
    assert tab.verdict() == "outside"
    own, *odd = [unquote(at.partition("=")[2]) for at in asked if "/getApi?url=" in at]
    assert own == url
    assert all(at.startswith(start().url.rpartition(":")[0]) for at in odd)
    for part in (
        "%22",
        "%27",
        "%E4%B8%AD",
        ";",
        "+",
        "%2B",
        "https%3A%2F%2F",
        "=&",
        "%25",
        "%252F",
    ):
        assert part in " ".join(odd)


SHOP = "<!doctype html><title>A single-page app answers this to everything</title>"
LOCATIONS: dict[str, Callable[[str], str | None]] = {
    "a prefix that is cut off": lambda path: (
        re.sub("^/wx/?", "/", path) if re.match("/wx(/|$)", path) else None
    ),
    "the page alone": lambda path: {"/wx": "/"}.get(
        path, None if path.startswith("/wx/") else path
    ),
    "nginx with one slash": lambda path: (
        re.sub("^/wx", "/", path) if path.startswith("/wx") else None
    ),
}


def located(tab: Phone, server: str, location: str) -> str:
    """The origin of a proxy that hands on what the location maps to a path of the server."""

    def proxy(route: Any) -> None:
        _, _, path, query, _ = urlsplit(route.request.url)
        target = LOCATIONS[location](path)
        if target is None:
            route.fulfill(body=SHOP, content_type="text/html")
        else:
            query = query and f"?{query}"
            route.fulfill(response=route.fetch(url=f"{server}{target}{query}"))

    tab.page.route("http://h5.example.com/**", proxy)
    return "http://h5.example.com"


@pytest.mark.parametrize("tail", ["", "?from=singlemessage", "#/route"])
@pytest.mark.parametrize("location", ["a prefix that is cut off", "the page alone"])
def test_without_its_trailing_slash_the_page_finds_the_server(
    start: Start, phone: OpenPhone, location: str, tail: str
) -> None:
    tab = phone()
    tab.open(located(tab, start().url, location) + "/wx" + tail)
    assert tab.verdict() == "allWell"
    if location == "a prefix that is cut off":
        assert tab.console == []


def test_without_its_trailing_slash_the_page_finds_the_advice(
    start: Start, phone: OpenPhone, wechat: Sandbox
) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    tab = phone()
    tab.open(located(tab, start().url, "a prefix that is cut off") + "/wx")
    assert tab.verdict() == "failed"
    assert "add 203.0.113.7 to the account" in tab.text()


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_missing_slash_that_hides_the_server_is_told(
    start: Start, phone: OpenPhone, locale: str
) -> None:
    tab = phone(locale=locale)
    tab.open(located(tab, start().url, "nginx with one slash") + "/wx")
    said = {"en-US": "wechat-sign.js could not", "zh-CN": "无法从本服务"}[locale]
    tab.assert_failed("stepSign", said, "sign", "no slash")
    assert "location /wx/ { proxy_pass http://127.0.0.1:8060/; }" in tab.text()


def test_no_path_makes_the_page_load_a_script_of_another_host(
    start: Start, phone: OpenPhone
) -> None:
    tab = phone()
    server = start().url
    tab.page.route(
        "http://h5.example.com/**",
        lambda route: route.fulfill(response=route.fetch(url=server + "/")),
    )
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    tab.open("http://h5.example.com//evil.example.com/a")
    assert tab.verdict() == "failed"
    assert all(at.startswith("http://h5.example.com/") for at in asked)


@pytest.mark.parametrize(
    ("problem", "cause"),
    [
        ("invalid url domain", "JS接口安全域名"),
        ("permission denied", "微信认证"),
        ("the permission value is offline verifying", "js_api_list"),
        ("fail", "a field of wx.config is missing"),
        ("invalid args", "at least one API"),
        ("something new", "appendix 5"),
    ],
)
def test_each_of_the_phones_messages_has_its_causes(
    start: Start, phone: OpenPhone, problem: str, cause: str
) -> None:
    tab = phone()
    tab.problems = [problem]
    tab.open(start().url + "/")
    assert tab.verdict() == "failed"
    assert f"config:{problem}" in tab.text()
    assert cause in tab.text()
    assert ("JS接口安全域名" in tab.text()) is (problem == "invalid url domain")


def test_an_api_that_the_phone_does_not_have_is_shown(start: Start, phone: OpenPhone) -> None:
    tab = phone()
    tab.open(start("[jssdk]", "js_api_list = scanQRCode, tooNewApi").url + "/")
    assert tab.verdict() == "failed"
    assert "function not exist: tooNewApi" in tab.text()
    assert "update the WeChat app" in tab.text()
    assert tab.page.inner_text(".chips .bad") == "tooNewApi"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(errcode=40164), "add 203.0.113.7 to the account"),
        (Fault(errcode=40125), "secret is not the one of this appid"),
        (Fault(hang_up=True), "check that this host reaches"),
    ],
)
def test_a_refusing_wechat_is_told_with_what_to_do(
    start: Start, phone: OpenPhone, wechat: Sandbox, fault: Fault, words: str
) -> None:
    wechat.faults["token"] = fault
    tab = phone()
    tab.open(start().url + "/")
    assert tab.verdict() == "failed"
    assert words in tab.text()
    assert tab.page.eval_on_selector("#stepSign", "item => item.className") == "bad"


def test_what_to_do_is_told_in_chinese_too(start: Start, phone: OpenPhone, wechat: Sandbox) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    tab = phone(locale="zh-CN")
    tab.open(start().url + "/")
    assert tab.verdict() == "failed"
    assert "请把 203.0.113.7 加入 IP白名单" in tab.text()


def test_a_page_host_that_is_not_listed_is_told(start: Start, phone: OpenPhone) -> None:
    tab = phone()
    tab.open(start("[jssdk]", "page_hosts = h5.example.com").url + "/")
    tab.assert_failed("stepSign", "page_hosts does not list it", "sign", "403")


def test_outside_wechat_the_page_says_where_to_open_it(start: Start, phone: OpenPhone) -> None:
    tab = phone("desktop")
    url = start().url + "/?a=1"
    tab.open(url)
    assert tab.verdict() == "outside"
    text = tab.text()
    assert text.count(url) == 2
    for part in ("appId", "timestamp", "nonceStr", "signature"):
        assert part in text
    assert tab.scripts == []


def test_it_speaks_the_browsers_language(start: Start, phone: OpenPhone) -> None:
    url = start().url + "/"
    for locale, words in {"zh-CN": "一切正常", "en-GB": "Everything works"}.items():
        tab = phone(locale=locale)
        tab.open(url)
        assert tab.verdict() == "allWell"
        assert words in tab.text()


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_the_width_of_a_phone(start: Start, phone: OpenPhone, width: int) -> None:
    tab = phone()
    tab.problems = ["invalid signature"]
    tab.page.set_viewport_size({"width": width, "height": 800})
    tab.open(start().url + "/?" + "x" * 500)
    assert tab.verdict() == "failed"
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


# From here on the script, in a page of another origin.

PLAIN = """<!doctype html><title>的 page</title>
<script src="https://res.wx.qq.com/open/js/jweixin-1.6.0.js"></script>
<script src="{server}/wechat-sign.js"></script>
<script>
  window.outcome = wechatSign({{title: 'T', desc: 'D', imgUrl: 'https://a/i.png'}})
    .then(() => 'shared', error => error.message)
</script>"""
MODULE = """<!doctype html>
<script src="https://res.wx.qq.com/open/js/jweixin-1.6.0.js"></script>
<script type="module">
  import '{server}/wechat-sign.js?v=2'
  window.outcome = wechatSign({{title: 'T'}}).then(() => 'shared', error => error.message)
</script>"""


@pytest.fixture
def site() -> Iterator[Callable[[str], str]]:
    """Another origin, which answers the same page to every path: a single-page app."""
    body = [""]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body[0].encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def serve(html: str) -> str:
        body[0] = html
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    server.shutdown()
    server.server_close()


LISTED = ("[jssdk]", "page_hosts = 127.0.0.1")


def outcome(tab: Phone) -> str:
    tab.page.wait_for_function("window.outcome")
    return str(tab.page.evaluate("window.outcome"))


@pytest.mark.parametrize("html", [PLAIN, MODULE])
@pytest.mark.parametrize("kind", ["iOS", "Android"])
@pytest.mark.parametrize("path", ["/page?a=1&b=%E4%B8%AD%2F", "/page?a=1#/route"])
def test_a_page_of_another_origin_shares(
    start: Start, phone: OpenPhone, site: Callable[[str], str], html: str, kind: str, path: str
) -> None:
    running = start(*LISTED)
    base = site(html.format(server=running.url))
    tab = phone(kind)
    tab.open(base + path)
    assert outcome(tab) == "shared"
    for name in ("updateAppMessageShareData", "updateTimelineShareData"):
        assert [call["good"] for call in tab.calls(name)] == [True]
    for name in ("onMenuShareAppMessage", "onMenuShareTimeline"):
        assert [(call["good"], call["title"]) for call in tab.waits_for(name, 1)] == [(True, "T")]
    assert tab.calls("updateAppMessageShareData")[0]["link"] == base + path.split("#")[0]
    assert tab.console == []


@pytest.mark.parametrize("kind", ["iOS", "Android"])
def test_a_route_change_is_signed_anew(
    start: Start, phone: OpenPhone, site: Callable[[str], str], kind: str
) -> None:
    base = site(PLAIN.format(server=start(*LISTED).url))
    tab = phone(kind)
    tab.open(base + "/entry?a=1")
    assert outcome(tab) == "shared"
    for turn, change in enumerate(
        ("history.pushState({}, '', '/second?b=2')", "history.replaceState({}, '', '/third')"), 2
    ):
        tab.page.evaluate(change)
        configs = tab.waits_for("config", turn)
        assert [call["problem"] for call in configs] == [""] * turn
        shares = tab.waits_for("updateAppMessageShareData", turn)
        assert all(call["good"] for call in shares)
    assert shares[-1]["link"] == base + "/third"
    tab.page.evaluate("history.back()")
    assert tab.waits_for("config", 4)[-1]["problem"] == ""
    assert tab.console == []


def test_a_change_of_the_fragment_alone_asks_nobody(
    start: Start, phone: OpenPhone, site: Callable[[str], str]
) -> None:
    base = site(PLAIN.format(server=start(*LISTED).url))
    tab = phone()
    tab.open(base + "/entry")
    assert outcome(tab) == "shared"
    tab.page.evaluate("history.pushState({}, '', '#/a'); location.hash = '/b'")
    tab.page.evaluate("wechatSign({title: 'again'})")
    assert tab.waits_for("updateAppMessageShareData", 2)[-1]["title"] == "again"
    assert len(tab.calls("config")) == 1


@pytest.mark.parametrize(
    ("problems", "expected"),
    [
        (["invalid signature"], "shared"),
        (["invalid signature", "invalid signature"], "config:invalid signature"),
        (["invalid url domain"], "config:invalid url domain"),
    ],
)
def test_after_invalid_signature_it_tries_once_more(
    start: Start,
    phone: OpenPhone,
    site: Callable[[str], str],
    problems: list[str],
    expected: str,
) -> None:
    tab = phone()
    tab.problems = problems.copy()
    tab.open(site(PLAIN.format(server=start(*LISTED).url)) + "/")
    assert outcome(tab) == expected
    attempts = 2 if problems[0] == "invalid signature" else 1
    assert len(tab.calls("config")) == attempts


def test_it_says_what_keeps_it_from_signing(
    start: Start, phone: OpenPhone, site: Callable[[str], str], wechat: Sandbox
) -> None:
    desktop = phone("desktop")
    running = start(*LISTED)
    base = site(PLAIN.format(server=running.url))
    desktop.open(base)
    assert outcome(desktop) == "this page is not open inside WeChat"

    tab = phone()
    tab.page.route("https://*.wx.qq.com/**", lambda route: route.abort())
    tab.open(base)
    assert outcome(tab) == "WeChat's script jweixin-1.6.0.js is not loaded"

    stranger = phone()
    stranger.open(site(PLAIN.format(server=start().url)))
    assert "page_hosts lacks 127.0.0.1" in outcome(stranger)

    wechat.faults["token"] = Fault(errcode=40164)
    refused = phone()
    refused.open(site(PLAIN.format(server=start(*LISTED).url)))
    assert "answers 502: WeChat refuses with errcode 40164" in outcome(refused)


CROSS = {"Access-Control-Allow-Origin": "*"}


@pytest.mark.parametrize("kind", ["iOS", "Android"])
def test_it_names_both_urls_where_a_proxy_changed_one(
    start: Start, phone: OpenPhone, site: Callable[[str], str], kind: str
) -> None:
    tab = phone(kind)
    tab.page.route("**/getApi?*", mangling(unescaping_in_part))
    base = site(PLAIN.format(server=start(*LISTED).url))
    tab.open(base + "/?a=c%2B%2B#/route")
    assert outcome(tab) == (
        "a proxy between this page and the server changed the url: "
        f"{base}/?a=c%2B%2B was sent, {base}/?a=c++ was signed"
    )
    facts = "wechatSign.fetchConfig(location.href).catch(e => [e.sent, e.signed, e.status])"
    tab.open(base + "/?a=c%2B%2B")
    assert tab.page.evaluate(facts) == [base + "/?a=c%2B%2B", base + "/?a=c++", 200]
    assert tab.calls("config") == []


@pytest.mark.parametrize("header", ["Signed-Url", "Access-Control-Expose-Headers"])
def test_without_signed_url_it_has_nothing_to_compare(
    start: Start, phone: OpenPhone, site: Callable[[str], str], header: str
) -> None:
    def proxy(route: Any) -> None:
        answer = route.fetch()
        headers = {name: value for name, value in answer.headers.items() if name != header.lower()}
        assert headers != answer.headers
        route.fulfill(response=answer, headers=headers)

    tab = phone()
    tab.page.route("**/getApi?*", proxy)
    tab.open(site(PLAIN.format(server=start(*LISTED).url)) + "/?a=c%2B%2B")
    assert outcome(tab) == "shared"


def test_of_a_long_url_the_beginning_is_compared(
    start: Start, phone: OpenPhone, site: Callable[[str], str]
) -> None:
    base = site(PLAIN.format(server=start(*LISTED).url))
    tab = phone()
    tab.open(f"{base}/?a=c%2B%2B&long={'x' * 3000}")
    assert outcome(tab) == "shared"
    mangled = phone()
    mangled.page.route("**/getApi?*", mangling(unescaping_in_part))
    mangled.open(f"{base}/?a=c%2B%2B&long={'x' * 3000}")
    assert "changed the url" in outcome(mangled)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (502, "<html>", "answers 502 and not JSON"),
        (200, "<!doctype html>", "answers 200 and not JSON"),
        (404, '{"message": "no Route"}', "answers 404 and other JSON than its own"),
    ],
)
def test_it_asks_whether_a_proxy_hands_on(
    start: Start, phone: OpenPhone, site: Callable[[str], str], status: int, body: str, said: str
) -> None:
    tab = phone()
    tab.page.route("**/getApi?*", lambda at: at.fulfill(status=status, body=body, headers=CROSS))
    tab.open(site(PLAIN.format(server=start(*LISTED).url)))
    handed_on = "is /getApi handed on to the signing server?"
    assert outcome(tab) == f"the signing server {said}: {handed_on}"


@pytest.mark.parametrize("policy", ["", '<meta name="referrer" content="no-referrer">'])
def test_the_whole_referer_arrives_and_decides_what_a_url_means(
    start: Start, phone: OpenPhone, site: Callable[[str], str], policy: str
) -> None:
    """Also where the page's own policy is to send none."""
    tab = phone()
    tab.open(site(policy + PLAIN.format(server=start(*LISTED).url)) + "/?x=%25E4")
    assert outcome(tab) == "shared"
    assert tab.console == []


def test_the_script_is_small_enough_to_read() -> None:
    root = Path(__file__).resolve().parent.parent / "wechat_sign"
    assert len((root / "wechat-sign.js").read_text(encoding="utf-8").splitlines()) < 165
