"""Programs that are built verify; programs that are broken do not, and the message says where."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.build import build_program
from meshwright.simulate.program import Program, Update, parse
from meshwright.simulate.schedules.table import SCHEDULES
from meshwright.simulate.verify import verify

GOOD = build_program("1f1b", 2, 2, tied=[(0, 1)])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_program_over_every_dag_with_every_tie_is_right(data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, 6))
    pairs = [(a, b) for b in range(stages) for a in range(b)]
    chosen = st.lists(st.sampled_from(pairs), unique=True) if pairs else st.just([])
    edges = data.draw(chosen)
    tied = [pair if data.draw(st.booleans()) else pair[::-1] for pair in data.draw(chosen)]
    program = build_program(
        data.draw(st.sampled_from(sorted(SCHEDULES))), stages, data.draw(st.integers(1, 7)), edges, tied
    )
    verify(program, edges)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_default_is_a_chain(schedule: str) -> None:
    verify(build_program(schedule, 4, 6), edges=[(0, 1), (1, 2), (2, 3)])


def test_without_any_one_of_its_words_a_program_is_wrong() -> None:
    """All but the last update, for which nothing waits."""
    for r, row in enumerate(GOOD):
        for i, step in enumerate(row):
            broken = tuple(row[:i] + row[i + 1 :] if k == r else other for k, other in enumerate(GOOD))
            if step == Update(1):
                verify(broken)
                continue
            with pytest.raises(ScheduleError):
                verify(broken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0B0 0F0", "0F0 stands twice"),
        ("0F0 0B0\n0F1 0B1", "stage 0 is on mesh 0 and on mesh 1"),
        ("0F1 0B1", "0F0 is missing"),
        ("0F0 0F1 0B0", "0B1 is missing"),
        ("0B0 0F0", "0B0 stands before 0F0"),
        ("0F0 0>1a0 0B0\n1F0 1B0", "0>1a0 has no partner 1<0a0"),
        ("0F0 0B0\n1<0a0 1F0 1B0", "1<0a0 has no partner 0>1a0"),
        ("0>1a0 0F0 0B0\n1<0a0 1F0 1B0", "sends what 0F0 has not made yet"),
        ("0F0 0>1a0 0B0\n1F0 1<0a0 1B0", "1<0a0 comes too late for 1F0"),
        ("0F0 0<1c0 0B0\n1F0 1B0 1>0c0", "answers no activation: 0>1a0 is missing"),
        ("0F0 0>1a0 0F1 0B0 0B1\n1<0a0 1F0 1F1 1B0 1B1", "edge 0 → 1 carries 1 of 2"),
        ("0F0 0R 0B0", "0R must follow 0B0"),
        ("0F0 0B0 0U 0R", "0U must follow 0R"),
        ("0F0 0<1c0 0B0 0>1a0\n1<0a0 1F0 1B0 1>0c0", "deadlocks: mesh 0 waits at 0<1c0, mesh 1 waits at 1<0a0"),
    ],
)
def test_a_broken_program_says_where(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        verify(parse(text))


def test_an_edge_that_is_not_crossed_is_noticed() -> None:
    alone: Program = parse("0F0 0B0\n1F0 1B0")
    verify(alone)
    with pytest.raises(ScheduleError, match="from stage 0 to stage 1 is not sent"):
        verify(alone, edges=[(0, 1)])
    with pytest.raises(ScheduleError, match="is sent but is no edge"):
        verify(GOOD, edges=[])


@pytest.mark.parametrize("edges", [[(1, 0)], [(0, 0)], [(0, 2)]])
def test_an_edge_that_does_not_run_forward_is_refused(edges: list[tuple[int, int]]) -> None:
    with pytest.raises(ScheduleError, match="earlier stage to a later one"):
        build_program("1f1b", 2, 2, edges)


def test_a_tie_to_no_stage_is_refused() -> None:
    with pytest.raises(ScheduleError, match="tied between stages 0 and 2"):
        build_program("1f1b", 2, 2, tied=[(0, 2)])
