"""A file of measured steps, of whichever kind → one question for each step."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from experiments.validation.cases import Case, read_case
from experiments.validation.mist import PLANS_FILE, SOURCE, plan_case, read_plans
from experiments.validation.rows import read_rows

PLANS_TABLE = "measured_plans.csv"  # the same plans without what each stage does


class Question(NamedTuple):
    """A measured step: where it was published, and how to read it (``Refused`` if it cannot be expressed)."""

    source: str
    read: Callable[[], Case]


def read_questions(path: Path) -> list[Question]:
    """All measured steps of a table with a row each, or of Mist's plans (by either of their files).

    Raises:
        DataError: the file cannot be read as one of these.
    """
    if path.name == PLANS_TABLE:
        path = path.with_name(PLANS_FILE)
    if path.suffix == ".json":
        return [Question(SOURCE, partial(plan_case, plan, line)) for line, plan in enumerate(read_plans(path), start=1)]
    return [Question(row.text("source_id") or "(no source_id)", partial(read_case, row)) for row in read_rows(path)]
