from __future__ import annotations

import pytest

from wechat_sign.errors import BadPageUrl, PageHostNotAllowed
from wechat_sign.page_url import MAX_LENGTH, host_is_listed, host_of, page_url

PAGE = "https://h5.example.com/a%2Fb/%E4%B8%AD?x=1&y=a+b&z=%20"


@pytest.mark.parametrize(
    ("query", "url"),
    [
        # raw: to the end of the query, byte for byte
        (f"url={PAGE}", PAGE),
        (f"_=17&url={PAGE}", PAGE),
        ("url=http://a/?url=http://b/&c", "http://a/?url=http://b/&c"),
        ("url=https://a/?q=%23x&r=%zz", "https://a/?q=%23x&r=%zz"),
        ("url=HTTPS://A.example/?a=1&b=2", "HTTPS://A.example/?a=1&b=2"),
        ("url=https://a/#/route?x=1&y=2", "https://a/"),
        # escaped: once, and other parameters are ignored
        ("url=https%3A%2F%2Fa%2F%3Fx%3D1%26y%3D%252F%2523", "https://a/?x=1&y=%2F%23"),
        ("_=1&url=https%3A%2F%2Fa%2F&cb=2", "https://a/"),
        ("url=https:%2F%2Fa%2F%3Fx%3D%2B", "https://a/?x=+"),  # axios leaves the colon
        ("url=https%3A//a/b", "https://a/b"),
        ("url=https%3A%2F%2Fa%2F%23%2Froute&x=1", "https://a/"),
        ("url=https%3A%2F%2Fa%2F%E4%B8%AD", "https://a/中"),
        # nothing else is changed
        ("url=https%3A%2F%2FA.Example", "https://A.Example"),
        ("url=http://a?", "http://a?"),
        ("url=http://a/../%7e//", "http://a/../%7e//"),
    ],
)
def test_the_url_comes_out_as_the_page_has_it(query: str, url: str) -> None:
    assert page_url(query.encode()) == url


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("", "missing"),
        ("URL=https://a/", "missing"),
        ("xurl=https://a/", "missing"),
        ("url", "empty"),
        ("url=&x=1", "empty"),
        ("url=%23a", "empty"),
        ("url=https%3A%2F%2Fa&url=https%3A%2F%2Fb", "more than one"),
        ("url=&url=https://b", "more than one"),
        ("url=ftp://a/", "http:// or https://"),
        ("url=javascript%3Aalert(1)", "http:// or https://"),
        ("url=h5.example.com", "http:// or https://"),
        ("url=undefined", "http:// or https://"),
        ("url=http:/a", "http:// or https://"),
        ("url=https://", "no host"),
        ("url=https:///a", "no host"),
        ("url=https://:80/", "no host"),
        ("url=https://user@/", "no host"),
        ("url=https://a:b/", "no host"),
        ("url=https:%2F%2F\\a", "no host"),
        ("url=https%3A%2F%2Fa%2F%0D%0Ax", "blank or a control character"),
        ("url=https%3A%2F%2Fa%2F%00", "blank or a control character"),
        ("url=https%3A%2F%2Fa%2F%C2%85", "blank or a control character"),
        ("url=https%3A%2F%2Fa%2F%20x", "blank or a control character"),
        ("url=https%3A%2F%2Fa%2F?x=a+b", "blank or a control character"),
        ("url=https%3A%2F%2Fa%2F%E3%80%80", "blank or a control character"),
        ("url=https%3A%2F%2Fa%2F%FF", "UTF-8"),
        ("url=https%3A%2F%2Fa%2F%ED%A0%80", "UTF-8"),
        ("url=https%3A%2F%2Fa%2F%zz", "two hex digits"),
        ("url=https%3A%2F%2Fa%2F%", "two hex digits"),
        ("url=https%253A%252F%252Fa%252F", "escaped twice"),
        ("url=https:%252F%252Fa%252F", "escaped twice"),
        ("url=HTTP%253a//a", "escaped twice"),
    ],
)
def test_what_is_no_page_is_refused_with_the_reason(query: str, reason: str) -> None:
    with pytest.raises(BadPageUrl, match=reason):
        page_url(query.encode())


def test_bytes_of_a_raw_url_that_are_no_utf_8_are_refused() -> None:
    assert page_url("url=https://a/中".encode()) == "https://a/中"
    with pytest.raises(BadPageUrl, match="UTF-8"):
        page_url(b"url=https://a/\xff")


def test_the_length_that_counts_is_that_of_the_url_signed() -> None:
    longest = "https://a/" + "x" * (MAX_LENGTH - 10)
    assert page_url(f"url={longest}#{longest}".encode()) == longest
    with pytest.raises(BadPageUrl, match="2048"):
        page_url(f"url={longest}x".encode())


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://h5.example.com/", "h5.example.com"),
        ("https://H5.Example.COM:8443?x", "h5.example.com"),
        ("https://h5.example.com#x", "h5.example.com"),
        ("https://user:pw@h5.example.com/", "h5.example.com"),
        ("https://h5.example.com@evil.com/", "evil.com"),
        ("https://h5.example.com:80@evil.com/", "evil.com"),
        ("https://a@h5.example.com@evil.com/", "evil.com"),
        ("https://evil.com\\@h5.example.com/", "evil.com"),
        ("https://evil.com/@h5.example.com/", "evil.com"),
        ("https://evil.com?@h5.example.com/", "evil.com"),
        ("https://evil.com#@h5.example.com/", "evil.com"),
        ("https://[::1]:80/", "[::1]"),
        ("https://[::1]evil/", ""),
        ("https://h5.example.com:80:90/", ""),
        ("ftp://h5.example.com/", ""),
    ],
)
def test_the_host_is_the_one_a_browser_would_go_to(url: str, host: str) -> None:
    assert host_of(url) == host


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
        "evil.com%2f.example.net",
        "evil.com／.example.net",
        "evil.com\n.example.net",
    ],
)
def test_hosts_not_on_the_list(host: str) -> None:
    assert not host_is_listed(host, LISTED)


def test_without_a_list_every_page_is_signed() -> None:
    assert page_url(b"url=https://anything/", ()) == "https://anything/"
    assert page_url(b"url=https://h5.example.com/", LISTED) == "https://h5.example.com/"
    with pytest.raises(PageHostNotAllowed, match=r"on evil\.com"):
        page_url(b"url=https://h5.example.com@evil.com/", LISTED)
