from __future__ import annotations

import ast
import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from types import SimpleNamespace

import pytest
from conftest import Main
from harness import ROOT, Fault, Sandbox, Start
from test_errors import ADVICE

from wechat_sign.texts import FOLDER, Text, local

ZH = "zh_CN.UTF-8"
HAN = re.compile("[一-鿿]")
with open(FOLDER / "zh_CN.csv", encoding="utf-8-sig", newline="") as table:
    ROWS: list[list[str]] = list(csv.reader(table))


def placeholders(template: str) -> set[tuple[str, str]]:
    """Names and formats."""
    return {(name, how or "") for _, name, how, _ in Formatter().parse(template) if name}


def texts_in(node: ast.AST, values: dict[str, str]) -> Iterator[tuple[ast.Call, str]]:
    """Each call of Text, and its template, which may be in a variable that was set before."""
    match node:
        case ast.Assign(targets=[ast.Name(id=to)], value=ast.Constant(value=str(text))):
            values[to] = text
        case ast.Call(func=ast.Name(id="Text"), args=[ast.Constant(value=str(text))]):
            yield node, text
        case ast.Call(func=ast.Name(id="Text"), args=[ast.Name(id=variable)]):
            yield node, values.get(variable, variable)
    for child in ast.iter_child_nodes(node):
        yield from texts_in(child, values)


def test_every_text_of_the_code_has_its_values_and_its_row_and_every_row_is_a_text() -> None:
    used, rows = set(ADVICE.values()), [english for english, _ in ROWS]
    for path in [ROOT / "server.py", *(ROOT / "wechat_sign").glob("*.py")]:
        for call, text in texts_in(ast.parse(path.read_text(encoding="utf-8")), {}):
            place = f"{path.name}:{call.lineno}"
            given = {str(one.arg) for one in call.keywords}
            assert given == {name for name, _ in placeholders(text)}, place
            if text in rows or re.search("[A-Za-z]", re.sub("{[^}]*}", "", text)):
                assert text in rows, place
                used.add(text)
    assert sorted(used) == sorted(rows)


def test_both_languages_have_the_same_values_and_the_chinese_its_own_punctuation() -> None:
    for english, chinese in ROWS:
        assert placeholders(english) == placeholders(chinese), english
        assert re.search("[一-鿿！-～]", chinese), english
        assert not re.search("[一-鿿] ?[,;:!?()]|[,;:!?()] ?[一-鿿]", chinese), english
        assert (english + chinese).isprintable(), english


@pytest.mark.parametrize(
    ("given", "chinese"),
    [
        ({}, False),
        ({"LANG": "zh_CN.GB18030"}, True),
        ({"LC_MESSAGES": "zh_TW", "LANG": "en_US.UTF-8"}, True),
        ({"LC_MESSAGES": "en_US.UTF-8", "LANG": ZH}, False),
        ({"LC_ALL": "C", "LC_MESSAGES": ZH, "LANG": ZH}, False),
        ({"LC_ALL": "", "LC_MESSAGES": "", "LANG": ZH}, True),
    ],
)
def test_the_first_variable_that_is_not_empty_decides(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], chinese: bool
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert local(Text("it is not JSON")) == ("应答不是 JSON" if chinese else "it is not JSON")


def test_where_chinese_can_not_be_written_it_is_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", ZH)
    encodings = {"gbk": "通过", "ascii": "ok", "no-such": "ok", None: "通过"}
    for encoding, word in encodings.items():
        for stream in ("stdout", "stderr"):
            with monkeypatch.context() as patch:
                patch.setattr(sys, stream, SimpleNamespace(encoding=encoding))
                assert local(Text("ok")) == word, (encoding, stream)


def test_the_process_is_written_in_the_encoding_of_the_terminal() -> None:
    command = [sys.executable, str(ROOT / "server.py"), "--sandbox", "--check"]
    for encoding, word in (("gbk", "通过"), ("ascii", "ok")):
        environ = {**os.environ, "LC_ALL": ZH, "PYTHONIOENCODING": encoding}
        printed = subprocess.check_output(command, env=environ).decode(encoding)
        assert printed.startswith(word)


ACCOUNT = "[wechat]\nappid = wx1\nsecret = s\n"
WRONG = "[wechat]\nnonsense\nappid =\napi = ftp://a\ntimeout = soon\n[redis]\nport = 70000\n"
WRONG += "tls = maybe\nprot = 1\nhost = a:1\nurl = redis://a,b\n[jsdk]\n[other]\n[jssdk]\n"
WRONG += "page_hosts = https://a/\njs_api_list = get-location\nopen_tag_list = a\n[server]\n"
WRONG += "port = 80 ; http\naddress = a\n b\nsooner = 1\n"


def test_what_keeps_it_from_starting_is_told_in_chinese(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Main
) -> None:
    monkeypatch.setenv("LC_ALL", ZH)
    ini = tmp_path / "config.ini"

    def told(text: str, *arguments: str) -> tuple[int, list[str], list[str]]:
        ini.write_text(text, encoding="utf-8")
        status, printed, complained = main("--config", str(ini), *arguments)
        return status, printed.splitlines(), complained.splitlines()

    status, printed, lines = told(WRONG)
    assert (status, len(lines), printed) == (2, 18, [])
    assert [line for line in lines if not HAN.search(line)] == []
    assert f"{ini}：[wechat] appid 为必填项，请填写" in lines
    assert f"{ini}：[redis] port：必须是 1 到 65535 之间的整数" in lines
    assert not any(re.search("must|unknown|is not|required", line) for line in lines)
    assert told(WRONG, "--check") == (1, [f"失败  配置          {line}" for line in lines], [])

    for text, words in (
        ("[wechat]\nappid = a\nappid = b", "第 3 行：该选项重复填写，请只保留一处"),
        ("[x]\n[x]", "第 2 行：该节重复出现，请将两处合并"),
        ("appid = a", "第 1 行：第一个选项之前须有 [节名]"),
        (f"{ACCOUNT}[redis]\nurl = redis://h?sokcet_timeout=1", "[redis] url：redis-py 不接受"),
    ):
        status, _, [line] = told(text)
        assert status == 2
        assert f"config.ini：{words}" in line
    status, _, [line] = told(ACCOUNT, "--address", "203.0.113.7")
    assert status == 1
    assert line.startswith("无法监听 203.0.113.7 的端口 8060：")


def test_in_a_chinese_locale_the_log_stays_english_with_advice_in_both(
    start: Start, wechat: Sandbox
) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    output = start(LC_ALL=ZH).says("no page can be signed: WeChat refused token with errcode 40164")
    assert "What to do: add this server's public address to the account's IP whitelist" in output
    assert "请把本服务器的公网 IP（见日志" in output
