"""The arithmetic: four fields, one SHA-1, and the object that `wx.config` takes."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from .settings import JssdkSettings


def new_noncestr() -> str:
    """16 letters and digits that nobody can foretell."""
    return secrets.token_hex(8)


def sign(*, jsapi_ticket: str, noncestr: str, timestamp: int, url: str) -> str:
    """The signature, 40 lower-case hex digits.

    WeChat's rule (JS-SDK documentation, appendix 1): SHA-1 over the four fields with lower-case
    names in ASCII order and raw values; nothing is URL-escaped.
    """
    text = f"jsapi_ticket={jsapi_ticket}&noncestr={noncestr}&timestamp={timestamp}&url={url}"
    return hashlib.sha1(text.encode()).hexdigest()


def wx_config(
    *, url: str, jsapi_ticket: str, appid: str, jssdk: JssdkSettings, noncestr: str, timestamp: int
) -> dict[str, Any]:
    """What the page hands to `wx.config`; `timestamp` in seconds since 1970."""
    config = {
        "debug": jssdk.debug,
        "appId": appid,
        "timestamp": timestamp,
        "nonceStr": noncestr,
        "signature": sign(
            jsapi_ticket=jsapi_ticket, noncestr=noncestr, timestamp=timestamp, url=url
        ),
        "jsApiList": jssdk.js_api_list,
    }
    if jssdk.open_tag_list:
        config["openTagList"] = jssdk.open_tag_list
    return config
