"""The arithmetic: four fields, one SHA-1, and the object that `wx.config` takes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from typing import Any

from .settings import JssdkSettings


def new_noncestr() -> str:
    """16 letters and digits that nobody can foretell."""
    return os.urandom(8).hex()


def sign(*, jsapi_ticket: str, noncestr: str, timestamp: int, url: str) -> str:
    """The signature, 40 lower-case hex digits.

    WeChat's rule (JS-SDK documentation, appendix 1): SHA-1 over the four fields with lower-case
    names in ASCII order and raw values; nothing is URL-escaped.
    """
    text = f"jsapi_ticket={jsapi_ticket}&noncestr={noncestr}&timestamp={timestamp}&url={url}"
    return hashlib.sha1(text.encode()).hexdigest()


class WxConfig:
    """What pages hand to `wx.config`, as JSON. A class because it carries, ready-made, what is
    the same in every answer: all but timestamp, nonceStr and signature."""

    def __init__(self, appid: str, jssdk: JssdkSettings) -> None:
        tail: dict[str, Any] = {"jsApiList": jssdk.js_api_list}
        if jssdk.open_tag_list:
            tail["openTagList"] = jssdk.open_tag_list
        self._head = json.dumps({"debug": jssdk.debug, "appId": appid})[:-1]
        self._tail = json.dumps(tail)[1:]

    def sign(self, url: str, jsapi_ticket: str) -> str:
        """The JSON for this page, now."""
        noncestr, timestamp = new_noncestr(), int(time.time())
        signature = sign(jsapi_ticket=jsapi_ticket, noncestr=noncestr, timestamp=timestamp, url=url)
        return (
            f'{self._head}, "timestamp": {timestamp}, "nonceStr": "{noncestr}", '
            f'"signature": "{signature}", {self._tail}'
        )
