"""How fast, shown beside what else one could run. Needs wrk (or hey); starts everything itself.

    python tests/benchmark.py [--seconds 5] [--rounds 3] [--plot FILE.png]

The contenders take turns, round by round; the table has medians with the lowest and the highest.
With two cores or more, the server under test has one to itself.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import hashlib
import io
import json
import logging
import os
import platform
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import redis
import requests
import tornado
import tornado.web
from harness import (
    PATIENCE,
    ROOT,
    Fault,
    RedisServer,
    Sandbox,
    eventually,
    free_port,
    resident,
    write_ini,
)

PAGE = "https://h5.example.com/page?a=1&b=2"
CONNECTIONS = 32
CALLERS = 1000
WECHAT_TAKES = 0.3
EXPIRE = 2
"""Seconds that a ticket lives while it expires under load."""
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
LUA = """
done = function(summary, latency, requests)
  local e = summary.errors
  local failed = e.status + e.connect + e.read + e.write + e.timeout
  io.write(string.format(
    '{"requests": %d, "us": %d, "p50": %d, "p99": %d, "p999": %d, "failed": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    latency:percentile(99.9), failed))
end
"""


# What this server is compared with, each a process of its own: benchmark.py --serve NAME PORT ….


class Bare(tornado.web.RequestHandler):
    """The framework's limit: a constant of the same size."""

    def get(self) -> None:
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.write("x" * 222)


class Naive(tornado.web.RequestHandler):
    """The shape that this program replaces: a blocking GET for each request, and the fetching in
    the handler when there is nothing."""

    def initialize(self, kept: redis.Redis, account: dict[str, str], expire: int) -> None:
        self.kept, self.account, self.expire = kept, account, expire

    def get(self) -> None:
        ticket: Any = self.kept.get("ticket")
        if ticket is None:
            api = self.account["api"]
            given = {name: self.account[name] for name in ("appid", "secret")}
            given["grant_type"] = "client_credential"
            token = requests.get(f"{api}/cgi-bin/token", params=given, timeout=9).json()
            query = {"access_token": token["access_token"], "type": "jsapi"}
            url = f"{api}/cgi-bin/ticket/getticket"
            ticket = requests.get(url, params=query, timeout=9).json()["ticket"]
            self.kept.setex("ticket", self.expire, ticket)
        answer = {
            "debug": True,
            "appId": self.account["appid"],
            "timestamp": int(time.time()),
            "nonceStr": secrets.token_hex(8),
            "jsApiList": ["updateAppMessageShareData", "updateTimelineShareData"],
        }
        text = "jsapi_ticket={}&noncestr={}&timestamp={}&url={}".format(
            ticket, answer["nonceStr"], answer["timestamp"], self.get_argument("url")
        )
        answer["signature"] = hashlib.sha1(text.encode()).hexdigest()
        self.write(answer)


def serve(name: str, port: int, account: dict[str, str], redis_port: int, expire: int) -> None:
    """Runs a contender until it is killed."""
    logging.getLogger("tornado").setLevel(logging.ERROR)
    kept = redis.Redis(port=redis_port, decode_responses=True)
    given = {"kept": kept, "account": account, "expire": expire}
    route = ("/getApi", Bare) if name == "bare" else ("/getApi", Naive, given)

    async def main() -> None:
        tornado.web.Application([route]).listen(port, "127.0.0.1", backlog=1024)
        await asyncio.Event().wait()

    asyncio.run(main())


# The measurements.


@dataclass
class Contender:
    name: str
    label: str
    seen: dict[str, list[float]] = field(default_factory=dict)

    def note(self, what: str, value: float) -> None:
        self.seen.setdefault(what, []).append(value)

    def median(self, what: str) -> float:
        return statistics.median(self.seen[what]) if what in self.seen else float("nan")


class Running:
    """A contender's process, on a core of its own where there are two."""

    def __init__(self, bench: Benchmark, name: str, expire: int) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.page = f"{self.url}/getApi?url={PAGE}"
        command = bench.command(name, self.port, expire)
        pinned = ["taskset", "-c", str(CORES[0])] if len(CORES) > 1 else []
        self.process = subprocess.Popen(
            [*pinned, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def first_answer(self) -> None:
        """Returns once a request was answered with 200."""

        def answered() -> bool:
            try:
                return fetch_status(self.page) == 200
            except OSError:
                return False

        eventually("the contender answers", answered)

    def listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except ConnectionRefusedError:
            return False
        return True

    def resident(self) -> float:
        """MB."""
        return resident(self.process) / 1024

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def pairs(one: Contender, other: Contender, what: str) -> list[tuple[float, float]]:
    """What both showed in the same round."""
    return list(zip(one.seen[what], other.seen[what], strict=True))


def fetch_status(url: str) -> int:
    return requests.get(url, timeout=PATIENCE).status_code


class Benchmark:
    """The surroundings, and what was measured in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.redis = RedisServer()
        self.wechat = Sandbox().start()
        self.lua = folder / "done.lua"
        self.lua.write_text(LUA)
        self.running: list[Running] = []
        self.contenders = [
            Contender("bare", "bare Tornado handler, a constant"),
            Contender("ours", "this server, Redis"),
            Contender("memory", "this server, no Redis"),
            Contender("naive", "naive: Redis GET and fetch in the handler"),
        ]

    def command(self, name: str, port: int, expire: int) -> list[str]:
        if name in ("bare", "naive"):
            account = {"appid": self.wechat.appid, "secret": self.wechat.secret}
            given = json.dumps({**account, "api": self.wechat.url})
            arguments = ["--serve", name, str(port), given, str(self.redis.port), str(expire)]
            return [sys.executable, __file__, *arguments]
        lines = self.redis.ini if name == "ours" else ["[redis]"]
        lines += [f"expire = {expire}", f"recheck = {0 if expire < 600 else 600}"]
        ini = write_ini(self.folder / f"{port}.ini", self.wechat, *lines)
        arguments = ["--config", str(ini), "--address", "127.0.0.1", "--port", str(port)]
        return [sys.executable, str(ROOT / "server.py"), *arguments]

    def run(self, name: str, expire: int) -> Running:
        """A cold contender."""
        self.forget()
        return self.start(name, expire)

    def forget(self) -> None:
        """Empties Redis and counts calls to WeChat anew."""
        self.redis.run("FLUSHALL")
        self.wechat.calls.clear()

    def start(self, name: str, expire: int) -> Running:
        self.running.append(Running(self, name, expire))
        return self.running[-1]

    def load(self, url: str, seconds: float) -> dict[str, float]:
        """Requests per second and latencies in ms at 32 connections."""
        if shutil.which("wrk"):
            duration = f"-d{max(1, round(seconds))}s"
            command = ["wrk", "-t1", f"-c{CONNECTIONS}", duration, "-s", str(self.lua), url]
            seen = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
            figures = {name: seen[name] / 1000 for name in ("p50", "p99", "p999")}
            rate = seen["requests"] / seen["us"] * 1e6
            return {"rps": rate, **figures, "failed": seen["failed"]}
        command = ["hey", "-z", f"{seconds}s", "-c", str(CONNECTIONS), "-o", "csv", url]
        rows = list(csv.DictReader(io.StringIO(subprocess.check_output(command, text=True))))
        times = sorted(1000 * float(row["response-time"]) for row in rows)
        figures = {
            name: times[min(len(times) - 1, int(len(times) * share))]
            for name, share in {"p50": 0.5, "p99": 0.99, "p999": 0.999}.items()
        }
        failed = sum(row["status-code"] != "200" for row in rows)
        return {"rps": len(rows) / seconds, **figures, "failed": failed}

    def measure(self, contender: Contender, seconds: float) -> None:
        """One round of everything for one contender."""
        self.wechat.faults = {}
        began = time.monotonic()
        running = self.run(contender.name, 7100)
        running.first_answer()
        contender.note("start, s", time.monotonic() - began)
        for what, figure in self.load(running.page, seconds).items():
            contender.note(f"steady {what}", figure)
        contender.note("resident, MB", running.resident())
        running.end()
        if contender.name == "bare":
            return

        self.wechat.faults = dict.fromkeys(("token", "getticket"), Fault(delay=WECHAT_TAKES))
        running = self.run(contender.name, EXPIRE)
        running.first_answer()
        for what, figure in self.load(running.page, max(seconds, 2 * EXPIRE)).items():
            contender.note(f"expiring {what}", figure)
        running.end()

        running = self.run(contender.name, 7100)
        took, calls = self.cold_start(running)
        contender.note("cold start of the two calls", took / (2 * WECHAT_TAKES))
        contender.note("cold start calls", calls)
        running.end()

        if contender.name != "memory":
            contender.note("eight instances, calls", self.eight_instances(contender.name))

    def cold_start(self, running: Running) -> tuple[float, int]:
        """Seconds from the first call to WeChat until 1,000 callers have their answer."""
        began: list[float] = []

        def watch() -> None:
            eventually("WeChat is called", self.wechat.calls.total)
            began.append(time.monotonic())

        watching = threading.Thread(target=watch)
        watching.start()
        eventually("the contender listens", running.listens)
        callers = []
        request = f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        for _ in range(CALLERS):
            callers.append(socket.create_connection(("127.0.0.1", running.port), PATIENCE))
            callers[-1].sendall(request)
        for caller in callers:
            assert b" 200 " in caller.recv(65536)
        ended = time.monotonic()
        for caller in callers:
            caller.close()
        watching.join()
        return ended - began[0], self.wechat.calls.total()

    def eight_instances(self, name: str) -> int:
        """Calls to WeChat that eight instances make between them, each hit at once."""
        self.forget()
        instances = [self.start(name, 7100) for _ in range(8)]
        threads = [threading.Thread(target=instance.first_answer) for instance in instances]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for instance in instances:
            instance.end()
        return self.wechat.calls.total()

    def table(self) -> str:
        """Markdown: a row for each measurement, a column for each contender."""
        measured = list(self.contenders[1].seen)
        rows = [["", *(contender.label for contender in self.contenders)]]
        rows += [[what, *(self._cell(c, what) for c in self.contenders)] for what in measured]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "| "
            + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
            + " |"
            for row in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)

    @staticmethod
    def _cell(contender: Contender, what: str) -> str:
        values = contender.seen.get(what)
        if not values:
            return ""
        form = ",.0f" if max(values) >= 100 or ("calls" in what and "of" not in what) else ".2f"
        low, middle, high = min(values), statistics.median(values), max(values)
        text = f"{middle:{form}}"
        return text if low == high else f"{text} ({low:{form}} to {high:{form}})"

    def ratios(self) -> str:
        """What the goals are about, each the median of the rounds' own ratios: two measurements
        of one round stand side by side in time, and noisy machines change over minutes."""
        bare, ours, memory, naive = self.contenders
        cold = [(ratio, 1.0) for ratio in ours.seen["cold start of the two calls"]]
        resident = [(megabytes, 1.0) for megabytes in ours.seen["resident, MB"]]
        lines = {
            "throughput, this server / bare (goal: 0.9 or more)": pairs(ours, bare, "steady rps"),
            "throughput, this server / naive (goal: 2.8 or more)": pairs(ours, naive, "steady rps"),
            "throughput, bare / naive": pairs(bare, naive, "steady rps"),
            "throughput, this server without Redis / with it": pairs(memory, ours, "steady rps"),
            "p99 through expiries / steady, this server (goal: 1.2 or less)": list(
                zip(ours.seen["expiring p99"], ours.seen["steady p99"], strict=True)
            ),
            "p99 through expiries / steady, naive": list(
                zip(naive.seen["expiring p99"], naive.seen["steady p99"], strict=True)
            ),
            "cold start of 1,000 / the two calls' own time (goal: 1.2 or less)": cold,
            "resident MB, this server (goal: 45 or less)": resident,
        }
        return "\n".join(
            f"{statistics.median(one / other for one, other in both):6.2f}  {name}"
            for name, both in lines.items()
        )

    def plot(self, path: Path) -> None:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
        labels = [contender.label for contender in self.contenders]
        axes[0].barh(labels, [c.median("steady rps") for c in self.contenders], color="#07a150")
        axes[0].set_title("requests per second, one core")
        for what, colour in (("steady p99", "#9ca3af"), ("expiring p99", "#d9363e")):
            values = [c.median(what) for c in self.contenders]
            height, shift = 0.38, -0.2 if what.startswith("steady") else 0.2
            places = [place + shift for place in range(len(labels))]
            axes[1].barh(places, values, height, color=colour, label=what.replace("p99", ""))
        axes[1].set_yticks(range(len(labels)), [""] * len(labels))
        axes[1].set_xscale("log")
        axes[1].set_title("p99, ms (log)")
        axes[1].legend()
        for axis in axes:
            axis.invert_yaxis()
        figure.savefig(path, dpi=110)

    def close(self) -> None:
        """Leaves nothing running, however the rounds ended."""
        for running in self.running:
            running.end()
        self.wechat.stop()
        self.redis.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=5, help="of load for a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        name, port, account, redis_port, expire = given.serve
        serve(name, int(port), json.loads(account), int(redis_port), int(expire))
        return 0
    if not (shutil.which("wrk") or shutil.which("hey")):
        print("the benchmark needs wrk or hey for its load: apt-get install wrk", file=sys.stderr)
        return 1
    if len(CORES) > 1:
        os.sched_setaffinity(0, CORES[1:])
    with tempfile.TemporaryDirectory() as folder:
        bench = Benchmark(Path(folder))
        try:
            for number in range(given.rounds):
                for contender in bench.contenders:
                    print(f"round {number + 1}: {contender.label}", file=sys.stderr, flush=True)
                    bench.measure(contender, given.seconds)
        finally:
            bench.close()
    print(f"Python {platform.python_version()}, Tornado {tornado.version}, {len(CORES)} cores\n")
    print(bench.table() + "\n\n" + bench.ratios())
    if given.plot:
        bench.plot(given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
