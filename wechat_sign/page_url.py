"""From the query string of a request to the url of the page: right, or refused with the reason.

What is signed has to be the very string that `location.href.split('#')[0]` has in the page.
Send it escaped, by encodeURIComponent; raw works where it comes last in the query.

| what follows `url=`                                      | is read as                            |
|----------------------------------------------------------|---------------------------------------|
| `https%3A…`, `https:%2F…`                                | escaped, up to the next &             |
| `https://…`, no escape before the first &                | raw, to the end                       |
| … with `%E4`, `%20`, `%2F`; with `%3D` beside a bare =   | raw: no escaper makes those           |
| … with `?x%3D1%26y%3D2`, `?x=1%26y=2`, or `/%25E4`       | escaped, with `:` and `/` left bare   |
| … with `?x=%2B`, `?x%3D`, `/x%26y`, or the like          | raw or escaped, whichever the Referer |
|                                                          | equals; refused where it is neither   |

Angular, aiohttp, Spring, okhttp, Swift and lighttpd leave `:` and `/` bare. An escaper is uniform:
it escapes a character everywhere or nowhere; and what it escapes is an href, which is ASCII.

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
from .logs import printable

MAX_LENGTH = 8192
"""Characters; longer urls are refused. Proxies pass about as much."""
CLOCKS_DIFFER = 600
"""Seconds that the time in a cache buster may be from now."""
DAY = 24 * 3600
"""Seconds that jQuery's `_` may be old, which counts on from the time that the page was loaded."""

_HOW = "send it as encodeURIComponent(location.href.split('#')[0])"
_AS_IT_IS = "send it as it is there, not decoded or typed"
_URL = re.compile(rb"(?:^|&)url(?:=|(?=&|$))")

# As browsers take it (WHATWG URL): a backslash ends the authority like a slash does,
# and what stands before the last @ in it is user information.
_AUTHORITY = re.compile(
    r"(https?://)([^/\\?#]*@)?(\[[^\]/\\?#@]*\]|[^/\\?#@:]*)(?::([0-9]*))?(?=[/\\?#]|$)",
    re.IGNORECASE,
)
_PLAIN_HOST = re.compile(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]")

# As browsers write it. A path's characters are [!$-;=@-\[\]-_a-z|~], a query's [!$-&(-;=?-~].
_HREF = re.compile(
    r"http(s)?://(?:(?=[^/]*@)[\w!$%&'()*+,.~-]+(?::[\w!$%&'()*+,.~-]+)?@)?"
    r"((?:[a-z0-9_-]+\.)*[a-z_-][a-z0-9_-]*\.?|(?:[0-9]{1,3}\.){3}[0-9]{1,3}|\[[0-9a-f:.]+\])"
    r"(?::(?!(?(1)443|80)/)[1-9][0-9]{0,4})?"
    r"(?=/)(?![^?]*/(?:\.|%2[Ee]){1,2}(?:[/?]|$))"  # (?=/) first, or it is a square
    r"/[!$-;=@-\[\]-_a-z|~]*(?:\?[!$-&(-;=?-~]*)?",
    re.ASCII,
)
_NOT_IN_HREF = re.compile(r"""[^!-~]|["<>]""")
_NOT_IN_PATH = re.compile(r"[{}\\`]")

# Where :// is left bare, these are escaped of what an href has bare: # & + ; = ? [ \ ] ^ ` { | }
# and the % of its own escapes. Any other escape is the href's own.
_PROOF_OF_RAW = re.compile(r"%(?!2[36B]|25[0-9A-F]{2}|3[BDF]|5[B-E]|60|7[BCD])", re.IGNORECASE)
_BY_ANGULAR = re.compile(r"%2B|%25|%26(?:[^?&=%]|%25|%5[BD])+=", re.IGNORECASE)  # beside a bare =
_ANOTHER_NAME = re.compile(r"%26(?:[^?&=%]|%25|%5[BD])+=", re.IGNORECASE)
_NAME = re.compile(r"(?:[^%]|%25|%5[BD])+%3D", re.IGNORECASE)
_NAME_AND_VALUE = re.compile(r"(?:[^%]|%25|%5[BD])+%3D(?!%3D|$)", re.IGNORECASE)
_QUERY = re.compile(r"[?;]|%3B", re.IGNORECASE)
_ESCAPED_QUERY = re.compile(r"%3F[^?=]*%3D", re.IGNORECASE)
_TWO_EQUALS = re.compile(r"%3D[^?]*%3D", re.IGNORECASE)
_DOUBLE = re.compile(r"%25[0-9A-F]{2}", re.IGNORECASE)
_CODE = re.compile(r"%(?!25)(..)")

# What proves that not all was escaped by encodeURI; or by Python's quote(), with :/?&= kept.
_NOT_BY_ENCODE_URI = re.compile(r"[][\\^`{|}]|%(?!25[0-9A-F]{2}|5[B-E]|60|7[BCD])", re.IGNORECASE)
_NOT_BY_QUOTE = re.compile(
    r"[][\\^`{|}]|%(?!25[0-9A-F]{2}|2[1346-9A-C]|3B|40|5[B-E]|60|7[BCD])", re.IGNORECASE
)
_PARAMETER = re.compile(r"[\w.-]+=")
_STAMP = re.compile(r"(_|_?(?:t|ts|time|timestamp|nocache))=([0-9]{10})(?:[0-9]{3})?")

_PART = re.compile("%(?:25)*[0-9A-F]{2}|.", re.IGNORECASE)
_NAME_OR_PART = re.compile(r"[?&;][\w.-]{1,30}(?==)|" + _PART.pattern, re.IGNORECASE)


def page_url(
    query: bytes, page_hosts: Collection[str] = (), referer: str = "", *, now: float | None = None
) -> str:
    """The url of the page, from the raw query string of a request, without its fragment.

    Raises BadPageUrl, and PageHostNotAllowed where there is a list without the page's host.
    """
    value = query[4:] if query.startswith(b"url=") else _value(query)
    bare = value[:8].lower().startswith((b"http://", b"https://"))
    url = _text(value if bare else _unescape(value))
    if "#" in url:
        _check_characters(url)
        url = url.partition("#")[0]
    if bare:
        url = _raw_or_escaped(url, referer, now)
    href = _HREF.fullmatch(url)
    if href is None or len(url) > MAX_LENGTH:
        url = _in_browsers_form(url, page_hosts)
    elif page_hosts and not host_is_listed(href[2], page_hosts):
        raise PageHostNotAllowed(href[2])
    if ("%25" in url or "&amp;" in url) and url != referer:
        _check_for_mistakes(url)
    return url


def _value(query: bytes) -> bytes:
    first = _URL.search(query)
    if first is None:
        raise BadPageUrl(f"the parameter url is missing; {_HOW}")
    return query[first.end() :]


def host_of(url: str) -> str:
    """The host that a browser would take from the url: lower case, no port; "" where none is."""
    match = _AUTHORITY.match(url)
    return match[3].lower() if match else ""


def shown(url: str) -> str:
    """Host and path for the log, printable and not too long. A query may hold what is secret."""
    place = re.split("[?#]", url, maxsplit=1)[0]
    authority, slash, path = (place.partition("://")[2] or place).partition("/")
    return printable(authority.rpartition("@")[2] + slash + path, 200)


def asked_for(target: str) -> str:
    """The same for a path or url as a request has it, however often that is escaped."""
    plain = target[:1000].encode("latin-1").decode("utf-8", "replace")
    while (unescaped := unquote(plain)) != plain:
        plain = unescaped
    return shown(plain)


def url_in(query: str) -> str:
    """The value of a request's url, as it is."""
    first = re.search("(?:^|&)url=([^&]*)", query)
    return first[1] if first else ""


def difference(url: str, referer: str) -> str:
    """How a url was changed on its way from the page that the Referer names; "" where that is
    another page, or an origin alone, which is all that a page of another origin tells."""
    if url == referer or (referer.endswith("/") and referer.count("/") == 3):
        return ""
    if _without_escapes(url) == _without_escapes(referer):
        parts = zip_longest(_PART.findall(url), _PART.findall(referer))
        has, page_has = next(pair for pair in parts if pair[0] != pair[1])
        return f"it has {has!a} where the page has {page_has!a}"
    if url.partition("?")[0] == referer.partition("?")[0]:
        added, missing = url.removeprefix(referer), referer.removeprefix(url)
        if added != url and not added[0].isalnum():
            return f"it has {_NAME_OR_PART.findall(added)[0]!a} added to it"
        if missing != referer and not missing[0].isalnum():
            return f"it is cut before the page's {_NAME_OR_PART.findall(missing)[0]!a}"
    return ""


def _without_escapes(url: str) -> str:
    for _ in range(3):
        url = unquote(url, "latin-1")
    return url.replace("+", " ")


def host_is_listed(host: str, page_hosts: Collection[str]) -> bool:
    """Whether a pattern names the host: h5.example.com, or *.example.com for all below it."""
    return _PLAIN_HOST.fullmatch(host) is not None and any(
        host.endswith(pattern[1:]) and len(host) >= len(pattern)
        if pattern.startswith("*.")
        else host == pattern
        for pattern in page_hosts
    )


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadPageUrl(f"url is not UTF-8; {_HOW}") from None


def _unescape(value: bytes) -> bytes:
    value, _, rest = value.partition(b"&")
    if rest and _URL.search(rest):
        raise BadPageUrl("there is more than one parameter url; send one")
    unescaped = unquote_to_bytes(value.replace(b"+", b" "))
    if len(value) - len(unescaped) != 2 * value.count(b"%"):
        raise BadPageUrl(f"url has a % that two hex digits do not follow; {_HOW}")
    return unescaped


def _raw_or_escaped(value: str, referer: str, now: float | None) -> str:
    """What a value with a literal :// stands for. Its escaped reading ends at the first &."""
    piece, more, _ = value.partition("&")
    if "%" not in piece:
        return _raw(value, referer, now)
    unescaped = unquote(piece).partition("#")[0]
    if referer in (value, unescaped):
        return referer
    if _PROOF_OF_RAW.search(piece) or not _is_uniform(piece):
        hidden = "?" not in piece and _ESCAPED_QUERY.search(piece)
        if "=" not in piece and (hidden or _names_are_escaped(piece, more)):
            raise BadPageUrl(f"url was escaped in part: some of ? = & % were, some not; {_HOW}")
        return _raw(value, referer, now)
    named = _names_are_escaped(piece, more) and not _is_in_doubt(piece)
    if named or (not more and _all_is_escaped(piece)):
        return unescaped
    if "=" in piece and not (_is_joined(piece) if more else _BY_ANGULAR.search(piece)):
        return _raw(value, referer, now)
    _check_for_mistakes(value)
    raise BadPageUrl(f"url may be raw, or escaped with its :// left bare; {_HOW}")


def _is_uniform(text: str) -> bool:
    """Whether no character is escaped in one place and bare in another; % apart."""
    return not any(chr(int(code, 16)) in text for code in set(_CODE.findall(text)))


def _names_are_escaped(piece: str, more: str) -> bool:
    """?name%3Dvalue, without a bare =: two of them, or one that ends the url. Not ?base64%3D."""
    _, *query = _QUERY.split(piece, maxsplit=1) if "=" not in piece else [""]
    named = [pair for pair in "".join(query).split("%26") if _NAME.match(pair)]
    return len(named) > 1 or (not more and any(map(_NAME_AND_VALUE.match, named)))


def _is_in_doubt(piece: str) -> bool:
    """?a%3Db%3Dc, ?a%3DH%26M: okhttp escapes the page's = and leaves its own %3D, %26 alone."""
    pairs = piece.partition("?")[2].split("%26")
    named = sum(_NAME.match(pair) is not None for pair in pairs)
    return named == 1 < len(pairs) or any(map(_TWO_EQUALS.search, pairs))


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
    if "%25" in url and url != referer:
        _check_for_mistakes(url, _NOT_BY_QUOTE)
    if "?" in url and not url[-10:].isdigit():
        return url
    head, _, last = url.rpartition("&")
    if not _is_cache_buster(last, now):
        head, _, last = url.partition("&")
        if "?" in url or not _PARAMETER.match(last):
            return url
    if referer in (url, head):
        return referer
    name = printable(last.partition("=")[0], 30)
    raise BadPageUrl(f"&{name}=… seems to be appended to the url; {_HOW}")


def _is_cache_buster(parameter: str, now: float | None) -> bool:
    stamp = _STAMP.fullmatch(parameter)
    if stamp is None:
        return False
    age = (time.time() if now is None else now) - int(stamp[2])
    return -CLOCKS_DIFFER < age < (DAY if stamp[1] == "_" else CLOCKS_DIFFER)


def _check_for_mistakes(url: str, not_escaped: re.Pattern[str] = _NOT_BY_ENCODE_URI) -> None:
    """What a page's url may have, and more often has by mistake."""
    if "&amp;" in url:
        raise BadPageUrl(f"url has &amp; for &: it was taken from the source of HTML; {_HOW}")
    if "%25" in url and not not_escaped.search(url) and _is_uniform(url):
        raise BadPageUrl(
            f"url was escaped by encodeURI, or twice: it has %25 where the page has %; {_HOW}. "
            "(If the page itself has %25, the request has to carry the page's url as Referer: "
            "fetch(…, {referrerPolicy: 'no-referrer-when-downgrade'}))"
        )


def _in_browsers_form(url: str, page_hosts: Collection[str]) -> str:
    """Scheme, host and port as location.href has them; the reason where that is not enough."""
    _check_beginning(url)
    if len(url) > MAX_LENGTH:
        raise BadPageUrl(f"url is longer than {MAX_LENGTH} characters")
    _check_characters(url)
    authority = _AUTHORITY.match(url)
    if authority is None or not authority[3]:
        raise BadPageUrl("url names no host")
    scheme, user, host, port = (part or "" for part in authority.groups())
    host = host.lower()
    if page_hosts and not host_is_listed(host, page_hosts):
        raise PageHostNotAllowed(host)
    port = f":{port}" if port and port != ("443" if scheme[4] in "sS" else "80") else ""
    path, mark, query = url[authority.end() :].partition("?")
    href = f"{scheme.lower()}{user}{host}{port}{path or '/'}{mark}{query}"
    if _HREF.fullmatch(href):
        return href
    odd = _NOT_IN_PATH.search(path)
    if odd or "'" in query:
        where = f"{odd[0]} in its path" if odd else "' in its query"
        raise BadPageUrl(f"location.href has no {where}: {_AS_IT_IS}")
    raise BadPageUrl(f"location.href has the host or a /../ of the path otherwise: {_AS_IT_IS}")


def _check_beginning(url: str) -> None:
    if not url:
        raise BadPageUrl(f"url is empty; {_HOW}")
    if re.match("https?(%3A|:)(%2F|/)(%2F|/)", url, re.IGNORECASE) and "%" in url[:8]:
        raise BadPageUrl(
            "url was escaped twice; escape it once, and leave it to your HTTP library "
            "where that escapes parameters by itself"
        )
    if not re.match("https?://", url, re.IGNORECASE):
        raise BadPageUrl(f"url must begin with http:// or https://, not with {url[:20]!a}; {_HOW}")


def _check_characters(url: str) -> None:
    odd = _NOT_IN_HREF.search(url)
    if odd and (odd[0].isspace() or not odd[0].isprintable()):
        raise BadPageUrl(
            "url has whitespace or a control character in it (in an escaped url a bare + is a "
            f"space); {_HOW}, not decoded"
        )
    if odd:
        raise BadPageUrl(f"location.href has no {odd[0]}: {_AS_IT_IS}")
