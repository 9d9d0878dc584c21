"""The page at / in real browsers, with WeChat's real script."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from configparser import ConfigParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest
from browser import KINDS, Chromium, Phone, Signing, Site, bridge_for, made_by_chromium_69
from conftest import OpenPhone
from harness import ROOT, Fault, Sandbox, Server, Start, assert_no_credential, write_ini

from wechat_sign.errors import CAUSES

IN_WECHAT = [kind for kind in KINDS if kind not in ("desktop", "WeCom")]
CHINESE = {"locale": "zh-CN"}
LOCALES = ("en-US", "zh-CN")


def alternately(names: Sequence[str], cases: Iterable[Sequence[Any]]) -> pytest.MarkDecorator:
    """The cases, read by turns in English and Chinese."""
    values = [(*case, LOCALES[place % 2]) for place, case in enumerate(cases)]
    return pytest.mark.parametrize((*names, "locale"), values)


def chromium_of(tab: Phone) -> Chromium:
    assert isinstance(tab.tab, Chromium)
    return tab.tab


def headline(tab: Phone) -> str:
    return str(tab.js("document.getElementById('verdict').innerText"))


def said(tab: Phone) -> str:
    """What WeChat, or who answered, is quoted with."""
    return str(tab.js("document.querySelector('#said').innerText"))


def states(tab: Phone) -> str:
    marks = tab.js("[...document.querySelectorAll('#steps i')].map(i => i.textContent)")
    return "".join(marks)


def texts(tab: Phone, selector: str) -> list[str]:
    return list(tab.js(f"[...document.querySelectorAll({selector!r})].map(i => i.innerText)"))


def assert_failed(tab: Phone, step: str, kind: str, code: str, *titles: str) -> None:
    """The step failed, the headline is this, and the causes are in the reader's language."""
    assert tab.verdict() == "failed"
    assert tab.js("[...document.querySelectorAll('.steps > .bad')].map(item => item.id)") == [step]
    chinese = tab.js("navigator.language") == "zh-CN"
    assert headline(tab) == titles[chinese]
    causes = [advice[chinese] for advice in CAUSES[kind][code]]
    assert [text.lower() for text in texts(tab, ".causes li")] == [
        text.lower() + ".。"[chinese] for text in causes
    ]
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


Break = Callable[[Any], None]
"""What a route of playwright does to a request."""


def cut(route: Any) -> None:
    route.abort()


def hang(route: Any) -> None:
    """No answer ever."""


def answered(status: int, body: str) -> Break:
    return lambda route: route.fulfill(status=status, body=body)


@pytest.fixture(scope="module")
def shipped(signing: Signing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The url of a server that has the list of APIs of config.example.ini."""
    folder: Path = tmp_path_factory.mktemp("shipped")
    lines = ("[jssdk]", f"js_api_list = {', '.join(shipped_names())}")
    ini = write_ini(folder / "c.ini", signing.wechat, *lines)
    server = Server("--config", str(ini), "--address", "127.0.0.1", "--port", "0")
    yield server.url
    server.kill()
    assert "Traceback" not in server.output


def shipped_names() -> list[str]:
    example = ConfigParser()
    example.read(ROOT / "config.example.ini", encoding="utf-8")
    names = example["jssdk"]["js_api_list"].replace("\n", " ").replace(" ", "").split(",")
    assert "onMenuShareTimeline" in names
    return names


class TestAllWell:
    @pytest.mark.parametrize("when", ["early", "late"])
    @pytest.mark.parametrize("kind", IN_WECHAT)
    def test_the_shipped_configuration_passes(
        self, shipped: str, phone: OpenPhone, kind: str, when: str
    ) -> None:
        """Though WeChat's script renames some of its names in the list that it is given."""
        tab = phone(kind, when=when)
        tab.open(shipped + "/")
        assert tab.verdict() == "allWell"
        assert headline(tab) == "Everything works"
        assert texts(tab, ".chips span") == shipped_names()
        assert states(tab) == "✓✓✓✓✓✓"
        assert texts(tab, ".bad, #said, .causes") == [""]
        assert chromium_of(tab).console == []

    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    @pytest.mark.parametrize(
        "tail", ["/?a=1&b=2", "/?q=%E4%B8%AD%2F&r=x+y", "/?名=值", "/#/route?x=1", "/?a=1#中"]
    )
    def test_whatever_the_pages_url_is(
        self, signing: Signing, phone: OpenPhone, kind: str, tail: str
    ) -> None:
        tab = phone(kind)
        tab.open(signing.url + tail)
        assert tab.verdict() == "allWell"
        assert [call["problem"] for call in tab.configs()] == [""]
        assert chromium_of(tab).console == []  # no violation of the Content-Security-Policy either

    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    def test_in_webkit_too(
        self, site: Site, shipped: str, webkit_page: OpenPhone, kind: str
    ) -> None:
        site.server = shipped
        tab = webkit_page(kind)
        assert tab.verdict() == "allWell"
        assert texts(tab, ".chips span") == shipped_names()

    def test_wechats_second_host_serves_where_the_first_fails(
        self, signing: Signing, phone: OpenPhone
    ) -> None:
        tab = phone()
        chromium_of(tab).page.route("https://res.wx.qq.com/**", cut)
        tab.open(signing.url + "/")
        assert tab.verdict() == "allWell"
        assert chromium_of(tab).scripts == ["https://res2.wx.qq.com/open/js/jweixin-1.6.0.js"]

    def test_it_shares_itself_and_says_what_to_do_next(
        self, signing: Signing, phone: OpenPhone
    ) -> None:
        tab = phone()
        tab.open(signing.url + "/?a=1")
        assert tab.verdict() == "allWell"
        assert tab.shared()["link"] == signing.url + "/?a=1"
        assert "Share this page now" in tab.text()

    def test_clocks_that_differ_are_told(self, signing: Signing, phone: OpenPhone) -> None:
        for hours, told in ((0, False), (3, True)):
            tab = phone()
            chromium_of(tab).page.add_init_script(
                f"const now = Date.now; Date.now = () => now() + {hours} * 3600e3"
            )
            tab.open(signing.url + "/")
            assert tab.verdict() == "allWell"
            assert ("differ by minutes: 180" in tab.text()) is told

    def test_outside_wechat_the_page_says_where_to_open_it(
        self, signing: Signing, phone: OpenPhone
    ) -> None:
        tab = phone("desktop")
        url = signing.url + "/?a=1"
        tab.open(url)
        assert tab.verdict() == "outside"
        text = tab.text()
        assert text.count(url) == 2
        for part in ("appId", "timestamp", "nonceStr", "signature"):
            assert part in text
        assert chromium_of(tab).scripts == []

    def test_it_speaks_the_browsers_language(self, signing: Signing, phone: OpenPhone) -> None:
        for kind, said_there in (("Android", "一切正常"), ("desktop", "请在微信中打开本页")):
            tab = phone(kind, context=CHINESE)
            tab.open(signing.url + "/")
            assert tab.verdict() != "failed"
            assert headline(tab) == said_there
            assert tab.js("document.documentElement.lang") == "zh-CN"
            assert_chinese(tab)


@pytest.fixture
def webkit_page(site: Site, signing: Signing, request: pytest.FixtureRequest) -> OpenPhone:
    """Opens the page in WebKit, through the site."""
    site.server = signing.url
    webkit = request.getfixturevalue("webkit")

    def new(kind: str, **more: Any) -> Phone:
        site.files["/bridge.js"] = bridge_for(kind, signing.wechat, **more)
        tab = Phone(webkit.tab(KINDS[kind].agent), signing.wechat)
        tab.open(f"http://127.0.0.1:{site.port}/")
        return tab

    return new


DOWN = ("This server does not answer", "本服务没有响应")
ELSEWHERE = ("Something else answers in this server’s place", "应答的不是本服务")
NO_SCRIPT = ("wechat-sign.js does not come from this server", "无法从本服务加载 wechat-sign.js")
NO_WEIXIN = ("WeChat’s script can’t be loaded", "微信脚本无法加载")
NOT_REACHED = ("/getApi does not reach this server", "/getApi 没有到达本服务")
TOO_LONG = ("This page’s url is too long", "本页的 url 过长")
WRONG = ("WeChat says the signature is wrong", "微信认为签名有误")
REFUSED = ("WeChat refuses wx.config", "微信拒绝了 wx.config")
DOMAIN = ("WeChat does not accept this page’s domain", "微信不接受本页的域名")
SILENT = ("WeChat does not answer", "微信没有响应")
WECOM = ("This is WeCom, not WeChat", "当前是企业微信，不是微信")
CHANGED = (
    "A proxy between this page and the server changes urls",
    "页面与本服务之间的代理改动了 url",
)


class TestTheServer:
    @alternately(
        ("at", "broken", "step", "code", "titles"),
        [
            ("getApi", cut, "sign", "no answer", DOWN),
            ("getApi", answered(502, "<h1>"), "sign", "not json", ELSEWHERE),
            ("getApi", answered(504, "<h1>"), "sign", "not json", ELSEWHERE),
            ("getApi", answered(200, "<h1>"), "sign", "not json 200", ELSEWHERE),
            ("getApi", answered(200, "{}"), "sign", "not json 200", ELSEWHERE),
            ("getApi", answered(404, "<h1>"), "sign", "not json 404", ELSEWHERE),
            ("getApi", answered(401, "<h1>"), "sign", "not json 401", ELSEWHERE),
            ("getApi", answered(403, "<h1>"), "sign", "not json 403", ELSEWHERE),
            ("getApi", answered(414, "<h1>"), "sign", "too long", TOO_LONG),
            ("getApi", answered(404, '{"error": "none"}'), "sign", "404", NOT_REACHED),
            ("wechat-sign.js", cut, "sign", "no script", NO_SCRIPT),
            ("wechat-sign.js", answered(404, ""), "sign", "no script", NO_SCRIPT),
            ("wechat-sign.js", answered(200, "<h1>"), "sign", "no script", NO_SCRIPT),
            ("jweixin", cut, "script", "else", NO_WEIXIN),
            ("jweixin", answered(200, "<h1>"), "script", "else", NO_WEIXIN),
        ],
    )
    def test_each_step_that_fails_has_its_own_headline_and_causes(
        self,
        signing: Signing,
        phone: OpenPhone,
        locale: str,
        at: str,
        broken: Break,
        step: str,
        code: str,
        titles: tuple[str, str],
    ) -> None:
        tab = phone(context={"locale": locale})
        chromium_of(tab).page.route(re.compile(at), broken)
        tab.open(signing.url + "/")
        assert_failed(tab, f"step{step.title()}", step, code, *titles)
        assert "✕ wx.config" not in states(tab)

    @pytest.mark.parametrize(
        ("at", "step", "kind", "code", "titles"),
        [
            ("getApi", "stepSign", "sign", "no answer", DOWN),
            ("jweixin", "stepScript", "script", "else", NO_WEIXIN),
        ],
    )
    def test_what_hangs_is_not_waited_for_for_ever(
        self,
        signing: Signing,
        phone: OpenPhone,
        at: str,
        step: str,
        kind: str,
        code: str,
        titles: tuple[str, str],
    ) -> None:
        tab = phone()
        page = chromium_of(tab).page
        page.clock.install()
        page.route(re.compile(at), hang)
        with page.expect_request(re.compile(at)):
            page.goto(signing.url + "/", wait_until="commit")
        for _ in range(2):
            page.clock.fast_forward(16_000)
            tab.js("new Promise(requestAnimationFrame)")
        assert_failed(tab, step, kind, code, *titles)

    @alternately(("length",), [(8193,), (12_000,)])
    def test_a_url_that_is_too_long_is_told(
        self, signing: Signing, phone: OpenPhone, locale: str, length: int
    ) -> None:
        tab = phone(context={"locale": locale})
        tab.open(signing.url + "/?" + "x" * length)
        assert_failed(tab, "stepSign", "sign", "too long", *TOO_LONG)

    @pytest.mark.parametrize(
        ("fault", "title", "words", "quoted"),
        [
            (Fault(errcode=40164), "WeChat refuses this server", "public address to", "40164"),
            (Fault(errcode=40125), "WeChat refuses this server", "Secret is not the one", "40125"),
            (Fault(hang_up=True), "This server has no ticket to sign with", "Check that this", ""),
        ],
    )
    def test_a_refusing_wechat_is_told_with_what_to_do(
        self,
        start: Start,
        phone: OpenPhone,
        wechat: Sandbox,
        fault: Fault,
        title: str,
        words: str,
        quoted: str,
    ) -> None:
        wechat.faults["token"] = fault
        tab = phone()
        tab.open(start().url + "/")
        assert tab.verdict() == "failed"
        assert headline(tab) == title
        assert words in tab.text()
        assert said(tab) == (quoted and f"WeChat says\nerrcode {quoted}")
        assert states(tab) == "✕·····"

    def test_what_to_do_is_told_in_chinese_too(
        self, start: Start, phone: OpenPhone, wechat: Sandbox
    ) -> None:
        wechat.faults["token"] = Fault(errcode=40164)
        server = start().url
        tab = phone(context=CHINESE)
        tab.open(server + "/")
        assert tab.verdict() == "failed"
        assert headline(tab) == "微信拒绝了本服务的请求"
        assert "请把本服务器的公网 IP" in tab.text()
        assert_chinese(tab)

        # /healthz may be answered by another instance than /getApi.
        other = {"errcode": 40125, "advice": "wrong", "advice_zh": "错"}
        chromium_of(tab).page.route("**/healthz", lambda route: route.fulfill(json=other))
        tab.open(server + "/")
        assert_failed(tab, "stepSign", "sign", "else", "", "微信拒绝了本服务的请求")

    def test_a_page_host_that_is_not_listed_is_told(self, start: Start, phone: OpenPhone) -> None:
        server = start("[jssdk]", "page_hosts = h5.example.com").url
        for locale in LOCALES:
            tab = phone(context={"locale": locale})
            tab.open(server + "/")
            titles = ("This page’s host is not in page_hosts", "本页域名不在 page_hosts 中")
            assert_failed(tab, "stepSign", "sign", "403", *titles)
            assert texts(tab, "#why dd") == ["127.0.0.1"]


class TestThePhone:
    @alternately(
        ("problem", "message", "code", "titles"),
        [
            ("invalid_url_domain", "config:invalid url domain", "invalid url domain", DOMAIN),
            ("invalid_signature", "config:invalid signature", "invalid signature", WRONG),
            (
                "access_denied",
                "config:permission denied",
                "permission denied",
                ("The account lacks a right", "公众号缺少接口权限"),
            ),
            (
                "the permission value is offline verifying",
                "config:the permission value is offline verifying",
                "offline verifying",
                REFUSED,
            ),
            ("fail", "config:fail", "config:fail", REFUSED),
            (
                "fail, Error: 系统错误,错误码:63002,invalid signature",
                "63002",
                "invalid signature",
                WRONG,
            ),
            (
                "fail, Error: 系统错误,错误码:40048,invalid url domain",
                "40048",
                "invalid url domain",
                DOMAIN,
            ),
            (
                "invalid_appid",
                "config:invalid appid",
                "appid",
                ("WeChat does not accept the appid", "微信不接受该 appid"),
            ),
            (
                "invalid_args",
                "config:invalid args",
                "invalid args",
                ("js_api_list is empty", "js_api_list 为空"),
            ),
            (
                "require_subscribe",
                "config:require subscribe",
                "require subscribe",
                ("Not a follower of the test account", "微信用户须先关注测试号"),
            ),
            ("something_new", "config:something new", "else", REFUSED),
        ],
    )
    def test_each_of_its_messages_has_its_headline_and_causes(
        self,
        signing: Signing,
        phone: OpenPhone,
        locale: str,
        problem: str,
        message: str,
        code: str,
        titles: tuple[str, str],
    ) -> None:
        tab = phone(problems=[problem], context={"locale": locale})
        tab.open(signing.url + "/")
        assert_failed(tab, "stepConfig", "phone", code, *titles)
        assert message in said(tab)
        assert states(tab) == "✓✓✓✕··"
        enter = ["127.0.0.1", signing.wechat.appid]
        assert texts(tab, "#why dd") == (enter if code == "invalid url domain" else [])
        same = ("The url that was signed is the page’s own.", "签名所用的 url 与页面的 url 一致。")
        same_here = same[locale == "zh-CN"]
        assert (same_here in tab.text()) is ("signature" in problem)

    def test_what_it_says_is_as_large_and_dark_as_the_text(
        self, signing: Signing, phone: OpenPhone
    ) -> None:
        tab = phone(problems=["invalid_url_domain"])
        tab.open(signing.url + "/")
        assert tab.verdict() == "failed"
        style = "(s => [s.fontSize, s.color])(getComputedStyle(document.querySelector('{}')))"
        size, colour = tab.js(style.format("#said code"))
        assert [size, colour] == tab.js(style.format("body")) == ["16px", colour]

    @pytest.mark.parametrize(
        "step", ["stepSign", "stepUrls", "stepScript", "stepConfig", "stepApis"]
    )
    def test_no_steps_name_says_that_it_went_well(
        self, signing: Signing, phone: OpenPhone, step: str
    ) -> None:
        tab = phone("desktop")
        tab.open(signing.url + "/")
        assert tab.verdict() == "outside"
        assert not re.search("accepted|received|loaded|available", texts(tab, f"#{step}")[0])

    def test_a_dead_ticket_is_not_taken_for_a_wrong_url(
        self, start: Start, phone: OpenPhone, wechat: Sandbox
    ) -> None:
        url = start().url
        tab = phone("Android", wechat)
        tab.open(url + "/healthz")
        tab.waits("fetch('/healthz').then(answer => answer.ok)")
        wechat.rotate_ticket()
        tab = phone("Android", wechat, problems=[])
        tab.open(url + "/?a=1")
        assert_failed(tab, "stepConfig", "phone", "invalid signature", *WRONG)
        first = texts(tab, ".causes li")[0]
        assert "ticket" in first
        assert "url" not in first
        assert "The url that was signed is the page’s own." in tab.text()

    def test_an_address_that_changed_after_signing_leads_with_the_urls(
        self, signing: Signing, phone: OpenPhone
    ) -> None:
        tab = phone(delays={"preVerifyJSAPI": 300})
        tab.open(signing.url + "/?a=1")
        tab.js("phone.problems.push('invalid_signature'), history.replaceState({}, '', '/?a=2')")
        titles = ("Another url was signed than the page’s", "")
        assert_failed(tab, "stepConfig", "phone", "url differs", *titles)
        assert texts(tab, "mark") == ["1", "2"]

    @alternately(("names",), [("updateAppMessageShareData",), ("updateTimelineShareData",)])
    def test_an_account_that_may_not_share_is_told(
        self, signing: Signing, phone: OpenPhone, locale: str, names: str
    ) -> None:
        """checkJsApi knows the app alone."""
        tab = phone(context={"locale": locale}, answers={names: "access_denied"})
        tab.open(signing.url + "/")
        titles = ("The account lacks a right", "公众号缺少接口权限")
        assert_failed(tab, "stepShare", "phone", "permission denied", *titles)
        assert f"{names}:permission denied" in said(tab)
        assert states(tab) == "✓✓✓✓✓✕"

    @pytest.mark.parametrize("locale", LOCALES)
    def test_a_mini_program_is_named(self, signing: Signing, phone: OpenPhone, locale: str) -> None:
        tab = phone(context={"locale": locale})
        chromium_of(tab).page.add_init_script("window.__wxjs_environment = 'miniprogram'")
        tab.open(signing.url + "/")
        titles = ("This page is inside a mini program", "当前在小程序的 web-view 中")
        assert_failed(tab, "stepShare", "phone", "mini program", *titles)

    def test_the_url_that_wechat_took_is_shown(self, signing: Signing, phone: OpenPhone) -> None:
        tab = phone("iOS", tells=True)
        chromium_of(tab).page.add_init_script("history.replaceState({}, '', '/?b')")
        tab.open(signing.url + "/?a")
        titles = ("Another url was signed than the page’s", "")
        assert_failed(tab, "stepConfig", "phone", "url differs", *titles)
        assert texts(tab, "mark") == ["b", "a"]

    @alternately(
        ("setup", "step"),
        [
            ({"when": "never"}, "stepConfig"),
            ({"silent": ["preVerifyJSAPI"]}, "stepConfig"),
            ({"silent": ["checkJsApi"]}, "stepApis"),
        ],
    )
    def test_a_wechat_that_never_answers_is_told(
        self, signing: Signing, phone: OpenPhone, locale: str, setup: dict[str, Any], step: str
    ) -> None:
        tab = phone(context={"locale": locale}, **setup)
        page = chromium_of(tab).page
        page.clock.install()
        tab.open(signing.url + "/")
        before = {"stepConfig": "stepScript", "stepApis": "stepConfig"}[step]
        page.wait_for_selector(f"#{before}.good")
        page.clock.fast_forward(5_000)
        assert tab.js("document.body.dataset.verdict") == "checking"
        page.clock.fast_forward(15_000)
        assert_failed(tab, step, "phone", "silent", *SILENT)
        assert said(tab) == ""

    @alternately(
        ("setup", "step"),
        [
            ({"problems": ["invalid_signature"]}, "stepConfig"),
            ({"problems": ["fail"]}, "stepConfig"),
            ({"lacks": ["updateTimelineShareData"]}, "stepApis"),
        ],
    )
    def test_in_wecom_it_says_so(
        self, signing: Signing, phone: OpenPhone, locale: str, setup: dict[str, Any], step: str
    ) -> None:
        tab = phone("WeCom", context={"locale": locale}, **setup)
        tab.open(signing.url + "/")
        assert_failed(tab, step, "phone", "wxwork", *WECOM)

    @pytest.mark.parametrize("locale", LOCALES)
    def test_an_api_that_it_does_not_have_is_shown(
        self, signing: Signing, phone: OpenPhone, locale: str
    ) -> None:
        tab = phone(context={"locale": locale}, lacks=["updateTimelineShareData"])
        tab.open(signing.url + "/")
        titles = ("This WeChat lacks some of the APIs", "当前微信缺少部分接口")
        assert_failed(tab, "stepApis", "phone", "function not exist", *titles)
        assert "updateTimelineShareData" in said(tab)
        assert texts(tab, ".chips .bad") == ["updateTimelineShareData"]
        assert states(tab) == "✓✓✓✓✕·"

    @pytest.mark.parametrize(
        ("told", "code", "title"),
        [
            ("fail, the permission value is offline verifying", "offline verifying", REFUSED[0]),
            ("access_denied", "permission denied", "The account lacks a right"),
            (
                "system:function_not_exist",
                "function not exist",
                "This WeChat lacks some of the APIs",
            ),
        ],
    )
    def test_a_refused_question_for_apis_is_told(
        self, signing: Signing, phone: OpenPhone, told: str, code: str, title: str
    ) -> None:
        tab = phone(lacks=["checkJsApi"] if told.startswith("system") else [])
        if not told.startswith("system"):
            chromium_of(tab).page.add_init_script(
                "const ask = WeixinJSBridge.invoke; WeixinJSBridge.invoke = (name, ...more) => "
                f"name === 'checkJsApi' ? more[1]({{err_msg: 'x:{told}'}}) : ask(name, ...more)"
            )
        tab.open(signing.url + "/")
        assert_failed(tab, "stepApis", "phone", code, title)

    @pytest.mark.parametrize(
        ("kind", "problem", "code", "title"),
        [
            ("iOS", "invalid_signature", "invalid signature", WRONG[0]),
            ("iOS", "invalid_url_domain", "invalid url domain", DOMAIN[0]),
            ("WeCom", "invalid_signature", "wxwork", WECOM[0]),
        ],
    )
    def test_in_webkit_too(
        self, webkit_page: OpenPhone, kind: str, problem: str, code: str, title: str
    ) -> None:
        tab = webkit_page(kind, problems=[problem])
        assert_failed(tab, "stepConfig", "phone", code, title)
        assert "config:" in said(tab)
        tab.js("document.getElementById('report').click()")
        tab.waits(
            "document.activeElement.tagName === 'TEXTAREA' || /Copied/.test(report.innerText)"
        )


REPORTED = "document.querySelector('#buttons textarea').value"


class TestTheReport:
    def press(self, tab: Phone, name: str) -> None:
        chromium_of(tab).page.click(f"#{name}")

    def test_it_has_all_that_an_operator_asks_for_and_no_credential(
        self, signing: Signing, phone: OpenPhone
    ) -> None:
        grant = {"permissions": ["clipboard-read", "clipboard-write"]}
        tab = phone(problems=["invalid_signature"], context=grant)
        url = signing.url + "/?a=1"
        tab.open(url)
        assert tab.verdict() == "failed"
        self.press(tab, "report")
        tab.waits("document.getElementById('report').innerText === 'Copied'")
        assert tab.js("document.querySelector('textarea')") is None
        report = tab.js("navigator.clipboard.readText()")
        signature = tab.calls("preVerifyJSAPI")[0]["args"]["verifySignature"]
        for part in (
            WRONG[0],
            "✓ Signature from this server\n",
            f"✕ wx.config: {WRONG[0]}\n",
            "· APIs of js_api_list\n",
            "WeChat says: config:invalid signature\n",
            f"signed: {url}\n",
            f"of the page: {url}\n",
            f'"signature":"{signature}"',
            KINDS["Android"].agent,
        ):
            assert part in report
        assert_no_credential(report, signing.wechat.issued)

    @pytest.mark.parametrize(
        "broken", ["undefined", "{writeText: () => Promise.reject(new Error())}"]
    )
    @pytest.mark.parametrize("locale", LOCALES)
    def test_without_a_clipboard_it_is_there_to_be_copied_by_hand(
        self, signing: Signing, phone: OpenPhone, broken: str, locale: str
    ) -> None:
        tab = phone("desktop", context={"locale": locale})
        chromium_of(tab).page.add_init_script(
            f"Object.defineProperty(navigator, 'clipboard', {{value: {broken}}})"
        )
        url = signing.url + "/"
        tab.open(url)
        assert tab.verdict() == "outside"
        self.press(tab, "report")
        tab.waits("document.activeElement.tagName === 'TEXTAREA'")
        assert url in tab.js(REPORTED)
        assert tab.js("getSelection().toString()") == tab.js(REPORTED)
        assert KINDS["desktop"].agent in tab.js(REPORTED)
        self.press(tab, "report")
        assert tab.js("document.querySelectorAll('textarea').length") == 1
        self.press(tab, "copy")
        tab.waits(f"document.activeElement.value === {url!r}")

    def test_it_tells_what_the_server_answered(
        self, start: Start, phone: OpenPhone, wechat: Sandbox
    ) -> None:
        wechat.faults["token"] = Fault(errcode=40164)
        tab = phone()
        chromium_of(tab).page.add_init_script("delete Navigator.prototype.clipboard")
        tab.open(start().url + "/")
        assert tab.verdict() == "failed"
        self.press(tab, "report")
        report = tab.js(REPORTED)
        assert '"status":502' in report
        assert '"errcode":40164' in report
        assert_no_credential(report, wechat.issued)

    def test_another_try_starts_afresh(self, signing: Signing, phone: OpenPhone) -> None:
        tab = phone()
        page = chromium_of(tab).page
        page.route(re.compile("getApi"), cut)
        tab.open(signing.url + "/?a=1")
        assert tab.verdict() == "failed"
        page.unroute(re.compile("getApi"))
        with page.expect_navigation():
            self.press(tab, "again")
        assert tab.verdict() == "allWell"
        assert tab.js("location.search") == "?a=1"


CONTRAST = r"""
(() => {
  const parse = text => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number)
    return [r, g, b, a]
  }
  const over = ([r, g, b, a], under) => [r, g, b].map((part, at) => part * a + under[at] * (1 - a))
  const light = colour => {
    const [r, g, b] = colour.map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const behind = element => {
    if (!element) return [255, 255, 255]
    return over(parse(getComputedStyle(element).backgroundColor), behind(element.parentElement))
  }
  const found = []
  for (const element of document.querySelectorAll('body, body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()) ||
      element.value
    if (!own || !element.offsetParent || !element.getClientRects().length) continue
    const style = getComputedStyle(element), back = behind(element)
    const pair = [light(over(parse(style.color), back)), light(back)].sort((a, b) => b - a)
    found.push([(pair[0] + 0.05) / (pair[1] + 0.05), element.tagName, element.textContent])
  }
  return found.sort((a, b) => a[0] - b[0])
})()
"""


class TestTheLook:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("state", ["allWell", "failed", "outside", "changed", "checking"])
    def test_every_text_stands_out_from_what_is_behind_it(
        self, signing: Signing, phone: OpenPhone, state: str, scheme: str
    ) -> None:
        tab = phone(
            "desktop" if state == "outside" else "Android",
            context={"color_scheme": scheme},
            problems=["invalid_signature"] if state == "failed" else [],
        )
        page = chromium_of(tab).page
        page.add_init_script("delete Navigator.prototype.clipboard")
        if state == "changed":
            page.route("**/getApi?*", mangling(unescaping_in_part))
        if state == "checking":
            page.route("**/getApi?*", hang)
            page.goto(signing.url + "/", wait_until="commit")
            tab.waits("document.querySelector('#verdict').innerText")
        else:
            tab.open(signing.url + "/?a=%2F")
            assert tab.verdict() == {"changed": "failed"}.get(state, state)
        page.click("#report")
        measured = tab.js(CONTRAST)
        tags = {tag for _, tag, _ in measured}
        assert {"H1", "P", "I", "BUTTON", "TEXTAREA"} <= tags
        assert measured[0][0] >= 4.5, measured[:5]
        assert (
            tab.js("getComputedStyle(document.body).backgroundColor")
            == {
                "light": "rgb(243, 244, 246)",
                "dark": "rgb(17, 24, 39)",
            }[scheme]
        )

    @pytest.mark.parametrize("width", [320, 390, 1280])
    def test_it_fits_the_width_of_a_phone(
        self, signing: Signing, phone: OpenPhone, width: int
    ) -> None:
        tab = phone(problems=["invalid_signature"])
        page = chromium_of(tab).page
        page.set_viewport_size({"width": width, "height": 800})
        tab.open(signing.url + "/?" + "x" * 500)
        assert tab.verdict() == "failed"
        page.click("#report")
        assert tab.js("document.documentElement.scrollWidth") <= width

    def test_it_fits_the_width_of_a_phone_in_an_engine_of_2018(
        self, site: Site, signing: Signing
    ) -> None:
        site.server = signing.url
        measure = """;setInterval(() => {
          const {scrollWidth} = document.documentElement, {verdict} = document.body.dataset
          document.documentElement.id = `${verdict} ${scrollWidth}`
        }, 50)"""
        for problems, verdict in (([], "allWell"), (["invalid_signature"], "failed")):
            bridge = bridge_for("Android", signing.wechat, problems=problems)
            site.files["/bridge.js"] = bridge + measure
            url = f"http://127.0.0.1:{site.port}/?{'x' * 500}"
            made = made_by_chromium_69(url, "Android")
            width = re.search(f'id="{verdict} ([0-9]+)"', made)
            assert width is not None
            assert int(width[1]) <= 360

    def test_an_engine_without_fetch_is_told(self, signing: Signing, phone: OpenPhone) -> None:
        for lacks, quoted in (("fetch", "this browser is too old"), ("Promise", "Promise")):
            tab = phone()
            chromium_of(tab).page.add_init_script(f"delete window.{lacks}")
            tab.open(signing.url + "/")
            old = ("This browser is too old for this page", "")
            assert_failed(tab, "stepSign", "sign", "old browser", *old)
            assert quoted in said(tab)


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


TAIL = "&to=https%3A%2F%2Fexample.com%2F%3Fx%3D1%26y%3D2&e=&r=100%25"


class TestUrlsOnTheirWay:
    @pytest.mark.parametrize(("sent", "signed"), [("x%2Fy", "/y"), ("x%2By", "+y")])
    def test_of_a_url_changed_on_the_way_the_server_s_words_are_quoted(
        self, signing: Signing, phone: OpenPhone, sent: str, signed: str
    ) -> None:
        tab = phone()
        chromium_of(tab).page.route("**/getApi?*", mangling(unescaping_in_part))
        tab.open(f"{signing.url}/?a={sent}&b=2")
        assert_failed(tab, "stepUrls", "urls", "changed", *CHANGED)
        assert f"url has '{signed[0]}' where its page has '{sent[1:4]}', by the Referer" in said(
            tab
        )
        assert chromium_of(tab).scripts == []

    @alternately(
        ("mangle", "marked"),
        [
            (unescaping_in_part, ["++" + unquote(TAIL), "%2B%2B" + TAIL]),
            (
                lambda queries: unquote(unquote(queries[-1])),
                ["++" + unquote(TAIL), "%2B%2B" + TAIL],
            ),
            (lambda queries: unquote(queries[-1]) + "&v=1", ["&v=1"]),
            (lambda queries: queries[0], ["?d=1;2&s=a+b&p=c%2B%2B" + TAIL]),  # a cache
        ],
    )
    def test_a_mangling_proxy_shows_in_a_desktop_browser(
        self, signing: Signing, phone: OpenPhone, locale: str, mangle: Mangle, marked: list[str]
    ) -> None:
        tab = phone("desktop", context={"locale": locale})
        chromium_of(tab).page.route("**/getApi?*", mangling(mangle))
        tab.open(signing.url + "/")
        assert_failed(tab, "stepUrls", "urls", "changed", *CHANGED)
        assert texts(tab, "mark") == marked

    @alternately(
        ("mangle", "quoted"),
        [
            (lambda queries: unquote(queries[-1]), "seems to be appended to the url"),
            (lambda queries: quote(queries[-1], safe="="), "url was escaped twice"),
        ],
    )
    def test_what_the_server_says_of_a_mangled_url_is_told(
        self,
        signing: Signing,
        phone: OpenPhone,
        locale: str,
        mangle: Mangle,
        quoted: str,
    ) -> None:
        tab = phone("desktop", context={"locale": locale})
        chromium_of(tab).page.route("**/getApi?*", mangling(mangle))
        tab.open(signing.url + "/")
        assert_failed(tab, "stepUrls", "urls", "changed", *CHANGED)
        assert quoted in said(tab)
        assert texts(tab, "mark") == []

    @alternately(
        ("broken", "code", "titles"),
        [
            (cut, "no answer", ("Some urls get no answer", "部分 url 得不到响应")),
            *(
                (
                    answered(status, "<h1>"),
                    code,
                    ("Some urls don’t reach this server", "部分 url 到不了本服务"),
                )
                for status, code in (
                    (403, "not json 403"),
                    (400, "not json"),
                    (200, "not json 200"),
                )
            ),
        ],
    )
    def test_what_keeps_an_odd_url_alone_from_the_server_is_told(
        self,
        signing: Signing,
        phone: OpenPhone,
        locale: str,
        broken: Break,
        code: str,
        titles: tuple[str, str],
    ) -> None:
        """A firewall that finds something in it."""
        tab = phone("desktop", context={"locale": locale})
        chromium_of(tab).page.route(re.compile("getApi.*example"), broken)
        tab.open(signing.url + "/")
        kind = "urls" if code in CAUSES["urls"] else "sign"
        assert_failed(tab, "stepUrls", kind, code, *titles)
        assert TAIL in tab.text()

    def test_urls_with_all_that_is_easily_spoilt_are_asked_for(
        self, signing: Signing, phone: OpenPhone
    ) -> None:
        tab = phone("desktop")
        url = signing.url + "/?a=1"
        tab.open(url)
        assert tab.verdict() == "outside"
        asked = chromium_of(tab).asked
        own, *odd = [unquote(at.partition("=")[2]) for at in asked if "/getApi?url=" in at]
        assert own == url
        assert all(at.startswith(signing.url + "/") for at in odd)
        spoilt = "%22 %27 %E4%B8%AD ; + %2B https%3A%2F%2F =& %25 %252F"
        for part in spoilt.split():
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


@pytest.fixture(scope="module")
def anywhere(signing: Signing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The url of a server that signs pages of any host."""
    ini = write_ini(tmp_path_factory.mktemp("anywhere") / "c.ini", signing.wechat)
    server = Server("--config", str(ini), "--address", "127.0.0.1", "--port", "0")
    yield server.url
    server.kill()


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

    chromium_of(tab).page.route("http://h5.example.com/**", proxy)
    return "http://h5.example.com"


class TestTheTrailingSlash:
    @pytest.mark.parametrize("tail", ["", "?from=singlemessage", "#/route"])
    @pytest.mark.parametrize("location", ["a prefix that is cut off", "the page alone"])
    def test_without_it_the_page_finds_the_server(
        self, anywhere: str, phone: OpenPhone, location: str, tail: str
    ) -> None:
        tab = phone()
        tab.open(located(tab, anywhere, location) + "/wx" + tail)
        assert tab.verdict() == "allWell"
        if location == "a prefix that is cut off":
            assert chromium_of(tab).console == []

    def test_without_it_the_page_finds_the_advice(
        self, start: Start, phone: OpenPhone, wechat: Sandbox
    ) -> None:
        wechat.faults["token"] = Fault(errcode=40164)
        tab = phone()
        tab.open(located(tab, start().url, "a prefix that is cut off") + "/wx")
        assert tab.verdict() == "failed"
        assert "Add this server's public address to the account" in tab.text()

    @pytest.mark.parametrize("locale", LOCALES)
    def test_where_its_lack_hides_the_server_that_is_told(
        self, anywhere: str, phone: OpenPhone, locale: str
    ) -> None:
        tab = phone(context={"locale": locale})
        tab.open(located(tab, anywhere, "nginx with one slash") + "/wx")
        assert_failed(tab, "stepSign", "sign", "no slash", *NO_SCRIPT)
        assert "location /wx/ { proxy_pass http://127.0.0.1:8060/; }" in tab.text()

    def test_no_path_makes_the_page_load_a_script_of_another_host(
        self, signing: Signing, phone: OpenPhone
    ) -> None:
        tab = phone()
        chromium_of(tab).page.route(
            "http://h5.example.com/**",
            lambda route: route.fulfill(response=route.fetch(url=signing.url + "/")),
        )
        tab.open("http://h5.example.com//evil.example.com/a")
        assert tab.verdict() == "failed"
        asked = chromium_of(tab).asked
        assert all(at.startswith("http://h5.example.com/") for at in asked)
