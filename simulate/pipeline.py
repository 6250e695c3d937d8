"""A program and the costs of its stages → a timeline, by way of task arrays."""

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from math import isfinite
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from meshwright.errors import ScheduleError
from meshwright.simulate.build import build_code
from meshwright.simulate.code import KIND, RECEIVE, SEND, STAGE, Code, Table
from meshwright.simulate.compiled import KIND_COUNT, Compiled, compile_program
from meshwright.simulate.contention import Loads, overfull, transfer_loads
from meshwright.simulate.costs import PipelineCosts, StageCosts, TransferCost
from meshwright.simulate.engine import NOBODY, make_tasks, run_tasks
from meshwright.simulate.live import live_memory, peak_parts
from meshwright.simulate.program import Program, Send, word
from meshwright.simulate.timeline import CriticalStep, Event, Lazy, Spans, Timeline

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Index = NDArray[np.int32]
Resources = tuple[Ints, Ints, list[tuple[float, ...]]]

__all__ = ["PipelineCosts", "StageCosts", "TransferCost", "compiled_schedule", "simulate"]


def simulate(program: Program | Code | Compiled, costs: PipelineCosts) -> Timeline:
    """When every instruction of the program runs, and what its devices hold.

    Whoever scores one program with many costs compiles it once. Events, memory steps and the critical path are made
    when they are read; the numbers of the timeline need none of them.

    Raises:
        ScheduleError: the program has a stage or transfer without a cost, an unmatched ``Receive``, or it deadlocks.
    """
    if not isinstance(program, Compiled):
        program = compile_program(program, collective_stream=costs.collective_stream)
    numbers = Numbers(program, costs)
    start, end = _run(numbers)
    memory = live_memory(program, costs.stages, numbers.transfers, start, end, numbers.slot_latency_seconds)
    return Timeline(
        mesh_devices=_mesh_devices(program, costs),
        events=Lazy(partial(_events, numbers, start, end)),
        live_bytes=Lazy(memory.steps),
        critical_path=Lazy(partial(_critical_path, numbers, start, end)),
        peak_parts=Lazy(partial(peak_parts, memory, program, costs.stages)),
        known_spans=cache(partial(_spans, program, start, end)),
        known_makespan_seconds=float(end.max(initial=0.0)),  # every Send has its Receive, which ends no earlier
        known_peak_bytes=memory.peak_bytes,
        known_memory=memory.arrays(),
    )


@lru_cache(maxsize=256)
def compiled_schedule(
    schedule: str,
    meshes: int,
    microbatches: int,
    edges: tuple[tuple[int, int], ...] | None = None,
    tied: tuple[tuple[int, int], ...] = (),
    *,
    chunks: int | None = None,
    norm: bool = False,
    gather: bool = False,
) -> Compiled:
    """The tasks of a schedule (``build.build_code``), remembered: a search scores it with many costs."""
    return compile_program(
        build_code(schedule, meshes, microbatches, edges, tied, chunks=chunks, norm=norm, gather=gather)
    )


@dataclass(frozen=True)
class Numbers:
    """The costs of a compiled program as arrays: seconds of each task, latency of each edge."""

    compiled: Compiled
    costs: PipelineCosts

    def __post_init__(self) -> None:
        known = len(self.costs.stages)
        if self.compiled.stages > known:
            raise ScheduleError(f"the program has {self.compiled.stages} stages, but costs are given for {known}")

    @cached_property
    def transfers(self) -> tuple[TransferCost, ...]:
        """The cost of each transfer of the program."""
        found = []
        for key in self.compiled.transfers:
            cost = self.costs.transfers.get(key)
            if cost is None:
                raise ScheduleError(
                    f"{_first_word(self.compiled.code, key)}: the {key.what} from stage {key.source} to stage "
                    f"{key.target} has no cost; add it to the transfers"
                )
            found.append(TransferCost(*cost))
        numbers = np.array([(cost.wire_seconds, cost.latency_seconds, cost.buffer_bytes, cost.bytes) for cost in found])
        if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
            wrong = int((~np.isfinite(numbers) | (numbers < 0)).any(axis=1).argmax())
            key = self.compiled.transfers[wrong]
            raise ScheduleError(
                f"the {key.what} from stage {key.source} to stage {key.target} costs {found[wrong]}; finite numbers of "
                "at least 0 are needed"
            )
        for key, cost in zip(self.compiled.transfers, found, strict=True):
            where = f"the {key.what} from stage {key.source} to stage {key.target}"
            if not all(isfinite(weight) and weight > 0 for weight in cost.weights):
                raise ScheduleError(f"{where} has weights {cost.weights}; finite numbers above 0 are needed")
            if cost.links and cost.bytes and not cost.wire_seconds:
                raise ScheduleError(f"{where} sends {cost.bytes:g} bytes over links in no time; give wire_seconds")
        return tuple(found)

    @cached_property
    def loads(self) -> Loads | None:
        """What the transfers ask of links; None: they can never fill one together."""
        links = self.costs.link_bytes_per_second
        return transfer_loads(self.compiled, self.transfers, links) if links else None

    @cached_property
    def slot_seconds(self) -> Floats:
        """Seconds by ``Compiled.slot``; NaN where the costs are silent."""
        seconds: list[float] = []
        for stage in self.costs.stages[: self.compiled.stages]:
            split = (stage.input_seconds, stage.weight_seconds)
            seconds += [stage.forward_seconds, stage.backward_seconds]
            seconds += [np.nan if half is None else half for half in split]
            seconds += [0.0, 0.0, stage.reduce_seconds, stage.update_seconds, stage.gather_seconds]
        return np.array(seconds + [cost.wire_seconds for cost in self.transfers])

    @cached_property
    def slot_latency_seconds(self) -> Floats:
        """Seconds that pass between the end of a task and its effect, by ``Compiled.slot``: a transfer's latency."""
        latency = np.zeros(self.compiled.stages * KIND_COUNT + len(self.transfers))
        latency[self.compiled.stages * KIND_COUNT :] = [cost.latency_seconds for cost in self.transfers]
        return latency

    @cached_property
    def resources(self) -> Resources | None:
        """The shared resource of each task, its demand there, and the rates of all; None: nothing is shared."""
        return _resources(self.compiled, self.costs)

    def check(self) -> None:
        """Raise ``ScheduleError`` where a backward is split of which no halves are known."""
        if not np.isnan(self.slot_seconds).any():
            return
        unknown = np.isnan(self.slot_seconds[self.compiled.slot])
        if unknown.any():
            step = self.compiled.code.instruction(int(unknown.argmax()))
            raise ScheduleError(
                f"{word(step)} is half a backward, but stage {step.stage} has no input_seconds and weight_seconds"
            )


def _first_word(code: Code, key: tuple[int, int, str]) -> str:
    sends = (code.instruction(index) for index in np.flatnonzero(code.table[:, KIND] == SEND).tolist())
    return next(word(s) for s in sends if isinstance(s, Send) and (s.stage, s.target, s.what) == key)


def _run(numbers: Numbers) -> tuple[Floats, Floats]:
    """Start and end of all tasks; with nothing shared, by one pass in the order that was found when compiling."""
    compiled = numbers.compiled
    numbers.check()
    if numbers.resources is not None:
        return run_sharing(numbers, numbers.resources)
    start, end = _in_order(
        compiled.order,
        compiled.before,
        compiled.need,
        compiled.need_slot,
        compiled.slot,
        numbers.slot_seconds,
        numbers.slot_latency_seconds,
    )
    if numbers.loads is not None and overfull(compiled, numbers.loads, start, end):
        return run_sharing(numbers, numbers.resources)
    return start, end


def run_sharing(numbers: Numbers, resources: Resources | None, factor: Floats | None = None) -> tuple[Floats, Floats]:
    """Start and end of all tasks on the event queue; with ``factor``, each is that many times as long as predicted."""
    compiled = numbers.compiled
    start, origin, slot = compiled.edges
    duration = numbers.slot_seconds[compiled.slot]
    latency = np.where(slot < 0, 0.0, numbers.slot_latency_seconds[slot])
    if factor is not None:
        duration, latency = duration * factor, latency * factor[origin]
    resource, demand, rates = resources or (None, None, ())
    tasks = make_tasks(
        duration,
        compiled.executor,
        edges=(start, origin, latency),
        resource=resource,
        demand=demand,
        resource_rates=rates,
        **_flows(numbers, duration),
    )
    run = run_tasks(tasks)
    return run.start_seconds, run.end_seconds


def _flows(numbers: Numbers, duration: Floats) -> dict[str, Any]:
    """The transfers that load links, as the engine's flows: alone each takes its own seconds."""
    loads, compiled = numbers.loads, numbers.compiled
    if loads is None:
        return {}
    transfer = np.where(compiled.slot >= compiled.stages * KIND_COUNT, compiled.slot - compiled.stages * KIND_COUNT, -1)
    count = np.where(transfer < 0, 0, loads.first[transfer + 1] - loads.first[transfer])
    moves = (count > 0) & (duration > 0)
    count = np.where(moves, count, 0)
    first = np.concatenate([[0], np.cumsum(count)])
    entry = np.repeat(loads.first[transfer] - first[:-1], count) + np.arange(first[-1])
    rate = np.array([cost.bytes / cost.wire_seconds if cost.wire_seconds else np.inf for cost in numbers.transfers])
    alone = np.where(moves, rate[transfer], 0.0)
    return {
        "flow_bytes": alone * duration,
        "flow_links": (first, loads.links[entry]),
        "flow_weights": loads.weight[entry],
        "flow_bytes_per_second": np.where(moves, alone, np.inf),
        "link_bytes_per_second": loads.capacity,
    }


@njit(cache=True)
def _in_order(
    order: Index, before: Index, need: Index, need_slot: Index, slot: Index, seconds: Floats, latency: Floats
) -> tuple[Floats, Floats]:
    start, end = np.empty(len(order)), np.empty(len(order))
    for task in order:
        begin = end[before[task]] if before[task] >= 0 else 0.0
        if need[task] >= 0:
            arrival = end[need[task]]
            if need_slot[task] >= 0:
                arrival += latency[need_slot[task]]
            begin = max(begin, arrival)
        start[task], end[task] = begin, begin + seconds[slot[task]]
    return start, end


def _resources(compiled: Compiled, costs: PipelineCosts) -> Resources | None:
    """The shared resource of each task (cores first, then links), its demand there, and the rates of all.

    Cores matter if using all of them slows anything; a link, if two channels name it. A mesh whose devices stand on
    several hosts takes its turns where most of them are.
    """
    if not costs.cores and all(TransferCost(*cost).link is None for cost in costs.transfers.values()):
        return None
    rates = [cores.rates for cores in costs.cores]
    resource = np.full(compiled.code.count, NOBODY)
    demand = np.ones(compiled.code.count, np.int64)
    kind, mesh = compiled.code.table[:, KIND], compiled.code.mesh
    works = (kind != SEND) & (kind != RECEIVE)
    for r, devices in enumerate(_mesh_devices(compiled, costs) if costs.cores else ()):
        together = [len(set(devices) & set(cores.devices)) for cores in costs.cores]
        most = max(range(len(together)), key=lambda k: (together[k], -k))
        if together[most] and min(rates[most]) < 1:
            mine = works & (mesh == r)
            resource[mine], demand[mine] = most, together[most]
    channels: dict[int, set[tuple[int, int]]] = {}
    for (source, target, _), cost in costs.transfers.items():
        if (link := TransferCost(*cost).link) is not None:
            channels.setdefault(link, set()).add((source, target))
    for link in sorted(link for link, pairs in channels.items() if len(pairs) > 1):
        for t, key in enumerate(compiled.transfers):
            if TransferCost(*costs.transfers[key]).link == link:
                resource[compiled.slot == compiled.stages * KIND_COUNT + t] = len(rates)
        rates.append((1.0,))
    return (resource, demand, rates) if rates else None


def _mesh_devices(compiled: Compiled, costs: PipelineCosts) -> tuple[tuple[int, ...], ...]:
    """The devices of each mesh: those of its first stage; a mesh without instructions has none.

    Raises:
        ScheduleError: two meshes have a device in common.
    """
    first = compiled.code.row_start[:-1]
    empty = first == compiled.code.row_start[1:]
    stages = [-1 if none else int(compiled.code.table[i, STAGE]) for i, none in zip(first, empty, strict=True)]
    devices = tuple(costs.stages[stage].devices if stage >= 0 else () for stage in stages)
    owner: dict[int, int] = {}
    for mesh, held in enumerate(devices):
        for device in held:
            if owner.setdefault(device, mesh) != mesh:
                raise ScheduleError(
                    f"device {device} is in mesh {owner[device]} and in mesh {mesh}; a device runs one row"
                )
    return devices


@njit(cache=True)
def _as_seen(
    table: Table, row_start: Ints, start: Floats, end: Floats, slot: Index, latency: Floats
) -> tuple[Floats, Floats]:
    """From tasks to events: a ``Receive`` begins when its mesh got there, a ``Send`` ends when its bytes are there."""
    seen_start, seen_end = start.copy(), end.copy()
    for mesh in range(len(row_start) - 1):
        reached = 0.0
        for i in range(row_start[mesh], row_start[mesh + 1]):
            kind = table[i, KIND]
            if kind == SEND:
                seen_end[i] = end[i] + latency[slot[i]]
                continue
            if kind == RECEIVE:
                seen_start[i] = min(reached, end[i])
            reached = max(reached, end[i])
    return seen_start, seen_end


def _spans(compiled: Compiled, start: Floats, end: Floats) -> Spans:
    return Spans(*_work(compiled.code.table, compiled.code.row_start, start, end, compiled.executor))


@njit(cache=True)
def _work(table: Table, row_start: Ints, start: Floats, end: Floats, executor: Index) -> tuple[Ints, Floats, Floats]:
    """What is not a transfer, by mesh and start: on each mesh two lists in order, of its rows and of its stream."""
    meshes = len(row_start) - 1
    size = 0
    for i in range(len(table)):
        if table[i, KIND] != SEND and table[i, KIND] != RECEIVE:
            size += 1
    mesh_of, first, last = np.empty(size, np.int64), np.empty(size), np.empty(size)
    out = 0
    for mesh in range(meshes):
        stop = row_start[mesh + 1]
        row, stream = row_start[mesh], row_start[mesh]
        while True:
            while row < stop and (executor[row] != mesh or table[row, KIND] == RECEIVE):
                row += 1
            while stream < stop and executor[stream] != meshes + mesh:
                stream += 1
            if row == stop and stream == stop:
                break
            if stream == stop or (row < stop and start[row] <= start[stream]):
                i = row
                row += 1
            else:
                i = stream
                stream += 1
            mesh_of[out], first[out], last[out] = mesh, start[i], end[i]
            out += 1
    return mesh_of, first, last


def _seen(numbers: Numbers, start: Floats, end: Floats) -> tuple[Floats, Floats]:
    compiled = numbers.compiled
    code = compiled.code
    return _as_seen(code.table, code.row_start, start, end, compiled.slot, numbers.slot_latency_seconds)


def _events(numbers: Numbers, start: Floats, end: Floats) -> tuple[Event, ...]:
    code = numbers.compiled.code
    first, last = (seconds.tolist() for seconds in _seen(numbers, start, end))
    mesh = code.mesh.tolist()
    order = sorted(range(code.count), key=lambda i: (first[i], mesh[i]))
    return tuple(Event(mesh[i], code.instruction(i), first[i], last[i]) for i in order)


def _critical_path(numbers: Numbers, start: Floats, end: Floats) -> tuple[CriticalStep, ...]:
    """From the last end back to zero: each task was let in by its executor or, if that was free, by what it needs."""
    compiled = numbers.compiled
    code, slot, latency = compiled.code, compiled.slot, numbers.slot_latency_seconds
    if not code.count:
        return ()
    first, last = _seen(numbers, start, end)
    mesh = code.mesh
    steps = []
    task = int(end.argmax())
    while task != NOBODY:
        before, need, via = (int(found[task]) for found in (compiled.before, compiled.need, compiled.need_slot))
        arrival = end[need] + (latency[via] if via >= 0 else 0.0) if need >= 0 else 0.0
        free = end[before] if before >= 0 else 0.0
        waited, passed = (before, 0.0) if free >= arrival else (need, float(latency[via]) if via >= 0 else 0.0)
        alone = float(numbers.slot_seconds[slot[task]])
        contention = float(end[task] - start[task]) - alone
        slowed = contention > 1e-9 * alone  # less is rounding
        event = Event(int(mesh[task]), code.instruction(task), float(first[task]), float(last[task]))
        steps.append(CriticalStep(event, alone, passed, contention if slowed else 0.0))
        task = waited
    return tuple(reversed(steps))
