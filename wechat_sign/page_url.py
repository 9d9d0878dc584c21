"""From the query string of a request to the url of the page: right, or refused with the reason.

What is signed has to be the very string that `location.href.split('#')[0]` has in the page.
Send it escaped, by encodeURIComponent; raw works where it comes last in the query.

| what follows `url=`                                      | is read as                            |
|----------------------------------------------------------|---------------------------------------|
| `https%3A…`, `https:%2F…`                                | escaped, up to the next &             |
| `https://…`, no escape before the first &                | raw, to the end                       |
| … with `%E4`, `%20`, `%2F`                               | raw: no escaper makes those           |
| … with `?x%3D1%26y%3D2`, `?x=1%26y=2`, or `/%25E4`       | escaped, with `:` and `/` left bare   |
| … with `?x=%2B`, `/x%26y`, or the like                   | raw or escaped, whichever the Referer |
|                                                          | equals; refused where it is neither   |

Angular, aiohttp, Spring, okhttp, Swift and lighttpd leave `:` and `/` bare. What they escape is an
href, which is ASCII. A page that has `/%25E4` itself has to be sent escaped.

Refused, because a step on the way changed it: a url that equals the Referer but for its escapes
(on iOS it may be the url of entry); one of which only the & or only the path was escaped.
Refused unless the Referer equals it, because it is a mistake more often than a page's url: all
that encodeURI can have escaped once more, `&amp;`, and raw with a cache buster at its end.
Brought into the browser's form, because that is exact: scheme and host in upper case, :443 on
https and :80 on http, a host without a / behind it. Refused, because it was decoded or typed and
more may be lost: non-ASCII, whitespace, `"<>`; `{}`, backslash, backtick and `/../` in a path;
' in a query. Browsers differ on ^ and | in a path: they are left alone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from itertools import zip_longest
from urllib.parse import unquote, unquote_to_bytes

from .errors import BadPageUrl, PageHostNotAllowed
from .logs import sanitize
from .settings import DOMAIN

MAX_LENGTH = 8192
"""Characters; longer urls are refused. Proxies pass about as much."""
CLOCK_SKEW = 600
"""Seconds that the time in a cache buster may be from now."""
DAY = 24 * 3600
"""Seconds that jQuery's `_` may be old: it counts on from the time that the page was loaded."""

_HOW = "send it as encodeURIComponent(location.href.split('#')[0])"
_AS_IT_IS = "send it as it is there, not decoded or typed"
_URL = re.compile(rb"(?:^|&)url(?:=|(?=&|$))")

_HOST = rf"{DOMAIN}\.?|(?:[0-9]{{1,3}}\.){{3}}[0-9]{{1,3}}|\[[0-9a-f:.]+\]"
# As browsers write it. A path's characters are [!$-;=@-\[\]-_a-z|~], a query's [!$-&(-;=?-~].
_HREF = re.compile(
    rf"http(s)?://({_HOST})(?::(?!(?(1)443|80)/)[1-9][0-9]{{0,4}})?"
    r"(?=/)(?![^?]*/(?:\.|%2[Ee]){1,2}(?:[/?]|$))"  # (?=/) first, or it is a square
    r"/[!$-;=@-\[\]-_a-z|~]*(?:\?[!$-&(-;=?-~]*)?",
    re.ASCII,
)
# As people type it. As for browsers, a backslash ends the authority like a slash does.
_AUTHORITY = re.compile(
    r"(https?://)(\[[^\]/\\?#@]*\]|[^/\\?#@:]+)(?::([0-9]*))?(?=[/\\?#]|$)", re.IGNORECASE
)
_NOT_IN_HREF = re.compile(r"""[^!-~]|["<>]""")

# Where :// is left bare, these are escaped of what an href has bare: # & + ; = ? [ \ ] ^ ` { | }
# and the % of its own escapes. Any other escape is the href's own.
_AGAIN = "25(?:[0-9A-F]{2}|u[0-9A-F]{4})"  # an escape escaped once more, also one of escape()
_PROOF_OF_RAW = re.compile(rf"%(?!2[36B]|{_AGAIN}|3[BDF]|5[B-E]|60|7[BCD])", re.IGNORECASE)
_BY_ANGULAR = re.compile(r"%2B|%25|%26(?:[^?&=%]|%25|%5[BD])+=", re.IGNORECASE)  # beside a bare =
_ANOTHER_NAME = re.compile(r"%26(?:[^?&=%]|%25|%5[BD])+=", re.IGNORECASE)
_NAME = re.compile(r"(?:[^%]|%25|%5[BD])+%3D", re.IGNORECASE)
_NAME_AND_VALUE = re.compile(r"(?:[^%]|%25|%5[BD])+%3D(?!%3D|$)", re.IGNORECASE)
_QUERY = re.compile(r"[?;]|%3B", re.IGNORECASE)
_DOUBLE = re.compile(rf"%{_AGAIN}", re.IGNORECASE)
# What proves that not all was escaped by encodeURI.
_NOT_BY_ENCODE_URI = re.compile(rf"[][\\^`{{|}}]|%(?!{_AGAIN}|5[B-E]|60|7[BCD])", re.IGNORECASE)
_STAMP = re.compile(r"(_|_?(?:t|ts|time|timestamp|nocache))=([0-9]{10})(?:[0-9]{3})?")

_PART = re.compile("%(?:25)*[0-9A-F]{2}|.", re.IGNORECASE)
_NAME_OR_PART = re.compile(r"[?&;][\w.-]{1,30}(?==)|" + _PART.pattern, re.IGNORECASE)


def page_url(
    query: bytes,
    page_hosts: Collection[str] = (),
    referer: str = "",
    *,
    is_entry: bool = False,
    now: float | None = None,
) -> str:
    """The url of the page, from the raw query string of a request, without its fragment.

    With `is_entry` the url may be the one by which a visit began, as on iOS, and may rightly
    differ from the Referer. Raises BadPageUrl, and PageHostNotAllowed where there is a list
    without the page's host.
    """
    url, is_bare = _sent(query)
    if is_bare:
        url = _raw_or_escaped(url, referer, now)
    href = _HREF.fullmatch(url)
    if href is None:
        url = _in_browsers_form(url, page_hosts)
    elif page_hosts and not host_is_listed(href[2], page_hosts):
        raise PageHostNotAllowed(href[2])
    if url != referer:
        _check_for_mistakes(url)
        if not is_entry and not _is_origin(referer):
            _check_escapes(url, referer)
    return url


def _sent(query: bytes) -> tuple[str, bool]:
    """What follows `url=`, without its fragment, and whether its :// is bare. Where it is not, all
    is escaped; then it is unescaped here."""
    first = _URL.search(query)
    if first is None:
        raise BadPageUrl(f"the parameter url is missing; {_HOW}")
    value = query[first.end() :]
    is_bare = value[:8].lower().startswith((b"http://", b"https://"))
    try:
        whole = (value if is_bare else _unescape(value)).decode()
    except UnicodeDecodeError:
        raise BadPageUrl(f"url is not UTF-8; {_HOW}") from None
    url = whole.partition("#")[0]
    if len(url) > MAX_LENGTH:
        raise BadPageUrl(f"url is longer than {MAX_LENGTH} characters")
    if whole != url:
        _check_characters(whole)
    return url, is_bare


def host_of(origin: str) -> str:
    """The host of an origin as browsers send it; "" where it is none."""
    href = _HREF.fullmatch(f"{origin}/")
    return href[2] if href and origin.count("/") == 2 else ""


def host_is_listed(host: str, page_hosts: Collection[str]) -> bool:
    """Whether a pattern names the host: h5.example.com, or *.example.com for all below it."""
    return any(
        host.endswith(pattern[1:]) and len(host) >= len(pattern)
        if pattern.startswith("*.")
        else pattern in (host, "*")
        for pattern in page_hosts
    )


def for_log(url: str) -> str:
    """Host and path of a url, or a path, however often it is escaped: printable and not too long.
    A query or a parameter of a path may hold a secret."""
    plain = url[:1000].encode("latin-1", "replace").decode("utf-8", "replace")
    for _ in range(5):
        plain = unquote(plain)
    place = re.split("[?#&;=]|%(?=25)", plain, maxsplit=1)[0]
    authority, slash, path = (place.partition("://")[2] or place).partition("/")
    return sanitize(authority.rpartition("@")[2] + slash + path, 200)


def cut_or_added(url: str, referer: str) -> str:
    """What a url lacks, or has in addition, of the page that the Referer names; "" where that is
    another page. A router's guard may rightly ask for the next route."""
    if not _is_origin(referer) and url.partition("?")[0] == referer.partition("?")[0]:
        added, missing = url.removeprefix(referer), referer.removeprefix(url)
        if added and added != url and not added[0].isalnum():
            return f"it has {_NAME_OR_PART.findall(added)[0]!a} added to it"
        if missing and missing != referer and not missing[0].isalnum():
            return f"it is cut before the page's {_NAME_OR_PART.findall(missing)[0]!a}"
    return ""


def _is_origin(referer: str) -> bool:
    """Whether it tells no more than that: all that a page of another origin does."""
    return referer.find("/", 8) in (-1, len(referer) - 1)


def _check_escapes(url: str, referer: str) -> None:
    """Refuses a url that equals the Referer but for its escapes: it was changed on its way."""
    if _without_escapes(url) == _without_escapes(referer):
        parts = zip_longest(_PART.findall(url), _PART.findall(referer), fillvalue="")
        has, page_has = next(pair for pair in parts if pair[0] != pair[1])
        raise BadPageUrl(f"url has {has!a} where its page has {page_has!a}, by the Referer; {_HOW}")


def _without_escapes(url: str) -> str:
    for _ in range(3):
        url = unquote(url, "latin-1")
    return url.replace("+", " ")


def _unescape(value: bytes) -> bytes:
    value, _, more = value.partition(b"&")
    if b"=" in value and more:
        raise BadPageUrl(f"url was escaped in part: its = and & were not; {_HOW}")
    return unquote_to_bytes(value.replace(b"+", b" "))


def _raw_or_escaped(value: str, referer: str, now: float | None) -> str:
    """What a value with a literal :// stands for. Its escaped reading ends at the first &."""
    piece, more, _ = value.partition("&")
    if "%" not in piece:
        return _raw(value, referer, now)
    unescaped = unquote(piece).partition("#")[0]
    if referer in (value, unescaped):
        return referer
    named = _names_are_escaped(piece, more)
    if _PROOF_OF_RAW.search(piece):
        if named:
            raise BadPageUrl(f"url was escaped in part: some of = & % were, some not; {_HOW}")
        return _raw(value, referer, now)
    if named or (not more and _all_is_escaped(piece)):
        return unescaped
    if "=" in piece and not (_is_joined(piece) if more else _BY_ANGULAR.search(piece)):
        return _raw(value, referer, now)
    _check_for_mistakes(value)
    raise BadPageUrl(f"url may be raw, or escaped with its :// left bare; {_HOW}")


def _names_are_escaped(piece: str, more: str) -> bool:
    """?name%3Dvalue, without a bare =: two of them, or one that ends the url. Not ?base64%3D."""
    _, *query = _QUERY.split(piece, maxsplit=1) if "=" not in piece else [""]
    named = [pair for pair in "".join(query).split("%26") if _NAME.match(pair)]
    return len(named) > 1 or (not more and any(map(_NAME_AND_VALUE.match, named)))


def _all_is_escaped(piece: str) -> bool:
    """%25XX elsewhere than in a value; or ?a=1%26b=2."""
    path, _, query = piece.partition("?")
    return bool(_DOUBLE.search(path if "=" in query else piece)) or _is_joined(piece)


def _is_joined(piece: str) -> bool:
    """?a=1%26b=2: whoever escapes the & of a value escapes its = as well. A nested url apart."""
    _, _, query = piece.partition("?")
    return "?" not in query and _ANOTHER_NAME.search(query) is not None


def _raw(url: str, referer: str, now: float | None) -> str:
    """The raw url. Where something seems to be appended to it, the Referer decides."""
    head, _, last = url.rpartition("&")
    if not head and _is_joined(url) and url != referer:
        raise BadPageUrl(f"url was escaped in part: its & was, the rest not; {_HOW}")
    if url == referer or not _is_cache_buster(last, now):
        return url
    if head == referer:
        return head
    name = sanitize(last.partition("=")[0], 30)
    raise BadPageUrl(f"&{name}=… seems to be appended to the url; {_HOW}")


def _is_cache_buster(parameter: str, now: float | None) -> bool:
    stamp = _STAMP.fullmatch(parameter)
    if stamp is None:
        return False
    age = (time.time() if now is None else now) - int(stamp[2])
    return -CLOCK_SKEW < age < (DAY if stamp[1] == "_" else CLOCK_SKEW)


def _check_for_mistakes(url: str) -> None:
    """What a page's url may have, and more often has by mistake."""
    if "&amp;" in url:
        raise BadPageUrl(f"url has &amp; for &: it was taken from the source of HTML; {_HOW}")
    if "%25" in url and not _NOT_BY_ENCODE_URI.search(url):
        raise BadPageUrl(
            f"url was escaped by encodeURI, or twice: it has %25 where the page has %; {_HOW}. "
            "(If the page itself has %25, the request has to carry the page's url as Referer: "
            "fetch(…, {referrerPolicy: 'no-referrer-when-downgrade'}))"
        )


def _in_browsers_form(url: str, page_hosts: Collection[str]) -> str:
    """Scheme, host and port as location.href has them; the reason where that is not enough."""
    _check_beginning(url)
    _check_characters(url)
    authority = _AUTHORITY.match(url)
    if authority is None:
        raise BadPageUrl("url names no host, or a user, which location.href never has")
    scheme, host, port = authority[1].lower(), authority[2].lower(), authority[3]
    if page_hosts and re.fullmatch(_HOST, host) and not host_is_listed(host, page_hosts):
        raise PageHostNotAllowed(host)
    port = f":{port}" if port and port != ("443" if scheme == "https://" else "80") else ""
    path, mark, query = url[authority.end() :].partition("?")
    href = f"{scheme}{host}{port}{path or '/'}{mark}{query}"
    if _HREF.fullmatch(href):
        return href
    raise BadPageUrl(
        "location.href writes the host, a /../ or {}\\` in the path, or a ' in the query "
        f"differently: {_AS_IT_IS}"
    )


def _check_beginning(url: str) -> None:
    if not url:
        raise BadPageUrl(f"url is empty; {_HOW}")
    if re.match("https?(%3A|:(%2F|/%2F))", url, re.IGNORECASE):
        raise BadPageUrl(
            "url was escaped twice; escape it once, and leave it to your HTTP library "
            "where that escapes parameters by itself"
        )
    if not re.match("https?://", url, re.IGNORECASE):
        raise BadPageUrl(f"url must begin with http:// or https://; {_HOW}")


def _check_characters(url: str) -> None:
    odd = _NOT_IN_HREF.search(url)
    if odd and (odd[0].isspace() or not odd[0].isprintable()):
        raise BadPageUrl(
            "url has whitespace or a control character in it (in an escaped url a bare + is a "
            f"space); {_HOW}, not decoded"
        )
    if odd:
        raise BadPageUrl(f"location.href has no {odd[0]}: {_AS_IT_IS}")
