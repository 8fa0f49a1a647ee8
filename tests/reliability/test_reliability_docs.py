"""docs/reliability.md names tests: they have to be there."""

import re
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]


def test_every_test_that_is_named_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (TOP / "docs" / "reliability.md").read_text()))
    there = {
        name
        for file in (TOP / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(named) > 30
    assert named <= there, named - there
