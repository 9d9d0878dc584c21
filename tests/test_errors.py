from __future__ import annotations

import configparser
import re
from collections.abc import Iterator

import pytest
from harness import ROOT

from wechat_sign import errors
from wechat_sign.errors import Advice, WeChatRefused, redis_advice

TABLE = configparser.ConfigParser(interpolation=None, delimiters=("=",))
TABLE.read(ROOT / "wechat_sign" / "advice.ini", encoding="utf-8")
ADVICE = [Advice(row["en"], row["zh"]) for row in TABLE.values() if "en" in row]


@pytest.mark.parametrize("endpoint", ["token", "stable_token", "getticket"])
@pytest.mark.parametrize(
    "errcode",
    [-1, -1000, 40001, 40002, 40013, 40014, 40125, 40164, 40243, 41002, 41004, 42001]
    + [43002, 45009, 45011, 48001, 61004, 89501, 89503, 89506, 89507],
)
def test_every_errcode_that_matters_has_advice(errcode: int, endpoint: str) -> None:
    refusal = WeChatRefused(errcode, "whatever", endpoint=endpoint)
    unknown = WeChatRefused(99, "whatever", endpoint=endpoint).advice
    assert refusal.advice.en != unknown.en
    assert refusal.advice.zh != unknown.zh
    assert "{" not in refusal.advice.en + refusal.advice.zh
    assert str(refusal) == (
        f"WeChat refused {endpoint} with errcode {errcode} (whatever). "
        f"What to do: {refusal.advice.en} / {refusal.advice.zh}"
    )


def test_an_unknown_errcode_says_where_to_look() -> None:
    advice = WeChatRefused(99, "x", endpoint="token").advice
    assert "developers.weixin.qq.com" in advice.en
    assert "developers.weixin.qq.com" in advice.zh


@pytest.mark.parametrize(
    ("errmsg", "address"),
    [
        ("invalid ip 203.0.113.7 ipv6 ::ffff:203.0.113.7, not in whitelist rid: 6", "203.0.113.7"),
        ("invalid ip 2001:db8::7, not in whitelist hint: [x]", "2001:db8::7"),
    ],
)
def test_40164_names_the_very_address_to_add(errmsg: str, address: str) -> None:
    refusal = WeChatRefused(40164, errmsg, endpoint="token")
    assert refusal.address == address
    assert f"add {address} to" in refusal.advice.en
    assert f"请把 {address} 加入 IP白名单" in refusal.advice.zh
    assert "IP白名单" in refusal.advice.en


def test_where_wechat_names_no_address_the_advice_has_words_for_it() -> None:
    refusal = WeChatRefused(61004, "access clientip is not registered", endpoint="token")
    assert refusal.address == ""
    assert "add this server's public address to" in refusal.advice.en
    assert "请把 本服务器的公网 IP 加入" in refusal.advice.zh


def test_40001_means_the_secret_at_token_and_a_replaced_token_at_getticket() -> None:
    for endpoint in ("token", "stable_token"):
        at_token = WeChatRefused(40001, "invalid credential", endpoint=endpoint)
        assert "secret is not the one" in at_token.advice.en
        assert "AppSecret" in at_token.advice.zh
        assert not at_token.transient
    at_ticket = WeChatRefused(40001, "invalid credential", endpoint="getticket")
    assert "another program" in at_ticket.advice.en
    assert "其他程序" in at_ticket.advice.zh
    assert at_ticket.transient


def test_an_error_without_advice_is_its_sentence() -> None:
    error = errors.PageHostNotAllowed("a.example")
    assert str(error) == error.what
    assert error.advice.en == error.advice.zh == ""


def test_unknown_trouble_with_redis_has_advice_too() -> None:
    assert "log of Redis" in redis_advice("something new").en
    assert "Redis 的日志" in redis_advice("something new").zh


@pytest.mark.parametrize("advice", ADVICE)
def test_every_advice_is_in_two_languages(advice: Advice) -> None:
    assert re.match("[A-Za-z]", advice.en)
    assert re.search("[一-鿿]", advice.zh)
    assert not advice.en.endswith(".")
    assert not advice.zh.endswith("。")
    assert not re.search("[一-鿿] ?[,;:!?()]|[,;:!?()] ?[一-鿿]", advice.zh), "half-width"
    assert "\n" not in str(advice)


def test_every_advice_is_given_for_something_and_every_name_is_one() -> None:
    given = {
        name
        for section in (
            "errcode",
            "redis",
            "page sign",
            "page urls",
            "page script",
            "page phone",
            "start",
        )
        for names in TABLE[section].values()
        for name in names.split(", ")
    }
    assert given | {"unreachable", "locked elsewhere", "unexpected"} == {
        name for name, row in TABLE.items() if "en" in row
    }


def parts_of(advice: Advice) -> Iterator[str]:
    """All that is long enough not to be there by chance: 30 letters, 8 Chinese characters."""
    for words, length in ((advice.en, 30), (advice.zh, 8)):
        for at in range(len(words) - length + 1):
            part = words[at : at + length]
            if words is advice.en or len(re.findall("[一-鿿]", part)) > length / 2:
                yield part


def test_no_advice_is_given_twice() -> None:
    """In its own words, whole or in part: a copy is what drifts apart."""
    assert len({advice.en for advice in ADVICE}) == len(ADVICE)
    assert len({advice.zh for advice in ADVICE}) == len(ADVICE)
    parts = {part for advice in ADVICE for part in parts_of(advice)}
    for path in [ROOT / "server.py", *(ROOT / "wechat_sign").glob("*.*")]:
        if path.name != "advice.ini":
            text = path.read_text(encoding="utf-8")
            assert [part for part in parts if part in text] == [], path.name
