from __future__ import annotations

import configparser
import re

import pytest
from harness import NOT_IN_WHITELIST, ROOT

from wechat_sign.errors import (
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

TABLE = configparser.ConfigParser(interpolation=None, delimiters=("=",))
TABLE.read(FOLDER / "advice.ini", encoding="utf-8")
ADVICE = dict(TABLE["advice"])


@pytest.mark.parametrize(
    ("errcode", "endpoint", "advised", "transient"),
    [
        (-1, "token", "WeChat is busy", True),
        (-1000, "getticket", "WeChat is busy", True),
        (40001, "token", "secret is not the one of this appid", False),
        (40001, "stable_token", "secret is not the one of this appid", False),
        (40001, "getticket", "another program replaced", True),
        (40014, "getticket", "the access_token was not valid", True),
        (42001, "getticket", "the access_token had expired", True),
        (40164, "token", "add this server's public address to the account's IP whitelist", False),
        (48001, "getticket", "the account lacks the right", False),
        (99, "token", "look the errcode up at developers.weixin.qq.com", False),
    ],
)
def test_an_errcode_has_its_advice_and_only_what_may_pass_is_transient(
    errcode: int, endpoint: str, advised: str, transient: bool
) -> None:
    refusal = WeChatRefused(errcode, NOT_IN_WHITELIST, endpoint=endpoint)
    assert refusal.advice.startswith(advised)
    assert "{" not in refusal.advice.both
    assert refusal.transient is transient
    assert refusal.kind == f"WeChat refused {endpoint} with errcode {errcode}"
    assert refusal.what == f"{refusal.kind} ({NOT_IN_WHITELIST})"
    assert str(refusal) == f"{refusal.what}. What to do: {refusal.advice.both}"
    assert "203.0.113.7" not in refusal.advice.both + refusal.kind  # the public is told these


def test_what_wechat_and_callers_say_is_shown_printable_and_short() -> None:
    refusal = WeChatRefused(1, "a\x9b2J" + "x" * 400, endpoint="token")
    assert re.fullmatch(r".* errcode 1 \(a\\x9b2Jx{280,295}\)", refusal.what)
    error = PageHostNotAllowed("a\u202e" + "x" * 400)
    assert re.fullmatch(r"pages on a\\u202ex{240,250} are not signed here: .*", error.what)


def test_an_error_without_advice_is_its_sentence() -> None:
    wrong = ConfigError(Text("appid is required"), Text("secret is required"))
    assert wrong.problems == ("appid is required", "secret is required")
    for error, sentence in (
        (BadPageUrl("url is empty"), "url is empty"),
        (wrong, "appid is required\nsecret is required"),
        (Stopping(), "the server is stopping"),
    ):
        assert str(error) == error.what == error.kind == sentence
        assert not error.transient


def raised() -> Exception:
    try:
        raise KeyError("s3cr3t")
    except KeyError as error:
        return error


def test_what_may_pass_is_told_with_its_cause_and_what_to_do() -> None:
    for error, what, advised in (
        (WeChatUnreachable("HTTP 502", endpoint="token"), "to token: HTTP 502", "check that this"),
        (Unexpected(raised()), r"KeyError in test_errors\.py, line \d+", "this is a mistake in"),
        (LockedElsewhere(), "another instance holds the lock and .*", "look at that instance's"),
    ):
        assert error.transient
        assert re.fullmatch(f"(no usable answer from WeChat )?{what}", error.what)
        assert error.advice.startswith(advised)
        assert str(error) == f"{error.what}. What to do: {error.advice.both}"
    assert WeChatUnreachable("HTTP 502", endpoint="token").kind.endswith("from WeChat to token")


@pytest.mark.parametrize(
    ("words", "trouble"),
    [
        ("ACL line", "NoPermissionError: this user has no permissions to run the 'get' command"),
        ("ACL line", "ResponseError: NOPERM No permissions to access a key"),
        ("no password", "AuthenticationError: AUTH <password> called without any password config"),
        ("correct password", "ResponseError: NOAUTH Authentication needed."),
        ("correct password", "ResponseError: WRONGPASS"),
        ("correct password", "ResponseError: invalid username-password pair or user is disabled."),
        ("set tls in [redis]", "ConnectionError: Error 1 connecting to h:6379. [SSL] record layer"),
        ("closed the connection", "ConnectionError: Connection closed by server"),
        ("closed the connection", "ConnectionError: (104, 'Connection reset by peer')"),
        ("certificates", "ConnectionError: Error 1 to h:1. [SSL: CERTIFICATE_VERIFY_FAILED]"),
        ("certificates", "FileNotFoundError"),
        ("its maxclients", "ConnectionError: max number of clients reached"),
        ("is loading its data", "BusyLoadingError: Redis is loading the dataset in memory"),
        ("SCRIPT KILL", "ResponseError: BUSY Redis is busy running a script. You can only call"),
        ("this replica has lost", "MasterDownError: Link with MASTER is down and replica-serve"),
        ("CLUSTER INFO", "ClusterDownError: Hash slot not served"),
        ("is moving its slots", "TryAgainError: Multiple keys request during rehashing of slot"),
        ("start Redis", "RedisClusterException: Redis Cluster cannot be connected. Please provide"),
        ("whether Redis hangs", "TimeoutError: Timeout reading from socket"),
        ("not known to DNS", "ConnectionError: Error -3. Temporary failure in name resolution."),
        ("not known to DNS", "ConnectionError: Error 8. nodename nor servname provided."),
        ("give the primary's host", "ReadOnlyError: You can't write against a read only replica."),
        ("one node of a Cluster", "MovedError: 3999 127.0.0.1:7001"),
        ("one node of a Cluster", "AskError: 3999 127.0.0.1:7001"),
        ("this is no Sentinel", "ResponseError: unknown command `SENTINEL`, with args beginning"),
        ("PTTL and DEL are needed", "ResponseError: unknown command 'GETRANGE', with args"),
        ("knows a living primary", "MasterNotFoundError: No master found for 'main'"),
        ("is no Cluster", "RedisClusterException: Cluster mode is not enabled on this node"),
        ("more maxmemory", "ResponseError: OOM command not allowed"),
        ("look at the log of Redis", "ResponseError: something new"),
    ],
)
def test_what_redis_says_has_its_advice(words: str, trouble: str) -> None:
    assert words in redis_advice(trouble)


def test_every_advice_is_given_for_something_and_every_name_is_one() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("wechat_sign/*.py"))
    given = set(re.findall(r'advice\("([^"]+)"\)', sources))
    for section in set(TABLE) - {"advice"}:
        given |= {name for names in TABLE[section].values() for name in names.split(", ")}
    assert {name.lower() for name in given} == set(ADVICE)
    assert len(set(ADVICE.values())) == len(ADVICE)
