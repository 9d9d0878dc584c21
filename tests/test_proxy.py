"""The manual's own lines for nginx and Caddy, in front of the real server."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
import urls
from harness import (
    PATIENCE,
    Client,
    RedisServer,
    Sandbox,
    Server,
    Start,
    assert_no_credential,
    eventually,
    free_port,
    signature_of,
    unavailable,
    write_ini,
)
from manuals import ENGLISH

from server import SCRIPT as SERVED
from wechat_sign.errors import BadPageUrl
from wechat_sign.page_url import page_url

NGINX = """
daemon off;
master_process off;
error_log stderr;
pid {folder}/pid;
events {{}}
http {{
{upstream}
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
{lines}
    }}
}}
"""
CADDY = """
{{
    admin off
    storage file_system {folder}
}}
http://127.0.0.1:{port} {{
    bind 127.0.0.1
{lines}
}}
"""
AWKWARD = [
    "https://h5.example.com/",
    "https://h5.example.com/a%2Fb/%E4%B8%AD?x=1&y=a+b&z=%20",
    "https://h5.example.com/a//b/;c=d,e/@f/x:y?a=%2B&b=%26&c=%3D&d=%23&e=%25",
    "https://h5.example.com/?q=C++&m=H%26M&empty=&also&t=12:30&p=(1)!*$~",
    "https://h5.example.com/?next=https%3A%2F%2Fa.example%2F%3Fx%3D1%26y%3D2&z=1",
    "https://h5.example.com/?next=https://a.example/?x=1;y=2&z=/.././/",
    "https://h5.example.com/?json=%7B%22a%22:[1,2]%7D&pipe=a|b^c",
    "http://10.0.0.7:8080/index.php?s=/Home/Index&%E5%90%8D=%E4%B8%AD",
    "https://h5.example.com/?long=" + "%E4%B8%AD" * 300,
]


def lines_for(kind: str, containing: str = "") -> str:
    """The manual's, the first that contain this."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", ENGLISH, re.DOTALL)
    lines: str = next(block for block in blocks if containing in block)
    assert containing == "limit_req" or "127.0.0.1:8060" in lines
    return lines


class Proxy:
    """A proxy with such lines, on a free port of 127.0.0.1, in front of a running server, or of
    several with the lines for nginx's `upstream`."""

    def __init__(
        self, kind: str, lines: str, behind: Sequence[Server], folder: Path, upstream: str = ""
    ) -> None:
        self.kind = kind
        self.port = free_port()
        own, _, lines = lines.rpartition("# in the server of your pages\n")
        upstream = upstream if "upstream " in upstream else own + upstream
        for number, server in enumerate(behind, 8060):
            here = f"127.0.0.1:{server.address[1]}"
            lines = lines.replace(f"127.0.0.1:{number}", here)
            upstream = upstream.replace(f"127.0.0.1:{number}", here)
        template = {"nginx": NGINX, "caddy": CADDY}[kind]
        config = folder / kind
        filled = {"folder": folder, "port": self.port, "lines": lines, "upstream": upstream}
        config.write_text(template.format(**filled))
        arguments = ["-p", str(folder), "-c", str(config)]
        if kind == "caddy":
            arguments = ["run", "--adapter", "caddyfile", "--config", str(config)]
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [program(kind), *arguments],
                env={**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder)},
                stderr=log,
            )

    def answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return bool(self.ask("/"))
        except OSError:
            return False

    def ask(
        self, target: str, method: str = "GET", source: str = "127.0.0.1", **headers: str
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """The answer to a target that is sent as it is, from an address of this machine."""
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=PATIENCE, source_address=(source, 0)
        )
        connection.request(method, target, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer, body

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)


def program(kind: str) -> str:
    found = shutil.which(kind) or shutil.which(kind, path="/usr/sbin")
    if not found:
        unavailable(f"no {kind} for this test: install it, for example with apt-get install {kind}")
    return found


@pytest.fixture(scope="module")
def shared_wechat() -> Iterator[Sandbox]:
    sandbox = Sandbox().start()
    yield sandbox
    sandbox.stop()


@pytest.fixture(scope="module")
def running(shared_wechat: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server behind the proxies."""
    ini = write_ini(tmp_path_factory.mktemp("shared") / "config.ini", shared_wechat)
    started = Server("--config", str(ini), "--address", "127.0.0.1", "--port", "0", "--verbose")
    yield started
    started.kill()
    assert_no_credential(started.output, shared_wechat.issued)
    assert "Traceback" not in started.output


@contextmanager
def proxy_with(
    kind: str, lines: str, folder: Path, *behind: Server, upstream: str = ""
) -> Iterator[Proxy]:
    started = Proxy(kind, lines, behind, folder, upstream)
    try:
        eventually(f"{kind} answers", started.answers)
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module", params=["nginx", "caddy"])
def proxy(
    request: pytest.FixtureRequest, running: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp(request.param)
    with proxy_with(request.param, lines_for(request.param), folder, running) as started:
        yield started


def test_all_of_the_server_is_served(proxy: Proxy) -> None:
    types = {
        f"/wx/getApi?url={quote(AWKWARD[0], safe='')}": "application/json",
        "/wx/": "text/html",
        "/wx/wechat-sign.js": "text/javascript",
        "/wx/healthz": "application/json",
    }
    for path, content_type in types.items():
        for method in ("GET", "HEAD"):
            answer, body = proxy.ask(path, method)
            assert (answer.status, bool(body)) == (200, method == "GET")
            assert answer.headers["Content-Type"] == f"{content_type}; charset=UTF-8"
        assert proxy.ask(path, "OPTIONS")[0].headers["Allow"] == "GET, HEAD, OPTIONS"
    answer, body = proxy.ask("/wx/getapi")
    assert (answer.status, json.loads(body)) == (
        404,
        {"error": "there is nothing here; try /getApi?url="},
    )


def test_the_script_is_cached_and_compressed(proxy: Proxy) -> None:
    answer, body = proxy.ask("/wx/wechat-sign.js", **{"Accept-Encoding": "gzip"})
    assert answer.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(body) == SERVED.text
    unchanged = {"If-None-Match": answer.headers["ETag"]}
    assert proxy.ask("/wx/wechat-sign.js", **unchanged)[0].status == 304


@pytest.mark.parametrize("escaped", [True, False], ids=["escaped", "raw"])
def test_a_pages_url_arrives_as_it_was_sent(
    proxy: Proxy, shared_wechat: Sandbox, escaped: bool
) -> None:
    signed = 0
    pages = [*AWKWARD, *urls.pages(200)]
    for page in pages:
        query = "url=" + (quote(page, safe="") if escaped else page)
        answer, body = proxy.ask(f"/wx/getApi?{query}")
        told = json.loads(body)
        if answer.status == 200:
            signed += 1
            assert answer.headers["Signed-Url"] == page[:2048]
            assert told["signature"] == signature_of(told, shared_wechat.ticket, page)
        else:
            with pytest.raises(BadPageUrl) as refused:
                page_url(query.encode())
            assert told["error"] == str(refused.value)
    assert signed > len(pages) * 0.9


def test_the_log_has_the_clients_address_which_it_can_not_hide(
    proxy: Proxy, running: Server
) -> None:
    proxy.ask(f"/wx/{proxy.kind}-1", source="127.0.0.2")
    running.says(f"404 GET /{proxy.kind}-1 from 127.0.0.1 (127.0.0.2), ")
    proxy.ask(f"/wx/{proxy.kind}-2", source="127.0.0.2", **{"X-Forwarded-For": "203.0.113.7"})
    # nginx adds it, Caddy believes no client.
    named = "203.0.113.7, 127.0.0.2" if proxy.kind == "nginx" else "127.0.0.2"
    running.says(f"404 GET /{proxy.kind}-2 from 127.0.0.1 ({named}), ")


@pytest.mark.parametrize(("query", "name"), [("?url=$arg_url", "a"), ("?$args&v=1", "b")])
def test_what_readme_says_spoils_a_raw_url_does_and_leaves_an_escaped_one_whole(
    running: Server, tmp_path: Path, query: str, name: str
) -> None:
    assert f"`{query}`" in ENGLISH
    lines = f"location /wx/getApi {{ proxy_pass http://127.0.0.1:8060/getApi{query}; }}"
    page = f"https://h5.example.com/{name}?x=1&y=2"
    with proxy_with("nginx", lines, tmp_path, running) as proxy:
        escaped, _ = proxy.ask("/wx/getApi?url=" + quote(page, safe=""))
        assert escaped.headers["Signed-Url"] == page
        raw, _ = proxy.ask(f"/wx/getApi?url={page}", Referer=page)
        assert raw.headers["Signed-Url"] != page
    running.says(f"signed for the page h5.example.com/{name} another url than its own")


def test_the_manuals_rate_limit_lets_a_burst_pass_and_no_more(
    running: Server, tmp_path: Path
) -> None:
    zone, limits = lines_for("nginx", "limit_req").split("# in the location of this server\n")
    lines = lines_for("nginx").replace("access_log off;", limits)
    with proxy_with("nginx", lines, tmp_path, running, upstream=zone) as proxy:
        statuses = [
            proxy.ask("/wx/getApi?url=https://h5.example.com/")[0].status for _ in range(150)
        ]
    assert statuses[:100] == [200] * 100
    assert 429 in statuses
    assert {*statuses} == {200, 429}


def test_restarts_of_one_instance_after_the_other_behind_nginx_fail_no_page(
    start: Start, wechat: Sandbox, redis_server: RedisServer, tmp_path: Path
) -> None:
    upstream, lines = lines_for("nginx", "max_fails"), lines_for("nginx", "location")
    assert "keepalive" in upstream

    def instance(port: int) -> Server:
        running = start(*redis_server.ini, port=port, verbose=False)
        assert running.address == ("127.0.0.1", port)  # it listens
        return running

    instances = [instance(free_port()) for _ in range(2)]
    with proxy_with("nginx", lines, tmp_path, *instances, upstream=upstream) as proxy:
        address = ("127.0.0.1", proxy.port)
        clients = [
            Client(wechat, address, path="/wx/getApi", keeps=bool(number % 2))
            for number in range(8)
        ]
        for client in clients:
            client.start()
        for number in (0, 1):
            before = [client.served for client in clients]
            eventually(
                "every client is served",
                lambda before=before: all(  # type: ignore[misc]
                    client.served > served + 5 or client.lost
                    for client, served in zip(clients, before, strict=True)
                ),
            )
            port = instances[number].address[1]
            assert instances[number].stop() == 0
            instances[number] = instance(port)
        for client in clients:
            client.over.set()
        for client in clients:
            client.join(PATIENCE)
    assert [loss for client in clients for loss in client.lost] == []
