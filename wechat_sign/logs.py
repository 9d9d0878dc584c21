"""What the log shows: printable lines, not too long, and not the same over and over."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Final
from urllib.parse import unquote

LONGEST_TEXT: Final = 300
"""Characters that are shown of a text that came from outside."""
LONGEST_LINE: Final = 2000
"""Characters of a line in the log; no advice is so long."""
SHORTEST_SECRET: Final = 4
"""Characters; what is shorter is in every other word."""
INTERVAL: Final = 1.0
"""Seconds in which one line of a kind is logged."""


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
    """The text with *** for each secret in it, in upper case or url-escaped, too.

    Takes linear time: a far end may choose both, and the interpreter waits.
    """
    wanted = [_lower(secret) for secret in secrets if len(secret) >= SHORTEST_SECRET]
    text = _without(wanted, list(text), text)
    escaped = re.findall("%[0-9a-fA-F]{2}|.", text, re.DOTALL)
    return _without(wanted, escaped, unquote(text, "latin-1"))


def _without(secrets: list[str], letters: list[str], plain: str) -> str:
    """The letters, with *** for each secret in what they plainly are."""
    plain = _lower(plain)
    for secret in secrets:
        at = 0
        while (at := plain.find(secret, at)) >= 0:
            letters[at : at + len(secret)] = ["***"] + [""] * (len(secret) - 1)
            at += len(secret)
    return "".join(letters)


def _lower(text: str) -> str:
    return "".join(letter.lower()[0] for letter in text)


class LineFormatter(logging.Formatter):
    """Keeps a record on one line, and lets it do nothing to a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record), LONGEST_LINE)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        lines = super().formatException(ei).split("\n")
        return "\n".join(printable(line, LONGEST_LINE) for line in lines)


class Throttle(logging.Filter):
    """Logs at most one record of a `kind` a second; the next one tells how many were left out.

    A class because it carries when each kind was logged, and how many were left out since.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._logged: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it. The kinds are few; a record without one is always logged."""
        kind = getattr(record, "kind", None)
        if kind is None:
            return True
        now = self._clock()
        logged, left_out = self._logged.get(kind, (-INTERVAL, 0))
        if now - logged < INTERVAL:
            self._logged[kind] = (logged, left_out + 1)
            return False
        self._logged[kind] = (now, 0)
        if left_out:
            record.msg = f"{record.getMessage()} ({left_out} more {kind} since the last such line)"
            record.args = ()
        return True
