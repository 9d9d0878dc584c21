from __future__ import annotations

import configparser
import socket
from dataclasses import fields
from pathlib import Path

import pytest
import urls
from harness import ROOT, Instance

from wechat_sign.errors import ConfigError, WeChatUnreachable
from wechat_sign.page_url import page_url
from wechat_sign.settings import (
    SECTIONS,
    JssdkSettings,
    RedisSettings,
    RedisUrl,
    ServerSettings,
    Settings,
    WeChatSettings,
    is_loopback,
    load_settings,
)

SECRET = "d41d8cd98f00b204e9800998ecf8427e"
ACCOUNT = "[wechat]\nappid = wx1\nsecret = s3cr3t\n"


def load(text: str | bytes, tmp_path: Path, **environ: str) -> Settings:
    path = tmp_path / "config.ini"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings(path, environ)


def problems(text: str | bytes, tmp_path: Path, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, tmp_path, **environ)
    return list(caught.value.problems)


def test_the_defaults(tmp_path: Path) -> None:
    assert load(ACCOUNT, tmp_path) == Settings(
        wechat=WeChatSettings(
            appid="wx1",
            secret="s3cr3t",
            api="https://api.weixin.qq.com",
            token_api="stable_token",
            timeout=5,
        ),
        redis=RedisSettings(
            host="",
            port=6379,
            db=0,
            username="",
            password="",
            tls=False,
            url=None,
            access_token_key="",
            jsapi_ticket_key="",
            expire=7100,
            recheck=600,
        ),
        jssdk=JssdkSettings(
            debug=True,
            js_api_list=(
                "updateAppMessageShareData",
                "updateTimelineShareData",
                "onMenuShareAppMessage",
                "onMenuShareTimeline",
            ),
            open_tag_list=(),
            page_hosts=(),
        ),
        server=ServerSettings(address="0.0.0.0", port=8060, page=True),
    )


def test_the_keys_contain_the_appid_unless_they_are_named(tmp_path: Path) -> None:
    settings = load(ACCOUNT, tmp_path)
    assert settings.access_token_key == "wechat:wx1:access_token"
    assert settings.jsapi_ticket_key == "wechat:wx1:jsapi_ticket"
    assert settings.checked_key == "wechat:wx1:checked"
    assert settings.lock_key == "wechat:wx1:lock"
    named = load(ACCOUNT + "[redis]\naccess_token_key=a\njsapi_ticket_key=b", tmp_path)
    assert (named.access_token_key, named.jsapi_ticket_key) == ("a", "b")
    assert (named.checked_key, named.lock_key) == (settings.checked_key, settings.lock_key)


def test_the_lease_is_longer_than_one_call_that_times_out_twice(tmp_path: Path) -> None:
    settings = load(ACCOUNT + "timeout = 4", tmp_path)
    assert settings.lease == 11 > 2 * settings.wechat.timeout


def test_every_option_is_read(tmp_path: Path) -> None:
    text = """
    [wechat]
    appid = wx1
    secret = s
    api = http://127.0.0.1:1/base/
    token_api = TOKEN
    timeout = 2.5
    [redis]
    host = r
    port = 1
    db = 2
    username = u
    password = p
    tls = yes
    access_token_key = a
    jsapi_ticket_key = t
    expire = 3
    recheck = 0
    [jssdk]
    debug = off
    js_api_list = scanQRCode,getLocation
        chooseImage
    open_tag_list = wx-open-launch-app
    page_hosts = H5.example.com， *.xn--fsqu00a.com、[::1]
    [server]
    address = ::1
    port = 4
    page = off
    trusted_proxies = an option of an earlier version
    """
    text = "\n".join(line[4:] for line in text.splitlines())
    assert load(text, tmp_path) == Settings(
        wechat=WeChatSettings(
            appid="wx1",
            secret="s",
            api="http://127.0.0.1:1/base",
            token_api="token",
            timeout=2.5,
        ),
        redis=RedisSettings(
            host="r",
            port=1,
            db=2,
            username="u",
            password="p",
            tls=True,
            url=None,
            access_token_key="a",
            jsapi_ticket_key="t",
            expire=3,
            recheck=0,
        ),
        jssdk=JssdkSettings(
            debug=False,
            js_api_list=("scanQRCode", "getLocation", "chooseImage"),
            open_tag_list=("wx-open-launch-app",),
            page_hosts=("h5.example.com", "*.xn--fsqu00a.com", "[::1]"),
        ),
        server=ServerSettings(address="::1", port=4, page=False),
    )


def test_every_problem_is_reported_at_once_with_its_place(tmp_path: Path) -> None:
    text = (
        "[wechat]\nappid =\napi = ftp://a\ntimeout = soon\n[redis]\nport = 70000\ntls = maybe\n"
        "prot = 1\n[jsdk]\n[jssdk]\npage_hosts = https://a/\njs_api_list = get-location\n"
        "[server]\nport = 80 ; http\n[DEFAULT]\nport = 1"
    )
    assert problems(text, tmp_path) == [
        "[jsdk]: is unknown; did you mean jssdk?",
        "line 15: is unknown; known are wechat, redis, jssdk, server",
        "[wechat] appid is required: fill it in",
        "[wechat] secret is required: fill it in (or set the environment variable WECHAT_SECRET)",
        "[wechat] api: must be a plain url, like https://api.weixin.qq.com",
        "[wechat] timeout: must be a number from 0.1 to 60",
        "[redis] prot: is unknown; did you mean port?",
        "[redis] port: must be a whole number from 1 to 65535",
        "[redis] tls: must be one of true, false",
        "[jssdk] js_api_list: item 1: must be the name of a JS API",
        "[jssdk] page_hosts: item 1: must be a host without scheme, port or path, like "
        "h5.example.com or *.example.com (no *.com), as location.hostname shows it in the "
        "browser's console on that page; a name that is not ASCII begins with xn-- there",
        "[server] port: must be a whole number from 0 to 65535",
    ]


def test_lines_that_are_no_options_are_reported_with_all_the_rest(tmp_path: Path) -> None:
    assert problems("[wechat]\nnonsense\nappid = wx1\nmore of it", tmp_path) == [
        "line 2: is not option = value",
        "line 4: is not option = value",
        "[wechat] secret is required: fill it in (or set the environment variable WECHAT_SECRET)",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[wechat]\nappid = wx/1\nsecret = s", "must be an appid"),
        ("[wechat]\nappid = gh_0123456789ab\nsecret = s", "gh_… is the account's 原始ID"),
        ('[wechat]\nappid = wx1\nsecret = "s3cr3t"', "secret: is in quotes"),
        ("[wechat]\nappid = wx1\nsecret = s\u200b", "secret: has an invisible character"),
        (ACCOUNT + "api = \ufeffhttps://a", "api: has an invisible character"),
        (ACCOUNT + "[jssdk]\npage_hosts = 'a.com'", "page_hosts: is in quotes"),
        ("appid = wx1", "line 1: a [section] must come before the first option"),
        (ACCOUNT + "nonsense", "line 4: is not option = value"),
        (ACCOUNT + "appid = wx2", "line 4: this option is given twice; keep one"),
        (ACCOUNT + "[wechat]", "line 4: this section is given twice; join the two"),
        (ACCOUNT + "[redis]\nexpire = 7201", "must be a whole number from 1 to 7200"),
        (ACCOUNT + "[redis]\nexpire = 0", "must be a whole number from 1 to 7200"),
        (ACCOUNT + "[redis]\nusername = r ; mine", "may not contain whitespace (a comment needs"),
        (ACCOUNT + "[server]\naddress = a\n port = 1", "address: runs over several lines; is the"),
        (ACCOUNT + "token_api = stable", "must be one of token, stable_token"),
        (ACCOUNT + "api = https://user@a", "must be a plain url"),
        (ACCOUNT + "api = https://a:port", "must be a plain url"),
        (ACCOUNT + "api = https://a:0", "must be a plain url"),
        (ACCOUNT + "api = https:///a", "must be a plain url"),
        (ACCOUNT + "api = https://a?b", "must be a plain url"),
        (ACCOUNT + "api = https://a#b", "must be a plain url"),
        (ACCOUNT + "timeout = nan", "must be a number from 0.1 to 60"),
        (ACCOUNT + "[redis]\naccess_token_key=k\njsapi_ticket_key=k", "are the same"),
        ("[wechat]\nappid=0123456789abcdef0123456789abcdef\nsecret=s", "looks like the secret"),
        (b"[wechat]\nappid = \xd6\xd0", "is not UTF-8 text"),
    ],
)
def test_a_wrong_file_is_told_in_a_sentence(
    text: str | bytes, problem: str, tmp_path: Path
) -> None:
    assert problem in "\n".join(problems(text, tmp_path))


EVERY_OPTION = [
    (section, option.name) for section, schema in SECTIONS.items() for option in fields(schema)
]


@pytest.mark.parametrize(
    ("section", "name"), [one for one in EVERY_OPTION if one[1] not in ("secret", "password")]
)
def test_a_secret_in_any_other_option_is_refused_and_not_shown(
    section: str, name: str, tmp_path: Path
) -> None:
    text = (
        f"[wechat]\n{name} = {{}}\nappid = wx1"
        if section == "wechat"
        else (f"[wechat]\nappid = wx1\n[{section}]\n{name} = {{}}")
    )
    text = text.replace("appid = wx1", "") if name == "appid" else text
    for value in (SECRET, SECRET.upper(), f"{SECRET} "):
        [problem] = problems(text.format(value), tmp_path, WECHAT_SECRET="s")
        assert problem.startswith(f"[{section}] {name}: ")
        assert SECRET not in problem.lower()


def test_an_option_in_another_section_is_told_where_it_belongs(tmp_path: Path) -> None:
    text = "[wechat]\nsecret = s\nport = 1\n[jssdk]\nappid = wx1"
    assert problems(text, tmp_path) == [
        "[wechat] port: belongs in [redis], [server]",
        "[wechat] appid is required: fill it in",
        "[jssdk] appid: belongs in [wechat]",
    ]


def test_a_name_that_resembles_none_is_told_by_its_line(tmp_path: Path) -> None:
    text = f"[wechat]\nappid = wx1\n\n{SECRET} = x\nSecrets = y\n[jssdk]\npage_hosts = a,\n"
    text += f"  [::1]\npw: 1\n[{SECRET}]\n[REDIS]\n= 3\n[server]\n= 4"
    known = "known are debug, js_api_list, open_tag_list, page_hosts"
    account = "known are appid, secret, api, token_api, timeout"
    assert problems(text, tmp_path, WECHAT_SECRET="s") == [
        "line 12: is not option = value",
        "line 14: is not option = value",
        "line 10: is unknown; known are wechat, redis, jssdk, server",
        "[REDIS]: is unknown; did you mean redis?",
        f"line 4: is unknown; {account}",
        "[wechat] secrets: is unknown; did you mean secret?",
        f"line 9: is unknown; {known}",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "secret = s3cr3t",
        "[s3cr3t]\n[s3cr3t]",
        "[wechat]\ns3cr3t = 1\ns3cr3t = 2",
        "[s3cr3t]\na = s3cr3t\na = s3cr3t",
        "[wechat]\napi = https://u:s3cr3t@host",
        "[wechat]\ntoken_api = s3cr3t",
        "[redis]\nhost = redis://:s3cr3t@host",
        "[redis]\nport = s3cr3t",
        "[redis]\nhost = s3cr3t:6379",
        "[jssdk]\npage_hosts = a\n  secret=s3cr3t",
        "[wechat]\nsecret = s3cr3t\nsecret = s3cr3t",
        "[wechat]\nappid = wx1\n secret = s3cr3t",  # indented: swallowed by appid
        "[wechat]\nappid = wx1\nsecret = s3cr3t x",
        "[wechat]\nappid = s3cr3ts3cr3t!",
        "[wechat]\nappid = wx1\nsecret s3cr3t",
        "[wechat]\nappid = wx1\nappsecret = s3cr3t",
        "[wechat]\nappid = wx1\nsecret = s\n[redis]\npassword = s3cr3t\n on two lines",
    ],
)
def test_no_problem_shows_a_secret(text: str, tmp_path: Path) -> None:
    assert "s3cr3t" not in "\n".join(problems(text, tmp_path))


def test_the_settings_show_no_secret_either(tmp_path: Path) -> None:
    assert "s3cr3t" not in repr(load(ACCOUNT + "[redis]\npassword = s3cr3t", tmp_path))


@pytest.mark.parametrize(
    "password", ["50%", "%(x)s", "a#b;c", "a ; b # c", "中文=：", '"quoted"', "'q'", "it's", SECRET]
)
def test_a_password_is_taken_as_it_stands(password: str, tmp_path: Path) -> None:
    settings = load(ACCOUNT + f"[redis]\npassword = {password}\n", tmp_path)
    assert settings.redis.password == password


def test_a_file_from_a_windows_editor_is_read(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + ACCOUNT.replace("\n", "\r\n").encode()
    assert load(text, tmp_path).wechat.secret == "s3cr3t"


def test_numbers_may_be_as_low_and_as_high_as_the_problem_says(tmp_path: Path) -> None:
    lowest = load(ACCOUNT + "timeout = 0.1\n[redis]\nport = 1\nexpire = 1", tmp_path)
    assert (lowest.wechat.timeout, lowest.redis.port, lowest.redis.expire) == (0.1, 1, 1)
    highest = load(ACCOUNT + "timeout = 60\n[redis]\nport = 65535\nexpire = 7200", tmp_path)
    assert (highest.wechat.timeout, highest.redis.port, highest.redis.expire) == (60, 65535, 7200)


@pytest.mark.parametrize("between", ["\n\n    ", "\n# comment\n    "])
def test_an_indented_option_is_read_where_it_can_not_continue_another(
    between: str, tmp_path: Path
) -> None:
    text = f"[wechat]\nappid = wx1{between}secret = s3cr3t"
    assert load(text, tmp_path) == load(ACCOUNT, tmp_path)


def test_the_environment_stands_in_for_what_the_file_leaves_empty(tmp_path: Path) -> None:
    environ = {"WECHAT_SECRET": "from-env", "REDIS_PASSWORD": "pw-from-env"}
    settings = load("[wechat]\nappid = wx1\nsecret =\n", tmp_path, **environ)
    assert (settings.wechat.secret, settings.redis.password) == ("from-env", "pw-from-env")
    assert load(ACCOUNT, tmp_path, **environ).wechat.secret == "s3cr3t"


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Copy config\.example\.ini .* --sandbox"):
        load_settings(tmp_path / "none.ini", {})
    with pytest.raises(ConfigError, match="is a folder: Docker makes one"):
        load_settings(tmp_path, {})


def test_the_example_works_once_appid_and_secret_are_filled_in(tmp_path: Path) -> None:
    example = (ROOT / "config.example.ini").read_text(encoding="utf-8")
    assert problems(example, tmp_path)[0] == "[wechat] appid is required: fill it in"
    filled = example.replace("appid =\n", "appid = wx1\n").replace("secret =\n", "secret = s\n")
    settings = load(filled, tmp_path)
    assert settings.wechat == WeChatSettings(appid="wx1", secret="s")
    assert settings.redis == RedisSettings(host="127.0.0.1")
    assert settings.server == ServerSettings()
    assert settings.jssdk == JssdkSettings()


def example_options() -> list[tuple[str, str, bool]]:
    """Section, option and whether a comment is above it, or above others that it follows without
    an empty line."""
    options, section, commented = [], "", False
    for line in (ROOT / "config.example.ini").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section, commented = line.strip("[]"), False
        elif not line or line.startswith("#"):
            commented = bool(line)
        elif not line.startswith(" "):
            options.append((section, line.partition("=")[0].strip(), commented))
    return options


def test_the_example_has_every_option_once_and_in_order() -> None:
    assert [(section, name) for section, name, _ in example_options()] == EVERY_OPTION


def test_the_example_explains_every_option_in_a_comment() -> None:
    assert [
        (section, name) for section, name, commented in example_options() if not commented
    ] == []


def test_the_example_spells_booleans_one_way() -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string((ROOT / "config.example.ini").read_text(encoding="utf-8"))
    spellings = {
        parser[section][option.name]
        for section, schema in SECTIONS.items()
        for option in fields(schema)
        if isinstance(option.default, bool)
    }
    assert spellings == {"true", "false"}


@pytest.mark.parametrize(
    ("url", "kind", "nodes", "service", "place"),
    [
        ("redis://h", "", ["redis://h"], "", "redis://h"),
        ("redis://u:p%40@h:1/2", "", ["redis://u:p%40@h:1/2"], "", "redis://h:1/2"),
        ("rediss://[::1]:1?a=b", "", ["rediss://[::1]:1?a=b"], "", "rediss://[::1]:1"),
        ("unix://:p@/a/b.sock?db=1", "", ["unix://:p@/a/b.sock?db=1"], "", "unix:///a/b.sock"),
        (
            "redis+sentinel://:p@a,b:2/main",
            "sentinel",
            ["redis://:p@a", "redis://:p@b:2"],
            "main",
            "redis+sentinel://a,b:2/main",
        ),
        (
            "rediss+sentinel://a/main/3?x=y",
            "sentinel",
            ["rediss://a/3?x=y"],
            "main",
            "rediss+sentinel://a/main/3",
        ),
        (
            "redis+cluster://:p@a:1,b:2/0",
            "cluster",
            ["redis://:p@a:1", "redis://:p@b:2"],
            "",
            "redis+cluster://a:1,b:2/0",
        ),
    ],
)
@pytest.mark.parametrize("by", ["file", "environment"])
def test_a_url_names_any_redis(
    tmp_path: Path, by: str, url: str, kind: str, nodes: list[str], service: str, place: str
) -> None:
    if by == "file":
        settings = load(ACCOUNT + f"[redis]\nurl = {url}", tmp_path)
    else:
        settings = load(ACCOUNT, tmp_path, REDIS_URL=url)
    assert settings.redis.url == RedisUrl(kind, tuple(nodes), service, place)
    assert settings.redis.is_set
    assert settings.redis.place == place
    assert "p@" not in repr(settings)
    assert "p%40" not in repr(settings)


@pytest.mark.parametrize(
    ("lines", "port"),
    [
        ("host = redis.test", 6379),
        ("host = redis.test\nport = 7", 7),
        ("url = redis://redis.test", 6379),
        ("url = rediss://redis.test", 6379),
        ("url = redis+cluster://redis.test", 6379),
        ("url = redis+cluster://redis.test:7", 7),
        ("url = redis+sentinel://redis.test/main", 26379),
        ("url = rediss+sentinel://redis.test/main/1", 26379),
        ("url = redis+sentinel://redis.test:7/main", 7),
    ],
)
def test_without_a_port_it_is_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, port: int
) -> None:
    asked = []

    def not_known(host: str, its_port: int, *_given: object, **_more: object) -> None:
        asked.append((host, its_port))
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    settings = load(f"{ACCOUNT}api = http://wechat.test\n[redis]\n{lines}", tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", not_known)
    with pytest.raises(WeChatUnreachable):
        Instance(settings).look()
    assert ("wechat.test", 80) in asked
    assert {where for where in asked if where[0] != "wechat.test"} == {("redis.test", port)}


def test_in_a_cluster_the_keys_of_an_account_share_a_slot(tmp_path: Path) -> None:
    settings = load(ACCOUNT + "[redis]\nurl = redis+cluster://a", tmp_path)
    assert settings.jsapi_ticket_key == "wechat:{wx1}:jsapi_ticket"
    assert settings.lock_key == "wechat:{wx1}:lock"


NO_REDIS = ["127.0.0.1:6379", "http://h", "redis://", "unix://", "redis://a,b", "redis://a/x"]
NO_REDIS += ["redis+sentinel://a,b", "redis+sentinel://a/main/x", "redis+cluster://a/1"]
NO_REDIS += [f"redis://:{password}@h" for password in ("s3/cr3t", "s3@cr3t", "s3?cr3t", "s3#cr3t")]
NO_REDIS += ["redis://:s3%cr3t@h", "redis://:s3cr3t%@h", "unix://:s3%cr3t@/a"]


@pytest.mark.parametrize("url", NO_REDIS)
def test_a_url_that_names_no_redis_is_refused_and_not_shown(tmp_path: Path, url: str) -> None:
    [problem] = problems(ACCOUNT + f"[redis]\nurl = {url}", tmp_path)
    assert problem.startswith("[redis] url: must be like redis://")
    assert problem.endswith("in a password @ : / ? # % [ ] are written as %XX")
    assert "cr3t" not in problem


@pytest.mark.parametrize("host", ["127.0.0.1:17001", "redis:6379", "[::1]", "[::1]:6379", "a:"])
def test_a_port_in_the_host_of_redis_is_refused(tmp_path: Path, host: str) -> None:
    assert problems(ACCOUNT + f"[redis]\nhost = {host}", tmp_path) == [
        "[redis] host: must be a host alone (an IPv6 address without brackets): the port is an "
        "option of its own, and a url or several hosts belong in url"
    ]


@pytest.mark.parametrize("host", ["::1", "2001:db8::7", "fe80::1%eth0", "::ffff:10.0.0.1", "r-1"])
def test_the_host_of_redis_may_be_an_ipv6_address(tmp_path: Path, host: str) -> None:
    assert load(ACCOUNT + f"[redis]\nhost = {host}", tmp_path).redis.host == host


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("host = h\nurl = redis://h", "both given; keep one"),
        ("port = 1\nurl = redis://h", "with url they are part of that"),
        ("tls = true\nurl = redis://h", "with url they are part of that"),
        ("host = redis://:s3cr3t@h", "a url or several hosts"),
        ("host = :s3cr3t@h", "a url or several hosts"),
        ("host = h,s3cr3t", "a url or several hosts"),
    ],
)
def test_a_url_and_a_host_do_not_mix(tmp_path: Path, lines: str, words: str) -> None:
    [problem] = problems(ACCOUNT + f"[redis]\n{lines}", tmp_path)
    assert words in problem
    assert "s3cr3t" not in problem
    environment = problems(ACCOUNT + "[redis]\nhost = h", tmp_path, REDIS_URL="redis://h")
    assert "both given" in environment[0]


def test_a_variable_that_is_not_utf_8_is_a_sentence(tmp_path: Path) -> None:
    for name in ("WECHAT_SECRET", "REDIS_PASSWORD"):
        environ = {"WECHAT_SECRET": "s", name: "SECRET\udcff"}
        [problem] = problems("[wechat]\nappid = wx1\n", tmp_path, **environ)
        assert f"is not UTF-8 text (see the environment variable {name})" in problem
        assert "SECRET\udcff" not in problem


BROWSERS_HOSTS = ["h5.example.com", "localhost", "a_b.r3---x.com", "xn--zca.de", "3a.com"]
BROWSERS_HOSTS += ["127.0.0.1", "[::1]", "[2001:db8::7]"]


@pytest.mark.parametrize("host", BROWSERS_HOSTS)
def test_a_page_host_is_what_location_hostname_shows(host: str, tmp_path: Path) -> None:
    assert urls.browsers_host(f"https://{host}/") == host
    settings = load(ACCOUNT + f"[jssdk]\npage_hosts = {host.upper()}", tmp_path)
    assert settings.jssdk.page_hosts == (host,)
    page = f"https://{host}/"
    assert page_url(f"url={page}".encode(), settings.jssdk.page_hosts) == page


NO_HOSTS = ["*", "*.", "*.com", "*.localhost", "*.1.2.3.4", "*.[::1]", "a.*.com", "*.a.1"]
NO_HOSTS += ["a:80", "a..b", ".a", "a.", "https://a/", "a/b", "a@b", "a%62", "a" * 64, "a.1"]
NO_HOSTS += ["1.2.3.4.5", "127.1", "010.0.0.1", "256.1.1.1", "0x7f.1", "2130706433", "::1", "[::1"]
NO_HOSTS += ["[::1]:80", "[[::1]]", "[::0001]", "[a]", "[1.2.3.4]", "例子.com", "\u212a.com"]


@pytest.mark.parametrize("host", NO_HOSTS)
def test_any_other_page_host_is_refused_with_the_way_to_find_the_right_one(
    host: str, tmp_path: Path
) -> None:
    [problem] = problems(ACCOUNT + f"[jssdk]\npage_hosts = {host}", tmp_path)
    assert "as location.hostname shows it in the browser's console" in problem


@pytest.mark.parametrize(
    ("host", "is_here"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)]
    + [("10.0.0.1", False), ("a unix socket", False), ("localhost.example.com", False)],
)
def test_what_is_this_machine(host: str, is_here: bool) -> None:
    assert is_loopback(host) is is_here
