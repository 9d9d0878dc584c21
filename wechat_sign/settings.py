"""The INI file, read into frozen dataclasses.

The classes are the schema. A field of `Settings` is a section, except `limits`; a field of a
section is an option. An option without a default is required.
"""

from __future__ import annotations

import configparser
import difflib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, TypeVar, get_type_hints
from urllib.parse import parse_qs, unquote, urlsplit

from .errors import ConfigError
from .logs import sanitize
from .texts import Text

GRANTED_LIFE: Final = 7200
"""The longest life, in seconds, that WeChat grants a token or a ticket."""

T = TypeVar("T")
RETIRED: Final = ("trusted_proxies",)
"""Options of earlier versions, which change nothing any more."""
DOMAIN: Final = r"(?:[a-z0-9_-]{1,63}\.)*[a-z_-][a-z0-9_-]{0,62}"
"""A name as location.hostname has it. What ends with a number is an IPv4 address there."""


def _form(pattern: str, must: Text, text: str) -> str:
    if not re.fullmatch(pattern, text):
        raise ValueError(must)
    return text


def _number(kind: Callable[[str], float], low: float, high: float, text: str) -> float:
    with suppress(ValueError):
        if low <= (number := kind(text)) <= high:
            return number
    if kind is int:
        raise ValueError(Text("must be a whole number from {low} to {high}", low=low, high=high))
    raise ValueError(Text("must be a number from {low} to {high}", low=low, high=high))


def _choice(choices: Mapping[str, Any], text: str) -> Any:
    """Of true and false also what configparser takes for them: yes, off, 1."""
    chosen = str(configparser.ConfigParser.BOOLEAN_STATES.get(text.lower(), text)).lower()
    if chosen not in choices:
        raise ValueError(Text("must be one of {choices}", choices=", ".join(choices)))
    return choices[chosen]


_text: Final = partial(
    _form, r"\S+", Text("may not contain whitespace (a comment needs a line of its own)")
)
_appid: Final = partial(
    _form,
    r"wx[\w-]*",
    Text("must be an appid: wx and 16 letters and digits (gh_… is the account's 原始ID)"),
)
_host: Final = partial(
    _form,
    r"[\w.-]+|[\w%.-]*(:[\w%.-]*){2,}",
    Text(
        "must be a host alone (an IPv6 address without brackets): the port is an option of its "
        "own, and a url or several hosts belong in url"
    ),
)
_js_api: Final = partial(_form, "[A-Za-z][A-Za-z0-9]*", Text("must be the name of a JS API"))
_open_tag: Final = partial(
    _form, "wx-[a-z-]+", Text("must be the name of an open tag, like wx-open-launch-weapp")
)
_boolean: Final = partial(_choice, {"true": True, "false": False})
_token_api: Final = partial(_choice, {"token": "token", "stable_token": "stable_token"})


def _api(text: str) -> str:
    with suppress(ValueError):
        url = urlsplit(_text(text))
        web = url.scheme in ("http", "https") and url.hostname and url.port != 0
        if web and url.username is None and not url.query and not url.fragment:
            return text.rstrip("/")
    raise ValueError(Text("must be a plain url, like https://api.weixin.qq.com"))


_LOGIN: Final = "(?P<login>(?:[^@/?#%]|%[0-9a-fA-F]{2})*@)?"
_NODE: Final = r"(?:\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::\d{1,5})?"
_NODES: Final = rf"{_LOGIN}(?P<nodes>{_NODE}(?:,{_NODE})*)"
_QUERY: Final = r"(?P<query>\?[^@#]*)?"
_REDIS_URLS: Final = (
    ("", rf"(?P<tls>unix)://{_LOGIN}(?P<nodes>/[^@?#,]+){_QUERY}"),
    ("", rf"(?P<tls>rediss?)://{_LOGIN}(?P<nodes>{_NODE})(?P<db>/\d*)?{_QUERY}"),
    (
        "sentinel",
        rf"(?P<tls>rediss?)\+sentinel://{_NODES}/(?P<service>[^@/?#]+)(?P<db>/\d*)?{_QUERY}",
    ),
    ("cluster", rf"(?P<tls>rediss?)\+cluster://{_NODES}(?:/0?)?{_QUERY}"),
)


@dataclass(frozen=True)
class RedisUrl:
    """Where Redis is: one server where `kind` is "", or a "sentinel" set's `service`, or a
    "cluster". `nodes` has a url for each host, as redis-py reads it; `place` is for people."""

    kind: str
    nodes: tuple[str, ...] = field(repr=False)
    service: str
    place: str


def _redis_url(text: str) -> RedisUrl:
    for kind, form in _REDIS_URLS:
        if match := re.fullmatch(form, _text(text)):
            part = {"db": "", "service": ""} | match.groupdict(default="")
            before, after = f"{part['tls']}://{part['login']}", f"{part['db']}{part['query']}"
            nodes = tuple(f"{before}{node}{after}" for node in part["nodes"].split(","))
            place = text.replace(part["login"], "", 1).partition("?")[0]
            return RedisUrl(kind, nodes, part["service"], place)
    raise ValueError(
        Text(
            "must be like redis://:PASSWORD@127.0.0.1:6379/0, rediss://… (TLS), "
            "unix:///run/redis.sock, redis+sentinel://HOST:26379,HOST:26379/SERVICE or "
            "redis+cluster://HOST:6379,HOST:6379; in a password @ : / ? # % [ ] are written as %XX"
        )
    )


def _page_host(text: str) -> str:
    host = text.lower() if text.isascii() else ""
    if re.fullmatch(rf"(\*\.[a-z0-9_-]{{1,63}}\.)?{DOMAIN}", host):
        return host
    with suppress(ValueError):
        address = ip_address(host.strip("[]"))
        if host == (f"[{address}]" if address.version == 6 else str(address)):
            return host
    raise ValueError(
        Text(
            "must be a host without scheme, port or path, like h5.example.com or *.example.com "
            "(no *.com), as location.hostname shows it in the browser's console on that page; "
            "a name that is not ASCII begins with xn-- there"
        )
    )


def is_loopback(host: str) -> bool:
    """Whether the host is this machine."""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def _list(parse: Callable[[str], T], text: str) -> tuple[T, ...]:
    parsed = []
    for place, item in enumerate(filter(None, re.split(r"[\s,，、]+", text)), 1):
        try:
            parsed.append(parse(item))
        except ValueError as reason:
            raise ValueError(reason.args[0].at(Text("item {place}", place=place))) from None
    return tuple(parsed)


def option(default: Any = MISSING, parse: Callable[[str], Any] = _text, environ: str = "") -> Any:
    """A field of a section. `parse` makes the value from the text, or raises ValueError with a Text
    that says what would be right. It never repeats the text, which may be a secret in the wrong
    line. `environ` is a variable for where the file leaves the option, which is a secret, empty."""
    return field(default=default, repr=not environ, metadata={"parse": parse, "environ": environ})


@dataclass(frozen=True, kw_only=True)
class WeChatSettings:
    """`[wechat]`: the account, and how WeChat is asked; `timeout` is in seconds."""

    appid: str = option(parse=_appid)
    secret: str = option(environ="WECHAT_SECRET")
    api: str = option("https://api.weixin.qq.com", _api)
    token_api: str = option("stable_token", _token_api)
    timeout: float = option(5.0, partial(_number, float, 0.1, 60))


@dataclass(frozen=True, kw_only=True)
class RedisSettings:
    """`[redis]`: where credentials are shared; `expire` and `recheck` are in seconds."""

    host: str = option("", _host)
    port: int = option(6379, partial(_number, int, 1, 65535))
    db: int = option(0, partial(_number, int, 0, 65535))
    username: str = option("")
    password: str = option("", str, environ="REDIS_PASSWORD")
    tls: bool = option(False, _boolean)
    url: RedisUrl | None = option(None, _redis_url, environ="REDIS_URL")
    access_token_key: str = option("")
    jsapi_ticket_key: str = option("")
    expire: int = option(7100, partial(_number, int, 1, GRANTED_LIFE))
    recheck: int = option(600, partial(_number, int, 0, GRANTED_LIFE))

    @property
    def is_set(self) -> bool:
        """Whether there is a Redis."""
        return bool(self.url or self.host)

    @property
    def fresh_for(self) -> int:
        """Seconds for which a ticket that WeChat confirmed is not asked for again."""
        return self.recheck or GRANTED_LIFE

    @property
    def passwords(self) -> list[str]:
        """What is sent to it and never shown."""
        given = urlsplit(self.url.nodes[0]) if self.url else None
        query = parse_qs(given.query) if given else {}
        asked = [self.password, unquote((given and given.password) or "")]
        return asked + query.get("password", []) + query.get("sentinel_password", [])

    @property
    def place(self) -> str:
        """Where it is, to be shown to people; without the password."""
        return self.url.place if self.url else f"{self.host}:{self.port}/{self.db}"


@dataclass(frozen=True, kw_only=True)
class JssdkSettings:
    """`[jssdk]`: what the answer says beside the signature, and whose pages are signed."""

    debug: bool = option(True, _boolean)
    js_api_list: tuple[str, ...] = option(
        (
            *("updateAppMessageShareData", "updateTimelineShareData"),
            *("onMenuShareAppMessage", "onMenuShareTimeline"),  # Android needs these, too
        ),
        partial(_list, _js_api),
    )
    open_tag_list: tuple[str, ...] = option((), partial(_list, _open_tag))
    page_hosts: tuple[str, ...] = option((), partial(_list, _page_host))


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """`[server]`: where it listens (port 0 takes a free one), and whether / is the test page."""

    address: str = option("0.0.0.0")
    port: int = option(8060, partial(_number, int, 0, 65535))
    page: bool = option(True, _boolean)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What no INI sets; seconds, but for `left_behind`. Tests hand in their own."""

    look_interval: float = 10.0
    """The ticket held serves this long without a look at the cache."""
    look_soon: float = 0.5
    """The same while there is none, or it is due and WeChat may be asked."""
    redis_timeout: float = 1.0
    """One exchange with Redis."""
    redis_pause: float = 2.0
    """An unreachable Redis is left alone this long."""
    lease_margin: float = 3.0
    """The lock's lease outlasts a call to WeChat by this."""
    undated_life: float = 60.0
    """A credential without an expiry is used this long after it was last seen in Redis."""
    lock_wait: float = 0.2
    """Between two looks while another instance asks for the first ticket."""
    left_behind: int = 16
    """Looks that did not end: while there are as many, no other begins."""
    idle_timeout: float = 75.0
    """A connection may wait this long for its next request, be about to send it, or leave its
    answer unread: longer than the 60 of nginx, which must close first."""
    unread: float = 1.0
    """A client may leave an answer unread this long before a newcomer gets its connection."""
    drain: float = 5.0
    """Requests in flight have this long when the server is told to stop."""
    grace: float = 1.0
    """A connection has this long, from its start or its last answer on, to send a request before
    a stop takes it for idle."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of the INI file, a section a field, and the limits."""

    wechat: WeChatSettings
    redis: RedisSettings = RedisSettings()
    jssdk: JssdkSettings = JssdkSettings()
    server: ServerSettings = ServerSettings()
    limits: Limits = Limits()
    in_file: tuple[str, ...] = field(default=(), compare=False)
    """The options that are secrets and that the file has, where the environment could."""

    @property
    def access_token_key(self) -> str:
        """The key in Redis of the access_token."""
        return self.redis.access_token_key or self._key("access_token")

    @property
    def jsapi_ticket_key(self) -> str:
        """The key in Redis of the jsapi_ticket."""
        return self.redis.jsapi_ticket_key or self._key("jsapi_ticket")

    @property
    def checked_key(self) -> str:
        """The key in Redis of the marker that WeChat confirmed the ticket lately."""
        return self._key("checked")

    @property
    def lock_key(self) -> str:
        """The key in Redis of the lock under which one instance at a time asks WeChat."""
        return self._key("lock")

    @property
    def owner_keys(self) -> dict[str, str]:
        """For each key that the INI names, the key in Redis of whose credential it holds."""
        named = (self.redis.access_token_key, self.redis.jsapi_ticket_key)
        return {key: f"{key}:appid" for key in named if key}

    def _key(self, name: str) -> str:
        """In a Cluster with a hash tag: then one node has all of them."""
        in_cluster = self.redis.url is not None and self.redis.url.kind == "cluster"
        appid = f"{{{self.wechat.appid}}}" if in_cluster else self.wechat.appid
        return f"wechat:{appid}:{name}"

    @property
    def lease(self) -> float:
        """Seconds after which the lock ends by itself: one call to WeChat, which has `timeout` to
        connect and again to answer, and a margin. What comes later is not written."""
        return 2 * self.wechat.timeout + self.limits.lease_margin


SECTIONS: Final[dict[str, Any]] = get_type_hints(Settings)
del SECTIONS["limits"], SECTIONS["in_file"]


def load_settings(path: Path, environ: Mapping[str, str]) -> Settings:
    """Reads the file; `environ` gives the secrets that the file leaves empty.

    Raises ConfigError with all problems at once, each with its place, or with one alone where
    the file can't be read. No value is ever in it.
    """
    texts, lines, problems = _parse(path)
    problems += _unknown("[{}]", {name: lines[name, ""] for name in texts}, SECTIONS)
    values: dict[str, dict[str, Any]] = {}
    in_file: list[str] = []
    for section, schema in SECTIONS.items():
        given, options = texts.get(section, {}), _options(schema)
        found = {name: lines[section, name] for name in given}
        problems += _unknown(f"[{section}] {{}}", found, options)
        values[section] = {}
        for name, option in options.items():
            variable = option.metadata["environ"]
            in_file += [name] if variable and given.get(name) else []
            value = given.get(name) or environ.get(variable, "").strip()
            try:
                values[section][name] = _value(f"[{section}] {name}", option, value)
            except ValueError as problem:
                problems.append(problem.args[0])
    if not problems:
        sections = {name: SECTIONS[name](**given) for name, given in values.items()}
        settings = Settings(**sections, in_file=tuple(in_file))
        problems = _contradictions(settings)
        if not problems:
            return settings
    raise ConfigError(*problems)


def _contradictions(settings: Settings) -> list[Text]:
    given = settings.redis
    problems = []
    if settings.access_token_key == settings.jsapi_ticket_key:
        same = "[redis] access_token_key and jsapi_ticket_key are the same; use two keys"
        problems.append(Text(same))
    if given.url and given.host:
        problems.append(Text("[redis] url (or REDIS_URL) and host are both given; keep one"))
    if given.url and (given.port, given.db, given.tls) != (6379, 0, False):
        alone = "[redis] port, db and tls go with host; with url they are part of that"
        problems.append(Text(alone))
    return problems


def _parse(
    path: Path,
) -> tuple[dict[str, dict[str, str]], dict[tuple[str, str], int], list[Text]]:
    """Section → option → text; the line of each, a section's under the option ""; and a problem
    for each line that is neither."""
    parser = configparser.ConfigParser(
        interpolation=None, default_section="", empty_lines_in_values=False
    )
    lines: dict[tuple[str, str], int] = {}
    problems = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        parser.read_file(_numbered(text, parser, lines))
    except (OSError, UnicodeError, configparser.Error) as error:
        if type(error) is not configparser.ParsingError:
            raise ConfigError(_why_unreadable(error, path)) from None
        for line, _ in error.errors:
            problems.append(Text("line {line}: is not option = value", line=line))
    return {name: dict(parser[name]) for name in parser.sections()}, lines, problems


def _why_unreadable(error: Any, path: Path) -> Text:
    match error:
        case FileNotFoundError():
            missing = (
                "no such file. Copy config.example.ini to {path} and fill in appid and secret, or "
                "try the server without an account: python server.py --sandbox"
            )
            return Text(missing, path=path)
        case PermissionError():
            return Text(
                "is not readable for this user: chown it to User= of the systemd unit, or to "
                "the user that starts the server"
            )
        case IsADirectoryError():
            return Text("is a folder: Docker makes one where there is no file to mount")
        case OSError():
            return Text("can't be read: {reason}", reason=error.strerror)
        case UnicodeError():
            return Text("is not UTF-8 text; save it as UTF-8")
        case configparser.DuplicateSectionError():
            twice = "line {line}: this section is given twice; join the two"
            return Text(twice, line=error.lineno)
        case configparser.DuplicateOptionError():
            return Text("line {line}: this option is given twice; keep one", line=error.lineno)
    first = "line {line}: a [section] must come before the first option"
    return Text(first, line=error.lineno)


def _numbered(
    text: str, parser: configparser.ConfigParser, lines: dict[tuple[str, str], int]
) -> Iterator[str]:
    """The text's lines; when the parser has read one, `lines` has what it found there."""
    for number, line in enumerate(io.StringIO(text), 1):
        yield line
        for section in parser.sections()[-1:]:
            for option in ("", *parser.options(section)):
                lines.setdefault((section, option), number)


def _options(schema: Any) -> dict[str, Field[Any]]:
    return {option.name: option for option in fields(schema)}


def _value(name: str, option: Field[Any], text: str) -> Any:
    """The option's value. Raises ValueError with a Text that begins with its name."""
    default, variable = option.default, option.metadata["environ"]
    if not text and default is not MISSING:
        return default
    if not text and variable:
        missing = "{name} is required: fill it in (or set the environment variable {variable})"
        raise ValueError(Text(missing, name=name, variable=variable))
    if not text:
        raise ValueError(Text("{name} is required: fill it in", name=name))
    try:
        _check_text(option, text)
        return option.metadata["parse"](text)
    except ValueError as reason:
        raise ValueError(reason.args[0].at(name)) from None


def _check_text(option: Field[Any], text: str) -> None:
    """Raises ValueError for mistakes that any option may have."""
    variable = option.metadata["environ"]
    if re.search("[\ud800-\udfff]", text):
        broken = "is not UTF-8 text (see the environment variable {variable})"
        raise ValueError(Text(broken, variable=variable))
    if any(not one.isprintable() and not one.isspace() for one in text):
        raise ValueError(Text("has an invisible character, as pages and chats add; type it anew"))
    if "\n" in text and not isinstance(option.default, tuple):
        raise ValueError(Text("runs over several lines; is the line below it indented by mistake?"))
    if not variable and re.fullmatch("[0-9a-fA-F]{32}", text):
        raise ValueError(Text("looks like the secret, which is an option of its own"))
    if text[0] == text[-1] and text[0] in "\"'" and option.metadata["parse"] is not str:
        raise ValueError(Text("is in quotes, which would be part of it; leave them out"))


def _unknown(place: str, lines: Mapping[str, int], known: Mapping[str, Any]) -> Iterator[Text]:
    """A problem for each name that is not known. Only one that is known elsewhere or resembles a
    known one is shown: another may be a secret."""
    for name, line in lines.items():
        if name in known or name in ("", *RETIRED):  # without a name, it was told already
            continue
        homes = [f"[{other}]" for other, schema in SECTIONS.items() if name in _options(schema)]
        close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)
        shown = place.format(sanitize(name))
        if homes:
            yield Text("belongs in {sections}", sections=", ".join(homes)).at(shown)
        elif close:
            yield Text("is unknown; did you mean {close}?", close=close[0]).at(shown)
        else:
            unknown = "line {line}: is unknown; known are {known}"
            yield Text(unknown, line=line, known=", ".join(known))
