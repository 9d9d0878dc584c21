"""`--check`: from the settings to a signature, step by step, and what a start warns about."""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import east_asian_width
from urllib.parse import urlsplit

from . import __version__
from .cache import READING, Cache
from .credentials import WeChat
from .errors import NO_ADVICE, LockedElsewhere, LookHangs, SigningError, advice, redis_advice
from .logs import LONGEST_LINE, sanitize
from .renewal import CALLS, Known, Renewal
from .settings import Settings, is_loopback
from .signature import WxConfig
from .texts import Text, local

T = TypeVar("T")
SAMPLE_PAGE = "https://h5.example.com/"
CLOCK_MAY_DIFFER = 60
"""Seconds."""


@dataclass(frozen=True)
class Finding:
    """A line of the check, with what to do where it is not `ok` or could be better."""

    name: str
    ok: bool
    text: str
    advice: Text = NO_ADVICE


def risks(settings: Settings, config: Path) -> Iterator[tuple[Text, Text]]:
    """What is less safe than it could be, and what to do about it."""
    hosts = settings.jssdk.page_hosts
    if not hosts and not is_loopback(settings.server.address):
        yield Text("any page is signed with this account"), advice("open to all")
    if hosts and settings.jssdk.debug:
        yield Text("every visitor sees alerts: debug is true"), advice("debug")
    api = urlsplit(settings.wechat.api)
    if api.scheme == "http" and not is_loopback(api.hostname or ""):
        yield Text("the secret goes to WeChat unencrypted"), advice("api unencrypted")
    if os.name != "posix":
        return
    if settings.in_file and config.is_file() and config.stat().st_mode & stat.S_IROTH:
        names = ", ".join(settings.in_file)
        what = Text(
            "every user of this host may read {names} in {config}", names=names, config=config
        )
        yield what, advice("file open to all")
    if os.geteuid() == 0:
        yield Text("the server runs as root"), advice("runs as root")


def check(settings: Settings, cache: Cache) -> Iterator[Finding]:
    """The steps from Redis on, each when it is done, up to the first that fails; past Redis, since
    the server goes on without it, too.

    It goes the server's own way: takes what the cache has, asks WeChat only for what is missing or
    due, under the same lock, and keeps what it gets for the server to use.
    """
    for finding in _steps(settings, cache):
        yield finding
        if not finding.ok and finding.name != "Redis":
            return


def _steps(settings: Settings, cache: Cache) -> Iterator[Finding]:
    began, found = time.monotonic(), None
    try:
        found, lock = _in_time(settings, lambda: (cache.read(), _lock(cache)))
    except LookHangs as hangs:
        text = Text("{place}, {what}", place=settings.redis.place, what=hangs.what)
        yield Finding("Redis", False, text, hangs.advice)
        cache = cache.successor()
    else:
        took = 1000 * (time.monotonic() - began)
        yield _redis(settings, cache, Text("answers ({ms:.0f} ms), {lock}", ms=took, lock=lock))
    trouble = cache.trouble
    wechat = WeChat(settings.wechat)
    known = Known(ticket=found.ticket if found is not None else None)
    known = _looked(Renewal(wechat, cache, settings), wechat, known)
    yield _access_token(settings.wechat.token_api, cache, wechat, known)
    yield _jsapi_ticket(cache, wechat, known)
    if abs(wechat.ahead) > CLOCK_MAY_DIFFER:
        text = Text("{seconds:+.0f} s from WeChat's", seconds=wechat.ahead)
        yield Finding(Text("clock"), True, text, advice("clock"))
    if cache.trouble and not trouble:
        yield _redis(settings, cache, "")
    if known.ticket is not None:
        WxConfig(settings.wechat.appid, settings.jssdk).sign(SAMPLE_PAGE, known.ticket.value)
        yield Finding(Text("signature"), True, Text("made for {page}", page=SAMPLE_PAGE))


def _in_time(settings: Settings, call: Callable[[], T]) -> T:
    """What the call gives. Raises LookHangs where it takes longer than the server's own looks."""
    longest = CALLS * settings.lease
    try:
        return ThreadPoolExecutor(1).submit(call).result(longest)
    except FutureTimeoutError:
        raise LookHangs(longest) from None


def _looked(renewal: Renewal, wechat: WeChat, known: Known) -> Known:
    """What is known after a look. Where that asks for no token, a call to `stable_token`, which
    makes none void, tries the secret."""
    api = renewal.settings.wechat.token_api

    def look() -> Known:
        nonlocal known
        known = renewal.look_up(known)
        if known.error is None and api == "stable_token" and api not in wechat.took:
            wechat.fetch_access_token()
        return known

    try:
        return _in_time(renewal.settings, look)
    except SigningError as error:
        return known.failed(error, renewal.clock())


def _redis(settings: Settings, cache: Cache, how: str) -> Finding:
    place, url = settings.redis.place, settings.redis.url
    if cache.state == "memory":
        text = "not set: a running server's credentials are its own, so WeChat is asked for others"
        return Finding("Redis", True, Text(text))
    for trouble in cache.trouble:
        text = Text("{place}, {what}", place=place, what=trouble)
        return Finding("Redis", False, text, redis_advice(trouble))
    unusable = cache.attempt(READING, lambda store: store.unusable, dict[str, str]())
    for key, problem in unusable.items():
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

    return cache.attempt(READING, host_and_port, "")


def _lock(cache: Cache) -> Text:
    with cache.lock() as lease_over:
        free = lease_over is not None
    return Text("lock works") if free else Text("lock works (an instance has it just now)")


def _access_token(token_api: str, cache: Cache, wechat: WeChat, known: Known) -> Finding:
    error, token = known.error, known.access_token
    if error is not None and getattr(error, "endpoint", "") != "getticket":
        return Finding("access_token", False, error.what, error.advice)
    if token_api in wechat.took:
        ms = 1000 * wechat.took[token_api]
        fetched = Text("fetched by {token_api} ({ms:.0f} ms)", token_api=token_api, ms=ms)
        return Finding("access_token", True, fetched)
    text = Text("not in the cache, and not needed while the ticket is")
    if token is not None:
        text = Text("in the cache, expires in {left:.0f} s", left=token.expires - cache.clock())
    not_tried = (
        "{text}; the secret was not tried: with token_api = token that would void a running "
        "server's token"
    )
    return Finding("access_token", True, Text(not_tried, text=text))


def _jsapi_ticket(cache: Cache, wechat: WeChat, known: Known) -> Finding:
    ticket = known.ticket
    if known.error is not None or ticket is None:
        error = known.error or LockedElsewhere()
        return Finding("jsapi_ticket", False, error.what, error.advice)
    left = ticket.expires - cache.clock()
    text = Text("in the cache, expires in {left:.0f} s", left=left)
    if "getticket" in wechat.took:
        ms = 1000 * wechat.took["getticket"]
        text = Text("fetched ({ms:.0f} ms), expires in {left:.0f} s", ms=ms, left=left)
    return Finding("jsapi_ticket", True, text)


def print_check(settings: Settings, cache: Cache, config: Path | None) -> int:
    """Prints the findings up to the first that fails; 1, the exit status, where one does.

    Without a file it is the sandbox, which is not warned about.
    """
    logging.disable(logging.ERROR)  # the findings say it
    wechat = settings.wechat
    text = Text(
        "version {version}, {source}: appid {appid}, {token_api} at {api}",
        version=__version__,
        source=config or Text("the sandbox"),
        appid=wechat.appid,
        token_api=wechat.token_api,
        api=wechat.api,
    )
    known = [Finding(Text("settings"), True, text)]
    if config is not None:
        known += [Finding(Text("safety"), True, *risk) for risk in risks(settings, config)]
    return _print(chain(known, check(settings, cache)))


def print_problems(problems: Iterable[Text]) -> int:
    """The same for settings that can't be used."""
    return _print(Finding(Text("settings"), False, problem) for problem in problems)


def _print(findings: Iterable[Finding]) -> int:
    """Each as it comes. The exit status: 1 where one fails, or the output is closed."""
    status = 0
    for finding in findings:
        try:
            print(_line(finding), flush=True)
        except OSError:
            return 1
        status = status if finding.ok else 1
    return status


def _line(finding: Finding) -> str:
    good = Text("note") if finding.advice else Text("ok")
    text = sanitize(local(finding.text), LONGEST_LINE)
    word = _column(good if finding.ok else Text("FAIL"), 4)
    line = f"{word}  {_column(finding.name, 12)}  {text}"
    if finding.advice:
        line += "\n      " + local(Text("What to do: {advice}", advice=finding.advice))
    return line


def _column(text: str, width: int) -> str:
    """The text as wide as that on a terminal, where a Chinese character takes two columns."""
    text = local(text)
    wide = sum(east_asian_width(letter) in ("W", "F") for letter in text)
    return text.ljust(width - wide)
