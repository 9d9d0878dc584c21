"""How fast, shown beside what else one could run. Needs wrk (or hey); starts everything itself.

    python tests/benchmark.py [--rounds 5] [--seconds 10] [--peers] [--readme] [--plot [FILE.png]]
    python tests/benchmark.py --scale [--rounds 3] [--seconds 3] [--plot [FILE.png]]

--peers: also what one would pick instead, from npm (node is needed) and from PyPI.
--readme: with the peers; the table goes into the two manuals.
--scale: how the cost grows with the instances and with the connections (scale.py).

In each round the contenders run side by side, idle but for one, and take turns second by second,
in an order that changes: a machine's own ups and downs are longer than that, or many. The rest of
a round is measured of each apart. The table has medians with the lowest and the highest. With two
cores or more, the server under test has one to itself. wrk counts a request that took long for
those, too, that would have been sent meanwhile.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import socket
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tornado
from contenders import (
    CONNECTIONS,
    CORES,
    EXPIRE,
    LIFE,
    PACKAGES,
    PEERS,
    TARGET,
    WHEELS,
    Missing,
    Running,
    Surroundings,
    install_npm,
    install_venv,
    require_wrk,
    surroundings,
)
from figures import Figures, markdown, ratio, replace_block, say, times
from harness import PATIENCE, ROOT, Fault, eventually
from scale import Scale

CALLERS = 1000
WECHAT_TAKES = 0.3
CONTENDERS = {
    "ours": "this server",
    "memory": "this server, no Redis",
    "bare": "bare handler",
    "naive": "naive handler",
}
ROWS = ("steady rps", "steady p99", "expiring p99")
"""The manuals'."""


@dataclass(frozen=True)
class Words:
    """A manual's, around the figures."""

    labels: dict[str, str]
    rows: tuple[str, str, str]
    to: str
    how: str
    peers: str
    throughput: str
    expiring: str
    failed: str
    between: str
    stop: str

    def listed(self, figures: dict[str, str]) -> str:
        return self.between.join(f"{label} {figure}" for label, figure in figures.items())

    def paragraph(self, sentences: list[str]) -> str:
        """In lines, where the language has words to wrap."""
        if self.stop == "。":
            return "\n".join(sentences)
        return textwrap.fill(
            " ".join(sentences), 100, break_on_hyphens=False, break_long_words=False
        )


ENGLISH = Words(
    labels={},
    rows=("requests per second", "p99, ms", f"p99, ms, while tickets expire every {EXPIRE} s"),
    to=" to ",
    how=(
        "Each contender is one process, warmed up. They take turns on the same core, a second each "
        "at {connections} connections; rounds, each with new processes: {rounds}, turns in a "
        "round: {seconds}; the median, with the lowest and the highest. *Bare* is a Tornado "
        "handler that writes a constant; *naive* does a blocking Redis GET for each request and "
        "fetches in the handler. WeChat takes {takes} s for a call while tickets expire."
    ),
    peers="The others keep their ticket in memory.",
    throughput="This server's requests per second as a multiple of others', turn by turn: {}.",
    expiring="Its p99 while tickets expire is {} times what it is otherwise ({}).",
    failed="Failed requests: {}.",
    between=", ",
    stop=".",
)
CHINESE = Words(
    labels={"ours": "本服务", "bare": "空的 Tornado 处理器", "naive": "朴素写法"},
    rows=("每秒请求数", "p99，毫秒", f"每 {EXPIRE} 秒 ticket 过期一次时的 p99，毫秒"),
    to=" 至 ",
    how=(
        "每个对象一个进程，先预热，再在同一个核上轮流运行，每次一秒，{connections} 个连接；"
        "共 {rounds} 轮，每轮换新进程，各运行 {seconds} 次；列出中位数，括号内为最低与最高。\n"
        "“空的”处理器只输出一个常量；“朴素写法”每次请求都阻塞地读一次 Redis，"
        "并在处理器里向微信获取。ticket 过期时，微信的每次应答耗时 {takes} 秒。"
    ),
    peers="其余各项把 ticket 保存在内存中。",
    throughput="逐次相比，本服务的每秒请求数是其他各项的倍数：{}。",
    expiring="ticket 过期时，本服务的 p99 是平时的 {} 倍（{}）。",
    failed="失败的请求：{}。",
    between="，",
    stop="。",
)
WORDS = {"README.md": ENGLISH, ".github/README.zh-CN.md": CHINESE}


class Benchmark:
    """The contenders, and what was measured of them."""

    def __init__(self, around: Surroundings, names: dict[str, str], versions: str) -> None:
        self.around = around
        self.contenders = {name: Figures(name, label) for name, label in names.items()}
        self.versions = versions

    def run(self, rounds: int, seconds: int) -> None:
        for name in self.contenders:
            if name != "bare":
                self.around.assert_signs(name)
        for number in range(rounds):
            say(f"round {number + 1}: all in turn")
            self.steady(seconds)
            for name, contender in self.contenders.items():
                if name != "bare":
                    say(f"round {number + 1}: {contender.label}, expiring and cold")
                    self.expiring(contender)

    def steady(self, seconds: int) -> None:
        """All with a ticket that lives; one at a time is asked."""
        around = self.around
        around.wechat.faults = {}
        around.forget()
        running: dict[str, Running] = {}
        for name, contender in self.contenders.items():
            began = time.monotonic()
            running[name] = around.start(name)
            running[name].first_answer()
            contender.note("start, s", time.monotonic() - began)
            around.warm_up(running[name])
        for _ in range(seconds):
            for name in random.sample(list(running), len(running)):
                for what, figure in around.measure(running[name], seconds=1).items():
                    self.contenders[name].note(f"steady {what}", figure)
        for name, contender in self.contenders.items():
            contender.note("resident, MB", running[name].resident())
            running[name].end()

    def expiring(self, contender: Figures) -> None:
        """One, while its ticket expires again and again; and its start under load."""
        around, name = self.around, contender.name
        around.wechat.faults = dict.fromkeys(("token", "getticket"), Fault(delay=WECHAT_TAKES))
        running = around.run(name, EXPIRE)
        running.first_answer()
        around.warm_up(running)
        for what, figure in around.measure(running, seconds=2 * EXPIRE).items():
            contender.note(f"expiring {what}", figure)
        running.end()

        running = around.run(name)
        took, failed = self.cold_start(running)
        contender.note("cold start of the two calls", took / (2 * WECHAT_TAKES))
        contender.note("cold start calls", around.wechat.calls.total())
        contender.note("cold start failed", failed)
        running.end()

        if name in ("ours", "naive"):
            contender.note("eight instances, calls", self.eight_instances(name))

    def cold_start(self, running: Running) -> tuple[float, int]:
        """Seconds from the first call to WeChat until 1,000 callers have their answer, and how
        many it was not 200 for."""
        began: list[float] = []

        def watch() -> None:
            eventually("WeChat is called", self.around.wechat.calls.total)
            began.append(time.monotonic())

        watching = threading.Thread(target=watch)
        watching.start()
        eventually("the contender listens", running.listens)
        callers = []
        request = f"GET {TARGET} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        for _ in range(CALLERS):
            callers.append(socket.create_connection(("127.0.0.1", running.port), PATIENCE))
            callers[-1].sendall(request)
        failed = 0
        for caller in callers:
            failed += b" 200 " not in caller.recv(65536)
            caller.close()  # some wait for that before they take the next one
        ended = time.monotonic()
        watching.join()
        return ended - began[0], failed

    def eight_instances(self, name: str) -> int:
        """Calls to WeChat that eight instances make between them, each hit at once."""
        self.around.forget()
        instances = [self.around.start(name, LIFE) for _ in range(8)]
        threads = [threading.Thread(target=instance.first_answer) for instance in instances]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for instance in instances:
            instance.end()
        return self.around.wechat.calls.total()

    # What is shown.

    def readme(self, rounds: int, seconds: int, words: Words = ENGLISH) -> str:
        """The manual's paragraph, table and ratios, all from the same rounds."""
        shown = [figures for name, figures in self.contenders.items() if name != "memory"]
        labels = {figures.name: words.labels.get(figures.name, figures.label) for figures in shown}
        ours, *others = shown
        rows = [["", *labels.values()]]
        rows += [
            [row, *(f.cell(what).replace(" to ", words.to) or "–" for f in shown)]
            for row, what in zip(words.rows, ROWS, strict=True)
        ]
        throughput = {labels[f.name]: times(ratio(ours, "steady rps", f)) for f in others}
        expiring = {
            labels[f.name]: times(f.median("expiring p99") / f.median("steady p99"))
            for f in shown
            if "expiring p99" in f.seen
        }
        own = expiring.pop(labels["ours"])
        failed = {
            labels[f.name]: sum(f.seen["steady failed"] + f.seen.get("expiring failed", []))
            for f in shown
        }
        sentences = [
            words.throughput.format(words.listed(throughput)),
            words.expiring.format(own, words.listed(expiring)),
        ]
        if any(failed.values()):
            failures = {label: f"{count:,.0f}" for label, count in failed.items() if count}
            sentences.append(words.failed.format(words.listed(failures)))
        how = [
            words.how.format(
                rounds=rounds, seconds=seconds, connections=CONNECTIONS, takes=WECHAT_TAKES
            ),
            *([words.peers] if shown[-1].name in PEERS else []),
            f"{self.versions}{words.stop}",
        ]
        return "\n\n".join([words.paragraph(how), markdown(rows), words.paragraph(sentences)])

    def table(self) -> str:
        """Markdown: a row for each measurement, a column for each contender."""
        shown = self.contenders.values()
        rows = [["", *(figures.label for figures in shown)]]
        rows += [[what, *(f.cell(what) for f in shown)] for what in self.contenders["ours"].seen]
        return markdown(rows)

    def ratios(self) -> str:
        """What the goals are about."""
        bare, ours, memory, naive = (
            self.contenders[name] for name in ("bare", "ours", "memory", "naive")
        )
        lines = {
            "throughput, this server / bare (goal: 0.95 or more)": ratio(ours, "steady rps", bare),
            "throughput, this server / naive (goal: 2.8 or more)": ratio(ours, "steady rps", naive),
            "throughput, bare / naive": ratio(bare, "steady rps", naive),
            "throughput, this server without Redis / with it": ratio(memory, "steady rps", ours),
            "p99 through expiries / steady, this server (goal: 1.2 or less)": (
                ours.median("expiring p99") / ours.median("steady p99")
            ),
            "p99 through expiries / steady, naive": (
                naive.median("expiring p99") / naive.median("steady p99")
            ),
            "cold start of 1,000 / the two calls' own time (goal: 1.2 or less)": ours.median(
                "cold start of the two calls"
            ),
            "resident MB, this server (goal: 44 or less)": ours.median("resident, MB"),
        }
        for figures in self.contenders.values():
            if figures.name in PEERS:
                what = f"this server / {figures.label}"
                lines[f"throughput, {what}"] = ratio(ours, "steady rps", figures)
                lines[f"CPU for a request, {what}"] = ratio(
                    ours, "steady cpu, s for 1,000", figures
                )
        return "\n".join(f"{value:6.2f}  {name}" for name, value in lines.items())

    def plot(self, path: Path) -> None:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
        shown = list(self.contenders.values())
        labels = [figures.label for figures in shown]
        axes[0].barh(labels, [f.median("steady rps") for f in shown], color="#07a150")
        axes[0].set_title("requests per second, one core")
        for what, colour in (("steady p99", "#9ca3af"), ("expiring p99", "#d9363e")):
            values = [f.median(what) for f in shown]
            height, shift = 0.38, -0.2 if what.startswith("steady") else 0.2
            places = [place + shift for place in range(len(labels))]
            axes[1].barh(places, values, height, color=colour, label=what.replace("p99", ""))
        axes[1].set_yticks(range(len(labels)), [""] * len(labels))
        axes[1].set_xscale("log")
        axes[1].set_xlim(left=1)
        axes[1].set_title("p99, ms (log)")
        axes[1].legend()
        for axis in axes:
            axis.invert_yaxis()
        figure.savefig(path, dpi=110)


def peers() -> tuple[dict[str, str], list[str], list[str]]:
    """Those that run here, with their versions, and why others don't."""
    there: dict[str, str] = {}
    versions: list[str] = []
    missing: list[str] = []
    for runtime, install, packages, kind in (
        ("Node", install_npm, PACKAGES, "express"),
        ("", install_venv, WHEELS, "flask"),
    ):
        labels = {name: label for name, label in PEERS.items() if name.startswith(kind)}
        try:
            version = install()
        except Missing as why:
            missing.append(f"without {' and without '.join(labels.values())}: {why}")
            continue
        there |= labels
        versions += [f"{runtime} {version}"] if runtime else []
        versions += [f"{package} {pin}" for package, pin in packages.items()]
    return there, versions, missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, help="5, with --scale 3")
    text = "of load on each contender in a round (10); with --scale for each measurement (3)"
    parser.add_argument("--seconds", type=int, help=text)
    parser.add_argument("--peers", action="store_true", help="also what one would pick instead")
    parser.add_argument(
        "--readme", action="store_true", help="writes the manuals' table, with peers"
    )
    parser.add_argument("--scale", action="store_true", help="more instances, more connections")
    parser.add_argument("--plot", type=Path, nargs="?", const=Path(), help="in .github, or FILE")
    given = parser.parse_args()
    rounds = given.rounds or (3 if given.scale else 5)
    seconds = given.seconds or (3 if given.scale else 10)
    require_wrk(or_hey=not given.scale)
    names, missing = dict(CONTENDERS), list[str]()
    versions = [f"Python {platform.python_version()}", f"Tornado {tornado.version}"]
    if given.peers or given.readme:
        there, theirs, missing = peers()
        names, versions = names | there, versions + theirs
        for why in missing:
            say(why)
        if missing and (given.readme or not there):
            print("README's table needs all peers" if there else "no peer", file=sys.stderr)
            return 2
    versions.append(f"{len(CORES) or os.cpu_count()} cores")
    with surroundings() as around:
        measured = Scale(around) if given.scale else Benchmark(around, names, ", ".join(versions))
        measured.run(rounds, seconds)
    print(measured.readme(rounds, seconds))
    if isinstance(measured, Benchmark):
        print(f"\n{measured.table()}\n\n{measured.ratios()}")
    else:
        print("\n" + ", ".join(versions))
    for why in missing:
        print(why)
    if given.readme and isinstance(measured, Benchmark):
        for name, words in WORDS.items():
            text = measured.readme(rounds, seconds, words)
            replace_block(ROOT / name, "benchmark", text)
    if given.plot is not None:
        name = "scale.png" if given.scale else "benchmark.png"
        measured.plot(given.plot if given.plot.name else ROOT / ".github" / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
