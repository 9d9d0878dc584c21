"""wechat-sign.js with WeChat's real script, in pages of another origin than the server's."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
from typing import Any

import pytest
from browser import (
    KINDS,
    NPM,
    WEIXIN_COMMONJS,
    Phone,
    Signing,
    Site,
    WebKit,
    bridge_for,
    made_by_chromium_69,
    npm_file,
)
from conftest import OpenPhone
from harness import ROOT, Fault, Sandbox, Start, eventually, unavailable
from manuals import MANUALS, blocks_of

from server import SCRIPT as SERVED

SCRIPT = (ROOT / "wechat_sign" / "wechat-sign.js").read_text(encoding="utf-8")
ACORN = ("acorn@8.14.0", "dist/acorn.js")
IN_WECHAT = [kind for kind in KINDS if kind not in ("desktop", "WeCom")]
BRIDGE = (
    '<!doctype html><meta charset="utf-8"><title>的 page</title><script src="/bridge.js"></script>'
)
WEIXIN = '<script src="/jweixin.js"></script>'
OURS = '<script src="{server}/wechat-sign.js"></script>'
SAY = ".then(() => 'shared', error => error.message)"
CALL = "window.outcome = wechatSign({title: 'T', desc: 'D', imgUrl: 'https://a/i.png'})" + SAY
ROUTED = "window.outcome = wechatSign(() => ({title: location.pathname}))" + SAY
HURRY = """<script>
  const slow = window.setTimeout
  window.setTimeout = (call, ms, ...more) => slow(call, ms > 1000 ? ms / 15 : ms, ...more)
</script>"""
"""Waits of more than a second take the fifteenth part."""


def page(
    signing: Signing | str, call: str = CALL, *, before: str = WEIXIN, ours: str = OURS
) -> str:
    server = signing if isinstance(signing, str) else signing.url
    return BRIDGE + before + ours.replace("{server}", server) + f"<script>{call}</script>"


def alerts_of(tab: Phone) -> list[str]:
    """Those to come."""
    said: list[str] = []

    def hear(dialog: Any) -> None:
        said.append(dialog.message)
        dialog.accept()

    tab.tab.page.on("dialog", hear)  # type: ignore[attr-defined]
    return said


def assert_all_good(tab: Phone, count: int, asked: int | None = None) -> None:
    """So often the server was asked, and the phone, and none of it was refused."""
    assert [call["problem"] for call in tab.configs()] == [""] * count
    assert len(tab.asked()) == (count if asked is None else asked)


class TestSharing:
    @pytest.mark.parametrize("ours", [OURS, "<script type=module src={server}/wechat-sign.js?v=2>"])
    @pytest.mark.parametrize("path", ["/page?a=1&b=%E4%B8%AD%2F", "/page?a=1#/route"])
    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    def test_a_page_of_another_origin_shares(
        self, either: OpenPhone, site: Site, signing: Signing, ours: str, kind: str, path: str
    ) -> None:
        if "module" in ours:
            ours = "<script type=module>import '{server}/wechat-sign.js?v=2'; " + CALL + "</script>"
        tab = either(kind)
        base = site(page(signing, "" if "module" in ours else CALL, ours=ours))
        tab.open(base + path)
        assert tab.outcome() == "shared"
        data = {"title": "T", "desc": "D", "link": base + path, "imgUrl": "https://a/i.png"}
        assert tab.shared() == data
        for name in ("menu:share:appmessage", "menu:share:timeline"):
            sent = tab.js(f"phone.send('{name}')")
            assert sent == {key: data[key] for key in ("title", "link", "imgUrl")}
        assert_all_good(tab, 1)

    @pytest.mark.parametrize("tag", ["img", "form"])
    def test_what_a_user_put_into_the_page_does_not_pass_for_the_scripts_tag(
        self, either: OpenPhone, site: Site, signing: Signing, tag: str
    ) -> None:
        clobber = f'<{tag} name=currentScript data-server="https://evil.example.com"></{tag}>'
        tab = either("Android")
        tab.open(site(page(signing, before=clobber + WEIXIN)))
        assert tab.outcome() == "shared"
        assert_all_good(tab, 1)

    @pytest.mark.parametrize("when", ["early", "late"])
    @pytest.mark.parametrize("kind", IN_WECHAT)
    def test_it_shares_on_every_kind_of_phone(
        self, phone: OpenPhone, site: Site, signing: Signing, kind: str, when: str
    ) -> None:
        tab = phone(kind, when=when)
        tab.open(site(page(signing, ROUTED)) + "/one")
        assert tab.outcome() == "shared"
        tab.shared(title="/one")
        tab.js("history.pushState({}, '', '/two?a=1')")
        link = site(page(signing, ROUTED)) + "/two?a=1"
        tab.shared(title="/two", link=link)
        assert [call["url"] for call in tab.configs() if not call["problem"]][-1].startswith(
            link if not KINDS[kind].keeps_entry else ""
        )
        assert tab.tab.console == []  # type: ignore[attr-defined]

    def test_what_is_not_given_is_taken_from_the_page(
        self, either: OpenPhone, site: Site, signing: Signing
    ) -> None:
        metas = (
            '<meta name="description" content="述"><meta property="og:image" content="https://a/b">'
        )
        tab = either("Android")
        base = site(page(signing, "window.outcome = wechatSign()" + SAY, before=WEIXIN + metas))
        tab.open(base + "/#/x")
        assert tab.outcome() == "shared"
        link = base + "/#/x"
        assert tab.shared() == {
            "title": "的 page",
            "desc": "述",
            "link": link,
            "imgUrl": "https://a/b",
        }

    @pytest.mark.parametrize(
        ("written", "shared"),
        [
            ("/i.png", "{base}/i.png"),
            ("./i.png?x=1", "{base}/assets/i.png?x=1"),
            ("?x=1", "{base}/assets/?x=1"),
            ("//cdn.example.com/i.png", "http://cdn.example.com/i.png"),
            ("HTTPS://a/中.png?", "HTTPS://a/中.png?"),
            ("data:image/png;base64,AA==", "data:image/png;base64,AA=="),
        ],
    )
    def test_addresses_are_made_whole_by_the_pages_base_and_a_picture_that_is_none_is_told(
        self, phone: OpenPhone, site: Site, signing: Signing, written: str, shared: str
    ) -> None:
        before = f'<base href="/assets/"><meta name="og:image" content="{written}">' + WEIXIN
        call = f"window.outcome = wechatSign({{link: {written!r}}})" + SAY
        tab = phone("Android")
        base = site(page(signing, call, before=before))
        tab.open(base + "/app/one")
        assert tab.outcome() == "shared"
        whole = shared.replace("{base}", base)
        tab.shared(link=whole, imgUrl=whole)
        warned = ["wechatSign: no phone shows a picture of data: or blob:"]
        assert tab.tab.console == warned * written.startswith("data:")  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("opened", "link"),
        [
            ("/?code=c&state=s", "/"),
            ("/?a=1&code=c&state=&b=2", "/?a=1&b=2"),
            ("/?code=c&state=STATE&from=timeline&a=1#/x", "/?a=1#/x"),
            ("/?a=1&from=singlemessage&isappinstalled=0#/x", "/?a=1#/x"),
            ("/?from=groupmessage&a=1&isappinstalled=0", "/?a=1"),
            ("/?a=1&code=c&state=s#wechat_redirect", "/?a=1"),
            ("/?code=SAVE10&from=paris&state=s&x&&#", "/?code=SAVE10&from=paris&state=s&x&&#"),
        ],
    )
    def test_the_default_link_lacks_what_wechat_added_and_what_is_signed_has_it(
        self, phone: OpenPhone, site: Site, signing: Signing, opened: str, link: str
    ) -> None:
        tab = phone("Android")
        base = site(page(signing))
        tab.open(base + opened)
        assert tab.outcome() == "shared"
        tab.shared(link=base + link)
        assert tab.asked() == [base + opened.partition("#")[0]]

    def test_a_page_whose_data_comes_late_calls_again(
        self, either: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = either("Android")
        tab.open(site(page(signing, "let title = 'early'; wechatSign(() => ({title}))")))
        tab.shared(title="early")
        tab.js("title = 'late', wechatSign()")
        tab.shared(title="late")
        assert_all_good(tab, 1)

    @pytest.mark.parametrize("set_title", ["document.title = 'late'", "title.data = 'late'"])
    def test_a_title_that_comes_after_its_route_is_shared(
        self, either: OpenPhone, site: Site, signing: Signing, set_title: str
    ) -> None:
        tab = either("Android")
        base = site(page(signing, "window.outcome = wechatSign()" + SAY))
        tab.open(base + "/one")
        assert tab.outcome() == "shared"
        tab.js("history.pushState({}, '', '/two')")
        tab.shared(title="的 page", link=base + "/two")
        tab.js(f"void (title => {{ {set_title} }})(document.querySelector('title').firstChild)")
        tab.shared(title="late", link=base + "/two")
        assert_all_good(tab, 2)

    def test_data_may_be_promised(self, phone: OpenPhone, site: Site, signing: Signing) -> None:
        tab = phone("iOS")
        tab.open(
            site(page(signing, CALL.replace("{title", "async () => ({title").replace("})", "}))")))
        )
        assert tab.outcome() == "shared"
        tab.shared(title="T")


class TestQuickRoutes:
    """Redirects, guards, impatient users. Only settled routes are signed."""

    @pytest.mark.parametrize("kind", ["iOS", "Android", "HarmonyOS", "Windows"])
    @pytest.mark.parametrize("apart", [0, 15, 35])
    @pytest.mark.parametrize("method", ["pushState", "replaceState"])
    def test_of_quick_routes_the_last_is_shared_and_signed(
        self, phone: OpenPhone, site: Site, signing: Signing, kind: str, apart: int, method: str
    ) -> None:
        tab = phone(kind, delays={"preVerifyJSAPI": 80})
        base = site(page(signing, ROUTED))
        tab.open(base + "/entry")
        assert tab.outcome() == "shared"
        tab.js(
            f"""(async () => {{
              for (const path of ['/a', '/b', '/c']) {{
                history.{method}({{}}, '', path)
                window.last = wechatSign(){SAY}.then(said => said + phone.friend.title)
                if ({apart}) await new Promise(resolve => setTimeout(resolve, {apart}))
              }}
              return last
            }})()"""
        )
        tab.shared(title="/c", link=base + "/c")
        assert tab.js("last") == "shared/c"
        assert_all_good(tab, 1 if kind == "iOS" else 2)

    @pytest.mark.parametrize("kind", ["iOS", "Android", "HarmonyOS"])
    def test_a_redirect_at_the_start_is_signed_once(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str
    ) -> None:
        redirect = (
            "; history.replaceState({}, '', '/login'); history.replaceState({}, '', '/in?a=1')"
        )
        tab = either(kind)
        base = site(page(signing, ROUTED + redirect))
        tab.open(base + "/")
        assert tab.outcome() == "shared"
        tab.shared(title="/in", link=base + "/in?a=1")
        assert_all_good(tab, 1)
        assert tab.asked() == [base + ("/" if kind == "iOS" else "/in?a=1")]

    @pytest.mark.parametrize("kind", ["Android", "HarmonyOS"])
    @pytest.mark.parametrize("problem", ["", "invalid_signature"])
    def test_a_route_that_comes_while_wechat_verifies_waits_for_it(
        self, phone: OpenPhone, site: Site, signing: Signing, kind: str, problem: str
    ) -> None:
        """One wx.config at a time, and what is stale is not tried again."""
        tab = phone(kind, delays={"preVerifyJSAPI": 300}, problems=[problem])
        base = site(page(signing, ROUTED))
        tab.open(base + "/one")
        tab.waits("phone.count('preVerifyJSAPI') === 1")
        tab.js("history.pushState({}, '', '/two')")
        assert tab.outcome() == "shared"
        tab.shared(title="/two", link=base + "/two")
        configs = tab.configs()
        assert [call["url"] for call in configs] == [base + "/one", base + "/two"]
        assert [call["problem"] for call in configs] == [problem, ""]
        assert tab.asked() == [base + "/one", base + "/two"]

    def test_a_route_left_while_the_server_answers_is_not_handed_to_wechat(
        self, phone: OpenPhone, site: Site, start: Start, wechat: Sandbox
    ) -> None:
        held = threading.Event()
        wechat.faults["getticket"] = Fault(hold=held)
        server = start("[jssdk]", "page_hosts = 127.0.0.1", "debug = false").url
        tab = phone("Android", wechat)
        fetching = """<script>
          const fetched = window.fetch
          window.fetch = (...all) => { window.fetching = true; return fetched(...all) }
        </script>"""
        base = site(page(server, ROUTED, before=WEIXIN + fetching))
        tab.open(base + "/one")
        tab.waits("window.fetching")
        tab.js("history.pushState({}, '', '/two')")
        held.set()
        assert tab.outcome() == "shared"
        tab.shared(title="/two")
        assert [call["url"] for call in tab.configs()] == [base + "/two"]

    def test_all_who_called_get_the_outcome_of_the_newest(
        self, either: OpenPhone, site: Site, signing: Signing
    ) -> None:
        calls = f"""
          window.first = wechatSign({{title: '1'}}){SAY}
          const poll = setInterval(() => {{
            if (!phone.count('preVerifyJSAPI')) return
            clearInterval(poll)
            history.pushState({{}}, '', route)
            window.second = wechatSign({{title: '2'}}){SAY}
          }}, 5)
        """
        tab = either("Android", delays={"preVerifyJSAPI": 150}, problems=["", "fail_x"])
        tab.open(site(page(signing, "const route = '/a';" + calls)) + "/a")
        assert (tab.outcome("first"), tab.outcome("second")) == ("shared", "shared")
        tab.shared(title="2")
        assert_all_good(tab, 1)

        tab = either("Android", delays={"preVerifyJSAPI": 150}, problems=["", "invalid_url_domain"])
        tab.open(site(page(signing, "const route = '/b';" + calls)) + "/a")
        said = "config:invalid url domain"
        assert (tab.outcome("first"), tab.outcome("second")) == (said, said)


class TestChangesThatGoOn:
    """What a page does every few ms costs next to nothing, and is shared in the end."""

    @pytest.mark.parametrize(
        ("kind", "call", "change", "every", "calls", "shares"),
        [
            # A blinking title that is not shared, and a marquee.
            ("iOS", CALL, "document.title = 'x' + count % 2", 50, 1, (1, 1)),
            ("Android", "wechatSign()", "document.title = 'x' + count", 100, 1, (3, 8)),
            # A scroll spy: where each url is signed, and where none is.
            ("Android", ROUTED, "history.replaceState({}, '', '/at/' + count)", 100, 4, (1, 4)),
            ("iOS", ROUTED, "history.replaceState({}, '', '/at/' + count)", 40, 1, (3, 8)),
            ("Android", ROUTED, "location.hash = '/at/' + count", 40, 1, (3, 8)),
        ],
    )
    def test_they_are_told_once_a_second_and_signed_when_they_end(
        self,
        phone: OpenPhone,
        site: Site,
        signing: Signing,
        kind: str,
        call: str,
        change: str,
        every: int,
        calls: int,
        shares: tuple[int, int],
    ) -> None:
        tab = phone(kind)
        base = site(page(signing, call))
        tab.open(base + "/")
        tab.shared()
        tab.js(
            f"""new Promise(resolve => {{
              let count = 0
              const timer = setInterval(() => {{
                {change}
                if (++count * {every} < 3000) return
                clearInterval(timer)
                resolve()
              }}, {every})
            }})"""
        )
        told = tab.js("phone.count('updateAppMessageShareData')")
        assert shares[0] <= told <= shares[1]
        tab.waits("phone.friend.link === location.href")
        if call != CALL:
            tab.waits(
                "phone.friend.title === (/at/.test(location) ? location.pathname : document.title)"
            )
        assert len(tab.asked()) <= calls


class TestRoutes:
    def test_a_route_of_the_navigation_api_is_one(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = phone("Android")
        base = site(page(signing))
        tab.open(base + "/one")
        assert tab.outcome() == "shared"
        tab.js("navigation.addEventListener('navigate', event => event.intercept())")
        tab.js("void navigation.navigate('/two')")
        tab.shared(link=base + "/two")

    def test_an_object_is_for_the_page_that_it_was_given_on(
        self, either: OpenPhone, site: Site, signing: Signing
    ) -> None:
        """An anchor, and the OAuth code that a page takes out of its url, make no other page."""
        tab = either("iOS")
        base = site(page(signing))
        tab.open(base + "/one?code=c&state=s")
        for push, title in (
            ("#top", "T"),
            ("/one", "T"),
            ("/two", "的 page"),
            ("/one", "T"),
            ("/one#/two", "的 page"),
        ):
            tab.js(f"history.replaceState({{}}, '', '{push}')")
            tab.shared(title=title, link=base + push.replace("#top", "/one#top"))

    @pytest.mark.parametrize("name", ["description", "og:image"])
    def test_a_description_or_an_image_that_comes_late_is_shared(
        self, either: OpenPhone, site: Site, signing: Signing, name: str
    ) -> None:
        tab = either("Android")
        meta = f"<meta name='{name}' content='https://a/early'>"
        tab.open(site(page(signing, "wechatSign()", before=meta + WEIXIN)))
        key = {"description": "desc", "og:image": "imgUrl"}[name]
        tab.shared(**{key: "https://a/early"})
        tab.js(f"void (document.querySelector('[name=\"{name}\"]').content = 'https://a/late')")
        tab.shared(**{key: "https://a/late"})
        assert_all_good(tab, 1)

    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    def test_back_and_forward_are_routes(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str
    ) -> None:
        tab = either(kind)
        base = site(page(signing, ROUTED))
        tab.open(base + "/one")
        assert tab.outcome() == "shared"
        tab.js("history.pushState({}, '', '/two')")
        tab.shared(title="/two")
        tab.js("history.back()")
        tab.shared(title="/one", link=base + "/one")
        tab.js("history.forward()")
        tab.shared(title="/two", link=base + "/two")
        # A signature serves again for a minute.
        assert_all_good(tab, *((1, 1) if kind == "iOS" else (4, 2)))

    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    @pytest.mark.parametrize(
        "push", ["history.pushState({}, '', '#/two')", "location.hash = '/two'"]
    )
    def test_the_fragment_is_shared_and_not_signed(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str, push: str
    ) -> None:
        tab = either(kind)
        base = site(page(signing))
        tab.open(base + "/app?a=1#/one")
        assert tab.outcome() == "shared"
        tab.shared(link=base + "/app?a=1#/one")
        tab.js(push)
        tab.shared(link=base + "/app?a=1#/two")
        tab.js("history.back()")
        tab.shared(link=base + "/app?a=1#/one")
        assert tab.asked() == [base + "/app?a=1"]
        assert_all_good(tab, 1)

    def test_state_that_changes_no_address_is_no_route(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = phone("Android")
        tab.open(site(page(signing)) + "/one")
        assert tab.outcome() == "shared"
        calls = tab.js("phone.calls.length")
        tab.js(
            "history.replaceState({scroll: 1}, ''), history.pushState({scroll: 2}, '', location)"
        )
        tab.js("new Promise(resolve => setTimeout(resolve, 200))")
        assert tab.js("phone.calls.length") == calls

    @pytest.mark.parametrize(
        "load",
        [
            "const tag = document.createElement('script'); tag.src = '{server}/wechat-sign.js';"
            "tag.onload = () => {" + ROUTED + "}; document.head.append(tag)",
            "import('{server}/wechat-sign.js').then(() => {" + ROUTED + "})",
            "import('{server}/wechat-sign.js?v=3').then(() => {" + ROUTED + "})",
        ],
    )
    @pytest.mark.parametrize("kind", ["iOS", "iPad", "Android"])
    def test_loaded_after_the_first_route_it_knows_the_url_of_entry(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str, load: str
    ) -> None:
        tab = either(kind)
        routed = "history.replaceState({}, '', '/routed?b=2');" + load.replace(
            "{server}", signing.url
        )
        base = site(page(signing, routed, ours=""))
        tab.open(base + "/entry?a=%20#/x")
        assert tab.outcome() == "shared"
        tab.shared(title="/routed", link=base + "/routed?b=2")
        if kind != "iPad":
            assert_all_good(tab, 1)

    def test_an_ipad_that_says_it_is_a_mac_is_found_out_once(
        self, either: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = either("iPad")
        base = site(page(signing, ROUTED))
        tab.open(base + "/entry")
        assert tab.outcome() == "shared"
        for route in ("/two", "/three", "/four"):
            tab.js(f"history.pushState({{}}, '', '{route}')")
            tab.shared(title=route, link=base + route)
        assert [call["problem"] for call in tab.configs()] == ["", "invalid_signature", ""]
        assert tab.asked() == [base + "/entry", base + "/two", base + "/entry"]


class TestThePageThatComesBack:
    """From the back-forward cache: no script runs but what listens to pageshow."""

    def test_what_was_left_before_it_was_shared_is_shared(
        self, webkit: WebKit, site: Site, start: Start, wechat: Sandbox
    ) -> None:
        held = threading.Event()
        wechat.faults["getticket"] = Fault(hold=held)
        server = start("[jssdk]", "page_hosts = 127.0.0.1", "debug = false").url
        site.files |= {"/bridge.js": bridge_for("iOS", wechat), "/other": ""}
        browser = webkit.tab(KINDS["iOS"].agent)
        tab = Phone(browser, wechat)
        base = site(page(server, ROUTED))
        tab.open(base + "/one")
        tab.open(base + "/other")
        held.set()
        browser.back()
        tab.shared(title="/one")

    def test_what_was_shared_is_told_again(
        self, webkit: WebKit, site: Site, signing: Signing
    ) -> None:
        site.files |= {"/bridge.js": bridge_for("iOS", signing.wechat), "/other": ""}
        browser = webkit.tab(KINDS["iOS"].agent)
        tab = Phone(browser, signing.wechat)
        base = site(page(signing, ROUTED))
        tab.open(base + "/one")
        assert tab.outcome() == "shared"
        tab.open(base + "/other")
        browser.back()
        tab.waits("window.phone && phone.count('updateAppMessageShareData') === 2")
        assert_all_good(tab, 1)


class TestSecondTry:
    @pytest.mark.parametrize(
        ("problems", "expected"),
        [
            (["invalid_signature"], "shared"),
            (["invalid_signature", "invalid_signature"], "config:invalid signature"),
            (["invalid_url_domain"], "config:invalid url domain"),
        ],
    )
    def test_after_invalid_signature_it_tries_once_more(
        self, either: OpenPhone, site: Site, signing: Signing, problems: list[str], expected: str
    ) -> None:
        tab = either("Android", problems=problems)
        tab.open(site(page(signing)))
        assert tab.outcome() == expected
        attempts = 2 if problems[0] == "invalid_signature" else 1
        assert len(tab.calls("preVerifyJSAPI")) == attempts

    def test_an_ios_that_takes_the_url_of_the_route_is_found_out_too(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = phone("iOS", keepsEntry=False)
        base = site(page(signing, "history.replaceState({}, '', '/two');" + ROUTED))
        tab.open(base + "/one")
        assert tab.outcome() == "shared"
        tab.js("history.pushState({}, '', '/three')")
        tab.shared(title="/three")
        assert tab.asked() == [base + "/one", base + "/two", base + "/three"]

    @pytest.mark.parametrize("keeps_entry", [True, False])
    def test_the_url_that_wechat_says_it_took_is_signed_and_kept(
        self, either: OpenPhone, site: Site, signing: Signing, keeps_entry: bool
    ) -> None:
        tab = either("iOS", keepsEntry=keeps_entry, tells=True)
        # The page that the bridge takes for the entry is one that the script can't know of.
        real = "/real" if keeps_entry else "/two"
        forget = """
          const all = performance.getEntriesByType.bind(performance)
          performance.getEntriesByType = type => type === 'navigation' ? [] : all(type)
          history.replaceState({}, '', '/two')
        """
        call = f"window.outcome = wechatSign(() => ({{title: location.pathname}})){SAY}"
        ours = f"<script>{forget}</script>" + OURS
        base = site(page(signing, call, ours=ours))
        tab.open(base + ("/real" if keeps_entry else "/one"))
        assert tab.outcome() == "shared"
        tab.js("history.pushState({}, '', '/three')")
        tab.shared(title="/three")
        last = "/three" if not keeps_entry else real
        assert tab.asked()[-1] == base + last
        assert [call["problem"] for call in tab.configs()][-1] == ""

    def test_a_service_worker_that_keeps_all_answers_is_passed_by(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        site.files["/worker.js"] = """
          addEventListener('activate', event => event.waitUntil(clients.claim()))
          addEventListener('fetch', event => event.respondWith((async () => {
            const cache = await caches.open('all'), kept = await cache.match(event.request)
            if (kept) return kept
            const answer = await fetch(event.request)
            await cache.put(event.request, answer.clone())
            return answer
          })()))
        """
        tab = phone("Android", problems=["invalid_signature"])
        worker = (
            """
          window.outcome = navigator.serviceWorker.register('/worker.js').then(() =>
            navigator.serviceWorker.controller ||
            new Promise(done => navigator.serviceWorker.addEventListener('controllerchange', done))
          ).then(() => wechatSign({title: 'T'}))"""
            + SAY
        )
        tab.open(site(page(signing, worker)))
        assert tab.outcome() == "shared"
        first, second = tab.configs()
        assert first["args"]["verifySignature"] != second["args"]["verifySignature"]


class TestConfigAlone:
    """For a page that scans, and shares nothing or shares, too."""

    SCAN = "window.outcome = wechatSign.config({jsApiList: ['scanQRCode']})" + SAY

    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    def test_the_pages_own_list_is_what_wechat_gets(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str
    ) -> None:
        tab = either(kind)
        tab.open(site(page(signing, self.SCAN)) + "/one")
        assert tab.outcome() == "shared"
        assert tab.calls("preVerifyJSAPI")[0]["args"]["verifyJsApiList"] == ["scanQRCode"]
        tab.js("history.pushState({}, '', '/two')")
        tab.waits(f"phone.count('preVerifyJSAPI') === {1 if kind == 'iOS' else 2}")
        assert tab.calls("updateAppMessageShareData") == []
        tab.js("void wechatSign({title: 'T'})")
        tab.shared(title="T")
        assert "scanQRCode" in tab.calls("preVerifyJSAPI")[-1]["args"]["verifyJsApiList"]

    @pytest.mark.parametrize(
        "first", ["wechatSign({title: 'T'}); %s", "%s; wechatSign({title: 'T'})"]
    )
    def test_with_sharing_it_is_one_config(
        self, either: OpenPhone, site: Site, signing: Signing, first: str
    ) -> None:
        tab = either("Android")
        tab.open(site(page(signing, first % self.SCAN)))
        assert tab.outcome() == "shared"
        tab.shared(title="T")
        assert_all_good(tab, 1)

    def test_outside_wechat_it_does_nothing(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = phone("desktop")
        tab.open(site(page(signing, self.SCAN)))
        assert tab.outcome() == "shared"
        assert tab.asked() == []


class TestImported:
    COMMONJS = "const module = {exports: {}}; %s; export default module.exports"

    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    def test_wechats_script_can_be_handed_in(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str
    ) -> None:
        site.files["/weixin.js"] = self.COMMONJS % npm_file(*WEIXIN_COMMONJS)
        call = CALL.replace("})", "}, {wx})", 1)
        app = f"<script type=module>import wx from '/weixin.js'; {call}</script>"
        tab = either(kind)
        base = site(page(signing, "", before="") + app)
        tab.open(base + "/one")
        assert tab.outcome() == "shared"
        assert tab.js("typeof window.wx") == "undefined"
        tab.js("history.pushState({}, '', '/two')")
        tab.shared(title="的 page", link=base + "/two")

    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    def test_it_may_come_later(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str
    ) -> None:
        share = "<script>window.wechatShare = () => ({title: 'late'})</script>"
        late = """setTimeout(() => {
          const tag = document.createElement('script')
          document.head.append(Object.assign(tag, {src: '/jweixin.js'}))
        }, 300)"""
        tab = either(kind)
        tab.open(site(page(signing, late, before=share)))
        tab.shared(title="late")
        assert_all_good(tab, 1)

    def test_an_amd_page_hands_it_in(self, either: OpenPhone, site: Site, signing: Signing) -> None:
        loader = (
            "<script>window.define = made => { window.weixin = made() }; define.amd = {}</script>"
        )
        tab = either("Android")
        tab.open(
            site(page(signing, CALL.replace("})", "}, {wx: weixin})", 1), before=loader + WEIXIN))
        )
        assert tab.outcome() == "shared"

    def test_the_error_says_so_where_it_is_not(
        self, either: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = either("Android")
        tab.open(site(page(signing, before=HURRY)))
        said = "WeChat's script jweixin-1.6.0.js is not here; {wx: wx} hands it in"
        assert tab.outcome() == said


class TestCopied:
    """A copied, renamed, bundled or inlined script."""

    @pytest.mark.parametrize(
        ("ours", "call"),
        [
            ('<script src="/share.js" data-server="{server}"></script>', CALL),
            ('<script src="/wechat-sign.js" data-server="{server}/"></script>', CALL),
            (
                '<script src="/share.js"></script>',
                CALL.replace("})", "}, {server: '{server}'})", 1),
            ),
            (
                '<script src="/share.js"></script>',
                CALL.replace("})", "}, {server: '{server}/'})", 1),
            ),
            ("<script>{script}</script>", CALL.replace("})", "}, {server: '{server}'})", 1)),
            ('<script data-server="{server}">{script}</script>', CALL),
            (
                "<script type=module>import '/share.js'; {call}</script>",
                CALL.replace("})", "}, {server: '{server}'})", 1),
            ),
        ],
    )
    def test_the_servers_address_can_be_given(
        self, either: OpenPhone, site: Site, signing: Signing, ours: str, call: str
    ) -> None:
        site.files |= {"/share.js": SCRIPT, "/wechat-sign.js": SCRIPT}
        call = call.replace("{server}", signing.url)
        module = "{call}" in ours
        ours = ours.replace("{script}", SCRIPT).replace("{call}", call)
        tab = either("Android")
        tab.open(site(page(signing, "" if module else call, ours=ours)))
        assert tab.outcome() == "shared"

    @pytest.mark.parametrize(
        "ours", ['<script src="/share.js"></script>', "<script>{script}</script>"]
    )
    def test_the_error_says_so_where_it_is_not(
        self, either: OpenPhone, site: Site, signing: Signing, ours: str
    ) -> None:
        site.files["/share.js"] = SCRIPT
        tab = either("Android")
        tab.open(site(page(signing, ours=ours.replace("{script}", SCRIPT))))
        assert tab.outcome() == ('which signing server? Name it: {server: …} or data-server="…"')
        assert tab.calls("preVerifyJSAPI") == []

    def test_two_copies_do_the_work_of_one(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = phone("Android")
        tab.open(site(page(signing, ROUTED, ours=OURS + OURS)) + "/one")
        assert tab.outcome() == "shared"
        tab.js("history.pushState({}, '', '/two')")
        tab.shared(title="/two")
        assert_all_good(tab, 2)

    def test_nothing_ends_the_tag_that_it_is_inlined_in(self) -> None:
        assert not re.search("<script|</|<!--", SCRIPT)

    @pytest.mark.parametrize(
        "missing",
        ["fetch", "Promise", "performance", "Object.assign"],
    )
    def test_where_the_browser_is_old_neither_load_nor_route_throws(
        self, either: OpenPhone, site: Site, signing: Signing, missing: str
    ) -> None:
        before = (
            "<script>window.errors = []; onerror = said => { errors.push(said) };"
            "onunhandledrejection = event => errors.push(event.reason);"
            f"window.kept = {missing}; {missing} = undefined</script>"
        )
        call = "window.said = wechatSign({title: 'T'})"
        tab = either("Android")
        old = page(signing, call, before=before + WEIXIN).replace("/bridge.js", "/none.js")
        site.files["/none.js"] = ""
        route = "history.pushState({}, '', '/two'); window.went = location.pathname"
        tab.open(site(f"{old}<script>{route}; {missing} = kept</script>"))
        assert tab.js("[errors, went]") == [[], "/two"]

    def test_a_browser_without_fetch_is_told(
        self, either: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = either("Android")
        tab.open(site(page(signing, before="<script>fetch = undefined</script>" + WEIXIN)))
        assert tab.outcome() == "this browser is too old: no fetch"

    def test_a_relative_address_is_the_pages_own_whatever_its_base_is(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = phone("Android")
        before = WEIXIN + '<base href="https://cdn.example.com/">'
        ours = '<script src="{server}/wechat-sign.js" data-server="/wx"></script>'
        base = site(page(signing, before=before, ours=ours))
        tab.open(base + "/app/one")
        assert tab.outcome().startswith(f"the signing server at {base}/wx answers 200 and not its")

    def test_a_frozen_history_throws_nothing(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = phone("Android")
        before = "<script>Object.freeze(history)</script>" + WEIXIN
        base = site(page(signing, ROUTED, before=before))
        tab.open(base + "/one")
        assert tab.outcome() == "shared"
        tab.js("history.pushState({}, '', '/two')")
        tab.shared(title="/two")

    def test_a_server_that_renders_pages_can_import_it(self) -> None:
        node = shutil.which("node")
        if node is None:
            unavailable("no node to import the script with")
        subprocess.run([str(node), "-e", SCRIPT], check=True)

    def test_it_is_plain_enough_for_old_browsers_and_small_enough_to_read(self) -> None:
        assert len(SCRIPT.splitlines()) <= 230
        assert len(SERVED.gzipped) <= 4300
        assert max(map(len, SCRIPT.splitlines())) <= 100
        node = shutil.which("node")
        if node is None:
            unavailable("no node to parse the script with: apt-get install nodejs")
        npm_file(*ACORN)
        acorn = json.dumps(str(NPM / "/".join(ACORN)))
        compare = f"""
          const {{parse, tokenizer}} = require({acorn}), es5 = {{ecmaVersion: 5}}
          const texts = JSON.parse(require('fs').readFileSync(0, 'utf8'))
          const [file, served] = texts.map(text => JSON.stringify([...tokenizer(text, es5)]
            .map(token => [token.type.label, token.value])))
          parse(texts[0], es5)
          if (served !== file) throw new Error('what is served does something else')
        """
        both = json.dumps([SCRIPT, SERVED.text.decode()])
        subprocess.run([str(node), "-e", compare], input=both, text=True, check=True)


class TestReasons:
    """What went wrong, in a sentence that is the same in both engines."""

    @pytest.mark.parametrize(
        ("broken", "said"),
        [
            ((200, "<!doctype html>"), "answers 200 and not its JSON: is /getApi handed on to it?"),
            ((502, "<html>"), "answers 502 and not its JSON: is /getApi handed on to it?"),
            (
                (404, '{"message": "no"}'),
                "answers 404 and not its JSON: is /getApi handed on to it?",
            ),
            ((200, "null"), "answers 200 and not its JSON: is /getApi handed on to it?"),
            ((400, '{"error": "url is cut"}'), "answers 400: url is cut"),
            (None, "does not answer"),
        ],
    )
    def test_what_the_server_answers_is_told(
        self, either: OpenPhone, site: Site, broken: tuple[int, str] | None, said: str
    ) -> None:
        site.broken = broken
        tab = either("Android")
        server = site("")
        site.files["/wechat-sign.js"] = SCRIPT
        tab.open(site(page(server, before=WEIXIN + ("" if broken else HURRY))))
        assert tab.outcome() == f"the signing server at {server} {said}"

    def test_a_server_that_is_down_or_does_not_list_the_page_is_told(
        self, either: OpenPhone, site: Site, start: Start, wechat: Sandbox
    ) -> None:
        for server in (start().url, "http://127.0.0.1:1"):
            tab = either("Android", wechat)
            call = CALL.replace("})", f"}}, {{server: '{server}'}})", 1)
            site.files["/share.js"] = SCRIPT
            tab.open(site(page(server, call, ours="<script src='/share.js'></script>")))
            assert tab.outcome() == (
                f"no answer of the signing server at {server} can be read: it is down, "
                "a proxy answers for it, or its page_hosts lacks 127.0.0.1"
            )

    @pytest.mark.parametrize("retry_after", ["", "2", "61"])
    def test_what_may_pass_is_asked_for_once_more(
        self, phone: OpenPhone, site: Site, signing: Signing, retry_after: str
    ) -> None:
        """A blink of the network, and a 503 that says when; not one that takes over a minute."""
        exposed = {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "*"}
        broken = {"status": 503, "headers": {"Retry-After": retry_after, **exposed}, "body": "{}"}
        asked: list[str] = []

        def once(route: Any) -> None:
            asked.append(route.request.url)
            if len(asked) > 1:
                route.continue_()
            elif retry_after:
                route.fulfill(**broken)
            else:
                route.abort()

        tab = phone("Android")
        tab.tab.page.route("**/getApi?*", once)  # type: ignore[attr-defined]
        tab.open(site(page(signing, before=WEIXIN + HURRY)))
        assert ("answers 503" in tab.outcome()) is (retry_after == "61")
        assert len(asked) == 1 + (retry_after != "61")

    def test_a_network_that_was_away_for_long_is_noticed(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = phone("Android")
        tab.open(site(page(signing, ROUTED, before=WEIXIN + HURRY)))
        assert tab.outcome() == "shared"
        network = tab.tab.page.context  # type: ignore[attr-defined]
        network.set_offline(True)
        tab.js(f"history.pushState({{}}, '', '/two'), window.next = wechatSign(){SAY}")
        assert "no answer of the signing server" in tab.outcome("next")
        network.set_offline(False)
        tab.shared(title="/two")

    def test_a_refusing_wechat_is_told(
        self, phone: OpenPhone, site: Site, start: Start, wechat: Sandbox
    ) -> None:
        wechat.faults["token"] = Fault(errcode=40164)
        tab = phone("Android", wechat)
        tab.open(site(page(start("[jssdk]", "page_hosts = 127.0.0.1").url)))
        assert "answers 502: WeChat refuses with errcode 40164" in tab.outcome()

    @pytest.mark.parametrize(
        ("kind", "html", "said"),
        [
            ("WeCom", "{page}", "in WeCom pages share by WeCom's own script"),
            ("Android", "{frame}", "in a frame WeChat does nothing: open the page itself"),
            (
                "Android",
                "<script>__wxjs_environment = 'miniprogram'</script>{page}",
                "in a mini program pages do not share: its own onShareAppMessage does",
            ),
            (
                "Android",
                "<meta http-equiv=Content-Security-Policy content=\"connect-src 'none'\">{page}",
                "no answer of the signing server at {server} can be read: "
                "its Content-Security-Policy forbids {server}",
            ),
            (
                "Android",
                '<meta http-equiv=Content-Security-Policy content="script-src http://127.0.0.1:* '
                "'unsafe-inline'\">"
                "{late}",
                "WeChat's script jweixin-1.6.0.js is not here: its Content-Security-Policy forbids "
                "https://res.wx.qq.com/",
            ),
        ],
    )
    def test_where_nothing_can_be_shared_that_is_told_by_name(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str, html: str, said: str
    ) -> None:
        tab = either(kind)
        whole = page(signing, "(window.top || window).outcome = wechatSign({})" + SAY)
        late = whole.replace(WEIXIN, HURRY) + "<script src=https://res.wx.qq.com/x.js></script>"
        frame = f"<iframe srcdoc='{whole.replace(chr(39), '&#39;')}'></iframe>"
        for name, text in (("{page}", whole), ("{frame}", frame), ("{late}", late)):
            html = html.replace(name, text)
        tab.open(site(html))
        assert tab.outcome().startswith(said.replace("{server}", signing.url))

    def test_data_that_never_come_are_told(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = phone("Android")
        call = "window.outcome = wechatSign(() => new Promise(() => {}))" + SAY
        tab.open(site(page(signing, call, before=WEIXIN + HURRY)))
        assert tab.outcome() == "what to share is never told"

    @pytest.mark.parametrize("setup", [{"when": "never"}, {"silent": ["preVerifyJSAPI"]}])
    def test_a_wechat_that_never_answers_is_told(
        self, either: OpenPhone, site: Site, signing: Signing, setup: dict[str, Any]
    ) -> None:
        tab = either("Android", **setup)
        tab.open(site(page(signing, before=WEIXIN + HURRY)))
        assert tab.outcome() == "WeChat does not answer wx.config"

    @pytest.mark.parametrize("kind", ["desktop", "Android"])
    def test_the_promise_may_be_left_alone_and_the_console_tells_inside_wechat_only(
        self, phone: OpenPhone, site: Site, signing: Signing, kind: str
    ) -> None:
        tab = phone(kind, problems=["invalid_url_domain"])
        tab.open(site(page(signing, "wechatSign({}); history.pushState({}, '', '/x');" + CALL)))
        said = "shared" if kind == "desktop" else "config:invalid url domain"
        assert tab.outcome() == said
        console = tab.tab.console  # type: ignore[attr-defined]
        assert console == ([] if kind == "desktop" else ["wechatSign: config:invalid url domain"])


class TestWhatWorked:
    """A failed re-sign must not take it."""

    TAGS = (
        "[jssdk]",
        "page_hosts = 127.0.0.1",
        "debug = false",
        "open_tag_list = wx-open-launch-app",
    )

    def test_on_ios_a_route_is_shared_before_open_tags_are_signed_for(
        self, either: OpenPhone, site: Site, start: Start, wechat: Sandbox
    ) -> None:
        tab = either("iOS", wechat)
        tab.open(site(page(start(*self.TAGS).url, ROUTED)) + "/one")
        assert tab.outcome() == "shared"
        tab.js("history.pushState({}, '', '/two')")
        tab.waits("phone.count('preVerifyJSAPI') === 2")
        names = [call["name"] for call in tab.js("phone.calls")]
        second = len(names) - names[::-1].index("preVerifyJSAPI")
        assert names[:second].count("updateAppMessageShareData") == 2
        assert_all_good(tab, 2, 1)
        assert tab.calls("preVerifyJSAPI")[1]["args"]["verifyOpenTagList"] == ["wx-open-launch-app"]

    def test_on_ios_routes_are_shared_while_the_server_is_down(
        self, either: OpenPhone, site: Site, start: Start, wechat: Sandbox
    ) -> None:
        tab = either("iOS", wechat)
        server = start(*self.TAGS)
        tab.open(site(page(server.url, ROUTED)) + "/one")
        assert tab.outcome() == "shared"
        server.kill()
        for route in ("/two", "/three"):
            tab.js(f"history.pushState({{}}, '', '{route}'), window.next = wechatSign(){SAY}")
            assert tab.js("next") == "shared"
            tab.shared(title=route)

    def test_rights_that_another_config_took_are_asked_for_again(
        self, either: OpenPhone, site: Site, signing: Signing
    ) -> None:
        wrong = (
            "wx.config({appId: 'x', timestamp: 1, nonceStr: 'n', signature: 's', jsApiList: ['a']})"
        )
        tab = either("iOS")
        tab.open(site(page(signing, ROUTED)) + "/one")
        assert tab.outcome() == "shared"
        tab.js(wrong)
        tab.waits("phone.calls.filter(call => call.problem && call.answered).length")
        tab.js("history.pushState({}, '', '/two')")
        tab.shared(title="/two")


class TestThePagesOwn:
    """wx.error, wx.ready and wx.config of the page, beside ours."""

    LISTEN = """
      window.heard = []
      wx.error(error => heard.push(error.errMsg))
      wx.ready(() => heard.push('ready'))
    """
    WRONG = (
        "wx.config({appId: 'x', timestamp: 1, nonceStr: 'n', signature: 's', jsApiList: ['a']});"
    )

    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("problem", ["", "invalid_url_domain"])
    def test_they_hear_of_our_config(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str, first: bool, problem: str
    ) -> None:
        script = f"<script>{self.LISTEN}</script>"
        call = ROUTED if first else ROUTED + ";" + self.LISTEN
        tab = either(kind, problems=[problem])
        tab.open(site(page(signing, call, before=WEIXIN + script if first else WEIXIN)))
        said = "config:" + problem.replace("_", " ")
        assert tab.outcome() == (said if problem else "shared")
        assert tab.js("heard") == ([said, "ready"] if problem else ["ready"])

    def test_they_hear_of_a_route_that_fails(
        self, either: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = either("Android", problems=["", "invalid_url_domain"])
        tab.open(site(page(signing, ROUTED, before=WEIXIN + f"<script>{self.LISTEN}</script>")))
        assert tab.outcome() == "shared"
        tab.js("history.pushState({}, '', '/two')")
        tab.waits("heard.length === 2")
        assert tab.js("heard") == ["ready", "config:invalid url domain"]

    def test_the_bridge_and_the_configuration_are_left_as_they_were(
        self, either: OpenPhone, site: Site, signing: Signing
    ) -> None:
        before = "<script>const invoke = WeixinJSBridge.invoke</script>"
        steps = """wechatSign.fetchConfig(location.href).then(config => {
          config.jsApiList = ['onMenuShareTimeline', 'chooseImage']
          const given = JSON.stringify(config)
          return wechatSign.configure(config).then(() => JSON.stringify(config) === given)
        })"""
        tab = either("Android")
        tab.open(site(page(signing, before=before + WEIXIN)))
        assert tab.outcome() == "shared"
        assert tab.js(steps) is True
        assert tab.js("WeixinJSBridge.invoke === invoke") is True

    @pytest.mark.parametrize("heard", [True, False])
    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    def test_an_earlier_failure_of_the_pages_own_is_not_ours(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str, heard: bool
    ) -> None:
        listen = self.LISTEN if heard else ""
        late = f"wx.ready(() => setTimeout(() => {{ {CALL} }}))"
        tab = either(kind)
        tab.open(
            site(page(signing, late, before=WEIXIN + f"<script>{listen}{self.WRONG}</script>"))
        )
        assert tab.outcome() == "shared"
        problems = [call["problem"] for call in tab.configs()]
        assert problems == ["invalid_signature", ""]

    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    def test_a_failure_of_ours_after_one_of_the_pages_is_told_as_ours(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str
    ) -> None:
        late = f"wx.ready(() => setTimeout(() => {{ {CALL} }}))"
        tab = either(kind, problems=["invalid_signature", "invalid_url_domain"])
        tab.open(site(page(signing, late, before=WEIXIN + f"<script>{self.WRONG}</script>")))
        assert tab.outcome() == "config:invalid url domain"


class TestResolvedMeansShared:
    @pytest.mark.parametrize("name", ["updateAppMessageShareData", "updateTimelineShareData"])
    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    def test_what_wechat_refuses_is_told(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str, name: str
    ) -> None:
        for told, said in (("access_denied", "permission denied"), ("cancel", "cancel")):
            tab = either(kind, answers={name: told})
            tab.open(site(page(signing)))
            assert tab.outcome() == f"{name}:{said}"

    @pytest.mark.parametrize("name", ["updateAppMessageShareData", "updateTimelineShareData"])
    def test_silence_is_no_success(
        self, either: OpenPhone, site: Site, signing: Signing, name: str
    ) -> None:
        tab = either("Android", silent=[name])
        tab.open(site(page(signing, before=WEIXIN + HURRY)))
        assert tab.outcome() == f"WeChat does not answer {name}"

    def test_silence_keeps_no_route_waiting(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = phone("Android", silent=["updateTimelineShareData"])
        tab.open(site(page(signing, ROUTED)) + "/one")
        tab.waits("phone.friend")
        tab.js("history.pushState({}, '', '/two')")
        shared = "phone.friend.title === '/two'"
        eventually(shared, lambda: tab.js(shared), patience=10)  # less than the script's

    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    def test_old_apps_that_know_the_old_names_alone_share(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str
    ) -> None:
        lacks = ["updateAppMessageShareData", "updateTimelineShareData"]
        tab = either(kind, lacks=lacks)
        base = site(page(signing, ROUTED))
        tab.open(base + "/one")
        assert tab.outcome() == "shared"
        tab.js("history.pushState({}, '', '/two')")
        tab.waits(f"phone.count('{lacks[0]}') === 2")
        for name in ("menu:share:appmessage", "menu:share:timeline"):
            sent = tab.js(f"phone.send('{name}')")
            assert (sent["title"], sent["link"]) == ("/two", base + "/two")

    def test_a_function_that_throws_is_told(
        self, either: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = either("Android")
        call = "window.outcome = wechatSign(() => { throw new Error('no article') })" + SAY
        tab.open(site(page(signing, call)))
        assert tab.outcome() == "no article"


class TestOddPhones:
    @pytest.mark.parametrize("kind", ["Android", "iOS"])
    @pytest.mark.parametrize("problem", ["", "invalid_url_domain"])
    def test_a_bridge_that_can_not_be_listened_to_is_asked(
        self, either: OpenPhone, site: Site, signing: Signing, kind: str, problem: str
    ) -> None:
        tab = either(kind, sealed=True, problems=["", problem], queue=True)
        base = site(page(signing, ROUTED))
        tab.open(base + "/one")
        assert tab.outcome() == "shared"
        tab.js(f"history.pushState({{}}, '', '/two'), window.next = wechatSign(){SAY}")
        if problem and kind == "Android":
            assert tab.js("next") == "config:invalid url domain"
        else:
            assert tab.js("next") == "shared"
            tab.shared(title="/two", link=base + "/two")

    @pytest.mark.parametrize("kind", ["iOS", "Android"])
    def test_an_engine_of_2018_shares(self, site: Site, signing: Signing, kind: str) -> None:
        site.files["/bridge.js"] = bridge_for(kind, signing.wechat)
        routed = "; outcome.then(() => { history.pushState({}, '', '/two'); return wechatSign() })"
        shown = ".then(() => { document.body.textContent = JSON.stringify(phone.friend) })"
        base = site(page(signing, ROUTED + routed + shown))
        told = made_by_chromium_69(base + "/one", kind)
        assert f'{{"title":"/two","desc":"","link":"{base}/two","imgUrl":""}}' in told

    def test_wechat_10_is_not_taken_for_an_older_one_than_6(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        """WeChat's script compares versions as strings, and has no wx.error there."""
        agent = KINDS["Android"].agent.replace("MicroMessenger/8.0.50", "MicroMessenger/10.0.1")
        tab = phone(problems=["invalid_url_domain"], context={"user_agent": agent})
        tab.open(site(page(signing)))
        assert tab.outcome() == "config:invalid url domain"

    def test_with_debug_it_causes_no_more_alerts_than_it_must(
        self, phone: OpenPhone, site: Site, start: Start, wechat: Sandbox
    ) -> None:
        tab = phone("iOS", wechat)
        alerts = alerts_of(tab)
        tab.open(site(page(start("[jssdk]", "page_hosts = 127.0.0.1").url, ROUTED)) + "/one")
        assert tab.outcome() == "shared"
        assert len(alerts) == 3  # wx.config, and the new names
        tab.js("history.pushState({}, '', '/two')")
        tab.shared(title="/two")
        assert len(alerts) == 5
        comment = (ROOT / "config.example.ini").read_text(encoding="utf-8").partition("debug =")[0]
        assert "alert" in comment.rpartition("[jssdk]")[2]


class TestUrls:
    """What a proxy between page and server makes of them."""

    @staticmethod
    def unescaping_in_part(route: Any) -> None:
        address, _, query = route.request.url.partition("?")
        route.continue_(url=f"{address}?{query.replace('%25', '%')}")

    def test_where_a_proxy_changed_the_url_the_server_refuses(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = phone("Android")
        tab.tab.page.route("**/getApi?*", self.unescaping_in_part)  # type: ignore[attr-defined]
        tab.open(site(page(signing)) + "/?a=c%2B%2B#/route")
        assert "answers 400: url has '+' where its page has '%2B', by the Referer" in tab.outcome()

    def test_on_ios_where_the_server_can_not_know_it_names_both_urls(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        tab = phone("iOS")
        tab.tab.page.route("**/getApi?*", self.unescaping_in_part)  # type: ignore[attr-defined]
        base = site(page(signing))
        tab.open(base + "/?a=c%2B%2B#/route")
        assert tab.outcome() == (
            "a proxy between this page and the server changed the url: "
            f"{base}/?a=c%2B%2B was sent, {base}/?a=c++ was signed"
        )
        facts = "wechatSign.fetchConfig(location.href).catch(e => [e.sent, e.signed, e.status])"
        tab.open(base + "/?a=c%2B%2B")
        assert tab.js(facts) == [base + "/?a=c%2B%2B", base + "/?a=c++", 200]
        assert tab.calls("preVerifyJSAPI") == []

    @pytest.mark.parametrize("header", ["Signed-Url", "Access-Control-Expose-Headers"])
    def test_without_signed_url_it_has_nothing_to_compare(
        self, phone: OpenPhone, site: Site, signing: Signing, header: str
    ) -> None:
        def proxy(route: Any) -> None:
            answer = route.fetch()
            kept = {name: what for name, what in answer.headers.items() if name != header.lower()}
            assert kept != answer.headers
            route.fulfill(response=answer, headers=kept)

        tab = phone("Android")
        tab.tab.page.route("**/getApi?*", proxy)  # type: ignore[attr-defined]
        tab.open(site(page(signing)) + "/?a=c%2B%2B")
        assert tab.outcome() == "shared"

    def test_of_a_long_url_the_beginning_is_compared(
        self, phone: OpenPhone, site: Site, signing: Signing
    ) -> None:
        base = site(page(signing))
        tab = phone("iOS")
        tab.open(f"{base}/?a=c%2B%2B&long={'x' * 3000}")
        assert tab.outcome() == "shared"
        tab.tab.page.route("**/getApi?*", self.unescaping_in_part)  # type: ignore[attr-defined]
        tab.open(f"{base}/?a=c%2B%2B&long={'x' * 3000}")
        assert "changed the url" in tab.outcome()

    @pytest.mark.parametrize("policy", ["", '<meta name="referrer" content="no-referrer">'])
    def test_the_whole_referer_arrives_and_decides_what_a_url_means(
        self, either: OpenPhone, site: Site, signing: Signing, policy: str
    ) -> None:
        """Also where the page's own policy is to send none."""
        tab = either("Android")
        tab.open(site(page(signing, before=policy + WEIXIN)) + "/?x=%25E4")
        assert tab.outcome() == "shared"


def snippets() -> list[str]:
    """What each manual has for people to paste."""
    manuals = [(ROOT / name).read_text(encoding="utf-8") for name in MANUALS]
    return [block.text for text in manuals for block in blocks_of(text) if block.language == "html"]


class TestTheSnippetOfTheManuals:
    @pytest.mark.parametrize("number", [0, 1])
    @pytest.mark.parametrize("kind", ["iOS", "Android", "HarmonyOS"])
    def test_it_shares_each_route_as_it_is(
        self, phone: OpenPhone, site: Site, signing: Signing, kind: str, number: int
    ) -> None:
        tab = phone(kind)
        base = self.paste(tab, site, signing, number)
        for route in ("/one?a=1", "/two#/x", "/three"):
            tab.js(f"history.pushState({{}}, '', '{route}')")
            tab.shared(link=base + route)
        assert tab.tab.console == []  # type: ignore[attr-defined]

    @pytest.mark.parametrize("number", [0, 1])
    def test_it_is_quiet_outside_wechat(
        self, phone: OpenPhone, site: Site, signing: Signing, number: int
    ) -> None:
        tab = phone("desktop")
        said = alerts_of(tab)
        self.paste(tab, site, signing, number)
        tab.js("history.pushState({}, '', '/two')")
        tab.js("new Promise(resolve => setTimeout(resolve, 200))")
        assert said + tab.tab.console == []  # type: ignore[attr-defined]
        assert tab.asked() == []

    @pytest.mark.parametrize("number", [0, 1])
    @pytest.mark.parametrize("hangs", [True, False])
    def test_no_server_keeps_the_page_from_being_painted(
        self, phone: OpenPhone, site: Site, hangs: bool, number: int
    ) -> None:
        """One that accepts and hangs, and none at all."""
        with socket.create_server(("127.0.0.1", 0)) as there:
            address = f"http://127.0.0.1:{there.getsockname()[1]}"
            if not hangs:
                there.close()
            snippet = snippets()[number].replace("https://sign.example.com", address)
            tab = phone("Android")
            page = tab.tab.page  # type: ignore[attr-defined]
            page.goto(site(BRIDGE + snippet + "<p>painted"), wait_until="commit")
            tab.waits("performance.getEntriesByName('first-contentful-paint').length")
        assert [said for said in tab.tab.console if "ERR_" not in said] == []  # type: ignore[attr-defined]

    @staticmethod
    def paste(tab: Phone, site: Site, signing: Signing, number: int) -> str:
        snippet = snippets()[number]
        for address in (
            "https://res.wx.qq.com/open/js/jweixin-1.6.0.js",
            "https://sign.example.com",
        ):
            assert address in snippet
        base = site(BRIDGE + snippet.replace("https://sign.example.com", signing.url))
        tab.open(base + "/")
        return base
