"""What can go wrong, and what a person should do about it.

The facts of an error are its attributes; its text is for the log, and says what to do.
No error carries the secret, an access_token or a ticket.
"""

from __future__ import annotations

import configparser
import traceback
from pathlib import Path
from typing import Final

from .logs import sanitize
from .texts import FOLDER, Text

_TABLE: Final = configparser.ConfigParser(interpolation=None, delimiters=("=",))
_TABLE.read(FOLDER / "advice.ini", encoding="utf-8")


NO_ADVICE: Final = Text("")


def advice(name: str) -> Text:
    """The advice of that name; where to click in WeChat's console is told by one text."""
    values = {"console": advice("console")} if "{console}" in _TABLE["advice"][name] else {}
    return Text(_TABLE["advice"][name], **values)


CAUSES: Final = {
    step: {
        got: [(text, text.zh) for text in map(advice, names.split(", "))]
        for got, names in _TABLE[f"page {step}"].items()
    }
    for step in ("sign", "urls", "script", "phone")
}
"""Why a step of the page fails, in both languages, by the step and what it got."""

TOKEN_REFUSED: Final = frozenset({40001, 40014, 42001})
"""errcodes by which `getticket` says that the access_token, not the account, is at fault."""

_TRANSIENT: Final = frozenset({"-1", "-1000", "40014", "42001", "40001 getticket"})
"""Keys of [errcode] in advice.ini for what passes by itself."""


class SigningError(Exception):
    """What keeps a page from being signed. Only its subclasses are raised.

    `what` happened is a sentence without full stop, `advice` is what to do about it. `kind` is
    `what` for the public: without the words of WeChat or the system.
    """

    transient: bool = False
    """True where asking again soon may help, and nothing needs mending."""

    def __init__(self, what: str, advice: Text = NO_ADVICE, *, kind: str = "") -> None:
        super().__init__(f"{what}. What to do: {advice.both}" if advice else what)
        self.what = what
        self.kind = kind or what
        self.advice = advice


class ConfigError(SigningError):
    """The settings can't be used. `problems` has a sentence for each thing to mend."""

    def __init__(self, *problems: Text) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BadPageUrl(SigningError):
    """The caller's `url` can't be the address of a page; the text says why."""


class PageHostNotAllowed(SigningError):
    """The page's host is not among `page_hosts`."""

    def __init__(self, host: str) -> None:
        host = sanitize(host, 253)
        super().__init__(f"pages on {host} are not signed here: page_hosts does not list it")


class WeChatRefused(SigningError):
    """WeChat answered with an errcode."""

    def __init__(self, errcode: int, errmsg: str, *, endpoint: str) -> None:
        self.errcode = errcode
        self.errmsg = sanitize(errmsg)
        self.endpoint = endpoint
        names, keys = _TABLE["errcode"], (f"{errcode} {endpoint}", str(errcode), "else")
        key = next(key for key in keys if key in names)
        self.transient = key in _TRANSIENT
        what = "WeChat refused {endpoint} with errcode {errcode} ({errmsg})"
        what = Text(what, endpoint=endpoint, errcode=errcode, errmsg=self.errmsg)
        kind = f"WeChat refused {endpoint} with errcode {errcode}"
        super().__init__(what, advice(names[key]), kind=kind)


class WeChatUnreachable(SigningError):
    """No answer from WeChat, or one that is not WeChat's; `cause` says why, without the URL."""

    transient = True

    def __init__(self, cause: str, *, endpoint: str) -> None:
        what = Text(
            "no usable answer from WeChat to {endpoint}: {cause}", endpoint=endpoint, cause=cause
        )
        kind = f"no usable answer from WeChat to {endpoint}"
        super().__init__(what, advice("unreachable"), kind=kind)
        self.endpoint = endpoint


class LockedElsewhere(SigningError):
    """Another instance holds the lock and asks WeChat, and its answer did not come in time."""

    transient = True

    def __init__(self) -> None:
        what = Text("another instance holds the lock and is asking WeChat for the ticket")
        super().__init__(what, advice("locked elsewhere"))


class LookHangs(SigningError):
    """A look at Redis and WeChat did not end within so many seconds, and was left behind."""

    transient = True

    def __init__(self, seconds: float) -> None:
        what = Text("a look did not end within {seconds:g} s", seconds=seconds)
        super().__init__(what, advice("unreachable"))


class Unexpected(SigningError):
    """A defect, by its class and where it was raised: its text may have a credential in it."""

    transient = True

    def __init__(self, error: Exception) -> None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        name, file = type(error).__name__, Path(place.filename).name
        what = Text("{name} in {file}, line {line}", name=name, file=file, line=place.lineno)
        super().__init__(what, advice("unexpected"))


class Stopping(SigningError):
    """The server was told to stop while WeChat was asked."""

    def __init__(self) -> None:
        super().__init__("the server is stopping")


def redis_advice(trouble: str) -> Text:
    """What to do about a failure, by the words that Redis and redis-py have for it."""
    entries = _TABLE["redis"]
    found = (name for words, name in entries.items() if words in trouble.lower())
    return advice(next(found, entries["else"]))
