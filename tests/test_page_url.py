from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from urllib.parse import quote, unquote

import pytest
import urls
from harness import PAGE
from hypothesis import given, settings
from hypothesis import strategies as st
from urls import (
    ESCAPERS,
    NOW,
    Outcomes,
    browsers_host,
    browsers_href,
    is_a_double,
    measure,
    real_pages,
)

from wechat_sign.errors import BadPageUrl, PageHostNotAllowed
from wechat_sign.page_url import (
    MAX_LENGTH,
    cut_or_added,
    for_log,
    host_is_listed,
    host_of,
    page_url,
)


@pytest.mark.parametrize(
    ("query", "url"),
    [
        # raw: to the end of the query, byte for byte
        (f"url={PAGE}", PAGE),
        (f"_=17&url={PAGE}", PAGE),
        ("url=http://a/?url=http://b/&c", "http://a/?url=http://b/&c"),
        ("url=https://a/?q=%23x&r=%zz", "https://a/?q=%23x&r=%zz"),
        ("url=https://a/#/route?x=1&y=2", "https://a/"),
        ("url=https://a/#/route?x%3D1%26y%3D2", "https://a/"),
        # escaped: once, and other parameters are ignored
        ("url=https%3A%2F%2Fa%2F%3Fx%3D1%26y%3D%252F%2523", "https://a/?x=1&y=%2F%23"),
        ("_=1&url=https%3A%2F%2Fa%2F&cb=2", "https://a/"),
        ("url=https:%2F%2Fa%2F%3Fx%3D%2B", "https://a/?x=+"),  # axios leaves the colon
        ("url=https%3A//a/b", "https://a/b"),
        ("url=https%3A%2F%2Fa%2F%23%2Froute&x=1", "https://a/"),
        ("url=https%3A%2F%2Fa%2F%3Fx%3D%2525%2520", "https://a/?x=%25%20"),
        ("url=https%3A%2F%2Fa%2F&url=https%3A%2F%2Fb%2F", "https://a/"),
        ("url=https%3A%2F%2Fa%2F%3Fx%3D%&_=1", "https://a/?x=%"),
    ],
)
def test_the_url_comes_out_as_the_page_has_it(query: str, url: str) -> None:
    assert page_url(query.encode()) == url


ESCAPED_WITH_A_BARE_SCHEME = [
    ("https://a/x?b%3D1%26c%3D2", "https://a/x?b=1&c=2"),
    ("https://a/x?b%3d1%26c%3d2", "https://a/x?b=1&c=2"),
    ("https://a/x?b%3D1", "https://a/x?b=1"),
    ("https://a/x?b%3D%26c%3D", "https://a/x?b=&c="),
    ("https://a/x?b%3D1%26c%3D2&callback=f", "https://a/x?b=1&c=2"),
    ("https://a/x?b%3D1%26c%3D2%23/route", "https://a/x?b=1&c=2"),
    ("https://a/x?b%3D%25E4%25B8%25AD%26c%3D%2525", "https://a/x?b=%E4%B8%AD&c=%25"),
    ("https://a/x?b%3Dd+e%26c%3D2", "https://a/x?b=d+e&c=2"),  # Spring; no href has a space
    ("https://a/x?u%3Dhttps://b/?c%3D1", "https://a/x?u=https://b/?c=1"),
    ("https://a/x?ids%5B%5D%3D1%26ids%5B%5D%3D2", "https://a/x?ids[]=1&ids[]=2"),
    ("https://a/x%3Bjsessionid%3D9F", "https://a/x;jsessionid=9F"),
    ("https://a/%25E4%25B8%25AD", "https://a/%E4%B8%AD"),
    ("https://a/?%25E4%25B8%25AD", "https://a/?%E4%B8%AD"),
    # by Angular, which leaves = as well
    ("https://a/x?b=1%26c=2", "https://a/x?b=1&c=2"),
    ("https://a/x?b=%26c=", "https://a/x?b=&c="),
    ("https://a/x?debug%26c=2", "https://a/x?debug&c=2"),
    ("https://a/%25E4?x=%25E5", "https://a/%E4?x=%E5"),
]


@pytest.mark.parametrize(("sent", "url"), ESCAPED_WITH_A_BARE_SCHEME)
def test_escaped_with_its_scheme_left_bare_it_is_unescaped_once(sent: str, url: str) -> None:
    assert page_url(f"url={sent}".encode()) == url


@pytest.mark.parametrize(
    "page",
    [
        "https://a/?b=%E4%B8%AD",  # no href has these bytes bare: they are its own escapes
        "https://a/%20?b=1",
        "https://a/b%2Fc?u=https%3A%2F%2Fb%2F%3Fc%3D1%26d%3D2",  # : and / stand bare
        "https://a/?c%3D1=2",  # = stands bare
        "https://a/?b=1%26c%3D2",
        "https://a/?b=%2B&c=2",
        "https://a/?q=100%25",  # no page has a % without its two digits
        "https://a/?b=1%2C2&c=3,4&d=%25E4",
        "https://a/?q=H%26M",
        "https://a/?ids%5B%5D=1",
        "https://a/?x=1&b=C%2B%2B",
        "https://a/?https%3A%2F%2Fb%2F%3Fx%3D1",
    ],
)
def test_raw_with_escapes_that_no_escaper_makes_it_is_left_alone(page: str) -> None:
    assert page_url(f"url={page}".encode()) == page


@pytest.mark.parametrize(
    ("raw", "escaped"),
    [
        ("https://a/?q=C%2B%2B", "https://a/?q=C++"),
        ("https://a/C%2B%2B", "https://a/C++"),
        ("https://a/?Yg%3D%3D", "https://a/?Yg=="),
        ("https://a/?b%3D", "https://a/?b="),
        ("https://a/s/Yg%3D%3D", "https://a/s/Yg=="),
        ("https://a/?b%26c", "https://a/?b&c"),
        ("https://a/?u=/b?c=1%26d=2", "https://a/?u=/b?c=1&d=2"),
        ("https://a/?b%3D1&c=2", "https://a/?b=1"),
        ("https://a/?b=1%26c=2&d=3", "https://a/?b=1&c=2"),
        ("https://a/?b=%25E4%25B8%25AD", "https://a/?b=%E4%B8%AD"),
    ],
)
def test_where_two_readings_are_possible_only_the_referer_decides(raw: str, escaped: str) -> None:
    query = f"url={raw}".encode()
    for referer in ("", "https://a/", "https://a/another"):
        with pytest.raises(BadPageUrl, match=r"encodeURIComponent\(location\.href"):
            page_url(query, (), referer)
    assert page_url(query, (), raw) == raw
    assert page_url(query, (), escaped) == escaped


@pytest.mark.parametrize(("sent", "url"), ESCAPED_WITH_A_BARE_SCHEME)
def test_a_referer_that_is_another_page_changes_nothing(sent: str, url: str) -> None:
    assert page_url(f"url={sent}".encode(), (), "https://a/entry") == url
    assert page_url(f"url={PAGE}".encode(), (), "https://a/entry") == PAGE


@pytest.mark.parametrize(
    "sent",
    [
        "https://a/?b=%25E4%25B8%25AD&c=2",
        "https://a/%25E4?b=1&c=2",
        "https://a/?b=%5B1%5D&c=%25E4",
        "https://a/?b=%25u5F20%25u4E09",  # of what JavaScript's escape() made
        quote("https://a/?b=%25E4%25B8%25AD&c=2", safe=""),
        quote("https://a/%25E4%25B8%25AD", safe=""),
        quote("https://a/?b=%5B1%5D&c=%25E4", safe=""),
    ],
)
def test_what_encode_uri_escaped_is_refused_unless_it_is_the_referer(sent: str) -> None:
    with pytest.raises(BadPageUrl, match=r"escaped by encodeURI, or twice.*Referer"):
        page_url(f"url={sent}".encode())
    page = sent if "://" in sent else unquote(sent)
    assert page_url(f"url={sent}".encode(), (), page) == page


@pytest.mark.parametrize(
    "page",
    [
        "https://a/?u=https%3A%2F%2Fb%2F%3Fv%3D%25E4",  # twice nested: encodeURI leaves no %3A
        "https://a/?q=100%25",
        "https://a/?b=[1]&c=%25E4",  # encodeURI leaves no [
        "https://a/?b=1%2C2&c=%25E4",
    ],
)
def test_a_page_with_some_double_escapes_of_its_own_is_signed(page: str) -> None:
    assert page_url(f"url={quote(page, safe='')}".encode()) == page


def test_okhttp_and_others_that_escape_in_part_are_refused() -> None:
    for sent in ("https://a/?b%3D%E4%B8%AD%26c%3D2", "https://a/?b%3Da%2Cb", "https://a/?b%3D%20"):
        with pytest.raises(BadPageUrl, match="escaped in part"):
            page_url(f"url={sent}".encode())


@pytest.mark.parametrize(
    "appended",
    [
        f"_={int(NOW * 1000)}",
        f"_={int(NOW * 1000) - 20 * 3600 * 1000}",  # jQuery's counts on from when it was loaded
        f"t={int(NOW * 1000) - 60_000}",
        f"_t={int(NOW)}",
        f"timestamp={int(NOW * 1000) + 60_000}",
    ],
)
def test_a_cache_buster_behind_a_raw_url_is_refused_unless_the_referer_tells(appended: str) -> None:
    for page in ("https://a/?b=1", "https://a/", "https://a/H&M/", "https://a/?b=%E4&c"):
        query = f"url={page}&{appended}".encode()
        with pytest.raises(
            BadPageUrl, match=f"&{appended.partition('=')[0]}=… seems to be appended"
        ):
            page_url(query, now=NOW)
        assert page_url(query, (), page, now=NOW) == page
        assert page_url(query, (), f"{page}&{appended}", now=NOW) == f"{page}&{appended}"
        assert page_url(f"url={quote(page, safe='')}&{appended}".encode(), now=NOW) == page


@pytest.mark.parametrize(
    "page",
    [
        f"https://a/?b=1&t={int(NOW * 1000) - 3_600_000}",
        f"https://a/?b=1&_={int(NOW * 1000) - 25 * 3_600_000}",
        f"https://a/?b=1&id={int(NOW * 1000)}",
        f"https://a/?t={int(NOW * 1000)}",
        f"https://a/?t={int(NOW * 1000)}&b=1",
        "https://a/?b=1&t=12345678901",
    ],
)
def test_a_time_of_the_pages_own_is_signed(page: str) -> None:
    assert page_url(f"url={page}".encode(), now=NOW) == page


def test_without_a_given_time_it_is_now() -> None:
    with pytest.raises(BadPageUrl, match="appended"):
        page_url(f"url=https://a/?b=1&t={time.time_ns() // 1_000_000}".encode())


@pytest.mark.parametrize(
    "query",
    [
        "url=https://a/x?b=%E4%26c=2",  # href.replace(/&/g, '%26')
        "url=https://a/x?b=%2Fd%26c=2%26e=",
        "url=https:%2F%2Fa%2Fx%3Fb=1&c=2",  # Go's PathEscape
        "url=https%3A%2F%2Fa%2Fx?b=1&c=2",
    ],
)
def test_what_was_escaped_in_part_is_refused(query: str) -> None:
    with pytest.raises(BadPageUrl, match=r"escaped in part.*; send it as encodeURIComponent"):
        page_url(query.encode())


@pytest.mark.parametrize(
    ("sent", "href"),
    [
        ("HTTPS://A.Example/?A=B", "https://a.example/?A=B"),
        ("https://a", "https://a/"),
        ("http://mp.weixin.qq.com?params=value", "http://mp.weixin.qq.com/?params=value"),
        ("https://a:443/x", "https://a/x"),
        ("http://a:80", "http://a/"),
        ("http://a:/", "http://a/"),
    ],
)
def test_scheme_host_and_port_are_signed_as_browsers_have_them(sent: str, href: str) -> None:
    assert browsers_href(sent) == href
    for query in (f"url={sent}", f"url={quote(sent, safe='')}"):
        assert page_url(query.encode()) == href


@pytest.mark.parametrize(
    "page",
    [
        "http://a:443/",
        "https://a:80/",
        "http://10.0.0.7:8080/?",
        "http://[::1]:8060/",
        "https://a/^|b/...//..x/%41%7e;p=(1)!*'$,@:~?/../&q={[`^|\\]}",
    ],
)
def test_what_browsers_have_is_signed_as_it_is(page: str) -> None:
    if "^" not in page:
        assert browsers_href(page) == page
    for query in (f"url={page}", f"url={quote(page, safe='')}"):
        assert page_url(query.encode()) == page


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ("https://a/活", "no 活: send it as it is there, not decoded"),
        ("https://a/?x=活", "no 活"),
        ("https://a/?x=#b&y=活", "no 活"),
        ("https://活.com/", "no 活"),
        ('https://a/?x="', 'no ": send it'),
        ("https://a/<", "no <"),
        ("https://a/?x=1#>", "no >"),
        ("https://a/`", "in the path"),
        ("https://a/{id}", "in the path"),
        ("https://a/b\\c", "in the path"),
        ("https://a/?x='", "in the query"),
        ("https://a/b/../c", r"a /\.\./ or"),
        ("https://a/b/%2e%2E?c", r"a /\.\./ or"),
        ("https://a/.", r"a /\.\./ or"),
        ("https://1.2.3/", "the host"),
        ("https://0x7f.1/", "the host"),
        ("https://h5%2eexample.com/", "the host"),
        ("https://a:080/", "the host"),
        ("https://a/?b=1&amp;c=2", "&amp; for &: it was taken from the source of HTML"),
        ("https://a/?x=a b", "whitespace or a control character"),
        ("https://a/?x=1#a b", "whitespace or a control character"),
    ],
)
def test_what_no_page_has_is_refused_with_the_reason(sent: str, reason: str) -> None:
    with pytest.raises(BadPageUrl, match=reason):
        page_url(f"url={quote(sent, safe='')}".encode())
    with pytest.raises(BadPageUrl, match=reason):
        page_url(f"url={sent}".encode())


def test_an_ampersand_of_html_is_signed_where_the_page_has_it() -> None:
    page = "https://a/?b=1&amp;c=2"
    assert page_url(f"url={page}".encode(), (), page) == page


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("", "missing"),
        ("URL=https://a/", "missing"),
        ("xurl=https://a/", "missing"),
        ("url", "empty"),
        ("url=&x=1", "empty"),
        ("url=%23a", "empty"),
        ("url=&url=https://b", "empty"),
        ("url=ftp://a/", "must begin with http:// or https://"),
        ("url=javascript%3Aalert(1)", "http:// or https://"),
        ("url=/?code=SECRET", "https://; send it as encodeURIComponent"),
        ("url=undefined", "must begin with"),
        ("url=http:/a", "http:// or https://"),
        ("url=https://", "no host"),
        ("url=https:///a", "no host"),
        ("url=https://:80/", "no host"),
        ("url=https://user@/", "no host"),
        ("url=https://user:pw@a/", "no host, or a user, which location.href never has"),
        ("url=https://a:b/", "no host"),
        ("url=https:%2F%2F\\a", "no host"),
        ("url=https%3A%2F%2Fa%2F%0D%0Ax", "whitespace or a control character"),
        ("url=https%3A%2F%2Fa%2F%00", "whitespace or a control character"),
        ("url=https%3A%2F%2Fa%2F%C2%85", "whitespace or a control character"),
        ("url=https%3A%2F%2Fa%2F%20x", "whitespace or a control character"),
        ("url=https%3A%2F%2Fa%2F?x=a+b", "bare . is a space"),
        ("url=https%3A%2F%2Fa%2F%E3%80%80", "whitespace or a control character"),
        ("url=https%3A%2F%2Fa%2F%FF", "UTF-8"),
        ("url=https%3A%2F%2Fa%2F%ED%A0%80", "UTF-8"),
        ("url=https%3A%2F%2Fa%2F?x=1&y=2", "its = and & were not"),
        ("url=https%253A%252F%252Fa%252F", "escaped twice"),
        ("url=https:%252F%252Fa%252F", "escaped twice"),
        ("url=HTTP%253a//a", "escaped twice"),
    ],
)
def test_what_is_no_page_is_refused_with_the_reason(query: str, reason: str) -> None:
    with pytest.raises(BadPageUrl, match=reason):
        page_url(query.encode())


def test_bytes_of_a_raw_url_that_are_no_utf_8_are_refused() -> None:
    with pytest.raises(BadPageUrl, match="UTF-8"):
        page_url(b"url=https://a/\xff")


def test_the_length_that_counts_is_that_of_the_url_signed() -> None:
    longest = "https://a/" + "x" * (MAX_LENGTH - 10)
    assert page_url(f"url={longest}#{longest}".encode()) == longest
    with pytest.raises(BadPageUrl, match="8192"):
        page_url(f"url={longest}x".encode())
    with pytest.raises(BadPageUrl, match="8192"):
        page_url(f"url={longest}活".encode())


HOSTS = {
    "https://h5.example.com/": "h5.example.com",
    "https://H5.Example.COM:8443?x": "h5.example.com",
    "https://h5.example.com#x": "h5.example.com",
    "https://user:pw@h5.example.com/": "h5.example.com",
    "https://h5.example.com@evil.com/": "evil.com",
    "https://h5.example.com:80@evil.com/": "evil.com",
    "https://a@h5.example.com@evil.com/": "evil.com",
    "https://evil.com\\@h5.example.com/": "evil.com",
    "https://evil.com/@h5.example.com/": "evil.com",
    "https://evil.com?@h5.example.com/": "evil.com",
    "https://evil.com#@h5.example.com/": "evil.com",
    "https://[::1]:80/": "[::1]",
    "https://[::1]evil/": "",
    "https://h5.example.com:80:90/": "",
    "ftp://h5.example.com/": "",
}


def test_the_host_is_the_one_a_browser_would_go_to() -> None:
    for url, host in HOSTS.items():
        assert browsers_host(url) in (host, None) or url.startswith("ftp:"), url
        for listed in ("h5.example.com", "evil.com", "[::1]"):
            with suppress(BadPageUrl, PageHostNotAllowed):
                page_url(f"url={quote(url, safe='')}".encode(), (listed,))
                assert listed == host, url


def test_a_host_that_is_none_is_not_told_and_not_taken_for_one_that_is_missing() -> None:
    for url in ("https://h5.example.com%3Ftoken%3DSECRET", "https://h5.example.com%2Fcb%3Fc%3DS x"):
        with pytest.raises(BadPageUrl) as refused:
            page_url(f"url={quote(url, safe='')}".encode(), LISTED)
        assert "SECRET" not in str(refused.value)


def test_the_host_of_an_origin() -> None:
    assert host_of("https://h5.example.com") == "h5.example.com"
    assert host_of("http://[::1]:8060") == "[::1]"
    for odd in ("null", "", "h5.example.com", "https://h5.example.com@evil.com", "https://a b"):
        assert host_of(odd) == ""


LISTED = ("h5.example.com", "*.example.net", "[::1]")


@pytest.mark.parametrize(
    "host", ["h5.example.com", "a.example.net", "a.b.c.example.net", "[::1]", "-._.example.net"]
)
def test_hosts_on_the_list(host: str) -> None:
    assert host_is_listed(host, LISTED)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "example.net",
        ".example.net",
        "evilexample.net",
        "h5.example.com.evil.com",
        "h5.example.com.",
        "xh5.example.com",
    ],
)
def test_hosts_not_on_the_list(host: str) -> None:
    assert not host_is_listed(host, LISTED)


def test_without_a_list_every_page_is_signed() -> None:
    assert page_url(b"url=https://anything/", ()) == "https://anything/"
    assert page_url(b"url=https://h5.example.com/", LISTED) == "https://h5.example.com/"
    with pytest.raises(PageHostNotAllowed, match=r"on evil\.com"):
        page_url(b"url=https://evil.com/", LISTED)


TRICKS = [
    *HOSTS,
    "https://evil.com\\.h5.example.com/",
    "https:\\\\evil.com\\@h5.example.com/",
    "https://h5.example.com%40evil.com/",
    "https://h5.example.com%2f@evil.com/",
    "https://evil.com%2f@h5.example.com/",
    "https://evil.com;@h5.example.com/",
    "https://h5.example.com.evil.com/",
    "https://h5.example.com./",
    "https://h5.example.com:443/",
    "https://h5.example.com:/",
    "https://h5.example.com:99999/",
    "https://h5.example.com:8a/",
    "https://h5%2eexample.com/",
    "https://h5.example.com%00.evil.com/",
    "https://h5。example.com/",
    "https://ｈ５.example.com/",
    "https://evil.com／.example.net/",
    "https://evil.com%2f.example.net/",
    "https://ß.example.net/",
    "https://xn--zca.example.net/",
    "https://[::ffff:1.2.3.4].example.net/",
    "https://[h5.example.com]/",
    "https:///h5.example.com/",
    "https:////evil.com/",
    "https:/\\evil.com/",
    "https://user@evil@h5.example.com/",
    "https://evil.com\t.example.net/",
    "https://evil\n.com/",
    "https://ev\ril.com@h5.example.com/",
    "https://.example.net/",
    "https://a..example.net/",
    "https://-.example.net/",
    "https://*.example.net/",
    "https://a_b.example.net/",
    "http://0x7f.1/",
    "https://evil.com/https://h5.example.com/",
]


def assert_no_trick(url: str) -> None:
    """No page passes as one of a listed host that a browser would load from elsewhere."""
    try:
        accepted = page_url(f"url={quote(url, safe='')}".encode(), LISTED)
    except (BadPageUrl, PageHostNotAllowed):
        return
    browser = browsers_host(accepted)
    # None: no browser opens it, so there is no page whose url it could be.
    assert browser is None or host_is_listed(browser, LISTED), (url, browser)


def test_no_collected_trick_passes_the_host_check() -> None:
    for url in TRICKS:
        assert_no_trick(url)


parts = st.sampled_from(
    ["https://", "http://", "h5.example.com", ".example.net", "evil.com", "@", ":", "/", "\\", "?"]
    + ["#", "%2f", "%40", "80", ".", "a", "[", "]", "::1", "。", "／", "\t", "\n", "xn--", "-", "_"]
    + ["%00", "ß", ";", "&", "=", "*"]
)


@given(st.lists(parts, max_size=8).map("".join))
@settings(max_examples=300, deadline=None)
def test_nor_does_any_generated_one(rest: str) -> None:
    assert_no_trick("https://" + rest)


# --- the table of tests/urls.py, on fewer pages ---------------------------------------------------

PROPER = ("encodeURIComponent", "raw", "yarl", "Spring, Swift", "Angular", "lighttpd")
SHARES = {
    # escaper: at least so many per cent of the pages are right, at most so many wrong
    "encodeURIComponent": (100, 0),
    "encodeURIComponent, and &_=": (100, 0),
    "form": (100, 0),
    "raw": (98, 0),
    "raw, and &_=": (0, 0),
    "yarl": (97, 0),
    "Spring, Swift": (97, 0),
    "lighttpd": (97, 0),
    "Angular": (90, 1),
    "okhttp, addEncoded": (55, 8),
    "only & escaped": (60, 8),
    "only the first & escaped": (50, 20),
    "Go's PathEscape": (45, 2),
    "escape()": (96, 0),
    "decoded, then raw": (50, 17),
    "encodeURI": (60, 0.6),
    "quote(safe=':/?&=')": (50, 18),
    "encodeURIComponent(encodeURI)": (50, 0.6),
    "encodeURIComponent(decode)": (50, 17),
    "  of which bytes can tell": (0, 0),
}


@cache
def sample() -> list[str]:
    return list(urls.pages(2000))


def share(found: Outcomes, kind: str) -> float:
    return 100 * found[kind] / found.total()


def test_pages_are_right_or_refused() -> None:
    table = measure([page for page in sample() if not is_a_double(page)])
    assert set(table) == set(SHARES)
    for escaper, (right, wrong) in SHARES.items():
        assert share(table[escaper], "right") >= right, escaper
        assert share(table[escaper], "wrong") <= wrong, escaper


def test_with_the_pages_own_referer_every_proper_escaper_is_right_and_hardly_any_wrong() -> None:
    table = measure(sample(), referer=lambda page: page)
    for escaper, found in table.items():
        assert share(found, "right") == 100 or escaper not in PROPER, escaper
        assert share(found, "wrong") < 2, escaper


def test_the_kinds_of_urls_that_real_pages_have_are_right_or_refused() -> None:
    for escaper, found in measure([page for page in real_pages() if not is_a_double(page)]).items():
        least, most = (97, 0) if escaper in ("encodeURIComponent", "form", "raw") else (0, 20)
        assert share(found, "right") >= least, escaper
        assert share(found, "wrong") <= most, escaper


def test_the_sample_is_of_many_kinds() -> None:
    kinds = {"%25": 50, "%E4": 150, "%3A%2F%2F": 50, "=&": 15, "%26": 50, "[": 5, "{": 5}
    for kind, least in kinds.items():
        assert sum(kind in page for page in sample()) > least, kind
    assert len(set(sample())) > 1250


def test_yarls_rule_is_yarls() -> None:
    rule: Callable[[str], str] = urls.yarl_rule
    assert urls.yarl_is_here
    assert all(rule(page) == ESCAPERS["yarl"](page) for page in sample()[:1000])


@pytest.mark.parametrize(
    ("url", "page", "reason"),
    [
        ("https://a/?x=%2B", "https://a/?x=+", "url has '%2B' where its page has '+'"),
        ("https://a/?x=b/c&y", "https://a/?x=b%2Fc&y", "url has '/' where its page has '%2F'"),
        (
            "https://a/%E3?x=%25",
            "https://a/%25E3?x=%25",
            "url has '%E3' where its page has '%25E3'",
        ),
        ("https://a/?x=%20", "https://a/?x=+", "url has '%20' where its page has '+'"),
        ("https://a/%e4", "https://a/%E4", "url has '%e4' where its page has '%E4'"),
    ],
)
def test_a_url_that_equals_the_referer_but_for_its_escapes_is_refused(
    url: str, page: str, reason: str
) -> None:
    query = f"url={quote(url, safe='')}".encode()
    with pytest.raises(BadPageUrl, match=re.escape(reason) + ", by the Referer; send it as enc"):
        page_url(query, (), page)
    # On iOS the page may be signed by its url of entry.
    assert page_url(query, (), page, is_entry=True) == url
    assert page_url(query, (), "https://a/") == url


@pytest.mark.parametrize(
    ("url", "referer", "change"),
    [
        ("https://a/p", "https://a/p?code=SECRET", "it is cut before the page's '?code'"),
        ("https://a/?x=1", "https://a/?x=1&code=SECRET", "it is cut before the page's '&code'"),
        ("https://a/?x=1", "https://a/?x=1%26SECRET", "it is cut before the page's '%26'"),
        ("https://a/?x=1", "https://a/?x=1&SECRET", "it is cut before the page's '&'"),
        ("https://a/?x=1&_=17", "https://a/?x=1", "it has '&_' added to it"),
        ("https://a/p?v=SECRET", "https://a/p", "it has '?v' added to it"),
        ("https://a/?x=1", "https://a/?x=1", ""),
        ("https://a/?x=1", "https://a/", ""),  # all that another origin tells
        ("https://a/?x=1", "", ""),
        ("https://a/", "https://a/detail", ""),
        ("https://a/app", "https://a/application?x=1", ""),
        ("https://a/?id=1", "https://a/?id=12", ""),
        ("https://a/?id=12", "https://a/p?id=1", ""),
        ("https://a/?id=1", "https://b/?id=1", ""),
        ("https://a/?id=1", "http://a/?id=1&x=2", ""),
        ("https://a/?id=1", "no url", ""),
    ],
)
def test_a_referer_tells_whether_its_pages_url_was_cut_or_lengthened(
    url: str, referer: str, change: str
) -> None:
    assert cut_or_added(url, referer) == change


def test_what_the_log_shows_of_a_url_is_printable_and_short_and_has_no_query() -> None:
    assert for_log("https://h5.example.com/a?code=SECRET#x") == "h5.example.com/a"
    assert for_log("https://somebody:SECRET@h5.example.com/a") == "h5.example.com/a"
    assert for_log("nonsense\x9b2J") == "nonsense\N{REPLACEMENT CHARACTER}2J"
    assert for_log("%1B[2J") == r"\x1b[2J"
    assert for_log("") == ""
    assert len(for_log("https://a/" + "x" * 9000)) == 200


@pytest.mark.parametrize(
    "sent",
    [
        "https://h5.example.com/a?code=SECRET&openid=SECRET",
        "https%3A%2F%2Fh5.example.com%2Fa%3Fcode%3DSECRET&openid=SECRET",
        "https%253A%252F%252Fh5.example.com%252Fa%253Fcode%253DSECRET",
        "https://h5.example.com/a%2523code%253DSECRET",
        "https://h5.example.com/a;jsessionid=SECRET",
        "https://h5.example.com/a%25252525252525253Fcode=SECRET",
        "h5.example.com/a?code=SECRET",
    ],
)
def test_however_a_url_is_escaped_the_log_shows_host_and_path(sent: str) -> None:
    assert for_log(sent) == "h5.example.com/a"
    assert for_log("https://h5.example.com/%E4%B8%AD/%FF") == "h5.example.com/中/�"
    assert for_log("https://h5.example.com/\xe4\xb8\xad") == "h5.example.com/中"
    assert for_log("/getApi%253Furl=https:%2F%2Fa%3Fcode%3DSECRET") == "/getApi"


@pytest.mark.parametrize("query", ["off=50%25&from=timeline", "off=50%25off", "t=100%25+cotton"])
def test_a_percent_sign_of_the_pages_own_is_not_taken_for_an_escape_escaped(query: str) -> None:
    page = f"https://h5.example.com/?{query}"
    assert page_url(f"url={quote(page, safe='')}".encode()) == page
