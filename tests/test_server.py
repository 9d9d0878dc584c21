"""What the routes answer, what the log says of it, and the command line."""

from __future__ import annotations

import base64
import gc
import gzip
import hashlib
import itertools
import json
import re
import socket
import time
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
from tornado.iostream import IOStream

import server
from wechat_sign.settings import JssdkSettings, ServerSettings, Settings
from wechat_sign.signature import WxConfig

REQUESTS = 200
"""Enough of them that what each leaves stands out from what one connection does."""


numbers = itertools.count()


def all_said(running: Server) -> str:
    """Its output, with the lines about all requests that were answered by now."""
    path = f"/end-{next(numbers)}"
    fetch(running.url + path)
    return running.says(f"404 GET {path} ")


class ServerCase(tornado.testing.AsyncHTTPTestCase):
    """The whole application over HTTP, in front of the sandbox."""

    page_hosts: tuple[str, ...] = ()
    open_tag_list: tuple[str, ...] = ()
    page = True

    @pytest.fixture(autouse=True)
    def _use(self, wechat: Sandbox, redis_server: RedisServer) -> None:
        self.wechat = wechat
        self.redis_server = redis_server

    def get_app(self) -> server.SigningApplication:
        base = settings_for(self.wechat, self.redis_server)
        jssdk = JssdkSettings(page_hosts=self.page_hosts, open_tag_list=self.open_tag_list)
        served = ServerSettings(page=self.page)
        settings = Settings(wechat=base.wechat, redis=base.redis, jssdk=jssdk, server=served)
        return server.SigningApplication(settings, tickets_of(settings))

    def call(
        self, path: str, method: str = "GET", body: str | None = None, **headers: str
    ) -> HTTPResponse:
        body = body or ("" if method in ("POST", "PUT", "PATCH") else None)
        return self.fetch(
            path, method=method, headers=headers, body=body, decompress_response=False
        )

    def signed(self, query: str, url: str) -> dict[str, Any]:
        response = self.call(f"/getApi?{query}")
        assert response.code == 200, response.body
        answer: dict[str, Any] = json.loads(response.body)
        assert answer["signature"] == signature_of(answer, self.wechat.ticket, url)
        return answer

    def refusal(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        response = self.call(path, method, **headers)
        body = json.loads(response.body)
        assert response.headers["Content-Type"] == "application/json; charset=UTF-8"
        assert response.headers["Cache-Control"] == "no-store"
        assert_no_credential(str(body), self.wechat.issued)
        return response.code, body["error"]


class TestGarbage(ServerCase):
    """What is left of a request, for Python's collector to find."""

    async def ask(self, path: str) -> None:
        stream = IOStream(socket.socket())
        await stream.connect(("127.0.0.1", self.get_http_port()))
        for _ in range(REQUESTS):
            await stream.write(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            head = await stream.read_until(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            assert length is not None
            await stream.read_bytes(int(length[1]))
        stream.close()

    def test_there_is_none(self) -> None:
        for path in (f"/getApi?url={PAGE}", "/getApi?url=nonsense", "/healthz", "/nowhere"):
            self.io_loop.run_sync(lambda path=path: self.ask(path))
            gc.collect()
            gc.disable()
            try:
                self.io_loop.run_sync(lambda path=path: self.ask(path))
                found = gc.collect()
            finally:
                gc.enable()
            assert found < REQUESTS, path


class TestGetApi(ServerCase):
    def test_the_answer_goes_straight_into_wx_config(self) -> None:
        response = self.call(f"/getApi?url={PAGE}")
        assert response.headers["Content-Type"] == "application/json; charset=UTF-8"
        assert response.headers["Cache-Control"] == "no-store"
        assert "Etag" not in response.headers
        assert "Access-Control-Allow-Origin" not in response.headers
        assert "Vary" not in response.headers
        answer = json.loads(response.body)
        keys = ["debug", "appId", "timestamp", "nonceStr", "signature", "jsApiList"]
        assert list(answer) == keys
        assert answer["debug"] is True
        assert answer["appId"] == self.wechat.appid
        assert abs(answer["timestamp"] - time.time()) < PATIENCE
        assert isinstance(answer["timestamp"], int)
        assert re.fullmatch("[A-Za-z0-9]{16}", answer["nonceStr"])
        assert re.fullmatch("[0-9a-f]{40}", answer["signature"])
        assert answer["jsApiList"] == list(JssdkSettings().js_api_list)
        assert_no_credential(response.body.decode(), self.wechat.issued)

    def test_no_two_answers_are_the_same(self) -> None:
        answers = {self.call(f"/getApi?url={PAGE}").body for _ in range(5)}
        assert len(answers) == 5

    def test_the_referer_decides_between_two_readings_of_a_url(self) -> None:
        path, page = (
            "/getApi?url=https://h5.example.com/?q=C%2B%2B",
            "https://h5.example.com/?q=C++",
        )
        assert self.refusal(path)[0] == 400
        assert self.call(path, Referer=page).headers["Signed-Url"] == page

    def test_another_accounts_appid_is_refused_but_not_in_the_pages_own_query(self) -> None:
        escaped, raw = quote(PAGE, safe=""), f"{PAGE}?appid=wx2"
        for query in (f"appid=wx2&url={PAGE}", f"url={escaped}&appid=wx2"):
            assert self.refusal(f"/getApi?{query}")[0] == 400
            query = query.replace("wx2", self.wechat.appid)
            assert self.call(f"/getApi?{query}").headers["Signed-Url"] == PAGE
        for query in (f"url={raw}", f"appid=&url={quote(raw, safe='')}"):
            assert self.call(f"/getApi?{query}").headers["Signed-Url"] == raw

    def test_a_bad_url_is_a_400_with_a_sentence(self) -> None:
        assert self.refusal("/getApi") == (
            400,
            "the parameter url is missing; send it as "
            "encodeURIComponent(location.href.split('#')[0])",
        )
        assert self.refusal("/getApi?url=x")[0] == 400
        assert "escaped twice" in self.refusal("/getApi?url=" + quote(quote(PAGE, safe="")))[1]

    def test_other_routes_and_methods_are_json_too(self) -> None:
        assert self.refusal("/x") == (404, "there is nothing here; try /getApi?url=")
        assert self.refusal("/getApi/")[0] == self.refusal("/wechat-signXjs")[0] == 404
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            status, _ = self.refusal(f"/getApi?url={PAGE}", method)
            assert status == 405

    def test_a_body_that_is_not_what_it_says_is_refused_with_a_sentence(self) -> None:
        form = {"Content-Type": "multipart/form-data"}
        error = "send no body, and no Content-Type: it is not read here"
        for method in ("GET", "POST"):
            assert self.refusal(f"/getApi?url={PAGE}", method, **form) == (400, error)

    def test_what_a_path_allows_is_what_it_says(self) -> None:
        allowed = "GET, HEAD, OPTIONS"
        for path in (f"/getApi?url={PAGE}", "/healthz", "/", "/wechat-sign.js"):
            got, head = self.call(path), self.call(path, "HEAD")
            assert (head.code, head.body, got.code) == (200, b"", 200)
            for name in ("Content-Type", "Content-Length", "Cache-Control"):
                assert head.headers[name] == got.headers[name]
            for method, status in (("OPTIONS", 204), ("POST", 405), ("DELETE", 405)):
                response = self.call(path, method)
                assert (response.code, response.headers["Allow"]) == (status, allowed)
        assert self.refusal("/healthz", "POST") == (405, "send a GET, without a body")

    def test_head_of_what_is_refused_has_the_status_and_no_body(self) -> None:
        for path, status in (("/getApi", 400), ("/x", 404)):
            response = self.call(path, "HEAD")
            assert (response.code, response.body) == (status, b"")

    def test_options_answers_204_without_cors_headers(self) -> None:
        response = self.call("/getApi", "OPTIONS", Origin="https://h5.example.com")
        assert (response.code, response.body) == (204, b"")
        assert not [name for name in response.headers if name.startswith("Access-Control")]

    def test_a_refusing_wechat_is_a_502_with_its_errcode(self) -> None:
        self.wechat.faults["token"] = Fault(errcode=40164)
        response = self.call(f"/getApi?url={PAGE}")
        assert response.code == 502
        body = json.loads(response.body)
        assert body["errcode"] == 40164
        assert "203.0.113.7" not in body["error"]
        assert 50 <= int(response.headers["Retry-After"]) <= 60

    def test_an_unreachable_wechat_is_a_503(self) -> None:
        self.wechat.faults["getticket"] = Fault(hang_up=True)
        response = self.call(f"/getApi?url={PAGE}")
        assert response.code == 503
        assert list(json.loads(response.body)) == ["error"]
        assert response.headers["Retry-After"] == "1"


class TestPageHosts(ServerCase):
    page_hosts = ("h5.example.com", "*.example.net")
    open_tag_list = ("wx-open-launch-weapp",)

    def test_pages_on_the_list_are_signed_and_others_are_403(self) -> None:
        self.signed(f"url={PAGE}", PAGE)
        answer = self.signed("url=https://A.b.Example.NET:444", "https://a.b.example.net:444/")
        assert answer["openTagList"] == ["wx-open-launch-weapp"]
        status, error = self.refusal("/getApi?url=https://h5.example.com.evil.com/")
        assert status == 403
        assert "page_hosts" in error

    def test_the_script_is_the_same_for_each_origin(self) -> None:
        for origin in ("https://h5.example.com", "https://evil.com", ""):
            headers = self.call("/wechat-sign.js", Origin=origin).headers
            assert headers["Access-Control-Allow-Origin"] == "*"
            assert "Access-Control-Allow-Credentials" not in headers
            assert headers["Vary"] == "Accept-Encoding"

    def test_an_origin_on_the_list_may_read_answers_and_errors(self) -> None:
        for origin in ("https://h5.example.com", "http://x.example.net:8080"):
            for path in (f"/getApi?url={PAGE}", "/getApi"):
                self.assert_readable(self.call(path, Origin=origin), origin)

    def assert_readable(self, response: HTTPResponse, origin: str) -> None:
        """By a page of that origin, with credentials or without."""
        assert response.headers["Access-Control-Allow-Origin"] == origin
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
        assert response.headers["Vary"] == "Origin"

    def test_whatever_is_refused_an_origin_on_the_list_may_read_why(self) -> None:
        origin = "https://h5.example.com"
        statuses = {"/getApi": 400, "/getApi?url=https://evil.com/": 403, "/getapi": 404}
        for path, status in statuses.items():
            response = self.call(path, Origin=origin)
            assert response.code == status
            self.assert_readable(response, origin)
        body = json.dumps({"url": PAGE})
        response = self.call("/getApi", "POST", body=body, Origin=origin)
        assert (response.code, response.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
        assert "send GET /getApi?url=" in json.loads(response.body)["error"]
        self.assert_readable(response, origin)

    def test_what_is_no_origin_is_not_on_the_list(self) -> None:
        for odd in ("@h5.example.com", "\\@h5.example.com"):
            for origin in (f"https://evil.com{odd}", f"https://a{odd}/", "https://h5.example.com/"):
                headers = self.call("/getApi", Origin=origin).headers
                assert "Access-Control-Allow-Origin" not in headers

    def test_it_may_read_that_wechat_refuses(self) -> None:
        self.wechat.faults["token"] = Fault(errcode=40164)
        response = self.call(f"/getApi?url={PAGE}", Origin="https://h5.example.com")
        assert response.code == 502
        self.assert_readable(response, "https://h5.example.com")

    def test_it_may_read_that_wechat_is_unreachable(self) -> None:
        self.wechat.faults["token"] = Fault(hang_up=True)
        response = self.call(f"/getApi?url={PAGE}", Origin="https://h5.example.com")
        assert response.code == 503
        self.assert_readable(response, "https://h5.example.com")

    def test_other_origins_may_not(self) -> None:
        for origin in (
            "https://evil.com",
            "null",
            "https://h5.example.com.evil.com",
            "h5.example.com",
        ):
            for method, path in (("GET", f"/getApi?url={PAGE}"), ("GET", "/x"), ("OPTIONS", "/x")):
                headers = self.call(path, method, Origin=origin).headers
                assert not [name for name in headers if name.startswith("Access-Control")]
                assert headers["Vary"] == "Origin"

    def test_the_preflight_is_answered_on_a_mistyped_path_too(self) -> None:
        origin = "https://h5.example.com"
        for path in ("/getApi", "/getapi"):
            wanted = {"Origin": origin, "Access-Control-Request-Headers": "x-token, x-b"}
            response = self.call(path, "OPTIONS", **wanted)
            assert response.code == 204
            self.assert_readable(response, origin)
            assert response.headers["Access-Control-Allow-Methods"] == "GET, HEAD"
            assert response.headers["Access-Control-Allow-Headers"] == "x-token, x-b"
        assert self.call("/getapi", "OPTIONS").code == 404


class TestWhateverGoesWrong(ServerCase):
    """Neither an answer nor the log, in which the fixture `wechat` looks, has a credential."""

    @pytest.fixture(autouse=True)
    def _log(self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        self.caplog = caplog
        self.monkeypatch = monkeypatch

    @pytest.fixture(autouse=True)
    def _use(self, wechat: Sandbox, own_redis: RedisServer) -> None:
        self.wechat = wechat
        self.redis_server = own_redis

    def test_no_credential_is_told(self) -> None:
        application = self._app
        assert isinstance(application, server.SigningApplication)
        self.redis_server.run("CONFIG", "SET", "maxmemory", "1")
        for fault, status in (
            (Fault(), 200),
            (Fault(errcode=40164), 502),
            (Fault(errcode=40001), 502),
            (Fault(hang_up=True), 503),
            (Fault(delay=0.5), 503),
            (Fault(status=502, body=b"x"), 503),
        ):
            for endpoint in ("token", "getticket"):
                self.wechat.faults = {endpoint: fault}
                application.tickets = tickets_for(self.wechat, self.redis_server, timeout=0.3)
                response = self.call(f"/getApi?url={PAGE}")
                assert response.code == status, fault
                assert_no_credential(response.body.decode(), self.wechat.issued)
        assert self.caplog.text.count("no page can be signed") == 10

    def test_a_handler_that_raises_is_a_500_and_one_traceback(self) -> None:
        def sign(*_: Any) -> str:
            raise ZeroDivisionError("out of numbers")

        self.monkeypatch.setattr(WxConfig, "sign", sign)
        for way in ("that waits for the ticket", "that has it"):
            self.caplog.clear()
            path = f"/getApi?url={PAGE}&code=UNSEEN"
            assert self.refusal(path, Referer=PAGE) == (500, "Internal Server Error"), way
            log = self.caplog.text
            assert log.count("Traceback") == log.count("ZeroDivisionError: out of numbers") == 1
            assert log.count("500 GET /getApi for h5.example.com/a") == 1
            assert "UNSEEN" not in log
            assert_no_credential(log, self.wechat.issued)

    def test_what_is_refused_is_no_traceback(self) -> None:
        for method, path in (("POST", "/getApi"), ("POST", "/x"), ("GET", "/getApi")):
            self.refusal(path, method)
        assert "Traceback" not in self.caplog.text


def raw(running: Server, request: bytes) -> bytes:
    """The whole answer to bytes sent as they are."""
    with running.connect() as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_the_sandbox_prints_a_curl_line_that_works() -> None:
    sandboxed = Server("--sandbox", "--port", "0")
    output = sandboxed.says("curl")
    assert "NOT VALID" in output
    match = re.search(r'curl "(\S+)"', output)
    assert match is not None
    assert match[1].startswith("http://127.0.0.1:")
    status, answer = fetch(match[1])
    assert (status, answer["appId"]) == (200, "wxsandbox")
    assert sandboxed.stop() == 0


def test_bytes_in_a_raw_url_are_signed_as_they_came(shared: Server, shared_wechat: Sandbox) -> None:
    url = "https://h5.example.com/%e4%B8%AD?x=%7E&y=%zz"
    request = f"GET /getApi?url={url}#/route HTTP/1.0\r\n\r\n".encode()
    answer = json.loads(raw(shared, request).partition(b"\r\n\r\n")[2])
    assert answer["signature"] == signature_of(answer, shared_wechat.ticket, url)


def test_a_secret_may_come_from_the_environment(tmp_path: Path, wechat: Sandbox) -> None:
    ini = tmp_path / "without-secret.ini"
    ini.write_text(f"[wechat]\nappid = {wechat.appid}\nsecret =\napi = {wechat.url}\n")
    running = Server("--config", str(ini), "--port", "0", WECHAT_SECRET=wechat.secret)
    assert_signs(running, wechat)
    assert running.stop() == 0


def test_at_start_the_server_looks_for_the_ticket_itself(start: Start, wechat: Sandbox) -> None:
    wechat.faults["token"] = Fault(errcode=40164)
    running = start()
    output = running.says("IP白名单")
    assert "add this server's public address to the account's IP whitelist" in output
    assert running.stop() == 0


def test_without_verbose_only_failures_are_logged_one_by_one(start: Start, shared: Server) -> None:
    for running, verbose in ((shared, True), (start(verbose=False), False)):
        fetch(f"{running.url}/getApi?url={PAGE}")
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
    assert "; Referer \N{REPLACEMENT CHARACTER}2Jxxx" in shared.says("try /getApi?url=; Referer")
    fetch(f"{shared.url}/getApi?url={PAGE}", Referer=page)
    output = all_said(shared)
    assert "200 GET" in output
    assert "SECRET" not in output
    assert max(map(len, output.splitlines())) < 400


def changes_told(running: Server, page: str) -> list[str]:
    """About the urls of such pages that were changed on their way to the server."""
    told = f"signed for the page {page} another url than its own: (.*)[.] Send"
    return re.findall(told, all_said(running))


def test_a_page_whose_url_was_cut_on_the_way_is_named(shared: Server) -> None:
    page = "https://h5.example.com/once?q=%2B"
    for referer in (page, "", "https://h5.example.com/", "https://h5.example.com/other"):
        fetch(f"{shared.url}/getApi?url={quote(page)}", Referer=referer)
    ios = {"User-Agent": "Mozilla/5.0 (iPhone; CPU iPhone OS 17_0) MicroMessenger/8.0"}
    fetch(f"{shared.url}/getApi?url={quote(page)}", Referer=f"{page}&x=1", **ios)
    for query, status in (("q=+", 400), ("q=%252B", 400), ("q=%2B&code=SECRET", 200)):
        referer = f"https://h5.example.com/once?{query}"
        assert fetch(f"{shared.url}/getApi?url={quote(page)}", Referer=referer)[0] == status
        assert fetch(f"{shared.url}/getApi?url={quote(page)}", Referer=referer, **ios)[0] == 200
    told = changes_told(shared, "h5.example.com/once")
    assert told == ["it is cut before the page's '&code'"]
    assert "SECRET" not in shared.output


def test_a_page_whose_browser_throws_the_answer_away_is_named(shared: Server) -> None:
    url = f"{shared.url}/getApi?url={quote(PAGE)}"
    assert fetch(url, Origin="https://www.example.org")[0] == 200
    shared.says("signed for a page on www.example.org, whose browser will not let it read this")
    shared.says("list www.example.org in page_hosts")
    assert fetch(url, Origin="null")[0] == 200
    shared.says("list the page's host in page_hosts")


def test_the_sandbox_lets_pages_of_any_origin_read_its_answers() -> None:
    sandboxed = Server("--sandbox", "--port", "0")
    origin = {"Origin": "http://localhost:5173"}
    answer = requests.get(f"{sandboxed.url}/getApi?url={quote(PAGE)}", headers=origin, timeout=9)
    assert answer.headers["Access-Control-Allow-Origin"] == origin["Origin"]
    assert sandboxed.stop() == 0
    assert "WARNING" not in sandboxed.output


def test_eight_instances_that_a_thousand_callers_hit_cold_make_one_call_of_each_kind(
    start: Start, wechat: Sandbox, redis_server: RedisServer
) -> None:
    wechat.faults["token"] = wechat.faults["getticket"] = Fault(delay=0.1)
    instances = [start(*redis_server.ini) for _ in range(8)]
    request = f"GET /getApi?url={PAGE} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
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
    for instance in instances:
        assert instance.stop() == 0


def test_a_wechat_that_can_not_be_reached_is_a_503_and_a_line(
    start: Start, wechat: Sandbox
) -> None:
    wechat.stop()
    running = start()
    assert fetch(f"{running.url}/getApi?url={PAGE}")[0] == 503
    assert "Connection refused" in running.says("no page can be signed")
    assert running.stop() == 0


def test_a_missing_ini_file_is_a_sentence_and_status_2(tmp_path: Path) -> None:
    refused = Server("--config", str(tmp_path / "config.ini"))
    assert refused.wait() == 2
    assert refused.output.count("\n") == 1
    assert "config.example.ini" in refused.output
    assert "--sandbox" in refused.output


def ini_with(folder: Path, *lines: str) -> Path:
    ini = folder / "config.ini"
    ini.write_text("\n".join(["[wechat]", "appid = wx1", "secret = s", *lines]), encoding="utf-8")
    return ini


def test_a_wrong_ini_file_is_a_line_for_each_problem_and_status_2(
    tmp_path: Path, main: Main
) -> None:
    ini = ini_with(tmp_path, "timeout = soon", "[redis]", "port = x")
    status, _, output = main("--config", str(ini))
    assert status == 2
    assert [line.partition(": ")[2] for line in output.splitlines()] == [
        "[wechat] timeout: must be a number from 0.1 to 60",
        "[redis] port: must be a whole number from 1 to 65535",
    ]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("db=hunter2", "redis-py does not take it: check host, port and the options after a ?"),
        ("ssl_ca_certs=hunter2", "ssl_ca_certs: there is no such file"),
        ("hunter2=x", "redis-py does not take it: check host, port and the options after a ?"),
    ],
)
def test_a_url_with_a_wrong_option_is_a_problem_like_others_and_its_value_is_not_shown(
    tmp_path: Path, main: Main, query: str, words: str
) -> None:
    ini = ini_with(tmp_path, "[redis]", f"url = redis://127.0.0.1?{query}")
    status, _, output = main("--config", str(ini))
    assert (status, output.count("\n")) == (2, 1)
    assert output == f"{ini}: [redis] url: {words}\n"


def test_a_port_in_use_is_a_sentence_and_status_1(tmp_path: Path, main: Main) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        here = ("--address", "127.0.0.1", "--port", port)
        status, _, output = main("--config", str(ini_with(tmp_path)), *here)
    assert status == 1
    assert f"can't listen on 127.0.0.1 port {port}: it is in use, maybe by" in output


@pytest.mark.parametrize("address", ["203.0.113.7", "no.such.host.invalid", "a" * 300])
def test_an_address_that_is_not_ours_is_a_sentence_and_status_1(
    tmp_path: Path, main: Main, address: str
) -> None:
    status, _, output = main("--config", str(ini_with(tmp_path)), "--address", address)
    assert status == 1
    assert "can't listen on" in output


@pytest.mark.parametrize("port", ["99999", "0123456789abcdef0123456789abcdef"])
def test_a_port_that_is_none_is_a_usage_error(main: Main, port: str) -> None:
    status, _, output = main("--port", port)
    assert status == 2
    assert output.endswith("argument --port: is not a port: a number from 0 to 65535\n")
    assert port not in output


def test_each_library_is_imported_where_the_design_says() -> None:
    sources = {
        path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("wechat_sign/*.py")
    }
    sources["server.py"] = (ROOT / "server.py").read_text(encoding="utf-8")
    for library, modules in {
        "requests": {"credentials.py"},
        "redis": {"redis_client.py", "store.py"},
        "tornado": {"process.py", "server.py", "texts.py"},
    }.items():
        pattern = re.compile(rf"^\s*(import|from) {library}\b", re.MULTILINE)
        assert {name for name, text in sources.items() if pattern.search(text)} == modules


def test_imports_point_downward() -> None:
    order = [
        "logs",
        "texts",
        "errors",
        "settings",
        "page_url",
        "signature",
        "credentials",
        "clock",
        "redis_client",
    ]
    order += ["store", "cache", "renewal", "tickets", "sandbox", "process", "check"]
    for path in ROOT.glob("wechat_sign/[!_]*.py"):
        imported = re.findall(r"^\s*from \.(\w+) import", path.read_text("utf-8"), re.MULTILINE)
        place = order.index(path.stem)
        assert [name for name in imported if order.index(name) >= place] == [], path.name


class TestHealthz(ServerCase):
    def health(self) -> tuple[int, dict[str, Any]]:
        response = self.call("/healthz")
        assert response.headers["Cache-Control"] == "no-store"
        assert_no_credential(response.body.decode(), self.wechat.issued)
        return response.code, json.loads(response.body)

    def test_without_a_ticket_it_fails_and_asks_no_other(self) -> None:
        status, health = self.health()
        assert status == 503
        assert health == {"status": "failing", "cache": "redis", "error": "no ticket yet"}
        assert not self.wechat.calls

    def test_with_one_it_is_well(self) -> None:
        self.call(f"/getApi?url={PAGE}")
        with self.redis_server.watching() as sent:
            status, health = self.health()
            assert sent() == []
        assert status == 200
        assert list(health) == ["status", "ticket_age", "ticket_usable_for", "cache"]
        assert (health["status"], health["cache"]) == ("ok", "redis")
        assert self.call("/healthz", "HEAD").code == 200
        assert 0 <= health["ticket_age"] < PATIENCE
        assert 7100 < health["ticket_usable_for"] <= 7200
        assert self.wechat.calls == {"token": 1, "getticket": 1}

    def test_it_tells_the_reason_and_the_advice(self) -> None:
        self.wechat.faults["token"] = Fault(errcode=40164)
        self.call(f"/getApi?url={PAGE}")
        status, health = self.health()
        assert status == 503
        assert health["errcode"] == 40164
        assert health["error"] == "WeChat refused token with errcode 40164"
        assert "add this server's public address to the account's IP whitelist" in health["advice"]
        assert "请把本服务器的公网 IP" in health["advice_zh"]
        # What WeChat said, and this host's address, are not for the public.
        assert "203.0.113.7" not in str(health)
        assert "whitelist rid" not in str(health)

    def test_nor_is_why_wechat_can_not_be_reached(self) -> None:
        self.wechat.faults["token"] = Fault(hang_up=True)
        self.call(f"/getApi?url={PAGE}")
        told = json.loads(self.call("/healthz").body)
        assert told["error"] == "no usable answer from WeChat to token"


class TestHeaders(ServerCase):
    def test_every_answer_is_what_it_says_and_names_no_version(self) -> None:
        for path in ("/", "/getApi", f"/getApi?url={PAGE}", "/healthz", "/wechat-sign.js", "/x"):
            for method in ("GET", "HEAD", "OPTIONS", "POST"):
                headers = self.call(path, method).headers
                assert headers["X-Content-Type-Options"] == "nosniff"
                assert "Server" not in headers

    def test_the_page_tells_its_url_to_this_server_alone(self) -> None:
        assert self.call("/").headers["Referrer-Policy"] == "same-origin"

    def test_the_page_is_never_framed(self) -> None:
        headers = self.call("/").headers
        assert headers["X-Frame-Options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


class TestPage(ServerCase):
    def test_the_page_has_a_policy_that_lets_only_wechats_scripts_in(self) -> None:
        response = self.call("/")
        assert response.headers["Content-Type"] == "text/html; charset=UTF-8"
        policy = response.headers["Content-Security-Policy"]
        match = re.search("script-src 'sha256-([^']+)' (.*?);", policy)
        assert match is not None
        assert match[2] == "'self' https://res.wx.qq.com https://res2.wx.qq.com"
        assert "default-src 'none'" in policy
        html = response.body.decode()
        [inline] = re.findall("<script>(.*?)</script>", html, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode() == match[1]
        assert not self.wechat.calls

    def test_the_page_loads_no_script_of_an_older_version(self) -> None:
        script = self.call("/wechat-sign.js").body
        version = hashlib.sha256(script).hexdigest()[:12]
        assert f"'wechat-sign.js?{version}'" in self.call("/").body.decode()

    def test_the_script_and_its_types_may_be_loaded_from_anywhere(self) -> None:
        for path, kind, body in (
            ("/wechat-sign.js", "text/javascript", server.SCRIPT.text),
            ("/wechat-sign.d.ts", "text/plain", server.TYPES.text),
        ):
            response = self.call(path)
            assert response.headers["Content-Type"] == f"{kind}; charset=UTF-8"
            assert response.headers["Access-Control-Allow-Origin"] == "*"
            assert response.body == body
            asked = self.call(path, "OPTIONS", Origin="https://evil.com").headers
            assert asked["Access-Control-Allow-Origin"] == "*"
            assert not {"Vary", "Access-Control-Allow-Credentials"} & set(asked)

    def test_the_script_is_sent_once_and_then_304(self) -> None:
        first = self.call("/wechat-sign.js")
        etag = first.headers["Etag"]
        for method in ("GET", "HEAD"):
            again = self.call("/wechat-sign.js", method, **{"If-None-Match": etag})
            assert (again.code, again.body) == (304, b"")
            for name in ("Etag", "Cache-Control", "Vary", "Access-Control-Allow-Origin"):
                assert again.headers[name] == first.headers[name]
        assert self.call("/wechat-sign.js", **{"If-None-Match": 'W/"older"'}).code == 200
        assert "Etag" not in self.call("/").headers

    def test_the_page_and_the_script_are_compressed_for_clients_that_accept_it(self) -> None:
        for path in ("/", "/wechat-sign.js"):
            plain = self.call(path)
            small = self.call(path, **{"Accept-Encoding": "gzip"})
            assert "Content-Encoding" not in plain.headers
            assert small.headers["Content-Encoding"] == "gzip"
            assert small.headers["Vary"] == plain.headers["Vary"] == "Accept-Encoding"
            assert int(small.headers["Content-Length"]) == len(small.body) < len(plain.body) / 2
            assert gzip.decompress(small.body) == plain.body
        for refused in ("gzip;q=0", "identity, gzip; q=0.0", "notgzip"):
            assert "Content-Encoding" not in self.call("/", **{"Accept-Encoding": refused}).headers
        accepted = self.call("/", **{"Accept-Encoding": "br, gzip;q=0.5"})
        assert accepted.headers["Content-Encoding"] == "gzip"
        response = self.call(f"/getApi?url={PAGE}", **{"Accept-Encoding": "gzip"})
        assert not {"Content-Encoding", "Vary"} & set(response.headers)

    def test_the_url_that_was_signed_is_told_beside_the_json(self) -> None:
        long = "https://h5.example.com/" + "x" * 5000
        for page, told in ((PAGE, PAGE), (long, long[:2048])):
            headers = self.call("/getApi?url=" + quote(page, safe="")).headers
            assert headers["Signed-Url"] == told


class TestWithoutPage(ServerCase):
    page = False

    def test_the_page_can_be_switched_off(self) -> None:
        assert self.refusal("/")[0] == 404
        assert self.call("/wechat-sign.js").code == 200
