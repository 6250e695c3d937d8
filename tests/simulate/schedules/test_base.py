"""Rows from letters, orders, and what every schedule refuses."""

import pytest

from meshwright.errors import ScheduleError
from meshwright.simulate.program import show
from meshwright.simulate.schedules.base import Options, Order, Row, in_a_line, letters, two_stages
from meshwright.simulate.schedules.table import SCHEDULES


def text(*rows: Row) -> list[str]:
    """Rows as words, one line each."""
    stages = 1 + max(int(row.stage.max()) for row in rows)
    return [line.partition(": ")[2] for line in show(Order(rows, (), tuple(range(stages))).steps()).splitlines()]


def test_each_kind_counts_its_own_microbatches() -> None:
    assert text(letters("FFBFBB", 0)) == ["0F0 0F1 0B0 0F2 0B1 0B2"]


def test_whole_and_split_backwards_count_together_and_a_weight_half_follows_its_input_half() -> None:
    assert text(letters("FFFFBIBIWW", 2)) == ["2F0 2F1 2F2 2F3 2B0 2I1 2B2 2I3 2W1 2W3"]


def test_stages_count_by_themselves() -> None:
    assert text(letters("FFFFBB", [0, 3, 3, 0, 3, 0])) == ["0F0 3F0 3F1 0F1 3B0 0B0"]


def test_case_tells_two_stages_apart_and_late_microbatches_are_cut() -> None:
    assert text(two_stages("FFfFfiIwWF", 1, 6, 9)) == ["1F0 1F1 6F0 1F2 6F1 6I0 1I0 6W0 1W0 1F3"]
    assert text(two_stages("FFfFfiIwWF", 1, 6, 1)) == ["1F0 6F0 6I0 1I0 6W0 1W0"]


@pytest.mark.parametrize(("row", "message"), [("FXB", "'FXB' is no row"), ("FWI", "'FWI' has a W before its I")])
def test_what_is_no_row_is_refused(row: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        letters(row, 0)


def test_stages_find_their_meshes() -> None:
    order = in_a_line([two_stages("FfBb", 0, 3, 1), two_stages("FfBb", 1, 2, 1)], 4)
    assert order.edges == ((0, 1), (1, 2), (2, 3))
    assert order.mesh_of_stage == (0, 1, 1, 0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("meshes", "microbatches"), [(0, 4), (4, 0), (-1, 1)])
def test_no_meshes_or_microbatches_is_refused(name: str, meshes: int, microbatches: int) -> None:
    with pytest.raises(ScheduleError, match="at least 1"):
        SCHEDULES[name].make(meshes, microbatches)


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ScheduleError, match="schedule 1f1b takes no chunks; leave it out"):
        SCHEDULES["1f1b"].make(2, 4, Options(chunks=2))
    with pytest.raises(ScheduleError, match="schedule zb-v takes no atomic pairs"):
        SCHEDULES["zb-v"].make(2, 4, Options(atomic_pairs=True))
    with pytest.raises(ScheduleError, match="0 chunks were asked for"):
        SCHEDULES["interleaved"].make(2, 4, Options(chunks=0))
    assert SCHEDULES["zb-v"].make(2, 4, Options(chunks=2)).stages == 4
