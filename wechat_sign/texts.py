"""One way to say a text: English for the log, the reader's language for a terminal.

The code and advice.ini have the English; locale/zh_CN.csv has the Chinese, a text a row.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from tornado import locale

FOLDER: Final = Path(__file__).with_name("locale")
locale.load_translations(str(FOLDER))
_CHINESE: Final = locale.get("zh_CN")


class Text(str):
    """English, with the values filled in; `zh` is the Chinese. A value may be a Text itself."""

    zh: str

    def __new__(cls, english: str, /, **values: object) -> Text:
        text = super().__new__(cls, english.format(**values) if values else english)
        chinese = _CHINESE.translate(english)
        in_chinese = {name: getattr(value, "zh", value) for name, value in values.items()}
        text.zh = chinese.format(**in_chinese) if values else chinese
        return text

    @property
    def both(self) -> str:
        """English and Chinese, for a log that anyone may read."""
        return f"{self} / {self.zh}"

    def at(self, place: object) -> Text:
        """The text with where it belongs before it."""
        return Text("{place}: {text}", place=place, text=self)


def local(text: str) -> str:
    """The text in the language of the terminal."""
    return text.zh if isinstance(text, Text) and _speaks_chinese() else text


def _speaks_chinese() -> bool:
    """Whether POSIX's variables name a Chinese locale, and the terminal's encoding has Chinese."""
    names = map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))
    if not next(filter(None, names), "").startswith("zh"):
        return False
    with suppress(LookupError, UnicodeEncodeError):
        for stream in (sys.stdout, sys.stderr):
            "通过，签名".encode(getattr(stream, "encoding", None) or "utf-8")
        return True
    return False
