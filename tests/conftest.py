from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import MovedClock, RedisServer, Sandbox, Server, Start, assert_no_credential, write_ini


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
