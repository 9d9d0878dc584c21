from __future__ import annotations

from typing import Any

import pytest
import requests
from harness import Sandbox


def account(wechat: Sandbox, **other: Any) -> dict[str, Any]:
    grant = {"grant_type": "client_credential", "appid": wechat.appid, "secret": wechat.secret}
    return {**grant, **other}


def token(wechat: Sandbox, **other: Any) -> Any:
    return requests.get(f"{wechat.url}/cgi-bin/token", params=account(wechat, **other)).json()


def stable_token(wechat: Sandbox, **other: Any) -> Any:
    url = f"{wechat.url}/cgi-bin/stable_token"
    return requests.post(url, json=account(wechat, **other)).json()


def getticket(wechat: Sandbox, token: dict[str, Any]) -> Any:
    query = {"access_token": token["access_token"], "type": "jsapi"}
    return requests.get(f"{wechat.url}/cgi-bin/ticket/getticket", params=query).json()


def test_a_new_token_kills_the_one_before_it_and_no_stable_one(wechat: Sandbox) -> None:
    stable, first = stable_token(wechat), token(wechat)
    assert first["expires_in"] == 7200
    assert getticket(wechat, first)["errcode"] == 0
    second = token(wechat)
    assert getticket(wechat, first)["errcode"] == 40001
    assert getticket(wechat, second)["errcode"] == getticket(wechat, stable)["errcode"] == 0
    assert stable_token(wechat)["access_token"] == stable["access_token"]
    assert getticket(wechat, {"access_token": ""})["errcode"] == 41001


def test_the_ticket_is_the_same_within_its_life(wechat: Sandbox) -> None:
    first = getticket(wechat, token(wechat))
    assert first == getticket(wechat, token(wechat))
    granted = {"errcode": 0, "errmsg": "ok", "ticket": wechat.ticket, "expires_in": 7200}
    assert first == granted
    wechat.rotate_ticket()
    assert getticket(wechat, token(wechat))["ticket"] not in ("", first["ticket"])


@pytest.mark.parametrize(
    ("other", "errcode"),
    [
        ({"appid": "wx"}, 40013),
        ({"secret": "x"}, 40125),
        ({"grant_type": "x"}, 40002),
        ({"appid": ""}, 41002),
        ({"secret": ""}, 41004),
    ],
)
def test_the_account_is_checked(wechat: Sandbox, other: dict[str, str], errcode: int) -> None:
    assert token(wechat, **other)["errcode"] == stable_token(wechat, **other)["errcode"] == errcode


def test_what_wechat_has_not_is_refused(wechat: Sandbox) -> None:
    url = f"{wechat.url}/cgi-bin/stable_token"
    assert requests.get(url, params=account(wechat)).json()["errcode"] == 43002
    assert requests.get(f"{wechat.url}/cgi-bin/getticket").status_code == 404


def test_an_expired_token_is_refused(wechat: Sandbox) -> None:
    living = token(wechat)
    wechat.token_life = 0
    expired = stable_token(wechat)
    assert getticket(wechat, living)["errcode"] == 0
    assert getticket(wechat, expired)["errcode"] == 42001
