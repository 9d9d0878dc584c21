"""The shape that this program replaces: a blocking Redis GET for each request, and the fetching in
the handler when there is nothing."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from typing import Any

import redis
import requests
import tornado.web

API = os.environ["API"]
APPID = os.environ["APPID"]
ACCOUNT = {"appid": APPID, "secret": os.environ["SECRET"], "grant_type": "client_credential"}
KEPT = redis.Redis(port=int(os.environ["REDIS_PORT"]), decode_responses=True)


class GetApi(tornado.web.RequestHandler):
    def get(self) -> None:
        ticket: Any = KEPT.get("ticket")
        if ticket is None:
            token = requests.get(f"{API}/cgi-bin/token", params=ACCOUNT, timeout=9).json()
            query = {"access_token": token["access_token"], "type": "jsapi"}
            url = f"{API}/cgi-bin/ticket/getticket"
            ticket = requests.get(url, params=query, timeout=9).json()["ticket"]
            KEPT.setex("ticket", int(os.environ["EXPIRE"]), ticket)
        answer = {
            "debug": True,
            "appId": APPID,
            "timestamp": int(time.time()),
            "nonceStr": secrets.token_hex(8),
            "jsApiList": ["updateAppMessageShareData", "updateTimelineShareData"],
        }
        text = "jsapi_ticket={}&noncestr={}&timestamp={}&url={}".format(
            ticket, answer["nonceStr"], answer["timestamp"], self.get_argument("url")
        )
        answer["signature"] = hashlib.sha1(text.encode()).hexdigest()
        self.write(answer)


async def main() -> None:
    application = tornado.web.Application([("/getApi", GetApi)])
    application.listen(int(os.environ["PORT"]), "127.0.0.1", backlog=1024)
    await asyncio.Event().wait()


asyncio.run(main())
