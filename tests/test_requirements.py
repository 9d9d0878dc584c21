from __future__ import annotations

import re

import pytest
from harness import ROOT
from manuals import ENGLISH
from packaging.requirements import Requirement


def lines_of(file: str) -> list[str]:
    """Without comments; one that goes on in the next is one."""
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]


REQUIRED = list(map(Requirement, lines_of("requirements.txt")))
PYTHONS = ["3.10.0", "3.11.2", "3.12.0", "3.13.0", "3.14.0"]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_in_the_lock_once_in_its_range_and_with_hashes(python: str) -> None:
    environment = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    locked: dict[str, list[str]] = {}
    for line in lines_of(".requirements.lock"):
        pinned, *hashes = line.split("--hash=")
        assert hashes
        assert all(re.fullmatch("sha256:[0-9a-f]{64} *", one) for one in hashes)
        requirement = Requirement(pinned)
        [pin] = requirement.specifier
        assert pin.operator == "=="
        if requirement.marker is None or requirement.marker.evaluate(environment):
            locked.setdefault(requirement.name, []).append(pin.version)
    for requirement in REQUIRED:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            [version] = locked[requirement.name]
            assert version in requirement.specifier


def test_every_requirement_has_a_lower_end_that_ci_can_pin() -> None:
    for line in lines_of("requirements.txt"):
        pinned = Requirement(line.replace(">=", "==", 1))
        assert [one.operator for one in pinned.specifier].count("==") == 1


def test_the_lock_names_no_place_but_the_packages() -> None:
    text = (ROOT / ".requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text


def test_the_manual_installs_what_is_locked() -> None:
    assert ENGLISH.count(".venv/bin/pip install -q --require-hashes -r .requirements.lock") == 2
