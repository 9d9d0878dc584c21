from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Formatter
from unicodedata import east_asian_width

import pytest
from harness import ROOT, Fault, RedisServer, Sandbox, Server, Start, run_check

from wechat_sign.errors import (
    LockedElsewhere,
    SigningError,
    Unexpected,
    WeChatRefused,
    WeChatUnreachable,
)
from wechat_sign.sentences import CHINESE, Sentence, in_chinese, said, say

ZH = "zh_CN.UTF-8"
HAN = re.compile("[一-鿿]")
STEPS = ["配置", "Redis", "access_token", "jsapi_ticket", "签名"]
SOURCES = [ROOT / "server.py", *(ROOT / "wechat_sign").glob("*.py")]


def placeholders(template: str) -> set[tuple[str, str]]:
    """Names and formats."""
    return {(name, how or "") for _, name, how, _ in Formatter().parse(template) if name}


def literal(node: ast.expr | None) -> str | None:
    text = node.value if isinstance(node, ast.Constant) else None
    return text if isinstance(text, str) else None


def assigned(tree: ast.AST, name: str, before: int) -> str | None:
    """The last literal that the name is given above that line."""
    values = [
        literal(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.lineno < before
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id == name
    ]
    return values[-1] if values else None


def sentences() -> Iterator[tuple[str, str | None, set[str]]]:
    """Where the code has a sentence said: the place, the template and the names of its values."""
    for path in SOURCES:
        if path.name == "sentences.py":
            continue
        module = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
        for call in ast.walk(module):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            if call.func.id not in ("say", "Sentence"):
                continue
            [first] = call.args
            text = literal(first)
            if isinstance(first, ast.Name):
                around = [one for one in functions if call in ast.walk(one)]
                found = (assigned(scope, first.id, call.lineno) for scope in (*around, module))
                text = next(filter(None, found), None)
            names = {str(keyword.arg) for keyword in call.keywords}
            yield f"{path.name}:{call.lineno}", text, names


def test_every_sentence_of_the_code_is_in_the_table_and_has_its_values() -> None:
    for place, template, names in sentences():
        assert template in CHINESE, place
        assert names == {name for name, _ in placeholders(template)}, place


def test_every_sentence_of_the_table_is_said() -> None:
    assert set(CHINESE) - {template for _, template, _ in sentences()} == set()


@pytest.mark.parametrize(("english", "chinese"), CHINESE.items())
def test_both_languages_have_the_same_values_and_the_chinese_its_own_punctuation(
    english: str, chinese: str
) -> None:
    assert placeholders(english) == placeholders(chinese)
    assert re.search("[一-鿿！-～]", chinese)
    assert not re.search("[一-鿿][,;:?!()]|[,;:?!()][一-鿿]", chinese), "half-width"
    assert not re.search("[一-鿿][A-Za-z0-9{]|[A-Za-z0-9}][一-鿿]", chinese), "no space"
    assert not chinese.endswith("。")


@pytest.mark.parametrize(
    ("given", "chinese"),
    [
        ({}, False),
        ({"LANG": "zh_CN.GB18030"}, True),
        ({"LANG": "en_US.UTF-8"}, False),
        ({"LC_MESSAGES": "zh_TW", "LANG": "en_US.UTF-8"}, True),
        ({"LC_MESSAGES": "en_US.UTF-8", "LANG": ZH}, False),
        ({"LC_ALL": "C", "LC_MESSAGES": ZH, "LANG": ZH}, False),
        ({"LC_ALL": ZH, "LC_MESSAGES": "C", "LANG": "C"}, True),
        ({"LC_ALL": "", "LC_MESSAGES": "", "LANG": ZH}, True),
        ({"LC_ALL": "", "LC_MESSAGES": "C", "LANG": ZH}, False),
        ({"LANGUAGE": "zh", "LC_CTYPE": ZH}, False),
    ],
)
def test_the_first_variable_that_is_not_empty_decides(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], chinese: bool
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert in_chinese() is chinese
    assert say("it is not JSON") == ("应答不是 JSON" if chinese else "it is not JSON")


def failed() -> Exception:
    try:
        raise KeyError
    except KeyError as error:
        return error


ERRORS: list[Callable[[], SigningError]] = [
    lambda: WeChatRefused(40164, "invalid ip 203.0.113.7, {not} in whitelist", endpoint="token"),
    lambda: WeChatUnreachable(Sentence("it is not JSON"), endpoint="token"),
    lambda: WeChatUnreachable("ConnectionError (Connection refused)", endpoint="token"),
    LockedElsewhere,
    lambda: Unexpected(failed()),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_an_error_is_english_for_the_log_and_chinese_for_the_terminal(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    english = ERRORS[number]()
    assert said(english.what) == english.what
    assert said(english.advice) == str(english.advice)
    monkeypatch.setenv("LC_ALL", ZH)
    chinese = ERRORS[number]()
    assert HAN.search(str(said(chinese.what)))
    assert said(chinese.advice) == chinese.advice.zh
    assert re.sub(r"line \d+", "", str(chinese)) == re.sub(r"line \d+", "", str(english))
    assert (chinese.what, chinese.kind) == (english.what, english.kind)


def width(text: str) -> int:
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def check(wechat: Sandbox, folder: Path, *lines: str) -> tuple[int, list[str]]:
    """The lines of `--check` in a Chinese terminal, without what it notes about the host."""
    status, output = run_check(wechat, folder / "check.ini", *lines, LC_ALL=ZH)
    return status, re.sub("(?m)^提示 .*\n .*\n", "", output).splitlines()


def test_in_a_chinese_terminal_the_check_is_chinese_and_stays_in_its_columns(
    wechat: Sandbox, tmp_path: Path, redis_server: RedisServer
) -> None:
    for again in (False, True):
        status, lines = check(wechat, tmp_path, *redis_server.ini)
        assert status == 0
        names = [line.split()[:2] for line in lines]
        assert [name for _, name in names] == STEPS
        assert {word for word, _ in names} == {"通过"}
        for line in lines:
            columns, text = re.fullmatch(r"(\S+ +\S+ +)(.*)", line).groups()  # type: ignore[union-attr]
            assert width(columns) == 20
            assert HAN.search(text)
        assert ("取自缓存" in lines[3]) is again


def test_in_a_chinese_terminal_the_sandbox_is_checked_in_chinese() -> None:
    checked = Server("--sandbox", "--check", LC_ALL=ZH)
    assert checked.wait() == 0
    lines = checked.output.splitlines()
    assert len(lines) == 5
    assert all(len(HAN.findall(line)) > 4 for line in lines)
    assert "沙箱：appid wxsandbox" in lines[0]


@pytest.mark.parametrize(
    ("fault", "words", "advice"),
    [
        (
            Fault(errcode=40164),
            "微信拒绝了 token 请求，错误码 40164（invalid ip 203.0.113.7 ",
            "请把 203.0.113.7 加入 IP白名单：",
        ),
        (Fault(body=b"<html>"), "未得到微信对 token 的有效应答：应答不是 JSON", "请检查本服务器"),
        (Fault(body=b"{}"), "有效应答：应答中没有 access_token", "请检查本服务器"),
        (Fault(hang_up=True), "未得到微信对 token 的有效应答：ConnectionError/", "请检查本服务器"),
    ],
)
def test_a_refusal_is_told_in_chinese_with_the_chinese_advice_alone(
    wechat: Sandbox, tmp_path: Path, fault: Fault, words: str, advice: str
) -> None:
    wechat.faults["token"] = fault
    status, lines = check(wechat, tmp_path)
    assert status == 1
    assert lines[-2].startswith("失败  access_token  ")
    assert words in lines[-2]
    assert lines[-1].startswith(f"      处理办法：{advice}")
    assert " / " not in lines[-1]


def test_redis_in_trouble_has_the_chinese_advice(
    wechat: Sandbox, tmp_path: Path, own_redis: RedisServer
) -> None:
    own_redis.kill()
    status, lines = check(wechat, tmp_path, *own_redis.ini)
    assert status == 1
    assert lines[-2].startswith(f"失败  Redis         127.0.0.1:{own_redis.port}/0")
    assert lines[-1].startswith("      处理办法：请启动 Redis")


def test_what_is_less_safe_than_it_could_be_is_a_chinese_note(
    wechat: Sandbox, tmp_path: Path
) -> None:
    ini = tmp_path / "check.ini"
    ini.touch(0o644)
    lines = ["[redis]", "password = s3cr3t"]
    status, output = run_check(wechat, ini, *lines, LC_ALL=ZH)
    assert status == 0
    assert (
        "\n提示  安全          任何网页都能用这个公众号签名\n      处理办法：请在 [jssdk]" in output
    )
    assert f"\n提示  安全          本机的所有用户都能读取 {ini} 中的 secret 与 password\n" in output


WRONG = """
[wechat]
nonsense
appid =
api = ftp://a
timeout = soon
[redis]
port = 70000
tls = maybe
prot = 1
host = a:1
url = redis://a,b
[jsdk]
[other]
[jssdk]
page_hosts = https://a/
js_api_list = get-location
open_tag_list = a
[server]
port = 80 ; http
address = a
 b
trusted_proxies = nginx
sooner = 1
"""


def refusals(text: str, folder: Path, *arguments: str) -> tuple[int, list[str]]:
    ini = folder / "config.ini"
    ini.write_text(text, encoding="utf-8")
    refused = Server("--config", str(ini), *arguments, LC_ALL=ZH)
    return refused.wait(), refused.output.splitlines()


def test_a_wrong_ini_file_is_refused_in_chinese(tmp_path: Path) -> None:
    status, lines = refusals(WRONG, tmp_path)
    assert (status, len(lines)) == (2, 19)
    assert [line for line in lines if not HAN.search(line)] == []
    ini = tmp_path / "config.ini"
    assert f"{ini}: [wechat] appid 为必填项，请填写" in lines
    assert f"{ini}: [redis] port: 必须是 1 到 65535 之间的整数" in lines
    assert not any(re.search("must|unknown|is not|required", line) for line in lines)

    status, checked = refusals(WRONG, tmp_path, "--check")
    assert status == 1
    assert checked == [f"失败  配置          {line}" for line in lines]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[wechat]\nappid = a\nappid = b", "第 3 行：重复填写（[wechat] appid），请只保留一处"),
        ("[x]\n[x]", "第 2 行：重复出现（该节），请将两处合并"),
        ("appid = a", "第 1 行：第一个选项之前须有 [节名]"),
        (
            "[wechat]\nappid = a\nsecret = s\n[redis]\nurl = redis://h?sokcet_timeout=1",
            "[redis] url 的 ? 之后：",
        ),
        (
            "[wechat]\nappid = a\nsecret = s\n[redis]\nurl = rediss://h?ssl_ca_certs=/no.such",
            "[redis] url 的 ? 之后：ssl_ca_certs：文件不存在",
        ),
    ],
)
def test_a_file_that_can_not_be_used_at_all_is_refused_in_chinese(
    tmp_path: Path, text: str, words: str
) -> None:
    status, [line] = refusals(text, tmp_path)
    assert status == 2
    assert words in line


def test_an_address_that_is_not_ours_is_refused_in_chinese() -> None:
    refused = Server("--sandbox", "--address", "203.0.113.7", LC_ALL=ZH)
    assert refused.wait() == 1
    assert refused.output.startswith("无法监听 203.0.113.7 的端口 8060：")


def test_in_a_chinese_locale_the_log_stays_english_with_advice_in_both(
    start: Start, wechat: Sandbox
) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    running = start(LC_ALL=ZH)
    line = "no page can be signed: WeChat refused token with errcode 40164 (invalid ip 203.0.113.7"
    output = running.says(line)
    assert "What to do: add 203.0.113.7 to the account's IP whitelist" in output
    assert "请把 203.0.113.7 加入 IP白名单" in output


@pytest.mark.parametrize(
    ("encoding", "word"), [("utf-8", "通过"), ("gbk", "通过"), ("ascii", "ok"), ("latin-1", "ok")]
)
def test_where_chinese_can_not_be_written_it_is_english(encoding: str, word: str) -> None:
    command = [sys.executable, str(ROOT / "server.py"), "--sandbox", "--check"]
    environ = {**os.environ, "LC_ALL": ZH, "PYTHONIOENCODING": encoding}
    said = subprocess.check_output(command, env=environ).decode(encoding)
    assert said.startswith(word)


@pytest.mark.parametrize("closed", [">&-", ">/dev/full"])
def test_a_check_that_nobody_can_read_ends_without_a_traceback(closed: str) -> None:
    command = f"{shlex.quote(sys.executable)} server.py --sandbox --check {closed}"
    done = subprocess.run(
        ["bash", "-c", command],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (int("full" in closed), "")
