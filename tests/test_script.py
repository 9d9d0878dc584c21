"""wechat-sign.js with WeChat's real script, in pages of another origin than the server's."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from browser import (
    BRIDGE_TAG,
    IN_WECHAT,
    KINDS,
    NPM,
    WEIXIN_COMMONJS,
    Phone,
    Signing,
    Site,
    WebKitTab,
    bridge_for,
    made_by_chromium_69,
    npm_file,
    unescaping_in_part,
)
from conftest import OpenPhone
from harness import ROOT, Sandbox, Start, eventually, unavailable
from manuals import ENGLISH, blocks_of

from server import SCRIPT as SERVED

SCRIPT = (ROOT / "wechat_sign" / "wechat-sign.js").read_text(encoding="utf-8")
ACORN = ("acorn@8.14.0", "dist/acorn.js")
WEIXIN = '<script src="/jweixin.js"></script>'
OURS = '<script src="{server}/wechat-sign.js"></script>'
COPIED = '<script src="/share.js"></script>'
SAY = ".then(() => 'shared', error => error.message)"
HURRY = """<script>
  const slow = window.setTimeout
  window.setTimeout = (call, ms, ...more) => slow(call, ms > 1000 || ms === 150 ? ms / 15 : ms,
    ...more)
</script>"""
"""Waits of more than a second, and those for WeChat's script, take the fifteenth part."""
SIGNED = ("[jssdk]", "page_hosts = 127.0.0.1", "debug = false")
WRONG = "wx.config({appId: 'x', timestamp: 1, nonceStr: 'n', signature: 's', jsApiList: ['a']})"
NOT_JSON = "and not its JSON: is /getApi handed on to it?"


def sharing(*arguments: str, function: str = "wechatSign") -> str:
    return f"window.outcome = {function}({', '.join(arguments)})" + SAY


CALL = sharing("{title: 'T', desc: 'D', imgUrl: 'https://a/i.png'}")
ROUTED = sharing("() => ({title: location.pathname})")
NEXT = "history.pushState({}, '', '/two'), window.next = wechatSign()" + SAY


class App:
    """Opens a page of the site on phones."""

    def __init__(self, phone: OpenPhone, site: Site, signing: Signing) -> None:
        self.phone, self.site, self.signing = phone, site, signing
        self.base = site("")

    def open(
        self,
        kind: str = "Android",
        call: str = CALL,
        path: str = "/",
        *,
        before: str = WEIXIN,
        ours: str = OURS,
        server: str = "",
        said: str = "shared",
        route: Callable[[Any], None] | None = None,
        **more: Any,
    ) -> Phone:
        """Once the Promise of the page's call has `said` that; without it, at once. `route`: what
        playwright does with /getApi, `more`: the phone's setup."""
        tab = self.phone(kind, **more)
        if route:
            tab.chromium.page.route("**/getApi?*", route)
        text = BRIDGE_TAG + before + ours + f"<script>{call}</script>"
        self.site(text.replace("{server}", server or self.signing.url))
        tab.open(self.base + path)
        if said:
            assert tab.outcome() == said
        return tab


@pytest.fixture
def app(phone: OpenPhone, site: Site, signing: Signing) -> App:
    return App(phone, site, signing)


@pytest.fixture
def both(either: OpenPhone, site: Site, signing: Signing) -> App:
    """The same in Chromium and in WebKit."""
    return App(either, site, signing)


def problems(tab: Phone) -> list[str]:
    """What WeChat had against each wx.config."""
    return [call["problem"] for call in tab.configs()]


def assert_all_good(tab: Phone, count: int, asked: int | None = None) -> None:
    """So often the server was asked, and the phone, and none of it was refused."""
    assert problems(tab) == [""] * count
    assert len(tab.asked()) == (count if asked is None else asked)


# What friends get.


def test_a_page_of_another_origin_shares(both: App) -> None:
    tab = both.open("iOS", path="/page?a=1&b=%E4%B8%AD%2F")
    data = {"title": "T", "desc": "D", "link": tab.js("location.href"), "imgUrl": "https://a/i.png"}
    assert tab.shared() == data
    assert_all_good(tab, 1)


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("kind", IN_WECHAT)
def test_it_shares_on_every_kind_of_phone(app: App, kind: str, when: str) -> None:
    tab = app.open(kind, ROUTED, "/one", when=when)
    tab.shared(title="/one")
    tab.push("/two?a=1")
    tab.shared(title="/two", link=app.base + "/two?a=1")
    last = [call["url"] for call in tab.configs() if not call["problem"]][-1]
    assert last == app.base + ("/one" if KINDS[kind].keeps_entry else "/two?a=1")
    assert tab.chromium.console == []


def test_what_a_user_put_into_the_page_does_not_pass_for_the_scripts_tag(both: App) -> None:
    clobber = '<img name=currentScript data-server="https://evil.example.com">'
    assert_all_good(both.open(before=clobber + WEIXIN), 1)


def test_what_is_not_given_is_taken_from_the_page(both: App) -> None:
    metas = '<meta name="description" content="述"><meta property="og:image" content="https://a/b">'
    tab = both.open(call=sharing(), path="/#/x", before=WEIXIN + metas)
    link = both.base + "/#/x"
    data = {"title": "的 page", "desc": "述", "link": link, "imgUrl": "https://a/b"}
    assert tab.shared() == data


@pytest.mark.parametrize(
    ("written", "shared"),
    [
        ("/i.png", "{base}/i.png"),
        ("./i.png?x=1", "{base}/assets/i.png?x=1"),
        ("//cdn.example.com/i.png", "http://cdn.example.com/i.png"),
        ("HTTPS://a/中.png?", "HTTPS://a/中.png?"),
        ("data:image/png;base64,AA==", "data:image/png;base64,AA=="),
    ],
)
def test_addresses_are_made_whole_by_the_pages_base_and_a_picture_that_is_none_is_told(
    app: App, written: str, shared: str
) -> None:
    before = f'<base href="/assets/"><meta name="og:image" content="{written}">' + WEIXIN
    tab = app.open(call=sharing(f"{{link: {written!r}}}"), path="/app/one", before=before)
    whole = shared.replace("{base}", app.base)
    tab.shared(link=whole, imgUrl=whole)
    warned = ["wechatSign: no phone shows a picture of data: or blob:"]
    assert tab.chromium.console == warned * written.startswith("data:")


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
    app: App, opened: str, link: str
) -> None:
    tab = app.open(path=opened)
    tab.shared(link=app.base + link)
    assert tab.asked() == [app.base + opened.partition("#")[0]]


def test_a_page_whose_data_comes_late_calls_again(both: App) -> None:
    tab = both.open(call="window.title = 'early';" + sharing("() => ({title})"))
    tab.shared(title="early")
    tab.js("window.title = 'late', wechatSign()")
    tab.shared(title="late")
    assert_all_good(tab, 1)


@pytest.mark.parametrize(
    ("change", "key", "late"),
    [
        ("document.title = 'late'", "title", "late"),
        ("document.querySelector('title').firstChild.data = 'late'", "title", "late"),
        ("document.querySelector('[name=description]').content = 'D'", "desc", "D"),
        ("document.querySelector('[name*=og]').content = 'http://i/'", "imgUrl", "http://i/"),
    ],
)
def test_what_the_page_says_of_itself_after_a_route_is_shared(
    both: App, change: str, key: str, late: str
) -> None:
    metas = "<meta name=description content=d><meta name=og:image content=http://early/>"
    tab = both.open(call=sharing(), before=metas + WEIXIN)
    tab.push("/two")
    link = both.base + "/two"
    tab.shared(title="的 page", desc="d", imgUrl="http://early/", link=link)
    tab.js(f"void ({change})")
    tab.shared(**{key: late}, link=link)
    assert_all_good(tab, 2)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("async () => ({title: 'T'})", "shared"),
        ("() => { throw new Error('no article') }", "no article"),
        ("() => new Promise(() => {})", "what to share is never told"),
    ],
)
def test_data_may_be_promised_and_their_lack_is_told(both: App, data: str, said: str) -> None:
    tab = both.open("iOS", sharing(data), before=WEIXIN + HURRY, said=said)
    if said == "shared":
        tab.shared(title="T")


# Redirects, guards, impatient users: only settled routes are signed.


def test_all_who_called_get_the_outcome_of_the_newest(both: App) -> None:
    tab = both.open(said="", delays={"preVerifyJSAPI": 2000}, problems=["", "invalid_url_domain"])
    tab.waits("phone.count('preVerifyJSAPI')")
    tab.js(NEXT)
    said = "config:invalid url domain"
    assert (tab.outcome(), tab.outcome("next")) == (said, said)


@pytest.mark.parametrize(
    ("kind", "call", "change", "every", "calls", "shares"),
    [
        # A blinking title that is not shared, and a marquee.
        ("iOS", CALL, "document.title = 'x' + count % 2", 50, 1, (1, 1)),
        ("Android", sharing(), "document.title = 'x' + count", 100, 1, (3, 8)),
        # A scroll spy: where each url is signed, and where none is.
        ("Android", ROUTED, "history.replaceState({}, '', '/at/' + count)", 100, 4, (1, 4)),
        ("Android", ROUTED, "location.hash = '/at/' + count", 40, 1, (3, 8)),
    ],
)
def test_changes_that_go_on_are_told_once_a_second_and_signed_when_they_end(
    app: App, kind: str, call: str, change: str, every: int, calls: int, shares: tuple[int, int]
) -> None:
    """What a page does every few ms costs next to nothing, and is shared in the end."""
    tab = app.open(kind, call)
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
    assert shares[0] <= tab.js("phone.count('updateAppMessageShareData')") <= shares[1]
    tab.waits("phone.friend.link === location.href")
    if call != CALL:
        title = "(/at/.test(location) ? location.pathname : document.title)"
        tab.waits(f"phone.friend.title === {title}")
    assert len(tab.asked()) <= calls


# Routes.


def test_a_route_of_the_navigation_api_is_one(app: App) -> None:
    tab = app.open()
    tab.js("navigation.addEventListener('navigate', event => event.intercept())")
    tab.js("void navigation.navigate('/two')")
    tab.shared(link=app.base + "/two")


def test_an_object_is_for_the_page_that_it_was_given_on(both: App) -> None:
    """An anchor, and the OAuth code that a page takes out of its url, make no other page."""
    tab = both.open("iOS", path="/one?code=c&state=s")
    ours, pages = ["#top", "/one", "/two", "/one", "/one#/two"], ["/two", "/one#/two"]
    for route in ours:
        tab.js(f"history.replaceState({{}}, '', '{route}')")
        link = both.base + route.replace("#top", "/one#top")
        tab.shared(title="的 page" if route in pages else "T", link=link)


def test_back_and_forward_are_routes(both: App) -> None:
    tab = both.open(call=ROUTED, path="/one")
    tab.push("/two")
    for step, route in (("0", "/two"), ("history.back()", "/one"), ("history.forward()", "/two")):
        tab.js(step)
        tab.shared(title=route, link=both.base + route)
    # A signature serves again for a minute.
    assert_all_good(tab, 4, 2)


@pytest.mark.parametrize(
    ("kind", "load"),
    [
        (
            "iOS",
            "const tag = document.createElement('script'); tag.src = '{server}/wechat-sign.js';"
            "tag.onload = () => {" + ROUTED + "}; document.head.append(tag)",
        ),
        ("Android", "import('{server}/wechat-sign.js?v=3').then(() => {" + ROUTED + "})"),
    ],
)
def test_loaded_after_the_first_route_it_knows_the_url_of_entry(
    both: App, kind: str, load: str
) -> None:
    call = "history.replaceState({}, '', '/routed?b=2');" + load
    tab = both.open(kind, call, "/entry?a=%20#/x", ours="")
    tab.shared(title="/routed", link=both.base + "/routed?b=2")
    assert_all_good(tab, 1)


@pytest.mark.parametrize("either", ["WebKit"], indirect=True)
def test_a_page_that_comes_back_is_told_again(both: App) -> None:
    """From the back-forward cache: no script runs but what listens to pageshow."""
    both.site.files["/other"] = ""
    tab = both.open("iOS", ROUTED, "/one")
    tab.open(both.base + "/other")
    assert isinstance(tab.tab, WebKitTab)
    tab.tab.back()
    tab.waits("window.phone && phone.count('updateAppMessageShareData') === 2")
    assert_all_good(tab, 1)


# The second try.


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (["invalid_signature"], "shared"),
        (["invalid_signature", "invalid_signature"], "config:invalid signature"),
        (["invalid_url_domain"], "config:invalid url domain"),
    ],
)
def test_after_invalid_signature_it_tries_once_more(both: App, found: list[str], said: str) -> None:
    tab = both.open(problems=found, said=said)
    tries = 2 if found[0] == "invalid_signature" else 1
    assert len(tab.calls("preVerifyJSAPI")) == tries
    # By another address, which neither a cache nor a service worker has kept.
    loaded = "performance.getEntriesByType('resource').map(entry => entry.name)"
    assert len({url for url in tab.js(loaded) if "/getApi?" in url}) == tries


@pytest.mark.parametrize(
    ("kind", "keeps_entry", "signed"),
    [("iPad", True, ["/one", "/two", "/one"]), ("iOS", False, ["/one", "/two", "/three"])],
)
def test_a_phone_that_takes_the_other_url_is_found_out_once(
    both: App, kind: str, keeps_entry: bool, signed: list[str]
) -> None:
    """An iPad that says it is a Mac; an iOS that takes the url of the route."""
    tab = both.open(kind, ROUTED, "/one", keepsEntry=keeps_entry)
    for route in ("/two", "/three"):
        tab.push(route)
        tab.shared(title=route, link=both.base + route)
    assert problems(tab) == ["", "invalid_signature", "", ""][: 3 + (not keeps_entry)]
    assert tab.asked() == [both.base + route for route in signed]


def test_the_url_that_wechat_says_it_took_is_signed_and_kept(both: App) -> None:
    """Here an entry that the script can't know of."""
    forget = """<script>
      const all = performance.getEntriesByType.bind(performance)
      performance.getEntriesByType = type => type === 'navigation' ? [] : all(type)
      history.replaceState({}, '', '/two')
    </script>"""
    tab = both.open("iOS", ROUTED, "/real", ours=forget + OURS, tells=True)
    tab.push("/three")
    tab.shared(title="/three")
    assert tab.asked()[-1] == both.base + "/real"
    assert problems(tab)[-1] == ""


# wx.config for a page that scans, and shares nothing or shares, too.

SCAN = sharing("{jsApiList: ['scanQRCode']}", function="wechatSign.config")


@pytest.mark.parametrize("kind", ["iOS", "Android"])
def test_the_pages_own_list_is_what_wechat_gets(both: App, kind: str) -> None:
    tab = both.open(kind, SCAN, "/one")
    assert tab.calls("preVerifyJSAPI")[0]["args"]["verifyJsApiList"] == ["scanQRCode"]
    tab.push("/two")
    tab.waits(f"phone.count('preVerifyJSAPI') === {1 if kind == 'iOS' else 2}")
    assert tab.calls("updateAppMessageShareData") == []
    tab.js("void wechatSign({title: 'T'})")
    tab.shared(title="T")
    assert "scanQRCode" in tab.calls("preVerifyJSAPI")[-1]["args"]["verifyJsApiList"]


@pytest.mark.parametrize("call", ["wechatSign({title: 'T'}); %s", "%s; wechatSign({title: 'T'})"])
def test_with_sharing_it_is_one_config(both: App, call: str) -> None:
    tab = both.open(call=call % SCAN)
    tab.shared(title="T")
    assert_all_good(tab, 1)


# WeChat's script: imported, late, missing.


def test_wechats_script_can_be_handed_in(both: App) -> None:
    commonjs = "const module = {exports: {}}; %s; export default module.exports"
    both.site.files["/weixin.js"] = commonjs % npm_file(*WEIXIN_COMMONJS)
    handed = sharing("{title: 'T'}", "{wx}")
    module = f"<script type=module>import wx from '/weixin.js'; {handed}</script>"
    tab = both.open(call="", path="/one", before="", ours=OURS + module)
    assert tab.js("typeof window.wx") == "undefined"
    tab.push("/two")
    tab.shared(title="的 page", link=both.base + "/two")


def test_wechats_script_may_come_later(both: App) -> None:
    share = "<script>window.wechatShare = () => ({title: 'late'})</script>"
    late = """setTimeout(() => {
      const tag = document.createElement('script')
      document.head.append(Object.assign(tag, {src: '/jweixin.js'}))
    }, 300)"""
    tab = both.open(call=late, before=share, said="")
    tab.shared(title="late")
    assert_all_good(tab, 1)


# A copied, renamed, bundled or inlined script.

GIVEN = sharing("{title: 'T'}", "{server: '{server}/'}")


@pytest.mark.parametrize(
    ("ours", "call"),
    [
        ('<script src="/share.js" data-server="{server}/"></script>', CALL),
        ('<script src="/wechat-sign.js" data-server="{server}"></script>', CALL),
        (COPIED, GIVEN),
        ('<script data-server="{server}">{script}</script>', CALL),
        ("<script type=module>import '/share.js'; " + GIVEN + "</script>", ""),
    ],
)
def test_the_servers_address_can_be_given(both: App, ours: str, call: str) -> None:
    both.site.files |= {"/share.js": SCRIPT, "/wechat-sign.js": SCRIPT}
    both.open(call=call, ours=ours.replace("{script}", SCRIPT))


def test_a_relative_address_is_the_pages_own_whatever_its_base_is(app: App) -> None:
    before = WEIXIN + '<base href="https://cdn.example.com/">'
    ours = OURS.replace("></", ' data-server="/wx"></')
    said = f"the signing server at {app.base}/wx answers 200 {NOT_JSON}"
    app.open(path="/app/one", before=before, ours=ours, said=said)


def test_two_copies_do_the_work_of_one(app: App) -> None:
    tab = app.open(call=ROUTED, path="/one", ours=OURS + OURS)
    tab.push("/two")
    tab.shared(title="/two")
    assert_all_good(tab, 2)


@pytest.mark.parametrize("missing", ["fetch", "Promise", "performance", "Object.assign"])
def test_where_the_browser_is_old_neither_load_nor_route_throws(both: App, missing: str) -> None:
    before = f"""<script>
      window.errors = []
      onerror = said => {{ errors.push(said) }}
      onunhandledrejection = event => errors.push(event.reason)
      window.WeixinJSBridge = undefined
      window.kept = {missing}
      {missing} = undefined
    </script>"""
    call = f"""
      wechatSign({{title: 'T'}})
      history.pushState({{}}, '', '/two')
      window.went = location.pathname
      {missing} = kept
    """
    tab = both.open(call=call, before=before + WEIXIN, said="")
    assert tab.js("[errors, went]") == [[], "/two"]


def node() -> str:
    return shutil.which("node") or unavailable("no node to run the script with")


def test_a_server_that_renders_pages_can_import_it() -> None:
    subprocess.run([node(), "-e", SCRIPT], check=True)


def test_it_is_plain_enough_for_old_browsers_and_small_and_its_comments_alone_are_not_served() -> (
    None
):
    assert len(SERVED.gzipped) <= 4300
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
    subprocess.run([node(), "-e", compare], input=both, text=True, check=True)


# What went wrong, in a sentence that is the same in both engines.


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ((200, "<!doctype html>"), f"answers 200 {NOT_JSON}"),
        ((404, '{"message": "no"}'), f"answers 404 {NOT_JSON}"),
        ((200, "null"), f"answers 200 {NOT_JSON}"),
        ((400, '{"error": "url is cut"}'), "answers 400: url is cut"),
        (None, "does not answer"),
    ],
)
def test_what_the_server_answers_is_told(
    both: App, broken: tuple[int, str] | None, said: str
) -> None:
    both.site.broken = broken
    both.site.files["/wechat-sign.js"] = SCRIPT
    said = f"the signing server at {both.base} {said}"
    both.open(server=both.base, before=WEIXIN + HURRY * (broken is None), said=said)


def test_a_server_that_is_down_or_does_not_list_the_page_is_told(
    both: App, start: Start, wechat: Sandbox
) -> None:
    both.site.files["/share.js"] = SCRIPT
    for server in (start().url, "http://127.0.0.1:1"):
        said = f"no answer of the signing server at {server} can be read: it is down, "
        said += "a proxy answers for it, or its page_hosts lacks 127.0.0.1"
        both.open(call=GIVEN.replace("/'", "'"), ours=COPIED, server=server, said=said)


def policy(rule: str) -> str:
    return f'<meta http-equiv=Content-Security-Policy content="{rule}">'


NO_WEIXIN = "WeChat's script jweixin-1.6.0.js is not here"
BLOCKED = "<script src=https://res.wx.qq.com/x.js></script>"
UNREAD = "no answer of the signing server at {server} can be read"
FORBIDS = ": its Content-Security-Policy forbids "
NO_SHARING = "in a mini program pages do not share: its own onShareAppMessage does"
IN_MINI_PROGRAM = WEIXIN + "<script>__wxjs_environment = 'miniprogram'</script>"


@pytest.mark.parametrize(
    ("before", "more", "said"),
    [
        ("", {}, NO_WEIXIN + "; {wx: wx} hands it in"),
        (
            policy("script-src http://127.0.0.1:* 'unsafe-inline'"),
            {"ours": OURS + BLOCKED},
            NO_WEIXIN + FORBIDS + "https://res.wx.qq.com/",
        ),
        (policy("connect-src 'none'") + WEIXIN, {}, UNREAD + FORBIDS + "{server}"),
        (WEIXIN, {"ours": COPIED}, 'which signing server? Name it: {server: …} or data-server="…"'),
        (WEIXIN + "<script>fetch = 0</script>", {}, "this browser is too old: no fetch"),
        (WEIXIN, {"when": "never"}, "WeChat does not answer wx.config"),
        (WEIXIN, {"silent": ["preVerifyJSAPI"]}, "WeChat does not answer wx.config"),
        (WEIXIN, {"kind": "WeCom"}, "in WeCom pages share by WeCom's own script"),
        (IN_MINI_PROGRAM, {}, NO_SHARING),
    ],
)
def test_why_nothing_is_shared_is_told_by_name(
    both: App, before: str, more: dict[str, Any], said: str
) -> None:
    both.site.files["/share.js"] = SCRIPT
    tab = both.open(before=HURRY + before, said="", **more)
    assert tab.outcome().startswith(said.replace("{server}", both.signing.url))


def test_in_a_frame_that_is_told(both: App) -> None:
    framed = BRIDGE_TAG + WEIXIN + OURS + "<script>window.top." + CALL[7:] + "</script>"
    frame = f"<iframe srcdoc='{framed.replace(chr(39), '&#39;')}'></iframe>"
    said = "in a frame WeChat does nothing: open the page itself"
    both.open(call="", ours=frame, said=said)


@pytest.mark.parametrize("retry_after", ["", "2", "61"])
def test_what_may_pass_is_asked_for_once_more(app: App, retry_after: str) -> None:
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

    tab = app.open(before=WEIXIN + HURRY, said="", route=once)
    assert ("answers 503" in tab.outcome()) is (retry_after == "61")
    assert len(asked) == 1 + (retry_after != "61")


def test_a_network_that_was_away_for_long_is_noticed(app: App) -> None:
    tab = app.open(call=ROUTED, before=WEIXIN + HURRY)
    network = tab.chromium.page.context
    network.set_offline(True)
    tab.js(NEXT)
    assert "no answer of the signing server" in tab.outcome("next")
    network.set_offline(False)
    tab.shared(title="/two")


@pytest.mark.parametrize("kind", ["desktop", "Android"])
def test_the_promise_may_be_left_alone_and_the_console_tells_inside_wechat_only(
    app: App, kind: str
) -> None:
    call = "wechatSign({}); history.pushState({}, '', '/x');" + CALL
    said = "shared" if kind == "desktop" else "config:invalid url domain"
    tab = app.open(kind, call, said=said, problems=["invalid_url_domain"])
    console = tab.chromium.console
    assert console == ([] if kind == "desktop" else ["wechatSign: config:invalid url domain"])


# A failed re-sign must not take what worked.

TAGS = (*SIGNED, "open_tag_list = wx-open-launch-app")


def test_on_ios_a_route_is_shared_before_open_tags_are_signed_for(
    both: App, start: Start, wechat: Sandbox
) -> None:
    tab = both.open("iOS", ROUTED, "/one", server=start(*TAGS).url, wechat=wechat)
    tab.push("/two")
    tab.waits("phone.count('preVerifyJSAPI') === 2")
    names = [call["name"] for call in tab.js("phone.calls")]
    second = len(names) - names[::-1].index("preVerifyJSAPI")
    assert names[:second].count("updateAppMessageShareData") == 2
    assert_all_good(tab, 2, 1)
    assert tab.calls("preVerifyJSAPI")[1]["args"]["verifyOpenTagList"] == ["wx-open-launch-app"]


def test_on_ios_routes_are_shared_while_the_server_is_down(
    both: App, start: Start, wechat: Sandbox
) -> None:
    server = start(*TAGS)
    tab = both.open("iOS", ROUTED, "/one", server=server.url, wechat=wechat)
    server.kill()
    tab.js(NEXT)
    assert tab.js("next") == "shared"
    tab.shared(title="/two")


def test_rights_that_another_config_took_are_asked_for_again(both: App) -> None:
    tab = both.open("iOS", ROUTED, "/one")
    tab.js(WRONG)
    tab.waits("phone.calls.filter(call => call.problem && call.answered).length")
    tab.push("/two")
    tab.shared(title="/two")


# wx.error, wx.ready and wx.config of the page, beside ours.

LISTEN = """
  window.heard = []
  wx.error(error => heard.push(error.errMsg))
  wx.ready(() => heard.push('ready'))
"""
AFTER_READY = f"wx.ready(() => setTimeout(() => {{ {CALL} }}))"


@pytest.mark.parametrize("call", [ROUTED + ";" + LISTEN, LISTEN + ";" + ROUTED])
@pytest.mark.parametrize(
    ("problem", "said", "heard"),
    [("", "shared", ["ready"]), ("x_y", "config:x y", ["config:x y", "ready"])],
)
def test_they_hear_of_our_config(
    both: App, call: str, problem: str, said: str, heard: list[str]
) -> None:
    assert both.open(call=call, said=said, problems=[problem]).js("heard") == heard


def test_the_bridge_and_the_configuration_are_left_as_they_were(both: App) -> None:
    before = "<script>const invoke = WeixinJSBridge.invoke</script>"
    steps = """wechatSign.fetchConfig(location.href).then(config => {
      config.jsApiList = ['onMenuShareTimeline', 'chooseImage']
      const given = JSON.stringify(config)
      return wechatSign.configure(config).then(() => JSON.stringify(config) === given)
    })"""
    tab = both.open(before=before + WEIXIN)
    assert tab.js(steps) is True
    assert tab.js("WeixinJSBridge.invoke === invoke") is True


@pytest.mark.parametrize(("kind", "listen"), [("iOS", LISTEN), ("Android", "")])
@pytest.mark.parametrize(
    ("problem", "said"), [("", "shared"), ("invalid_url_domain", "config:invalid url domain")]
)
def test_an_earlier_failure_of_the_pages_own_is_not_ours(
    both: App, kind: str, listen: str, problem: str, said: str
) -> None:
    before, found = WEIXIN + f"<script>{listen}{WRONG}</script>", ["invalid_signature", problem]
    tab = both.open(kind, AFTER_READY, before=before, said=said, problems=found)
    assert problems(tab) == found


# Resolved means shared.


@pytest.mark.parametrize("name", ["updateAppMessageShareData", "updateTimelineShareData"])
def test_what_wechat_refuses_and_its_silence_are_told(both: App, name: str) -> None:
    both.open("iOS", said=f"{name}:permission denied", answers={name: "access_denied"})
    silence = f"WeChat does not answer {name}"
    both.open(before=WEIXIN + HURRY, said=silence, silent=[name])


def test_silence_keeps_no_route_waiting(app: App) -> None:
    tab = app.open(call=ROUTED, path="/one", said="", silent=["updateTimelineShareData"])
    tab.waits("phone.friend")
    tab.push("/two")
    shared = "phone.friend.title === '/two'"
    eventually(shared, lambda: tab.js(shared), patience=10)  # less than the script's


@pytest.mark.parametrize("kind", ["iOS", "Android"])
def test_old_apps_that_know_the_old_names_alone_share(both: App, kind: str) -> None:
    lacks = ["updateAppMessageShareData", "updateTimelineShareData"]
    tab = both.open(kind, ROUTED, "/one", lacks=lacks)
    tab.push("/two")
    tab.waits(f"phone.count('{lacks[0]}') === 2")
    for name in ("menu:share:appmessage", "menu:share:timeline"):
        sent = tab.js(f"phone.send('{name}')")
        assert (sent["title"], sent["link"]) == ("/two", both.base + "/two")


# Odd phones.


@pytest.mark.parametrize(
    ("problem", "said"), [("", "shared"), ("invalid_url_domain", "config:invalid url domain")]
)
def test_a_bridge_that_can_not_be_listened_to_is_asked(both: App, problem: str, said: str) -> None:
    tab = both.open(call=ROUTED, path="/one", sealed=True, problems=["", problem])
    tab.js(NEXT)
    assert tab.js("next") == said
    assert (tab.js("phone.friend.title") == "/two") is (said == "shared")


@pytest.mark.parametrize("kind", ["iOS", "Android"])
def test_an_engine_of_2018_shares(site: Site, signing: Signing, kind: str) -> None:
    site.files["/bridge.js"] = bridge_for(kind, signing.wechat)
    routed = "; outcome.then(() => { history.pushState({}, '', '/two'); return wechatSign() })"
    shown = ".then(() => { document.body.textContent = JSON.stringify(phone.friend) })"
    call = f"<script>{ROUTED}{routed}{shown}</script>"
    base = site(BRIDGE_TAG + WEIXIN + OURS.replace("{server}", signing.url) + call)
    told = made_by_chromium_69(base + "/one", kind)
    assert f'{{"title":"/two","desc":"","link":"{base}/two","imgUrl":""}}' in told


# What a proxy between page and server makes of urls.


@pytest.mark.parametrize("more", ["", "&long=" + "x" * 3000])
def test_a_url_changed_on_the_way_is_told_on_ios_where_the_server_can_not_know_it(
    app: App, more: str
) -> None:
    tab = app.open("iOS", path="/right?a=c%2B%2B" + more)
    sent, signed = app.base + "/?a=c%2B%2B" + more, (app.base + "/?a=c++" + more)[:2048]
    tab.chromium.page.route("**/getApi?*", unescaping_in_part)
    tab.open(sent + "#/route")
    proxy = "a proxy between this page and the server changed the url: "
    assert tab.outcome() == f"{proxy}{sent} was sent, {signed} was signed"
    facts = "wechatSign.fetchConfig(location.href).catch(e => [e.sent, e.signed, e.status])"
    tab.open(sent)
    assert tab.js(facts) == [sent, signed, 200]
    assert tab.calls("preVerifyJSAPI") == []


@pytest.mark.parametrize("header", ["signed-url", "access-control-expose-headers"])
def test_without_signed_url_it_has_nothing_to_compare(app: App, header: str) -> None:
    def proxy(route: Any) -> None:
        answer = route.fetch()
        kept = {name: what for name, what in answer.headers.items() if name != header}
        assert kept != answer.headers
        route.fulfill(response=answer, headers=kept)

    app.open(path="/?a=c%2B%2B", route=proxy)


@pytest.mark.parametrize("policy", ["", '<meta name="referrer" content="no-referrer">'])
def test_the_whole_referer_arrives_and_decides_what_a_url_means(both: App, policy: str) -> None:
    """Also where the page's own policy is to send none."""
    both.open(before=policy + WEIXIN, path="/?x=%25E4")


# The manuals' snippet; it is the same in both languages.


def snippet(server: str) -> str:
    [pasted] = [block.text for block in blocks_of(ENGLISH) if block.language == "html"]
    for address in ("https://res.wx.qq.com/open/js/jweixin-1.6.0.js", "https://sign.example.com"):
        assert address in pasted
    return BRIDGE_TAG + pasted.replace("https://sign.example.com", server) + "<p>painted"


@pytest.mark.parametrize("kind", ["iOS", "Android", "desktop"])
def test_it_shares_each_route_as_it_is_and_is_quiet_outside_wechat(
    phone: OpenPhone, site: Site, signing: Signing, kind: str
) -> None:
    tab = phone(kind)
    base = site(snippet(signing.url))
    tab.open(base + "/")
    for route in ("/one?a=1", "/two#/x", "/three"):
        tab.push(route)
        if kind != "desktop":
            tab.shared(link=base + route)
    if kind == "desktop":
        tab.js("new Promise(resolve => setTimeout(resolve, 200))")
        assert tab.asked() == []
    assert tab.chromium.console + tab.chromium.alerts == []


def test_a_server_that_hangs_keeps_no_page_from_being_painted(phone: OpenPhone, site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        address = f"http://127.0.0.1:{there.getsockname()[1]}"
        tab = phone("Android")
        tab.chromium.page.goto(site(snippet(address)), wait_until="commit")
        tab.waits("performance.getEntriesByName('first-contentful-paint').length")
    assert [said for said in tab.chromium.console if "ERR_" not in said] == []
