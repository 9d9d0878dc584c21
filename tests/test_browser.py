"""The page at / in real browsers, with WeChat's real script."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from configparser import ConfigParser
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest
from browser import (
    IN_WECHAT,
    KINDS,
    Phone,
    Signing,
    Site,
    WebKit,
    bridge_for,
    made_by_chromium_69,
    unescaping_in_part,
)
from conftest import OpenPhone
from harness import (
    ROOT,
    Fault,
    Sandbox,
    Server,
    Start,
    assert_no_credential,
    eventually,
    write_ini,
)

from wechat_sign.errors import CAUSES

LOCALES = ("en-US", "zh-CN")
Break = Callable[[Any], None]
"""What a route of playwright does to a request."""
Show = Callable[..., Phone]
STEPS = ["stepSign", "stepUrls", "stepScript", "stepConfig", "stepApis", "stepShare"]
PAGE = (ROOT / "wechat_sign" / "page.html").read_text(encoding="utf-8")
HEADLINES = {
    (section, code): words
    for section, table in re.findall(r"(?ms)^    (\w+): \{(.*?)\}", PAGE.partition("HEADLINES")[2])
    for code, *words in re.findall(r"(\w[\w ]*)'?: \['(.*?)', '(.*?)'\]", table)
}
TITLED = {"offline verifying": "else", "config:fail": "else", "no slash": "no script"}
"""Codes that have causes of their own, and the headline of another."""


def alternately(names: Sequence[str], cases: Iterable[Sequence[Any]]) -> pytest.MarkDecorator:
    """The cases, read by turns in English and Chinese."""
    values = [(*case, LOCALES[place % 2]) for place, case in enumerate(cases)]
    return pytest.mark.parametrize((*names, "locale"), values)


@pytest.fixture
def show(phone: OpenPhone, signing: Signing) -> Show:
    """Opens the server's page on a phone and waits for its verdict. `breaks`: what is done to
    requests, by pattern; `script`: what runs before the page's own."""

    def shown(
        at: str = "/",
        kind: str = "Android",
        *,
        server: str = signing.url,
        locale: str = "en-US",
        breaks: dict[str, Break] | None = None,
        script: str = "",
        wait: bool = True,
        context: Any = None,
        **more: Any,
    ) -> Phone:
        tab = phone(kind, context={"locale": locale, **(context or {})}, **more)
        for pattern, broken in (breaks or {}).items():
            tab.chromium.page.route(re.compile(pattern), broken)
        tab.chromium.page.add_init_script(script)
        if wait:
            tab.open(server + at)
            tab.verdict()
        return tab

    return shown


def headline(tab: Phone) -> str:
    return str(tab.js("document.getElementById('verdict').innerText"))


def said(tab: Phone) -> str:
    """What WeChat, or who answered, is quoted with."""
    return str(tab.js("document.querySelector('#said').innerText"))


def states(tab: Phone) -> str:
    return "".join(tab.js("[...document.querySelectorAll('#steps i')].map(i => i.textContent)"))


def texts(tab: Phone, selector: str) -> list[str]:
    return list(tab.js(f"[...document.querySelectorAll({selector!r})].map(i => i.innerText)"))


def assert_failed(tab: Phone, step: str, code: str, titled: str = "") -> None:
    """This step failed, for this: headline and causes are its own, in the reader's language."""
    assert tab.verdict() == "failed"
    place = STEPS.index(step)
    assert states(tab) == "✓" * place + "✕" + "·" * (5 - place)
    chinese = tab.js("navigator.language") == "zh-CN"
    section = ["sign", "urls", "script", "phone", "phone", "phone"][place]
    titled = titled or TITLED.get(code) or re.sub("json [0-9]+", "json", code)
    assert headline(tab) == HEADLINES[section, titled][chinese]
    if section == "urls" and code not in CAUSES[section]:
        section = "sign"
    causes = [advice[chinese].lower() + ".。"[chinese] for advice in CAUSES[section][code]]
    assert [text.lower() for text in texts(tab, ".causes li")] == causes
    assert ("JS接口安全域名" in tab.text()) is (code == "invalid url domain")
    if chinese:
        assert_chinese(tab)


def assert_chinese(tab: Phone) -> None:
    """No sentence is English but what is quoted; names, urls and what the INI file has may be."""
    shown = tab.js(
        "[...document.querySelectorAll('main *')].filter(at => !at.closest('code, textarea'))"
        ".flatMap(at => [...at.childNodes]).filter(at => at.nodeType === 3).map(at => at.data)"
    )
    for text in shown:
        assert not re.search("([A-Za-z’]{2,} ){3}", text.replace("AppSecret", "")), text


def cut(route: Any) -> None:
    route.abort()


def hang(route: Any) -> None:
    """No answer ever."""


def answered(status: int, body: str = "<h1>") -> Break:
    return lambda route: route.fulfill(status=status, body=body)


def shipped_names() -> list[str]:
    example = ConfigParser()
    example.read(ROOT / "config.example.ini", encoding="utf-8")
    return re.findall(r"\w+", example["jssdk"]["js_api_list"])


@pytest.fixture(scope="module")
def shipped(signing: Signing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The url of a server that signs pages of any host, with config.example.ini's APIs."""
    lines = ("[jssdk]", f"js_api_list = {', '.join(shipped_names())}")
    ini = write_ini(tmp_path_factory.mktemp("shipped") / "c.ini", signing.wechat, *lines)
    server = Server("--config", str(ini), "--address", "127.0.0.1", "--port", "0")
    yield server.url
    server.kill()
    assert "Traceback" not in server.output


# All is well.


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("kind", IN_WECHAT)
def test_the_shipped_configuration_passes(shipped: str, show: Show, kind: str, when: str) -> None:
    """Though WeChat's script renames some of its names in the list that it is given."""
    tab = show(kind=kind, server=shipped, when=when)
    assert tab.verdict() == "allWell"
    assert headline(tab) == "Everything works"
    assert texts(tab, ".chips span") == shipped_names()
    assert states(tab) == "✓✓✓✓✓✓"
    assert texts(tab, ".bad, #said, .causes") == [""]
    assert tab.chromium.console == []


@pytest.mark.parametrize(
    ("tail", "kind"),
    [
        ("/?a=1&b=2", "iOS"),
        ("/?q=%E4%B8%AD%2F&r=x+y", "Android"),
        ("/?名=值", "Android"),
        ("/#/route?x=1", "iOS"),
        ("/?a=1#中", "Android"),
    ],
)
def test_whatever_the_pages_url_is_it_is_signed_and_shared(
    show: Show, kind: str, tail: str
) -> None:
    tab = show(tail, kind)
    assert tab.verdict() == "allWell"
    assert [call["problem"] for call in tab.configs()] == [""]
    assert tab.shared()["link"] == tab.js("location.href.split('#')[0]")
    assert "Share this page now" in tab.text()
    assert tab.chromium.console == []  # no violation of the Content-Security-Policy either


def test_wechats_second_host_serves_where_the_first_fails(show: Show) -> None:
    tab = show(breaks={"https://res.wx.qq.com": cut})
    assert tab.verdict() == "allWell"
    assert "https://res2.wx.qq.com/open/js/jweixin-1.6.0.js" in tab.chromium.asked


@pytest.mark.parametrize(("hours", "told"), [(0, False), (3, True)])
def test_clocks_that_differ_are_told(show: Show, hours: int, told: bool) -> None:
    tab = show(script=f"const now = Date.now; Date.now = () => now() + {hours} * 3600e3")
    assert tab.verdict() == "allWell"
    assert ("differ by minutes: 180" in tab.text()) is told


def test_outside_wechat_the_page_says_where_to_open_it(show: Show, signing: Signing) -> None:
    tab = show("/?a=1", "desktop")
    assert tab.verdict() == "outside"
    assert tab.text().count(signing.url + "/?a=1") == 2
    for part in ("appId", "timestamp", "nonceStr", "signature"):
        assert part in tab.text()
    assert not any("wx.qq.com" in url for url in tab.chromium.asked)


@pytest.mark.parametrize(
    ("kind", "title"), [("Android", "一切正常"), ("desktop", "请在微信中打开本页")]
)
def test_it_speaks_the_browsers_language(show: Show, kind: str, title: str) -> None:
    tab = show(kind=kind, locale="zh-CN")
    assert headline(tab) == title
    assert tab.js("document.documentElement.lang") == "zh-CN"
    assert_chinese(tab)


# The server, and what is between it and the page.

REPORTED = "document.querySelector('#buttons textarea').value"


@alternately(
    ("at", "broken", "step", "code"),
    [
        ("getApi", cut, "stepSign", "no answer"),
        ("getApi", answered(502), "stepSign", "not json"),
        ("getApi", answered(200), "stepSign", "not json 200"),
        ("getApi", answered(200, "{}"), "stepSign", "not json 200"),
        ("getApi", answered(404), "stepSign", "not json 404"),
        ("getApi", answered(401), "stepSign", "not json 401"),
        ("getApi", answered(403), "stepSign", "not json 403"),
        ("getApi", answered(414), "stepSign", "too long"),
        ("getApi", answered(404, '{"error": "none"}'), "stepSign", "404"),
        ("wechat-sign.js", cut, "stepSign", "no script"),
        ("wechat-sign.js", answered(200), "stepSign", "no script"),
        ("jweixin", cut, "stepScript", "else"),
        ("jweixin", answered(200), "stepScript", "else"),
    ],
)
def test_each_step_that_fails_has_its_own_headline_and_causes(
    show: Show, locale: str, at: str, broken: Break, step: str, code: str
) -> None:
    tab = show(locale=locale, breaks={at: broken})
    assert_failed(tab, step, code)


def test_a_url_that_is_too_long_is_told(show: Show) -> None:
    assert_failed(show("/?" + "x" * 8193), "stepSign", "too long")


@pytest.mark.parametrize(
    ("fault", "title", "words", "quoted"),
    [
        (Fault(errcode=40164), "WeChat refuses this server", "public address to", "40164"),
        (Fault(errcode=40125), "WeChat refuses this server", "Secret is not the one", "40125"),
        (Fault(hang_up=True), "This server has no ticket to sign with", "Check that this", ""),
    ],
)
def test_a_refusing_wechat_is_told_with_what_to_do(
    start: Start, show: Show, wechat: Sandbox, fault: Fault, title: str, words: str, quoted: str
) -> None:
    wechat.faults["token"] = fault
    tab = show(server=start().url, script="delete Navigator.prototype.clipboard")
    assert headline(tab) == title
    assert words in tab.text()
    assert said(tab) == (quoted and f"WeChat says\nerrcode {quoted}")
    assert states(tab) == "✕·····"
    tab.chromium.page.click("#report")
    report = tab.js(REPORTED)
    assert f'"status":{502 if quoted else 503}' in report
    assert (f'"errcode":{quoted}' in report) is bool(quoted)
    assert_no_credential(report, wechat.issued)


def test_what_to_do_is_told_in_chinese_too(start: Start, show: Show, wechat: Sandbox) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    server = start().url
    tab = show(server=server, locale="zh-CN")
    assert "请把本服务器的公网 IP" in tab.text()
    assert_chinese(tab)

    # /healthz may be answered by another instance than /getApi.
    other = answered(200, '{"errcode": 40125, "advice": "wrong", "advice_zh": "错"}')
    tab = show(server=server, locale="zh-CN", breaks={"/healthz": other})
    assert_failed(tab, "stepSign", "else", "502")


@pytest.mark.parametrize("locale", LOCALES)
def test_a_page_host_that_is_not_listed_is_told(start: Start, show: Show, locale: str) -> None:
    tab = show(server=start("[jssdk]", "page_hosts = h5.example.com").url, locale=locale)
    assert_failed(tab, "stepSign", "403")
    assert texts(tab, "#why dd") == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("lacks", "quoted"), [("fetch", "this browser is too old"), ("Promise", "Promise")]
)
def test_an_engine_without_fetch_is_told(show: Show, lacks: str, quoted: str) -> None:
    tab = show(script=f"delete window.{lacks}")
    assert_failed(tab, "stepSign", "old browser")
    assert quoted in said(tab)


# The phone.


@alternately(
    ("problem", "code"),
    [
        ("invalid_url_domain", "invalid url domain"),
        ("invalid_signature", "invalid signature"),
        ("access_denied", "permission denied"),
        ("the permission value is offline verifying", "offline verifying"),
        ("fail", "config:fail"),
        ("fail, Error: 系统错误,错误码:63002,invalid signature", "invalid signature"),
        ("fail, Error: 系统错误,错误码:40048,invalid url domain", "invalid url domain"),
        ("invalid_appid", "appid"),
        ("invalid_args", "invalid args"),
        ("require_subscribe", "require subscribe"),
        ("something_new", "else"),
    ],
)
def test_each_of_its_messages_has_its_headline_and_causes(
    signing: Signing, show: Show, locale: str, problem: str, code: str
) -> None:
    tab = show(problems=[problem], locale=locale)
    assert_failed(tab, "stepConfig", code)
    quoted = "permission denied" if problem == "access_denied" else problem.replace("_", " ")
    assert quoted.lower() in said(tab).lower()
    enter = ["127.0.0.1", signing.wechat.appid]
    assert texts(tab, "#why dd") == (enter if code == "invalid url domain" else [])
    same = ("The url that was signed is the page’s own.", "签名所用的 url 与页面的 url 一致。")
    assert (same[locale == "zh-CN"] in tab.text()) is ("signature" in problem)


def test_a_dead_ticket_is_not_taken_for_a_wrong_url(
    start: Start, show: Show, wechat: Sandbox
) -> None:
    server = start().url
    assert show(server=server, wechat=wechat).verdict() == "allWell"
    wechat.rotate_ticket()
    tab = show("/?a=1", server=server, wechat=wechat)
    assert_failed(tab, "stepConfig", "invalid signature")
    first = texts(tab, ".causes li")[0]
    assert "ticket" in first
    assert "url" not in first


def test_an_address_that_changed_after_signing_leads_with_the_urls(
    signing: Signing, show: Show
) -> None:
    tab = show(wait=False, delays={"preVerifyJSAPI": 300})
    tab.open(signing.url + "/?a=1")
    tab.js("phone.problems.push('invalid_signature'), history.replaceState({}, '', '/?a=2')")
    assert_failed(tab, "stepConfig", "url differs")
    assert texts(tab, "mark") == ["1", "2"]


def test_the_url_that_wechat_took_is_shown(show: Show) -> None:
    tab = show("/?a", "iOS", script="history.replaceState({}, '', '/?b')", tells=True)
    assert_failed(tab, "stepConfig", "url differs")
    assert texts(tab, "mark") == ["b", "a"]


LACK = {"lacks": ["updateTimelineShareData"]}
WRONG_SIGNATURE = {"problems": ["invalid_signature"]}
IN_MINI_PROGRAM = {"script": "window.__wxjs_environment = 'miniprogram'"}


def may_not(name: str) -> dict[str, Any]:
    """checkJsApi knows the app alone: here the account may not share."""
    return {"answers": {name: "access_denied"}}


def check_refused(told: str) -> dict[str, Any]:
    return {
        "script": "const ask = WeixinJSBridge.invoke; WeixinJSBridge.invoke = (name, ...more) => "
        f"name === 'checkJsApi' ? more[1]({{err_msg: '{told}'}}) : ask(name, ...more)"
    }


@alternately(
    ("setup", "step", "code", "quoted"),
    [
        (may_not("updateAppMessageShareData"), "stepShare", "permission denied", "App"),
        (may_not("updateTimelineShareData"), "stepShare", "permission denied", "Timeline"),
        (IN_MINI_PROGRAM, "stepShare", "mini program", ""),
        (IN_MINI_PROGRAM | WRONG_SIGNATURE, "stepConfig", "mini program", ""),
        ({"kind": "WeCom"} | WRONG_SIGNATURE, "stepConfig", "wxwork", "signature"),
        ({"kind": "WeCom"} | LACK, "stepApis", "wxwork", "Timeline"),
        (LACK, "stepApis", "function not exist", "updateTimelineShareData"),
        (check_refused("x:fail, offline verifying"), "stepApis", "offline verifying", "checkJsApi"),
        (check_refused("x:access_denied"), "stepApis", "permission denied", "checkJsApi"),
        (check_refused("system:function_not_exist"), "stepApis", "function not exist", ""),
    ],
)
def test_what_phone_and_account_lack_is_told(
    show: Show, locale: str, setup: dict[str, Any], step: str, code: str, quoted: str
) -> None:
    tab = show(locale=locale, **setup)
    assert_failed(tab, step, code)
    assert quoted in said(tab)
    assert texts(tab, ".chips .bad") == setup.get("lacks", [])


@alternately(
    ("setup", "step", "code"),
    [
        ({"breaks": {"getApi": hang}}, "stepSign", "no answer"),
        ({"breaks": {"jweixin": hang}}, "stepScript", "else"),
        ({"when": "never"}, "stepConfig", "silent"),
        ({"silent": ["preVerifyJSAPI"]}, "stepConfig", "silent"),
        ({"silent": ["checkJsApi"]}, "stepApis", "silent"),
    ],
)
def test_what_hangs_is_not_waited_for_for_ever(
    signing: Signing, show: Show, locale: str, setup: dict[str, Any], step: str, code: str
) -> None:
    tab = show(wait=False, locale=locale, **setup)
    page = tab.chromium.page
    page.clock.install()
    page.goto(signing.url + "/", wait_until="commit")
    page.wait_for_selector(f"#{step}.now")
    page.clock.fast_forward(5_000)
    assert tab.js("document.body.dataset.verdict") == "checking"

    def over() -> bool:
        page.clock.fast_forward(16_000)
        return bool(tab.js("document.body.dataset.verdict === 'failed'"))

    eventually("the page has given up", over)
    assert_failed(tab, step, code)
    assert said(tab) == ""


@pytest.mark.parametrize("problem", ["", "invalid_signature"])
def test_in_webkit_too(webkit: WebKit, site: Site, signing: Signing, problem: str) -> None:
    site.server = signing.url
    site.files["/bridge.js"] = bridge_for("iOS", signing.wechat, problems=[problem])
    tab = Phone(webkit.tab(KINDS["iOS"].agent), signing.wechat)
    tab.open(f"http://127.0.0.1:{site.port}/")
    if not problem:
        assert tab.verdict() == "allWell"
        return
    assert_failed(tab, "stepConfig", "invalid signature")
    tab.js("document.getElementById('report').click()")
    tab.waits("document.activeElement.tagName === 'TEXTAREA' || /Copied/.test(report.innerText)")


# The buttons.


def test_the_report_has_all_that_an_operator_asks_for_and_no_credential(
    signing: Signing, show: Show
) -> None:
    grant = {"permissions": ["clipboard-read", "clipboard-write"]}
    tab = show("/?a=1", problems=["invalid_signature"], context=grant)
    tab.chromium.page.click("#report")
    tab.waits("document.getElementById('report').innerText === 'Copied'")
    assert tab.js("document.querySelector('textarea')") is None
    report = tab.js("navigator.clipboard.readText()")
    signature = tab.calls("preVerifyJSAPI")[0]["args"]["verifySignature"]
    for part in (
        "✓ Signature from this server\n",
        "✕ wx.config: WeChat says the signature is wrong\n",
        "· APIs of js_api_list\n",
        "WeChat says: config:invalid signature\n",
        f"signed: {signing.url}/?a=1\n",
        f"of the page: {signing.url}/?a=1\n",
        f'"signature":"{signature}"',
        KINDS["Android"].agent,
    ):
        assert part in report
    assert_no_credential(report, signing.wechat.issued)


@alternately(("broken",), [("undefined",), ("{writeText: () => Promise.reject(new Error())}",)])
def test_without_a_clipboard_it_is_there_to_be_copied_by_hand(
    signing: Signing, show: Show, broken: str, locale: str
) -> None:
    broken = f"Object.defineProperty(navigator, 'clipboard', {{value: {broken}}})"
    tab = show(kind="desktop", locale=locale, script=broken)
    press = tab.chromium.page.click
    press("#report")
    tab.waits("document.activeElement.tagName === 'TEXTAREA'")
    assert tab.js("getSelection().toString()") == tab.js(REPORTED)
    assert KINDS["desktop"].agent in tab.js(REPORTED)
    press("#report")
    assert tab.js("document.querySelectorAll('textarea').length") == 1
    press("#copy")
    tab.waits(f"document.activeElement.value === '{signing.url}/'")


def test_another_try_starts_afresh(show: Show) -> None:
    tab = show("/?a=1", breaks={"getApi": cut})
    page = tab.chromium.page
    page.unroute(re.compile("getApi"))
    with page.expect_navigation():
        page.click("#again")
    assert tab.verdict() == "allWell"
    assert tab.js("location.search") == "?a=1"


# The look.

CONTRAST = r"""
(() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\d.]+/g).map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const behind = at => {
    const colour = getComputedStyle(at).backgroundColor
    return colour === 'rgba(0, 0, 0, 0)' ? behind(at.parentElement) : colour
  }
  return [...document.querySelectorAll('body *')].filter(at => at.offsetParent && (at.value ||
    [...at.childNodes].some(node => node.nodeType === 3 && node.data.trim()))).map(at => {
    const pair = [light(getComputedStyle(at).color), light(behind(at))].sort((a, b) => b - a)
    return [(pair[0] + 0.05) / (pair[1] + 0.05), at.tagName, at.textContent]
  }).sort((a, b) => a[0] - b[0])
})()
"""


@pytest.mark.parametrize(
    ("scheme", "back"), [("light", "rgb(243, 244, 246)"), ("dark", "rgb(17, 24, 39)")]
)
@pytest.mark.parametrize("state", ["allWell", "failed", "outside"])
def test_every_text_stands_out_from_what_is_behind_it(
    show: Show, state: str, scheme: str, back: str
) -> None:
    tab = show(
        "/?a=%2F",
        "desktop" if state == "outside" else "Android",
        script="delete Navigator.prototype.clipboard",
        breaks={"getApi": unescaping_in_part} if state == "failed" else None,
        context={"color_scheme": scheme},
    )
    assert tab.verdict() == state
    tab.chromium.page.click("#report")
    measured = tab.js(CONTRAST)
    assert {"H1", "P", "I", "BUTTON", "TEXTAREA"} <= {tag for _, tag, _ in measured}
    assert measured[0][0] >= 4.5, measured[:5]
    assert tab.js("getComputedStyle(document.body).backgroundColor") == back


@pytest.mark.parametrize(
    ("problems", "verdict"), [([], "allWell"), (["invalid_signature"], "failed")]
)
def test_it_fits_the_width_of_a_phone_even_in_an_engine_of_2018(
    site: Site, signing: Signing, problems: list[str], verdict: str
) -> None:
    site.server = signing.url
    measure = """;setInterval(() => {
      const {scrollWidth} = document.documentElement, {verdict} = document.body.dataset
      document.documentElement.id = `${verdict} ${scrollWidth}`
    }, 50)"""
    site.files["/bridge.js"] = bridge_for("Android", signing.wechat, problems=problems) + measure
    made = made_by_chromium_69(f"http://127.0.0.1:{site.port}/?{'x' * 500}", "Android")
    width = re.search(f'id="{verdict} ([0-9]+)"', made)
    assert width is not None
    assert int(width[1]) <= 320


# Urls on their way.

TAIL = "&to=https%3A%2F%2Fexample.com%2F%3Fx%3D1%26y%3D2&e=&r=100%25"


def mangling(mangle: Callable[[list[str]], str]) -> Break:
    """What a proxy makes of the last of the queries that it got."""
    queries: list[str] = []

    def proxy(route: Any) -> None:
        address, _, query = route.request.url.partition("?")
        queries.append(query)
        route.continue_(url=f"{address}?{mangle(queries)}")

    return proxy


@pytest.mark.parametrize(("sent", "signed"), [("%2F", "/"), ("%2B", "+")])
def test_of_a_url_changed_on_the_way_the_server_s_words_are_quoted(
    show: Show, sent: str, signed: str
) -> None:
    tab = show(f"/?a=x{sent}y&b=2", breaks={"getApi": unescaping_in_part})
    assert_failed(tab, "stepUrls", "changed")
    assert f"url has '{signed}' where its page has '{sent}', by the Referer" in said(tab)
    assert not any("wx.qq.com" in url for url in tab.chromium.asked)


UNESCAPED = ["++" + unquote(TAIL), "%2B%2B" + TAIL]


@alternately(
    ("mangle", "marked", "quoted"),
    [
        (lambda queries: queries[-1].replace("%25", "%"), UNESCAPED, ""),
        (lambda queries: unquote(unquote(queries[-1])), UNESCAPED, ""),
        (lambda queries: unquote(queries[-1]) + "&v=1", ["&v=1"], ""),
        (lambda queries: queries[0], ["?d=1;2&s=a+b&p=c%2B%2B" + TAIL], ""),  # a cache
        (lambda queries: unquote(queries[-1]), [], "seems to be appended to the url"),
        (lambda queries: quote(queries[-1], safe="="), [], "url was escaped twice"),
    ],
)
def test_a_mangling_proxy_shows_in_a_desktop_browser(
    show: Show, locale: str, mangle: Callable[..., str], marked: list[str], quoted: str
) -> None:
    tab = show(kind="desktop", locale=locale, breaks={r"getApi\?": mangling(mangle)})
    assert_failed(tab, "stepUrls", "changed")
    assert texts(tab, "mark") == marked
    assert quoted in said(tab)


@alternately(
    ("broken", "code"),
    [
        (cut, "no answer"),
        (answered(403), "not json 403"),
        (answered(400), "not json"),
        (answered(200), "not json 200"),
    ],
)
def test_what_keeps_an_odd_url_alone_from_the_server_is_told(
    show: Show, locale: str, broken: Break, code: str
) -> None:
    """A firewall that finds something in it."""
    tab = show(kind="desktop", locale=locale, breaks={"getApi.*example": broken})
    assert_failed(tab, "stepUrls", code)
    assert TAIL in tab.text()


def test_urls_with_all_that_is_easily_spoilt_are_asked_for(signing: Signing, show: Show) -> None:
    asked = show("/?a=1", "desktop").chromium.asked
    own, *odd = [unquote(at.partition("=")[2]) for at in asked if "/getApi?url=" in at]
    assert own == signing.url + "/?a=1"
    assert all(at.startswith(signing.url + "/") for at in odd)
    spoilt = "%22 %27 %E4%B8%AD ; + %2B https%3A%2F%2F =& %25 %252F"
    assert [part for part in spoilt.split() if part not in " ".join(odd)] == []


# The trailing slash of the page's address below a proxy's location.


def located(server: str, location: str) -> dict[str, Break]:
    """A proxy that hands on the paths that begin with the location, with a slash in its place. A
    single-page app answers all others."""

    def proxy(route: Any) -> None:
        _, _, path, query, _ = urlsplit(route.request.url)
        if re.match(location, path):
            path = re.sub(location, "/", path, count=1)
            route.fulfill(response=route.fetch(url=f"{server}{path}{query and '?' + query}"))
        else:
            route.fulfill(body="<!doctype html>", content_type="text/html")

    return {"http://h5.example.com/": proxy}


CUT_OFF = "/wx(?![^/])/?"
PAGE_ALONE = "/wx$|/(?!wx/)"


@pytest.mark.parametrize(
    ("location", "tail"),
    [(CUT_OFF, ""), (CUT_OFF, "?from=singlemessage"), (CUT_OFF, "#/route"), (PAGE_ALONE, "")],
)
def test_without_it_the_page_finds_the_server(
    shipped: str, show: Show, location: str, tail: str
) -> None:
    breaks = located(shipped, location)
    tab = show("/wx" + tail, server="http://h5.example.com", breaks=breaks)
    assert tab.verdict() == "allWell"
    if location == CUT_OFF:
        assert tab.chromium.console == []


def test_without_it_the_page_finds_the_advice(start: Start, show: Show, wechat: Sandbox) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    breaks = located(start().url, CUT_OFF)
    tab = show("/wx", server="http://h5.example.com", breaks=breaks)
    assert "Add this server's public address to the account" in tab.text()


@pytest.mark.parametrize("locale", LOCALES)
def test_where_its_lack_hides_the_server_that_is_told(
    shipped: str, show: Show, locale: str
) -> None:
    breaks = located(shipped, "/wx")  # nginx's, with one slash
    tab = show("/wx", server="http://h5.example.com", locale=locale, breaks=breaks)
    assert_failed(tab, "stepSign", "no slash")
    assert "location /wx/ { proxy_pass http://127.0.0.1:8060/; }" in tab.text()


def test_no_path_makes_the_page_load_a_script_of_another_host(show: Show, signing: Signing) -> None:
    def proxy(route: Any) -> None:
        route.fulfill(response=route.fetch(url=signing.url + "/"))

    breaks = {"http://h5.example.com/": proxy}
    tab = show("//evil.example.com/a", server="http://h5.example.com", breaks=breaks)
    assert tab.verdict() == "failed"
    assert all(at.startswith("http://h5.example.com/") for at in tab.chromium.asked)
