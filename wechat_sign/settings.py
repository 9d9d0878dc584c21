"""The INI file, read into frozen dataclasses.

The classes are the schema: a section is a class, an option is a field, and a field without a
default must be given. Whatever is wrong is reported at once, each problem with its place.
"""

from __future__ import annotations

import configparser
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from .errors import ConfigError

GRANTED_LIFE: Final = 7200
"""Seconds that WeChat grants a token or a ticket at the most."""


def _text(text: str) -> str:
    if re.search(r"\s", text):
        raise ValueError("may not have blanks in it (a comment needs a line of its own)")
    return text


def _number(low: float, high: float, kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = -1
        if not low <= number <= high:
            whole = "whole " if kind is int else ""
            raise ValueError(f"must be a {whole}number from {low} to {high}")
        return number

    return parse


def _choice(choices: Mapping[str, Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return choices[text.lower()]
        except KeyError:
            raise ValueError(f"must be one of {', '.join(choices)}") from None

    return parse


def _list_of(parse_item: Callable[[str], str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        items = []
        for item in filter(None, re.split(r"[\s,]+", text)):
            try:
                items.append(parse_item(item))
            except ValueError as reason:
                raise ValueError(f"{item}: {reason}") from None
        return tuple(items)

    return parse


def _named(pattern: str, what: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"must be {what}")
        return text

    return parse


def _appid(text: str) -> str:
    if re.fullmatch("[0-9a-f]{32}", text):
        raise ValueError("looks like the secret; an appid begins with wx")
    return _named(r"[\w-]+", "an appid, like wx and 16 letters and digits")(text)


def _api(text: str) -> str:
    try:
        parts = urlsplit(_text(text))
        bad = parts.port == 0 or not parts.hostname or parts.username is not None
    except ValueError:
        bad = True
    if bad or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise ValueError("must be a plain url, like https://api.weixin.qq.com")
    return text.rstrip("/")


def _page_host(text: str) -> str:
    star, host = ("*.", text[2:]) if text.startswith("*.") else ("", text)
    try:
        host = host.encode("idna").decode().lower()
    except UnicodeError:
        host = ""
    if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]", host):
        raise ValueError(
            "must be a host name alone, without scheme, port or path, "
            "like h5.example.com or *.example.com"
        )
    return star + host


_BOOLEANS: Final = configparser.ConfigParser.BOOLEAN_STATES


def option(
    default: Any = MISSING,
    parse: Callable[[str], Any] = _text,
    *,
    secret: bool = False,
    environ: str = "",
) -> Any:
    """A field of a section: how its text is read, whether it is never shown, and the
    environment variable that stands in where the file leaves it empty."""
    metadata = {"parse": parse, "secret": secret, "environ": environ}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class WeChatSettings:
    """`[wechat]`: the account, and how WeChat is asked; `timeout` in seconds for one call."""

    appid: str = option(parse=_appid)
    secret: str = option(secret=True, environ="WECHAT_SECRET")
    api: str = option("https://api.weixin.qq.com", _api)
    token_api: str = option("token", _choice({"token": "token", "stable_token": "stable_token"}))
    timeout: float = option(5.0, _number(0.1, 60, float))


@dataclass(frozen=True)
class RedisSettings:
    """`[redis]`: where credentials are shared; `expire` and `recheck` in seconds."""

    host: str = option("")
    port: int = option(6379, _number(1, 65535, int))
    db: int = option(0, _number(0, 65535, int))
    username: str = option("")
    password: str = option("", str, secret=True, environ="REDIS_PASSWORD")
    tls: bool = option(False, _choice(_BOOLEANS))
    access_token_key: str = option("")
    jsapi_ticket_key: str = option("")
    expire: int = option(7100, _number(1, GRANTED_LIFE, int))
    recheck: int = option(600, _number(0, GRANTED_LIFE, int))

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return f"{self.host}:{self.port}/{self.db}"


@dataclass(frozen=True)
class JssdkSettings:
    """`[jssdk]`: what the answer says beside the signature, and whose pages are signed."""

    debug: bool = option(True, _choice(_BOOLEANS))
    js_api_list: tuple[str, ...] = option(
        ("updateAppMessageShareData", "updateTimelineShareData"),
        _list_of(_named("[A-Za-z][A-Za-z0-9]*", "the name of a JS API")),
    )
    open_tag_list: tuple[str, ...] = option(
        (), _list_of(_named("wx-[a-z-]+", "the name of an open tag, like wx-open-launch-weapp"))
    )
    page_hosts: tuple[str, ...] = option((), _list_of(_page_host))


@dataclass(frozen=True)
class ServerSettings:
    """`[server]`: where it listens (port 0 takes a free one), and whether / is the test page."""

    address: str = option("0.0.0.0")
    port: int = option(8060, _number(0, 65535, int))
    page: bool = option(True, _choice(_BOOLEANS))


@dataclass(frozen=True)
class Settings:
    """All of the INI file."""

    wechat: WeChatSettings
    redis: RedisSettings = RedisSettings()
    jssdk: JssdkSettings = JssdkSettings()
    server: ServerSettings = ServerSettings()

    @property
    def access_token_key(self) -> str:
        return self.redis.access_token_key or f"wechat:{self.wechat.appid}:access_token"

    @property
    def jsapi_ticket_key(self) -> str:
        return self.redis.jsapi_ticket_key or f"wechat:{self.wechat.appid}:jsapi_ticket"

    @property
    def lock_key(self) -> str:
        return f"wechat:{self.wechat.appid}:lock"

    @property
    def checked_key(self) -> str:
        return f"wechat:{self.wechat.appid}:checked"

    @property
    def lease(self) -> float:
        """Seconds that an instance may take for one call to WeChat before others stop waiting
        for it: longer than the call's time-outs, to connect and to answer."""
        return 2 * self.wechat.timeout + 3


_SECTIONS: Final[dict[str, Any]] = {
    "wechat": WeChatSettings,
    "redis": RedisSettings,
    "jssdk": JssdkSettings,
    "server": ServerSettings,
}


def load_settings(path: Path, environ: Mapping[str, str]) -> Settings:
    """Reads the file; `environ` gives the secrets that it leaves empty.

    Raises ConfigError with every problem found. Values of secrets are never in it.
    """
    problems: list[str] = []
    values = _parse(path, problems)
    problems += [
        _unknown(f"{path}: [{section}]", "section", section, _SECTIONS)
        for section in values
        if section not in _SECTIONS
    ]
    sections = {
        name: _section(path, name, schema, values.get(name, {}), environ, problems)
        for name, schema in _SECTIONS.items()
    }
    if not problems:
        settings = Settings(**{name: _SECTIONS[name](**given) for name, given in sections.items()})
        if settings.access_token_key != settings.jsapi_ticket_key:
            return settings
        problems.append(
            f"{path}: [redis] access_token_key and jsapi_ticket_key are the same; "
            "each needs a key of its own"
        )
    raise ConfigError(*problems)


def _parse(path: Path, problems: list[str]) -> dict[str, dict[str, str]]:
    """Section → option → text, with what could be read in spite of the problems noted."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. Copy config.example.ini to {path} and fill in appid and "
            "secret, or try the server without an account: python server.py --sandbox"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from None

    for strict in (True, False):
        parser = configparser.ConfigParser(
            strict=strict, interpolation=None, default_section="", empty_lines_in_values=False
        )
        try:
            parser.read_string(text)
        except configparser.DuplicateSectionError as error:
            problems.append(f"{path}: [{error.section}] stands there twice; join the two")
        except configparser.DuplicateOptionError as error:
            problems.append(
                f"{path}: [{error.section}] {error.option} stands there twice; keep one"
            )
        except configparser.MissingSectionHeaderError as error:
            raise ConfigError(
                f"{path}: line {error.lineno}: a [section] must come before the first option"
            ) from None
        except configparser.ParsingError as error:
            problems += [f"{path}: line {line}: is not option = value" for line, _ in error.errors]
            break
        else:
            break
    return {name: dict(parser[name]) for name in parser.sections()}


def _section(
    path: Path,
    section: str,
    schema: Any,
    texts: Mapping[str, str],
    environ: Mapping[str, str],
    problems: list[str],
) -> dict[str, Any]:
    options: dict[str, Field[Any]] = {option.name: option for option in fields(schema)}
    problems += [
        _unknown(f"{path}: [{section}] {name}", "option", name, options)
        for name in texts
        if name not in options
    ]
    given: dict[str, Any] = {}
    for name, option in options.items():
        variable = option.metadata["environ"]
        text = texts.get(name, "") or environ.get(variable, "")
        if "\n" in text and not isinstance(option.default, tuple):
            # Not shown: what it swallowed may be the line of the secret.
            problems.append(
                f"{path}: [{section}] {name}: runs over several lines; "
                "is the line below it indented by mistake?"
            )
            continue
        if not text:
            if option.default is MISSING:
                elsewhere = f" (or set the environment variable {variable})" if variable else ""
                problems.append(f"{path}: [{section}] {name} is required: fill it in{elsewhere}")
            continue
        try:
            given[name] = option.metadata["parse"](text)
        except ValueError as reason:
            # An appid that is refused may be the secret itself, pasted into the wrong line.
            shown = "" if option.metadata["secret"] or name == "appid" else f" = {text}"
            problems.append(f"{path}: [{section}] {name}{shown}: {reason}")
    return given


def _unknown(place: str, kind: str, name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    return f"{place}: unknown {kind}; {hint}"
