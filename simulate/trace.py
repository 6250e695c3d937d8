"""Timelines as a Chrome trace, which ui.perfetto.dev and chrome://tracing open.

One process a timeline; a thread for each mesh, and one for its collectives where these run beside its computation;
transfers as asynchronous slices, arrows from each payload's maker to its user, counters of the bytes that each device
of a mesh holds and of what is on its way between two stages.
Format: "Trace Event Format", Google, 2016 (JSON object form; times in microseconds).
"""

import gzip
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from meshwright.errors import ScheduleError
from meshwright.simulate.costs import PipelineCosts, TransferCost
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
from meshwright.simulate.timeline import Event, MemoryStep, Timeline
from meshwright.simulate.tracks import collectives_beside, devices_label, nanoseconds

Record = dict[str, Any]
MOST_RECORDS = 400_000  # about 50 MB of JSON, which Perfetto opens in seconds
COUNTER_STEPS = 1000  # of a thinned counter


def trace_data(
    timelines: Sequence[tuple[str, Timeline]],
    costs: PipelineCosts | None = None,
    *,
    most_records: int = MOST_RECORDS,
) -> Record:
    """The trace of named timelines, as plain JSON data.

    A trace that would have more than ``most_records`` records loses, in this order and until it fits: arrows; memory
    steps, of which about 1,000 a mesh stay, always the highest of those merged; transfers and their counters; waits.
    What computes, reduces, updates or gathers always stays. ``otherData`` and each process's label name what is lost.

    Args:
        costs: with them, counters of what is on its way between stages count bytes where a transfer's are known;
            without, messages.
    """
    if most_records < 1:
        raise ScheduleError(f"a trace of at most {most_records} records was asked for; at least 1 is needed")
    thinned = _left_out([timeline for _, timeline in timelines], most_records)
    events = [
        record
        for process, (name, timeline) in enumerate(timelines, start=1)
        for record in _process(process, name, timeline, costs, thinned)
    ]
    return {"displayTimeUnit": "ms", "otherData": {"left out": list(thinned)}, "traceEvents": events}


def write_trace(
    timelines: Sequence[tuple[str, Timeline]],
    path: str | os.PathLike[str],
    costs: PipelineCosts | None = None,
    *,
    most_records: int = MOST_RECORDS,
) -> None:
    """Write the trace of named timelines, such as ``[("predicted", p), ("measured", m)]``, to a JSON file.

    A path that ends in ``.gz`` is compressed, about fifteen times; Perfetto opens both.
    """
    data = trace_data(timelines, costs, most_records=most_records)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    if Path(path).suffix == ".gz":  # without a date, so that equal timelines make equal files
        Path(path).write_bytes(gzip.compress(text.encode(), compresslevel=4, mtime=0))
    else:
        Path(path).write_text(text, encoding="utf-8")


def mesh_label(mesh: int, devices: tuple[int, ...]) -> str:
    """``mesh 1 · devices 2–3``; numbers that do not follow each other are listed."""
    return f"mesh {mesh} · {devices_label(devices) or 'devices ' + ', '.join(map(str, devices))}"


def _left_out(timelines: Sequence[Timeline], most: int) -> tuple[str, ...]:
    """What must be left out or thinned for a trace to have at most so many records, in the order of ``trace_data``."""
    sends = sum(isinstance(event.instruction, Send) for timeline in timelines for event in timeline.events)
    waits = sum(isinstance(event.instruction, Receive) for timeline in timelines for event in timeline.events)
    steps = [len(each) for timeline in timelines for each in timeline.live_bytes]
    size = sum(len(timeline.events) for timeline in timelines) + 3 * sends + 2 * waits + sum(steps)
    savings = (
        ("arrows", 2 * waits),
        ("memory steps", sum(max(0, count - COUNTER_STEPS) for count in steps)),
        ("transfers", 4 * sends),
        ("waits", waits),
    )
    out = []
    for name, saved in savings:
        if size > most and saved:
            out.append(name)
            size -= saved
    return tuple(out)


def _process(
    process: int, name: str, timeline: Timeline, costs: PipelineCosts | None, thinned: Sequence[str]
) -> Iterator[Record]:
    streams = collectives_beside(timeline)
    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}
    if thinned:
        label = {"labels": f"left out: {', '.join(thinned)}"}
        yield {"ph": "M", "pid": process, "name": "process_labels", "args": label}
    for mesh, devices in enumerate(timeline.mesh_devices):
        tracks = [(_track(mesh), mesh_label(mesh, devices))]
        if mesh in streams:
            tracks.append((_track(mesh, beside=True), f"mesh {mesh} · collectives"))
        for track, title in tracks:
            thread = {"ph": "M", "pid": process, "tid": track}
            yield {**thread, "name": "thread_name", "args": {"name": title}}
            yield {**thread, "name": "thread_sort_index", "args": {"sort_index": track}}
    ran = {} if "arrows" in thinned else {event.instruction: event for event in timeline.events}
    for number, event in enumerate(timeline.events):
        step = event.instruction
        if isinstance(step, Send):
            if "transfers" not in thinned:
                yield from _transfer(f"{process}.{number}", process, event, step)
            continue
        waits = isinstance(step, Receive)
        begin, end = nanoseconds(event.start_seconds), nanoseconds(event.end_seconds)
        if end > begin and not (waits and "waits" in thinned):
            beside = isinstance(step, Reduce | Gather) and event.mesh in streams
            yield {
                "ph": "X",
                "pid": process,
                "tid": _track(event.mesh, beside=beside),
                "ts": begin / 1000,
                "dur": (end - begin) / 1000,
                "name": _title(step),
                "cat": type(step).__name__.lower(),
                "args": {"instruction": word(step)},
            }
        if isinstance(step, Receive) and ran:
            sent = Send(step.source, step.stage, step.what, step.microbatch)
            made = next((ran[one] for one in makers(sent) if one in ran), None)
            if made is not None:
                beside = isinstance(made.instruction, Reduce | Gather) and made.mesh in streams
                yield from _arrow(f"{process}.{number}", process, made, beside, event, step.what)
    for mesh, steps in enumerate(timeline.live_bytes):
        always = min((held for _, held in steps), default=0.0)
        yield from _memory(process, mesh, always, _thin(steps) if "memory steps" in thinned else steps)
    if "transfers" not in thinned:
        yield from _channels(process, timeline, costs)


def _transfer(identity: str, process: int, event: Event, send: Send) -> Iterator[Record]:
    slice_ = {"cat": "transfer", "name": f"stage {send.stage} → {send.target}: {send.what}", "id": identity}
    yield {**_at(process, event.mesh, event.start_seconds), **slice_, "ph": "b", "args": {"instruction": word(send)}}
    yield {**_at(process, event.mesh, event.end_seconds), **slice_, "ph": "e"}


def _arrow(identity: str, process: int, made: Event, beside: bool, arrived: Event, what: str) -> Iterator[Record]:
    """From the middle of what made a payload to the slice that runs where it is first of use."""
    arrow = {"cat": "payload", "name": what, "id": identity}
    middle = _at(process, made.mesh, (made.start_seconds + made.end_seconds) / 2)
    yield {**middle, "tid": _track(made.mesh, beside=beside), **arrow, "ph": "s"}
    yield {**_at(process, arrived.mesh, arrived.end_seconds), **arrow, "ph": "f", "bp": "e"}


def _memory(process: int, mesh: int, always: float, steps: Sequence[MemoryStep]) -> Iterator[Record]:
    """Bytes of a mesh's devices in two layers: what is always held (weights, optimizer) and what comes and goes."""
    for seconds, held in steps:
        layers = {"always": always, "comes and goes": held - always}
        yield _counter(process, seconds, f"mesh {mesh} bytes per device", layers)


def _thin(steps: Sequence[MemoryStep]) -> list[MemoryStep]:
    """At most about ``COUNTER_STEPS`` steps: of each run of them the highest, at its own time, and the last of all."""
    each = -(-len(steps) // COUNTER_STEPS)
    if each == 1:
        return list(steps)
    kept = [max(steps[k : k + each], key=lambda step: step[1]) for k in range(0, len(steps), each)]
    first, last = list(steps[:1]), list(steps[-1:])
    return (first if kept[0] != first[0] else []) + kept + (last if kept[-1] != last[0] else [])


def _channels(process: int, timeline: Timeline, costs: PipelineCosts | None) -> Iterator[Record]:
    """What is on its way from stage to stage: bytes where the costs know them, else messages."""
    changes: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    sizes: dict[tuple[int, int], bool] = {}
    for event in timeline.events:
        step = event.instruction
        if isinstance(step, Send) and event.end_seconds > event.start_seconds:
            known = None if costs is None else costs.transfers.get((step.stage, step.target, step.what))
            moved = TransferCost(*known).bytes if known is not None else 0.0
            channel = step.stage, step.target
            sizes[channel] = sizes.get(channel, True) and moved > 0
            changes[channel] += [(event.start_seconds, moved), (event.end_seconds, -moved)]
    for (source, target), edges in sorted(changes.items()):
        in_bytes = sizes[source, target]
        unit = "bytes" if in_bytes else "messages"
        yield from _running(process, f"stage {source} → {target} {unit} in flight", unit, edges, in_bytes)


def _running(
    process: int, name: str, unit: str, edges: Sequence[tuple[float, float]], in_bytes: bool
) -> Iterator[Record]:
    """A running sum over (seconds, change), one record a moment."""
    moments: defaultdict[int, float] = defaultdict(float)
    for number, (seconds, moved) in enumerate(edges):
        moments[nanoseconds(seconds)] += moved if in_bytes else (1.0, -1.0)[number % 2]
    held = 0.0
    for moment in sorted(moments):
        held += moments[moment]
        yield _counter(process, moment / 1e9, name, {unit: max(0.0, round(held, 3))})


def _counter(process: int, seconds: float, name: str, values: dict[str, float]) -> Record:
    return {"ph": "C", "pid": process, "ts": nanoseconds(seconds) / 1000, "name": name, "args": values}


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


def _track(mesh: int, *, beside: bool = False) -> int:
    """The thread's number: a mesh's own is odd, and that of its collectives follows it."""
    return 2 * mesh + (2 if beside else 1)


def _at(process: int, mesh: int, seconds: float) -> Record:
    return {"pid": process, "tid": _track(mesh), "ts": nanoseconds(seconds) / 1000}
