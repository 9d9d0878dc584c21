"""Whether anything grows in an hour of load: latencies, memory, calls. Needs wrk.

    python tests/steady.py [--minutes 60]

In each minute this server has 45 s of load and the bare handler 15, on the same core: what both
show is the machine's. A row for each quarter, with the median and the lowest and the highest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contenders import Surroundings, require_wrk, surroundings
from figures import Figures, rows_of, say

LOAD = {"ours": 45, "bare": 15}
"""Seconds of each minute."""
QUARTERS = 4
COLUMNS = {
    "quarter": "",
    "requests per second": "ours rps",
    "p99, ms": "ours p99",
    "p99.9, ms": "ours p999",
    "bare handler's p99.9, ms": "bare p999",
    "resident, MB": "ours resident",
    "failed": "ours failed",
    "calls to WeChat so far": "calls",
    "Redis commands a second": "commands",
}


def quarters(around: Surroundings, minutes: int) -> list[Figures]:
    around.forget()
    running = {name: around.start(name) for name in LOAD}
    for contender in running.values():
        contender.first_answer()
        around.warm_up(contender)
    seen = [Figures(str(number), f"{number}.") for number in range(1, QUARTERS + 1)]
    for minute in range(minutes):
        figures = seen[QUARTERS * minute // minutes]
        with around.redis.watching() as sent:
            for name, seconds in LOAD.items():
                for what, figure in around.measure(running[name], seconds=seconds).items():
                    figures.note(f"{name} {what}", figure)
                figures.note(f"{name} resident", running[name].resident())
            figures.note("commands", len(sent()) / sum(LOAD.values()))
        figures.note("calls", around.wechat.calls.total())
        say(f"minute {minute + 1}")
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--minutes", type=int, default=60, help="a multiple of 4")
    given = parser.parse_args()
    require_wrk(or_hey=True)
    with surroundings() as around:
        seen = quarters(around, given.minutes)
    print(rows_of(seen, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
