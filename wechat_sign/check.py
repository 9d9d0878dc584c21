"""`--check`: from the settings to a signature, step by step, in the way that the server goes."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from .cache import Cache
from .credentials import Credential, WeChat
from .errors import NO_ADVICE, Advice, SigningError, redis_advice
from .logs import LONGEST_LINE, printable
from .renewal import Renewal
from .settings import Settings
from .signature import WxConfig

SAMPLE_PAGE = "https://h5.example.com/"


@dataclass(frozen=True)
class Finding:
    """A line of the check; `advice` says what to do where it is not `ok`."""

    name: str
    ok: bool
    text: str
    advice: Advice = NO_ADVICE


def check(settings: Settings, cache: Cache) -> Iterator[Finding]:
    """The steps from Redis on, each when it is done, up to the first that is not ok.

    It goes the server's own way: it takes from the cache what is there, asks WeChat only for
    what is missing or due, under the same lock, and keeps what it gets for the server to use.
    """
    for finding in _steps(settings, cache):
        yield finding
        if not finding.ok:
            return


def _steps(settings: Settings, cache: Cache) -> Iterator[Finding]:
    began = time.monotonic()
    token = cache.get(settings.access_token_key)
    ticket = cache.get(settings.jsapi_ticket_key)
    took = time.monotonic() - began
    yield _redis(settings, cache, f"answers{_in(took)}, {_lock(cache)}")
    wechat = WeChat(settings.wechat)
    renewal = Renewal(wechat, cache, settings)
    outcome: Credential | SigningError
    try:
        outcome = renewal.look_up(ticket)
        outcome = renewal.back_off.error or outcome  # the one in the cache serves on
    except SigningError as error:
        outcome = error
    yield _access_token(settings.wechat.token_api, cache, wechat, token, outcome)
    yield _jsapi_ticket(cache, wechat, outcome)
    if cache.trouble:
        yield _redis(settings, cache, "")
    if isinstance(outcome, Credential):
        WxConfig(settings.wechat.appid, settings.jssdk).sign(SAMPLE_PAGE, outcome.value)
        yield Finding("signature", True, f"made for {SAMPLE_PAGE}")


def _redis(settings: Settings, cache: Cache, how: str) -> Finding:
    place, url = settings.redis.place, settings.redis.url
    if cache.state == "memory":
        text = "not set: a running server's credentials are its own, so WeChat is asked for others"
        return Finding("Redis", True, text)
    if cache.trouble:
        return Finding("Redis", False, f"{place}, {cache.trouble}", redis_advice(cache.trouble))
    if url is not None and url.kind == "sentinel":
        place = f"Sentinel {url.service}, primary {cache.where()},"
    elif url is not None and url.kind == "cluster":
        place = f"Cluster, the keys on {cache.where()},"
    return Finding("Redis", True, f"{place} {how}")


def _lock(cache: Cache) -> str:
    with cache.lock(wait=0) as mine:
        works = "lock works" if mine else "lock works (an instance has it just now)"
    return f"{works}; {cache.loss}" if cache.loss else works


def _access_token(
    token_api: str,
    cache: Cache,
    wechat: WeChat,
    cached: Credential | None,
    outcome: Credential | SigningError,
) -> Finding:
    if isinstance(outcome, SigningError) and getattr(outcome, "endpoint", "") != "getticket":
        return Finding("access_token", False, outcome.what, outcome.advice)
    if token_api in wechat.took:
        text = f"fetched by {token_api}{_in(wechat.took[token_api])}"
    elif cached is not None:
        text = f"in the cache, {_left(cache, cached)}"
    else:
        text = "not in the cache, and not needed while the ticket is"
    return Finding("access_token", True, text)


def _jsapi_ticket(cache: Cache, wechat: WeChat, outcome: Credential | SigningError) -> Finding:
    if isinstance(outcome, SigningError):
        return Finding("jsapi_ticket", False, outcome.what, outcome.advice)
    took = wechat.took.get("getticket")
    how = "in the cache" if took is None else f"fetched{_in(took)}"
    return Finding("jsapi_ticket", True, f"{how}, {_left(cache, outcome)}")


def _left(cache: Cache, credential: Credential) -> str:
    return f"expires in {credential.expires - cache.clock():.0f} s"


def _in(seconds: float) -> str:
    return f" ({1000 * seconds:.0f} ms)"


def print_check(settings: Settings, cache: Cache, source: str) -> int:
    """Every finding on a line, up to the first that is bad. The exit status: 1 where one is."""
    logging.disable(logging.ERROR)  # the findings say it
    wechat = settings.wechat
    text = f"{source}: appid {wechat.appid}, {wechat.token_api} at {wechat.api}"
    return print_findings(chain([Finding("settings", True, text)], check(settings, cache)))


def print_findings(findings: Iterable[Finding]) -> int:
    """Each as it comes. The exit status: 1 where one is not ok."""
    status = 0
    for finding in findings:
        word = "ok  " if finding.ok else "FAIL"
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            word = f"\033[{32 if finding.ok else 31}m{word}\033[0m"
        what_to_do = f"\n      What to do: {finding.advice}" if finding.advice.en else ""
        text = printable(finding.text, LONGEST_LINE)
        print(f"{word}  {finding.name:12}  {text}{what_to_do}", flush=True)
        status = status if finding.ok else 1
    return status
