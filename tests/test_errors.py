from __future__ import annotations

import pytest

from wechat_sign.errors import _ADVICE, WeChatRefused


@pytest.mark.parametrize(
    "errcode",
    sorted(_ADVICE),
)
def test_every_errcode_that_matters_has_advice(errcode: int) -> None:
    refusal = WeChatRefused(errcode, "whatever", endpoint="getticket")
    assert "look the errcode up" not in refusal.advice
    assert refusal.advice in str(refusal)
    assert str(errcode) in str(refusal)
    assert "{" not in refusal.advice


def test_an_unknown_errcode_says_where_to_look() -> None:
    assert "developers.weixin.qq.com" in WeChatRefused(99, "x", endpoint="token").advice


@pytest.mark.parametrize(
    ("errmsg", "address"),
    [
        ("invalid ip 203.0.113.7 ipv6 ::ffff:203.0.113.7, not in whitelist rid: 6", "203.0.113.7"),
        ("invalid ip 2001:db8::7, not in whitelist hint: [x]", "2001:db8::7"),
    ],
)
def test_40164_names_the_very_address_to_add(errmsg: str, address: str) -> None:
    advice = WeChatRefused(40164, errmsg, endpoint="token").advice
    assert f"add {address} to" in advice
    assert "IP白名单" in advice


def test_40001_means_the_secret_at_token_and_a_replaced_token_at_getticket() -> None:
    at_token = WeChatRefused(40001, "invalid credential", endpoint="token")
    assert "secret is not the one" in at_token.advice
    assert not at_token.transient
    at_ticket = WeChatRefused(40001, "invalid credential", endpoint="getticket")
    assert "another program" in at_ticket.advice
    assert at_ticket.transient
