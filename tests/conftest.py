from __future__ import annotations

import inspect
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import (
    KINDS,
    Chromium,
    Phone,
    Signing,
    Site,
    WebKit,
    bridge_for,
    launched,
    serving,
    signing_server,
)
from harness import (
    MovedClock,
    RedisServer,
    Sandbox,
    Server,
    Start,
    assert_no_credential,
    unavailable,
    write_ini,
)
from topologies import Certificates

import server
from wechat_sign import process
from wechat_sign.settings import Limits

Main = Callable[..., tuple[int, str, str]]
PROCESSES = {"start", "shared", "running", "own_redis", "chromium", "webkit", "signing"}
"""Fixtures that start processes."""
STARTING = ("check", "script", "texts", "process", "proxy", "systemd", "redis_kinds")
"""The files whose tests start processes by themselves."""

os.environ["LC_ALL"] = "C.UTF-8"  # in a Chinese locale the program speaks Chinese


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Marks what starts neither a server nor a browser as fast, and keeps in one worker what shares
    a browser or a Cluster."""
    for item in items:
        needed = set(getattr(item, "fixturenames", ()))
        needed.add(getattr(getattr(item, "callspec", None), "params", {}).get("either", "").lower())
        starts = item.path.stem.removeprefix("test_") in STARTING or re.search(
            r"\b(Server|run_check|fuzz)\(", inspect.getsource(item.function)
        )
        if not starts and not needed & PROCESSES:
            item.add_marker("fast")
        if shared := needed & {"chromium", "webkit", "cluster_of_three"}:
            item.add_marker(pytest.mark.xdist_group(min(shared)))


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """A real Redis, empty."""
    shared_redis.run("FLUSHALL")
    return shared_redis


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A real Redis for this test alone, to be killed and paused."""
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture
def wechat(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Iterator[Sandbox]:
    """The sandbox WeChat on a real port. At the end no credential may have been logged."""
    caplog.set_level(logging.DEBUG)
    sandbox = Sandbox().start()
    yield sandbox
    for fault in sandbox.faults.values():
        if fault.hold:
            fault.hold.set()
    sandbox.stop()
    out, err = capfd.readouterr()
    assert_no_credential(caplog.text + out + err, sandbox.issued)


@pytest.fixture
def clock() -> MovedClock:
    return MovedClock()


@pytest.fixture
def start(tmp_path: Path, wechat: Sandbox) -> Iterator[Start]:
    """Starts servers for the sandbox, with further lines for their INI file, and ends them."""
    started: list[Server] = []

    def start_one(*lines: str, port: int = 0, verbose: bool = True, **more: Any) -> Server:
        ini = write_ini(tmp_path / f"{len(started)}.ini", wechat, *lines)
        command = ["--config", str(ini), "--address", "127.0.0.1", "--port", str(port)]
        started.append(Server(*command, *(["--verbose"] if verbose else []), **more))
        return started[-1]

    yield start_one
    for running in started:
        running.kill()
        assert_no_credential(running.output, wechat.issued)
        assert "Traceback" not in running.output


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Main:
    """Runs the program within this process, but for what would outlast it: gives the exit status,
    what it printed, and what it complained of."""
    monkeypatch.setattr(process, "forbid_core_dumps", lambda: None)
    monkeypatch.setattr(server, "log_to_stderr", lambda verbose: None)

    def run(*arguments: str, limits: Limits = Limits()) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = server.main(arguments, limits)
        except SystemExit as ended:
            status = int(str(ended.code))
        finally:
            logging.disable(logging.NOTSET)  # a check disables it
        return status, *capfd.readouterr()

    return run


@pytest.fixture(scope="session")
def shared_wechat() -> Iterator[Sandbox]:
    """One that no test changes."""
    sandbox = Sandbox().start()
    yield sandbox
    sandbox.stop()


@pytest.fixture(scope="session")
def shared(shared_wechat: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of the tests that change nothing about it."""
    ini = write_ini(tmp_path_factory.mktemp("shared") / "config.ini", shared_wechat)
    running = Server("--config", str(ini), "--address", "127.0.0.1", "--port", "0", "--verbose")
    yield running
    running.kill()
    assert_no_credential(running.output, shared_wechat.issued)
    assert "Traceback" not in running.output


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if not shutil.which("openssl"):
        unavailable("no openssl for this test: install it")
    return Certificates(tmp_path_factory.mktemp("certificates")).make()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """For one file only: while playwright runs, no other event loop can."""
    yield from launched()


@pytest.fixture(scope="session")
def webkit() -> Iterator[WebKit]:
    browser = WebKit()
    yield browser
    browser.stop()


@pytest.fixture(scope="session")
def signing() -> Iterator[Signing]:
    """A server that all is well with, for any page on 127.0.0.1, and its WeChat."""
    yield from signing_server()


@pytest.fixture
def site() -> Iterator[Site]:
    yield from serving(Site())


OpenPhone = Callable[..., Phone]


@pytest.fixture
def phone(chromium: Any, signing: Signing) -> Iterator[OpenPhone]:
    """Opens phones of a kind in Chromium; `context` goes to playwright, `more` to the bridge."""
    contexts = []

    def new(
        kind: str = "Android", wechat: Sandbox = signing.wechat, *, context: Any = None, **more: Any
    ) -> Phone:
        wished = {"user_agent": KINDS[kind].agent, "viewport": {"width": 390, "height": 844}}
        contexts.append(chromium.new_context(**{"locale": "en-US", **wished, **(context or {})}))
        return Phone(Chromium(contexts[-1], bridge_for(kind, wechat, **more)), wechat)

    yield new
    for context in contexts:
        context.close()


@pytest.fixture(params=["Chromium", "WebKit"])
def either(request: pytest.FixtureRequest, site: Site, signing: Signing) -> OpenPhone:
    """The same for the site's pages, in both engines: they load the bridge by themselves."""

    def in_webkit(kind: str = "Android", wechat: Sandbox = signing.wechat, **more: Any) -> Phone:
        site.files["/bridge.js"] = bridge_for(kind, wechat, **more)
        return Phone(request.getfixturevalue("webkit").tab(KINDS[kind].agent), wechat)

    if request.param == "WebKit":
        return in_webkit
    opened: OpenPhone = request.getfixturevalue("phone")
    return opened
