"""What can go wrong, and what a person should do about it, in English and Chinese.

The facts of an error are its attributes; its text is for the log, and says what to do.
No error carries the secret, an access_token or a ticket.
"""

from __future__ import annotations

import configparser
import re
import traceback
from pathlib import Path
from typing import Final, NamedTuple

from .logs import printable
from .sentences import Sentence, in_chinese


class Advice(NamedTuple):
    """What a person should do: a sentence in two languages, without full stop."""

    en: str
    zh: str

    def __str__(self) -> str:
        return f"{self.en} / {self.zh}"

    @property
    def said(self) -> str:
        """For whoever reads a terminal: in Chinese alone where that is Chinese."""
        return self.zh if in_chinese() else str(self)

    def about(self, address: str) -> Advice:
        """With the address filled in, and words for it where it is not known."""
        return Advice(
            self.en.format(address=address or "this server's public address"),
            self.zh.format(address=address or "本服务器的公网 IP"),
        )


NO_ADVICE: Final = Advice("", "")
_TABLE: Final = configparser.ConfigParser(interpolation=None, delimiters=("=",))
_TABLE.read_string(Path(__file__).with_name("advice.ini").read_text(encoding="utf-8"))


def _advice(name: str) -> Advice:
    return Advice(_TABLE[name]["en"], _TABLE[name]["zh"])


CAUSES: Final = {
    step: {
        got: [_advice(name) for name in names.split(", ")]
        for got, names in _TABLE[f"page {step}"].items()
    }
    for step in ("sign", "urls", "script", "phone")
}
"""Why a step of the page failed, most often first, by the step and what it got."""

TOKEN_REFUSED: Final = frozenset({40001, 40014, 42001})
"""errcodes by which `getticket` says that the access_token, not the account, is at fault."""

ABOUT_THE_HOST: Final = frozenset({40164, 61004})
"""errcodes that concern this host's address, and no other instance's."""

_TRANSIENT: Final = frozenset({-1, -1000, 40014, 42001})


class SigningError(Exception):
    """Whatever keeps a page from being signed. Only its subclasses are raised.

    `what` happened is a sentence without full stop, `advice` is what to do about it. For the
    public there is the `kind`, which is `what` without what WeChat or the system said, and
    `public_advice`, without this host's address.
    """

    transient: bool = False
    """True where asking again soon may help without anybody mending anything."""

    def __init__(self, what: str, advice: Advice = NO_ADVICE, *, kind: str = "") -> None:
        super().__init__(f"{what}. What to do: {advice}" if advice.en else what)
        self.what = what
        self.kind = kind or what
        self.advice = self.public_advice = advice


class ConfigError(SigningError):
    """The settings can't be used. `problems` has a sentence for each thing to mend."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BadPageUrl(SigningError):
    """The caller's `url` can't be the address of a page; the text says why."""


class PageHostNotAllowed(SigningError):
    """The page's host is not among `page_hosts`."""

    def __init__(self, host: str) -> None:
        host = printable(host, 253)
        super().__init__(f"pages on {host} are not signed here: page_hosts does not list it")


class WeChatRefused(SigningError):
    """WeChat answered with an errcode. `address` is this host's as WeChat saw it, if it said."""

    def __init__(self, errcode: int, errmsg: str, *, endpoint: str) -> None:
        self.errcode = errcode
        self.errmsg = printable(errmsg)
        self.endpoint = endpoint
        seen = re.search(r"invalid ip ([0-9a-fA-F.:]{3,39})", self.errmsg)
        self.address = seen[1] if seen else ""
        known = _TABLE["errcode"]
        name = known.get(str(errcode), known["else"])
        name = known.get(f"{errcode} {endpoint}", name)
        self.transient = errcode in _TRANSIENT or (errcode, endpoint) == (40001, "getticket")
        kind, advice = f"WeChat refused {endpoint} with errcode {errcode}", _advice(name)
        what = Sentence(
            "WeChat refused {endpoint} with errcode {errcode} ({errmsg})",
            endpoint=endpoint,
            errcode=errcode,
            errmsg=self.errmsg,
        )
        super().__init__(what, advice.about(self.address), kind=kind)
        self.public_advice = advice.about("")


class WeChatUnreachable(SigningError):
    """No answer from WeChat, or one that is not WeChat's; `cause` says why, without the URL."""

    transient = True

    def __init__(self, cause: str, *, endpoint: str) -> None:
        kind = f"no usable answer from WeChat to {endpoint}"
        what = "no usable answer from WeChat to {endpoint}: {cause}"
        what = Sentence(what, endpoint=endpoint, cause=cause)
        super().__init__(what, _advice("unreachable"), kind=kind)
        self.endpoint = endpoint


class LockedElsewhere(SigningError):
    """Another instance holds the lock and asks WeChat, and its answer did not come in time."""

    transient = True

    def __init__(self) -> None:
        what = "another instance holds the lock and is asking WeChat for the ticket"
        super().__init__(Sentence(what), _advice("locked elsewhere"))


class LookHangs(SigningError):
    """A look at Redis and WeChat did not end within so many seconds, and was left behind."""

    transient = True

    def __init__(self, seconds: float) -> None:
        what = Sentence("a look did not end within {seconds:g} s", seconds=seconds)
        super().__init__(what, _advice("unreachable"))


class Unexpected(SigningError):
    """What nobody foresaw, by its class and where it was raised: its text may have a credential
    in it."""

    transient = True

    def __init__(self, error: Exception) -> None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        name, file = type(error).__name__, Path(place.filename).name
        what = Sentence("{name} in {file}, line {line}", name=name, file=file, line=place.lineno)
        super().__init__(what, _advice("unexpected"))


class Stopping(SigningError):
    """The server was told to stop while WeChat was asked."""

    def __init__(self) -> None:
        super().__init__("the server is stopping")


def redis_advice(trouble: str) -> Advice:
    """What to do about a failure, by the words that Redis and redis-py have for it."""
    entries = _TABLE["redis"]
    found = (name for words, name in entries.items() if words in trouble.lower())
    return _advice(next(found, entries["else"]))


def start_advice(name: str) -> Advice:
    """What to do about something that is less safe than it could be."""
    return _advice(_TABLE["start"][name])
