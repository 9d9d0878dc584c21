"""What about a server that starts is less safe than it could be."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from .errors import start_advice
from .process import is_loopback
from .settings import Settings, secrets_in


def warnings_for(
    settings: Settings, config: Path, listening: Iterable[socket.socket]
) -> Iterator[str]:
    """For each thing a sentence, with what to do about it."""
    if not settings.jssdk.page_hosts and any(map(_is_public, listening)):
        yield _warning("page_hosts", "any page is signed with this account")
    api = urlsplit(settings.wechat.api)
    if api.scheme == "http" and not _is_this_host(api.hostname or ""):
        yield _warning("api", "the secret goes to WeChat unencrypted")
    secrets = secrets_in(config) if _anybody_may_read(config) else []
    if secrets:
        names = " and ".join(secrets)
        yield _warning("mode", f"every user of this host may read {names} in {config}")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        yield _warning("root", "the server runs as root")


def _warning(name: str, what: str) -> str:
    return f"{what}. What to do: {start_advice(name)}"


def _is_public(listening: socket.socket) -> bool:
    ip = listening.family in (socket.AF_INET, socket.AF_INET6)
    return ip and not is_loopback(listening.getsockname()[0])


def _is_this_host(name: str) -> bool:
    with suppress(ValueError):
        return is_loopback(name)
    return name == "localhost"


def _anybody_may_read(path: Path) -> bool:
    """Not where the system has no such mode, nor where the file is a pipe."""
    if os.name != "posix":
        return False
    with suppress(OSError):
        mode = path.stat().st_mode
        return stat.S_ISREG(mode) and bool(mode & stat.S_IROTH)
    return False
