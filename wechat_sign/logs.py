"""What the log shows: printable lines, not too long, and not the same over and over."""

from __future__ import annotations

import logging
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


def sanitize(text: str, longest: int = LONGEST_TEXT) -> str:
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
    for secret in (one.lower() for one in secrets if len(one) >= SHORTEST_SECRET):
        for plain in (text.lower(), unquote(text, "latin-1").lower()):
            if secret in plain:
                text = plain.replace(secret, "***")
    return text


class LineFormatter(logging.Formatter):
    """Keeps a record on one line, and lets it do nothing to a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return sanitize(super().formatMessage(record), LONGEST_LINE)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        lines = super().formatException(ei).split("\n")
        return "\n".join(sanitize(line, LONGEST_LINE) for line in lines)


class Throttle(logging.Filter):
    """Logs at most one record of a `kind` a second; the next one tells how many were left out.

    A class because it carries, by kind, until when none is logged, and how many were left out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._held: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it. The kinds are few; a record without one is always logged."""
        kind, now = getattr(record, "kind", ""), self._clock()
        until, left_out = self._held.get(kind, (0.0, 0))
        if kind and now < until:
            self._held[kind] = (until, left_out + 1)
            return False
        self._held[kind] = (now + INTERVAL, 0)
        if left_out:
            record.msg += f" ({left_out} more {kind} since the last such line)"
        return True
