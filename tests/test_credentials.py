from __future__ import annotations

import re
import socket
import threading
import traceback
from functools import partial
from typing import Any

import pytest
from harness import PATIENCE, Fault, Sandbox, assert_no_credential, free_port

from wechat_sign.credentials import Grant, WeChat, is_credential
from wechat_sign.errors import SigningError, WeChatRefused, WeChatUnreachable
from wechat_sign.settings import WeChatSettings


def client(wechat: Sandbox, **more: Any) -> WeChat:
    account: dict[str, Any] = {"appid": wechat.appid, "secret": wechat.secret, "api": wechat.url}
    account |= {"token_api": "token", **more}
    return WeChat(WeChatSettings(**account))


def test_wechat_is_sent_what_its_manual_says_and_gives_the_ticket(
    wechat: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    respond = wechat.respond

    def note(*given: Any) -> tuple[int, bytes]:
        sent.append(given)
        return respond(*given)

    monkeypatch.setattr(wechat, "respond", note)
    account = {"appid": wechat.appid, "secret": wechat.secret}
    account["grant_type"] = "client_credential"
    for token_api, method in (("token", "GET"), ("stable_token", "POST")):
        api = client(wechat, token_api=token_api)
        token = api.fetch_access_token()
        assert_no_credential(repr(token), wechat.issued)
        assert api.fetch_jsapi_ticket(token.value) == Grant(wechat.ticket, 7200)
        query = {"access_token": token.value, "type": "jsapi"}
        assert sent == [(token_api, method, account), ("getticket", "GET", query)]
        sent.clear()


@pytest.mark.parametrize("token_api", ["token", "stable_token"])
def test_a_wrong_secret_or_token_is_refused(wechat: Sandbox, token_api: str) -> None:
    api = client(wechat, token_api=token_api, secret="wrong")
    for call, refusal in (
        (api.fetch_access_token, (40125, token_api)),
        (partial(api.fetch_jsapi_ticket, "wrong"), (40001, "getticket")),
    ):
        with pytest.raises(WeChatRefused) as caught:
            call()
        assert (caught.value.errcode, caught.value.endpoint) == refusal


def shown(error: SigningError) -> str:
    """What a log might have of it, which may be no credential."""
    return "".join(traceback.format_exception(error)) + repr(error)


def granting(expires_in: str, ticket: str = '"t"') -> Fault:
    return Fault(body=f'{{"ticket": {ticket}, "expires_in": {expires_in}}}'.encode())


NO_TICKET = "it has no ticket in it"
NO_EXPIRY = "its expires_in is no number of seconds, 60 or more"
NO_ERRCODE = "its errcode is no number"
NO_ANSWERS = [
    (Fault(status=502, body=b"<html>Bad Gateway</html>"), "HTTPError (HTTP 502)"),
    (Fault(status=302, body=b""), "HTTPError (HTTP 302)"),
    (Fault(body=b"<html>portal</html>"), "it is not JSON"),
    (Fault(body=b'{"ticket": "t", "expi'), "it is not JSON"),
    (Fault(body=b"\xff\xfe{"), "it is not JSON"),
    (Fault(body=b"[" * 8000), "it is not JSON"),
    (Fault(body=b"[1]"), "it is not a JSON object"),
    (Fault(body=b'{"errcode": "40001"}'), NO_ERRCODE),
    (Fault(body=b'{"errcode": true}'), NO_ERRCODE),
    (Fault(body=b'{"errcode": 1%b}' % (b"0" * 4000)), NO_ERRCODE),
    (Fault(body=b'{"errcode": -1000000001}'), NO_ERRCODE),
    (Fault(body=b'{"expires_in": 7200}'), NO_TICKET),
    (granting("7200", '""'), NO_TICKET),
    (granting("7200", '"undefined"'), NO_TICKET),
    (granting("7200", "7"), NO_TICKET),
    (Fault(body=b'{"ticket": "t"}'), NO_EXPIRY),
    (granting("59.9"), NO_EXPIRY),
    (granting("-1"), NO_EXPIRY),
    (granting('"7200 s"'), NO_EXPIRY),
    (granting('"1234567890"'), NO_EXPIRY),
    (granting("true"), NO_EXPIRY),
    (granting("NaN"), NO_EXPIRY),
    (granting("1e999"), NO_EXPIRY),
    (Fault(body=b'{"ticket": "t", "expires_in": 60}'.ljust(8193)), "ContentDecodingError"),
    (Fault(hang_up=True), "ConnectionError/RemoteDisconnected"),
    (Fault(delay=1), "ReadTimeout/TimeoutError"),
]


def test_what_is_not_wechats_answer_is_no_credential(wechat: Sandbox) -> None:
    token = wechat.token_of_another_program()
    for fault, cause in NO_ANSWERS:
        wechat.faults["getticket"] = fault
        with pytest.raises(WeChatUnreachable) as caught:
            client(wechat, timeout=0.2 if fault.delay else PATIENCE).fetch_jsapi_ticket(token)
        told = caught.value.what.removeprefix("no usable answer from WeChat to getticket: ")
        assert told == cause, fault
        assert_no_credential(shown(caught.value), wechat.issued)


def test_what_is_just_an_answer_is_taken(wechat: Sandbox) -> None:
    for fault, expires_in in (
        (granting("60"), 60),
        (granting('"7200"'), 7200),
        (granting("7200.5"), 7200.5),
        (granting("1e9"), 1e9),
        (Fault(body=b'{"ticket": "t", "expires_in": 60}'.ljust(8192)), 60),
    ):
        wechat.faults["getticket"] = fault
        assert client(wechat).fetch_jsapi_ticket("a-token") == Grant("t", expires_in), fault
    wechat.faults["getticket"] = Fault(errcode=-(10**9))
    with pytest.raises(WeChatRefused, match="errcode -1000000000 "):
        client(wechat).fetch_jsapi_ticket("a-token")


def test_what_is_a_credential_and_what_is_none() -> None:
    nothings: list[object] = ["undefined", "NULL", "None", "nil", "False", None, 1]
    for value in [*nothings, "", "a b", "a\n", "中", "a&b", "a%20", "a\x85", "a" * 1025]:
        assert not is_credential(value), value
    for value in ("sM4AOVdWfPE4DxkXGEs8VMCPGGVi4C3VM0P37wVUCFvkVAy_90u5h9nbSlYy3-Sl.", "a" * 1024):
        assert is_credential(value), value


# What is told of a failure.


def test_the_cause_is_named_down_to_the_bottom(wechat: Sandbox) -> None:
    for api, cause in {
        f"http://127.0.0.1:{free_port()}": r"ConnectionRefusedError \(Connection refused\)",
        "http://api..weixin.qq.com": r"LocationParseError/Unicode\w*Error$",
    }.items():
        with pytest.raises(WeChatUnreachable) as caught:
            client(wechat, api=api).fetch_access_token()
        assert re.search(cause, caught.value.what), caught.value.what
        assert_no_credential(shown(caught.value), wechat.issued)


def test_a_message_that_repeats_the_request_is_redacted(wechat: Sandbox) -> None:
    body = '{"errcode": 1, "errmsg": "bad\\nrequest secret=%s"}' % wechat.secret  # noqa: UP031
    wechat.faults["token"] = Fault(body=body.encode())
    with pytest.raises(WeChatRefused) as caught:
        client(wechat).fetch_access_token()
    assert caught.value.errmsg == "bad request secret=***"


def test_a_proxys_words_are_cut_and_redacted(
    wechat: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:{1}".format(*proxy.getsockname()))

        def refuse() -> None:
            connection, _ = proxy.accept()
            with connection:
                connection.recv(65536)
                words = f"no {wechat.secret.upper()}\x9b2J{'x' * 9000}"
                connection.sendall(f"HTTP/1.1 407 {words}\r\n\r\n".encode("latin-1"))

        refusing = threading.Thread(target=refuse)
        refusing.start()
        with pytest.raises(WeChatUnreachable) as caught:
            client(wechat, api="https://api.weixin.qq.com").fetch_access_token()
        refusing.join()
    assert r"407 no ***\x9b2jxx" in caught.value.what
    assert caught.value.what.isprintable()
    assert len(caught.value.what) < 400


def test_a_proxy_that_is_at_fault_is_named_by_its_variable(
    wechat: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = wechat.url.rpartition(":")[2]
    for variable, value, words in (
        ("https_proxy", "socks5://user:s3cr3t@127.0.0.1:1", "https_proxy is a SOCKS proxy"),
        ("https_proxy", f"https://127.0.0.1:{port}", "https_proxy begins with https://, and"),
        ("ALL_PROXY", "http://user:s3cr3t@127.0.0.1:1", "refused); by the proxy of ALL_PROXY"),
        ("no_proxy", "127.0.0.1", "refused)"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            api = "https://127.0.0.1:1" if variable == "no_proxy" else "https://api.weixin.qq.com"
            with pytest.raises(WeChatUnreachable) as caught:
                client(wechat, api=api).fetch_access_token()
        assert words in caught.value.what
        assert (" proxy" in caught.value.what) is (variable != "no_proxy")
        assert "s3cr3t" not in str(caught.value)
