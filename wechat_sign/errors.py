"""What can go wrong, and what a person should do about it, in English and Chinese.

The facts of an error are its attributes; its text is for the log, and says what to do.
No error carries the secret, an access_token or a ticket.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple


class Advice(NamedTuple):
    """What a person should do: a sentence in two languages, without full stop."""

    en: str
    zh: str

    def __str__(self) -> str:
        return f"{self.en} / {self.zh}"

    def about(self, address: str) -> Advice:
        """With the address filled in, and words for it where it is not known."""
        return Advice(
            self.en.format(address=address or "this server's public address"),
            self.zh.format(address=address or "本服务器的公网 IP"),
        )


_NO_ADVICE: Final = Advice("", "")

TOKEN_REFUSED: Final = frozenset({40001, 40014, 42001})
"""errcodes by which `getticket` says that the access_token, not the account, is at fault."""

_TRANSIENT: Final = frozenset({-1, -1000, 40014, 42001})


class SigningError(Exception):
    """Whatever keeps a page from being signed. Only its subclasses are raised.

    `what` happened is a sentence without full stop, `advice` is what to do about it.
    """

    transient: bool = False
    """True where asking again soon may help without anybody mending anything."""

    def __init__(self, what: str, advice: Advice = _NO_ADVICE) -> None:
        super().__init__(f"{what}. What to do: {advice}" if advice.en else what)
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
    """WeChat answered with an errcode. `address` is this host's as WeChat saw it, if it said."""

    def __init__(self, errcode: int, errmsg: str, *, endpoint: str) -> None:
        seen = re.search(r"invalid ip ([0-9a-fA-F.:]+)", errmsg)
        self.errcode = errcode
        self.errmsg = errmsg
        self.endpoint = endpoint
        self.address = seen[1] if seen else ""
        replaced = errcode == 40001 and endpoint == "getticket"
        self.transient = replaced or errcode in _TRANSIENT
        advice = _TOKEN_REPLACED if replaced else _BY_ERRCODE.get(errcode, _UNKNOWN)
        what = f"WeChat refused {endpoint} with errcode {errcode} ({errmsg})"
        super().__init__(what, advice.about(self.address))


class WeChatUnreachable(SigningError):
    """No answer from WeChat, or one that is not WeChat's; `cause` says which, without the URL."""

    transient = True

    def __init__(self, cause: str, *, endpoint: str) -> None:
        super().__init__(f"no usable answer from WeChat to {endpoint}: {cause}", _UNREACHABLE)
        self.cause = cause
        self.endpoint = endpoint


class LockedElsewhere(SigningError):
    """Another instance holds the lock and asks WeChat, and its answer did not come in time."""

    transient = True

    def __init__(self) -> None:
        what = "another instance holds the lock and is asking WeChat for the ticket"
        super().__init__(what, _LOCKED)


def redis_advice(trouble: str) -> Advice:
    """What to do about a failure, by the words that Redis and redis-py have for it."""
    return next(
        advice
        for words, advice in _BY_WORDS_OF_REDIS.items()
        if any(word in trouble for word in words)
    )


_WRONG_SECRET = Advice(
    "secret is not the one of this appid: copy it again from 微信公众平台 → 设置与开发 → 基本配置 "
    "(AppSecret; resetting it makes the old one void)",
    "secret 与该 appid 不匹配：请在 微信公众平台 → 设置与开发 → 基本配置 "
    "重新复制开发者密码（AppSecret；重置后旧密码立即失效）",
)
_TOKEN_REPLACED = Advice(
    "another program replaced the access_token: let only one program fetch it, "
    "or set token_api = stable_token, which is isolated from the others",
    "access_token 已被其他程序刷新：请只由一个程序获取，"
    "或设置 token_api = stable_token，与其他程序互不影响",
)
_WHITELIST = Advice(
    "add {address} to the account's IP whitelist: 微信公众平台 → 设置与开发 → 基本配置 → IP白名单, "
    "or, in the newer console, 微信开发者平台 → 我的业务 → 公众号/服务号 → 基础信息 → 开发信息. "
    "If it is there already, check that the list is this appid's, that the address is a "
    "public one, and whether this host leaves by several addresses",
    "请把 {address} 加入 IP白名单：微信公众平台 → 设置与开发 → 基本配置 → IP白名单；"
    "新版后台为 微信开发者平台 → 我的业务 → 公众号/服务号 → 基础信息 → 开发信息。"
    "如已加入，请确认该名单属于这个 appid、所填为公网 IP，并检查本服务器是否有多个出口 IP",
)
_BUSY = Advice("WeChat is busy; the server asks again by itself", "微信系统繁忙，本服务会自动重试")
_NO_RIGHT = Advice(
    "the account lacks the right to this call: it may have to be verified (微信认证)",
    "公众号没有该接口的权限，可能需要先完成微信认证",
)
_CONFIRM = Advice(
    "an administrator of the account must confirm this address in WeChat first",
    "需先由公众号管理员在微信中确认该 IP 的调用",
)
_UNKNOWN = Advice(
    "look the errcode up at developers.weixin.qq.com",
    "请在 developers.weixin.qq.com 查询该错误码（errcode）",
)
_UNREACHABLE = Advice(
    "check that this host reaches the api of [wechat] (DNS, firewall, proxy); "
    "the server asks again by itself",
    "请检查本服务器能否访问 [wechat] 的 api（DNS、防火墙、代理）；本服务会自动重试",
)
_LOCKED = Advice("look at that instance's log if this lasts", "如持续出现，请查看该实例的日志")

_BY_ERRCODE: Final[dict[int, Advice]] = {
    -1: _BUSY,
    -1000: _BUSY,
    40001: _WRONG_SECRET,  # from getticket: _TOKEN_REPLACED
    40002: Advice(
        "this should not happen; check that api in [wechat] leads to WeChat",
        "正常情况下不会出现：请检查 [wechat] 的 api 是否指向微信",
    ),
    40013: Advice(
        "appid is wrong: copy it again from the console; upper and lower case count",
        "appid 有误：请在 微信公众平台 → 设置与开发 → 基本配置 重新复制 AppID，注意大小写",
    ),
    40014: Advice(
        "the access_token was not valid; the server fetches a new one by itself",
        "access_token 无效，本服务会自动重新获取",
    ),
    40125: _WRONG_SECRET,
    40164: _WHITELIST,
    40243: Advice(
        "the secret is frozen: unfreeze it in 微信公众平台 → 设置与开发 → 基本配置, "
        "then wait about 10 minutes",
        "AppSecret 已被冻结：请在 微信公众平台 → 设置与开发 → 基本配置 解冻，约 10 分钟后生效",
    ),
    41002: Advice(
        "appid did not reach WeChat: check api in [wechat] and any proxy on the way",
        "appid 没有传到微信：请检查 [wechat] 的 api 以及途中的代理",
    ),
    41004: Advice(
        "secret did not reach WeChat: check api in [wechat] and any proxy on the way",
        "secret 没有传到微信：请检查 [wechat] 的 api 以及途中的代理",
    ),
    42001: Advice(
        "the access_token had expired; the server fetches a new one by itself",
        "access_token 已过期，本服务会自动重新获取",
    ),
    43002: Advice(
        "the request's method was changed on the way: check api in [wechat] and any proxy",
        "请求方法在途中被改动：请检查 [wechat] 的 api 以及途中的代理",
    ),
    45009: Advice(
        "the day's quota of this call is used up: it comes back at midnight, Beijing time; "
        "clear_quota brings it back at once (10 times a month). Check whether another program "
        "asks for tokens with this appid",
        "该接口当天的调用次数已用完：次日零点（北京时间）恢复，"
        "也可用 clear_quota 立即清零（每月 10 次）。"
        "请检查是否有其他程序在用这个 appid 获取 access_token",
    ),
    45011: Advice(
        "too many calls within a minute; the server asks again in a minute",
        "一分钟内调用过于频繁，本服务会在一分钟后重试",
    ),
    48001: _NO_RIGHT,
    61004: _WHITELIST,
    89501: _CONFIRM,
    89503: _CONFIRM,
    89506: Advice(
        "an administrator refused this address twice: it can be asked for again after 24 hours",
        "管理员已两次拒绝该 IP 的调用：24 小时后才能再次申请",
    ),
    89507: Advice(
        "an administrator refused this address: it can be asked for again after 1 hour",
        "管理员已拒绝该 IP 的调用：1 小时后才能再次申请",
    ),
}

_BY_WORDS_OF_REDIS: Final[dict[tuple[str, ...], Advice]] = {
    ("Authentication", "NOAUTH", "WRONGPASS", "username-password", "NOPERM"): Advice(
        "correct password (and username, where Redis has users) in [redis]",
        "请更正 [redis] 的 password（Redis 设有用户时还有 username）",
    ),
    ("SSL", "ssl", "closed by server", "reset by peer"): Advice(
        "set tls in [redis] as this Redis has it: yes where it speaks TLS, no where it doesn't",
        "请按 Redis 的实际情况设置 [redis] 的 tls：启用 TLS 为 yes，否则为 no",
    ),
    ("refused",): Advice(
        "start Redis, or correct host and port in [redis]; empty host: do without it",
        "请启动 Redis，或更正 [redis] 的 host 与 port；不用 Redis 时 host 留空",
    ),
    ("Timeout",): Advice(
        "check whether a firewall is in between, whether Redis hangs, and whether it "
        "speaks TLS (tls in [redis])",
        "请检查途中是否有防火墙、Redis 是否无响应，以及 Redis 是否启用了 TLS（[redis] 的 tls）",
    ),
    ("Name or service", "resolution", "nodename", "getaddrinfo"): Advice(
        "correct host in [redis]: its name is not known to DNS",
        "请更正 [redis] 的 host：DNS 无法解析该主机名",
    ),
    ("ReadOnly",): Advice(
        "give the primary's host in [redis]: this one is a read-only replica",
        "请在 [redis] 的 host 填写主节点：当前是只读从节点",
    ),
    ("OutOfMemory", "OOM"): Advice(
        "give Redis more maxmemory, or another db or instance",
        "请调大 Redis 的 maxmemory，或换用其他 db 或实例",
    ),
    ("",): Advice(
        "check host, port and db in [redis], and look at the log of Redis",
        "请检查 [redis] 的 host、port、db，并查看 Redis 的日志",
    ),
}

_NOT_RUNNING = Advice(
    "the server has stopped or is restarting: check that it runs, and look at its log",
    "本服务已停止或正在重启：请检查服务是否在运行，并查看其日志",
)
_QUERY_CHANGED = Advice(
    "a proxy decodes or rewrites the query: pass /getApi on as it is (nginx: proxy_pass "
    "without a path)",
    "反向代理改写了查询串：请原样转发 /getApi（nginx 的 proxy_pass 后不要带路径）",
)
_ANOTHER_ACCOUNT = Advice(
    "appid and secret in config.ini belong to another account than the one meant",
    "config.ini 中的 appid、secret 不属于要用的公众号",
)
_NOT_IN_LIST = Advice(
    "the API is not in js_api_list of config.ini", "该接口不在 config.ini 的 js_api_list 中"
)
_OLD_APP = Advice(
    "update the WeChat app: this version is too old", "请更新手机上的微信：当前版本过低"
)

CAUSES: Final[dict[str, dict[str, tuple[Advice, ...]]]] = {
    "sign": {
        "no answer": (
            _NOT_RUNNING,
            Advice(
                "the phone has lost its network, or a proxy or firewall cuts the connection",
                "手机网络中断，或途中的代理、防火墙切断了连接",
            ),
        ),
        "not JSON": (
            Advice(
                "a proxy answers in this server's place (502, 504: it does not reach it): check "
                "that the server runs, and the address that the proxy passes requests on to",
                "代理代替本服务作了应答（502、504 表示代理连不上本服务）：请检查服务是否在运行，"
                "以及代理转发的目标地址",
            ),
            Advice(
                "the proxy does not pass /getApi on to this server",
                "代理没有把 /getApi 转发给本服务",
            ),
        ),
        "no script": (
            Advice(
                "the proxy passes this page on, but not /wechat-sign.js",
                "代理转发了本页，却没有转发 /wechat-sign.js",
            ),
            _NOT_RUNNING,
        ),
        "400": (
            Advice(
                "this page's url is too long or has characters that no url may have: "
                "open it by a plain address",
                "本页的 url 过长，或含有 url 不允许的字符：请换用简单的地址打开",
            ),
            _QUERY_CHANGED,
        ),
        "403": (
            Advice(
                "add this page's host to page_hosts in config.ini",
                "请把本页域名加入 config.ini 的 page_hosts",
            ),
        ),
        "": (
            Advice(
                "look at the server's log, or run server.py --check on the server",
                "请查看本服务的日志，或在服务器上运行 server.py --check",
            ),
        ),
    },
    "script": {
        "": (
            Advice(
                "this network blocks both (company network, DNS, ad blocker): try another, "
                "for example mobile data",
                "当前网络屏蔽了这两个域名（公司网络、DNS、广告拦截）：请换个网络，例如手机流量",
            ),
            Advice(
                "a proxy adds a Content-Security-Policy of its own that does not allow them",
                "代理另加了 Content-Security-Policy，不允许加载这两个域名",
            ),
        ),
    },
    "phone": {
        "silent": (
            Advice(
                "this is not the WeChat app, though its user agent says so (a browser, an "
                "emulator): open the page in the app",
                "当前并非微信，只是 User-Agent 自称微信（浏览器、模拟器）：请改用微信 App 打开",
            ),
            Advice(
                "the phone does not reach WeChat, or its network is slow: try again",
                "手机连不上微信，或网络过慢：请稍后重试",
            ),
            _OLD_APP,
        ),
        "invalid url domain": (
            Advice(
                "the domain of this page is not in JS接口安全域名 of the account "
                "(公众号设置 → 功能设置)",
                "页面域名不在公众号的“JS接口安全域名”中（公众号设置 → 功能设置）",
            ),
            Advice(
                "the page is opened by IP address, or with a port that is not 80 or 443",
                "通过 IP 地址，或 80、443 以外的端口打开了页面",
            ),
            _ANOTHER_ACCOUNT,
        ),
        "invalid signature": (
            Advice(
                "the url that was signed is not the page's: compare the two below",
                "所签的 url 不是本页的 url：请对照下方",
            ),
            _QUERY_CHANGED,
            Advice(
                "the ticket is dead: WeChat replaced it early; within 10 minutes (recheck) the "
                "server has the new one",
                "ticket 已失效（被微信提前更换），本服务会在 10 分钟内（recheck）换上新的",
            ),
            _ANOTHER_ACCOUNT,
        ),
        "offline verifying": (
            Advice("wx.config failed before", "此前 wx.config 未通过"),
            _NOT_IN_LIST,
        ),
        "permission denied": (_NO_RIGHT, _NOT_IN_LIST),
        "function not exist": (_OLD_APP,),
        "invalid args": (
            Advice(
                "name at least one API in js_api_list of config.ini",
                "请在 config.ini 的 js_api_list 中至少填写一个接口",
            ),
        ),
        "config:fail": (
            Advice(
                "a field of wx.config is missing or wrong: check appid in config.ini, and that "
                "no proxy changes the JSON",
                "wx.config 缺少字段或字段有误：请检查 config.ini 的 appid，以及代理是否改动了 JSON",
            ),
            _OLD_APP,
        ),
        "": (
            Advice(
                "look the message up in WeChat's JS-SDK guide, appendix 5 "
                "(developers.weixin.qq.com)",
                "请在微信 JS-SDK 说明文档的“附录5-常见错误及解决方法”中查询该信息"
                "（developers.weixin.qq.com）",
            ),
            _OLD_APP,
        ),
    },
}
"""Why a step of the page failed, most often first, by the step and what it got: a status of this
server; a message of the phone, the first that is part of what it said. "" is for all others."""
