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

from meshwright.simulate.program import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Gather,
    Instruction,
    Receive,
    Reduce,
    Send,
    Update,
    makers,
    word,
)
from meshwright.simulate.timeline import Event, Timeline

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
    ran = {event.instruction: event for event in timeline.events}
    for number, event in enumerate(timeline.events):
        step = event.instruction
        if isinstance(step, Send):
            yield from _transfer(f"{process}.{number}", process, event, step)
        elif _nanoseconds(event.end_seconds) > _nanoseconds(event.start_seconds):
            yield {
                **_at(process, event.mesh, event.start_seconds),
                "ph": "X",
                "dur": (_nanoseconds(event.end_seconds) - _nanoseconds(event.start_seconds)) / 1000,
                "name": _title(step),
                "cat": type(step).__name__.lower(),
                "args": {"instruction": word(step)},
            }
        if isinstance(step, Receive):
            sent = Send(step.source, step.stage, step.what, step.microbatch)
            made = next((ran[one] for one in makers(sent) if one in ran), None)
            if made is not None:
                yield from _arrow(f"{process}.{number}", process, made, event, step.what)
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


def _transfer(identity: str, process: int, event: Event, send: Send) -> Iterator[Record]:
    slice_ = {"cat": "transfer", "name": f"stage {send.stage} → {send.target}: {send.what}", "id": identity}
    yield {**_at(process, event.mesh, event.start_seconds), **slice_, "ph": "b", "args": {"instruction": word(send)}}
    yield {**_at(process, event.mesh, event.end_seconds), **slice_, "ph": "e"}


def _arrow(identity: str, process: int, made: Event, arrived: Event, what: str) -> Iterator[Record]:
    """From the middle of what made a payload to the slice that runs where it is first of use."""
    arrow = {"cat": "payload", "name": what, "id": identity}
    yield {**_at(process, made.mesh, (made.start_seconds + made.end_seconds) / 2), **arrow, "ph": "s"}
    yield {**_at(process, arrived.mesh, arrived.end_seconds), **arrow, "ph": "f", "bp": "e"}


def _title(step: Instruction) -> str:
    match step:
        case Forward(_, m):
            return f"forward {m}"
        case Backward(_, m):
            return f"backward {m}"
        case BackwardInput(_, m):
            return f"input gradient {m}"
        case BackwardWeight(_, m):
            return f"weight gradient {m}"
        case Receive(_, source, what, _):
            return f"wait for {what} of stage {source}"
        case Reduce():
            return "reduce gradients"
        case Update():
            return "update"
        case Gather():
            return "gather parameters"
        case Send(_, target, what, _):
            return f"send {what} to stage {target}"


def _at(process: int, mesh: int, seconds: float) -> Record:
    return {"pid": process, "tid": mesh + 1, "ts": _nanoseconds(seconds) / 1000}


def _nanoseconds(seconds: float) -> int:
    """Whole nanoseconds, so that slices which touch do not overlap by a rounding error."""
    return round(seconds * 1e9)
