"""What was measured, round by round, and how it is shown."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Figures:
    """Of one contender, or of one size."""

    name: str
    label: str
    seen: dict[str, list[float]] = field(default_factory=dict)
    """A value for each round, or each turn of one."""

    def note(self, what: str, value: float) -> None:
        self.seen.setdefault(what, []).append(value)

    def median(self, what: str) -> float:
        return statistics.median(self.seen[what]) if what in self.seen else float("nan")

    def cell(self, what: str) -> str:
        """The median, with the lowest and the highest."""
        values = self.seen.get(what)
        if not values:
            return ""
        form = (
            ",.0f"
            if max(values) >= 100 or all(map(float.is_integer, map(float, values)))
            else ".2f"
        )
        low, middle, high = (
            f"{value:{form}}" for value in (min(values), statistics.median(values), max(values))
        )
        return middle if low == high else f"{middle} ({low} to {high})"


def ratio(one: Figures, what: str, other: Figures) -> float:
    """The median of the turns' own ratios: two measurements of one turn are close in time, and
    noisy machines change over minutes."""
    both = zip(one.seen[what], other.seen[what], strict=True)
    return statistics.median(this / that for this, that in both)


def times(value: float) -> str:
    """A ratio in so many digits as it is worth."""
    return f"{value:.{2 if value < 1.5 else 1 if value < 10 else 0}f}"


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * (head.count(" | ") + 1), *body])


def rows_of(shown: Iterable[Figures], columns: dict[str, str]) -> str:
    """A table with a row for each; in the column that stands for nothing is its label."""
    rows = [[f.cell(what) if what else f.label for what in columns.values()] for f in shown]
    return markdown([list(columns), *rows])


def say(text: str) -> None:
    """How far it is, beside the output."""
    print(text, file=sys.stderr, flush=True)


def replace_block(file: Path, name: str, text: str) -> None:
    """Puts the text between `<!-- name -->` and `<!-- /name -->`."""
    old = file.read_text(encoding="utf-8")
    between = rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)"
    new, found = re.subn(between, lambda _: text + "\n", old, flags=re.DOTALL)
    if found != 1:
        raise ValueError(
            f"{file.name} has {found} blocks between <!-- {name} --> and <!-- /{name} -->"
        )
    file.write_text(new, encoding="utf-8")
