"""What a server that starts warns about."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import Sandbox, Server, write_ini

from wechat_sign.safety import warnings_for
from wechat_sign.settings import load_settings

SAFE = "[wechat]\nappid = wx1\nsecret = s3cr3t\n[jssdk]\npage_hosts = h5.example.com\n"
OPEN = SAFE.replace("h5.example.com", "")


@pytest.fixture(autouse=True)
def _as_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listening(opened: ExitStack, host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return opened.enter_context(socket.create_server((host, 0), family=family))


def warnings(
    text: str, folder: Path, *sockets: socket.socket, mode: int = 0o600, **environ: str
) -> list[str]:
    config = folder / "config.ini"
    config.write_text(text, encoding="utf-8")
    config.chmod(mode)
    found = list(warnings_for(load_settings(config, environ), config, sockets))
    assert "s3cr3t" not in "".join(found)
    return found


def test_where_all_is_well_there_is_no_warning(tmp_path: Path, opened: ExitStack) -> None:
    assert warnings(SAFE, tmp_path, listening(opened, "0.0.0.0")) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_public_address_without_page_hosts_is_warned_about(
    tmp_path: Path, opened: ExitStack, host: str
) -> None:
    sockets = [listening(opened, "127.0.0.1"), listening(opened, host)]
    [warning] = warnings(OPEN, tmp_path, *sockets)
    assert warning == (
        "any page is signed with this account. What to do: list the hosts of your pages in "
        "page_hosts of [jssdk] / "
        "请在 [jssdk] 的 page_hosts 中列出自己网页的域名"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_loopback_without_page_hosts_is_not(tmp_path: Path, opened: ExitStack, host: str) -> None:
    assert warnings(OPEN, tmp_path, listening(opened, host)) == []


def test_a_unix_socket_without_page_hosts_is_not_either(tmp_path: Path, opened: ExitStack) -> None:
    held = opened.enter_context(socket.socket(socket.AF_UNIX))
    held.bind(str(tmp_path / "socket"))
    assert warnings(OPEN, tmp_path, held) == []


@pytest.mark.parametrize("api", ["http://10.0.0.1", "HTTP://wechat.example/a", "http://[2001::1]"])
def test_an_unencrypted_api_is_warned_about(tmp_path: Path, api: str) -> None:
    [warning] = warnings(SAFE.replace("[jssdk]", f"api = {api}\n[jssdk]"), tmp_path)
    assert warning.startswith("the secret goes to WeChat unencrypted. What to do: let api in [wec")


@pytest.mark.parametrize(
    "api", ["http://127.0.0.1:1", "http://localhost/a", "http://[::1]", "https://10.0.0.1"]
)
def test_an_encrypted_api_or_one_on_this_host_is_not(tmp_path: Path, api: str) -> None:
    assert warnings(SAFE.replace("[jssdk]", f"api = {api}\n[jssdk]"), tmp_path) == []


@pytest.mark.parametrize(
    ("redis", "names"),
    [
        ("", "secret"),
        ("host = h\npassword = s3cr3t", "secret and password"),
        ("url = redis://:s3cr3t@h", "secret and url"),
    ],
)
def test_a_file_that_anybody_may_read_is_warned_about_with_the_secrets_in_it(
    tmp_path: Path, redis: str, names: str
) -> None:
    [warning] = warnings(f"{SAFE}[redis]\n{redis}", tmp_path, mode=0o604)
    file = tmp_path / "config.ini"
    assert warning.startswith(f"every user of this host may read {names} in {file}. What to do: ch")


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_file_that_not_everybody_may_read_is_not(tmp_path: Path, mode: int) -> None:
    assert warnings(SAFE, tmp_path, mode=mode) == []


def test_nor_is_a_file_without_a_secret(tmp_path: Path) -> None:
    text = SAFE.replace("s3cr3t", "")
    environ = {"WECHAT_SECRET": "s3cr3t", "REDIS_URL": "redis://:s3cr3t@h"}
    assert warnings(text, tmp_path, mode=0o644, **environ) == []


def test_nor_is_a_pipe_read_once_more(tmp_path: Path) -> None:
    settings = load_settings(write_config(tmp_path), {})
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o644)
    assert list(warnings_for(settings, pipe, [])) == []


def test_nor_is_a_file_that_is_gone(tmp_path: Path) -> None:
    settings = load_settings(write_config(tmp_path), {})
    assert list(warnings_for(settings, tmp_path / "none.ini", [])) == []


def write_config(folder: Path) -> Path:
    config = folder / "config.ini"
    config.write_text(SAFE, encoding="utf-8")
    return config


def test_a_server_of_root_s_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    [warning] = warnings(SAFE, tmp_path)
    assert warning.startswith("the server runs as root. What to do: run it as a user of its own")


def test_a_server_that_starts_logs_each_warning_on_a_line(wechat: Sandbox, tmp_path: Path) -> None:
    ini = write_ini(tmp_path / "config.ini", wechat)
    ini.chmod(0o644)
    running = Server("--config", str(ini), "--address", "0.0.0.0", "--port", "0")
    said = running.says("listening on")
    running.stop()
    lines = [line for line in said.splitlines() if " WARNING " in line]
    assert "any page is signed with this account" in lines[0]
    assert f"every user of this host may read secret in {ini}" in lines[1]


def test_the_sandbox_is_not_warned_about() -> None:
    running = Server("--sandbox", "--address", "0.0.0.0", "--port", "0")
    assert "WARNING" not in running.says("listening on")
    assert running.stop() == 0
