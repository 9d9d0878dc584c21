"""What can go wrong, and what a person should do about it.

The facts of an error are its attributes; its text is for the log, and says what to do.
No error carries the secret, an access_token or a ticket.
"""

from __future__ import annotations

import re
from typing import Final

TOKEN_REFUSED: Final = frozenset({40001, 40014, 42001})
"""errcodes by which `getticket` says that the access_token, not the account, is at fault."""

_TRANSIENT: Final = frozenset({-1, -1000}) | TOKEN_REFUSED

_WHITELIST = (
    "add {address} to the account's IP whitelist: 微信公众平台 → 设置与开发 → 基本配置 → IP白名单, "
    "or, in the newer console, 微信开发者平台 → 我的业务 → 公众号/服务号 → 基础信息 → 开发信息. "
    "If it is there already, look whether the list is this appid's, whether the address is a "
    "public one, and whether this host leaves by several addresses"
)
_WRONG_SECRET = (
    "secret is not the one of this appid: copy it again from 微信公众平台 → 设置与开发 → 基本配置 "
    "(AppSecret; resetting it makes the old one void)"
)

_ADVICE: Final[dict[int, str]] = {
    -1: "WeChat is busy; the server asks again by itself",
    -1000: "WeChat is busy; the server asks again by itself",
    40001: (
        "another program replaced the access_token: let only one program fetch it, "
        "or set token_api = stable_token, which is isolated from the others"
    ),
    40002: "this should not happen; look whether api in [wechat] leads to WeChat",
    40013: "appid is wrong: copy it again from the console; upper and lower case count",
    40014: "the access_token was not valid; the server fetches a new one by itself",
    40125: _WRONG_SECRET,
    40164: _WHITELIST,
    40243: (
        "the secret is frozen: unfreeze it in 微信公众平台 → 设置与开发 → 基本配置, "
        "then wait about 10 minutes"
    ),
    41002: "appid did not reach WeChat: look at api in [wechat] and at any proxy on the way",
    41004: "secret did not reach WeChat: look at api in [wechat] and at any proxy on the way",
    42001: "the access_token had expired; the server fetches a new one by itself",
    43002: "the request's method was changed on the way: look at api in [wechat] and any proxy",
    45009: (
        "the day's quota of this call is used up: it comes back at midnight, Beijing time; "
        "clear_quota brings it back at once (10 times a month). Look for another program that "
        "asks for tokens with this appid"
    ),
    45011: "too many calls within a minute; the server asks again in a minute",
    48001: "the account lacks the right to this call: it may have to be verified (微信认证)",
    61004: _WHITELIST,
    89501: "an administrator of the account must confirm this address in WeChat first",
    89503: "an administrator of the account must confirm this address in WeChat first",
    89506: "an administrator refused this address twice: it can be asked for again after 24 hours",
    89507: "an administrator refused this address: it can be asked for again after 1 hour",
}


class SigningError(Exception):
    """Whatever keeps a page from being signed. Only its subclasses are raised.

    `what` happened and the `advice`, what a person should do, are sentences without full stop.
    """

    transient: bool = False
    """True where asking again soon may help without anybody mending anything."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"{what}. What to do: {advice}" if advice else what)
        self.what = what
        self.advice = advice


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
        super().__init__(f"pages on {host} are not signed here: page_hosts does not list it")
        self.host = host


class WeChatRefused(SigningError):
    """WeChat answered with an errcode."""

    def __init__(self, errcode: int, errmsg: str, *, endpoint: str) -> None:
        wrong_secret = errcode == 40001 and endpoint != "getticket"
        seen = re.search(r"invalid ip ([0-9a-fA-F.:]+)", errmsg)
        address = seen[1] if seen else "this server's public address"
        unknown = "look the errcode up at developers.weixin.qq.com"
        advice = _WRONG_SECRET if wrong_secret else _ADVICE.get(errcode, unknown)
        super().__init__(
            f"WeChat refused {endpoint} with errcode {errcode} ({errmsg})",
            advice.format(address=address),
        )
        self.errcode = errcode
        self.errmsg = errmsg
        self.endpoint = endpoint
        self.transient = errcode in _TRANSIENT and not wrong_secret


class WeChatUnreachable(SigningError):
    """No answer from WeChat, or one that is not WeChat's; `cause` says which, without the URL."""

    transient = True

    def __init__(self, cause: str, *, endpoint: str) -> None:
        super().__init__(
            f"no usable answer from WeChat to {endpoint}: {cause}",
            "look whether this host reaches the api of [wechat] (DNS, firewall, proxy); "
            "the server asks again by itself",
        )
        self.cause = cause
        self.endpoint = endpoint


class LockedElsewhere(SigningError):
    """Another instance is asking WeChat, and its answer did not come in time."""

    transient = True

    def __init__(self) -> None:
        super().__init__(
            "another instance is asking WeChat for the ticket and has not got it yet",
            "look at that instance's log if this lasts",
        )
