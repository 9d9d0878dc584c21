from __future__ import annotations

import re

import pytest
from harness import ROOT
from packaging.requirements import Requirement

PYTHONS = ["3.10.0", "3.11.2", "3.12.0", "3.13.0", "3.14.0"]


def lines_of(file: str) -> list[str]:
    """Without comments; one that goes on in the next is one."""
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_in_the_lock_once_in_its_range_and_with_hashes(python: str) -> None:
    environment = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    locked: dict[str, list[str]] = {}
    for line in lines_of(".requirements.lock"):
        pinned = re.fullmatch("(.*?)( *--hash=sha256:[0-9a-f]{64})+ *", line)
        assert pinned, line
        requirement = Requirement(pinned[1])
        [pin] = requirement.specifier
        assert pin.operator == "=="
        if requirement.marker is None or requirement.marker.evaluate(environment):
            locked.setdefault(requirement.name, []).append(pin.version)
    for requirement in map(Requirement, lines_of("requirements.txt")):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            [version] = locked[requirement.name]
            assert version in requirement.specifier
