"""Whatever a caller sends: the right signature or a sentence, and never harm."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from urllib.parse import quote, urlencode

import ada_url
import aiohttp
import httpx
import pytest
import requests
import urllib3
from fuzz import fuzz
from harness import PATIENCE, Sandbox, Server, fetch, signature_of
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from urls import browsers_href

from wechat_sign.errors import BadPageUrl
from wechat_sign.page_url import MAX_LENGTH, cut_or_added, for_log, host_of, page_url
from wechat_sign.process import SIZES

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
pieces = st.sampled_from(
    ["&", "=", "+", "%", "%2F", "%20", "%E4%B8%AD", "%zz", "?", "/", "\\", "@", ":", ";", "url="]
    + [
        "中文",
        "http://",
        "https://",
        "#/route",
        "&url=",
        "..",
        "$",
        ",",
        "'",
        '"',
        "<",
        "\x00",
        " ",
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


@given(pages)
@settings(max_examples=100, deadline=None)
def test_what_a_person_typed_comes_out_as_the_browser_has_it_or_is_refused(page: str) -> None:
    url = outcome(f"url={quote(page, safe='')}".encode())
    assert url is None or url == browsers_href(page) or browsers_href(page) is None or "^" in url


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


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server("--sandbox", "--port", "0")
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.output
    assert "ERROR" not in server.output


@pytest.fixture(scope="module")
def connection(running: Server) -> Iterator[http.client.HTTPConnection]:
    client = http.client.HTTPConnection(*running.address, timeout=PATIENCE)
    yield client
    client.close()


def send(connection: http.client.HTTPConnection, query: bytes) -> tuple[int, dict[str, object]]:
    target = b"/getApi?" + bytes(b for b in query if 0x21 <= b != 0x7F)
    connection.putrequest("GET", "/")
    connection._buffer[0] = b"GET " + target + b" HTTP/1.1"  # type: ignore[attr-defined]
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@given(st.one_of(st.binary(max_size=300), pages.map(str.encode), tails.map(str.encode)))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_query_makes_the_server_fail(
    connection: http.client.HTTPConnection, query: bytes
) -> None:
    for candidate in (query, b"url=" + query, b"url=https://a/" + query):
        status, answer = send(connection, candidate)
        assert status in (200, 400), answer
        assert ("signature" in answer) is (status == 200)


def test_mutated_requests_by_the_thousand_are_answered_and_do_no_harm() -> None:
    run = fuzz(1500, seed=1)
    assert {200, 204, 400, 404, 405} <= set(run.statuses)
    assert run.problems == []


async def by_aiohttp(url: str, page: str, escaped: bool) -> str:
    async with aiohttp.ClientSession() as session:
        wanted = session.get(url, params={"url": page}) if escaped else session.get(url + page)
        async with wanted as answer:
            return answer.headers.get("Signed-Url", "")


def by_requests(url: str, page: str, escaped: bool) -> str:
    answer = requests.get(url, {"url": page}) if escaped else requests.get(url + page)
    return answer.headers.get("Signed-Url", "")


def by_urllib3(url: str, page: str, escaped: bool) -> str:
    with urllib3.PoolManager() as pool:
        fields = {"url": page} if escaped else None
        answer = pool.request("GET", url if escaped else url + page, fields=fields)
        return str(answer.headers.get("Signed-Url", ""))


def by_httpx(url: str, page: str, escaped: bool) -> str:
    answer = httpx.get(url, params={"url": page}) if escaped else httpx.get(url + page)
    return str(answer.headers.get("Signed-Url", ""))


CLIENTS: dict[str, Callable[[str, str, bool], str]] = {
    "aiohttp": lambda *given: asyncio.run(by_aiohttp(*given)),
    "requests": by_requests,
    "urllib3": by_urllib3,
    "httpx": by_httpx,
}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    "page",
    [
        "https://h5.example.com/",
        "https://h5.example.com/a?x=1&y=2",
        "https://h5.example.com/%E4%B8%AD/a?x=1&y=a+b&z=%20&w=",
        "https://h5.example.com/?u=https%3A%2F%2Fb.cn%2F%3Fc%3DH%2526M%26d%3D2&v=C%2B%2B&x=%5B1%5D",
    ],
)
def test_real_clients_have_the_pages_url_signed(running: Server, client: str, page: str) -> None:
    send = CLIENTS[client]
    assert send(f"{running.url}/getApi", page, True) == page
    assert send(f"{running.url}/getApi?url=", quote(page, safe=""), False) == page
    if client != "aiohttp":  # yarl decodes %3A and %2F in every url: raw ones don't survive it
        assert send(f"{running.url}/getApi?url=", page, False) == page


SENT = [
    "https://h5.example.com/a?x=1&y=2&z=a+b",
    "https://h5.example.com/%E4%B8%AD%2F?q=%26%3D%2B%25",
    "https://h5.example.com/?redirect=https://other.example.com/?a=1&b=2",
    "https://h5.example.com/?from=singlemessage&isappinstalled=0",
    "http://mp.weixin.qq.com/",
]


def test_every_way_to_send_a_page_is_signed_alike(shared: Server, shared_wechat: Sandbox) -> None:
    for page in SENT:
        escaped = quote(page, safe="")
        for way, query in {
            "raw": f"url={page}",
            "encodeURIComponent": "url=" + quote(page, safe="!'()*-._~"),
            "axios": f"url={escaped.replace('%3A', ':').replace('%24', '$').replace('%2C', ',')}",
            "jQuery": f"{urlencode({'url': page})}&_=1795440636000",
            "URLSearchParams": urlencode({"url": page + "#/route"}),
            "lower-case hex": "url=" + re.sub("%..", lambda found: found[0].lower(), escaped),
        }.items():
            status, answer = fetch(f"{shared.url}/getApi?{query}")
            assert status == 200, (way, page, answer)
            signature = signature_of(answer, shared_wechat.ticket, page)
            assert answer["signature"] == signature, (way, page)
        curl = ["curl", "-sG", f"{shared.url}/getApi", "--data-urlencode", f"url={page}#/route"]
        if shutil.which("curl"):
            answer = json.loads(subprocess.check_output(curl))
            assert answer["signature"] == signature_of(answer, shared_wechat.ticket, page), page
