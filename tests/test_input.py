"""Whatever a caller sends: the right signature or a sentence, and never harm."""

from __future__ import annotations

import time
from contextlib import suppress
from urllib.parse import quote, urlencode

import ada_url
from fuzz import fuzz
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from urls import browsers_href

from wechat_sign.errors import BadPageUrl
from wechat_sign.page_url import MAX_LENGTH, cut_or_added, for_log, host_of, page_url
from wechat_sign.process import SIZES

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
pieces = st.sampled_from(
    [
        *("&", "=", "+", "%", "%2F", "%20", "%E4%B8%AD", "%zz", "?", "/", "\\", "@", ":", ";"),
        *("url=", "中文", "http://", "https://", "#/route", "&url=", "..", "$", ",", "'", '"', "<"),
        *("\x00", " "),
    ]
)
tails = st.lists(st.one_of(text, pieces), max_size=8).map("".join)
hosts = st.sampled_from(
    ["h5.example.com", "a.example.net", "example.net", "evil.com", "[::1]", "xn--fsqu00a.com"]
    + ["H5.Example.COM", "h5.example.com.", "例子.com", "1.2.3.4", "0x7f.1", "h5。example.com"]
)
pages = st.builds(
    "{}{}{}".format, st.sampled_from(["http://", "https://", "HTTPS://"]), hosts, tails
)


def outcome(query: bytes) -> str | None:
    try:
        return page_url(query)
    except BadPageUrl:
        return None


@given(pages)
@example("https://h5.example.com/a%2Fb/%E4%B8%AD?x=1&y=a+b&z=%20")
@example("https://h5.example.com/#/route?x=1&y=2")
@settings(max_examples=100, deadline=None)
def test_however_it_is_sent_a_pages_url_is_right_or_refused(page: str) -> None:
    href = browsers_href(page)
    assume(href is not None)
    assert href is not None
    escaped = quote(href, safe="")
    signed = outcome(f"url={escaped}".encode())
    assert outcome(f"_=17&url={escaped}&callback=x".encode()) == signed
    assert outcome(urlencode({"url": href}).encode()) == signed
    assert outcome(f"url={escaped.replace('%3A', ':')}".encode()) == signed  # as axios does
    assert signed in (href, None)
    if ada_url.URL(href).host in ("h5.example.com", "[::1]"):
        assert signed == href or "%25" in href or "&amp;" in href
    assert outcome(b"url=" + href.encode()) in (href, None)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_whatever_comes_out_is_a_page(query: bytes) -> None:
    for candidate in (query, b"url=" + query, b"url=https://" + query, b"url=https%3A//a/" + query):
        url = outcome(candidate)
        if url is not None:
            assert len(url) <= MAX_LENGTH
            assert browsers_href(url) in (url, None) or "^" in url or "|" in url


STARTS = ["", "url=", "url=https://", "url=https%3A%2F%2F", "url=https://a/?", "url=https://a/x="]
ENDS = ["", "%3D", "%", "#", "&_=1795460908", "\xff"]
units = st.text(alphabet="htps:/%253ADF6@\\#?&=.;_[]+ ", min_size=1, max_size=12)


@given(st.sampled_from(STARTS), units, st.sampled_from(ENDS), units)
@example("url=https://h5.example.com/%20", "%3F", "", "%3F")
@example("", "&url", "", "@")
@settings(max_examples=150, deadline=None)
def test_no_request_takes_the_square_of_its_length(
    start: str, unit: str, end: str, other: str
) -> None:
    """What is four times as long takes four times as long, and not sixteen times."""

    def cpu(length: int) -> float:
        """Seconds of this thread for such a url and such a Referer."""
        query = f"{start}{unit * (length // len(unit))}{end}".encode("latin-1")
        referers = ["https://a/" + one * (length // len(one)) for one in (unit, other)]
        began = time.thread_time()
        for referer in ["", *referers]:
            with suppress(BadPageUrl):
                cut_or_added(page_url(query, (), referer), referer)
            host_of(referer)
            for_log(referer)
        return time.thread_time() - began

    longest = SIZES["max_header_size"]
    least = 0.002  # below that the clock tells nothing
    assert any(cpu(longest) < 6 * max(least, cpu(longest // 4)) for _ in range(3))


def test_mutated_requests_by_the_thousand_are_answered_and_do_no_harm() -> None:
    run = fuzz(1500, seed=1)
    assert {200, 204, 400, 404, 405} <= set(run.statuses)
    assert run.problems == []
