"""The manuals in English and those in Chinese say the same, and what they lead to is there."""

from __future__ import annotations

import re
import struct
from dataclasses import fields
from pathlib import Path

import pytest
from harness import ROOT
from manuals import CHINESE, DEPLOYS, ENGLISH, MANUALS, blocks_of
from test_requirements import PYTHONS

from wechat_sign import __version__
from wechat_sign.errors import advice
from wechat_sign.settings import SECTIONS

CJK = "[\u3400-\u9fff]"
PAIRS = tuple(
    tuple((ROOT / name).read_text(encoding="utf-8") for name in pair) for pair in (MANUALS, DEPLOYS)
)
FILES = [ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md"))]


def sections(manual: str) -> list[tuple[str, str]]:
    """Level and text of each, without the blocks."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", manual)
    parts = re.split(r"(?m)^(#+) .*\n", text)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def own(manual: str) -> list[tuple[str, str]]:
    """The same without README's part for readers of Chinese."""
    return [part for part in sections(manual) if ".github/README.zh-CN.md)\n" not in part[1][-60:]]


def tables(manual: str) -> list[list[list[set[str]]]]:
    """For each row the code and the numbers in its cells."""
    found = re.findall(r"(?m)(?:^\|.*\n)+", manual)
    return [
        [[marks(cell) for cell in row.split(" | ")] for row in table.splitlines()]
        for table in found
    ]


def marks(text: str) -> set[str]:
    """Code, and numbers, such as errcodes."""
    code = re.findall("`([^`]+)`", text)
    return {*code, *re.findall(r"\d[\d,.]*\d|\d", re.sub("`[^`]+`", "", text))}


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_they_have_the_same_sections_blocks_and_tables(english: str, chinese: str) -> None:
    """But for comments in the blocks."""
    assert [level for level, _ in own(english)] == [level for level, _ in own(chinese)]
    one, other = (
        [(block.indent, block.language, block.code) for block in blocks_of(manual)]
        for manual in (english, chinese)
    )
    assert one == other
    assert tables(english) == tables(chinese)


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_a_section_names_the_same_code_numbers_and_addresses_in_both(
    english: str, chinese: str
) -> None:
    for (_, one), (_, other) in zip(own(english), own(chinese), strict=True):
        assert marks(one) == marks(other)
        for what in (r"(?m)^(\d\.) \**", r"<(https?://.*?)>", r"\((https?://.*?)\)"):
            assert re.findall(what, one) == re.findall(what, other)


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
        assert there.suffix != ".png" or is_picture(there)
        assert name != "page.png", "that is the one in English"
        if anchor:
            titles = re.findall("(?m)^#+ (.*)$", there.read_text(encoding="utf-8"))
            assert anchor in [title.lower().replace(" ", "-") for title in titles]


def is_picture(path: Path) -> bool:
    """Whether it is a PNG of some size."""
    head = path.read_bytes()[:24]
    return head[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", head[16:])) > 200


def test_chinese_has_its_own_punctuation() -> None:
    prose = re.sub(r"(?ms)^ *```.*?^ *```$|`[^`]*`|\]\([^)]*\)", "", CHINESE)
    assert re.findall(f"{CJK}[,;:?!()].?|[,;:?!(]{CJK}", prose) == []


def test_readme_has_three_lines_for_readers_of_chinese() -> None:
    [part] = re.findall("(?s)\n## 中文\n\n(.*)", PAIRS[0][0])
    [command] = re.findall("`(python3 .*)`", part)
    assert len(part.splitlines()) == 3
    assert command in [block.code.strip() for block in blocks_of(ENGLISH)]


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / ".github/CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall("(?m)^## (.*)$", text)[0] == __version__


def test_contributing_names_every_file_of_the_package() -> None:
    text = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
    folder = ROOT / "wechat_sign"
    files = {*folder.glob("*.*"), *(folder / "locale").iterdir()}
    for name in sorted(path.name for path in files):
        assert name in text, name
    for named in re.findall(r"`((?:wechat_sign|tests)/[\w./-]+)", text):
        assert (ROOT / named).exists(), named


def test_the_workflow_runs_readmes_tests_on_each_python_that_is_promised() -> None:
    text = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    [command] = [block.code for block in blocks_of(ENGLISH) if "-m pytest" in block.code]
    assert command in text
    promised = [python.rpartition(".")[0] for python in PYTHONS]
    assert str(promised).replace("'", '"') in text
    assert f"for version in {' '.join(promised)};" in (ROOT / ".ci/run").read_text("utf-8")


def test_where_the_console_has_them_is_told_in_one_way() -> None:
    old, new = advice("console").removesuffix(")").split(" (newer console: ")
    for text in (PAIRS[0][0], PAIRS[0][1], (ROOT / "config.example.ini").read_text("utf-8")):
        assert old in text
        assert new in text
