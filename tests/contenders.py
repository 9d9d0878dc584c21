"""What the benchmark runs: this server and what else one could run, and where they run."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from harness import (
    PATIENCE,
    ROOT,
    RedisServer,
    Sandbox,
    eventually,
    fetch,
    free_port,
    signature_of,
    write_ini,
)

PAGE = "https://h5.example.com/page?a=1&b=2"
TARGET = f"/getApi?url={quote(PAGE, safe='')}"
CONNECTIONS = 32
EXPIRE = 2
"""Seconds that a ticket lives while it expires under load."""
LIFE = 7100
"""Seconds that it lives otherwise."""
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
FOLDER = Path(__file__).with_name("peers")
TORNADO = {"bare": "tornado_bare.py", "naive": "tornado_naive.py"}
PEERS = {
    "express_wechat_jssdk": "express + wechat-jssdk",
    "express_co_wechat_api": "express + co-wechat-api",
    "flask_wechatpy": "Flask + wechatpy",
}
GRANTS = {"express_co_wechat_api": EXPIRE + 10, "flask_wechatpy": EXPIRE}
"""What WeChat is to grant for a ticket that is to live for EXPIRE seconds, where nothing else
decides: co-wechat-api takes 10 s off it. (wechatpy counts whole seconds, and makes it 2 to 3.)"""
NPM = Path(__file__).with_name(".npm") / "peers"
PACKAGES = {"express": "5.3.0", "wechat-jssdk": "5.1.0", "co-wechat-api": "3.11.0"}
VENV = ROOT / ".venv-peers"
WHEELS = {
    "Flask": "3.1.3",
    "wechatpy": "1.8.18",
    "gunicorn": "27.0.1",
    "cryptography": "50.0.2",  # wechatpy can't be imported without it
}
"""Where the peers' packages go, and which; no part of the project."""
WARM_UP = 5000
"""Requests before what is measured: node compiles what was called often."""
LUA = """
local ports, place = {%s}, 0
setup = function(thread)
  place = place + 1
  thread.addr = wrk.lookup("127.0.0.1", ports[place])[1]
end
done = function(summary, latency, requests)
  local e = summary.errors
  local failed = e.status + e.connect + e.read + e.write + e.timeout
  io.write(string.format(
    '{"requests": %%d, "us": %%d, "p50": %%d, "p99": %%d, "p999": %%d, "failed": %%d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    latency:percentile(99.9), failed))
end
"""


class Missing(Exception):
    """A peer can't run here; the text says why."""


def install_npm() -> str:
    """Gets the Node peers' packages where they are not there yet. Returns node's version."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise Missing("no node or no npm: apt-get install nodejs npm")
    listed = NPM / "package.json"
    if not listed.exists() or json.loads(listed.read_text())["dependencies"] != PACKAGES:
        NPM.mkdir(parents=True, exist_ok=True)
        wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
        quiet = ("--save-exact", "--ignore-scripts", "--no-audit", "--no-fund", "--silent")
        run([npm, "install", "--prefix", str(NPM), *quiet, *wanted])
    return run([node, "--version"]).strip().removeprefix("v")


def install_venv() -> str:
    """The same for the Python peer. Returns its Python's version."""
    python = VENV / "bin" / "python"
    if not python.exists():
        venv.create(VENV, with_pip=True)
    wanted = [f"{name}=={version}" for name, version in WHEELS.items()]
    if not set(wanted) <= set(run([str(python), "-m", "pip", "freeze"]).split()):
        run([str(python), "-m", "pip", "install", "-q", *wanted])
    return run([str(python), "--version"]).split()[1]


def run(command: Sequence[str]) -> str:
    """What it said."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=300
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error)
        what = " ".join(command[:4])
        raise Missing(f"{what} … failed: {said.strip()[-300:]}") from None


class WeChat(Sandbox):
    """The stand-in for many who come at once and don't share what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.grants = 0
        """The `expires_in` that it tells in place of the true one."""
        self._server.socket.listen(1024)

    def _getticket(self, access_token: str | None) -> dict[str, Any]:
        """As at WeChat, where a token serves for 5 minutes more when the next one is issued."""
        if access_token in self.issued and self._token is not None:
            access_token = self._token.value
        return super()._getticket(access_token)

    def respond(self, endpoint: str, method: str, parameters: dict[str, Any]) -> tuple[int, bytes]:
        status, body = super().respond(endpoint, method, parameters)
        answer = json.loads(body)
        if self.grants and "expires_in" in answer:
            answer["expires_in"] = self.grants
        return status, json.dumps(answer).encode()


class Running:
    """A contender's process, on a core of its own where there are two."""

    def __init__(self, command: list[str], port: int, log: Path, environ: dict[str, str]) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.page = self.url + TARGET
        self._log = log
        pinned = ["taskset", "-c", str(CORES[0])] if len(CORES) > 1 else []
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*pinned, *command],
                stdout=output,
                stderr=output,
                env={**os.environ, **environ},
                start_new_session=True,
            )

    def first_answer(self) -> None:
        """Returns once a request was answered with 200."""

        def answered() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"it ended with status {self.process.returncode}")
            try:
                return requests.get(self.page, timeout=PATIENCE).status_code == 200
            except OSError:
                return False

        try:
            eventually("the contender answers", answered)
        except AssertionError as never:
            said = self._log.read_text(errors="replace")[-2000:]
            raise AssertionError(f"{never}: {self.process.args!r}\n{said}") from None

    def listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except ConnectionRefusedError:
            return False
        return True

    def resident(self) -> float:
        """MB, of all its processes."""
        told = subprocess.check_output(["ps", "-o", "rss=", "-g", str(self.process.pid)])  # noqa: S607
        return sum(map(int, told.split())) / 1024

    def cpu(self) -> float:
        """Seconds of CPU that all its processes used so far; Linux tells."""
        told = subprocess.check_output(["ps", "-o", "pid=", "-g", str(self.process.pid)], text=True)  # noqa: S607
        ticks = 0
        for pid in told.split():
            line = Path(f"/proc/{pid}/stat").read_text()
            ticks += sum(map(int, line.rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """Again does no harm."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Surroundings:
    """A Redis, the stand-in, and the contenders' processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.redis = RedisServer()
        self.wechat = WeChat()
        self.wechat.start()
        self._running: list[Running] = []

    def _command(self, name: str, port: int, expire: int) -> list[str]:
        if name in TORNADO:
            return [sys.executable, str(FOLDER / TORNADO[name])]
        if name.startswith("express"):
            return ["node", str(FOLDER / f"{name}.js")]
        if name.startswith("flask"):
            # With threads it keeps connections; its default kind of worker does not, and is slower.
            worker = ["--workers", "1", "--threads", "8", "--chdir", str(FOLDER)]
            bound = ["--bind", f"127.0.0.1:{port}", f"{name}:app"]
            return [str(VENV / "bin" / "gunicorn"), *worker, *bound]
        lines = self.redis.ini if name == "ours" else ["[redis]"]
        lines += [f"expire = {expire}", f"recheck = {0 if expire < 600 else 600}"]
        ini = write_ini(self.folder / f"{port}.ini", self.wechat, *lines)
        arguments = ["--config", str(ini), "--address", "127.0.0.1", "--port", str(port)]
        return [sys.executable, str(ROOT / "server.py"), *arguments]

    def run(self, name: str, expire: int = LIFE) -> Running:
        """A cold contender."""
        self.forget()
        return self.start(name, expire)

    def forget(self) -> None:
        """Empties Redis and counts calls to WeChat anew."""
        self.redis.run("FLUSHALL")
        self.wechat.calls.clear()

    def start(self, name: str, expire: int = LIFE) -> Running:
        self.wechat.grants = GRANTS.get(name, 0) if expire == EXPIRE else 0
        port = free_port()
        environ = {
            "PORT": str(port),
            "API": self.wechat.url,
            "APPID": self.wechat.appid,
            "SECRET": self.wechat.secret,
            "REDIS_PORT": str(self.redis.port),
            "EXPIRE": str(expire),
            "NODE_PATH": str(NPM / "node_modules"),
            "NODE_ENV": "production",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = self._command(name, port, expire)
        given = environ if name in TORNADO or name in PEERS else {}
        self._running.append(Running(command, port, self.folder / f"{port}.log", given))
        return self._running[-1]

    def assert_signs(self, name: str) -> None:
        """Fails unless it signs the page with the ticket that is alive at the stand-in."""
        running = self.run(name)
        running.first_answer()
        status, answer = fetch(running.page)
        running.end()
        signed = {key: str(answer[key]) for key in ("nonceStr", "timestamp")}
        right = signature_of(signed, self.wechat.ticket, PAGE)
        assert (status, answer["appId"]) == (200, self.wechat.appid), f"{name} answers otherwise"
        assert answer["signature"] == right, f"{name} does not sign rightly"

    def warm_up(self, *instances: Running) -> None:
        """Ends in time on a slow machine, too."""
        requests = 0.0
        deadline = time.monotonic() + 10
        while requests < WARM_UP and time.monotonic() < deadline:
            requests += self.load(*(one.page for one in instances), seconds=1)["requests"]

    def load(self, *urls: str, seconds: float) -> dict[str, float]:
        """Requests per second and latencies in ms at 32 connections, shared among the urls."""
        if shutil.which("wrk"):
            ports = ", ".join(url.partition("/getApi")[0].rpartition(":")[2] for url in urls)
            lua = self.folder / "done.lua"
            lua.write_text(LUA % ports)
            threads, duration = f"-t{len(urls)}", f"-d{max(1, round(seconds))}s"
            command = ["wrk", threads, f"-c{CONNECTIONS}", duration, "-s", str(lua)]
            command += ["--timeout", f"{PATIENCE:g}s", urls[0]]
            seen = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
            figures = {name: seen[name] / 1000 for name in ("p50", "p99", "p999")}
            rate = seen["requests"] / seen["us"] * 1e6
            return {"rps": rate, **figures, "failed": seen["failed"], "requests": seen["requests"]}
        [url] = urls
        command = ["hey", "-z", f"{seconds}s", "-c", str(CONNECTIONS), "-o", "csv", url]
        rows = list(csv.DictReader(io.StringIO(subprocess.check_output(command, text=True))))
        times = sorted(1000 * float(row["response-time"]) for row in rows)
        figures = {
            name: times[min(len(times) - 1, int(len(times) * share))]
            for name, share in {"p50": 0.5, "p99": 0.99, "p999": 0.999}.items()
        }
        failed = sum(row["status-code"] != "200" for row in rows)
        return {"rps": len(rows) / seconds, **figures, "failed": failed, "requests": len(rows)}

    def measure(self, *instances: Running, seconds: float) -> dict[str, float]:
        """The same, and what CPU the instances needed for it: seconds per 1,000 requests."""
        before = time.monotonic(), sum(instance.cpu() for instance in instances)
        figures = self.load(*(instance.page for instance in instances), seconds=seconds)
        cpu = sum(instance.cpu() for instance in instances) - before[1]
        cpu_each = 1000 * cpu / figures.pop("requests")
        return {**figures, "cpu, s for 1,000": cpu_each}

    def close(self) -> None:
        """Leaves nothing running, however it ended."""
        for running in self._running:
            running.end()
        self.wechat.stop()
        self.redis.stop()


def require_wrk(*, or_hey: bool) -> None:
    """Ends the program with a sentence where nothing is there to make the load."""
    if not (shutil.which("wrk") or (or_hey and shutil.which("hey"))):
        raise SystemExit("the load needs wrk (or hey): apt-get install wrk")


@contextmanager
def surroundings() -> Iterator[Surroundings]:
    """While they are measured, one core is left to the contenders."""
    if len(CORES) > 1:
        os.sched_setaffinity(0, CORES[1:])
    with tempfile.TemporaryDirectory() as folder:
        around = Surroundings(Path(folder))
        try:
            yield around
        finally:
            around.close()
