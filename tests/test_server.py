"""What the routes answer, what the log says of it, and the command line."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
import tornado.testing
from conftest import Main
from harness import (
    PAGE,
    PATIENCE,
    ROOT,
    TICKET_KEY,
    Fault,
    RedisServer,
    Sandbox,
    Server,
    Start,
    assert_no_credential,
    assert_signs,
    fetch,
    settings_for,
    signature_of,
    tickets_for,
    tickets_of,
)
from tornado.httpclient import HTTPResponse

import server
from wechat_sign.settings import JssdkSettings, ServerSettings
from wechat_sign.signature import WxConfig

SIGN = f"/getApi?url={PAGE}"
ORIGIN = "https://h5.example.com"
ALLOWED = "GET, HEAD, OPTIONS"


class ServerCase(tornado.testing.AsyncHTTPTestCase):
    """The whole application over HTTP, in front of the sandbox."""

    page_hosts: tuple[str, ...] = ()
    page = True

    @pytest.fixture(autouse=True)
    def _use(
        self,
        wechat: Sandbox,
        redis_server: RedisServer,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.wechat, self.redis_server = wechat, redis_server
        self.caplog, self.monkeypatch = caplog, monkeypatch

    def get_app(self) -> server.SigningApplication:
        jssdk = JssdkSettings(page_hosts=self.page_hosts, open_tag_list=("wx-open-launch-weapp",))
        settings = settings_for(self.wechat, self.redis_server)
        settings = replace(settings, jssdk=jssdk, server=ServerSettings(page=self.page))
        self.application = server.SigningApplication(settings, tickets_of(settings))
        return self.application

    def call(self, path: str, method: str = "GET", **headers: str) -> HTTPResponse:
        body = "" if method in ("POST", "PUT", "PATCH") else None
        response = self.fetch(
            path, method=method, headers=headers, body=body, decompress_response=False
        )
        assert_no_credential(response.body.decode("latin-1"), self.wechat.issued)
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "Server" not in response.headers
        return response

    def refusal(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        response = self.call(path, method, **headers)
        assert response.headers["Content-Type"] == "application/json; charset=UTF-8"
        assert response.headers["Cache-Control"] == "no-store"
        return response.code, json.loads(response.body)["error"]


class TestGetApi(ServerCase):
    def test_the_answer_goes_straight_into_wx_config(self) -> None:
        response, again = self.call(SIGN), self.call(SIGN)
        assert response.headers["Content-Type"] == "application/json; charset=UTF-8"
        assert response.headers["Cache-Control"] == "no-store"
        assert not {"Etag", "Vary", "Access-Control-Allow-Origin"} & set(response.headers)
        answer = json.loads(response.body)
        assert abs(answer["timestamp"] - time.time()) < PATIENCE
        assert re.fullmatch("[A-Za-z0-9]{16}", answer["nonceStr"])
        assert answer == {
            "debug": True,
            "appId": self.wechat.appid,
            "timestamp": int(answer["timestamp"]),
            "nonceStr": answer["nonceStr"],
            "signature": signature_of(answer, self.wechat.ticket, PAGE),
            "jsApiList": list(JssdkSettings().js_api_list),
            "openTagList": ["wx-open-launch-weapp"],
        }
        assert json.loads(again.body)["nonceStr"] != answer["nonceStr"]

    def test_the_url_that_was_signed_is_told_beside_the_json(self) -> None:
        long = f"{ORIGIN}/{'x' * 5000}"
        for page, told in ((PAGE, PAGE), (long, long[:2048])):
            headers = self.call("/getApi?url=" + quote(page, safe="")).headers
            assert headers["Signed-Url"] == told

    def test_another_accounts_appid_is_refused_but_not_in_the_pages_own_query(self) -> None:
        escaped, raw = quote(PAGE, safe=""), f"{PAGE}&appid=wx2"
        for query in (f"appid=wx2&url={PAGE}", f"url={escaped}&appid=wx2"):
            assert self.refusal(f"/getApi?{query}")[0] == 400
            query = query.replace("wx2", self.wechat.appid)
            assert self.call(f"/getApi?{query}").headers["Signed-Url"] == PAGE
        for query in (f"url={raw}", f"appid=&url={quote(raw, safe='')}"):
            assert self.call(f"/getApi?{query}").headers["Signed-Url"] == raw

    def test_what_is_refused_is_told_in_a_sentence_and_no_traceback(self) -> None:
        form = {"Content-Type": "multipart/form-data"}
        usage = "send GET /getApi?url=, with the page's url in the query and no body"
        no_body = "send no body, and no Content-Type: it is not read here"
        nothing = "there is nothing here; try /getApi?url="
        missing = "the parameter url is missing; send it as "
        missing += "encodeURIComponent(location.href.split('#')[0])"
        for method, path, headers, refusal in (
            ("GET", "/getApi", {}, (400, missing)),
            ("POST", SIGN, {}, (405, usage)),
            ("POST", "/healthz", {}, (405, "send a GET, without a body")),
            ("GET", SIGN, form, (400, no_body)),
            ("POST", SIGN, form, (400, no_body)),
            ("GET", "/x", {}, (404, nothing)),
            ("POST", "/getApi/", {}, (404, nothing)),
            ("GET", "/wechat-signXjs", {}, (404, nothing)),
        ):
            assert self.refusal(path, method, **headers) == refusal
        assert "Traceback" not in self.caplog.text
        for path, status in (("/getApi", 400), ("/x", 404)):
            head = self.call(path, "HEAD")
            assert (head.code, head.body) == (status, b"")

    def test_what_a_path_allows_is_what_it_says(self) -> None:
        for path in (SIGN, "/healthz", "/", "/wechat-sign.js"):
            got, head = self.call(path), self.call(path, "HEAD")
            assert (head.code, head.body, got.code) == (200, b"", 200)
            for name in ("Content-Type", "Content-Length", "Cache-Control"):
                assert head.headers[name] == got.headers[name]
            for method, status in (("OPTIONS", 204), ("POST", 405), ("DELETE", 405)):
                response = self.call(path, method, Origin=ORIGIN)
                assert (response.code, response.headers["Allow"]) == (status, ALLOWED)
                public = path == "/wechat-sign.js"
                assert ("Access-Control-Allow-Origin" in response.headers) is public

    def test_a_handler_that_raises_is_a_500_and_one_traceback(self) -> None:
        def sign(*_: Any) -> str:
            raise ZeroDivisionError("out of numbers")

        self.monkeypatch.setattr(WxConfig, "sign", sign)
        refusal = self.refusal(f"{SIGN}&code=UNSEEN", Referer=PAGE)
        assert refusal == (500, "Internal Server Error")
        log = self.caplog.text
        assert log.count("Traceback") == log.count("ZeroDivisionError: out of numbers") == 1
        assert log.count("500 GET /getApi for h5.example.com/a") == 1
        assert "UNSEEN" not in log


class TestPageHosts(ServerCase):
    page_hosts = ("h5.example.com", "*.example.net")
    page = False

    def assert_readable(self, response: HTTPResponse, origin: str = ORIGIN) -> None:
        """By a page of that origin, with credentials or without."""
        assert response.headers["Access-Control-Allow-Origin"] == origin
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
        assert response.headers["Vary"] == "Origin"

    def test_an_origin_on_the_list_may_read_answers_and_whatever_is_refused(self) -> None:
        for path, method, fault, status in (
            (SIGN, "GET", Fault(errcode=40164), 502),
            (SIGN, "GET", Fault(), 200),
            ("/getApi", "GET", Fault(), 400),
            ("/getApi?url=https://evil.com/", "GET", Fault(), 403),
            ("/getapi", "GET", Fault(), 404),
            ("/getApi", "POST", Fault(), 405),
            ("/", "GET", Fault(), 404),  # the page is switched off
        ):
            self.wechat.faults["token"] = fault
            self.application.tickets = tickets_for(self.wechat)
            for origin in (ORIGIN, "http://x.example.net:8080"):
                response = self.call(path, method, Origin=origin)
                assert response.code == status
                self.assert_readable(response, origin)

    def test_other_origins_may_not(self) -> None:
        for origin in (
            *("https://evil.com", "null", f"{ORIGIN}.evil.com", "h5.example.com", f"{ORIGIN}/"),
            *("https://evil.com@h5.example.com", "https://a\\@h5.example.com"),
        ):
            for method, path in (("GET", SIGN), ("GET", "/x"), ("OPTIONS", "/x")):
                headers = self.call(path, method, Origin=origin).headers
                assert not [name for name in headers if name.startswith("Access-Control")]
                assert headers["Vary"] == "Origin"

    def test_the_preflight_is_answered_on_a_mistyped_path_too(self) -> None:
        for path in ("/getApi", "/getapi"):
            wanted = {"Origin": ORIGIN, "Access-Control-Request-Headers": "x-token, x-b"}
            response = self.call(path, "OPTIONS", **wanted)
            assert response.code == 204
            self.assert_readable(response)
            assert response.headers["Access-Control-Allow-Methods"] == "GET, HEAD"
            assert response.headers["Access-Control-Allow-Headers"] == "x-token, x-b"
        assert self.call("/getapi", "OPTIONS").code == 404

    def test_the_script_and_its_types_are_the_same_for_each_origin(self) -> None:
        for path, kind, body in (
            ("/wechat-sign.js", "text/javascript", server.SCRIPT.text),
            ("/wechat-sign.d.ts", "text/plain", server.TYPES.text),
        ):
            for origin in (ORIGIN, "https://evil.com", ""):
                response = self.call(path, Origin=origin)
                assert response.headers["Content-Type"] == f"{kind}; charset=UTF-8"
                assert response.headers["Access-Control-Allow-Origin"] == "*"
                assert "Access-Control-Allow-Credentials" not in response.headers
                assert response.headers["Vary"] == "Accept-Encoding"
                assert response.body == body


class TestWhateverGoesWrong(ServerCase):
    """Neither an answer nor the log, in which the fixture `wechat` looks, has a credential."""

    @pytest.fixture(autouse=True)
    def _full(self, _use: None, own_redis: RedisServer) -> None:
        self.redis_server = own_redis
        own_redis.run("CONFIG", "SET", "maxmemory", "1")

    def test_pages_are_told_which_kind_of_trouble_it_is_and_when_to_come_again(self) -> None:
        for fault, status, keys, least in (
            (Fault(), 200, [], 0),
            (Fault(errcode=40164), 502, ["error", "errcode"], 50),
            (Fault(errcode=40001), 502, ["error", "errcode"], 1),
            (Fault(hang_up=True), 503, ["error"], 1),
            (Fault(delay=0.5), 503, ["error"], 1),
            (Fault(status=502, body=b"x"), 503, ["error"], 1),
        ):
            for endpoint in ("token", "getticket"):
                self.wechat.faults = {endpoint: fault}
                self.application.tickets = tickets_for(self.wechat, self.redis_server, timeout=0.3)
                response = self.call(SIGN)
                assert response.code == status, fault
                if status != 200:
                    assert list(json.loads(response.body)) == keys
                    assert "203.0.113.7" not in str(response.body)
                    assert least <= int(response.headers["Retry-After"]) <= 60
        assert self.caplog.text.count("no page can be signed") == 10


class TestHealthz(ServerCase):
    def health(self) -> tuple[int, dict[str, Any]]:
        response = self.call("/healthz")
        assert response.headers["Cache-Control"] == "no-store"
        return response.code, json.loads(response.body)

    def test_without_a_ticket_it_fails_and_asks_no_other(self) -> None:
        failing = {"status": "failing", "cache": "redis", "error": "no ticket yet"}
        assert self.health() == (503, failing)
        assert not self.wechat.calls

    def test_with_one_it_is_well(self) -> None:
        self.call(SIGN)
        with self.redis_server.watching() as sent:
            status, health = self.health()
            assert sent() == []
        assert status == 200
        assert list(health) == ["status", "ticket_age", "ticket_usable_for", "cache"]
        assert (health["status"], health["cache"]) == ("ok", "redis")
        assert 0 <= health["ticket_age"] < PATIENCE
        assert 7100 < health["ticket_usable_for"] <= 7200
        assert self.wechat.calls == {"token": 1, "getticket": 1}

    def test_it_tells_the_reason_and_the_advice(self) -> None:
        self.wechat.faults["token"] = Fault(errcode=40164)
        self.call(SIGN)
        status, health = self.health()
        assert (status, health["errcode"]) == (503, 40164)
        assert health["error"] == "WeChat refused token with errcode 40164"
        assert "add this server's public address to the account's IP whitelist" in health["advice"]
        assert "请把本服务器的公网 IP" in health["advice_zh"]
        # What WeChat said, and this host's address, are not for the public.
        assert "203.0.113.7" not in str(health)
        assert "whitelist rid" not in str(health)


class TestPage(ServerCase):
    def test_the_page_is_never_framed_and_lets_only_wechats_scripts_in(self) -> None:
        response = self.call("/")
        headers = response.headers
        assert headers["Content-Type"] == "text/html; charset=UTF-8"
        assert headers["Referrer-Policy"] == "same-origin"
        policy = headers["Content-Security-Policy"]
        html = response.body.decode()
        [inline] = re.findall("<script>(.*?)</script>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        scripts = f"'sha256-{digest}' 'self' https://res.wx.qq.com https://res2.wx.qq.com"
        assert f"script-src {scripts};" in policy
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        version = hashlib.sha256(self.call("/wechat-sign.js").body).hexdigest()[:12]
        assert f"'wechat-sign.js?{version}'" in html
        assert not self.wechat.calls

    def test_the_script_is_sent_once_and_then_304(self) -> None:
        first = self.call("/wechat-sign.js")
        etag = first.headers["Etag"]
        assert first.headers["Cache-Control"] == "public, max-age=3600"
        for method in ("GET", "HEAD"):
            again = self.call("/wechat-sign.js", method, **{"If-None-Match": etag})
            assert (again.code, again.body) == (304, b"")
            for name in ("Etag", "Cache-Control", "Vary", "Access-Control-Allow-Origin"):
                assert again.headers[name] == first.headers[name]
        assert self.call("/wechat-sign.js", **{"If-None-Match": 'W/"older"'}).code == 200
        assert "Etag" not in self.call("/").headers

    def test_the_page_and_the_script_are_compressed_for_clients_that_accept_it(self) -> None:
        for path, accepted in (("/", "br, gzip;q=0.5"), ("/wechat-sign.js", "gzip")):
            plain, small = self.call(path), self.call(path, **{"Accept-Encoding": accepted})
            assert small.headers["Content-Encoding"] == "gzip"
            assert small.headers["Vary"] == plain.headers["Vary"] == "Accept-Encoding"
            assert int(small.headers["Content-Length"]) == len(small.body) < len(plain.body) / 2
            assert gzip.decompress(small.body) == plain.body
        for refused in ("", "identity, br"):
            assert "Content-Encoding" not in self.call("/", **{"Accept-Encoding": refused}).headers


def test_the_sandbox_prints_a_curl_line_that_works_and_lets_any_page_read_its_answers() -> None:
    sandboxed = Server("--sandbox", "--port", "0")
    output = sandboxed.says("curl")
    assert "NOT VALID" in output
    match = re.search(r'curl "(http://127\.0\.0\.1:\S+)"', output)
    assert match is not None
    origin = {"Origin": "http://localhost:5173"}
    answer = requests.get(match[1], headers=origin, timeout=PATIENCE)
    assert (answer.status_code, answer.json()["appId"]) == (200, "wxsandbox")
    assert answer.headers["Access-Control-Allow-Origin"] == origin["Origin"]
    assert sandboxed.stop() == 0
    assert "WARNING" not in sandboxed.output


def test_a_secret_may_come_from_the_environment(tmp_path: Path, wechat: Sandbox) -> None:
    ini = tmp_path / "without-secret.ini"
    ini.write_text(f"[wechat]\nappid = {wechat.appid}\nsecret =\napi = {wechat.url}\n")
    running = Server("--config", str(ini), "--port", "0", WECHAT_SECRET=wechat.secret)
    assert_signs(running, wechat)
    assert running.stop() == 0


def test_without_verbose_only_failures_are_logged_one_by_one(start: Start, shared: Server) -> None:
    for running, verbose in ((shared, True), (start(verbose=False), False)):
        fetch(running.url + SIGN)
        fetch(f"{running.url}/getApi?url=wrong")
        running.says("400 GET /getApi for wrong from 127.0.0.1")
        assert "must begin with http" in running.output
        assert ("200 GET" in running.output) is verbose
        assert ("looked for the ticket in" in running.output) is verbose


def test_a_refusal_is_logged_with_the_page_that_asked(shared: Server) -> None:
    page = "https://h5.example.com/a?code=SECRET"
    fetch(f"{shared.url}/getApi?url=wrong", Referer=page)
    shared.says("; Referer h5.example.com/a\n")
    fetch(f"{shared.url}/x", Referer="\x9b2J" + "x" * 9000)
    output = shared.says("try /getApi?url=; Referer \N{REPLACEMENT CHARACTER}2Jxxx")
    assert "SECRET" not in output
    assert max(map(len, output.splitlines())) < 400


def test_a_page_whose_url_was_cut_on_the_way_is_named(shared: Server) -> None:
    page = "https://h5.example.com/once?q=%2B"
    for referer in (page, "", "https://h5.example.com/", "https://h5.example.com/other"):
        fetch(f"{shared.url}/getApi?url={quote(page)}", Referer=referer)
    ios = {"User-Agent": "Mozilla/5.0 (iPhone; CPU iPhone OS 17_0) MicroMessenger/8.0"}
    for query, status in (("q=+", 400), ("q=%252B", 400), ("q=%2B&code=SECRET", 200)):
        referer = f"https://h5.example.com/once?{query}"
        assert fetch(f"{shared.url}/getApi?url={quote(page)}", Referer=referer, **ios)[0] == 200
        assert fetch(f"{shared.url}/getApi?url={quote(page)}", Referer=referer)[0] == status
    fetch(f"{shared.url}/once-end")
    output = shared.says("404 GET /once-end ")
    told = re.findall("h5.example.com/once another url than its own: (.*)[.] Send", output)
    assert told == ["it is cut before the page's '&code'"]
    assert "SECRET" not in output


def test_a_page_whose_browser_throws_the_answer_away_is_named(shared: Server) -> None:
    hosts = {"https://www.example.org": "www.example.org", "null": "the page's host"}
    for origin, host in hosts.items():
        assert fetch(shared.url + SIGN, Origin=origin)[0] == 200
        end = f"whose browser will not let it read this answer: list {host} in page_hosts"
        shared.says(f"signed for a page on {host}, {end}")


def test_eight_instances_that_a_thousand_callers_hit_cold_make_one_call_of_each_kind(
    start: Start, wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["token"] = wechat.faults["getticket"] = Fault(delay=0.1)
    instances = [start(*redis_server.ini) for _ in range(8)]
    request = f"GET {SIGN} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
    callers = [instance.connect() for instance in instances for _ in range(125)]
    for caller in callers:
        caller.sendall(request)
    for caller in callers:
        answer = b"".join(iter(lambda caller=caller: caller.recv(65536), b""))  # type: ignore[misc]
        assert answer.startswith(b"HTTP/1.1 200 OK")
        caller.close()
    for instance in instances:
        assert_signs(instance, wechat)
    assert wechat.calls == {"token": 1, "getticket": 1}
    assert 7000 < redis_server.run("TTL", TICKET_KEY) <= 7100


def test_a_wrong_ini_file_is_a_line_for_each_problem_and_status_2(
    tmp_path: Path, main: Main
) -> None:
    ini = tmp_path / "config.ini"
    status, _, output = main("--config", str(ini))
    assert (status, output.count("\n")) == (2, 1)
    assert "config.example.ini" in output
    assert "--sandbox" in output
    for lines, problems in (
        ("timeout = soon\n[redis]\nport = x", ["[wechat] timeout: must", "[redis] port: must"]),
        ("[redis]\nurl = redis://127.0.0.1?db=hunter2", ["[redis] url: redis-py does not take"]),
    ):
        ini.write_text(f"[wechat]\nappid = wx1\nsecret = s\n{lines}", encoding="utf-8")
        status, _, output = main("--config", str(ini))
        assert status == 2
        for line, problem in zip(output.splitlines(), problems, strict=True):
            assert line.startswith(f"{ini}: {problem}")
            assert "hunter2" not in line


def test_where_it_can_not_listen_is_a_sentence_and_status_1(tmp_path: Path, main: Main) -> None:
    ini = tmp_path / "config.ini"
    ini.write_text("[wechat]\nappid = wx1\nsecret = s\n", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for address, reason in (
            ("127.0.0.1", f"port {port}: it is in use, maybe by"),
            *(("203.0.113.7", ""), ("no.such.host.invalid", ""), ("a" * 300, "")),
        ):
            here = ("--address", address, "--port", port)
            status, _, output = main("--config", str(ini), *here)
            assert status == 1
            assert output.startswith(f"can't listen on {address} {reason}")


@pytest.mark.parametrize("port", ["99999", "0123456789abcdef0123456789abcdef"])
def test_a_port_that_is_none_is_a_usage_error(main: Main, port: str) -> None:
    status, _, output = main("--port", port)
    assert status == 2
    assert output.endswith("argument --port: is not a port: a number from 0 to 65535\n")
    assert port not in output


def test_imports_point_downward() -> None:
    order = ["logs", "texts", "errors", "settings", "page_url", "signature", "credentials", "clock"]
    order += ["redis_client", "store", "cache", "renewal", "tickets", "sandbox", "process", "check"]
    for path in ROOT.glob("wechat_sign/[!_]*.py"):
        imported = re.findall(r"^\s*from \.(\w+) import", path.read_text("utf-8"), re.MULTILINE)
        place = order.index(path.stem)
        assert [name for name in imported if order.index(name) >= place] == [], path.name
