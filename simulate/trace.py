"""Timelines as a Chrome trace, which ui.perfetto.dev and chrome://tracing open.

One process a timeline, one thread a mesh, transfers as asynchronous slices, arrows from each payload's maker to its
user, and a counter of the bytes that each device of a mesh holds.
Format: "Trace Event Format", Google, 2016 (JSON object form; times in microseconds).
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from meshwright.simulate.program import Backward, Forward, Instruction, Receive, Reduce, Send, Update, word
from meshwright.simulate.timeline import COMPUTE, Event, Timeline

Record = dict[str, Any]


def trace_data(timelines: Sequence[tuple[str, Timeline]]) -> Record:
    """The trace of named timelines, as plain JSON data."""
    events = [
        record
        for process, (name, timeline) in enumerate(timelines, start=1)
        for record in _process(process, name, timeline)
    ]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def write_trace(timelines: Sequence[tuple[str, Timeline]], path: str | os.PathLike[str]) -> None:
    """Write the trace of named timelines, such as ``[("predicted", p), ("measured", m)]``, to a JSON file."""
    Path(path).write_text(json.dumps(trace_data(timelines), separators=(",", ":"), allow_nan=False), encoding="utf-8")


def mesh_label(mesh: int, devices: tuple[int, ...]) -> str:
    """``mesh 1 · devices 2–3``; numbers that do not follow each other are listed."""
    if len(devices) == 1:
        return f"mesh {mesh} · device {devices[0]}"
    if devices == tuple(range(devices[0], devices[0] + len(devices))):
        return f"mesh {mesh} · devices {devices[0]}–{devices[-1]}"
    return f"mesh {mesh} · devices {', '.join(map(str, devices))}"


def _process(process: int, name: str, timeline: Timeline) -> Iterator[Record]:
    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}
    for mesh, devices in enumerate(timeline.mesh_devices):
        thread = {"ph": "M", "pid": process, "tid": mesh + 1}
        yield {**thread, "name": "thread_name", "args": {"name": mesh_label(mesh, devices)}}
        yield {**thread, "name": "thread_sort_index", "args": {"sort_index": mesh}}
    sent: dict[Instruction, tuple[int, Event]] = {}
    maker: dict[int, Event] = {}
    for number, event in enumerate(_in_order(timeline.events)):
        step = event.instruction
        if isinstance(step, Send):
            yield from _transfer(process, number, event)
            if event.mesh in maker:
                sent[step] = (number, maker[event.mesh])
            continue
        if isinstance(step, COMPUTE):
            maker[event.mesh] = event
        if _nanoseconds(event.end_seconds) > _nanoseconds(event.start_seconds):
            yield {
                **_at(process, event.mesh, event.start_seconds),
                "ph": "X",
                "dur": (_nanoseconds(event.end_seconds) - _nanoseconds(event.start_seconds)) / 1000,
                "name": _title(step),
                "cat": type(step).__name__.lower(),
                "args": {"instruction": word(step)},
            }
    for event in timeline.events:
        step = event.instruction
        if isinstance(step, Receive) and (send := Send(step.source, step.stage, step.what, step.microbatch)) in sent:
            number, made = sent[send]
            arrow = {"cat": "transfer", "name": step.what, "id": number}
            middle = (made.start_seconds + made.end_seconds) / 2
            yield {**_at(process, made.mesh, middle), **arrow, "ph": "s"}
            yield {**_at(process, event.mesh, event.end_seconds), **arrow, "ph": "f", "bp": "e"}
    for mesh, steps in enumerate(timeline.live_bytes):
        for seconds, held in steps:
            counter = f"mesh {mesh} bytes per device"
            yield {
                "ph": "C",
                "pid": process,
                "ts": _nanoseconds(seconds) / 1000,
                "name": counter,
                "args": {"bytes": held},
            }


def _in_order(events: Sequence[Event]) -> list[Event]:
    """By time; a computation that ends when a send begins comes before the send that it feeds."""
    return sorted(events, key=lambda e: (e.start_seconds, isinstance(e.instruction, Send), e.end_seconds))


def _transfer(process: int, number: int, event: Event) -> Iterator[Record]:
    send = event.instruction
    assert isinstance(send, Send)
    slice_ = {
        "cat": "transfer",
        "name": f"stage {send.stage} → {send.target}: {send.what}",
        "id": f"{process}.{number}",
    }
    yield {**_at(process, event.mesh, event.start_seconds), **slice_, "ph": "b", "args": {"instruction": word(send)}}
    yield {**_at(process, event.mesh, event.end_seconds), **slice_, "ph": "e"}


def _title(step: Instruction) -> str:
    match step:
        case Forward(_, m):
            return f"forward {m}"
        case Backward(_, m):
            return f"backward {m}"
        case Receive(_, source, what, _):
            return f"wait for {what} of stage {source}"
        case Reduce():
            return "reduce gradients"
        case Update():
            return "update"
        case Send(_, target, what, _):
            return f"send {what} to stage {target}"


def _at(process: int, mesh: int, seconds: float) -> Record:
    return {"pid": process, "tid": mesh + 1, "ts": _nanoseconds(seconds) / 1000}


def _nanoseconds(seconds: float) -> int:
    """Whole nanoseconds, so that slices which touch do not overlap by a rounding error."""
    return round(seconds * 1e9)
