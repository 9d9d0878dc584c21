# mypy: disable-error-code="import-not-found,import-untyped,misc,untyped-decorator"
"""Flask with wechatpy, whose session keeps the ticket in memory unless it is told otherwise."""

from __future__ import annotations

import os
import time
from typing import Any

from flask import Flask, request
from wechatpy import WeChatClient
from wechatpy.utils import random_string

API = os.environ["API"]


class Client(WeChatClient):
    """With another host than WeChat's: the one is a constant, the other stands in the method."""

    API_BASE_URL = f"{API}/cgi-bin/"

    def fetch_access_token(self) -> Any:
        account = {"appid": self.appid, "secret": self.secret, "grant_type": "client_credential"}
        return self._fetch_access_token(f"{API}/cgi-bin/token", account)


client = Client(os.environ["APPID"], os.environ["SECRET"])
app = Flask(__name__)


@app.get("/getApi")
def get_api() -> dict[str, Any]:
    ticket = client.jsapi.get_jsapi_ticket()
    noncestr, timestamp = random_string(), int(time.time())
    signature = client.jsapi.get_jsapi_signature(noncestr, ticket, timestamp, request.args["url"])
    return {
        "debug": True,
        "appId": client.appid,
        "timestamp": timestamp,
        "nonceStr": noncestr,
        "signature": signature,
        "jsApiList": ["updateAppMessageShareData", "updateTimelineShareData"],
    }
