"""Three servers on one real Redis and the sandbox, under load, while everything breaks in turn.

    python tests/soak.py [--minutes 2] [--seed N] [--sentinel]

With `--sentinel` it is a Sentinel set, and what kills Redis is a fail-over.
Exit status 1 when a signature was wrong, or a request failed while a usable ticket existed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import redis
from harness import (
    CHECKED_KEY,
    PAGE,
    TICKET_KEY,
    Fault,
    RedisServer,
    Sandbox,
    Server,
    eventually,
    fetch,
    free_port,
    marker,
    signature_of,
    unwritable,
    write_ini,
)
from topologies import Sentinels

from wechat_sign.settings import Limits

EXPIRE, RECHECK, TIMEOUT = 90, 2, 0.5
"""Seconds; a ticket outlives a back-off, so that no failure has that for an excuse."""
NOTICED = RECHECK + 2 * Limits().look_interval + 4 * TIMEOUT + 2
"""Seconds after which a ticket rotated early must be out of use while all is well."""
REDIS_NOTICED = 4
"""Seconds within which an instance that has no ticket finds one in a Redis that is back: it
leaves that alone for 2 s, then looks again, and a look takes 1 s at the most."""
PAUSE = 61
"""Seconds for which an instance does not ask WeChat after a refusal that a person must mend, and
again where that is followed by another failure."""


class Instance:
    """One server process that is killed and started again, and the client that loads it."""

    def __init__(self, soak: Soak, ini: Path) -> None:
        self.soak = soak
        self.port = free_port()
        self._command = ["--config", str(ini), "--address", "127.0.0.1", "--port", str(self.port)]
        self.start()
        self.load = threading.Thread(target=self._load, daemon=True)

    def start(self) -> None:
        self.server = Server(*self._command)
        self.url = f"{self.server.url}/getApi?url={PAGE}"
        self.gone = self.stopping = self.warm = False

    def end(self, *, gently: bool) -> None:
        if not gently:
            self.gone = True
            self.server.kill()
            return
        self.stopping = True
        self.server.process.terminate()
        self.gone = self.server.wait() == 0
        if not self.gone:
            self.soak.failures.append(f"instance {self.port} did not stop in peace")

    def _load(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while not self.soak.over.is_set():
            time.sleep(0.01)
            if self.gone:
                connection.close()
                continue
            server, warm, began = self.server, self.warm, time.monotonic()
            new = connection.sock is None
            try:
                connection.request("GET", f"/getApi?url={PAGE}")
                answer = connection.getresponse()
                body = json.loads(answer.read())
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                reset = new and self.stopping  # in the kernel's queue, with the listener
                accepted = not isinstance(error, ConnectionRefusedError) and not reset
                if accepted and not self.gone and server is self.server:
                    self.soak.failures.append(f"instance {self.port}: {error!r}")
                continue
            if server is self.server:
                self.warm = self.warm or answer.status == 200
                self.soak.note(self, answer.status, body, began, warm)


class Soak:
    """What is under test, what was seen, and what is broken just now."""

    def __init__(self, seed: int, folder: Path, *, sentinel: bool = False) -> None:
        self.random = random.Random(seed)
        self.over = threading.Event()
        self.sentinels = Sentinels() if sentinel else None
        self.redis = self.sentinels.primary if self.sentinels else RedisServer()
        self.wechat = Sandbox().start()
        self.statuses: Counter[int] = Counter()
        self.injected: Counter[str] = Counter()
        self.failures: list[str] = []
        self.wrong = 0
        self.excused = 0
        self.in_redis_since = float("inf")
        self.refused_at = float(-PAUSE)
        self.tickets = {self.wechat.ticket: float("inf")}
        """Each that there was, and from when on it is wrong."""
        lines = [f"timeout = {TIMEOUT}", "[redis]", f"url = {(self.sentinels or self.redis).url}"]
        lines += [f"expire = {EXPIRE}", f"recheck = {RECHECK}"]
        ini = write_ini(folder / "config.ini", self.wechat, *lines)
        self.instances = [Instance(self, ini) for _ in range(3)]
        self.began = time.monotonic()
        self._lock = threading.Lock()

    def note(self, instance: Instance, status: int, body: Any, began: float, warm: bool) -> None:
        with self._lock:
            self.statuses[status] += 1
            now = time.monotonic()
            if status == 200:
                valid = [ticket for ticket, wrong in self.tickets.items() if began < wrong]
                signatures = [signature_of(body, ticket, PAGE) for ticket in valid]
                self.wrong += body["signature"] not in signatures
            elif warm or now - self.in_redis_since > REDIS_NOTICED:
                self.failures.append(
                    f"{now - self.began:.1f} s, instance {instance.port}, warm: {warm}, "
                    f"in Redis for {now - self.in_redis_since:.1f} s: {status} {body}"
                )
            else:
                self.excused += 1

    def watch_redis(self) -> None:
        """Notes since when Redis has had a usable ticket for an instance that has none."""
        while not self.over.is_set():
            try:
                with self.redis.client(timeout=0.3) as client:
                    there = client.type(TICKET_KEY) == "string" and client.pttl(TICKET_KEY) > 500
            except redis.RedisError:
                there = False
            if not there:
                self.in_redis_since = float("inf")
            elif self.in_redis_since == float("inf"):
                self.in_redis_since = time.monotonic()
            time.sleep(0.05)

    def wait(self, low: float, high: float) -> None:
        self.over.wait(self.random.uniform(low, high))

    # The faults. Each breaks something, waits, mends it, and returns.

    def redis_killed(self) -> None:
        """With Sentinel what was the primary comes back as a replica."""
        old = self.redis
        old.kill()
        if self.sentinels:
            self.redis = self.sentinels.wait_for_promotion(old)
        self.wait(1, 5)
        self.sentinels.bring_back(old) if self.sentinels else old.start()

    def redis_hangs(self) -> None:
        self.redis.pause()
        self.wait(1, 5)
        self._resume_redis()

    def _resume_redis(self) -> None:
        old = self.redis
        if self.sentinels:  # by now they have promoted another, or are about to
            self.redis = self.sentinels.wait_for_promotion(old)
        old.resume()
        if self.sentinels:
            self.sentinels.demote(old)

    def _unwritable(self, how: str) -> None:
        broken, mended = unwritable(self.redis)[how]
        self.redis.run(*broken)
        self.wait(2, 6)
        self.redis.run(*mended)

    def redis_key_spoilt(self) -> None:
        self.redis.run("DEL", TICKET_KEY)
        self.redis.run(*self.random.choice(SPOILT))
        for key in self.redis.run("KEYS", "wechat:*:[aj]*"):
            self.redis.run("PERSIST", key)

    def redis_goes_back(self) -> None:
        """As a replica does that lagged, or a restart from an old dump."""
        older = self.random.choice(list(self.tickets))
        self.redis.run("SET", TICKET_KEY, older, "EX", EXPIRE // 2)
        self.redis.run("SET", CHECKED_KEY, marker(older), "EX", RECHECK)
        self.over.wait(Limits().look_interval + 2)  # no instance is cold while it is there

    def wechat_refuses(self) -> None:
        self.refused_at = time.monotonic()
        self._break_wechat(Fault(errcode=self.random.choice((40164, 45009, 45011, 40125))))

    def _break_wechat(self, fault: Fault) -> None:
        endpoints = self.random.choice((["token"], ["getticket"], ["token", "getticket"]))
        self.wechat.faults = dict.fromkeys(endpoints, fault)
        self.wait(2, 8)
        self._mend_wechat()

    def _mend_wechat(self) -> None:
        self.wechat.faults = {}
        if time.monotonic() < self.refused_at + PAUSE + 10:  # the pause after it doubles
            self.refused_at = time.monotonic()

    def ticket_rotated(self) -> None:
        """Waits until all may ask WeChat again, and then leaves all well for a while."""
        if time.monotonic() < self.refused_at + PAUSE:
            self.wechat.replace_token()
            return
        with self._lock:
            self.tickets[self.wechat.ticket] = time.monotonic() + NOTICED
            self.wechat.rotate_ticket()
            self.tickets[self.wechat.ticket] = float("inf")
        self.over.wait(NOTICED + 1)

    def instance_killed(self) -> None:
        instance = self.random.choice(self.instances)
        instance.end(gently=False)
        self.wait(0, 1)
        instance.start()

    def instance_told_to_stop(self) -> None:
        instance = self.random.choice(self.instances)
        instance.end(gently=True)
        instance.start()

    def instance_sleeps(self) -> None:
        instance = self.random.choice(self.instances)
        instance.server.process.send_signal(signal.SIGSTOP)
        self.wait(1, 6)
        instance.server.process.send_signal(signal.SIGCONT)

    def killed_while_all_is_down(self) -> None:
        """Does the one thing that no server can sign through; it has to end."""
        self.redis.pause()
        self.wechat.faults = dict.fromkeys(("token", "getticket"), Fault(hang_up=True))
        self.instance_killed()
        self.wait(1, 3)
        self._mend_wechat()
        self._resume_redis()

    def run(self, seconds: float) -> None:
        faults: dict[str, Callable[[], object]] = {
            "Redis killed": self.redis_killed,
            "Redis hangs": self.redis_hangs,
            "Redis flushed": lambda: self.redis.run("FLUSHALL"),
            "Redis full": lambda: self._unwritable("full"),
            "Redis read-only": lambda: self._unwritable("read-only"),
            "key spoilt": self.redis_key_spoilt,
            "key expires": lambda: self.redis.run("PEXPIRE", TICKET_KEY, 100),
            "marker lost": lambda: self.redis.run("DEL", CHECKED_KEY),
            "Redis goes back": self.redis_goes_back,
            "WeChat fails": lambda: self._break_wechat(self.random.choice(PASSING)),
            "WeChat refuses": self.wechat_refuses,
            "token replaced": self.wechat.replace_token,
            "ticket rotated": self.ticket_rotated,
            "instance killed": self.instance_killed,
            "instance told to stop": self.instance_told_to_stop,
            "instance sleeps": self.instance_sleeps,
            "killed while Redis and WeChat are down": self.killed_while_all_is_down,
        }
        for instance in self.instances:
            fetch(instance.url)
            instance.load.start()
        threading.Thread(target=self.watch_redis, daemon=True).start()
        self.began = time.monotonic()
        queue: list[str] = []
        while time.monotonic() - self.began < seconds:
            if not queue:
                queue = self.random.sample(list(faults), len(faults))
            name = queue.pop()
            at, so_far = time.monotonic() - self.began, self.statuses.total()
            print(f"{at:6.1f} s  {so_far:7d} requests  {len(self.failures)} failed  {name}")
            self.injected[name] += 1
            faults[name]()
            self.wait(0.5, 2)
        for instance in self.instances:  # however it was broken, it signs again by itself
            again, url = f"instance {instance.port} signs again", instance.url
            eventually(again, lambda url=url: fetch(url)[0] == 200, patience=2 * PAUSE + 20)  # type: ignore[misc]
        self.over.set()
        for instance in self.instances:
            instance.load.join(60)
            instance.end(gently=True)

    def close(self) -> None:
        """Leaves nothing running, however the run ended."""
        self.over.set()
        for instance in self.instances:
            instance.gone = True
            instance.server.kill()
        self.wechat.stop()
        (self.sentinels or self.redis).stop()

    def table(self) -> str:
        rows = {
            "requests": self.statuses.total(),
            "answers by status": dict(self.statuses),
            "wrong signatures": self.wrong,
            "avoidable failures": len(self.failures),
            "failures with no ticket anywhere": self.excused,
            "calls to WeChat": dict(self.wechat.calls),
            "faults injected": dict(self.injected),
        }
        return "\n".join(f"{name:32}  {value}" for name, value in rows.items())


SPOILT: list[tuple[Any, ...]] = [("HSET", TICKET_KEY, "a", "b")]
SPOILT += [("SET", TICKET_KEY, value) for value in ("", b"\xff\xfe", "undefined")]
PASSING = [Fault(hang_up=True), Fault(delay=0.3), Fault(delay=2), Fault(errcode=-1)]
PASSING += [Fault(errcode=-1000), Fault(status=502, body=b"<html>"), Fault(body=b"<html>portal")]
PASSING += [Fault(body=b'{"access_token": "x", "tick'), Fault(body=b'{"ticket": "x"}')]
PASSING += [Fault(body=b'{"errcode": 0, "ticket": "", "access_token": "", "expires_in": 7200}')]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--sentinel", action="store_true", help="a Sentinel set in place of one")
    given = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"seed {given.seed}, {given.minutes} minutes")
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(given.seed, Path(folder), sentinel=given.sentinel)
        try:
            soak.run(given.minutes * 60)
        except KeyboardInterrupt:
            print("interrupted; so far:")
        finally:
            soak.close()
    print("\n" + soak.table())
    for failure in soak.failures[:20]:
        print("failed:", failure)
    return 1 if soak.wrong or soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
