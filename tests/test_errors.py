from __future__ import annotations

import configparser
import re

from harness import NOT_IN_WHITELIST, ROOT

from wechat_sign.errors import (
    CAUSES,
    TOKEN_REFUSED,
    BadPageUrl,
    ConfigError,
    LockedElsewhere,
    PageHostNotAllowed,
    Stopping,
    Unexpected,
    WeChatRefused,
    WeChatUnreachable,
    redis_advice,
)
from wechat_sign.texts import FOLDER, Text

REFUSALS = {
    # errcode: words of the advice in both languages, and whether it may pass by itself
    -1: ("WeChat is busy", "微信系统繁忙", True),
    -1000: ("WeChat is busy", "微信系统繁忙", True),
    40001: ("secret is not the one of this appid", "secret 与该 appid 不匹配", False),
    40002: ("this should not happen", "正常情况下不会出现", False),
    40013: ("appid is wrong", "appid 有误", False),
    40014: ("the access_token was not valid", "access_token 无效", True),
    40125: ("secret is not the one of this appid", "请重新复制 AppSecret", False),
    40164: ("whether this host leaves by several", "是否有多个出口 IP", False),
    40066: ("check that api in [wechat] leads to WeChat", "是否指向微信", False),
    40243: ("the secret is frozen", "AppSecret 已被冻结", False),
    41002: ("appid did not reach WeChat", "appid 没有传到微信", False),
    41004: ("secret did not reach WeChat", "secret 没有传到微信", False),
    42001: ("the access_token had expired", "access_token 已过期", True),
    43002: ("the request's method was changed", "请求方法在途中被改动", False),
    43003: ("WeChat wants https", "微信要求使用 https", False),
    45009: ("the day's quota of this call is used up", "当天的调用次数已用完", False),
    45011: ("too many calls within a minute", "一分钟内调用过于频繁", False),
    45035: ("whether this host leaves by several", "是否有多个出口 IP", False),
    48001: ("the account lacks the right", "需要先完成微信认证", False),
    48004: ("WeChat has blocked this call", "微信已封禁", False),
    50002: ("the account is restricted", "受到微信限制", False),
    50004: ("set token_api = stable_token where", "请设为 stable_token", False),
    61004: ("whether this host leaves by several", "是否有多个出口 IP", False),
    89501: ("an administrator of the account must confirm", "需先由公众号管理员", False),
    89503: ("an administrator of the account must confirm", "需先由公众号管理员", False),
    89506: ("again after 24 hours", "24 小时后才能再次申请", False),
    89507: ("again after 1 hour", "1 小时后才能再次申请", False),
    99: ("look the errcode up at developers.weixin.qq.com", "请在 developers.weixin.qq.com", False),
}


def test_an_errcode_has_its_advice_and_only_what_may_pass_is_transient() -> None:
    for errcode, (english, chinese, transient) in REFUSALS.items():
        for endpoint in ("token", "stable_token", "getticket"):
            if (errcode, endpoint) == (40001, "getticket"):
                english, chinese, transient = "another program replaced", "已被其他程序刷新", True
            refusal = WeChatRefused(errcode, "some words", endpoint=endpoint)
            place = f"{errcode} at {endpoint}"
            assert english in refusal.advice, place
            assert chinese in refusal.advice.zh, place
            assert refusal.transient is transient, place
            assert (refusal.errcode, refusal.endpoint) == (errcode, endpoint)
            assert refusal.errmsg == "some words"
            assert refusal.kind == f"WeChat refused {endpoint} with errcode {errcode}"
            assert refusal.what == f"{refusal.kind} (some words)"
            assert "{" not in str(refusal)
            assert str(refusal) == f"{refusal.what}. What to do: {refusal.advice.both}"


def test_a_token_is_at_fault_for_three_errcodes() -> None:
    assert {40001, 40014, 42001} == TOKEN_REFUSED


def test_the_public_is_not_told_this_host_s_address() -> None:
    refusal = WeChatRefused(40164, NOT_IN_WHITELIST, endpoint="token")
    assert "203.0.113.7" in str(refusal)
    assert "203.0.113.7" not in refusal.advice.both + refusal.kind
    assert refusal.advice.startswith("add this server's public address to the account's IP white")
    assert refusal.advice.zh.startswith("请把本服务器的公网 IP")


def test_what_wechat_and_callers_say_is_shown_printable_and_short() -> None:
    refusal = WeChatRefused(1, "a\x9b2J" + "x" * 400, endpoint="token")
    assert refusal.errmsg.startswith(r"a\x9b2Jx")
    assert refusal.errmsg.isprintable()
    assert len(refusal.errmsg) == 300
    assert refusal.errmsg in refusal.what
    error = PageHostNotAllowed("a\u202e" + "x" * 400)
    assert error.what.startswith(r"pages on a\u202exxx")
    assert error.what.endswith("x are not signed here: page_hosts does not list it")
    assert error.what.count("x") == 253 - len(r"a\u202e")


def test_an_error_without_advice_is_its_sentence() -> None:
    for error in (
        BadPageUrl("url is empty"),
        PageHostNotAllowed("a.example"),
        ConfigError(Text("appid is required"), Text("secret is required")),
        Stopping(),
    ):
        assert str(error) == error.what == error.kind
        assert error.advice == ""
        assert not error.transient
    assert str(BadPageUrl("url is empty")) == "url is empty"
    assert str(Stopping()) == "the server is stopping"
    wrong = ConfigError(Text("appid is required"), Text("secret is required"))
    assert str(wrong) == "appid is required\nsecret is required"
    assert wrong.problems == ("appid is required", "secret is required")


def raised() -> Exception:
    try:
        raise KeyError("s3cr3t")
    except KeyError as error:
        return error


def test_what_may_pass_is_told_with_its_cause_and_what_to_do() -> None:
    unreachable = WeChatUnreachable("HTTP 502", endpoint="getticket")
    assert unreachable.endpoint == "getticket"
    assert unreachable.kind == "no usable answer from WeChat to getticket"
    assert unreachable.what == f"{unreachable.kind}: HTTP 502"
    unexpected = Unexpected(raised())
    assert re.fullmatch(r"KeyError in test_errors\.py, line \d+", unexpected.what)
    assert "s3cr3t" not in str(unexpected)
    elsewhere = LockedElsewhere()
    assert elsewhere.what == ("another instance holds the lock and is asking WeChat for the ticket")
    for error, english, chinese in (
        (unreachable, "(DNS, firewall, proxy)", "DNS、防火墙、代理"),
        (unexpected, "a mistake in the server itself", "本服务自身的错误"),
        (elsewhere, "look at that instance's log", "请查看该实例的日志"),
    ):
        assert error.transient
        assert english in error.advice
        assert chinese in error.advice.zh
        assert str(error) == f"{error.what}. What to do: {error.advice.both}"


REDIS = {
    # words of the advice, and what Redis or redis-py say
    "ACL line": (
        "NoPermissionError: this user has no permissions to run the 'get' command",
        "ResponseError: NOPERM No permissions to access a key",
    ),
    "this Redis has no password": (
        "AuthenticationError: AUTH <password> called without any password configured",
    ),
    "correct password": (
        "AuthenticationError: Authentication required.",
        "ResponseError: NOAUTH Authentication needed.",
        "ResponseError: WRONGPASS",
        "ResponseError: invalid username-password pair or user is disabled.",
    ),
    "set tls in [redis] as this Redis has it": (
        "ConnectionError: Error 1 connecting to h:6379. [SSL] record layer failure",
    ),
    "closed the connection: look at its log": (
        "ConnectionError: Connection closed by server",
        "ConnectionError: Error while reading from h:1 : (104, 'Connection reset by peer')",
    ),
    "check the certificates": (
        "ConnectionError: Error 1 connecting to h:1. [SSL: CERTIFICATE_VERIFY_FAILED] certificate",
        "ConnectionError: [SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate requ",
        "FileNotFoundError",
    ),
    "its maxclients": ("ConnectionError: max number of clients reached",),
    "Redis is loading its data": ("BusyLoadingError: Redis is loading the dataset in memory",),
    "SCRIPT KILL": ("ResponseError: BUSY Redis is busy running a script. You can only call",),
    "this replica has lost": ("MasterDownError: Link with MASTER is down and replica-serve-stale",),
    "CLUSTER INFO": ("ClusterDownError: Hash slot not served",),
    "is moving its slots": ("TryAgainError: Multiple keys request during rehashing of slot",),
    "start Redis, or correct host and port": (
        "ConnectionError: Error 111 connecting to h:6379. Connection refused.",
        "RedisClusterException: Redis Cluster cannot be connected. Please provide at least one",
    ),
    "whether Redis hangs": (
        "TimeoutError: Timeout reading from socket",
        "Overdue: timeout: not done within 6 s",
    ),
    "not known to DNS": (
        "ConnectionError: Error -2 connecting to h:6379. Name or service not known.",
        "ConnectionError: Error -3 connecting to h:6379. Temporary failure in name resolution.",
        "ConnectionError: Error 8 connecting to h:6379. nodename nor servname provided.",
        "ConnectionError: Error 11001 connecting to h:6379. getaddrinfo failed.",
    ),
    "give the primary's host": ("ReadOnlyError: You can't write against a read only replica.",),
    "one node of a Cluster": ("MovedError: 3999 127.0.0.1:7001", "AskError: 3999 127.0.0.1:7001"),
    "this is no Sentinel": (
        "ResponseError: unknown command 'SENTINEL', with args beginning with: 'GET-MASTER'",
        "ResponseError: unknown command `SENTINEL`, with args beginning with: `GET-MASTER`",
    ),
    "GET, GETRANGE, SET, PTTL and DEL are needed": (
        "ResponseError: unknown command 'GETRANGE', with args beginning with: 'wechat'",
    ),
    "knows a living primary": ("MasterNotFoundError: No master found for 'main'",),
    "this Redis is no Cluster": (
        "RedisClusterException: Cluster mode is not enabled on this node",
    ),
    "give Redis more maxmemory": (
        "OutOfMemoryError: command not allowed when used memory > 'maxmemory'.",
        "ResponseError: OOM command not allowed",
    ),
    "look at the log of Redis": ("ResponseError: something new",),
}


def test_what_redis_says_has_its_advice() -> None:
    for words, troubles in REDIS.items():
        for trouble in troubles:
            assert words in redis_advice(trouble), trouble
    for trouble, words in {
        "Connection refused": "请启动 Redis",
        "MovedError": "redis+cluster://",
        "OOM": "请调大 Redis 的 maxmemory",
        "something new": "并查看 Redis 的日志",
    }.items():
        assert words in redis_advice(trouble).zh, trouble


def test_the_page_is_told_why_a_step_failed_most_often_first() -> None:
    assert set(CAUSES) == {"sign", "urls", "script", "phone"}
    for (step, got), beginnings in {
        ("sign", "no answer"): ["the server has stopped", "the phone has lost its network"],
        ("sign", "not json"): ["a proxy answers in this", "the proxy does not pass /getApi on"],
        ("sign", "not json 404"): ["the proxy does not pass /getApi on", "a proxy answers in"],
        ("sign", "403"): ["add this page's host to page_hosts"],
        ("sign", "else"): ["look at the server's log"],
        ("urls", "changed"): ["nginx: ", "Apache: ", "lighttpd: ", "a proxy or CDN decodes"],
        ("script", "else"): ["this network blocks both", "a proxy adds a Content-Security-Pol"],
        ("phone", "invalid url domain"): ["the domain of", "the page is opened by IP", "appid and"],
        ("phone", "appid"): ["appid is wrong"],
        ("phone", "else"): ["look the message up", "update the WeChat app"],
    }.items():
        advice = CAUSES[step][got]
        assert len(advice) == len(beginnings), got
        assert all(en.startswith(b) for (en, _), b in zip(advice, beginnings, strict=True)), got
        assert all(re.search("[一-鿿]", zh) for _, zh in advice), got


# --- the table of advice.ini ----------------------------------------------------------------------

TABLE = configparser.ConfigParser(interpolation=None, delimiters=("=",))
TABLE.read(FOLDER / "advice.ini", encoding="utf-8")
ADVICE = dict(TABLE["advice"])


def test_every_advice_is_given_for_something_and_every_name_is_one() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("wechat_sign/*.py"))
    given = set(re.findall(r'advice\("([^"]+)"\)', sources))
    for section in set(TABLE) - {"advice"}:
        given |= {name for names in TABLE[section].values() for name in names.split(", ")}
    assert {name.lower() for name in given} == set(ADVICE)


def parts_of(advice: str) -> set[str]:
    """All that is long enough not to be there by chance."""
    return {advice[at : at + 30] for at in range(len(advice) - 29)}


def test_no_advice_is_given_twice() -> None:
    """In its own words, whole or in part: a copy is what drifts apart."""
    assert len(set(ADVICE.values())) == len(ADVICE)
    parts = set().union(*map(parts_of, ADVICE.values()))
    for path in [ROOT / "server.py", *(ROOT / "wechat_sign").glob("*.*")]:
        text = path.read_text(encoding="utf-8")
        assert [part for part in parts if part in text] == [], path.name
