"""What a request costs and how late answers come, beside what else one could run.

    python tests/benchmark.py [--peers] [--blocks 15] [--seconds 5] [--plot FILE.png]

CPU is what the kernel counts for all threads of a process (/proc/PID/task/*/schedstat) over a fixed
number of requests on one connection. The contenders take turns block by block, in random order; the
table has medians with the quartiles, and medians of the ratios within a turn. That stays the same
on a busy machine, where requests a second do not. Latency is counted from the moment when a request
was due, at a fixed rate. `--peers` brings what one would pick instead, from npm (needs node) and
from PyPI.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import ROOT, Fault, RedisServer, Sandbox, eventually, fetch, free_port, write_ini

TARGET = f"/getApi?url={quote('https://h5.example.com/page?a=1&b=2', safe='')}"
PHONE = {
    "X-Forwarded-For": "203.0.113.7",
    "X-Real-IP": "203.0.113.7",
    "X-Forwarded-Proto": "https",
    "User-Agent": "Mozilla/5.0 (Linux; Android 14; V2254A Build/UP1A.231005.007; wv) AppleWebKit/"
    "537.36 (KHTML, like Gecko) Version/4.0 Chrome/130.0.6723.103 Mobile Safari/537.36 XWEB/1300473"
    " MMWEBSDK/20241103 MMWEBID/1234 MicroMessenger/8.0.56.2800(0x28003856) WeChat/arm64 Weixin "
    "NetType/WIFI Language/zh_CN ABI/arm64",
    "Accept": "*/*",
    "Origin": "https://h5.example.com",
    "X-Requested-With": "com.tencent.mm",
    "Sec-Fetch-Site": "same-site",
    "Sec-Fetch-Mode": "cors",
    "Sec-Fetch-Dest": "empty",
    "Referer": "https://h5.example.com/",
    "Accept-Encoding": "gzip, deflate, br, zstd",
    "Accept-Language": "zh-CN,zh;q=0.9,en-US;q=0.8,en;q=0.7",
    "sec-ch-ua-mobile": "?1",
}
"""What an Android webview sends by way of a proxy, beside Host."""
HEADS = {"one header": {}, "a phone's fifteen": PHONE}
REQUESTS = 1000
"""In a block."""
CONNECTIONS, RATES, SLOW = 32, (500, 3000), 0.3
EXPIRE = 2
"""Seconds that a ticket lives while it expires under load; WeChat takes SLOW seconds for a call."""
FOLDER = Path(__file__).with_name("peers")
NPM, VENV = Path(__file__).with_name(".npm"), ROOT / ".venv-peers"
NODE = {"wechat-jssdk": "5.1.0", "co-wechat-api": "3.11.0"}
EXPRESS = {"4": "4.22.3", "5": "5.3.0"}
WHEELS = ("Flask==3.1.3", "wechatpy==1.8.18", "gunicorn==27.0.1", "cryptography==50.0.2")
CONTENDERS = {
    "ours": "this server",
    "bare": "Tornado, a constant",
    "naive": "Tornado, the plain way",
}
PEERS = {
    "express_wechat_jssdk 4": "express 4 + wechat-jssdk",
    "express_wechat_jssdk 5": "express 5 + wechat-jssdk",
    "express_co_wechat_api 5": "express 5 + co-wechat-api",
    "flask_wechatpy": "Flask + wechatpy",
}
GRANTS = {"express_co_wechat_api 5": EXPIRE + 10, "flask_wechatpy": EXPIRE}
"""The `expires_in` that makes a ticket live for EXPIRE seconds, where nothing else decides."""


class Contender:
    """A process that answers /getApi."""

    def __init__(self, name: str, bench: Bench, expire: int = 7100) -> None:
        grants = GRANTS.get(name, 7200) if expire == EXPIRE else 7200
        self.port, self.wechat = free_port(), Sandbox(token_life=grants)
        self.wechat.start()
        self.slow_down(SLOW if expire == EXPIRE else 0, grants)
        bench.running.append(self)
        environ = {
            "PORT": str(self.port),
            "API": self.wechat.url,
            "APPID": self.wechat.appid,
            "SECRET": self.wechat.secret,
            "REDIS_PORT": str(bench.redis.port),
            "EXPIRE": str(expire),
            "NODE_PATH": str(NPM / f"express{name[-1]}" / "node_modules"),
            "NODE_ENV": "production",
        }
        self.process = subprocess.Popen(
            self._command(name, bench, expire),
            env={**os.environ, **environ},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        url = f"http://127.0.0.1:{self.port}{TARGET}"
        eventually(f"{name} answers", lambda: answers(url))

    def slow_down(self, delay: float, grants: int) -> None:
        """Has WeChat take so many seconds for each call, and grant a ticket for so many."""
        body = json.dumps({"ticket": "t", "expires_in": grants}).encode()
        faults = {"token": Fault(delay=delay), "stable_token": Fault(delay=delay)}
        self.wechat.faults = {**faults, "getticket": Fault(delay=delay, body=body)}

    def _command(self, name: str, bench: Bench, expire: int) -> list[str]:
        kind = name.split()[0]
        if kind in ("bare", "naive"):
            return [sys.executable, str(FOLDER / f"tornado_{kind}.py")]
        if kind.startswith("express"):
            return ["node", str(FOLDER / f"{kind}.js")]
        if kind.startswith("flask"):
            worker = ["--workers", "1", "--threads", "8", "--keep-alive", "75"]
            bound = ["--chdir", str(FOLDER), "--bind", f"127.0.0.1:{self.port}", f"{kind}:app"]
            return [str(VENV / "bin" / "gunicorn"), *worker, *bound]
        lines = [*bench.redis.ini, f"expire = {expire}", f"recheck = {600 if expire > 600 else 0}"]
        lines += ["[jssdk]", "page_hosts = h5.example.com"]
        # As many names as the others' answers have.
        lines += ["js_api_list = updateAppMessageShareData, updateTimelineShareData"]
        ini = write_ini(bench.folder / f"{self.port}.ini", self.wechat, *lines)
        listen = ["--address", "127.0.0.1", "--port", str(self.port)]
        return [sys.executable, str(ROOT / "server.py"), "--config", str(ini), *listen]

    def ps(self, what: str) -> list[int]:
        told = subprocess.check_output(["ps", "-o", f"{what}=", "-g", str(self.process.pid)])  # noqa: S607
        return list(map(int, told.split()))

    def cpu(self) -> float:
        """Microseconds of CPU so far, of all its processes and threads."""
        tasks = (one for pid in self.ps("pid") for one in Path(f"/proc/{pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1000

    def cost(self, headers: dict[str, str]) -> float:
        """Microseconds of CPU that a request costs it."""
        request = request_with(headers)
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            before = self.cpu()
            for _ in range(REQUESTS):
                connection.sendall(request)
                answer = connection.recv(65536)
                while not is_whole(answer):
                    answer += connection.recv(65536)
            return (self.cpu() - before) / REQUESTS

    def latencies(self, rate: int, seconds: float) -> list[float]:
        """Milliseconds from when each request was due; of those without an answer, infinite."""
        began, number, request = time.monotonic(), int(rate * seconds), request_with({})
        sockets = [socket.create_connection(("127.0.0.1", self.port)) for _ in range(CONNECTIONS)]
        idle, due, took, sent = deque(sockets), dict[socket.socket, float](), list[float](), 0
        parts = dict[socket.socket, bytes]()
        with selectors.DefaultSelector() as ready:
            for one in sockets:
                ready.register(one, selectors.EVENT_READ)
            while len(took) < number and time.monotonic() < began + seconds + 5:
                while idle and sent < number and began + sent / rate <= time.monotonic():
                    due[idle[0]] = began + sent / rate
                    idle.popleft().sendall(request)
                    sent += 1
                for key, _ in ready.select(0.0005):
                    answering: Any = key.fileobj
                    received = answering.recv(65536)
                    answer = parts.pop(answering, b"") + received
                    if received and not is_whole(answer):
                        parts[answering] = answer
                        continue
                    good, since = answer.startswith(b"HTTP/1.1 200"), due.pop(answering, began)
                    took.append(1000 * (time.monotonic() - since) if good else math.inf)
                    idle.append(answering) if received else ready.unregister(answering)
        for one in sockets:
            one.close()
        return took + [math.inf] * (number - len(took))

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.wechat.stop()


class Bench:
    """A Redis, and what runs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.redis = folder, RedisServer()
        self.running: list[Contender] = []

    def costs(self, names: Iterable[str], blocks: int) -> dict[str, dict[str, list[float]]]:
        """By kind of request and contender, the microseconds in each block."""
        contenders = {name: Contender(name, self) for name in names}
        seen: dict[str, dict[str, list[float]]] = {head: {} for head in HEADS}
        for head, headers in HEADS.items():
            for place in range(blocks + 2):  # the first two warm up
                for name in random.sample(list(contenders), len(contenders)):
                    cost = contenders[name].cost(headers)
                    if place > 1:
                        seen[head].setdefault(name, []).append(cost)
        seen["resident, MB"] = {n: [sum(c.ps("rss")) / 1024] for n, c in contenders.items()}
        self.end()
        return seen

    def late(self, name: str, seconds: float) -> dict[str, float]:
        """The p99 in milliseconds by what happens meanwhile."""
        steady = Contender(name, self)
        p99 = {f"{rate} a second": percentile(steady.latencies(rate, seconds)) for rate in RATES}
        if name == "bare":
            return p99
        self.redis.run("FLUSHALL")
        expiring = Contender(name, self, EXPIRE)
        p99["tickets expire"] = percentile(expiring.latencies(RATES[0], 2 * seconds))
        expiring.slow_down(60, EXPIRE)
        p99["WeChat hangs"] = percentile(expiring.latencies(RATES[0], 2 * seconds))
        self.redis.kill()
        p99["Redis is down, too"] = percentile(expiring.latencies(RATES[0], seconds))
        self.redis.start()
        return p99

    def end(self) -> None:
        for one in self.running:
            one.end()
        self.running.clear()


def answers(url: str) -> bool:
    try:
        return fetch(url)[0] == 200
    except ValueError:  # the constant is no JSON
        return True
    except OSError:
        return False


def request_with(headers: dict[str, str]) -> bytes:
    lines = [f"GET {TARGET} HTTP/1.1", "Host: a", *(f"{n}: {v}" for n, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def is_whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return bool(end and length and len(body) >= int(length[1]))


def percentile(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def install_peers() -> None:
    """Gets what the peers need into folders that are no part of the project."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise SystemExit("the peers need node and npm: apt-get install nodejs npm")
    for major, version in EXPRESS.items():
        folder = NPM / f"express{major}"
        wanted = [f"{name}@{pin}" for name, pin in {"express": version, **NODE}.items()]
        if not (folder / "node_modules").exists():
            folder.mkdir(parents=True, exist_ok=True)
            quiet = ("--ignore-scripts", "--no-audit", "--no-fund", "--silent")
            subprocess.run([npm, "install", "--prefix", str(folder), *quiet, *wanted], check=True)
    if not (VENV / "bin" / "gunicorn").exists():
        venv.create(VENV, with_pip=True)
        subprocess.run([str(VENV / "bin" / "pip"), "install", "-q", *WHEELS], check=True)


def table(rows: dict[str, dict[str, str]], names: dict[str, str]) -> str:
    lines = [["", *names.values()], ["---"] * (len(names) + 1)]
    lines += [[row, *(cells.get(name, "–") for name in names)] for row, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.0f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def plot(path: Path, late: dict[str, dict[str, float]], names: dict[str, str]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 4), layout="constrained")
    kinds = list(late["ours"])
    for place, kind in enumerate(kinds):
        shown = [min(late[name].get(kind, 0.0), 10_000) for name in names]
        axis.barh([n + 0.15 * place for n in range(len(names))], shown, 0.15, label=kind)
    axis.set_yticks([n + 0.3 for n in range(len(names))], list(names.values()))
    axis.set_xscale("log")
    axis.set_title("p99, ms; to the edge: some got no answer")
    axis.invert_yaxis()
    axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", action="store_true", help="also what one would pick instead")
    parser.add_argument("--blocks", type=int, default=15, help="of 1,000 requests for each")
    parser.add_argument("--seconds", type=float, default=5, help="of load for each latency")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draws the latencies")
    args = parser.parse_args()
    names = CONTENDERS | (PEERS if args.peers else {})
    if args.peers:
        install_peers()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        try:
            seen = bench.costs(names, args.blocks)
            late = {}
            for name in names:
                late[name] = bench.late(name, args.seconds)
                bench.end()
        finally:
            bench.end()
            bench.redis.stop()
    rows = {what: {n: cell(v) for n, v in by.items()} for what, by in seen.items()}
    for head in HEADS:
        for name, costs in seen[head].items():
            ratios = [ours / other for ours, other in zip(seen[head]["ours"], costs, strict=True)]
            row = rows.setdefault(f"{head}: this server's CPU for each of its", {})
            row[name] = f"{statistics.median(ratios):.2f}"
    for kind in late["ours"]:
        told = {name: p99[kind] for name, p99 in late.items() if kind in p99}
        rows[f"p99, ms: {kind}"] = {
            name: f"{p99:.1f}" if p99 < math.inf else "no answer" for name, p99 in told.items()
        }
    print(
        f"Python {platform.python_version()}, load average {load:.1f} to {os.getloadavg()[0]:.1f}"
    )
    print("CPU of a request in microseconds, median (quartiles)\n")
    print(table(rows, names))
    if args.plot:
        plot(args.plot, late, names)


if __name__ == "__main__":
    main()
