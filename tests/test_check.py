from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
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
    Start,
    assert_no_credential,
    assert_signs,
    run_check,
    write_ini,
)

from wechat_sign import __version__
from wechat_sign.check import risks
from wechat_sign.settings import Limits, load_settings

HAN = re.compile("[一-鿿]")
STEPS = ["settings", "Redis", "access_token", "jsapi_ticket", "signature"]


class Check:
    """Runs `--check` against the sandbox, within this process; what it prints may have no
    credential in it. Its lines are given without the notes, which tell of the host that the tests
    run on."""

    limits = Limits()

    def __init__(self, wechat: Sandbox, ini: Path, main: Main) -> None:
        self.wechat = wechat
        self.ini = ini
        self._main = main

    def all(self, *lines: str) -> tuple[int, list[str]]:
        """The exit status and every line; `lines` go on with the INI file."""
        command = ["--config", str(write_ini(self.ini, self.wechat, *lines)), "--check"]
        status, printed, complained = self._main(*command, limits=self.limits)
        assert_no_credential(printed, self.wechat.issued)
        assert "\033" not in printed
        assert complained == ""
        return status, printed.splitlines()

    def __call__(self, *lines: str) -> tuple[int, list[str]]:
        status, printed = self.all(*lines)
        text = re.sub("(?m)^(?:note|提示) .*\n .*\n", "", "\n".join([*printed, ""]))
        return status, text.splitlines()


@pytest.fixture
def check(wechat: Sandbox, tmp_path: Path, main: Main) -> Check:
    return Check(wechat, tmp_path / "check.ini", main)


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal whose locale is Chinese."""
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")


def names(lines: list[str]) -> list[str]:
    return [" ".join(line.split()[:2]) for line in lines]


ALL = [f"ok {step}" for step in STEPS]


def test_all_well_is_a_line_for_each_step(check: Check, redis_server: RedisServer) -> None:
    for again in (False, True):
        status, lines = check(*redis_server.ini)
        assert (status, names(lines)) == (0, ALL)
        assert lines[0] == (
            f"ok    settings      version {__version__}, {check.ini}: appid wxsandbox, "
            f"token at {check.wechat.url}"
        )
        place = f"127.0.0.1:{redis_server.port}/0"
        assert re.fullmatch(
            rf"ok    Redis         {place} answers \(\d+ ms\), lock works", lines[1]
        )
        token, ticket = lines[2].split("  ")[-1], lines[3].split("  ")[-1]
        if again:
            assert re.fullmatch(
                r"in the cache, expires in 7\d\d\d s; the secret was not tried: with token_api = "
                r"token that would void a running server's token",
                token,
            )
            assert re.fullmatch(r"in the cache, expires in 7\d\d\d s", ticket)
        else:
            assert re.fullmatch(r"fetched by token \(\d+ ms\)", token)
            assert re.fullmatch(r"fetched \(\d+ ms\), expires in 7\d\d\d s", ticket)
        assert lines[4] == "ok    signature     made for https://h5.example.com/"
        assert check.wechat.calls == {"token": 1, "getticket": 1}


def test_what_another_instance_has_is_told(check: Check, redis_server: RedisServer) -> None:
    redis_server.put_ticket("another", 100, checked=True)
    redis_server.run("SET", LOCK_KEY, "another's", "PX", 60_000)
    status, lines = check(*redis_server.ini)
    assert (status, names(lines)) == (0, ALL)
    assert lines[1].endswith(" ms), lock works (an instance has it just now)")
    assert "  not in the cache, and not needed while the ticket is; the secret was not" in lines[2]
    assert re.search(r"  in the cache, expires in (100|9\d) s$", lines[3])
    assert not check.wechat.calls


def test_the_process_ends_with_the_same(wechat: Sandbox, tmp_path: Path) -> None:
    status, printed = run_check(wechat, tmp_path / "check.ini")
    assert status == 0
    assert [line for line in ALL if line not in names(printed.splitlines())] == []
    wechat.faults["token"] = Fault(errcode=40125)
    assert run_check(wechat, tmp_path / "check.ini")[0] == 1


def test_beside_a_running_server_it_asks_for_nothing_and_kills_nothing(
    check: Check, start: Start, redis_server: RedisServer
) -> None:
    running = start(*redis_server.ini)
    assert_signs(running, check.wechat)
    assert check(*redis_server.ini)[0] == 0
    assert_signs(running, check.wechat)
    assert check.wechat.calls == {"token": 1, "getticket": 1}


def test_without_redis_it_says_what_that_means(check: Check) -> None:
    status, lines = check()
    assert (status, names(lines)) == (0, ALL)
    assert "credentials are its own" in lines[1]


def test_a_refusal_ends_it_with_what_to_do(check: Check, redis_server: RedisServer) -> None:
    for endpoint, fault, words in (
        (
            "token",
            Fault(errcode=40164),
            "add this server's public address to the account's IP white",
        ),
        ("token", Fault(errcode=40164), "IP白名单 in 微信公众平台 → 设置与开发 → 基本配置"),
        ("token", Fault(errcode=40125), "secret is not the one of this appid"),
        ("token", Fault(errcode=40001), "secret is not the one of this appid"),
        ("token", Fault(errcode=40013), "appid is wrong"),
        ("token", Fault(hang_up=True), "DNS, firewall, proxy"),
        ("getticket", Fault(errcode=40164), "add this server's public"),
        ("getticket", Fault(errcode=40001), "another program replaced"),
        ("getticket", Fault(errcode=48001), "微信认证"),
        ("getticket", Fault(body=b"<html>"), "DNS, firewall, proxy"),
    ):
        redis_server.run("FLUSHALL")
        check.wechat.faults = {endpoint: fault}
        status, lines = check(*redis_server.ini)
        step = {"token": "access_token", "getticket": "jsapi_ticket"}[endpoint]
        assert (status, names(lines)[-2]) == (1, f"FAIL {step}"), fault
        assert lines[-1].startswith("      What to do: "), fault
        assert words in lines[-1], fault


@pytest.mark.parametrize(
    ("endpoint", "step"), [("token", "access_token"), ("getticket", "jsapi_ticket")]
)
def test_a_refusal_while_the_ticket_serves_on_is_told(
    check: Check, redis_server: RedisServer, endpoint: str, step: str
) -> None:
    redis_server.put_ticket("old", 100)
    check.wechat.faults[endpoint] = Fault(errcode=40164)
    status, lines = check(*redis_server.ini)
    assert status == 1
    assert names(lines)[-2] == f"FAIL {step}"


@pytest.fixture
def locked_redis() -> Iterator[RedisServer]:
    """A Redis with a password, to be killed and paused."""
    started = RedisServer(password="right")
    yield started
    started.stop()


def test_a_redis_in_trouble_ends_it_with_host_port_and_cause(
    check: Check,
    locked_redis: RedisServer,
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def not_known(*_given: object, **_more: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def fails(ini: list[str], words: str, *more: str, place: str = "") -> None:
        status, lines = check(*ini, *more)
        assert (status, names(lines)[1]) == (1, "FAIL Redis"), words
        assert (place or f"127.0.0.1:{ini[-1].split()[-1]}/0, ") in lines[1], words
        assert words in lines[2], lines
        assert "wr0ng" not in "".join(lines)
        if not place:  # where names are known
            assert names(lines)[-1] == "ok signature", words  # the server goes on without, too

    fails(locked_redis.ini, "correct password", "password = wr0ng")
    fails(locked_redis.ini, "correct password")
    fails(redis_server.ini, "this Redis has no password", "password = wr0ng")
    check.limits = Limits(redis_timeout=0.5)
    fails(locked_redis.ini, "tls in [redis]", "tls = yes")
    locked_redis.pause()
    fails(locked_redis.ini, "whether Redis hangs")
    locked_redis.resume()
    locked_redis.kill()
    fails(locked_redis.ini, "start Redis, or correct host and port")
    monkeypatch.setattr(socket, "getaddrinfo", not_known)
    ini = ["[redis]", "host = redis.test"]
    fails(ini, "not known to DNS", place="redis.test:6379/0, ")


def test_a_redis_that_can_not_be_written_is_told(check: Check, own_redis: RedisServer) -> None:
    own_redis.run("CONFIG", "SET", "maxmemory", "1")
    status, lines = check(*own_redis.ini)
    assert status == 1
    assert names(lines)[1] == "FAIL Redis"
    assert "maxmemory" in lines[2]


def test_a_wrong_secret_behind_a_redis_that_is_down_is_told_at_once(
    check: Check, own_redis: RedisServer
) -> None:
    own_redis.kill()
    check.wechat.faults["token"] = Fault(errcode=40125)
    status, lines = check(*own_redis.ini)
    assert status == 1
    assert [name for name in names(lines) if "FAIL" in name] == ["FAIL Redis", "FAIL access_token"]


def test_a_wrong_secret_is_told_though_redis_has_a_token(
    check: Check, redis_server: RedisServer
) -> None:
    stable = ["token_api = stable_token", *redis_server.ini]
    assert check(*stable)[0] == 0
    assert check.wechat.calls == {"stable_token": 1, "getticket": 1}
    assert check(*stable)[0] == 0
    assert check.wechat.calls == {"stable_token": 2, "getticket": 1}
    check.wechat.faults["stable_token"] = Fault(errcode=40125)
    status, lines = check(*stable)
    assert status == 1
    assert names(lines)[-2] == "FAIL access_token"
    assert "secret is not the one" in lines[-1]


def test_what_another_program_keeps_under_a_named_key_is_told(
    check: Check, redis_server: RedisServer
) -> None:
    redis_server.run("SET", "wx:token", 's:6:"s3cr3t";')
    status, lines = check(*redis_server.ini, "access_token_key = wx:token")
    assert status == 1
    assert names(lines)[1] == "FAIL Redis"
    assert "the key wx:token holds a PHP-serialised value" in lines[1]
    assert "keys of its own" in lines[2]
    assert "s3cr3t" not in "".join(lines)


def test_a_look_that_does_not_end_is_told(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(check.wechat, "url", check.wechat.url.replace("127.0.0.1", "localhost"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: over.wait(20))
    check.limits = Limits(lease_margin=0.01)
    status, lines = check("timeout = 0.1")
    over.set()
    assert status == 1
    assert "a look did not end within 0.63 s" in lines[2]


def test_a_redis_that_hangs_for_ever_is_told_and_wechat_is_asked(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, resolve = threading.Event(), socket.getaddrinfo

    def hang(host: str, *given: Any, **more: Any) -> Any:
        if host == "redis.test":
            over.wait(20)
        return resolve(host.replace("redis.test", "127.0.0.1"), *given, **more)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    check.limits = Limits(lease_margin=0.01)
    status, lines = check("timeout = 0.3", "[redis]", "host = redis.test", "port = 1")
    over.set()
    assert status == 1
    assert lines[1].startswith("FAIL  Redis         redis.test:1/0, a look did not end within 1.83")
    assert names(lines)[3].endswith(" access_token")
    assert check.wechat.calls["token"] == 1


def test_a_clock_that_is_not_wechats_is_a_note(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = re.compile(r"(?m)^note  clock         \+\d{9} s from WeChat's$")
    assert not re.search("(?m)^note  clock", "\n".join(check.all()[1]))
    for date, told in (("Sat, 01 Jan 2000 00:00:00 GMT", True), ("Saturday", False)):
        monkeypatch.setattr(BaseHTTPRequestHandler, "date_time_string", lambda *_, date=date: date)
        status, lines = check.all()
        assert (status, bool(said.search("\n".join(lines)))) == (0, told)


def test_an_instance_that_asks_wechat_just_now_is_told(
    check: Check, redis_server: RedisServer
) -> None:
    redis_server.run("SET", LOCK_KEY, "another's", "PX", 60_000)
    status, lines = check(*redis_server.ini)
    assert (status, names(lines)[-2]) == (1, "FAIL jsapi_ticket")
    assert "another instance holds the lock" in lines[-2]
    assert "look at that instance's log" in lines[-1]
    assert not check.wechat.calls


def test_a_redis_that_goes_away_meanwhile_is_told(
    check: Check, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    respond = check.wechat.respond

    def kill_and_respond(*given: Any) -> tuple[int, bytes]:
        own_redis.kill()
        return respond(*given)

    monkeypatch.setattr(check.wechat, "respond", kill_and_respond)
    status, lines = check(*own_redis.ini)
    assert status == 1
    assert [name for name in names(lines) if name != "What to"] == [
        *ALL[:-1],
        "FAIL Redis",
        ALL[-1],
    ]
    assert "start Redis" in lines[-2]


def test_a_wrong_ini_file_is_a_step_that_failed(check: Check) -> None:
    status, lines = check("timeout = soon", "[redis]", "port = x")
    assert status == 1
    assert names(lines) == ["FAIL settings", "FAIL settings"]
    assert all(f" {check.ini}: [" in line for line in lines)


def test_what_is_less_safe_than_it_could_be_is_a_note(check: Check) -> None:
    check.ini.touch(0o644)
    status, lines = check.all()
    assert status == 0
    assert lines[0].startswith("ok    settings ")
    assert lines[1] == "note  safety        any page is signed with this account"
    assert lines[2].startswith("      What to do: list the hosts of your pages in page_hosts")
    assert (
        lines[3]
        == f"note  safety        every user of this host may read the secrets in {check.ini}"
    )
    assert lines[4].startswith("      What to do: chmod 600 the file")

    check.ini.chmod(0o600)
    status, lines = check.all("[server]", "address = 127.0.0.1", "[redis]", "host = -")
    assert status == 1
    assert "any page is signed" not in "".join(lines)
    assert "every user of this host" not in "".join(lines)


def test_the_sandbox_is_named_and_not_noted_about() -> None:
    checked = Server("--sandbox", "--check", "--address", "0.0.0.0")
    assert checked.wait() == 0
    lines = checked.output.splitlines()
    assert names(lines) == ALL
    assert f"version {__version__}, the sandbox: appid wxsandbox, stable_token at http" in lines[0]


# --- what is less safe than it could be -----------------------------------------------------------

SAFE = "[wechat]\nappid = wx1\nsecret = s3cr3t\n[jssdk]\ndebug = false\npage_hosts = a.com\n"
OPEN = SAFE.replace("a.com", "") + "[server]\naddress = "


@pytest.fixture
def risks_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What an INI file with this text risks."""
    config = tmp_path / "config.ini"

    def found(text: str, mode: int = 0o600, user: int = 1000, **environ: str) -> list[str]:
        monkeypatch.setattr(os, "geteuid", lambda: user)
        config.write_text(text, encoding="utf-8")
        config.chmod(mode)
        settings = load_settings(config, environ)
        texts = [f"{what}: {advice}" for what, advice in risks(settings, config)]
        assert "s3cr3t" not in "".join(texts)
        return texts

    return found


RISKS = [
    ("any page is signed with this account: list the hosts", OPEN + "0.0.0.0"),
    ("any page is signed with this account: list the hosts", OPEN + "::"),
    ("every visitor sees alerts: debug is true: set debug = false", SAFE.replace("false", "true")),
]
RISKS += [
    (
        "the secret goes to WeChat unencrypted: let",
        SAFE.replace("[jssdk]", f"api = {api}\n[jssdk]"),
    )
    for api in ("http://10.0.0.1", "HTTP://wechat.example/a", "http://[2001::1]")
]


@pytest.mark.parametrize(("words", "text"), RISKS)
def test_a_risk_is_told_with_what_to_do(
    words: str, text: str, risks_of: Callable[..., list[str]]
) -> None:
    [risk] = risks_of(text)
    assert risk.startswith(words)


SAFE_APIS = ["http://127.0.0.1:1", "http://localhost/a", "http://[::1]", "https://10.0.0.1"]


@pytest.mark.parametrize(
    "text",
    [SAFE, *(OPEN + address for address in ("127.0.0.1", "127.0.0.2", "::1", "localhost"))]
    + [SAFE.replace("[jssdk]", f"api = {api}\n[jssdk]") for api in SAFE_APIS],
)
def test_where_all_is_well_no_risk_is_told(text: str, risks_of: Callable[..., list[str]]) -> None:
    assert risks_of(text) == []


def test_a_file_that_every_user_may_read_is_a_risk_where_it_has_a_secret(
    risks_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    where = f"the secrets in {tmp_path / 'config.ini'}: chmod 600 the"
    for given in ("", "host = h\npassword = s3cr3t", "url = redis://:s3cr3t@h"):
        [risk] = risks_of(f"{SAFE}[redis]\n{given}", 0o604)
        assert risk.startswith(f"every user of this host may read {where}")
    assert risks_of(SAFE, 0o640) == []
    environ = {"WECHAT_SECRET": "s3cr3t", "REDIS_URL": "redis://:s3cr3t@h"}
    assert risks_of(SAFE.replace("s3cr3t", ""), 0o644, **environ) == []


def test_a_server_of_root_s_is_a_risk_and_a_pipe_or_a_file_that_is_gone_is_none(
    risks_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    [risk] = risks_of(SAFE, user=0)
    assert risk.startswith("the server runs as root: run it as a user of its own")
    assert risks_of(SAFE) == []
    settings = load_settings(tmp_path / "config.ini", {})
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o644)
    for config in (pipe, tmp_path / "none.ini"):
        assert list(risks(settings, config)) == []


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
    assert f"every user of this host may read the secrets in {ini}" in lines[1]
    assert f"version {__version__}, listening on" in said


def test_the_version_alone() -> None:
    asked = Server("--version")
    assert (asked.wait(), asked.output) == (0, f"{__version__}\n")


def test_the_sandbox_is_not_warned_about() -> None:
    running = Server("--sandbox", "--address", "0.0.0.0", "--port", "0")
    assert "WARNING" not in running.says("listening on")
    assert running.stop() == 0


# --- in a Chinese terminal ------------------------------------------------------------------------


def width(text: str) -> int:
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)


@pytest.mark.usefixtures("chinese")
def test_in_a_chinese_terminal_it_is_chinese_and_stays_in_its_columns(
    check: Check, redis_server: RedisServer
) -> None:
    for again in (False, True):
        status, lines = check(*redis_server.ini)
        steps = ["配置", "Redis", "access_token", "jsapi_ticket", "签名"]
        assert (status, names(lines)) == (0, [f"通过 {step}" for step in steps])
        for line in lines:
            columns, text = re.fullmatch(r"(\S+ +\S+ +)(.*)", line).groups()  # type: ignore[union-attr]
            assert width(columns) == 20
            assert HAN.search(text)
        assert ("取自缓存" in lines[3]) is again


def test_in_a_chinese_terminal_the_sandbox_is_checked_in_chinese() -> None:
    checked = Server("--sandbox", "--check", LC_ALL="zh_CN.UTF-8")
    assert checked.wait() == 0
    lines = checked.output.splitlines()
    assert len(lines) == 5
    assert all(len(HAN.findall(line)) > 4 for line in lines)
    assert "沙箱：appid wxsandbox" in lines[0]


@pytest.mark.usefixtures("chinese")
def test_a_refusal_is_told_in_chinese_with_the_chinese_advice_alone(check: Check) -> None:
    no_answer, check_host = "未得到微信对 token 的有效应答：", "请检查本服务器"
    for fault, words, advice in (
        (
            Fault(errcode=40164),
            "微信拒绝了 token 请求，错误码 40164（invalid ip 203.0.113.7 ",
            "请把本服务器的公网 IP（见日志或 --check 中微信返回的内容）加入 IP白名单：",
        ),
        (Fault(body=b"<html>"), f"{no_answer}应答不是 JSON", check_host),
        (Fault(body=b"{}"), f"{no_answer}应答中没有 access_token", check_host),
        (Fault(hang_up=True), f"{no_answer}ConnectionError/", check_host),
    ):
        check.wechat.faults["token"] = fault
        status, lines = check()
        assert status == 1
        assert lines[-2].startswith("失败  access_token  ")
        assert words in lines[-2]
        assert lines[-1].startswith(f"      处理办法：{advice}")
        assert " / " not in lines[-1]


@pytest.mark.usefixtures("chinese")
def test_redis_in_trouble_has_the_chinese_advice(check: Check, own_redis: RedisServer) -> None:
    own_redis.kill()
    status, lines = check(*own_redis.ini)
    assert status == 1
    place = f"127.0.0.1:{own_redis.port}/0"
    assert lines[1].startswith(f"失败  Redis         {place}，无法连接 Redis：ConnectionError")
    assert lines[2].startswith("      处理办法：请启动 Redis")


@pytest.mark.usefixtures("chinese")
def test_what_is_less_safe_than_it_could_be_is_a_chinese_note(check: Check) -> None:
    check.ini.touch(0o644)
    status, lines = check.all("[redis]", "password = s3cr3t")
    assert status == 0
    assert lines[1] == "提示  安全          任何网页都能用这个公众号签名"
    assert lines[2].startswith("      处理办法：请在 [jssdk]")
    place = f"本机的所有用户都能读取 {check.ini} 中的密钥"
    assert lines[3] == f"提示  安全          {place}"


# --- where it is printed --------------------------------------------------------------------------


def test_where_it_can_not_be_printed_it_ends_without_a_traceback() -> None:
    command = f"{shlex.quote(sys.executable)} server.py --sandbox --check"
    reader, unread = os.pipe()
    os.close(reader)
    with os.fdopen(unread, "w") as pipe, open("/dev/full", "w") as full:
        for output, closed, status in ((pipe, "", 1), (full, "", 1), (full, ">&-", 0)):
            done = subprocess.run(
                ["bash", "-c", f"{command} {closed}"],  # noqa: S607
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.PIPE,
                check=False,
            )
            assert (done.returncode, done.stderr) == (status, b""), (output, closed)
