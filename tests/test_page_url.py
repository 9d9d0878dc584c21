from __future__ import annotations

import re
import time
from contextlib import suppress
from urllib.parse import quote, unquote

import pytest
import urls
from harness import PAGE
from hypothesis import given, settings
from hypothesis import strategies as st
from urls import NOW, Outcomes, browsers_host, browsers_href, is_a_double, measure, real_pages

from wechat_sign.errors import BadPageUrl, PageHostNotAllowed
from wechat_sign.page_url import (
    MAX_LENGTH,
    cut_or_added,
    for_log,
    host_is_listed,
    page_url,
)


def escaped(url: str) -> str:
    return f"url={quote(url, safe='')}"


def signed(query: str, referer: str = "", now: float | None = NOW, is_entry: bool = False) -> str:
    return page_url(query.encode(), (), referer, now=now, is_entry=is_entry)


# Raw, with escapes that no escaper makes.
RAW = [PAGE, "http://a/?url=http://b/&c", "https://a/?q=%23x&r=%zz", "https://a/?b=%2B&c=2"]
RAW += ["https://a/?b=%E4%B8%AD"]  # no href has these bytes bare: they are its own escapes
RAW += ["https://a/b%2Fc?u=https%3A%2F%2Fb%2F%3Fc%3D1%26d%3D2"]  # : and / stand bare
RAW += ["https://a/?c%3D1=2", "https://a/?b=1%26c%3D2"]  # = stands bare
RAW += ["https://a/?q=100%25", "https://a/?b=1%2C2&c=3,4&d=%25E4", "https://a/?q=H%26M"]
RAW += ["https://a/?ids%5B%5D=1", "https://a/?https%3A%2F%2Fb%2F%3Fx%3D1"]


@pytest.mark.parametrize(
    ("sent", "url"),
    [
        *((page, page) for page in RAW),
        ("https://a/#/route?x=1&y=2", "https://a/"),
        ("https://a/#/route?x%3D1%26y%3D2", "https://a/"),
        # escaped: once, and other parameters are ignored
        ("https%3A%2F%2Fa%2F%3Fx%3D1%26y%3D%252F%2523", "https://a/?x=1&y=%2F%23"),
        ("https:%2F%2Fa%2F%3Fx%3D%2B", "https://a/?x=+"),  # axios leaves the colon
        ("https%3A%2F%2Fa%2F%23%2Froute&x=1", "https://a/"),
        ("https%3A%2F%2Fa%2F&url=https%3A%2F%2Fb%2F", "https://a/"),
        ("https%3A%2F%2Fa%2F%3Fx%3D%&_=1", "https://a/?x=%"),
        # escaped, with the :// left bare
        ("https://a/x?b%3d1%26c%3D2", "https://a/x?b=1&c=2"),
        ("https://a/x?b%3D1", "https://a/x?b=1"),
        ("https://a/x?b%3D%26c%3D", "https://a/x?b=&c="),
        ("https://a/x?b%3D1%26c%3D2&callback=f", "https://a/x?b=1&c=2"),
        ("https://a/x?b%3D1%26c%3D2%23/route", "https://a/x?b=1&c=2"),
        ("https://a/x?b%3Dd+e%26c%3D2", "https://a/x?b=d+e&c=2"),  # Spring; no href has a space
        ("https://a/x?u%3Dhttps://b/?c%3D1", "https://a/x?u=https://b/?c=1"),
        ("https://a/x?ids%5B%5D%3D1%26ids%5B%5D%3D2", "https://a/x?ids[]=1&ids[]=2"),
        ("https://a/x%3Bjsessionid%3D9F", "https://a/x;jsessionid=9F"),
        ("https://a/?%25E4%25B8%25AD", "https://a/?%E4%B8%AD"),
        # by Angular, which leaves = as well
        ("https://a/x?b=1%26c=2", "https://a/x?b=1&c=2"),
        ("https://a/x?debug%26c=2", "https://a/x?debug&c=2"),
        ("https://a/%25E4?x=%25E5", "https://a/%E4?x=%E5"),
    ],
)
def test_the_url_comes_out_as_the_page_has_it(sent: str, url: str) -> None:
    for referer in ("", "https://a/entry"):
        assert signed(f"url={sent}", referer) == url
        assert signed(f"_=17&url={sent}", referer) == url


AMBIGUOUS = ["C%2B%2B", "?Yg%3D%3D", "?b%3D", "?b%26c", "?u=/b?c=1%26d=2", "?b%3D1&c=2"]
AMBIGUOUS += ["?b=1%26c=2&d=3", "?b=%25E4%25B8%25AD"]


@pytest.mark.parametrize("rest", AMBIGUOUS)
def test_where_two_readings_are_possible_only_the_referer_decides(rest: str) -> None:
    raw = f"https://a/{rest}"
    unescaped = unquote(raw.partition("&")[0])
    for referer in ("", "https://a/", "https://a/another"):
        with pytest.raises(BadPageUrl, match=r"encodeURIComponent\(location\.href"):
            signed(f"url={raw}", referer)
    assert signed(f"url={raw}", raw) == raw
    assert signed(f"url={raw}", unescaped) == unescaped


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("https://a/?b=%25E4%25B8%25AD&c=2", "escaped by encodeURI, or twice.*Referer"),
        ("https://a/?b=%5B1%5D&c=%25E4", "escaped by encodeURI, or twice.*Referer"),
        ("https://a/?b=%25u5F20%25u4E09", "escaped by encodeURI, or twice"),  # JavaScript's escape
        ("https://a/?b=1&amp;c=2", "&amp; for &: it was taken from the source of HTML"),
    ],
)
def test_what_is_a_mistake_more_often_is_refused_unless_it_is_the_referer(
    page: str, reason: str
) -> None:
    for query in (f"url={page}", escaped(page)):
        with pytest.raises(BadPageUrl, match=reason):
            signed(query)
        assert signed(query, page) == page


OWN_DOUBLES = ["u=https%3A%2F%2Fb%2F%3Fv%3D%25E4", "b=[1]&c=%25E4"]
"""encodeURI leaves neither %3A nor [."""


@pytest.mark.parametrize("query", [*OWN_DOUBLES, "q=50%25off&t=100%25+cotton"])
def test_a_page_with_some_double_escapes_of_its_own_is_signed(query: str) -> None:
    assert signed(escaped(f"https://a/?{query}")) == f"https://a/?{query}"


MS = int(NOW * 1000)
HOUR = 3_600_000


APPENDED = [f"t={MS - 60_000}", f"_t={int(NOW)}", f"timestamp={MS + 60_000}"]
APPENDED += [f"_={MS - 20 * HOUR}"]  # jQuery's counts on from when it was loaded


@pytest.mark.parametrize("appended", APPENDED)
def test_a_cache_buster_behind_a_raw_url_is_refused_unless_the_referer_tells(appended: str) -> None:
    for page in ("https://a/?b=1", "https://a/", "https://a/?b=%E4&c"):
        query = f"url={page}&{appended}"
        name = appended.partition("=")[0]
        with pytest.raises(BadPageUrl, match=f"&{name}=… seems to be appended"):
            signed(query)
        assert signed(query, page) == page
        assert signed(query, f"{page}&{appended}") == f"{page}&{appended}"
        assert signed(f"{escaped(page)}&{appended}") == page
    with pytest.raises(BadPageUrl, match="appended"):
        signed(f"url=https://a/?b=1&t={int(time.time())}", now=None)


OWN_TIMES = [f"b=1&t={MS - HOUR}", f"b=1&_={MS - 25 * HOUR}", f"b=1&id={MS}", f"t={MS}"]


@pytest.mark.parametrize("query", [*OWN_TIMES, "b=1&t=12345678901"])
def test_a_time_of_the_pages_own_is_signed(query: str) -> None:
    assert signed(f"url=https://a/?{query}") == f"https://a/?{query}"


@pytest.mark.parametrize(
    ("sent", "href"),
    [
        ("HTTPS://A.Example/?A=B", "https://a.example/?A=B"),
        ("http://mp.weixin.qq.com?params=value", "http://mp.weixin.qq.com/?params=value"),
        ("https://a:443/x", "https://a/x"),
        ("http://a:80", "http://a/"),
        ("http://a:/", "http://a/"),
        *((page, page) for page in ("http://a:443/", "https://a:80/", "http://10.0.0.7:8080/?")),
        *((page, page) for page in ("http://[::1]:8/", "https://a/|...//..x/%41%7e;p=(1)!*'$,@")),
        ("https://a/:~?/../&q={[`^|\\]}", "https://a/:~?/../&q={[`^|\\]}"),
    ],
)
def test_what_a_person_types_is_signed_as_browsers_have_it(sent: str, href: str) -> None:
    assert browsers_href(sent) == href
    assert signed(f"url={sent}") == signed(escaped(sent)) == href


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ("https://a/活", "no 活: send it as it is there, not decoded"),
        *((url, "no 活") for url in ("https://a/?x=#b&y=活", "https://活.com/")),
        ('https://a/?x="', 'no ": send it'),
        *((f"https://a/{path}", "differently") for path in ("{id}", "b\\c", "?x='", "b/../c", ".")),
        ("https://a/b/%2e%2E?c", r"a /\.\./ or"),
        *((f"https://{host}/", "the host") for host in ("1.2.3", "h5%2eexample.com", "a:080")),
        ("https://a/?x=1#a b", "whitespace or a control character"),
        ("ftp://a/", "must begin with http:// or https://"),
        ("/?code=SECRET", "https://; send it as encodeURIComponent"),
        ("http:/a", "http:// or https://"),
        *((f"https:/{rest}", "no host") for rest in ("//a", "/\\a", "/:80/", "/a:b/")),
        ("https://user:pw@a/", "no host, or a user, which location.href never has"),
    ],
)
def test_what_no_page_has_is_refused_with_the_reason(sent: str, reason: str) -> None:
    for query in (f"url={sent}", escaped(sent)):
        with pytest.raises(BadPageUrl, match=reason):
            signed(query)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        *((query, "missing") for query in ("", "URL=https://a/", "xurl=https://a/")),
        *((query, "empty") for query in ("url", "url=&url=https://b", "url=%23a")),
        *((f"url=https%3A//a/{odd}", "a control char") for odd in ("%0D%0Ax", "%C2%85")),
        ("url=https%3A%2F%2Fa%2F?x=a+b", "bare . is a space"),
        *((f"url=https{rest}", "UTF-8") for rest in ("%3A//a/%FF", "://a/\xff")),
        *((f"url={rest}a", "escaped twice") for rest in ("https:%252F%252F", "HTTP%253a//")),
        ("url=https%3A%2F%2Fa%2F?x=1&y=2", "its = and & were not"),
        ("url=https:%2F%2Fa%2Fx%3Fb=1&c=2", "escaped in part"),  # Go's PathEscape
        ("url=https://a/x?b=%E4%26c=2", "escaped in part.*; send it as enc"),  # only the &
        *(
            (f"url=https://a/?b{rest}", "escaped in part")
            for rest in ("=%2F%26c=2%26e=", "%3Da%2C")
        ),
        ("url=https://a/?b%3D%E4%B8%AD%26c%3D2", "escaped in part"),  # okhttp
    ],
)
def test_what_was_spoilt_on_its_way_is_refused_with_the_reason(query: str, reason: str) -> None:
    with pytest.raises(BadPageUrl, match=reason):
        page_url(query.encode("latin-1"))


def test_the_length_that_counts_is_that_of_the_url_signed() -> None:
    longest = "https://a/" + "x" * (MAX_LENGTH - 10)
    assert signed(f"url={longest}#{longest}") == longest
    with pytest.raises(BadPageUrl, match="8192"):
        signed(f"url={longest}x")


# --- hosts ----------------------------------------------------------------------------------------

LISTED = ("h5.example.com", "*.example.net", "[::1]")
TRICKS = ["h5.example.com@evil.com/", "h5.example.com:80@evil.com/", "[::1]evil/"]
TRICKS += ["evil.com\\@h5.example.com/", "evil.com?@h5.example.com/", "evil.com#@h5.example.com/"]
TRICKS += ["a@h5.example.com@evil.com/", "h5.example.com:80:90/", "h5.example.com%2f@evil.com/"]
parts = st.sampled_from(
    ["https://", "http://", "h5.example.com", ".example.net", "evil.com", "@", ":", "/", "\\", "?"]
    + ["#", "%2f", "%40", "80", ".", "a", "[", "]", "::1", "。", "／", "\t", "\n", "xn--", "-", "_"]
    + ["%00", "ß", ";", "&", "=", "*", "ｈ", "::ffff:1.2.3.4", "0x7f.1"]
)


@given(st.lists(parts, max_size=8).map("".join))
@settings(max_examples=400, deadline=None)
def test_no_page_passes_as_one_of_a_listed_host_that_a_browser_loads_from_elsewhere(
    generated: str,
) -> None:
    for rest in (generated, *TRICKS):
        with suppress(BadPageUrl, PageHostNotAllowed):
            browser = browsers_host(page_url(escaped("https://" + rest).encode(), LISTED))
            # None: no browser opens it, so there is no page whose url it could be.
            assert browser is None or host_is_listed(browser, LISTED), (rest, browser)


def test_a_host_that_is_none_is_not_told_and_not_taken_for_one_that_is_missing() -> None:
    for url in ("https://h5.example.com%3Ftoken%3DSECRET", "https://h5.example.com%2Fcb%3Fc%3DS x"):
        with pytest.raises(BadPageUrl) as refused:
            page_url(escaped(url).encode(), LISTED)
        assert "SECRET" not in str(refused.value)


def test_the_list_names_hosts_and_all_that_is_below_one() -> None:
    listed = ["h5.example.com", "a.example.net", "a.b.c.example.net", "[::1]", "-._.example.net"]
    others = ["", "example.net", ".example.net", "evilexample.net", "h5.example.com.evil.com"]
    others += ["h5.example.com.", "xh5.example.com"]
    assert [host for host in listed + others if host_is_listed(host, LISTED)] == listed
    assert page_url(b"url=https://h5.example.com/", LISTED) == "https://h5.example.com/"
    for page in ("https://evil.com/", "https://evil.com"):
        with pytest.raises(PageHostNotAllowed, match=r"on evil\.com"):
            page_url(f"url={page}".encode(), LISTED)


# --- the table of tests/urls.py, on fewer pages ---------------------------------------------------

PROPER = ("encodeURIComponent", "raw", "yarl", "Spring, Swift", "Angular", "lighttpd")
SHARES: dict[tuple[float, float], list[str]] = {
    # at least so many per cent of the pages are right, at most so many wrong
    (100, 0): ["encodeURIComponent", "encodeURIComponent, and &_=", "form"],
    (97, 0): ["raw", "yarl", "Spring, Swift", "lighttpd"],
    (96, 0): ["escape()"],
    (0, 0): ["raw, and &_=", "  of which bytes can tell"],
    (90, 1): ["Angular"],
    (60, 0.6): ["encodeURI"],
    (50, 0.6): ["encodeURIComponent(encodeURI)"],
    (45, 2): ["Go's PathEscape"],
    (55, 8): ["okhttp, addEncoded", "only & escaped"],
    (50, 17): ["decoded, then raw", "encodeURIComponent(decode)"],
    (50, 20): ["only the first & escaped", "quote(safe=':/?&=')"],
}


def share(found: Outcomes, kind: str) -> float:
    return 100 * found[kind] / found.total()


def test_pages_are_right_or_refused_and_with_their_own_referer_hardly_any_is_wrong() -> None:
    sample = list(urls.pages(2000))
    table = measure([page for page in sample if not is_a_double(page)])
    assert sorted(table) == sorted(escaper for names in SHARES.values() for escaper in names)
    for (right, wrong), names in SHARES.items():
        for escaper in names:
            assert share(table[escaper], "right") >= right, escaper
            assert share(table[escaper], "wrong") <= wrong, escaper
    for escaper, found in measure(sample, referer=lambda page: page).items():
        assert share(found, "right") == 100 or escaper not in PROPER, escaper
        assert share(found, "wrong") < 2, escaper


def test_the_kinds_of_urls_that_real_pages_have_are_right_or_refused() -> None:
    for escaper, found in measure([page for page in real_pages() if not is_a_double(page)]).items():
        least, most = (97, 0) if escaper in ("encodeURIComponent", "form", "raw") else (0, 20)
        assert share(found, "right") >= least, escaper
        assert share(found, "wrong") <= most, escaper


# --- beside the Referer, and in the log -----------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "page", "reason"),
    [
        ("https://a/?x=b/c&y", "https://a/?x=b%2Fc&y", "url has '/' where its page has '%2F'"),
        ("https://a/%E3?x=%25", "https://a/%25E3?x=%25", "has '%E3' where its page has '%25E3'"),
        ("https://a/?x=%20", "https://a/?x=+", "url has '%20' where its page has '+'"),
        ("https://a/%e4", "https://a/%E4", "url has '%e4' where its page has '%E4'"),
    ],
)
def test_a_url_that_equals_the_referer_but_for_its_escapes_is_refused(
    url: str, page: str, reason: str
) -> None:
    with pytest.raises(BadPageUrl, match=re.escape(reason) + ", by the Referer; send it as enc"):
        signed(escaped(url), page)
    # On iOS the page may be signed by its url of entry.
    assert signed(escaped(url), page, is_entry=True) == url
    assert signed(escaped(url), "https://a/") == url


@pytest.mark.parametrize(
    ("url", "referer", "change"),
    [
        ("https://a/p", "https://a/p?code=SECRET", "it is cut before the page's '?code'"),
        ("https://a/?x=1", "https://a/?x=1%26SECRET", "it is cut before the page's '%26'"),
        ("https://a/?x=1", "https://a/?x=1&SECRET", "it is cut before the page's '&'"),
        ("https://a/?x=1&_=17", "https://a/?x=1", "it has '&_' added to it"),
        ("https://a/p?v=SECRET", "https://a/p", "it has '?v' added to it"),
        ("https://a/?x=1", "https://a/?x=1", ""),
        ("https://a/?x=1", "https://a/", ""),  # all that another origin tells
        ("https://a/?x=1", "", ""),
        ("https://a/app", "https://a/application?x=1", ""),
        ("https://a/?id=1", "https://a/?id=12", ""),
        ("https://a/?id=12", "https://a/?id=1", ""),
    ],
)
def test_a_referer_tells_whether_its_pages_url_was_cut_or_lengthened(
    url: str, referer: str, change: str
) -> None:
    assert cut_or_added(url, referer) == change


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        *((f"https://a/b{rest}", "a/b") for rest in ("?code=SECRET&c=SECRET", ";id=SECRET")),
        *((f"https://a/b%25{rest}SECRET", "a/b") for rest in ("23code=", "25252525252525253Fc=")),
        ("https%3A%2F%2Fa%2Fb%3Fcode%3DSECRET&x=SECRET", "a/b"),
        ("https%253A%252F%252Fa%252Fb%253Fcode%253DSECRET", "a/b"),
        ("https://somebody:SECRET@a/b", "a/b"),
        *((f"https://a/{path}", "a/中") for path in ("%E4%B8%AD", "\xe4\xb8\xad")),
        ("/getApi%253Furl=https:%2F%2Fa%3Fcode%3DSECRET", "/getApi"),
        ("%1B[2J", r"\x1b[2J"),
        ("https://a/" + "x" * 9000, "a/" + "x" * 197 + "…"),
    ],
)
def test_the_log_shows_host_and_path_however_a_url_is_escaped(sent: str, shown: str) -> None:
    assert for_log(sent) == shown
