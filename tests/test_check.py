from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import (
    ROOT,
    Fault,
    RedisServer,
    Sandbox,
    Server,
    Start,
    fetch,
    run_check,
)


class Check:
    """Runs `--check` against the sandbox; what it prints may have no credential in it. Its lines
    are given without the notes, which tell of the host that the tests run on."""

    def __init__(self, wechat: Sandbox, folder: Path) -> None:
        self.wechat = wechat
        self.ini = folder / "check.ini"

    def __call__(self, *lines: str) -> tuple[int, list[str]]:
        status, said = run_check(self.wechat, self.ini, *lines)
        return status, re.sub("(?m)^note .*\n .*\n", "", said).splitlines()


@pytest.fixture
def check(wechat: Sandbox, tmp_path: Path) -> Check:
    return Check(wechat, tmp_path)


def on(redis_server: RedisServer, *more: str) -> list[str]:
    return [*redis_server.ini, *more]


def names(lines: list[str]) -> list[str]:
    return [" ".join(line.split()[:2]) for line in lines]


ALL = ["ok settings", "ok Redis", "ok access_token", "ok jsapi_ticket", "ok signature"]


def test_all_well_is_a_line_for_each_step(check: Check, redis_server: RedisServer) -> None:
    status, lines = check(*on(redis_server))
    assert (status, names(lines)) == (0, ALL)
    assert "fetched by token" in lines[2]
    assert "expires in 7" in lines[3]
    assert check.wechat.calls == {"token": 1, "getticket": 1}

    status, lines = check(*on(redis_server))
    assert (status, names(lines)) == (0, ALL)
    assert "in the cache" in lines[2]
    assert "in the cache" in lines[3]
    assert check.wechat.calls == {"token": 1, "getticket": 1}


def test_beside_a_running_server_it_asks_for_nothing_and_kills_nothing(
    check: Check, start: Start, redis_server: RedisServer
) -> None:
    running = start(*on(redis_server))
    assert fetch(f"{running.url}/getApi?url=https://a/")[0] == 200
    assert check(*on(redis_server))[0] == 0
    assert check.wechat.calls == {"token": 1, "getticket": 1}


def test_without_redis_it_says_what_that_means(check: Check) -> None:
    status, lines = check()
    assert (status, names(lines)) == (0, ALL)
    assert "credentials are its own" in lines[1]


@pytest.mark.parametrize(
    ("endpoint", "fault", "step", "words"),
    [
        (
            "token",
            Fault(errcode=40164),
            "access_token",
            "add 203.0.113.7 to the account's IP white",
        ),
        (
            "token",
            Fault(errcode=40164),
            "access_token",
            "微信公众平台 → 设置与开发 → 基本配置 → IP白名单",
        ),
        ("token", Fault(errcode=40125), "access_token", "secret is not the one of this appid"),
        ("token", Fault(errcode=40001), "access_token", "secret is not the one of this appid"),
        ("token", Fault(errcode=40013), "access_token", "appid is wrong"),
        ("token", Fault(hang_up=True), "access_token", "DNS, firewall, proxy"),
        ("getticket", Fault(errcode=40164), "jsapi_ticket", "add 203.0.113.7"),
        ("getticket", Fault(errcode=40001), "jsapi_ticket", "another program replaced"),
        ("getticket", Fault(errcode=48001), "jsapi_ticket", "微信认证"),
        ("getticket", Fault(body=b"<html>"), "jsapi_ticket", "DNS, firewall, proxy"),
    ],
)
def test_a_refusal_ends_it_with_what_to_do(
    check: Check, redis_server: RedisServer, endpoint: str, fault: Fault, step: str, words: str
) -> None:
    check.wechat.faults[endpoint] = fault
    status, lines = check(*on(redis_server))
    assert status == 1
    assert names(lines)[-2] == f"FAIL {step}"
    assert lines[-1].startswith("      What to do: ")
    assert words in lines[-1]


def test_a_refusal_while_the_ticket_serves_on_is_told(
    check: Check, redis_server: RedisServer
) -> None:
    redis_server.run("SET", "wechat:wxsandbox:jsapi_ticket", "old", "EX", 100)
    check.wechat.faults["token"] = Fault(errcode=40164)
    status, lines = check(*on(redis_server))
    assert status == 1
    assert names(lines)[-2] == "FAIL access_token"


@pytest.fixture(
    params=["refused", "password", "no password", "needless password", "hangs", "TLS", "name"]
)
def broken(request: pytest.FixtureRequest) -> Iterator[tuple[list[str], str]]:
    """Lines for [redis], and words of the advice."""
    needs = [] if request.param == "needless password" else ["--requirepass", "right"]
    server = RedisServer(*needs)
    port = f"port = {server.port}"
    if request.param == "refused":
        server.kill()
    elif request.param == "hangs":
        server.pause()
    lines, words = {
        "refused": ([port], "start Redis, or correct host and port"),
        "password": ([port, "password = wr0ng"], "correct password"),
        "no password": ([port], "correct password"),
        "needless password": ([port, "password = wr0ng"], "this Redis has no password"),
        "hangs": ([port], "whether Redis hangs"),
        "TLS": ([port, "tls = yes"], "tls in [redis]"),
        "name": (["host = no.such.host.invalid"], "not known to DNS"),
    }[request.param]
    host = [] if request.param == "name" else ["host = 127.0.0.1"]
    yield ["[redis]", *host, *lines], words
    server.stop()


def test_a_redis_in_trouble_ends_it_with_host_port_and_cause(
    check: Check, broken: tuple[list[str], str]
) -> None:
    lines, words = broken
    status, said = check(*lines)
    assert status == 1
    assert names(said)[1] == "FAIL Redis"
    assert "127.0.0.1:" in said[1] or "no.such.host.invalid:6379" in said[1]
    assert words in said[2]
    assert "wr0ng" not in "".join(said)
    assert not check.wechat.calls


def test_a_redis_that_can_not_be_written_is_told(check: Check, own_redis: RedisServer) -> None:
    own_redis.run("CONFIG", "SET", "maxmemory", "1")
    status, lines = check(*on(own_redis))
    assert status == 1
    assert names(lines)[-2] == "FAIL Redis"
    assert "maxmemory" in lines[-1]


def test_a_wrong_ini_file_is_a_step_that_failed(check: Check) -> None:
    status, lines = check("timeout = soon", "[redis]", "port = x")
    assert status == 1
    assert names(lines) == ["FAIL settings", "FAIL settings"]


def test_what_is_less_safe_than_it_could_be_is_a_note(wechat: Sandbox, tmp_path: Path) -> None:
    ini = tmp_path / "check.ini"
    ini.touch(0o644)
    status, said = run_check(wechat, ini)
    assert status == 0
    lines = said.splitlines()
    assert lines[0].startswith("ok    settings ")
    assert lines[1] == "note  safety        any page is signed with this account"
    assert lines[2].startswith("      What to do: list the hosts of your pages in page_hosts")
    assert lines[3] == f"note  safety        every user of this host may read secret in {ini}"
    assert lines[4].startswith("      What to do: chmod 600 the file")

    ini.chmod(0o600)
    status, said = run_check(wechat, ini, "[server]", "address = 127.0.0.1", "[redis]", "host = -")
    assert status == 1
    assert "any page is signed" not in said
    assert "every user of this host" not in said


def test_the_sandbox_is_not_noted_about() -> None:
    checked = Server("--sandbox", "--check", "--address", "0.0.0.0")
    assert checked.wait() == 0
    assert names(checked.output.splitlines()) == ALL


def test_where_nobody_reads_on_it_ends_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "server.py"), "--sandbox", "--check"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_it_is_coloured_on_a_terminal_unless_no_color_is_set() -> None:
    for environ, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        master, slave = pty.openpty()
        command = [sys.executable, str(ROOT / "server.py"), "--sandbox", "--check"]
        subprocess.check_call(command, stdout=slave, env={**os.environ, **environ})
        os.close(slave)
        printed = os.read(master, 65536).decode()
        os.close(master)
        assert ("\033[32mok" in printed) is coloured
        assert "signature" in printed
