"""Programs that are built verify; programs that are broken do not, and the message says where."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.bare import play
from meshwright.simulate.build import build_program, weave
from meshwright.simulate.code import decode
from meshwright.simulate.program import Program, Update, parse
from meshwright.simulate.schedules.base import Options
from meshwright.simulate.schedules.table import SCHEDULES
from meshwright.simulate.verify import verify

GOOD = build_program("1f1b", 2, 2, tied=[(0, 1)])


CHAINS = ("1f1b", "eager-1f1b", "gpipe", "gpipe-lifo", "graph-1f1b", "zb-h1", "zb-h2")  # a stage a mesh


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_program_over_every_dag_with_every_tie_is_right(data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, 6))
    pairs = [(a, b) for b in range(stages) for a in range(b)]
    chosen = st.lists(st.sampled_from(pairs), unique=True) if pairs else st.just([])
    edges = data.draw(chosen)
    tied = [pair if data.draw(st.booleans()) else pair[::-1] for pair in data.draw(chosen)]
    norm, gather = data.draw(st.booleans()), data.draw(st.booleans())
    schedule, microbatches = data.draw(st.sampled_from(CHAINS)), data.draw(st.integers(1, 7))
    verify(build_program(schedule, stages, microbatches, edges, tied, norm=norm, gather=gather), edges)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 6), st.integers(1, 16), st.booleans())
def test_every_schedule_is_right_wherever_its_rule_holds(name: str, meshes: int, m: int, atomic: bool) -> None:
    """Each computation once, in order, matched, free of deadlock with its transfers and its tail in place."""
    rule = SCHEDULES[name]
    try:
        order = rule.make(meshes, m, Options(atomic_pairs=atomic and "atomic_pairs" in rule.takes))
    except ScheduleError as refusal:
        assume("\n" not in str(refusal) and str(m) in str(refusal))
        return
    program = decode(weave(order, order.edges, norm=True, gather=True))
    peaks = [round(peak) for peak in play(name, meshes, m).peak_bytes] if not atomic else None
    verify(
        program,
        order.edges,
        copies=order.copies,
        mesh_devices=[(mesh,) for mesh in range(meshes)],
        most_live=peaks,
    )


def test_a_mesh_that_holds_too_much_is_named() -> None:
    with pytest.raises(ScheduleError, match="mesh 0 holds 2 activations from 0F1 on; it may hold 1"):
        verify(GOOD, most_live=(1, 1))


def test_a_device_of_two_rows_has_no_order_of_collectives() -> None:
    with pytest.raises(ScheduleError, match="device 3 is in mesh 0 and in mesh 1"):
        verify(GOOD, mesh_devices=[(2, 3), (3, 4)])


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
