"""The manual's own lines for nginx and Caddy, in front of the real server."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
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
    eventually,
    free_port,
    unavailable,
)
from manuals import ENGLISH
from test_process import restart_under_load

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


def lines_for(kind: str, containing: str = "") -> str:
    """The manual's, the first that contain this."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", ENGLISH, re.DOTALL)
    lines: str = next(block for block in blocks if containing in block)
    assert containing == "limit_req" or "127.0.0.1:8060" in lines
    return lines


@dataclass(frozen=True)
class Proxy:
    """A proxy on this port of 127.0.0.1."""

    kind: str
    port: int

    def ask(
        self, target: str, method: str = "GET", source: str = "127.0.0.1", **headers: str
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """The answer to a target that is sent as it is, from an address of this machine."""
        here = ("127.0.0.1", self.port)
        connection = http.client.HTTPConnection(*here, PATIENCE, source_address=(source, 0))
        connection.request(method, target, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer, body


@contextmanager
def proxy_with(
    kind: str, lines: str, folder: Path, *behind: Server, upstream: str = ""
) -> Iterator[Proxy]:
    """One with such lines in front of a running server, or of several with the lines for nginx's
    `upstream`."""
    program = shutil.which(kind) or shutil.which(kind, path="/usr/sbin")
    if not program:
        unavailable(f"no {kind} for this test: install it, for example with apt-get install {kind}")
    proxy, config, log = Proxy(kind, free_port()), folder / kind, folder / "log"
    own, _, lines = lines.rpartition("# in the server of your pages\n")
    upstream = upstream if "upstream " in upstream else own + upstream
    filled = {"folder": folder, "port": proxy.port, "lines": lines, "upstream": upstream}
    text = {"nginx": NGINX, "caddy": CADDY}[kind].format(**filled)
    for number, server in enumerate(behind, 8060):
        text = text.replace(f"127.0.0.1:{number}", f"127.0.0.1:{server.address[1]}")
    config.write_text(text)
    arguments = ["-p", str(folder), "-c", str(config)]
    if kind == "caddy":
        arguments = ["run", "--adapter", "caddyfile", "--config", str(config)]
    environ = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with log.open("w") as stderr:
        started = subprocess.Popen([program, *arguments], env=environ, stderr=stderr)

    def answers() -> bool:
        assert started.poll() is None, log.read_text()
        with suppress(OSError):
            return bool(proxy.ask("/"))
        return False

    try:
        eventually(f"{kind} answers", answers)
        yield proxy
    finally:
        started.terminate()
        started.wait(PATIENCE)


@pytest.fixture(scope="module", params=["nginx", "caddy"])
def proxy(
    request: pytest.FixtureRequest, shared: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp(request.param)
    with proxy_with(request.param, lines_for(request.param), folder, shared) as started:
        yield started


def test_all_of_the_server_is_served(proxy: Proxy) -> None:
    types = {
        "/wx/getApi?url=https%3A%2F%2Fh5.example.com%2F": "application/json",
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
    assert proxy.ask("/wx/getapi")[0].status == 404
    answer, body = proxy.ask("/wx/wechat-sign.js", **{"Accept-Encoding": "gzip"})
    assert gzip.decompress(body) == SERVED.text
    unchanged = {"If-None-Match": answer.headers["ETag"]}
    assert proxy.ask("/wx/wechat-sign.js", **unchanged)[0].status == 304


@pytest.mark.parametrize("escaped", [True, False], ids=["escaped", "raw"])
def test_a_pages_url_arrives_as_it_was_sent(proxy: Proxy, escaped: bool) -> None:
    signed = 0
    for page in urls.pages(200):
        query = "url=" + (quote(page, safe="") if escaped else page)
        answer, body = proxy.ask(f"/wx/getApi?{query}")
        if answer.status == 200:
            signed += 1
            assert answer.headers["Signed-Url"] == page[:2048]
        else:
            with pytest.raises(BadPageUrl) as refused:
                page_url(query.encode())
            assert json.loads(body)["error"] == str(refused.value)
    assert signed > 180


def test_the_log_has_the_clients_address_which_it_can_not_hide(
    proxy: Proxy, shared: Server
) -> None:
    proxy.ask(f"/wx/{proxy.kind}-1", source="127.0.0.2")
    shared.says(f"404 GET /{proxy.kind}-1 from 127.0.0.1 (X-Forwarded-For 127.0.0.2), ")
    proxy.ask(f"/wx/{proxy.kind}-2", source="127.0.0.2", **{"X-Forwarded-For": "203.0.113.7"})
    # nginx adds it, Caddy believes no client.
    named = "203.0.113.7, 127.0.0.2" if proxy.kind == "nginx" else "127.0.0.2"
    shared.says(f"404 GET /{proxy.kind}-2 from 127.0.0.1 (X-Forwarded-For {named}), ")


def test_the_manuals_rate_limit_lets_a_burst_pass_and_no_more(
    shared: Server, tmp_path: Path
) -> None:
    zone, limits = lines_for("nginx", "limit_req").split("# in the location of this server\n")
    lines = lines_for("nginx").replace("access_log off;", limits)
    with proxy_with("nginx", lines, tmp_path, shared, upstream=zone) as proxy:
        statuses = [proxy.ask("/wx/wechat-sign.js")[0].status for _ in range(150)]
    assert statuses[:100] == [200] * 100
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

    def restart(number: int) -> None:
        assert instances[number].stop() == 0
        instances[number] = instance(instances[number].address[1])

    with proxy_with("nginx", lines, tmp_path, *instances, upstream=upstream) as proxy:
        clients = [
            Client(wechat, ("127.0.0.1", proxy.port), path="/wx/getApi", keeps=bool(n % 2))
            for n in range(8)
        ]
        restart_under_load(clients, [partial(restart, 0), partial(restart, 1)])
