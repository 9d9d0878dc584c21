"""Page urls by the thousand, sent by every escaper there is: who is signed right, refused, wrong.

    .venv/bin/python tests/urls.py --pages 20000

A page is what a browser (ada, a WHATWG parser) has in location.href for links as people and
frameworks write them: generated ones, in which awkward values are more frequent than in the field,
and those of page-urls.txt, which are of the kinds that real pages have.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, quote_plus, unquote, urlencode

import ada_url
from yarl import URL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wechat_sign.errors import BadPageUrl
from wechat_sign.page_url import page_url

NOW = 1795460908.347
"""When every page of the sample is opened and sent."""
JS_UNRESERVED = "!'()*-._~"

Outcomes = Counter[str]


# --- pages ---------------------------------------------------------------------------------------


def token(rng: random.Random) -> str:
    return base64.b64encode(rng.randbytes(rng.randint(4, 40))).decode()


def address(rng: random.Random, depth: int) -> str:
    """A url as a value: with a query of its own, which may hold another."""
    path = rng.choice(["/", "/pay/result", "/u/中心", "/index.html", "/a/b/"])
    pairs = [(name(rng), value(rng, depth + 1)) for _ in range(rng.randint(0, 3))]
    query = "&".join(f"{n}={component(v)}" for n, v in pairs)
    origin = rng.choice(["https://m.example.com", "http://pay.example.org", "https://a.cn", ""])
    return f"{origin}{path}{'?' if query else ''}{query}"


def name(rng: random.Random) -> str:
    usual = ["id", "uid", "openid", "code", "state", "q", "name", "title", "type", "redirect"]
    usual += ["utm_source", "goods_id", "shareId", "token", "data", "date", "x-y", "a.b"]
    return rng.choice(usual if rng.random() < 0.98 else ["ids[]", "filter[name]", "名称"])


def value(rng: random.Random, depth: int = 0) -> str:
    plain: list[Callable[[], str]] = [
        lambda: str(rng.randint(0, 10**9)),
        lambda: rng.choice(["singlemessage", "detail", "zh_CN", "true", "abc", "STATE", "v1.2"]),
        lambda: f"{rng.getrandbits(128):032x}",
        lambda: base64.urlsafe_b64encode(rng.randbytes(21)).decode(),
        lambda: f"2024-0{rng.randint(1, 9)}-1{rng.randint(0, 9)}",
    ]
    awkward: list[Callable[[], str]] = [
        lambda: rng.choice(["张三", "北京·朝阳", "红烧肉", "活动", "é", "😀", "立即购买！"]),
        lambda: rng.choice(["新 年 快乐", "hello world", "It's 5 o'clock", "A - B (c)", "wow!"]),
        lambda: token(rng),
        lambda: "",
        lambda: rng.choice(["H&M", "AT&T", "a&b=c", "x=1", "1+1=2", "a;b", "a,b,c"]),
        lambda: rng.choice(["C++", "+8613800000000", "g++", "A+"]),
        lambda: rng.choice(["50%", "100%", "a/b", "a?b", "#ff0000", "#/route", "@me", "$5", "~x"]),
        lambda: rng.choice(["2024-05-01 12:30:00", "2024-05-01T12:30:00+08:00", "12:30", "5/1"]),
        lambda: json.dumps({"id": rng.randint(1, 99), "名": ["a", None]}, ensure_ascii=False),
        lambda: json.dumps([rng.randint(1, 99), "b"], separators=(",", ":")),
        lambda: rng.choice(["30.25,120.17", "a@b.com", "x*y", "[1]", "a|b", "<b>", 'say "hi"']),
        lambda: address(rng, depth) if depth < 3 else "/home",
        lambda: address(rng, depth) if depth < 3 else "/home",
        lambda: str(int(NOW * 1000) - rng.choice([1500, 86_400_000, 3_000_000_000])),
    ]
    kinds = plain if rng.random() < 0.6 else awkward
    return rng.choice(kinds)()


def component(text: str) -> str:
    """encodeURIComponent"""
    return quote(text, safe=JS_UNRESERVED)


def as_typed(text: str) -> str:
    """A value as a template or a person writes it into a link: only what would break it is
    escaped; a whole value with & in it by a tool, but for a nested url."""
    if "&" in text and "?" not in text:
        return component(text)
    return text.replace("%", "%25").replace("&", "%26").replace("#", "%23").replace("+", "%2B")


def path(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.2:
        return "/"
    if kind < 0.78:
        return rng.choice(
            ["/index.html", "/goods/detail", "/wx/share.html", "/index.php/Home/Index", "/a/b/c/"]
            + ["/2024/05/01/title-of-it.html", "/@user/post", "/~me/x.htm", "/app/v1.2/", "/s//t"]
        )
    if kind < 0.88:
        return "/" + rng.choice(["活动.html", "中文/页面", "商品/详情/", "关于 我们", "é"])
    if kind < 0.95:
        hexadecimal = f"{rng.getrandbits(64):x}"
        return rng.choice([f"/s/{hexadecimal}", f"/shop;jsessionid={hexadecimal}"])
    return rng.choice(
        ["/C++/faq", "/C%2B%2B", "/H&M/", "/a b.html", "/x,y;z", "/p(1)!", "/s/" + token(rng)]
        + ["/s/" + component(token(rng)), "/proxy/" + component("https://b.example.com/x?y=1")]
    )


def query(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.25:
        return ""
    if kind < 0.29:
        alone = ["?", "?debug", "?debug&v=2", f"?{token(rng)}", f"?{rng.getrandbits(32)}"]
        return rng.choice(alone)
    if kind < 0.30:
        return "?" + component(rng.choice([token(rng), "关键词", "/a/b", "https://b.cn/?x=1"]))
    writers: list[Callable[[str], str]] = [component, quote_plus, as_typed]
    writer = rng.choices(writers, [6, 2, 2])[0]
    pairs = []
    for _ in range(min(int(rng.expovariate(0.5)) + 1, 9)):
        key = name(rng)
        escaped = component(key) if rng.random() < 0.5 else key
        pairs.append(f"{escaped}={writer(value(rng))}")
    if rng.random() < 0.03:
        pairs.insert(rng.randint(0, len(pairs)), "t=" + str(int(NOW * 1000) - rng.randint(0, 9999)))
    if rng.random() < 0.15:
        pairs.append("from=singlemessage&isappinstalled=0")
    return "?" + "&".join(pairs)


def pages(count: int) -> Iterator[str]:
    """location.href, without fragment."""
    rng = random.Random(9)
    for _ in range(count):
        scheme = rng.choices(["https://", "http://"], [9, 1])[0]
        host = rng.choice(["h5.example.com", "m.shop.example.cn", "example.net:8080", "10.0.0.7"])
        href = browsers_href(scheme + host + path(rng) + query(rng))
        assert href is not None
        yield href


def pages_escaped_twice() -> Iterator[str]:
    """As encodeURI(encodeURI(name)) makes them, a habit of pages before old Tomcats."""
    rng = random.Random(9)
    for _ in range(500):
        text = component(component(rng.choice(["张三", "北京", "红烧肉", "é"])))
        pairs = [f"id={rng.getrandbits(20)}", f"name={text}", "from=singlemessage"]
        yield f"https://h5.example.com/detail.html?{'&'.join(pairs[rng.randint(0, 1) : 3])}"


def real_pages() -> list[str]:
    """Those of page-urls.txt, in which hosts, ids and names are made up."""
    lines = Path(__file__).with_name("page-urls.txt").read_text(encoding="utf-8").splitlines()
    hrefs = [browsers_href(line.partition("\t")[2]) for line in lines if line[0] != "#"]
    return [href for href in hrefs if href is not None]


def browsers_href(url: str) -> str | None:
    """location.href without its fragment; None where a browser takes the url for none."""
    with suppress(ValueError):
        return str(ada_url.URL(url).href).partition("#")[0]
    return None


def browsers_host(url: str) -> str | None:
    """The host that a browser goes to; None where it takes the url for none."""
    with suppress(ValueError):
        return str(ada_url.URL(url).hostname)
    return None


def is_a_double(page: str) -> bool:
    """Whether it is, letter by letter, what encodeURI makes of another page: no byte tells."""
    other = re.sub("(?i)%(25|5[B-E]|60|7[BCD])", lambda found: chr(int(found[1], 16)), page)
    return "%25" in page and encode_uri(other) == page and browsers_href(other) == other


# --- escapers: from the page's url to the query string -------------------------------------------


def encode_uri(text: str) -> str:
    return quote(text, safe=";,/?:@&=+$-_.!~*'()#")


def decode_uri_component(text: str) -> str:
    """Raises ValueError where JavaScript raises URIError."""
    if re.search("%(?![0-9A-Fa-f]{2})", text):
        raise ValueError("URI malformed")
    return unquote(text, errors="strict")


ESCAPERS: dict[str, Callable[[str], str]] = {
    "encodeURIComponent": lambda page: f"url={component(page)}",
    "encodeURIComponent, and &_=": lambda page: f"_t=1&url={component(page)}&_={int(NOW * 1000)}",
    "form": lambda page: urlencode({"url": page}),
    "raw": lambda page: f"url={page}",
    "raw, and &_=": lambda page: f"url={page}&_={int(NOW * 1000)}",
    # aiohttp's `params`
    "yarl": lambda page: URL("http://a/").with_query({"url": page}).raw_query_string,
    # RestTemplate's `{url}`: HierarchicalUriComponents.Type.QUERY_PARAM; Swift's URLQueryItem
    "Spring, Swift": lambda page: "url=" + quote(page, safe="-._~!$'()*+,;:@/?"),
    # HttpParams, packages/common/http/src/params.ts
    "Angular": lambda page: "url=" + quote(page, safe=JS_UNRESERVED + "@:$,;=?/"),
    # encodeURIComponent behind burl.c, url-normalize-required, which Debian switches on
    "lighttpd": lambda page: "url=" + quote(page, safe=JS_UNRESERVED + "$,/:?@"),
    # addEncodedQueryParameter: what is escaped stays, & and = are escaped all the same
    "okhttp, addEncoded": lambda page: (
        "url=" + re.sub("[\"'<>#&= ]", lambda found: f"%{ord(found[0]):02X}", page)
    ),
    "only & escaped": lambda page: "url=" + page.replace("&", "%26"),
    "only the first & escaped": lambda page: "url=" + page.replace("&", "%26", 1),
    "Go's PathEscape": lambda page: "url=" + quote(page, safe="-_.~$&+:=@"),
    "escape()": lambda page: "url=" + quote(page, safe="@*_+-./"),
    "decoded, then raw": lambda page: f"url={decode_uri_component(page)}",
    "encodeURI": lambda page: f"url={encode_uri(page)}",
    "quote(safe=':/?&=')": lambda page: "url=" + quote(page, safe=":/?&="),
    "encodeURIComponent(encodeURI)": lambda page: f"url={component(encode_uri(page))}",
    "encodeURIComponent(decode)": lambda page: f"url={component(decode_uri_component(page))}",
    "  of which bytes can tell": lambda page: telling(decode_uri_component(page)),
}


def telling(decoded: str) -> str:
    if decoded.isascii() and not re.search('[ "<>]', decoded):
        raise ValueError("no byte of it tells that it was decoded")
    return f"url={component(decoded)}"


# --- the table -----------------------------------------------------------------------------------


def outcome(page: str, query: str, referer: str) -> str:
    try:
        return "right" if page_url(query.encode(), (), referer, now=NOW) == page else "wrong"
    except BadPageUrl:
        return "refused"


def measure(
    sample: Sequence[str], *, referer: Callable[[str], str] = lambda _: ""
) -> dict[str, Outcomes]:
    """What becomes of the pages, by escaper; `referer` gives what comes with a page's request."""
    counted: dict[str, Outcomes] = {escaper: Counter() for escaper in ESCAPERS}
    for escaper, escape in ESCAPERS.items():
        for page in sample:
            with suppress(ValueError):  # the page has no such url: JavaScript raises URIError
                counted[escaper][outcome(page, escape(page), referer(page))] += 1
    return counted


REFERERS: dict[str, Callable[[str], str]] = {
    "none": lambda _: "",
    "an origin": lambda page: "/".join(page.split("/", 3)[:3]) + "/",
    "the page": lambda page: page,
}


def print_table(title: str, sample: Sequence[str]) -> None:
    tables = [measure(sample, referer=referer) for referer in REFERERS.values()]
    print(f"\n{title}: {len(sample)}; % right, % refused, number wrong, by the Referer\n")
    print(" " * 31 + "".join(f"{name:>24}" for name in REFERERS))
    for escaper in ESCAPERS:
        row = f"{escaper:31}"
        for found in (table[escaper] for table in tables):
            shares = [100 * found[kind] / max(1, found.total()) for kind in ("right", "refused")]
            row += f"{shares[0]:9.2f}{shares[1]:8.2f}{found['wrong']:7}"
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pages", type=int, default=20_000)
    sample = list(pages(parser.parse_args().pages))
    print_table("Pages", [page for page in sample if not is_a_double(page)])
    print_table("Pages of page-urls.txt", [page for page in real_pages() if not is_a_double(page)])
    twice = [page for page in sample if is_a_double(page)] + list(pages_escaped_twice())
    print_table("Pages escaped twice in themselves, each encodeURI of another page", twice)


if __name__ == "__main__":
    main()
