"""docs/schedules.md lists every schedule, and its pictures are those that the example draws."""

import re
from pathlib import Path

from meshwright.simulate.schedules.table import SCHEDULES

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")


def test_the_table_lists_every_schedule() -> None:
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall("`(.*?)`", row)} == set(SCHEDULES)


def test_pictures_are_what_the_example_prints() -> None:
    drawn = (ROOT / "experiments" / "examples" / "schedules.out").read_text(encoding="utf-8").split("\n\n")
    pictures = [
        picture for block in re.findall(r"```text\n(.*?)\n```", PAGE, re.DOTALL) for picture in block.split("\n\n")
    ]
    assert pictures
    assert set(pictures) <= set(drawn)
