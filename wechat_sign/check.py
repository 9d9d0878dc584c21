"""`--check`: from the settings to a signature, step by step, in the way that the server goes."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from unicodedata import east_asian_width

from .cache import READING, Cache
from .credentials import Credential, WeChat
from .errors import LockedElsewhere, LookHangs, SigningError, redis_advice
from .logs import LONGEST_LINE, printable
from .renewal import CALLS, Known, Renewal
from .safety import foreseen
from .settings import Settings
from .signature import WxConfig
from .texts import Text, local

if TYPE_CHECKING:
    from .store import Found

T = TypeVar("T")
SAMPLE_PAGE = "https://h5.example.com/"


@dataclass(frozen=True)
class Finding:
    """A line of the check; `advice` says what to do where it is not `ok`, or could be better."""

    name: str
    ok: bool
    text: str
    advice: str = ""


def check(settings: Settings, cache: Cache) -> Iterator[Finding]:
    """The steps from Redis on, each when it is done, up to the first that is not ok; past a Redis
    that is not, since the server goes on without it, too.

    It goes the server's own way: it takes from the cache what is there, asks WeChat only for
    what is missing or due, under the same lock, and keeps what it gets for the server to use.
    """
    for finding in _steps(settings, cache):
        yield finding
        if not finding.ok and finding.name != "Redis":
            return


def _steps(settings: Settings, cache: Cache) -> Iterator[Finding]:
    began = time.monotonic()

    def first() -> tuple[Found | None, str]:
        return cache.read(), _lock(cache)

    found = None
    try:
        found, lock = _in_time(settings, first)
    except LookHangs as hangs:
        text = Text("{place}, {what}", place=settings.redis.place, what=hangs.what)
        yield Finding("Redis", False, text, hangs.advice)
        cache = cache.successor()
    else:
        took = _ms(time.monotonic() - began)
        yield _redis(settings, cache, Text("answers ({ms} ms), {lock}", ms=took, lock=lock))
    trouble = cache.trouble
    wechat = WeChat(settings.wechat)
    known = Known(ticket=found.ticket if found is not None else None)
    known = _looked(Renewal(wechat, cache, settings), wechat, known)
    yield _access_token(settings.wechat.token_api, cache, wechat, known)
    yield _jsapi_ticket(cache, wechat, known)
    if cache.trouble and not trouble:
        yield _redis(settings, cache, "")
    if known.ticket is not None:
        WxConfig(settings.wechat.appid, settings.jssdk).sign(SAMPLE_PAGE, known.ticket.value)
        yield Finding(Text("signature"), True, Text("made for {page}", page=SAMPLE_PAGE))


def _in_time(settings: Settings, call: Callable[[], T]) -> T:
    """What the call gives. Raises LookHangs where it takes longer than the server lets a look
    take."""
    longest = CALLS * settings.lease
    try:
        return ThreadPoolExecutor(1).submit(call).result(longest)
    except FutureTimeoutError:
        raise LookHangs(longest) from None


def _looked(renewal: Renewal, wechat: WeChat, known: Known) -> Known:
    """What is known after a look. Where that asks for no token, the secret is tried by a
    `stable_token`, which makes none void."""
    settings = renewal.settings
    api = settings.wechat.token_api

    def look() -> Known:
        looked = renewal.look_up(known)
        if looked.error is None and api == "stable_token" and api not in wechat.took:
            try:
                wechat.fetch_access_token()
            except SigningError as error:
                return looked.failed(error, renewal.clock())
        return looked

    try:
        return _in_time(settings, look)
    except LookHangs as hangs:
        return known.failed(hangs, 0)


def _redis(settings: Settings, cache: Cache, how: str) -> Finding:
    place, url = settings.redis.place, settings.redis.url
    if cache.state == "memory":
        text = "not set: a running server's credentials are its own, so WeChat is asked for others"
        return Finding("Redis", True, Text(text))
    if cache.trouble:
        return Finding("Redis", False, f"{place}, {cache.trouble}", redis_advice(cache.trouble))
    for key, problem in cache.attempt(READING, lambda store: store.unusable, {}).items():
        text = Text("the key {key} {problem}", key=key, problem=problem)
        return Finding("Redis", False, text, redis_advice(problem))
    if url is not None and url.kind == "sentinel":
        sentinel = "Sentinel {service}, primary {where},"
        place = Text(sentinel, service=url.service, where=_where(settings, cache))
    elif url is not None and url.kind == "cluster":
        place = Text("Cluster, the keys on {where},", where=_where(settings, cache))
    return Finding("Redis", True, Text("{place} {how}", place=place, how=how))


def _where(settings: Settings, cache: Cache) -> str:
    """Host and port of the node of a Sentinel set or a Cluster that has the credentials."""

    def host_and_port(store: Any) -> str:
        client = store.client
        if hasattr(client, "get_node_from_key"):
            node = client.get_node_from_key(settings.jsapi_ticket_key)
            return f"{node.host}:{node.port}"
        return "{}:{}".format(*client.connection_pool.get_master_address())

    return str(cache.attempt(READING, host_and_port, ""))


def _lock(cache: Cache) -> str:
    with cache.lock() as lease_over:
        free = lease_over is not None
    return Text("lock works") if free else Text("lock works (an instance has it just now)")


def _access_token(token_api: str, cache: Cache, wechat: WeChat, known: Known) -> Finding:
    error, cached = known.error, known.access_token
    if error is not None and getattr(error, "endpoint", "") != "getticket":
        return Finding("access_token", False, error.what, error.advice)
    if token_api in wechat.took:
        fetched = "fetched by {token_api} ({ms} ms)"
        text = Text(fetched, token_api=token_api, ms=_ms(wechat.took[token_api]))
        return Finding("access_token", True, text)
    if cached is not None:
        text = Text("in the cache, expires in {left} s", left=_left(cache, cached))
    else:
        text = Text("not in the cache, and not needed while the ticket is")
    not_tried = (
        "{text}; the secret was not tried: with token_api = token that would void a running "
        "server's token"
    )
    return Finding("access_token", True, Text(not_tried, text=text))


def _jsapi_ticket(cache: Cache, wechat: WeChat, known: Known) -> Finding:
    error, ticket = known.error, known.ticket
    if error is not None:
        return Finding("jsapi_ticket", False, error.what, error.advice)
    if ticket is None:
        other = LockedElsewhere()
        return Finding("jsapi_ticket", False, other.what, other.advice)
    left, took = _left(cache, ticket), wechat.took.get("getticket")
    if took is None:
        text = Text("in the cache, expires in {left} s", left=left)
    else:
        text = Text("fetched ({ms} ms), expires in {left} s", ms=_ms(took), left=left)
    return Finding("jsapi_ticket", True, text)


def _left(cache: Cache, credential: Credential) -> str:
    return f"{credential.expires - cache.clock():.0f}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}"


def print_check(settings: Settings, cache: Cache, config: Path | None) -> int:
    """Every finding on a line, up to the first that is bad. The exit status: 1 where one is.
    Without a file it is the sandbox, which nothing is foreseen for."""
    logging.disable(logging.ERROR)  # the findings say it
    wechat = settings.wechat
    text = Text(
        "{source}: appid {appid}, {token_api} at {api}",
        source=config or Text("the sandbox"),
        appid=wechat.appid,
        token_api=wechat.token_api,
        api=wechat.api,
    )
    known = [Finding(Text("settings"), True, text)]
    for what, advice in foreseen(settings, config) if config else ():
        known.append(Finding(Text("safety"), True, what, advice))
    return print_findings(chain(known, check(settings, cache)))


def print_findings(findings: Iterable[Finding]) -> int:
    """Each as it comes. The exit status: 1 where one is not ok, or nobody reads on."""
    status = 0
    for finding in findings:
        word, colour = (local(Text("ok")), 32) if finding.ok else (local(Text("FAIL")), 31)
        if finding.ok and finding.advice:
            word, colour = local(Text("note")), 33
        word = _column(word, 4)
        if sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            word = f"\033[{colour}m{word}\033[0m"
        text = printable(local(finding.text), LONGEST_LINE)
        line = f"{word}  {_column(local(finding.name), 12)}  {text}"
        if finding.advice:
            line += "\n      " + local(Text("What to do: {advice}", advice=finding.advice))
        try:
            print(line, flush=True)
        except OSError:
            return 1
        status = status if finding.ok else 1
    return status


def _column(text: str, width: int) -> str:
    """As wide as that on a terminal, where a Chinese character is two columns wide."""
    wide = sum(east_asian_width(letter) in ("W", "F") for letter in text)
    return text.ljust(width - wide)
