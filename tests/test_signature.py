from __future__ import annotations

import hashlib
import json
import time

import pytest

from wechat_sign.settings import JssdkSettings
from wechat_sign.signature import WxConfig, new_noncestr, sign

TICKET = "sM4AOVdWfPE4DxkXGEs8VMCPGGVi4C3VM0P37wVUCFvkVAy_90u5h9nbSlYy3-Sl-HhTdfl2fzFy1AOcHKP7qg"
"""The one that WeChat's documentation publishes with its examples."""


@pytest.mark.parametrize(
    ("url", "signature"),
    [
        ("http://mp.weixin.qq.com?params=value", "0f9de62fce790f9a083d5c99e95740ceb90c27ed"),
        ("http://mp.weixin.qq.com", "f4d90daf4b3bca3078ab155816175ba34c443a7b"),
    ],
)
def test_wechats_own_examples_come_out_as_published(url: str, signature: str) -> None:
    signed = sign(jsapi_ticket=TICKET, noncestr="Wm3WZYTPz0wzccnW", timestamp=1414587457, url=url)
    assert signed == signature


def test_the_url_is_signed_as_utf_8() -> None:
    url = "https://h5.example.com/中文?名=值"
    text = f"jsapi_ticket=t&noncestr=n&timestamp=1&url={url}"
    expected = hashlib.sha1(text.encode("utf-8")).hexdigest()
    assert sign(jsapi_ticket="t", noncestr="n", timestamp=1, url=url) == expected


def test_noncestr_is_16_letters_and_digits_and_never_the_same() -> None:
    nonces = {new_noncestr() for _ in range(100)}
    assert len(nonces) == 100
    assert all(len(nonce) == 16 and nonce.isalnum() and nonce.isascii() for nonce in nonces)


def config(jssdk: JssdkSettings) -> dict[str, object]:
    answer = json.loads(WxConfig('wx"1', jssdk).sign("https://a/", "t"))
    assert isinstance(answer, dict)
    return answer


def test_wx_config_has_its_keys_in_order_and_no_others() -> None:
    answer = config(JssdkSettings())
    assert list(answer) == ["debug", "appId", "timestamp", "nonceStr", "signature", "jsApiList"]
    assert answer["debug"] is True
    assert answer["appId"] == 'wx"1'
    assert answer["jsApiList"] == list(JssdkSettings().js_api_list)
    assert config(JssdkSettings(debug=False))["debug"] is False


def test_open_tag_list_is_there_only_where_it_is_set() -> None:
    answer = config(JssdkSettings(open_tag_list=("wx-open-launch-weapp",)))
    assert list(answer)[-1] == "openTagList"
    assert answer["openTagList"] == ["wx-open-launch-weapp"]


def test_the_nonce_and_time_handed_out_are_those_signed() -> None:
    answer = config(JssdkSettings())
    timestamp, noncestr = answer["timestamp"], answer["nonceStr"]
    assert isinstance(timestamp, int)
    assert abs(timestamp - time.time()) < 60
    assert answer["signature"] == sign(
        jsapi_ticket="t", noncestr=str(noncestr), timestamp=timestamp, url="https://a/"
    )
