"""The framework's limit: a constant of the same size."""

from __future__ import annotations

import asyncio
import os

import tornado.web


class GetApi(tornado.web.RequestHandler):
    def get(self) -> None:
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.write("x" * 222)


async def main() -> None:
    application = tornado.web.Application([("/getApi", GetApi)])
    application.listen(int(os.environ["PORT"]), "127.0.0.1", backlog=1024)
    await asyncio.Event().wait()


asyncio.run(main())
