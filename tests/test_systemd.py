"""The manual's units, as systemd reads them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import unavailable
from manuals import ENGLISH, blocks_of

PYTHON = "/opt/wechat-sign/.venv/bin/python"


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """Those of the manual as files, with a python that there is."""
    for text in (block.text for block in blocks_of(ENGLISH) if block.language == "ini"):
        name = re.match("# /etc/systemd/system/(.*)", text)
        assert name is not None
        (tmp_path / name[1]).write_text(text.replace(PYTHON, sys.executable), encoding="utf-8")
    assert PYTHON in ENGLISH
    return sorted(tmp_path.iterdir())


def analyze(*arguments: str | Path) -> str:
    """What systemd-analyze has to say; it may not fail."""
    program = shutil.which("systemd-analyze") or unavailable(
        "no systemd-analyze for this test: install it, as apt-get install systemd does"
    )
    command = [program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_systemd_finds_nothing_wrong_with_them_and_little_exposed(units: list[Path]) -> None:
    assert [unit.name for unit in units] == ["wechat-sign.service", "wechat-sign.socket"]
    assert analyze("verify", *units) == ""
    if "--offline" not in analyze("--help"):
        unavailable("systemd-analyze is too old for this test: it needs systemd 250")
    said = analyze("security", "--offline=true", "--threshold=20", units[0])
    assert "Overall exposure level for wechat-sign.service: 1." in said


def test_an_account_each_has_an_instance_of_both(units: list[Path]) -> None:
    [text] = [block.text for block in blocks_of(ENGLISH) if "\nsed " in block.text]
    _, command = text.split("cd /etc/systemd/system\n")
    folder = units[0].parent
    subprocess.run(["bash", "-euc", command], cwd=folder, check=True)  # noqa: S607
    instances = [folder / f"wechat-sign@shop.{kind}" for kind in ("service", "socket")]
    for instance in instances:
        (folder / instance.name.replace("shop", "")).rename(instance)
    assert analyze("verify", *instances) == ""
    service, socket = (instance.read_text(encoding="utf-8") for instance in instances)
    assert "Requires=wechat-sign@%i.socket" in service
    assert "EnvironmentFile=/etc/wechat-sign/%i.env" in service
    assert "server.py --config %i.ini\n" in service
    assert "ListenStream=/run/wechat-sign/%i.sock" in socket
