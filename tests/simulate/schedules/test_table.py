"""Every schedule of the table is a schedule, and those that are published are the published ones."""

from typing import Any

import pytest

from meshwright.errors import ScheduleError
from meshwright.simulate.program import Backward, Forward, parse_word
from meshwright.simulate.schedules.gpipe import gpipe
from meshwright.simulate.schedules.one_f_one_b import one_f_one_b
from meshwright.simulate.schedules.table import SCHEDULES, find_schedule

SIZES = [(1, 1), (1, 5), (2, 4), (3, 2), (4, 4), (4, 16), (8, 3), (8, 32)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_live_microbatches_is_the_peak_of_the_rows(name: str, stages: int, microbatches: int) -> None:
    schedule = SCHEDULES[name]
    for stage, row in enumerate(schedule.rows(stages, microbatches)):
        live = peak = 0
        for step in row:
            live += 1 if isinstance(step, Forward) else -1
            peak = max(peak, live)
        assert live == 0
        assert peak == schedule.live_microbatches(stage, stages, microbatches)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rows_equal_the_published_lists(name: str, oracle: dict[str, Any]) -> None:
    checked = 0
    for size, lists in oracle["golden_lists"].items():
        golden = lists.get(name.replace("-", "_"))
        if golden is None:
            continue
        stages, microbatches = (int(part.partition("=")[2]) for part in size.split(","))
        rows = SCHEDULES[name].rows(stages, microbatches)
        assert rows == tuple(tuple(map(parse_word, golden[str(r)])) for r in range(stages))
        checked += 1
    assert checked or name == "gpipe-lifo"


def test_one_f_one_b_of_two_stages_is_the_figure() -> None:
    assert one_f_one_b(2, 2) == (
        (Forward(0, 0), Forward(0, 1), Backward(0, 0), Backward(0, 1)),
        (Forward(1, 0), Backward(1, 0), Forward(1, 1), Backward(1, 1)),
    )


def test_lifo_runs_the_backwards_from_the_last() -> None:
    assert gpipe(1, 2, lifo=True) == ((Forward(0, 0), Forward(0, 1), Backward(0, 1), Backward(0, 0)),)


def test_an_unknown_schedule_names_its_neighbour() -> None:
    with pytest.raises(ScheduleError, match="did you mean '1f1b'"):
        find_schedule("1f1")


@pytest.mark.parametrize(("stages", "microbatches"), [(0, 4), (4, 0), (-1, 1)])
def test_no_stages_or_microbatches_is_refused(stages: int, microbatches: int) -> None:
    for schedule in SCHEDULES.values():
        with pytest.raises(ScheduleError, match="at least 1"):
            schedule.rows(stages, microbatches)
