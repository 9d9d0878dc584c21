"""What several busy instances cost Redis and WeChat while nothing happens.

python tests/steady.py [--seconds 60] [--instances 4]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import CHECKED_KEY, Client, RedisServer, Sandbox, Server, assert_signs, write_ini


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--instances", type=int, default=4)
    given = parser.parse_args()
    redis_server, wechat = RedisServer(), Sandbox().start()
    instances, clients = [], []
    with tempfile.TemporaryDirectory() as folder:
        ini = write_ini(Path(folder) / "config.ini", wechat, *redis_server.ini)
        try:
            for _ in range(given.instances):
                command = ["--config", str(ini), "--address", "127.0.0.1", "--port", "0"]
                instances.append(Server(*command))
            for running in instances:
                assert_signs(running, wechat)
                clients.append(Client(wechat, running.address))
                clients[-1].start()
            counted, calls = redis_server.counting(), wechat.calls.total()
            began = time.monotonic()
            threading.Event().wait(given.seconds)
            took = time.monotonic() - began
            commands = counted()
            calls = wechat.calls.total() - calls
            fresh_for = redis_server.run("PTTL", CHECKED_KEY) / 1000
        finally:
            for client in clients:
                client.over.set()
            for running in instances:
                running.kill()
            wechat.stop()
            redis_server.stop()
    served = sum(client.served for client in clients)
    print(
        f"{given.instances} instances, {took:.0f} s, {served} pages: {calls} calls to WeChat "
        f"(the next one in {fresh_for:.0f} s), "
        f"{commands / took / given.instances:.2f} Redis commands a second for each"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
