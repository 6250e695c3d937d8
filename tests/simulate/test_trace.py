"""Traces as Perfetto wants them: slices that nest or touch, arrows from slice to slice, counters in order."""

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from meshwright.errors import ScheduleError
from meshwright.simulate.bare import play
from meshwright.simulate.build import build_program
from meshwright.simulate.pipeline import PipelineCosts, StageCosts, TransferCost, simulate
from meshwright.simulate.program import Backward, Forward, Gather, Receive, Reduce, Send, parse
from meshwright.simulate.timeline import Event, Timeline
from meshwright.simulate.trace import mesh_label, trace_data, write_trace

MEASURED = Timeline(
    mesh_devices=((0,), (1, 2, 3)),
    events=(
        Event(0, Forward(0, 0), 0, 2),
        Event(1, Receive(1, 0, "activation", 0), 0, 3),
        Event(0, Send(0, 1, "activation", 0), 2, 3),
        Event(1, Forward(1, 0), 3, 4),
        Event(1, Backward(1, 0), 4, 8),
    ),
)


def costs(stages: int, *, stream: bool, sends: list[Send]) -> PipelineCosts:
    stage = [
        StageCosts(
            devices=(2 * s, 2 * s + 1),
            forward_seconds=0.01,
            backward_seconds=0.0213,
            input_seconds=0.0109,
            weight_seconds=0.0104,
            reduce_seconds=0.004,
            update_seconds=0.003,
            gather_seconds=0.002,
            static_bytes=1e9,
            saved_bytes=1e8,
            transient_bytes=1e7,
        )
        for s in range(stages)
    ]
    moves = {(one.stage, one.target, one.what): TransferCost(0.0017, 0.0005, bytes=5e6) for one in sends}
    return PipelineCosts(tuple(stage), moves, collective_stream=stream)


def pipeline(
    schedule: str = "1f1b", stages: int = 2, microbatches: int = 3, *, chunks: int | None = None, stream: bool = False
) -> tuple[Timeline, PipelineCosts]:
    program = build_program(schedule, stages, microbatches, chunks=chunks, gather=True)
    sends = [step for row in program for step in row if isinstance(step, Send)]
    price = costs(stages * (chunks or 1), stream=stream, sends=sends)
    return simulate(program, price), price


def records(timelines: list[tuple[str, Timeline]], phase: str, **options: Any) -> list[dict[str, Any]]:
    return [record for record in trace_data(timelines, **options)["traceEvents"] if record["ph"] == phase]


def tracks(timelines: list[tuple[str, Timeline]]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(Start, end) of the slices of each track, by start, in nanoseconds."""
    found = defaultdict(list)
    for record in records(timelines, "X"):
        start = round(record["ts"] * 1000)
        found[record["pid"], record["tid"]].append((start, start + round(record["dur"] * 1000)))
    return {track: sorted(slices) for track, slices in found.items()}


@pytest.mark.parametrize(
    ("devices", "label"),
    [((4,), "mesh 1 · device 4"), ((4, 5, 6), "mesh 1 · devices 4–6"), ((4, 6), "mesh 1 · devices 4, 6")],
)
def test_a_track_is_named_by_its_devices(devices: tuple[int, ...], label: str) -> None:
    assert mesh_label(1, devices) == label


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", None), ("zb-h1", None), ("interleaved", 2)])
def test_the_slices_of_a_track_do_not_overlap(schedule: str, chunks: int | None, stream: bool) -> None:
    """In whole nanoseconds: Perfetto drops slices that overlap without nesting."""
    timeline, _ = pipeline(schedule, 4, 20, chunks=chunks, stream=stream)
    found = tracks([("predicted", timeline), ("measured", MEASURED)])
    assert {(1, 1), (1, 3), (1, 5), (1, 7), (2, 1), (2, 3)} <= found.keys()
    for slices in found.values():
        assert all(end <= after for (_, end), (after, _) in pairwise(slices))


def two_stages_on_one_mesh() -> Timeline:
    """The second stage's reduction runs on the stream, under the first stage's backward."""
    return simulate(parse("0F0 1F0 1B0 0B0 1R 0R 1U 0U"), costs(2, stream=True, sends=[]))


def test_collectives_beside_the_computation_have_a_track_of_their_own() -> None:
    timeline = two_stages_on_one_mesh()
    of_track = {
        track: [r["args"]["instruction"] for r in records([("p", timeline)], "X") if r["tid"] == track]
        for track in (1, 2)
    }
    assert of_track == {1: ["0F0", "1F0", "1B0", "0B0", "1U", "0U"], 2: ["1R", "0R"]}
    names = [r["args"]["name"] for r in records([("p", timeline)], "M") if r["name"] == "thread_name"]
    assert names == ["mesh 0 · devices 0–1", "mesh 0 · collectives"]
    for slices in tracks([("p", timeline)]).values():
        assert all(end <= after for (_, end), (after, _) in pairwise(slices))


def test_every_instruction_that_lasts_is_a_slice() -> None:
    timeline, _ = pipeline("zb-h1", 3, 5)
    lasting = [
        e for e in timeline.events if not isinstance(e.instruction, Send) and e.end_seconds > e.start_seconds + 1e-9
    ]
    slices = records([("p", timeline)], "X")
    assert len(slices) == len(lasting)
    assert {"forward", "backwardinput", "backwardweight", "receive", "reduce", "update", "gather"} == {
        r["cat"] for r in slices
    }


@pytest.mark.parametrize("stream", [False, True])
def test_every_arrow_has_two_ends_inside_slices_and_points_forward(stream: bool) -> None:
    timeline, _ = pipeline("interleaved", 2, 4, chunks=2, stream=stream)
    starts = {(r["pid"], r["id"]): r for r in records([("p", timeline)], "s")}
    ends = {(r["pid"], r["id"]): r for r in records([("p", timeline)], "f")}
    receives = sum(isinstance(event.instruction, Receive) for event in timeline.events)
    assert starts.keys() == ends.keys()
    assert len(starts) == receives
    slices = tracks([("p", timeline)])
    for key, start in starts.items():
        assert start["ts"] <= ends[key]["ts"]
        for one in (start, ends[key]):
            assert any(
                low <= one["ts"] * 1000 + 1 and one["ts"] * 1000 - 1 <= high for low, high in slices[1, one["tid"]]
            )


def test_arrows_of_two_timelines_do_not_mix() -> None:
    arrows = records([("predicted", pipeline()[0]), ("measured", pipeline()[0])], "s")
    assert len({record["id"] for record in arrows}) == len(arrows)


def test_transfers_open_and_close() -> None:
    timeline, _ = pipeline()
    opened = [record["id"] for record in records([("p", timeline)], "b")]
    assert sorted(opened) == sorted(record["id"] for record in records([("p", timeline)], "e"))
    assert len(opened) == len(set(opened)) == sum(isinstance(e.instruction, Send) for e in timeline.events)


def counters(timeline: Timeline, **options: Any) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for record in records([("p", timeline)], "C", **options):
        found[record["name"]].append(record)
    for one in found.values():
        assert all(before["ts"] <= after["ts"] for before, after in pairwise(one))
    return found


def test_memory_is_counted_in_two_layers_that_add_up() -> None:
    timeline, _ = pipeline()
    counted = [r["args"] for r in counters(timeline)["mesh 0 bytes per device"]]
    assert {layers["always"] for layers in counted} == {1e9}
    assert max(layers["always"] + layers["comes and goes"] for layers in counted) == timeline.peak_bytes[0]
    assert timeline.peak_bytes[0] == 1e9 + 2e8 + 1e7


def test_bytes_in_flight_are_those_of_the_costs_and_end_at_nothing() -> None:
    """The area under the counter is bytes × seconds of all transfers of the channel."""
    timeline, price = pipeline("gpipe", 2, 6)
    steps = counters(timeline, costs=price)["stage 0 → 1 bytes in flight"]
    area = sum(a["args"]["bytes"] * (b["ts"] - a["ts"]) for a, b in pairwise(steps))
    assert area == pytest.approx(6 * 5e6 * 2.2e3, rel=1e-9)
    assert steps[-1]["args"]["bytes"] == 0
    messages = counters(timeline)["stage 0 → 1 messages in flight"]
    assert [r["args"]["messages"] * 5e6 for r in messages] == [r["args"]["bytes"] for r in steps]


def test_a_trace_that_is_too_large_loses_detail_and_never_work() -> None:
    """Arrows first, then transfers, then waits; what is left out is written in the trace."""
    timeline, _ = pipeline("1f1b", 4, 30)
    whole = trace_data([("p", timeline)])
    assert whole["otherData"] == {"left out": []}
    for most, lost in ((len(whole["traceEvents"]) - 30, ["arrows"]), (1, ["arrows", "transfers", "waits"])):
        data = trace_data([("p", timeline)], most_records=most)
        assert data["otherData"] == {"left out": lost}
        work = [r for r in data["traceEvents"] if r["ph"] == "X" and r["cat"] != "receive"]
        assert len(work) == 4 * (2 * 30 + 3)
        label = next(r for r in data["traceEvents"] if r["name"] == "process_labels")
        assert label["args"]["labels"] == "left out: " + ", ".join(lost)
    with pytest.raises(ScheduleError, match="at most 0 records"):
        trace_data([], most_records=0)


def test_thinned_memory_keeps_the_peak_and_the_end() -> None:
    timeline = play("gpipe", 2, 3000)
    steps = counters(timeline, most_records=9000)["mesh 1 bytes per device"]
    assert len(steps) < 1100 < len(timeline.live_bytes[1])
    assert max(sum(r["args"].values()) for r in steps) == timeline.peak_bytes[1] == 3000
    assert sum(steps[-1]["args"].values()) == 0


def test_the_trace_is_one_json_object(tmp_path: Path) -> None:
    for name in ("trace.json", "trace.json.gz"):
        write_trace([("measured", MEASURED)], tmp_path / name)
    text = (tmp_path / "trace.json").read_text(encoding="utf-8")
    assert gzip.decompress((tmp_path / "trace.json.gz").read_bytes()).decode() == text
    data = json.loads(text)
    assert data == trace_data([("measured", MEASURED)])
    names = [r["args"]["name"] for r in data["traceEvents"] if r["name"] in ("process_name", "thread_name")]
    assert names == ["measured", "mesh 0 · device 0", "mesh 1 · devices 1–3"]


def test_a_measured_reduction_beside_a_backward_is_seen() -> None:
    events = (Event(0, Backward(0, 0), 0, 3), Event(0, Reduce(0), 1, 2), Event(0, Gather(0), 3, 4))
    slices = records([("m", Timeline(((0,),), events))], "X")
    assert [(r["cat"], r["tid"]) for r in slices] == [("backward", 1), ("reduce", 2), ("gather", 2)]
