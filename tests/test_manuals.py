"""The manuals in English and those in Chinese say the same, and what they lead to is there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from harness import ROOT
from manuals import CHINESE, DEPLOYS, ENGLISH, MANUALS, blocks_of
from test_requirements import PYTHONS

from wechat_sign import __version__
from wechat_sign.settings import SECTIONS

CJK = "[\u3400-\u9fff]"
PAIRS = tuple(
    tuple((ROOT / name).read_text(encoding="utf-8") for name in pair) for pair in (MANUALS, DEPLOYS)
)
FILES = [ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md"))]


def sections(manual: str) -> list[tuple[str, str]]:
    """Level and text of each, without the blocks and README's part for readers of Chinese."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", manual)
    parts = re.split(r"(?m)^(#+) .*\n", text)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [part for part in pairs if ".github/README.zh-CN.md)\n" not in part[1][-60:]]


def marks(text: str) -> set[str]:
    """Code, and numbers, such as errcodes."""
    code = re.findall("`([^`]+)`", text)
    return {*code, *re.findall(r"\d[\d,.]*\d|\d", re.sub("`[^`]+`", "", text))}


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_they_have_the_same_sections_blocks_tables_code_numbers_and_addresses(
    english: str, chinese: str
) -> None:
    """But for comments in the blocks."""
    one, other = (
        [(block.indent, block.language, block.code) for block in blocks_of(manual)]
        for manual in (english, chinese)
    )
    assert one == other
    one_row, other_row = (re.findall(r"(?m)^\|.*", manual) for manual in (english, chinese))
    cells = [[list(map(marks, row.split(" | "))) for row in rows] for rows in (one_row, other_row)]
    assert cells[0] == cells[1]
    for (level, text), (its_level, its_text) in zip(
        sections(english), sections(chinese), strict=True
    ):
        assert (level, marks(text)) == (its_level, marks(its_text))
        for what in (r"(?m)^(\d\.) \**", r"<(https?://.*?)>", r"\((https?://.*?)\)"):
            assert re.findall(what, text) == re.findall(what, its_text)


@pytest.mark.parametrize("manual", MANUALS)
def test_it_has_every_option_and_is_short(manual: str) -> None:
    text = (ROOT / manual).read_text(encoding="utf-8")
    assert text.count("\n") <= 210
    rows = "\n".join(re.findall(r"(?m)^\| .*\|$", text))
    for section, schema in SECTIONS.items():
        assert f"`[{section}]`" in rows
        for option in fields(schema):
            assert f"`{option.name}`" in rows


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_its_links_and_pictures_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        if "://" in target:
            continue
        assert there.is_file(), target
        if anchor:
            titles = re.findall("(?m)^#+ (.*)$", there.read_text(encoding="utf-8"))
            assert anchor in [title.lower().replace(" ", "-") for title in titles]


def test_chinese_has_its_own_punctuation() -> None:
    prose = re.sub(r"(?ms)^ *```.*?^ *```$|`[^`]*`|\]\([^)]*\)", "", CHINESE)
    assert re.findall(f"{CJK}[,;:?!()].?|[,;:?!(]{CJK}", prose) == []


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / ".github/CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall("(?m)^## (.*)$", text)[0] == __version__


def test_contributing_names_every_file_of_the_package() -> None:
    text = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in (*ROOT.glob("wechat_sign/*.*"), *ROOT.glob("wechat_sign/locale/*")):
        assert path.name in text, path.name
    for named in re.findall(r"`((?:wechat_sign|tests)/[\w./-]+)", text):
        assert (ROOT / named).exists(), named


def test_the_workflow_runs_readmes_tests_on_each_python_that_is_promised() -> None:
    text = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    [command] = [block.code for block in blocks_of(ENGLISH) if "-m pytest" in block.code]
    assert command in text
    promised = [python.rpartition(".")[0] for python in PYTHONS]
    assert str(promised).replace("'", '"') in text
    assert f"for version in {' '.join(promised)};" in (ROOT / ".ci/run").read_text("utf-8")
