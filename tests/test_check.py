from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import pytest
from conftest import Main
from harness import (
    LOCK_KEY,
    ROOT,
    Fault,
    RedisServer,
    Sandbox,
    Server,
    assert_no_credential,
    write_ini,
)

from wechat_sign import __version__
from wechat_sign.check import risks
from wechat_sign.settings import Limits, load_settings

STEPS = ["settings", "Redis", "access_token", "jsapi_ticket", "signature"]
ALL = [f"ok {step}" for step in STEPS]


@dataclass
class Check:
    """Runs `--check` against the sandbox, within this process; what it prints may have no
    credential in it. `lines` go on with its INI file."""

    wechat: Sandbox
    ini: Path
    main: Main
    limits: Limits = Limits()

    def all(self, *lines: str) -> tuple[int, str]:
        """The exit status and the output."""
        command = ["--config", str(write_ini(self.ini, self.wechat, *lines)), "--check"]
        status, printed, complained = self.main(*command, limits=self.limits)
        assert_no_credential(printed, self.wechat.issued)
        assert "\033" not in printed
        assert complained == ""
        return status, printed

    def __call__(self, *lines: str) -> tuple[int, list[str]]:
        """Its lines without the notes, which tell of the host that the tests run on."""
        status, printed = self.all(*lines)
        return status, re.sub("(?m)^(?:note|提示) .*\n .*\n", "", printed).splitlines()


@pytest.fixture
def check(wechat: Sandbox, tmp_path: Path, main: Main) -> Check:
    return Check(wechat, tmp_path / "check.ini", main)


def names(lines: list[str]) -> list[str]:
    """Word and step of each finding."""
    return [" ".join(line.split()[:2]) for line in lines if not line.startswith("      ")]


def test_all_well_is_a_line_for_each_step(check: Check, redis_server: RedisServer) -> None:
    status, first = check(*redis_server.ini)
    assert (status, names(first)) == (0, ALL)
    source = f"version {__version__}, {check.ini}: appid wxsandbox, token at {check.wechat.url}"
    assert first[0] == f"ok    settings      {source}"
    place = f"127.0.0.1:{redis_server.port}/0"
    assert re.fullmatch(rf"ok    Redis         {place} answers \(\d+ ms\), lock works", first[1])
    assert re.search(r"  fetched by token \(\d+ ms\)$", first[2])
    assert re.search(r"  fetched \(\d+ ms\), expires in 7\d\d\d s$", first[3])
    assert first[4] == "ok    signature     made for https://h5.example.com/"
    status, again = check(*redis_server.ini)
    assert (status, names(again)) == (0, ALL)
    assert re.search(r"  in the cache, expires in 7\d\d\d s; the secret was not tried: ", again[2])
    assert re.search(r"  in the cache, expires in 7\d\d\d s$", again[3])
    assert check.wechat.calls == {"token": 1, "getticket": 1}


def test_what_another_instance_does_and_has_is_told(
    check: Check, redis_server: RedisServer
) -> None:
    redis_server.run("SET", LOCK_KEY, "another's", "PX", 60_000)
    status, lines = check(*redis_server.ini)
    assert (status, names(lines)[-1]) == (1, "FAIL jsapi_ticket")
    assert "another instance holds the lock" in lines[-2]
    assert "look at that instance's log" in lines[-1]
    redis_server.put_ticket("another", 100, checked=True)
    status, lines = check(*redis_server.ini)
    assert (status, names(lines)) == (0, ALL)
    assert lines[1].endswith(" ms), lock works (an instance has it just now)")
    assert "  not in the cache, and not needed while the ticket is; the secret was not" in lines[2]
    assert re.search(r"  in the cache, expires in (100|9\d) s$", lines[3])
    assert not check.wechat.calls


@pytest.mark.parametrize(
    ("endpoint", "fault", "words"),
    [
        ("token", Fault(errcode=40164), "IP白名单 in 微信公众平台 → 设置与开发 → 基本配置"),
        ("token", Fault(errcode=40001), "secret is not the one of this appid"),
        ("token", Fault(hang_up=True), "DNS, firewall, proxy"),
        ("getticket", Fault(errcode=40001), "another program replaced"),
        ("getticket", Fault(errcode=48001), "微信认证"),
        ("getticket", Fault(body=b"<html>"), "DNS, firewall, proxy"),
    ],
)
def test_a_refusal_ends_it_with_what_to_do_though_an_older_ticket_serves_on(
    check: Check, redis_server: RedisServer, endpoint: str, fault: Fault, words: str
) -> None:
    redis_server.put_ticket("old", 100)
    check.wechat.faults[endpoint] = fault
    status, lines = check(*redis_server.ini)
    step = {"token": "access_token", "getticket": "jsapi_ticket"}[endpoint]
    assert (status, names(lines)[-1]) == (1, f"FAIL {step}")
    assert lines[-1].startswith("      What to do: ")
    assert words in lines[-1]


def test_a_redis_in_trouble_is_told_with_its_place_and_the_other_steps(
    check: Check, own_redis: RedisServer
) -> None:
    def fails(words: str, *more: str) -> None:
        status, lines = check(*own_redis.ini, *more)
        assert (status, names(lines)[1]) == (1, "FAIL Redis"), words
        assert f"127.0.0.1:{own_redis.port}/0, " in lines[1], words
        assert words in lines[2], lines
        assert "wr0ng" not in "".join(lines)
        assert names(lines)[-1] == "ok signature", words  # the server goes on without, too

    fails("this Redis has no password", "password = wr0ng")
    own_redis.run("CONFIG", "SET", "maxmemory", 1)
    fails("maxmemory")
    own_redis.run("CONFIG", "SET", "maxmemory", 0)
    own_redis.run("CONFIG", "SET", "requirepass", "right")
    fails("correct password", "password = wr0ng")
    fails("correct password")
    check.limits = Limits(redis_timeout=0.5)
    fails("tls in [redis]", "tls = yes")
    own_redis.pause()
    fails("whether Redis hangs")
    own_redis.resume()
    own_redis.kill()
    fails("start Redis, or correct host and port")
    check.wechat.faults["token"] = Fault(errcode=40125)
    _, lines = check(*own_redis.ini)
    assert names(lines)[1:] == ["FAIL Redis", "FAIL access_token"]


def test_a_wrong_secret_is_told_though_redis_has_a_token(
    check: Check, redis_server: RedisServer
) -> None:
    stable = ["token_api = stable_token", *redis_server.ini]
    assert [check(*stable)[0], check(*stable)[0]] == [0, 0]
    assert check.wechat.calls == {"stable_token": 2, "getticket": 1}
    check.wechat.faults["stable_token"] = Fault(errcode=40125)
    status, lines = check(*stable)
    assert (status, names(lines)[-1]) == (1, "FAIL access_token")
    assert "secret is not the one" in lines[-1]


def test_what_another_program_keeps_under_a_named_key_is_told(
    check: Check, redis_server: RedisServer
) -> None:
    redis_server.run("SET", "wx:token", 's:6:"s3cr3t";')
    status, lines = check(*redis_server.ini, "access_token_key = wx:token")
    assert (status, names(lines)[1]) == (1, "FAIL Redis")
    assert "the key wx:token holds a PHP-serialised value" in lines[1]
    assert "keys of its own" in lines[2]
    assert "s3cr3t" not in "".join(lines)


@pytest.mark.parametrize("hangs", ["redis.test", "localhost"])
def test_a_look_that_does_not_end_is_told(
    check: Check, monkeypatch: pytest.MonkeyPatch, hangs: str
) -> None:
    over, resolve = threading.Event(), socket.getaddrinfo

    def hang(host: str, *given: Any, **more: Any) -> Any:
        if host == hangs:
            over.wait(20)
        return resolve(host.replace("redis.test", "127.0.0.1"), *given, **more)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(check.wechat, "url", check.wechat.url.replace("127.0.0.1", "localhost"))
    check.limits = Limits(lease_margin=0.01)
    status, lines = check("timeout = 0.3", "[redis]", "host = redis.test", "port = 1")
    over.set()
    assert status == 1
    told = "a look did not end within 1.83 s"
    if hangs == "redis.test":
        assert lines[1] == f"FAIL  Redis         redis.test:1/0, {told}"
        assert names(lines)[2].endswith(" access_token")
    else:
        assert f"FAIL  access_token  {told}" in lines
    assert check.wechat.calls["token"] == (hangs == "redis.test")


def test_a_clock_that_is_not_wechats_is_a_note(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "note  clock" not in check.all()[1]
    for date, told in (("Sat, 01 Jan 2000 00:00:00 GMT", True), ("Saturday", False)):
        monkeypatch.setattr(BaseHTTPRequestHandler, "date_time_string", lambda *_, date=date: date)
        status, said = check.all()
        found = re.search(r"(?m)^note  clock         \+\d{9} s from WeChat's$", said)
        assert (status, bool(found)) == (0, told)


def test_a_redis_that_goes_away_meanwhile_is_told(
    check: Check, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    respond = check.wechat.respond

    def kill_and_respond(*given: Any) -> tuple[int, bytes]:
        own_redis.kill()
        return respond(*given)

    monkeypatch.setattr(check.wechat, "respond", kill_and_respond)
    status, lines = check(*own_redis.ini)
    assert (status, names(lines)) == (1, [*ALL[:-1], "FAIL Redis", ALL[-1]])
    assert "start Redis" in lines[-2]


# --- what is less safe than it could be -----------------------------------------------------------

ACCOUNT = "[wechat]\nappid = wx1\nsecret = s3cr3t\n"
NO_SECRET = ACCOUNT.replace("s3cr3t", "")
SAFE = "[jssdk]\ndebug = false\npage_hosts = a.com\n"
ANY_PAGE = "any page is signed with this account: list the hosts"
UNENCRYPTED = "the secret goes to WeChat unencrypted: let"
READABLE = "every user of this host may read"


@pytest.mark.parametrize(
    ("text", "mode", "risk"),
    [
        (ACCOUNT + SAFE, 0o640, ""),
        (ACCOUNT + SAFE.replace("false", "true"), 0o600, "every visitor sees alerts: debug is"),
        *((f"{ACCOUNT}[server]\naddress = {one}", 0o600, ANY_PAGE) for one in ("0.0.0.0", "::")),
        *((f"{ACCOUNT}[server]\naddress = {one}", 0o600, "") for one in ("127.0.0.2", "localhost")),
        (f"{ACCOUNT}api = http://10.0.0.1\n{SAFE}", 0o600, UNENCRYPTED),
        (f"{ACCOUNT}api = HTTP://[2001::1]/a\n{SAFE}", 0o600, UNENCRYPTED),
        (f"{ACCOUNT}api = http://[::1]\n{SAFE}", 0o600, ""),
        (f"{ACCOUNT}api = https://10.0.0.1\n{SAFE}", 0o600, ""),
        (ACCOUNT + SAFE, 0o604, f"{READABLE} secret in {{}}: chmod 600 the"),
        (
            f"{ACCOUNT}{SAFE}[redis]\nhost = h\npassword = p",
            0o604,
            f"{READABLE} secret, pass",
        ),
        (f"{NO_SECRET}{SAFE}[redis]\nurl = redis://:p%40ss@h", 0o604, f"{READABLE} url in"),
        (NO_SECRET + SAFE, 0o644, ""),
    ],
)
def test_a_risk_is_told_with_what_to_do(
    text: str, mode: int, risk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, environ = tmp_path / "config.ini", {"WECHAT_SECRET": "s3cr3t"}
    config.write_text(text)
    config.chmod(mode)
    settings = load_settings(config, environ)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    told = "".join(f"{what}: {advice}\n" for what, advice in risks(settings, config))
    assert risk.format(config) in told
    assert told.count("\n") == bool(risk)
    assert "s3cr3t" not in told
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    [*_, last] = risks(settings, config)
    assert last[0] == "the server runs as root"


def test_a_pipe_or_a_file_that_is_gone_is_no_risk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (tmp_path / "config.ini").write_text(ACCOUNT + SAFE)
    os.mkfifo(tmp_path / "pipe", 0o644)
    settings = load_settings(tmp_path / "config.ini", {})
    for config in ("pipe", "none.ini"):
        assert list(risks(settings, tmp_path / config)) == []


def test_a_server_that_starts_logs_each_warning_on_a_line(wechat: Sandbox, tmp_path: Path) -> None:
    ini = write_ini(tmp_path / "config.ini", wechat)
    ini.chmod(0o644)
    running = Server("--config", str(ini), "--address", "0.0.0.0", "--port", "0")
    said = running.says("listening on")
    running.stop()
    lines = [line for line in said.splitlines() if " WARNING " in line]
    assert "any page is signed with this account" in lines[0]
    assert "What to do: list the hosts of your pages" in lines[0]
    assert "/ 请在 [jssdk] 的 page_hosts 中列出" in lines[0]
    assert f"every user of this host may read secret in {ini}" in lines[1]
    assert f"version {__version__}, listening on" in said


def test_the_sandbox_is_named_and_not_warned_about() -> None:
    running = Server("--sandbox", "--address", "0.0.0.0", "--port", "0")
    assert "WARNING" not in running.says("listening on")
    assert running.stop() == 0
    checked = Server("--sandbox", "--check", "--address", "0.0.0.0")
    assert checked.wait() == 0
    lines = checked.output.splitlines()
    assert names(lines) == ALL
    assert f"version {__version__}, the sandbox: appid wxsandbox, stable_token at http" in lines[0]


def test_the_version_alone() -> None:
    asked = Server("--version")
    assert (asked.wait(), asked.output) == (0, f"{__version__}\n")


# --- where it is printed --------------------------------------------------------------------------


def test_in_a_chinese_terminal_it_is_chinese_and_stays_in_its_columns(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    check.ini.touch(0o644)
    status, printed = check.all("[redis]", "password = s3cr3t")
    lines = printed.splitlines()
    assert status == 0
    assert lines[1] == "提示  安全          任何网页都能用这个公众号签名"
    assert lines[2].startswith("      处理办法：请在 [jssdk]")
    assert lines[3].endswith(f"  本机的所有用户都能读取 {check.ini} 中的 secret, password")
    steps = ["配置", "Redis", "access_token", "jsapi_ticket", "签名"]
    assert [name for name in names(lines) if "提示" not in name] == [f"通过 {one}" for one in steps]
    for columns, text in re.findall(r"(?m)^(\S+ +\S+ +)(.*)", printed):
        assert len(columns) + sum(east_asian_width(one) in "WF" for one in columns) == 20
        assert re.search("[一-鿿]", text)
    for fault, words, advice in (
        (Fault(errcode=40164), "微信拒绝了 token 请求，错误码 40164（invalid", "请把本服务器的公"),
        (Fault(body=b"<html>"), "未得到微信对 token 的有效应答：应答不是 JSON", "请检查本服务器"),
    ):
        check.wechat.faults["token"] = fault
        status, lines = check()
        assert status == 1
        assert lines[-2].startswith(f"失败  access_token  {words}")
        assert lines[-1].startswith(f"      处理办法：{advice}")
        assert " / " not in lines[-1]


@pytest.mark.parametrize(
    ("output", "status"), [("> >(:); wait $!", 1), ("> /dev/full", 1), (">&-", 0)]
)
def test_where_it_can_not_be_printed_it_ends_without_a_traceback(output: str, status: int) -> None:
    command = f"exec {output}; exec {shlex.quote(sys.executable)} server.py --sandbox --check"
    shell = ["bash", "-c", command]
    done = subprocess.run(shell, cwd=ROOT, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (status, b"")
