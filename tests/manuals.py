"""The manuals, and a reader who follows them command by command in a clean clone.

    python tests/manuals.py

Needs curl and a free port 8060. The clone is of what was committed. WeChat is played by a stand-in.
Commands that change the whole machine (useradd, systemctl, /opt, /etc) are followed below a folder.
The Chinese manuals have the same commands: a test holds that.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
from harness import PATIENCE, ROOT, Sandbox, eventually, fetch

MANUALS = ("README.md", ".github/README.zh-CN.md")
DEPLOYS = (".github/DEPLOY.md", ".github/DEPLOY.zh-CN.md")
ENGLISH, CHINESE = (
    "".join((ROOT / name).read_text(encoding="utf-8") for name in names)
    for names in zip(MANUALS, DEPLOYS, strict=True)
)
"""README and DEPLOY, as they are read."""
MACHINE = "useradd() { echo $*; }; systemctl() { echo $*; }; chown() { [ -e $2 ]; }; "
MACHINE += 'userdel() { echo $*; }; runuser() { shift 3; "$@"; }'
"""What only a whole machine has, for a shell."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a manual; its `code` is without comments, but for one that names a file."""

    indent: int
    language: str
    text: str

    @property
    def code(self) -> str:
        return re.sub(r"(?m)^ *#(?! /).*\n", "", self.text)


def blocks_of(manual: str) -> list[Block]:
    """All of a manual's, in order."""
    found = re.findall(r"(?ms)^( *)```(\w*)\n(.*?)^ *```$", manual)
    assert 2 * len(found) == len(re.findall("(?m)^ *(?:```|~~~)", manual)), "an odd block"
    return [Block(len(indent), language, textwrap.dedent(text)) for indent, language, text in found]


class Reader:
    """Does what a manual says. A class because it carries where, and the server that runs."""

    def __init__(self, folder: Path, wechat: Sandbox) -> None:
        self.clone = folder / "clone"
        self.machine = folder / "machine"
        self.units = self.machine / "etc/systemd/system"
        self.units.mkdir(parents=True)
        (self.machine / "opt").mkdir()
        self._wechat = wechat
        self._server: subprocess.Popen[bytes] | None = None
        self._said = ""
        self.clone.mkdir()
        committed = "git -c safe.directory='*' archive HEAD | tar -x -C \"$0\""
        shell = ["bash", "-euo", "pipefail", "-c", committed, str(self.clone)]
        subprocess.run(shell, cwd=ROOT, check=True)

    def follow(self, block: Block) -> None:
        """Raises AssertionError where a reader would be lost."""
        match block.language:
            case "sh":
                self._type(block.code.strip())
            case "json":
                self._compare(json.loads(block.text))
            case "ini":
                name = block.text.partition("\n")[0].rpartition("/")[2]
                (self.units / name).write_text(block.text, encoding="utf-8")
            case "dockerfile":
                self._image(block.code)
            case other:
                assert other in ("html", "js", "ts", "nginx", "caddy", "")  # they have tests

    def _type(self, command: str) -> None:
        *before, last = command.splitlines()
        if command.startswith("curl"):
            if self._server is None:
                self.start(".venv/bin/python server.py")
            self._said = self.run(command)
        elif last.endswith(("server.py", "--sandbox")):
            self.run("\n".join(before))
            self.start(last)
        elif command.startswith("docker"):
            docker = shutil.which("docker")
            if docker and not subprocess.run([docker, "info"], capture_output=True).returncode:
                self.run(before[0])
        elif command.endswith("-m pytest"):
            self.stop()
            self.run(f"{command} -q tests/test_signature.py")
        elif "useradd" in command:
            self.stop()
            self._set_up(command)
        elif command.startswith("rm -rf"):
            self._upgrade(command)
        elif command.startswith("read"):
            self._rotate(command)
        elif "userdel" in command:
            self.stop()
            self.run(command)
            left = [path.name for path in self.machine.rglob("*") if path.is_file()]
            assert all("@" in name for name in left), left
        else:
            self.run(command)
            if command.startswith("cp"):
                self._fill_in()

    def _shell(self, command: str) -> list[str]:
        command = re.sub("/(?:opt|etc)/", rf"{self.machine}\g<0>", command)
        command = command.replace("/usr/bin/python3 ", f"{shlex.quote(sys.executable)} ")
        return ["bash", "-euo", "pipefail", "-c", f"{MACHINE}; {command}"]

    def run(self, command: str, typed: str = "") -> str:
        shell = self._shell(command)
        done = subprocess.run(shell, cwd=self.clone, capture_output=True, text=True, input=typed)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, command: str) -> None:
        """In a terminal of its own, until it is stopped."""
        self.stop()
        command = command.replace(".venv/bin/python server.py", "exec .venv/bin/python server.py")
        shell = self._shell(command)
        quiet = subprocess.DEVNULL
        running = subprocess.Popen(shell, cwd=self.clone, stdout=quiet, stderr=quiet)
        self._server = running

        def answers() -> bool:
            assert running.poll() is None, f"it ended with status {running.returncode}"
            return fetch("http://127.0.0.1:8060/healthz")[0] == 200

        eventually("it answers", answers, patience=120)

    def stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            assert self._server.wait(PATIENCE) == 0
            self._server = None

    def _compare(self, shown: dict[str, object]) -> None:
        answered = json.loads(self._said)
        assert list(answered) == list(shown), f"{list(answered)}, and not {list(shown)}"
        varying = {"timestamp", "nonceStr", "signature", "ticket_age", "ticket_usable_for", "cache"}
        for key in set(shown) - varying:
            assert answered[key] == shown[key], key

    def _fill_in(self) -> None:
        """As the manual says; beside it the stand-in, which no reader has, and loopback alone."""
        ini = self.clone / "config.ini"
        text, values = ini.read_text(encoding="utf-8"), {"host": "", "address": "127.0.0.1"}
        values |= {"appid": self._wechat.appid, "secret": self._wechat.secret}
        for option, value in {**values, "api": self._wechat.url}.items():
            text, found = re.subn(f"(?m)^{option} =.*$", f"{option} = {value}", text)
            assert found == 1, option
        ini.write_text(text, encoding="utf-8")

    @property
    def _own(self) -> dict[Path, bytes]:
        """What is the operator's: INI and secret, and what they have in them."""
        files = ("opt/wechat-sign/config.ini", "etc/wechat-sign/secret.env")
        return {path: path.read_bytes() for path in (self.machine / name for name in files)}

    def _set_up(self, command: str) -> None:
        """Once; then INI and secret are changed; then once more, which leaves them alone."""
        self.run(command)
        ini, environ = self._own
        secret = f"secret = {self._wechat.secret}\n"
        text = ini.read_text(encoding="utf-8")
        assert secret in text
        ini.write_text(text.replace(secret, "secret =\n"), encoding="utf-8")
        environ.write_text(f"WECHAT_SECRET={self._wechat.secret}\n", encoding="utf-8")
        changed = self._own
        self.run(command)
        assert self._own == changed
        assert environ.stat().st_mode & 0o777 == ini.stat().st_mode & 0o777 == 0o600

    def _upgrade(self, command: str) -> None:
        """To a checkout with another version, another INI, and a module less."""
        changed, package = self._own, self.machine / "opt/wechat-sign/wechat_sign"
        shutil.copy(self.clone / "config.example.ini", self.clone / "config.ini")
        (self.clone / "wechat_sign/__init__.py").write_text('__version__ = "7.8.9"\n')
        (package / "gone.py").touch()
        assert "7.8.9" in self.run(command)
        assert self._own == changed
        assert not (package / "gone.py").exists()

    def _rotate(self, command: str) -> None:
        """The old secret is void; a wrong one is told; the new one is tried."""
        self._wechat.secret = "0123456789abcdef0123456789abcdef"
        with pytest.raises(AssertionError):
            self.run(command, "wrong\n")
        self.run(command, f"{self._wechat.secret}\n")
        self._fill_in()

    def _image(self, dockerfile: str) -> None:
        """What can be followed of it without Docker: what is copied, and the health check."""
        for names in re.findall("COPY (.*)", dockerfile):
            for name in names.split()[:-1]:
                assert (self.clone / name).exists(), name
        [told] = re.findall("HEALTHCHECK CMD (.*)", dockerfile)
        command = [sys.executable, *json.loads(told)[1:]]
        self.start(".venv/bin/python server.py")
        assert subprocess.call(command) == 0
        self.stop()
        assert subprocess.call(command, stderr=subprocess.DEVNULL) != 0


def main() -> None:
    for name in ("WECHAT_SECRET", "REDIS_URL", "REDIS_PASSWORD", "VIRTUAL_ENV"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(Path(folder), Sandbox().start())
        try:
            for block in blocks_of(ENGLISH):
                print(block.code.strip().partition("\n")[0], flush=True)
                reader.follow(block)
        finally:
            reader.stop()


if __name__ == "__main__":
    main()
