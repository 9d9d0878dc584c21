from __future__ import annotations

import json

import pytest

from wechat_sign.settings import JssdkSettings
from wechat_sign.signature import WxConfig, sign

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


def test_wx_config_has_what_the_ini_says_and_no_others() -> None:
    jssdk = JssdkSettings(debug=False, js_api_list=("scanQRCode",))
    answer = json.loads(WxConfig('wx"1', jssdk).sign("https://a/", "t"))
    assert list(answer) == ["debug", "appId", "timestamp", "nonceStr", "signature", "jsApiList"]
    assert (answer["debug"], answer["appId"]) == (False, 'wx"1')
    assert answer["jsApiList"] == ["scanQRCode"]
    jssdk = JssdkSettings(open_tag_list=("wx-open-launch-weapp",))
    answer = json.loads(WxConfig("wx1", jssdk).sign("https://a/", "t"))
    assert answer["debug"] is True
    assert answer["openTagList"] == ["wx-open-launch-weapp"]
