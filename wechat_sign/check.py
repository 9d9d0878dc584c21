"""`--check`: from the settings to a signature, step by step, in the way that the server goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from .cache import MemoryCache, RedisCache
from .credentials import Grant, WeChat
from .errors import SigningError
from .settings import Settings, WeChatSettings
from .signature import WxConfig
from .tickets import JsapiTickets

SAMPLE_PAGE = "https://h5.example.com/"


@dataclass(frozen=True)
class Step:
    """A line of the check; `advice` says what to do where it is not `ok`."""

    name: str
    ok: bool
    text: str
    advice: str = ""


class TimedWeChat(WeChat):
    """WeChat's API, noting in `took` how many seconds each call needed."""

    def __init__(self, settings: WeChatSettings) -> None:
        super().__init__(settings)
        self.took: dict[str, float] = {}

    def fetch_access_token(self) -> Grant:
        began = time.monotonic()
        grant = super().fetch_access_token()
        self.took["access_token"] = time.monotonic() - began
        return grant

    def fetch_jsapi_ticket(self, access_token: str) -> Grant:
        began = time.monotonic()
        grant = super().fetch_jsapi_ticket(access_token)
        self.took["jsapi_ticket"] = time.monotonic() - began
        return grant


def check(settings: Settings, cache: MemoryCache | RedisCache) -> Iterator[Step]:
    """The steps from Redis on, each when it is done; none follows one that is not ok.

    It goes the server's own way: it takes from the cache what is there, asks WeChat only for
    what is missing or due, under the same lock, and keeps what it gets for the server to use.
    """
    began = time.monotonic()
    token = cache.get(settings.access_token_key)
    found = cache.get(settings.jsapi_ticket_key)
    if settings.redis.host:
        place = settings.redis.place
        if cache.trouble:
            yield Step("Redis", False, f"{place}, {cache.trouble}", redis_advice(cache.trouble))
            return
        yield Step("Redis", True, f"{place} answers{_took(time.monotonic() - began)}")
    else:
        text = "not set: a running server's credentials are its own, so WeChat is asked for others"
        yield Step("Redis", True, text)

    wechat = TimedWeChat(settings.wechat)
    tickets = JsapiTickets(wechat, cache, settings)
    try:
        ticket = tickets.find(found)
    except SigningError as reason:
        error: SigningError | None = reason
    else:
        error = tickets.health().error  # where the one in hand serves on
    if "access_token" in wechat.took:
        text = f"fetched by {settings.wechat.token_api}{_took(wechat.took['access_token'])}"
        yield Step("access_token", True, text)
    elif error is not None and getattr(error, "endpoint", "") != "getticket":
        yield Step("access_token", False, error.what, error.advice)
        return
    elif token is not None:
        yield Step("access_token", True, f"in the cache, {token.remaining():.0f} s left")
    else:
        yield Step("access_token", True, "not in the cache, and not needed while the ticket is")

    if error is not None:
        yield Step("jsapi_ticket", False, error.what, error.advice)
        return
    left = f"expires in {ticket.remaining():.0f} s"
    if "jsapi_ticket" in wechat.took:
        yield Step("jsapi_ticket", True, f"fetched{_took(wechat.took['jsapi_ticket'])}, {left}")
    else:
        yield Step("jsapi_ticket", True, f"in the cache, {left}")
    if cache.trouble:
        yield Step("Redis", False, cache.trouble, redis_advice(cache.trouble))
        return

    WxConfig(settings.wechat.appid, settings.jssdk).sign(SAMPLE_PAGE, ticket.value)
    yield Step("signature", True, f"made for {SAMPLE_PAGE}")


def redis_advice(trouble: str) -> str:
    """What to do about a failure, by the words that Redis and redis-py have for it."""
    for words, advice in {
        ("Authentication", "NOAUTH", "WRONGPASS", "username-password", "NOPERM"): (
            "correct password (and username, where Redis has users) in [redis]"
        ),
        ("SSL", "ssl", "closed by server", "reset by peer"): (
            "set tls in [redis] as this Redis has it: yes where it speaks TLS, no where it doesn't"
        ),
        ("refused",): "start Redis, or correct host and port in [redis]; empty host: do without it",
        ("Timeout",): (
            "look whether a firewall is in between, whether Redis hangs, and whether it "
            "speaks TLS (tls in [redis])"
        ),
        ("Name or service", "resolution", "nodename", "getaddrinfo"): (
            "correct host in [redis]: its name is not known to DNS"
        ),
        ("ReadOnly",): "give the primary's host in [redis]: this one is a read-only replica",
        ("OutOfMemory", "OOM"): "give Redis more maxmemory, or another db or instance",
    }.items():
        if any(word in trouble for word in words):
            return advice
    return "look at host, port and db in [redis], and at the log of Redis"


def _took(seconds: float) -> str:
    return f" ({1000 * seconds:.0f} ms)"
