"""Transfers of a pipeline that meet on a link: exact without contention, flows where a link overfills."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.build import build_program
from meshwright.simulate.pipeline import PipelineCosts, StageCosts, TransferCost, simulate
from meshwright.simulate.program import Payload, Program, Send, parse
from meshwright.simulate.timeline import Timeline

TO_ONE = parse("0F0 0>2a0 0<2c0 0B0\n1F0 1>2a0 1<2c0 1B0\n2<0a0 2<1a0 2F0 2B0 2>0c0 2>1c0")
Moves = dict[tuple[int, int, Payload], TransferCost]


def stages(count: int) -> tuple[StageCosts, ...]:
    return tuple(StageCosts(devices=(s,), forward_seconds=1, backward_seconds=1) for s in range(count))


def to_one(first: TransferCost, second: TransferCost, links: tuple[float, ...]) -> Timeline:
    """Stages 0 and 1 send to stage 2 at once, at 1 s; nothing is lost on the way back."""
    moves: Moves = {
        (0, 2, "activation"): first,
        (1, 2, "activation"): second,
        (2, 0, "cotangent"): TransferCost(0, 0),
        (2, 1, "cotangent"): TransferCost(0, 0),
    }
    return simulate(TO_ONE, PipelineCosts(stages(3), moves, link_bytes_per_second=links))


def test_two_flows_that_fill_a_link_share_it() -> None:
    """Each takes 2 s alone at the link's whole 10 bytes/s; together 4 s: 1 + 4 + 1 + 1 + 1."""
    flow = TransferCost(2.0, 0.0, bytes=20, links=(0,))
    assert to_one(flow, flow, (10.0,)).makespan_seconds == pytest.approx(8)


def test_a_link_that_is_wide_enough_costs_nothing() -> None:
    flow = TransferCost(2.0, 0.0, bytes=20, links=(0,))
    assert to_one(flow, flow, (20.0,)).makespan_seconds == 6


def test_shares_are_max_min_fair_in_bytes_not_in_progress() -> None:
    """On 10 bytes/s, a flow of at most 2 bytes/s keeps them all; the other gets the rest: 40 bytes at 8 in 5 s."""
    slow, fast = TransferCost(5.0, 0.0, bytes=10, links=(0,)), TransferCost(4.0, 0.0, bytes=40, links=(0,))
    arrivals = {
        e.instruction.stage: e.end_seconds  # type: ignore[union-attr]
        for e in to_one(slow, fast, (10.0,)).events
        if isinstance(e.instruction, Send) and e.instruction.what == "activation"
    }
    assert arrivals == {0: pytest.approx(6), 1: pytest.approx(6)}


def test_what_links_add_to_a_transfer_is_exposed_communication() -> None:
    """1 forward, 4 s of two flows that take 2 alone, 3 of computing."""
    flow = TransferCost(2.0, 0.0, bytes=20, links=(0,))
    timeline = to_one(flow, flow, (10.0,))
    assert timeline.exposed_communication_seconds == pytest.approx(4)
    assert timeline.makespan_seconds == pytest.approx(8)


def test_the_critical_path_names_the_contention() -> None:
    flow = TransferCost(2.0, 0.5, bytes=20, links=(0,))
    timeline = to_one(flow, flow, (10.0,))
    assert timeline.critical_seconds["contention"] == pytest.approx(2)
    assert sum(timeline.critical_seconds.values()) == pytest.approx(timeline.makespan_seconds)


def chain(program: Program, count: int, flow: TransferCost) -> Moves:
    return {(s.stage, s.target, s.what): flow for row in program for s in row if isinstance(s, Send)}


@given(st.integers(2, 5), st.integers(1, 6), st.sampled_from(["1f1b", "gpipe", "zb-h1"]), st.floats(0.1, 3))
@settings(max_examples=60, deadline=None)
def test_links_wide_enough_for_all_change_no_bit(count: int, microbatches: int, name: str, wire: float) -> None:
    """All channels on one link that carries them all: the same numbers, to the last bit, as without any link."""
    program = build_program(name, count, microbatches)
    costs = tuple(replace(stage, input_seconds=0.5, weight_seconds=0.5) for stage in stages(count))
    free = simulate(program, PipelineCosts(costs, chain(program, count, TransferCost(wire, 0.1))))
    flow = TransferCost(wire, 0.1, bytes=10.0, links=(0,))
    wide = 10.0 / wire * 2 * count
    linked = simulate(program, PipelineCosts(costs, chain(program, count, flow), link_bytes_per_second=(wide,)))
    assert [(e.start_seconds, e.end_seconds) for e in linked.events] == [
        (e.start_seconds, e.end_seconds) for e in free.events
    ]


@given(st.integers(2, 5), st.integers(1, 6), st.sampled_from(["1f1b", "gpipe"]), st.floats(0.1, 3))
@settings(max_examples=60, deadline=None)
def test_sharing_a_link_never_makes_a_gpipe_step_quicker(count: int, m: int, name: str, wire: float) -> None:
    program = build_program(name, count, m)
    flow = TransferCost(wire, 0.0, bytes=10.0, links=(0,))
    free = simulate(program, PipelineCosts(stages(count), chain(program, count, TransferCost(wire, 0.0))))
    costs = PipelineCosts(stages(count), chain(program, count, flow), link_bytes_per_second=(10.0 / wire,))
    assert simulate(program, costs).makespan_seconds >= free.makespan_seconds - 1e-9


@pytest.mark.parametrize(
    ("flow", "links", "message"),
    [
        (TransferCost(2.0, 0.0, bytes=20, links=(1,)), (10.0,), "goes over link 1; there are 1"),
        (TransferCost(2.0, 0.0, bytes=20, links=(0,)), (0.0,), "a link has 0 bytes/s"),
        (TransferCost(2.0, 0.0, bytes=20, links=(0,)), (float("nan"),), "a link has nan bytes/s"),
        (TransferCost(1.0, 0.0, bytes=20, links=(0,)), (10.0,), "give it at least 2 s"),
        (TransferCost(2.0, 0.0, bytes=20, links=(0,), weights=(1.0, 2.0)), (10.0,), "1 links and 2 weights"),
        (TransferCost(2.0, 0.0, bytes=20, links=(0,), weights=(-1.0,)), (10.0,), "finite numbers above 0 are needed"),
        (TransferCost(0.0, 0.0, bytes=20, links=(0,)), (10.0,), "sends 20 bytes over links in no time"),
        (TransferCost(-2.0, 0.0), (10.0,), "finite numbers of at least 0 are needed"),
        (TransferCost(2.0, float("inf")), (10.0,), "finite numbers of at least 0 are needed"),
    ],
)
def test_impossible_transfers_are_refused(flow: TransferCost, links: tuple[float, ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        to_one(flow, flow, links)
