"""From the query string of a request to the url of the page, or the reason why not.

Callers send the url escaped or raw, and both must come out as the very string that
`location.href.split('#')[0]` has in the page: that is what WeChat signs.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import unquote_to_bytes

from .errors import BadPageUrl, PageHostNotAllowed

MAX_LENGTH = 2048
"""Characters; longer urls are refused."""

_HOW = "send it as encodeURIComponent(location.href.split('#')[0])"
_SCHEME = re.compile(r"https?://", re.IGNORECASE)
_URL = re.compile(rb"(?:^|&)url(?:=|(?=&|$))")
_RAW = re.compile(rb"https?://", re.IGNORECASE)
_ESCAPED_TWICE = re.compile(r"https?(%3A|:)(%2F|/)(%2F|/)", re.IGNORECASE)
_BAD_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_CONTROL_OR_BLANK = re.compile(r"[\x00-\x1f\x7f-\x9f]|\s")

# As browsers take it (WHATWG URL): a backslash ends the authority like a slash does,
# and what stands before the last @ in it is user information.
_AUTHORITY = re.compile(
    r"https?://(?:[^/\\?#]*@)?(\[[^\]/\\?#@]*\]|[^/\\?#@:]*)(?::[0-9]*)?(?=[/\\?#]|$)",
    re.IGNORECASE,
)
_PLAIN_HOST = re.compile(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]")


def page_url(query: bytes, page_hosts: Collection[str] = ()) -> str:
    """The url of the page, from the raw query string of a request.

    A value that begins with a literal http:// or https:// was not escaped and goes on to the
    end of the query, byte for byte; any other is unescaped once. The fragment is dropped.

    Raises BadPageUrl, and PageHostNotAllowed where there is a list without the page's host.
    """
    first = _URL.search(query)
    if first is None:
        raise BadPageUrl(f"the parameter url is missing; {_HOW}")
    value = query[first.end() :]
    if not _RAW.match(value):
        value, _, rest = value.partition(b"&")
        if _URL.search(rest):
            raise BadPageUrl("there is more than one parameter url; send one")
        value = _unescape(value)
    try:
        url = value.decode()
    except UnicodeDecodeError:
        raise BadPageUrl(f"url is not UTF-8; {_HOW}") from None
    url = url.partition("#")[0]
    _check(url, page_hosts)
    return url


def host_of(url: str) -> str:
    """The host that a browser would take from the url: lower case, no port; "" where none is."""
    match = _AUTHORITY.match(url)
    return match[1].lower() if match else ""


def host_is_listed(host: str, page_hosts: Collection[str]) -> bool:
    """Whether a pattern names the host: h5.example.com, or *.example.com for all below it."""
    return _PLAIN_HOST.fullmatch(host) is not None and any(
        host.endswith(pattern[1:]) and len(host) >= len(pattern)
        if pattern.startswith("*.")
        else host == pattern
        for pattern in page_hosts
    )


def _unescape(value: bytes) -> bytes:
    if _BAD_PERCENT.search(value):
        raise BadPageUrl(f"url has a % that two hex digits do not follow; {_HOW}")
    return unquote_to_bytes(value.replace(b"+", b" "))


def _check(url: str, page_hosts: Collection[str]) -> None:
    if not url:
        raise BadPageUrl(f"url is empty; {_HOW}")
    if not _SCHEME.match(url):
        if _ESCAPED_TWICE.match(url):
            raise BadPageUrl(
                "url was escaped twice; escape it once, and leave it to your HTTP library "
                "where that escapes parameters by itself"
            )
        raise BadPageUrl("url must begin with http:// or https://")
    if len(url) > MAX_LENGTH:
        raise BadPageUrl(f"url is longer than {MAX_LENGTH} characters")
    if _CONTROL_OR_BLANK.search(url):
        raise BadPageUrl(
            f"url has a blank or a control character in it (in an escaped url a bare + is a "
            f"blank); {_HOW}"
        )
    host = host_of(url)
    if not host:
        raise BadPageUrl("url names no host")
    if page_hosts and not host_is_listed(host, page_hosts):
        raise PageHostNotAllowed(host)
