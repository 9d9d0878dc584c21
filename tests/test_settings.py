from __future__ import annotations

import re
import socket
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import urls
from harness import ROOT, Instance

from wechat_sign.errors import ConfigError, WeChatUnreachable
from wechat_sign.page_url import page_url
from wechat_sign.settings import (
    SECTIONS,
    RedisSettings,
    RedisUrl,
    Settings,
    WeChatSettings,
    load_settings,
)

SECRET = "d41d8cd98f00b204e9800998ecf8427e"
ACCOUNT = "[wechat]\nappid = wx1\nsecret = s3cr3t\n"
EVERY_OPTION = [
    (section, option.name) for section, schema in SECTIONS.items() for option in fields(schema)
]


def load(text: str | bytes, tmp_path: Path, **environ: str) -> Settings:
    path = tmp_path / "config.ini"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings(path, environ)


def problems(text: str | bytes, tmp_path: Path, **environ: str) -> list[str]:
    """Each as it is told; none has a secret in it."""
    with pytest.raises(ConfigError) as caught:
        load(text, tmp_path, **environ)
    assert "s3cr3t" not in str(caught.value).lower()
    assert SECRET not in str(caught.value).lower()
    return list(caught.value.problems)


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "line", "value"),
    [
        ("wechat", "api = http://127.0.0.1:1/base/", "http://127.0.0.1:1/base"),
        ("wechat", "token_api = TOKEN", "token"),
        ("wechat", "timeout = 0.1", 0.1),
        *(("redis", f"host = {host}", host) for host in ("r-1", "::1", "fe80::1%eth0")),
        ("redis", "port = 65535", 65535),
        ("redis", "db = 2", 2),
        *(("redis", f"password = {odd}", odd) for odd in ("50%(x)s", "a ; b#c", "中文=：", '"q"')),
        ("redis", f"password = {SECRET}", SECRET),
        ("redis", "tls = yes", True),
        ("redis", "expire = 1", 1),
        ("redis", "expire = 7200", 7200),
        ("redis", "recheck = 0", 0),
        ("jssdk", "debug = OFF", False),
        ("jssdk", "js_api_list = scan,get\n    choose", ("scan", "get", "choose")),
        ("jssdk", "open_tag_list = wx-open-launch-app", ("wx-open-launch-app",)),
        ("jssdk", "page_hosts = H5.a.cn， *.xn--b.cn、[::1]", ("h5.a.cn", "*.xn--b.cn", "[::1]")),
        ("server", "address = ::1", "::1"),
        ("server", "port = 0", 0),
        ("server", "page = off\ntrusted_proxies = of an earlier version", False),
    ],
)
def test_an_option_is_read(section: str, line: str, value: Any, tmp_path: Path) -> None:
    head = "" if section == "wechat" else f"[{section}]\n"
    read = getattr(load(f"{ACCOUNT}{head}{line}", tmp_path), section)
    assert getattr(read, line.partition(" ")[0]) == value


def test_the_example_works_once_appid_and_secret_are_filled_in(tmp_path: Path) -> None:
    """It has each option's default, but for the host of Redis."""
    example = (ROOT / "config.example.ini").read_text(encoding="utf-8")
    assert problems(example, tmp_path)[0] == "[wechat] appid is required: fill it in"
    filled = example.replace("appid =\n", "appid = wx1\n").replace("secret =\n", "secret = s\n")
    settings = load(filled, tmp_path)
    account = WeChatSettings(appid="wx1", secret="s")
    assert settings == Settings(wechat=account, redis=RedisSettings(host="127.0.0.1"))


def test_the_example_has_every_option_in_order() -> None:
    text = (ROOT / "config.example.ini").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^(\w+) =", text) == [name for _, name in EVERY_OPTION]


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + ACCOUNT.replace("\n", "\r\n").encode(),  # from an editor on Windows
        "[wechat]\nappid = wx1\n\n    secret = s3cr3t",
        "[wechat]\nappid = wx1\n# comment\n    secret = s3cr3t",
    ],
)
def test_a_file_is_read_however_it_was_saved(text: str | bytes, tmp_path: Path) -> None:
    assert load(text, tmp_path) == load(ACCOUNT, tmp_path)


def test_the_keys_contain_the_appid_unless_they_are_named(tmp_path: Path) -> None:
    def keys(redis: str) -> list[str]:
        one = load(ACCOUNT + "[redis]\n" + redis, tmp_path)
        return [one.access_token_key, one.jsapi_ticket_key, one.checked_key, one.lock_key]

    own = [f"wechat:wx1:{name}" for name in ("access_token", "jsapi_ticket", "checked", "lock")]
    assert keys("") == own
    assert keys("access_token_key=a\njsapi_ticket_key=b") == ["a", "b", *own[2:]]
    # In a Cluster they share a slot.
    assert keys("url = redis+cluster://a") == [key.replace("wx1", "{wx1}") for key in own]


def test_the_environment_stands_in_for_what_the_file_leaves_empty(tmp_path: Path) -> None:
    environ = {"WECHAT_SECRET": " from-env\n", "REDIS_PASSWORD": "pw-from-env"}
    settings = load("[wechat]\nappid = wx1\nsecret =\n", tmp_path, **environ)
    assert (settings.wechat.secret, settings.redis.password) == ("from-env", "pw-from-env")
    assert "from-env" not in repr(settings)
    assert load(ACCOUNT, tmp_path, **environ).wechat.secret == "s3cr3t"


# --- what is refused ------------------------------------------------------------------------------

URL = "must be a plain url, like https://api.weixin.qq.com"
HOST = "[redis] host: must be a host alone (an IPv6 address without brackets): the port is an"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[wechat]\nappid = wx/1\nsecret = s", "must be an appid"),
        ("[wechat]\nappid = gh_0123456789ab\nsecret = s", "gh_… is the account's 原始ID"),
        ('[wechat]\nappid = wx1\nsecret = "s3cr3t"', "secret: is in quotes"),
        ("[wechat]\nappid = wx1\nsecret = s\u200b", "secret: has an invisible character"),
        ("[wechat]\nappid = wx1\n secret = s3cr3t", "appid: runs over several lines; is the line"),
        ("[wechat]\nappid = wx1\nsecret = s3cr3t x", "may not contain whitespace (a comment needs"),
        (b"[wechat]\nappid = \xd6\xd0", "is not UTF-8 text"),
        ("appid = wx1", "line 1: a [section] must come before the first option"),
        ("[s3cr3t]\n[s3cr3t]", "line 2: this section is given twice; join the two"),
        (ACCOUNT + "s3cr3t = 1\ns3cr3t = 2", "line 5: this option is given twice; keep one"),
        (ACCOUNT + "nonsense s3cr3t", "line 4: is not option = value"),
        (ACCOUNT + "[redis]\nexpire = 7201", "must be a whole number from 1 to 7200"),
        (ACCOUNT + "[redis]\npassword = a\n on two lines", "password: runs over several lines"),
        (ACCOUNT + "[redis]\naccess_token_key=k\njsapi_ticket_key=k", "are the same"),
        (ACCOUNT + "token_api = stable", "must be one of token, stable_token"),
        (ACCOUNT + "timeout = nan", "must be a number from 0.1 to 60"),
        *((ACCOUNT + f"api = {url}", URL) for url in ("https://u:s3cr3t@a", "https://a:port")),
        *((ACCOUNT + f"api = {url}", URL) for url in ("https://a:0", "https:///a", "https://a?b")),
        (ACCOUNT + "api = https://a#b", URL),
        (ACCOUNT + "[jssdk]\npage_hosts = a.com, *.com", "page_hosts: item 2: must be a host"),
        *((ACCOUNT + f"[redis]\nhost = {one}", HOST) for one in ("s3cr3t:6379", "[::1]", "a:")),
        *((ACCOUNT + f"[redis]\nhost = {one}", HOST) for one in ("redis://:s3cr3t@h", "a,s3cr3t")),
        (ACCOUNT + "[redis]\nhost = h\nurl = redis://:s3cr3t@h", "both given; keep one"),
        (ACCOUNT + "[redis]\nport = 1\nurl = redis://h", "with url they are part of that"),
        (ACCOUNT + "[redis]\ntls = true\nurl = redis://h", "with url they are part of that"),
    ],
)
def test_a_wrong_file_is_told_in_a_sentence(
    text: str | bytes, problem: str, tmp_path: Path
) -> None:
    assert problem in "\n".join(problems(text, tmp_path))


def test_every_problem_is_reported_at_once_with_its_place(tmp_path: Path) -> None:
    text = (
        "[wechat]\nnonsense\nappid =\ntimeout = soon\nport = 1\n[redis]\ntls = maybe\n"
        f"prot = 1\n[jsdk]\n[jssdk]\njs_api_list = get-location\n  s3cr3t!\n{SECRET} = x\n"
        f"[{SECRET}]\n[REDIS]\n[server]\n= 3\nport = 80 ; http\n[DEFAULT]\nport = 1"
    )
    assert problems(text, tmp_path) == [
        "line 2: is not option = value",
        "line 17: is not option = value",
        "[jsdk]: is unknown; did you mean jssdk?",
        "line 14: is unknown; known are wechat, redis, jssdk, server",
        "[REDIS]: is unknown; did you mean redis?",
        "line 19: is unknown; known are wechat, redis, jssdk, server",
        "[wechat] port: belongs in [redis], [server]",
        "[wechat] appid is required: fill it in",
        "[wechat] secret is required: fill it in (or set the environment variable WECHAT_SECRET)",
        "[wechat] timeout: must be a number from 0.1 to 60",
        "[redis] prot: is unknown; did you mean port?",
        "[redis] tls: must be one of true, false",
        "line 13: is unknown; known are debug, js_api_list, open_tag_list, page_hosts",
        "[jssdk] js_api_list: item 1: must be the name of a JS API",
        "[server] port: must be a whole number from 0 to 65535",
    ]


@pytest.mark.parametrize(
    ("section", "name"), [one for one in EVERY_OPTION if one[1] not in ("secret", "password")]
)
def test_a_secret_in_any_other_option_is_refused_and_not_shown(
    section: str, name: str, tmp_path: Path
) -> None:
    head = "[wechat]\n" if name == "appid" else "[wechat]\nappid = wx1\n"
    head += "" if section == "wechat" else f"[{section}]\n"
    for value in (SECRET, SECRET.upper(), f"{SECRET} "):
        text = f"{head}{name} = {value}"
        assert f"[{section}] {name}: " in "\n".join(problems(text, tmp_path, WECHAT_SECRET="s"))


def test_a_file_that_is_none_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Copy config\.example\.ini .* --sandbox"):
        load_settings(tmp_path / "none.ini", {})
    with pytest.raises(ConfigError, match="is a folder: Docker makes one"):
        load_settings(tmp_path, {})


def test_a_variable_that_is_not_utf_8_is_a_sentence(tmp_path: Path) -> None:
    for name in ("WECHAT_SECRET", "REDIS_PASSWORD"):
        environ = {"WECHAT_SECRET": "s", name: "s3cr3t\udcff"}
        [problem] = problems("[wechat]\nappid = wx1\n", tmp_path, **environ)
        assert f"is not UTF-8 text (see the environment variable {name})" in problem


# --- where Redis is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "kind", "nodes", "service", "place"),
    [
        ("redis://u:p%40@h:1/2", "", "redis://u:p%40@h:1/2", "", "redis://h:1/2"),
        ("rediss://[::1]:1?a=b", "", "rediss://[::1]:1?a=b", "", "rediss://[::1]:1"),
        ("unix://:p@/a/b.sock?db=1", "", "unix://:p@/a/b.sock?db=1", "", "unix:///a/b.sock"),
        ("redis+sentinel://:p@a,b:2/m", "sentinel", "redis://:p@a redis://:p@b:2", "m", None),
        ("rediss+sentinel://a/m/3?x=y", "sentinel", "rediss://a/3?x=y", "m", None),
        ("redis+cluster://:p@a:1,b/0", "cluster", "redis://:p@a:1 redis://:p@b", "", None),
    ],
)
def test_a_url_names_any_redis(
    tmp_path: Path, url: str, kind: str, nodes: str, service: str, place: str | None
) -> None:
    place = place or url.replace(":p@", "").partition("?")[0].removesuffix("/0")
    place += "/0" if url.endswith("/0") else ""
    by_file = load(ACCOUNT + f"[redis]\nurl = {url}", tmp_path)
    assert by_file == load(ACCOUNT, tmp_path, REDIS_URL=url)
    assert by_file.redis.url == RedisUrl(kind, tuple(nodes.split()), service, place)
    assert by_file.redis.place == place
    assert "p@" not in repr(by_file)
    assert "p%40" not in repr(by_file)
    with_host = problems(ACCOUNT + "[redis]\nhost = h", tmp_path, REDIS_URL=url)
    assert "both given" in with_host[0]


NO_REDIS = ["127.0.0.1:6379", "http://h", "redis://", "unix://", "redis://a,b", "redis://a/x"]
NO_REDIS += ["redis+sentinel://a,b", "redis+sentinel://a/main/x", "redis+cluster://a/1"]
NO_REDIS += [f"redis://:{one}@h" for one in ("x/s3cr3t", "x@s3cr3t", "x?s3cr3t", "x#s3cr3t")]
NO_REDIS += ["redis://:x%s3cr3t@h", "redis://:s3cr3t%@h", "unix://:x%s3cr3t@/a"]


@pytest.mark.parametrize("url", NO_REDIS)
def test_a_url_that_names_no_redis_is_refused_and_not_shown(tmp_path: Path, url: str) -> None:
    [problem] = problems(ACCOUNT + f"[redis]\nurl = {url}", tmp_path)
    assert problem.startswith("[redis] url: must be like redis://")
    assert problem.endswith("in a password @ : / ? # % [ ] are written as %XX")


@pytest.mark.parametrize(
    ("lines", "port"),
    [
        ("host = redis.test\nport = 7", 7),
        ("url = rediss://redis.test", 6379),
        ("url = redis+cluster://redis.test", 6379),
        ("url = redis+sentinel://redis.test/main", 26379),
        ("url = redis+sentinel://redis.test:7/main", 7),
    ],
)
def test_without_a_port_it_is_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, port: int
) -> None:
    asked = set()

    def not_known(host: str, its_port: int, *_given: object, **_more: object) -> None:
        asked.add((host, its_port))
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    settings = load(f"{ACCOUNT}api = http://wechat.test\n[redis]\n{lines}", tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", not_known)
    with pytest.raises(WeChatUnreachable):
        Instance(settings).look()
    assert asked == {("wechat.test", 80), ("redis.test", port)}


# --- whose pages are signed -----------------------------------------------------------------------

BROWSERS_HOSTS = ["h5.example.com", "localhost", "a_b.r3---x.com", "xn--zca.de", "3a.com"]
BROWSERS_HOSTS += ["127.0.0.1", "[::1]", "[2001:db8::7]"]


@pytest.mark.parametrize("host", BROWSERS_HOSTS)
def test_a_page_host_is_what_location_hostname_shows(host: str, tmp_path: Path) -> None:
    page = f"https://{host}/"
    assert urls.browsers_host(page) == host
    listed = load(ACCOUNT + f"[jssdk]\npage_hosts = {host.upper()}", tmp_path).jssdk.page_hosts
    assert listed == (host,)
    assert page_url(f"url={page}".encode(), listed) == page


NO_HOSTS = ["*", "*.", "*.com", "*.localhost", "*.1.2.3.4", "*.[::1]", "a.*.com", "*.a.1"]
NO_HOSTS += ["a:80", "a..b", ".a", "a.", "https://a/", "a/b", "a@b", "a%62", "a" * 64, "a.1"]
NO_HOSTS += ["127.1", "010.0.0.1", "256.1.1.1", "0x7f.1", "2130706433", "::1", "[::1"]
NO_HOSTS += ["[::1]:80", "[[::1]]", "[::0001]", "[a]", "[1.2.3.4]", "例子.com", "\u212a.com"]


@pytest.mark.parametrize("host", NO_HOSTS)
def test_any_other_page_host_is_refused_with_the_way_to_find_the_right_one(
    host: str, tmp_path: Path
) -> None:
    [problem] = problems(ACCOUNT + f"[jssdk]\npage_hosts = {host}", tmp_path)
    assert "as location.hostname shows it in the browser's console" in problem
