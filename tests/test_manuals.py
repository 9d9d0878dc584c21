"""The manual in English and the one in Chinese say the same."""

from __future__ import annotations

import re
import struct
from dataclasses import fields
from pathlib import Path

import pytest
from harness import ROOT
from manuals import MANUALS, blocks_of

from wechat_sign.settings import SECTIONS

ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in MANUALS)
CJK = "[\u3400-\u9fff]"


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


def test_they_have_the_same_sections_in_the_same_order() -> None:
    assert [level for level, _ in own(ENGLISH)] == [level for level, _ in own(CHINESE)]


def test_they_have_the_same_blocks_but_for_comments() -> None:
    english, chinese = (
        [(block.indent, block.language, block.code) for block in blocks_of(manual)]
        for manual in (ENGLISH, CHINESE)
    )
    assert english == chinese


def test_their_tables_name_the_same_options_errcodes_and_figures() -> None:
    assert tables(ENGLISH) == tables(CHINESE)


@pytest.mark.parametrize("place", range(len(own(ENGLISH))))
def test_a_section_names_the_same_code_numbers_and_addresses_in_both(place: int) -> None:
    english, chinese = (own(manual)[place][1] for manual in (ENGLISH, CHINESE))
    assert marks(english) == marks(chinese)
    steps, addresses = r"(?m)^(\d\.) \**", "<(https?://.*)>"
    assert re.findall(steps, english) == re.findall(steps, chinese)
    assert re.findall(addresses, english) == re.findall(addresses, chinese)


@pytest.mark.parametrize("manual", MANUALS)
def test_it_has_every_option(manual: str) -> None:
    text = (ROOT / manual).read_text(encoding="utf-8")
    rows = "\n".join(re.findall(r"(?m)^\| .*\|$", text))
    for section, schema in SECTIONS.items():
        assert f"`[{section}]`" in rows
        for option in fields(schema):
            assert f"`{option.name}`" in rows


@pytest.mark.parametrize("manual", MANUALS)
def test_its_links_and_pictures_resolve(manual: str) -> None:
    path = ROOT / manual
    text = path.read_text(encoding="utf-8")
    titles = re.findall("(?m)^#+ (.*)$", text)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) >= 4
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in [title.lower().replace(" ", "-") for title in titles]
        elif "://" not in target:
            there = path.parent / target
            assert there.is_file(), target
            assert there.suffix != ".png" or is_picture(there)
            assert target != "page.png", "that is the one in English"


def is_picture(path: Path) -> bool:
    """Whether it is a PNG of some size."""
    head = path.read_bytes()[:24]
    return head[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", head[16:])) > 200


def test_chinese_has_its_own_punctuation() -> None:
    prose = re.sub(r"(?ms)^ *```.*?^ *```$|`[^`]*`", "", CHINESE)
    assert re.findall(f"{CJK}[,;:?!()].?|[,;:?!(]{CJK}", prose) == []


def test_readme_has_three_lines_for_readers_of_chinese() -> None:
    [part] = re.findall("(?s)\n## 中文\n\n(.*)", ENGLISH)
    [command] = re.findall("`(python3 .*)`", part)
    assert len(part.splitlines()) == 3
    assert command in [block.code.strip() for block in blocks_of(ENGLISH)]
