"""Mutated requests by the thousand: whatever is sent, the server answers, and shows no harm.

    .venv/bin/python tests/fuzz.py [--requests 50000] [--seed N]

What is sent depends on the seed alone. Exit status 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import PAGE, PATIENCE, Sandbox, Server, assert_signs, eventually, write_ini

CONNECTIONS = 8
GROWTH = 8 * 1024
"""KiB of memory that may be more after a run than after its first part."""
PAGE_HOSTS = "page_hosts = h5.example.com, *.example.net"
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [(A-Z]")
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) ")
LAST = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
TARGETS = b"""
    / /healthz /wechat-sign.js /getApi /nothing * https://[::1]:8060/healthz /../../etc/passwd
    //evil.example.com/getApi /getApi?url=http://a.example.net/&x=1&_=17 /%00%0d%0aX-Injected:1
    /getApi?url=https://h5.example.com/\xe4\xb8\xad
    /getApi?url=https%253A%252F%252Fh5.example.com%252F
""".split()
QUOTED = quote(PAGE, safe="").encode()
TARGETS += [b"/getApi?url=" + PAGE.encode(), b"/getApi?url=" + QUOTED]
TARGETS += [b"http://sign.example.com/getApi?url=" + QUOTED]
METHODS = [b"GET"] * 40 + [b"HEAD", b"OPTIONS"] * 8
METHODS += b"POST PUT DELETE PATCH CONNECT TRACE PRI get".split() + [b"", b"G ET"]
VERSIONS = [b"HTTP/1.1"] * 60 + [b"HTTP/1.0"] * 4
VERSIONS += [b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"", b"\x00"]
NAMES = b"""
    Origin Referer User-Agent X-Forwarded-For X-Real-IP Cookie Accept-Encoding If-None-Match
    If-Modified-Since Range Connection Access-Control-Request-Method Access-Control-Request-Headers
    Upgrade Content-Type Content-Encoding Forwarded Sec-Fetch-Mode TE X-Any
""".split()
FRAMING = [b"Content-Length", b"Transfer-Encoding", b"Host", b"Expect", b"X y", b""]
VALUES = b"""|a|0|-1|99999999999999999999|5, 5|chunked|gzip, deflate;q=0|gzip;q=0.000|*|\
"*", W/"x"|close|keep-alive, Upgrade|100-continue|null|https://h5.example.com|X-One, X-Two|\
https://a.example.net:443|https://h5.example.com@evil.example.com|https://h5.example.com/a?x=1#y|\
203.0.113.7, 127.0.0.1|::ffff:1.2.3.4%eth0, 127.0.0.1|multipart/form-data; boundary=x|\
application/x-www-form-urlencoded|iPhone \xc2\x9b31m \xe2\x80\xae \x85""".split(b"|")
BODIES = [b"", b"url=https://h5.example.com/", b"{}", b"5\r\nhello\r\n0\r\n\r\n", b"0\r\n\r\n"]
ODD = [b"\x00", b"\r", b"\n", b"\r\n", b" ", b"\t", b"%", b"%zz", b"%0d%0a", b"\x7f", b"\x85"]
ODD += [b"\x9b", b"\xff", b"\x1b[2J", b"\r\n X-Folded: 1", b"\xe2\x80\xae", b"\xed\xa0\x80"]
ODD += [b"?", b"#", b"&url=", b"\\", b"@", b":"]
ENDS = ("asks to close",) * 7 + ("closes its half", "closes its half", "leaves", "resets")
"""How a connection ends."""


def request(rng: random.Random) -> bytes:
    """One request, more or less; a part of them is spoilt at random places as well."""
    target = rng.choice(TARGETS)
    if rng.random() < 0.2:
        target += rng.choice(ODD) * rng.choice((1, 1, 1, 7, 5000))
    head = b" ".join((rng.choice(METHODS), target, rng.choice(VERSIONS)))
    if rng.random() < 0.98:
        head += b"\r\nHost: sign.example.com"
    for name in rng.choices(NAMES, k=rng.randrange(5)) + rng.choices(FRAMING, k=rng.random() < 0.1):
        value = rng.choice(VALUES) + (rng.choice(ODD) if rng.random() < 0.05 else b"")
        head += b"\r\n" + name + b": " + value * rng.choice((1,) * 60 + (2, 2000))
    body = rng.choice(BODIES) if rng.random() < 0.05 else b""
    if body and rng.random() < 0.5:
        head += b"\r\nContent-Length: %d" % len(body)
    sent = head + rng.choice((b"\r\n\r\n",) * 50 + (b"\n\n", b"\r\n", b"\r\r")) + body
    while rng.random() < 0.15:
        sent = spoilt(sent, rng)
    return sent


def spoilt(sent: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(sent) + 1)
    to = at + rng.choice((0, 1, 1, 4, 40))
    instead = rng.choice((b"", rng.choice(ODD), rng.randbytes(3), sent[at:to] * 2))
    return sent[:at] + instead + sent[to:]


class Fuzz:
    """One server under fire, what it answered, and what is wrong with that."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        self.statuses: Counter[int] = Counter()
        self.ends: Counter[str] = Counter()
        self.problems: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        """KiB of memory and number of file descriptors: after the first part, and at the end."""
        self.wechat = Sandbox().start()
        ini = write_ini(folder / "config.ini", self.wechat, "[jssdk]", PAGE_HOSTS)
        command = ["--config", str(ini), "--address", "127.0.0.1", "--port", "0", "--verbose"]
        self.server = Server(*command)
        self.address = self.server.address

    def run(self, requests: int) -> None:
        assert_signs(self.server, self.wechat)
        generators = [random.Random(f"{self.seed} {number}") for number in range(CONNECTIONS)]
        first = requests // 5
        for part in (first, requests - first):
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                number = part // CONNECTIONS + 1
                list(pool.map(self._send, generators, CONNECTIONS * [number]))
            self._measure()
        assert_signs(self.server, self.wechat)
        self._judge()

    def _send(self, rng: random.Random, requests: int) -> None:
        while requests > 0:
            sent = [request(rng) for _ in range(min(requests, rng.choice((1, 1, 1, 1, 2, 3, 8))))]
            requests -= len(sent)
            self._exchange(b"".join(sent), rng.choice(ENDS))

    def _exchange(self, sent: bytes, end: str) -> None:
        """Sends it all on a new connection, which then ends in one of four ways."""
        self.ends[end] += 1
        answer = b""
        with socket.create_connection(self.address, PATIENCE) as connection:
            with suppress(OSError):  # the server may have closed it by now
                connection.sendall(sent + LAST * (end == "asks to close"))
                if end == "closes its half":
                    connection.shutdown(socket.SHUT_WR)
            if end == "resets":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if end in ("resets", "leaves"):
                return
            try:
                while received := connection.recv(1024 * 1024):
                    answer += received
            except TimeoutError:
                self.problems.append(f"no end of the answer to {sent[:500]!r}")
            except ConnectionError:
                pass
        self._note(sent, answer)

    def _note(self, sent: bytes, answer: bytes) -> None:
        statuses = [int(status) for status in STATUS.findall(answer)]
        self.statuses.update(statuses)
        if max(statuses, default=0) >= 500:
            self.problems.append(f"{statuses} answers {sent[:500]!r}")
        if b"\nX-Injected" in answer:
            self.problems.append(f"a header is injected by {sent[:500]!r}")
        if any(credential.encode() in answer for credential in self.wechat.issued):
            self.problems.append(f"a credential is in the answer to {sent[:500]!r}")

    def _measure(self) -> None:
        pid = self.server.process.pid
        files = Path(f"/proc/{pid}/fd")

        def number() -> int:
            return len(os.listdir(files)) if files.exists() else 0

        with suppress(AssertionError):  # it is judged below
            eventually("all are closed", lambda: number() <= 8)
        memory = subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])  # noqa: S607
        self.sizes.append((int(memory), number()))

    def _judge(self) -> None:
        (memory, files), (memory_now, files_now) = self.sizes
        if memory_now > memory + GROWTH:
            self.problems.append(f"memory grew from {memory} to {memory_now} KiB")
        if files_now > files:
            self.problems.append(f"file descriptors grew from {files} to {files_now}")
        for line in self.server.output.split("\n")[:-1]:
            if any(credential in line for credential in self.wechat.issued):
                self.problems.append("a credential is in the log")
            elif not LINE.match(line) or " ERROR " in line[:40] or "Traceback" in line:
                self.problems.append(f"in the log: {line[:500]!r}")
            elif not line.isprintable():
                self.problems.append(f"not printable in the log: {line[:500]!r}")


def fuzz(requests: int, seed: int) -> Fuzz:
    with tempfile.TemporaryDirectory() as folder:
        run = Fuzz(seed, Path(folder))
        try:
            run.run(requests)
        finally:
            run.server.kill()
            run.wechat.stop()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    print(f"seed {given.seed}, {given.requests} requests", flush=True)
    began = time.monotonic()
    run = fuzz(given.requests, given.seed)
    for counts in (run.statuses, run.ends):
        print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    print(f"KiB of memory and descriptors, after a fifth and at the end: {run.sizes}")
    print(f"{len(run.problems)} problems in {time.monotonic() - began:.0f} s")
    for problem in run.problems[:20]:
        print("wrong:", problem)
    return 1 if run.problems else 0


if __name__ == "__main__":
    sys.exit(main())
