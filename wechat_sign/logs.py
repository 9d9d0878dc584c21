"""What the log shows: printable lines, not too long, and not the same over and over."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Hashable, Iterable
from types import TracebackType
from typing import Final

LONGEST_TEXT: Final = 300
"""Characters that are shown of a text that came from outside."""
LONGEST_LINE: Final = 2000
"""Characters of a line in the log; no advice is so long."""
SHORTEST_SECRET: Final = 4
"""Characters; what is shorter is in every other word."""
INTERVAL: Final = 1.0
"""Seconds for which the same kind of line is held back."""


def printable(text: str, longest: int = LONGEST_TEXT) -> str:
    """The text as it is safe to show: what is not printable is escaped, what is too long is cut.

    For text from outside: U+0085 begins a line of its own in the log, U+009B and ESC rule a
    terminal, U+202E turns a host round.
    """
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    if text.isprintable():
        return text
    escaped = (
        one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text
    )
    return "".join(escaped)[:longest]


def redacted(text: str, secrets: Iterable[str]) -> str:
    """The text with *** for each secret in it, in upper case or url-escaped, too."""
    for secret in secrets:
        if len(secret) >= SHORTEST_SECRET:
            letters = (f"(?:{re.escape(letter)}|%{ord(letter):02x})" for letter in secret)
            text = re.sub("".join(letters), "***", text, flags=re.IGNORECASE)
    return text


class LineFormatter(logging.Formatter):
    """Keeps a record on one line, and lets it do nothing to a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record), LONGEST_LINE)

    def formatException(  # noqa: N802
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None]
        | tuple[None, None, None],
    ) -> str:
        lines = super().formatException(ei).split("\n")
        return "\n".join(printable(line, LONGEST_LINE) for line in lines)


class Throttle:
    """Logs the first of a kind at once and then one in a second, with how many there were.

    A class because it carries what is held back. For the event loop's thread.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[int, Callable[[str], None]]] = {}

    def log(self, kind: Hashable, write: Callable[[str], None]) -> None:
        """Has `write` log one of this kind, now or when its turn comes, and how many it stands
        for: "" for one alone. Of those whose turn never comes the last one is logged."""
        if kind in self._held:
            self._held[kind] = (self._held[kind][0] + 1, write)
        else:
            self._write(kind, "", write)

    def _write(self, kind: Hashable, number: str, write: Callable[[str], None]) -> None:
        write(number)
        self._held[kind] = (0, write)
        asyncio.get_running_loop().call_later(INTERVAL, self._next, kind)

    def _next(self, kind: Hashable) -> None:
        number, write = self._held.pop(kind)
        if number:
            self._write(kind, f" ({number} like it in a second)" if number > 1 else "", write)
