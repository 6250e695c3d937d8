"""Pipelines against the closed forms of their schedules, hop latency and memory included."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.bare import StageTimes, play
from meshwright.simulate.build import build_program
from meshwright.simulate.pipeline import PipelineCosts, StageCosts, TransferCost, simulate
from meshwright.simulate.program import Payload, Program, Receive, Send, parse, word
from meshwright.simulate.schedules.base import Options
from meshwright.simulate.schedules.table import SCHEDULES
from meshwright.simulate.timeline import Timeline
from meshwright.simulate.topology import CoreSharing

PAYLOADS: tuple[Payload, ...] = ("activation", "cotangent", "gradient", "parameter")


def transfers(program: Program, cost: TransferCost) -> Mapping[tuple[int, int, Payload], TransferCost]:
    return {(s.stage, s.target, s.what): cost for row in program for s in row if isinstance(s, Send)}


def equal_stages(
    schedule: str, stages: int, microbatches: int, forward: float = 1, backward: float = 2, hop: float = 0
) -> Timeline:
    program = build_program(schedule, stages, microbatches)
    costs = tuple(
        StageCosts(devices=(s,), forward_seconds=forward, backward_seconds=backward, saved_bytes=1)
        for s in range(stages)
    )
    return simulate(program, PipelineCosts(costs, transfers(program, TransferCost(0, hop))))


VARIANTS = {  # names of the table that are options of ours
    "interleaved_1f1b_v2": ("interleaved", Options(chunks=2)),
    "interleaved_1f1b_v4": ("interleaved", Options(chunks=4)),
    "looped_bfs_v2": ("looped-bfs", Options(chunks=2)),
    "looped_bfs_v4": ("looped-bfs", Options(chunks=4)),
    "dualpipe_seq": ("dualpipe", Options()),
    "dualpipe_atomic": ("dualpipe", Options(atomic_pairs=True)),
    "dualpipe_v_seq": ("dualpipe-v", Options()),
    "dualpipe_v_atomic": ("dualpipe-v", Options(atomic_pairs=True)),
    "chimera_F1B1": ("chimera", Options()),
}


def two_branches(stages: int) -> Options:
    """Half of the stages but the last in each of two branches, which meet in the last."""
    half = stages // 2
    first, second = range(half), range(half, stages - 1)
    edges = [*pairwise(first), *pairwise(second), (half - 1, stages - 1), (stages - 2, stages - 1)]
    return Options(edges=tuple(sorted(edges)))


def test_every_row_of_the_published_table_holds_exactly(oracle: dict[str, Any]) -> None:
    """Makespan, span, peak of each device and bubble of all schedules, through the whole simulator."""
    for row in oracle["rows"]:
        name, options = VARIANTS.get(row["schedule"], (row["schedule"].replace("_", "-"), Options()))
        share = row["times"]["F"] * (options.chunks or SCHEDULES[name].chunks if name in SCHEDULES else 1)
        if row["schedule"] == "graph_1f1b_two_branch":
            name, options, share = "graph-1f1b", two_branches(row["S"]), row["times"]["F"]
        scale = share / row["times"]["F"]
        parts = (row["times"][part] * scale for part in "FIW")
        if row["times"]["B"] != row["times"]["I"] + row["times"]["W"]:
            parts = iter((row["times"]["F"] * scale, row["times"]["B"] * scale, 0.0))
        timeline = play(name, row["S"], row["M"], StageTimes(*parts), options=options)
        assert timeline.makespan_seconds == row["makespan"], row
        assert timeline.span_seconds == row["max_stage_span"], row
        assert timeline.peak_bytes == tuple(row["peak_activations"]), row
        assert timeline.bubble_fraction == pytest.approx(row["bubble_ratio"], abs=1e-6), row


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_hop_latency_equals_the_published_table(name: str, oracle: dict[str, Any]) -> None:
    for key, expected in oracle["comm"].items():
        stages, microbatches, hop = (float(part.partition("=")[2]) for part in key.split(","))
        assert equal_stages(name, int(stages), int(microbatches), hop=hop).makespan_seconds == expected[name]


quarters = st.integers(0, 12).map(lambda n: n / 4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["gpipe", "gpipe-lifo"]), st.integers(1, 8), st.integers(1, 20), quarters, quarters, quarters)
def test_gpipe_pays_each_hop_twice(name: str, s: int, m: int, f: float, b: float, c: float) -> None:
    """T = (M + S - 1)(F + B) + 2(S - 1)c for any latency, first in first out; the peak is M everywhere."""
    timeline = equal_stages(name, s, m, f, b, c)
    if name == "gpipe" or c == 0:
        assert timeline.makespan_seconds == (m + s - 1) * (f + b) + 2 * (s - 1) * c
    assert timeline.peak_bytes == (m,) * s


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 12), st.integers(1, 12), st.integers(0, 12))
def test_one_f_one_b_pays_latency_every_s_microbatches(s: int, k: int, f4: int, b4: int, c4: int) -> None:
    """T = (M + S - 1)(F + B) + 2c[M(S - 1)/S + S - 2] where S divides M; the peak of stage s is min(M, S - s)."""
    m, f, b, c = k * s, f4 / 4, b4 / 4, c4 / 4
    timeline = equal_stages("1f1b", s, m, f, b, c)
    hops = 2 * (m * (s - 1) // s + s - 2) if s > 1 else 0
    assert timeline.makespan_seconds == (m + s - 1) * (f + b) + hops * c
    assert timeline.peak_bytes == tuple(min(m, s - i) for i in range(s))


def test_the_critical_path_adds_up_to_the_makespan_by_cause() -> None:
    timeline = equal_stages("gpipe", 4, 8, hop=0.5)
    causes = timeline.critical_seconds
    assert causes == {"forward": 11, "backward": 22, "transfer": 3}
    assert sum(causes.values()) == timeline.makespan_seconds
    assert timeline.exposed_communication_seconds == 3


def one_hop(**transfer: TransferCost) -> Timeline:
    costs = tuple(StageCosts(devices=(s,), forward_seconds=1, backward_seconds=1) for s in range(2))
    both: dict[tuple[int, int, Payload], TransferCost] = {
        (0, 1, "activation"): transfer["activation"],
        (1, 0, "cotangent"): transfer["cotangent"],
    }
    return simulate(build_program("gpipe", 2, 2), PipelineCosts(costs, both))


def test_bytes_queue_on_their_channel_and_latency_does_not() -> None:
    """Two activations of 3 s leave one after another: at 1..4 and 4..7; each then travels for half a second."""
    timeline = one_hop(activation=TransferCost(3, 0.5), cotangent=TransferCost(0, 0))
    sends = [e for e in timeline.events if isinstance(e.instruction, Send) and e.mesh == 0]
    assert [(e.start_seconds, e.end_seconds) for e in sends] == [(1, 4.5), (4, 7.5)]
    waits = [e for e in timeline.events if isinstance(e.instruction, Receive) and e.mesh == 1]
    assert [(e.start_seconds, e.end_seconds) for e in waits] == [(0, 4.5), (5.5, 7.5)]
    assert timeline.makespan_seconds == 7.5 + 1 + 1 + 1 + 1


def test_channels_that_name_one_link_share_it() -> None:
    """Two stages send to a third at once: on one link of their own 2 s each, on one link for both 4 s each."""
    program = parse("0F0 0>2a0 0<2c0 0B0\n1F0 1>2a0 1<2c0 1B0\n2<0a0 2<1a0 2F0 2B0 2>0c0 2>1c0")
    costs = tuple(StageCosts(devices=(s,), forward_seconds=1, backward_seconds=1) for s in range(3))
    makespans = []
    for links in ((0, 1), (0, 0), (None, None)):
        moves = {
            (0, 2, "activation"): (2.0, 0.0, links[0]),
            (1, 2, "activation"): (2.0, 0.0, links[1]),
            (2, 0, "cotangent"): (0.0, 0.0, None),
            (2, 1, "cotangent"): (0.0, 0.0, None),
        }
        timeline = simulate(program, PipelineCosts(costs, moves))  # type: ignore[arg-type]
        makespans.append(timeline.makespan_seconds)
    assert makespans == [6, 8, 6]


def test_ranks_that_share_cores_slow_each_other() -> None:
    """Four independent ranks on two cores: twice as long; the critical path blames the sharing."""
    program = parse("\n".join(f"{s}F0 {s}B0" for s in range(4)))
    costs = tuple(StageCosts(devices=(s,), forward_seconds=1, backward_seconds=2) for s in range(4))
    cores = (CoreSharing(range(4), (1.0, 1.0, 1.5, 2.0)),)
    timeline = simulate(program, PipelineCosts(costs, {}, cores))
    assert timeline.makespan_seconds == 6
    assert timeline.critical_seconds == {"forward": 1, "backward": 2, "contention": 3}


def test_a_stage_of_four_devices_takes_four_turns() -> None:
    stage = StageCosts(devices=(0, 1, 2, 3), forward_seconds=1, backward_seconds=2)
    cores = (CoreSharing(range(4), (1.0, 1.0, 1.5, 2.0)),)
    assert simulate(parse("0F0 0B0"), PipelineCosts((stage,), {}, cores)).makespan_seconds == 6


def test_memory_is_static_plus_saved_plus_the_transient_of_what_runs() -> None:
    stage = StageCosts(
        devices=(0,), forward_seconds=1, backward_seconds=1, static_bytes=100, saved_bytes=10, transient_bytes=3
    )
    timeline = simulate(build_program("gpipe", 1, 2), PipelineCosts((stage,), {}))
    held = [
        (0.0, 113.0),
        (1.0, 110.0),
        (1.0, 123.0),
        (2.0, 120.0),
        (2.0, 123.0),
        (3.0, 110.0),
        (3.0, 113.0),
        (4.0, 100.0),
    ]
    assert timeline.live_bytes == (((0.0, 100.0), *held),)
    assert timeline.peak_bytes == (123.0,)


def test_the_tail_waits_for_tied_weights() -> None:
    """Gradient 3 s to the owner, update 1 s, parameter 3 s back: the step is longer by the whole exchange."""
    program = build_program("gpipe", 2, 1, tied=[(0, 1)])
    costs = tuple(
        StageCosts(devices=(s,), forward_seconds=1, backward_seconds=1, reduce_seconds=0.5, update_seconds=1)
        for s in range(2)
    )
    moves = dict(transfers(program, TransferCost(0, 0)))
    moves[1, 0, "gradient"] = moves[0, 1, "parameter"] = TransferCost(3, 0)
    timeline = simulate(program, PipelineCosts(costs, moves))
    assert timeline.makespan_seconds == 1 + 1 + 1 + 0.5 + 3 + 1 + 3
    assert timeline.critical_seconds == {"forward": 2, "backward": 1, "reduce": 0.5, "transfer": 6, "update": 1}


def test_what_has_no_cost_is_refused() -> None:
    stage = StageCosts(devices=(0,), forward_seconds=1, backward_seconds=1)
    with pytest.raises(ScheduleError, match="2 stages, but costs are given for 1"):
        simulate(build_program("1f1b", 2, 1), PipelineCosts((stage,), {}))
    with pytest.raises(ScheduleError, match="0>1a0: the activation from stage 0 to stage 1 has no cost"):
        simulate(build_program("1f1b", 2, 1), PipelineCosts((stage, stage), {}))
    free = transfers(build_program("1f1b", 2, 1), TransferCost(0.0, 0.0))
    with pytest.raises(ScheduleError, match="device 0 is in mesh 0 and in mesh 1"):
        simulate(build_program("1f1b", 2, 1), PipelineCosts((stage, stage), free))
    with pytest.raises(ScheduleError, match="has no partner"):
        simulate(parse("0<1c0 0F0"), PipelineCosts((stage,), {}))
    with pytest.raises(ScheduleError, match="forward_seconds of a stage is -1"):
        StageCosts(devices=(0,), forward_seconds=-1, backward_seconds=1)
    with pytest.raises(ScheduleError, match="no devices"):
        StageCosts(devices=(), forward_seconds=1, backward_seconds=1)


def test_gradients_that_are_ready_first_are_summed_first_beside_the_rest() -> None:
    """Two chunks on each of two meshes: the later chunk's backwards end first, so that its sum is hidden."""
    program = build_program("interleaved", 2, 4, chunks=2)
    assert [word(step) for step in program[0][-4:]] == ["2R", "0R", "2U", "0U"]
    costs = tuple(
        StageCosts(devices=(s % 2,), forward_seconds=0.5, backward_seconds=1.0, reduce_seconds=1.0) for s in range(4)
    )
    moves = transfers(program, TransferCost(0, 0))
    beside = simulate(program, PipelineCosts(costs, moves, collective_stream=True))
    after = simulate(program, PipelineCosts(costs, moves))
    assert after.makespan_seconds == 13.5 + 2
    assert beside.makespan_seconds == 13.5 + 1
