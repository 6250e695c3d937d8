"""The numbers of a step by hand, and a critical path that adds up."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.bare import StageTimes, play
from meshwright.simulate.build import build_program
from meshwright.simulate.metrics import Workload, critical_causes, explain, metrics, waiting_seconds
from meshwright.simulate.pipeline import PipelineCosts, StageCosts, TransferCost, simulate
from meshwright.simulate.program import Send
from meshwright.simulate.schedules.table import SCHEDULES
from meshwright.simulate.timeline import Event, Timeline
from meshwright.simulate.topology import CoreSharing


def test_the_numbers_of_two_stages_by_hand() -> None:
    """GPipe, 2 stages, 2 micro-batches, F = 1, B = 2, hop 0.5: (2 + 1)·3 + 2·0.5 = 10 s, each busy for 6 of them."""
    timeline = play("gpipe", 2, 2, hop_seconds=0.5)
    work = Workload(samples=4, tokens=400, model_flops=60.0, hardware_flops=80.0, peak_flops_per_second_per_device=10.0)
    seen = metrics(timeline, work)
    assert seen.step_seconds == 10
    assert seen.bubble_fraction == pytest.approx(0.4)
    assert seen.mesh_bubble_fractions == pytest.approx((0.4, 0.4))
    assert seen.imbalance == 0
    assert seen.exposed_communication_seconds == 1
    assert (seen.samples_per_second, seen.tokens_per_second) == (0.4, 40)
    assert seen.model_flops_per_second_per_device == 3
    assert (seen.mfu, seen.hfu) == (pytest.approx(0.3), pytest.approx(0.4))
    assert seen.peak_bytes == (2, 2)
    assert waiting_seconds(timeline) == (4.0, 1.5)  # the first stage for both cotangents, the second for its input


def test_a_channel_is_busy_while_its_bytes_are_on_their_way() -> None:
    stages = tuple(StageCosts(devices=(s,), forward_seconds=1, backward_seconds=1) for s in range(2))
    move = TransferCost(0.5, 0.0, bytes=100)
    costs = PipelineCosts(stages, {(0, 1, "activation"): move, (1, 0, "cotangent"): move})
    seen = metrics(simulate(build_program("gpipe", 2, 1), costs), costs=costs)
    assert seen.step_seconds == 5
    assert [(c.source, c.target, c.busy_fraction, c.bytes_per_second) for c in seen.channels] == [
        (0, 1, 0.1, 20),
        (1, 0, 0.1, 20),
    ]


@given(
    st.sampled_from(["1f1b", "gpipe", "interleaved", "zb-h1", "zb-v", "dualpipe-v"]),
    st.integers(1, 5),
    st.integers(1, 10),
    st.floats(0, 2),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_the_causes_add_up_to_the_whole(name: str, meshes: int, m: int, hop: float, busy_host: bool) -> None:
    """Of every schedule, with latency, wire time, tail, cores that are shared and a collective stream."""
    try:
        program = build_program(name, meshes, m, norm=True, gather=True, tied=[(0, meshes - 1)] if meshes > 1 else ())
    except ScheduleError:
        return
    count = meshes * SCHEDULES[name].chunks
    stages = tuple(
        StageCosts(
            devices=(next(r for r, row in enumerate(program) for step in row if step.stage == s),),
            forward_seconds=0.7,
            backward_seconds=1.3,
            input_seconds=0.6,
            weight_seconds=0.7,
            reduce_seconds=0.4,
            update_seconds=0.1,
            gather_seconds=0.2,
        )
        for s in range(count)
    )
    moves = {(s.stage, s.target, s.what): TransferCost(0.3, hop) for row in program for s in row if isinstance(s, Send)}
    cores = (CoreSharing(range(meshes), tuple(1 + 0.2 * k for k in range(meshes))),) if busy_host else ()
    timeline = simulate(program, PipelineCosts(stages, moves, cores, collective_stream=not busy_host))
    total = sum(cause.seconds for cause in critical_causes(timeline))
    assert total == pytest.approx(timeline.makespan_seconds, rel=1e-12)
    assert sum(timeline.critical_seconds.values()) == pytest.approx(timeline.makespan_seconds, rel=1e-12)


def test_a_person_reads_the_causes_largest_first_and_their_sum() -> None:
    text = explain(play("1f1b", 2, 4, StageTimes(1, 1, 1), hop_seconds=0.25), most=2)
    lines = text.splitlines()
    assert lines[0].startswith("backward of stage")
    assert "smaller causes" in lines[2]
    assert lines[-1].split()[-2:] == ["s", "100.0%"]
    assert "no critical path" in explain(Timeline((), ()))


def test_what_is_not_known_is_left_out_of_json() -> None:
    data = json.loads(json.dumps(metrics(play("1f1b", 2, 2)).to_json()))
    assert "mfu" not in data
    assert data["step_seconds"] == 9
    assert sum(cause["seconds"] for cause in data["causes"]) == 9


def test_an_empty_timeline_has_numbers_too() -> None:
    assert metrics(Timeline((), ())).step_seconds == 0
    assert metrics(Timeline(((0,),), (Event(0, Send(0, 1, "activation", 0), 0, 0),))).channels[0].busy_fraction == 0


def test_a_peak_of_nothing_is_refused() -> None:
    with pytest.raises(ScheduleError, match="more than 0 is needed"):
        Workload(samples=1, tokens=1, model_flops=1, peak_flops_per_second_per_device=0)
