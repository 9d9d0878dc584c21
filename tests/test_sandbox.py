from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from harness import Sandbox


@pytest.fixture
def brief() -> Iterator[Sandbox]:
    """Tokens that live for 1 s."""
    sandbox = Sandbox(token_life=1).start()
    yield sandbox
    sandbox.stop()


def account(wechat: Sandbox, **other: Any) -> dict[str, Any]:
    grant = {"grant_type": "client_credential", "appid": wechat.appid, "secret": wechat.secret}
    return {**grant, **other}


def token(wechat: Sandbox, **other: Any) -> dict[str, Any]:
    url = f"{wechat.url}/cgi-bin/token"
    return dict(requests.get(url, params=account(wechat, **other), timeout=5).json())


def stable_token(wechat: Sandbox, **other: Any) -> dict[str, Any]:
    url = f"{wechat.url}/cgi-bin/stable_token"
    return dict(requests.post(url, json=account(wechat, **other), timeout=5).json())


def getticket(wechat: Sandbox, access_token: str) -> dict[str, Any]:
    url = f"{wechat.url}/cgi-bin/ticket/getticket"
    query = {"access_token": access_token, "type": "jsapi"}
    return dict(requests.get(url, params=query, timeout=5).json())


def test_a_new_token_kills_the_one_before_it(wechat: Sandbox) -> None:
    first = token(wechat)
    assert first["expires_in"] == 7200
    assert getticket(wechat, first["access_token"])["errcode"] == 0
    second = token(wechat)
    assert getticket(wechat, first["access_token"])["errcode"] == 40001
    assert getticket(wechat, second["access_token"])["errcode"] == 0


def test_a_stable_token_stays_the_same_and_is_isolated_from_token(wechat: Sandbox) -> None:
    first = stable_token(wechat)
    assert stable_token(wechat)["access_token"] == first["access_token"]
    assert 7190 <= stable_token(wechat)["expires_in"] <= 7200
    wechat.replace_token()
    assert getticket(wechat, first["access_token"])["errcode"] == 0


def test_the_ticket_is_the_same_within_its_life(wechat: Sandbox) -> None:
    first = getticket(wechat, token(wechat)["access_token"])
    second = getticket(wechat, token(wechat)["access_token"])
    assert (
        first
        == second
        == {
            "errcode": 0,
            "errmsg": "ok",
            "ticket": wechat.ticket,
            "expires_in": 7200,
        }
    )
    wechat.rotate_ticket()
    assert getticket(wechat, token(wechat)["access_token"])["ticket"] not in ("", first["ticket"])


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
    assert token(wechat, **other)["errcode"] == errcode
    assert stable_token(wechat, **other)["errcode"] == errcode


def test_stable_token_is_post_only(wechat: Sandbox) -> None:
    url = f"{wechat.url}/cgi-bin/stable_token"
    assert requests.get(url, params=account(wechat), timeout=5).json()["errcode"] == 43002


def test_an_expired_token_is_refused(brief: Sandbox) -> None:
    access_token = token(brief)["access_token"]
    brief.token_life = 0
    stable = stable_token(brief)["access_token"]
    assert getticket(brief, access_token)["errcode"] == 0
    assert getticket(brief, stable)["errcode"] == 42001


def test_calls_are_counted_by_endpoint(wechat: Sandbox) -> None:
    getticket(wechat, token(wechat)["access_token"])
    stable_token(wechat)
    getticket(wechat, "wrong")
    assert wechat.calls == {"token": 1, "stable_token": 1, "getticket": 2}


def test_another_path_is_not_there(wechat: Sandbox) -> None:
    assert requests.get(f"{wechat.url}/cgi-bin/getticket", timeout=5).status_code == 404
    assert json.dumps(wechat.calls) == "{}"
