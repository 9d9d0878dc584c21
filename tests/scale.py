"""How the cost of this server grows: with instances on one Redis, and with open connections."""

from __future__ import annotations

import resource
import socket
import threading
import time
from pathlib import Path

from contenders import CONNECTIONS, TARGET, Surroundings
from figures import Figures, rows_of, say
from harness import PATIENCE

INSTANCES = (1, 2, 4, 8, 16)
IDLE = (10, 100, 1000, 4000)
LOOK = 10
"""Seconds in which each instance looks at Redis once."""
CPU = "cpu, s for 1,000"
OF_INSTANCES = {
    "instances": "",
    "calls to WeChat, from the start": "calls",
    "Redis commands a second": "commands",
    "the same, for each": "commands each",
    "requests per second, all on one core": "rps",
    "CPU for 1,000 requests, s": CPU,
    "p99, ms": "p99",
}
OF_CONNECTIONS = {
    "open connections": "",
    "p99, ms": "p99",
    "resident, MB": "resident",
    "requests per second": "rps",
    "CPU for 1,000 requests, s": CPU,
}


class Scale:
    """What was measured for each size."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.instances = {count: Figures(str(count), f"{count}") for count in INSTANCES}
        self.connections = {
            idle: Figures(str(idle), f"{idle:,} idle, {CONNECTIONS} busy") for idle in IDLE
        }
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def run(self, rounds: int, seconds: int) -> None:
        for number in range(rounds):
            back = -1 if number % 2 else 1
            for count in INSTANCES[::back]:
                say(f"round {number + 1}: {count} instances")
                self.measure_instances(self.instances[count], count, max(seconds, LOOK))
            for idle in IDLE[::back]:
                say(f"round {number + 1}: {idle} idle connections")
                self.measure_connections(self.connections[idle], idle, seconds)

    def measure_instances(self, figures: Figures, count: int, seconds: int) -> None:
        """All on the one core, under load at once."""
        around = self.around
        around.forget()
        running = [around.start("ours") for _ in range(count)]
        waiting = [threading.Thread(target=instance.first_answer) for instance in running]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        around.warm_up(*running)
        with around.redis.watching() as sent:
            began = time.monotonic()
            seen = around.measure(*running, seconds=seconds)
            took = time.monotonic() - began
            figures.note("commands", len(sent()) / took)
        figures.note("commands each", figures.seen["commands"][-1] / count)
        figures.note("calls", around.wechat.calls.total())
        for what in ("rps", CPU, "p99"):
            figures.note(what, seen[what])
        assert not seen["failed"], f"{seen['failed']} failed"
        for instance in running:
            instance.end()

    def measure_connections(self, figures: Figures, idle: int, seconds: int) -> None:
        """That many were used once and are kept; the load comes on others."""
        running = self.around.run("ours")
        running.first_answer()
        request = f"GET {TARGET} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        kept = []
        for _ in range(idle):
            kept.append(socket.create_connection(("127.0.0.1", running.port), PATIENCE))
            kept[-1].sendall(request)
            assert b" 200 " in kept[-1].recv(65536)
        self.around.warm_up(running)
        seen = self.around.measure(running, seconds=seconds)
        for what in ("p99", "rps", CPU):
            figures.note(what, seen[what])
        figures.note("resident", running.resident())
        assert not seen["failed"], f"{seen['failed']} failed"
        for connection in kept:
            assert still_open(connection), "the server closed an idle connection"
            connection.close()
        running.end()

    def readme(self, rounds: int, seconds: int) -> str:
        """Two tables."""
        how = (
            f"Rounds: {rounds}; {max(seconds, LOOK)} s of load on all instances at once, "
            f"{seconds} s for the connections; the median, with the lowest and the highest"
        )
        tables = [
            rows_of(sizes.values(), columns)
            for columns, sizes in (
                (OF_INSTANCES, self.instances),
                (OF_CONNECTIONS, self.connections),
            )
        ]
        return "\n\n".join([how, *tables])

    def plot(self, path: Path) -> None:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
        panels = (
            (self.instances, {"calls": "calls to WeChat", "commands": "Redis commands a second"}),
            (self.instances, {CPU: "CPU for 1,000 requests, s"}),
            (self.connections, {"p99": "p99, ms"}),
            (self.connections, {"resident": "resident, MB"}),
        )
        for axis, (sizes, lines) in zip(axes, panels, strict=True):
            for (what, label), colour in zip(lines.items(), ("#07a150", "#d9363e"), strict=False):
                middle = [f.median(what) for f in sizes.values()]
                low = [min(f.seen[what]) for f in sizes.values()]
                high = [max(f.seen[what]) for f in sizes.values()]
                axis.plot(list(sizes), middle, "o-", color=colour, label=label)
                axis.fill_between(list(sizes), low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set_ylim(bottom=0)
            axis.set_title(" / ".join(lines.values()) if len(lines) == 1 else "")
            axis.set_xlabel("instances" if sizes is self.instances else "idle connections")
            if len(lines) > 1:
                axis.legend()
        figure.savefig(path, dpi=110)


def still_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
