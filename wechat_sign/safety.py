"""What about a server that starts is less safe than it could be."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import reduce
from pathlib import Path
from urllib.parse import urlsplit

from .errors import advice
from .settings import Settings, is_loopback, secrets_in
from .texts import Text


def warnings_for(
    settings: Settings, config: Path, listening: Iterable[socket.socket]
) -> Iterator[str]:
    """For each thing a sentence for the log, with what to do about it."""
    for what, todo in _risks(settings, config, public=any(map(_is_public, listening))):
        yield f"{what}. What to do: {todo.both}"


def foreseen(settings: Settings, config: Path) -> Iterator[tuple[Text, Text]]:
    """The same before anything listens, by the address that the settings name."""
    return _risks(settings, config, public=not is_loopback(settings.server.address))


def _risks(settings: Settings, config: Path, *, public: bool) -> Iterator[tuple[Text, Text]]:
    if public and not settings.jssdk.page_hosts:
        yield Text("any page is signed with this account"), advice("open to all")
    api = urlsplit(settings.wechat.api)
    if api.scheme == "http" and not is_loopback(api.hostname or ""):
        yield Text("the secret goes to WeChat unencrypted"), advice("api unencrypted")
    secrets = secrets_in(config) if _anybody_may_read(config) else []
    if secrets:
        names = reduce(lambda one, other: Text("{one} and {other}", one=one, other=other), secrets)
        what = "every user of this host may read {names} in {config}"
        yield Text(what, names=names, config=config), advice("file open to all")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        yield Text("the server runs as root"), advice("runs as root")


def _is_public(listening: socket.socket) -> bool:
    ip = listening.family in (socket.AF_INET, socket.AF_INET6)
    return ip and not is_loopback(listening.getsockname()[0])


def _anybody_may_read(path: Path) -> bool:
    """Not where the system has no such mode, nor where the file is a pipe."""
    if os.name != "posix":
        return False
    with suppress(OSError):
        mode = path.stat().st_mode
        return stat.S_ISREG(mode) and bool(mode & stat.S_IROTH)
    return False
