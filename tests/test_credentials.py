from __future__ import annotations

import re
import traceback
from functools import partial
from typing import Any

import pytest
from harness import PATIENCE, Fault, Sandbox, assert_no_credential, free_port

from wechat_sign.credentials import WeChat, is_credential
from wechat_sign.errors import SigningError, WeChatRefused, WeChatUnreachable
from wechat_sign.settings import WeChatSettings


def client(wechat: Sandbox, **more: Any) -> WeChat:
    account = {"appid": wechat.appid, "secret": wechat.secret, "api": wechat.url, **more}
    return WeChat(WeChatSettings(**account))


@pytest.mark.parametrize("token_api", ["token", "stable_token"])
def test_a_token_of_either_kind_gets_the_ticket(wechat: Sandbox, token_api: str) -> None:
    api = client(wechat, token_api=token_api)
    token = api.fetch_access_token()
    ticket = api.fetch_jsapi_ticket(token.value)
    assert (ticket.value, ticket.expires_in) == (wechat.ticket, 7200)
    assert wechat.calls == {token_api: 1, "getticket": 1}


def test_grants_do_not_show_what_they_grant(wechat: Sandbox) -> None:
    assert_no_credential(repr(client(wechat).fetch_access_token()), wechat.issued)


@pytest.mark.parametrize(
    ("wrong", "errcode"),
    [({"appid": "WXSANDBOX"}, 40013), ({"secret": "wrong"}, 40125)],
)
@pytest.mark.parametrize("token_api", ["token", "stable_token"])
def test_a_wrong_account_is_refused(
    wechat: Sandbox, wrong: dict[str, str], errcode: int, token_api: str
) -> None:
    with pytest.raises(WeChatRefused) as caught:
        client(wechat, token_api=token_api, **wrong).fetch_access_token()
    assert (caught.value.errcode, caught.value.endpoint) == (errcode, token_api)


def test_a_wrong_token_is_refused(wechat: Sandbox) -> None:
    with pytest.raises(WeChatRefused) as caught:
        client(wechat).fetch_jsapi_ticket("wrong")
    assert (caught.value.errcode, caught.value.endpoint) == (40001, "getticket")


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault(status=502, body=b"<html>Bad Gateway</html>"), "HTTP 502"),
        (Fault(status=302, body=b""), "HTTP 302"),
        (Fault(body=b"<html>portal</html>"), "not JSON"),
        (Fault(body=b'{"ticket": "t", "expi'), "not JSON"),
        (Fault(body=b"\xff\xfe{"), "not JSON"),
        (Fault(body=b"[" * 8000), "not JSON"),
        (Fault(body=b""), "not JSON"),
        (Fault(body=b"[1]"), "not a JSON object"),
        (Fault(body=b"null"), "not a JSON object"),
        (Fault(body=b'{"errcode": "40001"}'), "errcode is no number"),
        (Fault(body=b'{"expires_in": 7200}'), "no ticket"),
        (Fault(body=b'{"ticket": "", "expires_in": 7200}'), "no ticket"),
        (Fault(body=b'{"ticket": "undefined", "expires_in": 7200}'), "no ticket"),
        (Fault(body=b'{"ticket": "a b", "expires_in": 7200}'), "no ticket"),
        (Fault(body=b'{"ticket": 7, "expires_in": 7200}'), "no ticket"),
        (Fault(body=b'{"ticket": "t"}'), "expires_in"),
        (Fault(body=b'{"ticket": "t\xc3\xa4", "expires_in": 7200}'), "no ticket"),
        (Fault(body=b'{"ticket": "%b", "expires_in": 7200}' % (b"t" * 1025)), "no ticket"),
        (Fault(body=b'{"errcode": true}'), "errcode is no number"),
        (Fault(body=b'{"errcode": 1%b}' % (b"0" * 4000)), "errcode is no number"),
        (Fault(body=b'{"ticket": "t", "expires_in": 0}'), "expires_in"),
        (Fault(body=b'{"ticket": "t", "expires_in": 59}'), "expires_in"),
        (Fault(body=b'{"ticket": "t", "expires_in": -1}'), "expires_in"),
        (Fault(body=b'{"ticket": "t", "expires_in": "7200 s"}'), "expires_in"),
        (Fault(body=b'{"ticket": "t", "expires_in": true}'), "expires_in"),
        (Fault(body=b'{"ticket": "t", "expires_in": NaN}'), "expires_in"),
        (Fault(body=b'{"ticket": "t", "expires_in": 1e999}'), "expires_in"),
        (Fault(body=b'"' + b"x" * 9000 + b'"'), "ContentDecodingError"),
        (Fault(hang_up=True), "RemoteDisconnected"),
        (Fault(delay=1), "ReadTimeout"),
    ],
)
def test_what_is_not_wechats_answer_is_no_credential(
    wechat: Sandbox, fault: Fault, cause: str
) -> None:
    wechat.faults["getticket"] = fault
    with pytest.raises(WeChatUnreachable, match=cause):
        client(wechat, timeout=0.2 if fault.delay else PATIENCE).fetch_jsapi_ticket("a-token")


def test_the_cause_is_named_down_to_the_bottom(wechat: Sandbox) -> None:
    for api, cause in {
        f"http://127.0.0.1:{free_port()}": r"ConnectionRefusedError \(Connection refused\)",
        "http://api..weixin.qq.com": r"LocationParseError/Unicode\w*Error$",
    }.items():
        with pytest.raises(WeChatUnreachable) as caught:
            client(wechat, api=api).fetch_access_token()
        assert re.search(cause, caught.value.what), caught.value.what


@pytest.mark.parametrize("endpoint", ["token", "getticket"])
@pytest.mark.parametrize(
    "fault",
    [
        None,
        Fault(hang_up=True),
        Fault(delay=0.3),
        Fault(body=b"x"),
        Fault(errcode=40164),
    ],
)
def test_no_traceback_of_a_failed_call_has_a_credential_in_it(
    wechat: Sandbox, endpoint: str, fault: Fault | None
) -> None:
    token = client(wechat).fetch_access_token().value
    wechat.replace_token()
    api = client(wechat, timeout=0.1)
    if fault is None:
        api = client(wechat, api=f"http://127.0.0.1:{free_port()}")
    else:
        wechat.faults[endpoint] = fault
    call = api.fetch_access_token if endpoint == "token" else partial(api.fetch_jsapi_ticket, token)
    with pytest.raises(SigningError) as caught:
        call()
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert_no_credential(shown, wechat.issued)


def test_a_message_that_repeats_the_request_is_redacted(wechat: Sandbox) -> None:
    body = '{"errcode": 1, "errmsg": "bad\\nrequest secret=%s"}' % wechat.secret  # noqa: UP031
    wechat.faults["token"] = Fault(body=body.encode())
    with pytest.raises(WeChatRefused) as caught:
        client(wechat).fetch_access_token()
    assert caught.value.errmsg == "bad request secret=***"


@pytest.mark.parametrize(
    "value",
    [None, 1, "", " ", "a b", "a\n", "中", "undefined", "NULL", "a&b", "a%20", "a\x85", "a" * 1025],
)
def test_what_is_no_credential(value: object) -> None:
    assert not is_credential(value)
    assert is_credential("sM4AOVdWfPE4DxkXGEs8VMCPGGVi4C3VM0P37wVUCFvkVAy_90u5h9nbSlYy3-Sl")
