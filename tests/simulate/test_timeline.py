"""Timelines: their numbers by hand, their trace as Perfetto wants it, and pictures that hold what they say."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from meshwright.errors import ScheduleError
from meshwright.simulate.build import build_program
from meshwright.simulate.gantt import plot_timeline, plot_timelines
from meshwright.simulate.pipeline import PipelineCosts, StageCosts, TransferCost, simulate
from meshwright.simulate.program import Backward, Forward, Receive, Send
from meshwright.simulate.timeline import Event, Timeline
from meshwright.simulate.trace import mesh_label, trace_data, write_trace


def pipeline(schedule: str = "1f1b", stages: int = 2, microbatches: int = 3) -> Timeline:
    program = build_program(schedule, stages, microbatches, tied=[(0, stages - 1)] if stages > 1 else [])
    costs = tuple(
        StageCosts(
            devices=(2 * s, 2 * s + 1),
            forward_seconds=0.01,
            backward_seconds=0.0213,
            reduce_seconds=0.004,
            update_seconds=0.003,
            static_bytes=1e9,
            saved_bytes=1e8,
            transient_bytes=1e7,
        )
        for s in range(stages)
    )
    sends = (step for row in program for step in row if isinstance(step, Send))
    moves = {(send.stage, send.target, send.what): TransferCost(0.0017, 0.0005) for send in sends}
    return simulate(program, PipelineCosts(costs, moves))


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


def test_the_numbers_of_a_measured_timeline() -> None:
    """Busy: 2 s on one device and 5 s on three, of 8 s on four; a wait is not work."""
    assert MEASURED.makespan_seconds == 8
    assert MEASURED.span_seconds == 5
    assert MEASURED.busy_seconds == (2, 5)
    assert MEASURED.bubble_fraction == pytest.approx(1 - 17 / 32)
    assert MEASURED.critical_seconds == {}


def test_nothing_has_no_bubble() -> None:
    empty = Timeline((), ())
    assert (empty.makespan_seconds, empty.span_seconds, empty.bubble_fraction) == (0, 0, 0)


def test_an_event_cannot_end_before_it_starts() -> None:
    with pytest.raises(ScheduleError, match="runs from 2 to 1"):
        Event(0, Forward(0, 0), 2, 1)


@pytest.mark.parametrize(
    ("devices", "label"),
    [((4,), "mesh 1 · device 4"), ((4, 5, 6), "mesh 1 · devices 4–6"), ((4, 6), "mesh 1 · devices 4, 6")],
)
def test_a_track_is_named_by_its_devices(devices: tuple[int, ...], label: str) -> None:
    assert mesh_label(1, devices) == label


def records(timelines: list[tuple[str, Timeline]], phase: str) -> list[dict[str, Any]]:
    return [record for record in trace_data(timelines)["traceEvents"] if record["ph"] == phase]


def test_the_slices_of_a_track_do_not_overlap() -> None:
    """In whole nanoseconds: Perfetto drops slices that overlap without nesting."""
    tracks = defaultdict(list)
    for record in records([("predicted", pipeline(microbatches=40)), ("measured", MEASURED)], "X"):
        tracks[record["pid"], record["tid"]].append((round(record["ts"] * 1000), round(record["dur"] * 1000)))
    assert sorted(tracks) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for slices in tracks.values():
        slices.sort()
        for (start, length), (after, _) in pairwise(slices):
            assert start + length <= after


def test_every_arrow_has_two_ends_inside_slices_and_points_forward() -> None:
    timeline = pipeline()
    starts = {(r["pid"], r["id"]): r for r in records([("p", timeline)], "s")}
    ends = {(r["pid"], r["id"]): r for r in records([("p", timeline)], "f")}
    receives = sum(isinstance(event.instruction, Receive) for event in timeline.events)
    assert starts.keys() == ends.keys()
    assert len(starts) == receives
    slices = [(r["tid"], r["ts"], r["ts"] + r["dur"]) for r in records([("p", timeline)], "X")]
    for key, start in starts.items():
        assert start["ts"] <= ends[key]["ts"]
        assert any(tid == start["tid"] and low <= start["ts"] <= high for tid, low, high in slices)


def test_arrows_of_two_timelines_do_not_mix() -> None:
    arrows = records([("predicted", pipeline()), ("measured", pipeline())], "s")
    assert len({record["id"] for record in arrows}) == len(arrows)


def test_transfers_open_and_close_and_memory_is_counted() -> None:
    timeline = pipeline()
    opened = [record["id"] for record in records([("p", timeline)], "b")]
    assert sorted(opened) == sorted(record["id"] for record in records([("p", timeline)], "e"))
    assert len(opened) == len(set(opened)) == sum(isinstance(e.instruction, Send) for e in timeline.events)
    counted = [r["args"]["bytes"] for r in records([("p", timeline)], "C") if r["name"].startswith("mesh 0")]
    assert max(counted) == timeline.peak_bytes[0] == 1e9 + 2e8 + 1e7


def test_the_trace_is_one_json_object(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace([("measured", MEASURED)], path)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data == trace_data([("measured", MEASURED)])
    names = [r["args"]["name"] for r in data["traceEvents"] if r["name"] in ("process_name", "thread_name")]
    assert names == ["measured", "mesh 0 · device 0", "mesh 1 · devices 1–3"]


def share_of(colour: tuple[float, float, float], path: Path) -> float:
    """Share of the picture's pixels that have a colour."""
    pixels = imread(path)[..., :3]
    return float((abs(pixels - colour).max(axis=-1) < 0.01).mean())


BLUE, ORANGE = (0x56 / 255, 0xB4 / 255, 0xE9 / 255), (0xE6 / 255, 0x9F / 255, 0)


def test_a_picture_shows_backward_twice_as_long_as_forward(tmp_path: Path) -> None:
    path = tmp_path / "gantt.png"
    stages = tuple(StageCosts(devices=(s,), forward_seconds=1, backward_seconds=2) for s in range(4))
    program = build_program("gpipe", 4, 4)
    moves = {(s, t, w): TransferCost(0, 0) for s in range(4) for t in range(4) for w in ("activation", "cotangent")}
    plot_timeline(simulate(program, PipelineCosts(stages, moves)), path)  # type: ignore[arg-type]
    assert share_of(ORANGE, path) / share_of(BLUE, path) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 3), (64, 64)])
def test_pictures_of_all_sizes_are_drawn(stages: int, microbatches: int, tmp_path: Path) -> None:
    timeline = pipeline("gpipe", stages, microbatches)
    plot_timelines([("predicted", timeline), ("measured", timeline)], tmp_path / "both.png")
    height, width = imread(tmp_path / "both.png").shape[:2]
    assert width == 1690
    assert 250 < height < 3800


@pytest.mark.parametrize(("name", "message"), [("x.exe", "'exe' is no kind"), ("x", "'no ending' is no kind")])
def test_a_path_that_is_no_picture_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=message):
        plot_timeline(MEASURED, tmp_path / name)


def test_nothing_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="cannot be drawn"):
        plot_timelines([], tmp_path / "x.png")
