"""What a person reads in a terminal, in Chinese: `--check`, and why a start was refused.

The code has the English, which is also what is logged; the Chinese is all here. What to do about
what goes wrong while the server runs is in advice.ini, in both.
"""

from __future__ import annotations

import os
import sys
from typing import Final, TextIO


def in_chinese() -> bool:
    """Whether the terminal's locale is a Chinese one, by the variables that POSIX asks for it,
    and what is written there can be Chinese."""
    given = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    chinese = next(filter(None, given), "").startswith("zh")
    return chinese and all(map(_takes_chinese, (sys.stdout, sys.stderr)))


def _takes_chinese(stream: TextIO | None) -> bool:
    try:
        "通过，签名".encode(getattr(stream, "encoding", None) or "utf-8")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def say(english: str, /, **values: object) -> str:
    """The sentence in the language of whoever reads it, with the values filled in."""
    if not in_chinese():
        return english.format(**values)
    return CHINESE[english].format(**{name: said(value) for name, value in values.items()})


def said(value: object) -> object:
    """The same as `say` has it, where it is in two languages."""
    return getattr(value, "said", value)


class Sentence(str):
    """English, for the log; `said` is what `say` makes of it, for whoever reads a terminal."""

    said: str

    def __new__(cls, english: str, /, **values: object) -> Sentence:
        made = super().__new__(cls, english.format(**values))
        made.said = say(english, **values)
        return made


CHINESE: Final = {
    # --check
    "ok": "通过",
    "note": "提示",
    "FAIL": "失败",
    "What to do: {advice}": "处理办法：{advice}",
    "settings": "配置",
    "safety": "安全",
    "signature": "签名",
    "the sandbox": "沙箱",
    "{source}: appid {appid}, {token_api} at {api}": (
        "{source}：appid {appid}，{api} 的 {token_api} 接口"
    ),
    "not set: a running server's credentials are its own, so WeChat is asked for others": (
        "未设置：运行中的服务只在自身进程内保存凭据，因此本次检查向微信另行获取"
    ),
    "Sentinel {service}, primary {where},": "Sentinel {service}（主节点 {where}）",
    "Cluster, the keys on {where},": "Cluster（键位于 {where}）",
    "answers ({ms} ms), {lock}": "应答正常（{ms} ms），{lock}",
    "lock works": "锁正常",
    "lock works (an instance has it just now)": "锁正常（目前由某个实例持有）",
    "fetched by {token_api} ({ms} ms)": "已用 {token_api} 获取（{ms} ms）",
    "fetched ({ms} ms), expires in {left} s": "已获取（{ms} ms），{left} 秒后过期",
    "in the cache, expires in {left} s": "取自缓存，{left} 秒后过期",
    "not in the cache, and not needed while the ticket is": (
        "缓存中没有，但缓存中有 jsapi_ticket 时不需要它"
    ),
    "{text}; the secret was not tried: with token_api = token that would void a running server's "
    "token": (
        "{text}；未验证 secret：token_api = token 时，验证会使运行中的服务的 access_token 失效"
    ),
    "the key {key} {problem}": "键 {key} {problem}",
    "holds {shape}, which is neither used nor overwritten": "中的值（{shape}）既不使用，也不覆盖",
    "holds what was fetched for another appid, and is not used": (
        "中是为另一个 appid 获取的凭据：不予使用"
    ),
    "no string": "非字符串类型的值",
    "a PHP-serialised value": "PHP 序列化的值",
    "JSON without a credential": "不含凭据的 JSON",
    "text that is no credential": "不是凭据的文本",
    "made for {page}": "已为 {page} 生成",
    # What goes wrong with WeChat
    "WeChat refused {endpoint} with errcode {errcode} ({errmsg})": (
        "微信拒绝了 {endpoint} 请求，错误码 {errcode}（{errmsg}）"
    ),
    "no usable answer from WeChat to {endpoint}: {cause}": (
        "未得到微信对 {endpoint} 的有效应答：{cause}"
    ),
    "it is not JSON": "应答不是 JSON",
    "it is not a JSON object": "应答不是 JSON 对象",
    "its errcode is no number": "应答中的 errcode 不是数字",
    "it has no {name} in it": "应答中没有 {name}",
    "its expires_in is no number of seconds, {least} or more": (
        "应答中的 expires_in 不是秒数，或小于 {least}"
    ),
    "a look did not end within {seconds:g} s": "一次查看在 {seconds:g} 秒内没有结束",
    "another instance holds the lock and is asking WeChat for the ticket": (
        "另一个实例持有锁，正在向微信获取 jsapi_ticket"
    ),
    "{name} in {file}, line {line}": "{file} 第 {line} 行发生 {name}",
    # What is less safe than it could be
    "any page is signed with this account": "任何网页都能用这个公众号签名",
    "the secret goes to WeChat unencrypted": "secret 未经加密就发往微信",
    "every user of this host may read {names} in {config}": (
        "本机的所有用户都能读取 {config} 中的 {names}"
    ),
    "{one} and {other}": "{one} 与 {other}",
    "the server runs as root": "服务以 root 身份运行",
    # The INI file
    "no such file. Copy config.example.ini to {path} and fill in appid and secret, or try the "
    "server without an account: python server.py --sandbox": (
        "文件不存在。请将 config.example.ini 复制为 {path} 并填写 appid 与 secret；"
        "没有公众号时可先试用：python server.py --sandbox"
    ),
    "is not readable for this user: chown it to User= of the systemd unit, or to whoever starts "
    "the server": (
        "当前用户无权读取：请用 chown 将其属主改为 systemd 单元的 User=，或启动服务的用户"
    ),
    "can't be read: {reason}": "无法读取：{reason}",
    "is not UTF-8 text; save it as UTF-8": "不是 UTF-8 文本，请另存为 UTF-8",
    "line {line}: {name} is given twice; join the two": (
        "第 {line} 行：重复出现（{name}），请将两处合并"
    ),
    "line {line}: {name} is given twice; keep one": (
        "第 {line} 行：重复填写（{name}），请只保留一处"
    ),
    "this section": "该节",
    "this option": "该选项",
    "line {line}: a [section] must come before the first option": (
        "第 {line} 行：第一个选项之前须有 [节名]"
    ),
    "line {line}: is not option = value": "第 {line} 行：不是“选项 = 值”的格式",
    "line {line}: unknown section; known are {known}": (
        "第 {line} 行：没有这样的节，可用的节为 {known}"
    ),
    "line {line}: unknown option in [{section}]; known are {known}": (
        "第 {line} 行：[{section}] 没有这样的选项，可用的选项为 {known}"
    ),
    "unknown section; did you mean {close}?": "没有这样的节，是否应为 {close}？",
    "unknown option; did you mean {close}?": "没有这样的选项，是否应为 {close}？",
    "{name} is required: fill it in": "{name} 为必填项，请填写",
    "{name} is required: fill it in (or set the environment variable {variable})": (
        "{name} 为必填项，请填写（或设置环境变量 {variable}）"
    ),
    "is not UTF-8 text (see the environment variable {variable})": (
        "不是 UTF-8 文本（请检查环境变量 {variable}）"
    ),
    "runs over several lines; is the line below it indented by mistake?": (
        "内容占了多行，请检查下一行是否误加了缩进"
    ),
    "looks like the secret, which is an option of its own": (
        "看起来是 AppSecret，请填写到 secret 选项"
    ),
    "item {place}": "第 {place} 项",
    "may not contain whitespace (a comment needs a line of its own)": (
        "不能含有空白字符（注释须单独成行）"
    ),
    "must be a number from {low} to {high}": "必须是 {low} 到 {high} 之间的数字",
    "must be a whole number from {low} to {high}": "必须是 {low} 到 {high} 之间的整数",
    "must be one of {choices}": "必须是以下之一：{choices}",
    "must be an appid, like wx and 16 letters and digits": (
        "必须是 AppID，形如 wx 加 16 位字母和数字"
    ),
    "is the account's 原始ID; the appid begins with wx": "是公众号的原始 ID，AppID 以 wx 开头",
    "is in quotes, which would be part of it; leave them out": (
        "带有引号，引号会成为值的一部分，请去掉"
    ),
    "must be a plain url, like https://api.weixin.qq.com": (
        "必须是不带用户名和参数的 url，例如 https://api.weixin.qq.com"
    ),
    "must be the name of a JS API": "必须是 JS 接口的名称",
    "must be the name of an open tag, like wx-open-launch-weapp": (
        "必须是开放标签的名称，例如 wx-open-launch-weapp"
    ),
    "must be an IP address or a network, like 10.0.0.5 or 10.0.0.0/8": (
        "必须是 IP 地址或网段，例如 10.0.0.5 或 10.0.0.0/8"
    ),
    # page_hosts
    "must be a host name alone, without scheme, port or path, like h5.example.com or "
    "*.example.com": ("只能填写域名，不含协议、端口和路径，例如 h5.example.com 或 *.example.com"),
    "{no_host}; one that is not ASCII as location.host has it, with xn--": (
        "{no_host}；含非 ASCII 字符的域名请按 location.host 中以 xn-- 开头的形式填写"
    ),
    "browsers write it {right}": "浏览器的写法为 {right}",
    "browsers of today write it {new}, older ones did not: list that": (
        "当前浏览器的写法为 {new}，旧版浏览器则不同：请填写前者"
    ),
    "browsers take it for an IPv4 address, by its end, and it is none": (
        "浏览器会因其结尾视之为 IPv4 地址，但它并不是"
    ),
    "after *. must come a domain with a dot in it, as in *.example.com": (
        "*. 之后须是带点的域名，例如 *.example.com"
    ),
    # [redis]
    "must be a host alone; a url is given as url, and so are several": (
        "只能填写一个主机：url 或多个主机请填写到 url 选项"
    ),
    "must be a host alone (an IPv6 address without brackets); the port is an option of its own": (
        "只能填写主机（IPv6 地址不带方括号）：端口请填写到 port 选项"
    ),
    "must be like redis://:PASSWORD@127.0.0.1:6379/0, rediss://… (TLS), unix:///run/redis.sock, "
    "redis+sentinel://HOST:26379,HOST:26379/SERVICE or redis+cluster://HOST:6379,HOST:6379; "
    "{escaped}": (
        "必须形如 redis://:PASSWORD@127.0.0.1:6379/0、rediss://…（TLS）、unix:///run/redis.sock、"
        "redis+sentinel://HOST:26379,HOST:26379/SERVICE 或 "
        "redis+cluster://HOST:6379,HOST:6379；{escaped}"
    ),
    "in a password @ : / ? # % are written as %XX": "密码中的 @ : / ? # % 须写成 %XX",
    "has a % that two hex digits do not follow; {escaped}, so % as %25": (
        "含有 %，其后却不是两位十六进制数字；{escaped}，即 % 写成 %25"
    ),
    "has a secret where no password is: that stands before an @": (
        "密码以外的位置上有密钥：密码应写在 @ 之前"
    ),
    "must end with the service: redis+sentinel://HOST:26379/SERVICE": (
        "末尾须是服务名：redis+sentinel://HOST:26379/SERVICE"
    ),
    "several hosts need redis+sentinel://… or redis+cluster://…": (
        "多个主机请使用 redis+sentinel://… 或 redis+cluster://…"
    ),
    "must end with the number of a database (in a Cluster, 0), or without": (
        "末尾须是数据库编号（Cluster 中为 0），也可省略"
    ),
    "[redis] access_token_key and jsapi_ticket_key are the same; use two keys": (
        "[redis] access_token_key 与 jsapi_ticket_key 相同，请使用两个不同的键"
    ),
    "[redis] url (or REDIS_URL) and host are both given; keep one": (
        "[redis] 同时填写了 url（或 REDIS_URL）与 host，请只保留一个"
    ),
    "[redis] port, db and tls go with host; with url they are part of that": (
        "[redis] port、db、tls 只与 host 一同使用；使用 url 时请写在 url 之内"
    ),
    "[redis] url, after the ?: {problem}": "[redis] url 的 ? 之后：{problem}",
    "{name}: there is no such file": "{name}：文件不存在",
    "redis-py does not take an option that is there, or its value": (
        "redis-py 不接受其中的某个选项或其值"
    ),
    # Where it listens
    "can't listen on {address} port {port}: {reason}. Choose another with --address and --port, "
    "or in [server]": (
        "无法监听 {address} 的端口 {port}：{reason}。"
        "请用 --address、--port 或在 [server] 中改用其他地址或端口"
    ),
    "can't listen on file descriptor {descriptor}, which LISTEN_FDS hands over: {reason}. Give "
    "the unit's [Socket] a ListenStream, and no Accept=yes": (
        "无法监听由 LISTEN_FDS 传入的文件描述符 {descriptor}：{reason}。"
        "请在该单元的 [Socket] 中设置 ListenStream，且不设置 Accept=yes"
    ),
    "it is no stream socket that listens": "它不是处于监听状态的流套接字",
}
"""The Chinese for each sentence of the code, without full stop as that."""
