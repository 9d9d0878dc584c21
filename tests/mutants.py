"""Random small mistakes in a module, and whether a test goes red for each.

    .venv/bin/python tests/mutants.py wechat_sign/page_url.py [--number 40] [--seed N] [--all]

It works on a copy. The module's own tests are asked first, then the fast ring and, with `--all`,
every test but those in a browser. Exit status 1 where a mutant lives.
"""

from __future__ import annotations

import argparse
import ast
import copy
import random
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", ".npm", ".*_cache", "__pycache__")
OPPOSITES: dict[Any, Any] = {
    one: other
    for pair in (
        (ast.Lt, ast.GtE),
        (ast.LtE, ast.Lt),
        (ast.Gt, ast.LtE),
        (ast.GtE, ast.Gt),
        (ast.Eq, ast.NotEq),
        (ast.Is, ast.IsNot),
        (ast.In, ast.NotIn),
        (ast.And, ast.Or),
        (ast.Add, ast.Sub),
        (ast.Mult, ast.Div),
    )
    for one, other in (pair, pair[::-1])
}


def broken_patterns(pattern: str) -> Iterator[str]:
    """The pattern without one of its characters, where it still is one."""
    for at in range(len(pattern)):
        shorter = pattern[:at] + pattern[at + 1 :]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                re.compile(shorter)
        except (re.error, FutureWarning):
            continue
        yield shorter


def mistakes(node: Any) -> Iterator[Any]:
    """What may stand in the place of the node."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in OPPOSITES:
            yield ast.Compare(node.left, [OPPOSITES[type(op)]()], node.comparators)
        case ast.BoolOp(op=op):
            yield ast.BoolOp(OPPOSITES[type(op)](), node.values)
            yield from node.values
        case ast.BinOp(op=op) if type(op) in OPPOSITES:
            yield ast.BinOp(node.left, OPPOSITES[type(op)](), node.right)
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.If() | ast.IfExp() | ast.While():
            yield changed(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Call(func=ast.Attribute(value=ast.Name("re")), args=[ast.Constant(str(text)), *_]):
            for pattern in broken_patterns(text):
                yield changed(node, args=[ast.Constant(pattern), *node.args[1:]])
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.Raise():
            yield ast.Pass()
        case ast.Return(value=value) if value is not None:
            yield ast.Return(None)


def changed(node: Any, **fields: Any) -> Any:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


class Place(ast.NodeTransformer):
    """Puts something in the place of one node."""

    def __init__(self, node: ast.AST, new: Any) -> None:
        self._node, self._new = node, new

    def visit(self, node: ast.AST) -> Any:
        return self._new if node is self._node else self.generic_visit(node)


def places(tree: ast.AST) -> list[tuple[Any, list[Any]]]:
    """Each node that may be mistaken, and for what."""
    found = ((node, list(mistakes(node))) for node in ast.walk(tree))
    return [(node, new) for node, new in found if new]


def mutant(source: str, number: int, chance: random.Random) -> tuple[str, str]:
    """The module with a mistake in the place of this number, and what that is."""
    tree = ast.parse(source)
    node, possible = places(tree)[number]
    new = chance.choice(possible)
    what = f"{node.lineno}: {ast.unparse(node)[:150]!r} -> {ast.unparse(new)[:150]!r}"
    return ast.unparse(ast.fix_missing_locations(Place(node, new).visit(tree))), what


def rings(module: Path, everything: bool) -> list[list[str]]:
    """Which tests are asked, one after the other, until one goes red."""
    name = "server" if module.stem == "server" else module.stem
    own = ROOT / "tests" / f"test_{name}.py"
    browsers = [f"--ignore=tests/test_{name}.py" for name in ("browser", "script", "routers")]
    asked = [[f"tests/{own.name}"]] if own.exists() else []
    return [*asked, ["-m", "fast", *browsers], *([browsers] if everything else [])]


def is_caught(folder: Path, asked: list[list[str]]) -> bool:
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:randomly"]
    pytest += ["--timeout=120", "-p", "no:cacheprovider"]
    for tests in asked:
        try:
            done = subprocess.run([*pytest, *tests], cwd=folder, capture_output=True, timeout=900)
        except subprocess.TimeoutExpired:
            return True
        if done.returncode:
            return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("module", type=Path)
    parser.add_argument("--number", type=int, default=40)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--all", action="store_true", help="ask every test but the browsers'")
    given = parser.parse_args()
    module = given.module.resolve().relative_to(ROOT)
    source = (ROOT / module).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at) / "copy"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        asked = rings(module, given.all)
        (folder / module).write_text(ast.unparse(ast.parse(source)), encoding="utf-8")
        if is_caught(folder, asked):
            print("a test is red without a mutant")
            return 2
        numbers = range(len(places(ast.parse(source))))
        chance = random.Random(given.seed)
        chosen = chance.sample(numbers, min(given.number, len(numbers)))
        live = 0
        for number in sorted(chosen):
            text, what = mutant(source, number, chance)
            (folder / module).write_text(text, encoding="utf-8")
            if not is_caught(folder, asked):
                live += 1
                print(f"lives: {module}:{what}", flush=True)
    print(f"seed {given.seed}: {len(chosen) - live} of {len(chosen)} mutants caught")
    return 1 if live else 0


if __name__ == "__main__":
    sys.exit(main())
