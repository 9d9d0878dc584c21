from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from parts import RedisServer, assert_no_credential

from wechat_sign.sandbox import Sandbox


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
