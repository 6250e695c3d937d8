"""A program and the costs of its stages → a timeline, by way of task arrays.

Computation runs in order on each mesh. A ``Send`` never holds its mesh up: its bytes leave over a channel of their own
(one for each ordered pair of stages, in order), shared with other channels where they name the same link. A
``Receive`` ends when they have arrived.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import NamedTuple

from meshwright.errors import ScheduleError
from meshwright.simulate.engine import NOBODY, Run, Tasks, make_tasks, run_tasks
from meshwright.simulate.program import (
    Backward,
    Forward,
    Instruction,
    Payload,
    Program,
    Receive,
    Reduce,
    Send,
    Update,
    word,
)
from meshwright.simulate.timeline import CriticalStep, Event, Timeline
from meshwright.simulate.topology import CoreSharing


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """Seconds and bytes of one stage; bytes are those of each of its devices.

    ``saved_bytes`` are held for each live micro-batch, from the start of its forward to the end of its backward;
    ``transient_bytes`` only while a forward or backward runs; ``static_bytes`` (weights, gradients, optimizer) always.
    Seconds are those of devices that have their host's cores to themselves.
    """

    devices: tuple[int, ...]
    forward_seconds: float
    backward_seconds: float
    reduce_seconds: float = 0.0
    update_seconds: float = 0.0
    static_bytes: float = 0.0
    saved_bytes: float = 0.0
    transient_bytes: float = 0.0

    def __post_init__(self) -> None:
        if not self.devices:
            raise ScheduleError("a stage has no devices; at least 1 is needed")
        for item in fields(self)[1:]:
            number = getattr(self, item.name)
            if not (isfinite(number) and number >= 0):
                raise ScheduleError(f"{item.name} of a stage is {number}; a finite number of at least 0 is needed")


class TransferCost(NamedTuple):
    """``wire_seconds`` occupy the channel, ``latency_seconds`` do not; transfers that name one link share it."""

    wire_seconds: float
    latency_seconds: float
    link: int | None = None


@dataclass(frozen=True, slots=True)
class PipelineCosts:
    """What a program costs: its stages, the transfers between them, and cores that devices share."""

    stages: tuple[StageCosts, ...]
    transfers: Mapping[tuple[int, int, Payload], TransferCost]
    cores: tuple[CoreSharing, ...] = ()


def simulate(program: Program, costs: PipelineCosts) -> Timeline:
    """When every instruction of the program runs.

    Raises:
        ScheduleError: the program has a stage or transfer without a cost, an unmatched ``Receive``, or it deadlocks.
    """
    flat = [(r, step) for r, row in enumerate(program) for step in row]
    tasks = _tasks(program, flat, costs)
    run = run_tasks(tasks)
    start, end = run.start_seconds.tolist(), run.end_seconds.tolist()
    live_bytes = _live_bytes(program, costs, start, end)
    _as_seen(flat, costs, start, end)
    events = [Event(r, step, start[i], end[i]) for i, (r, step) in enumerate(flat)]
    homes = [next((step.stage for step in row), None) for row in program]
    return Timeline(
        mesh_devices=tuple(() if home is None else costs.stages[home].devices for home in homes),
        events=tuple(sorted(events, key=lambda event: (event.start_seconds, event.mesh))),
        live_bytes=live_bytes,
        critical_path=_critical_path(tasks, run, events),
    )


def _seconds(step: Instruction, costs: PipelineCosts) -> float:
    match step:
        case Forward(stage, _):
            return costs.stages[stage].forward_seconds
        case Backward(stage, _):
            return costs.stages[stage].backward_seconds
        case Reduce(stage):
            return costs.stages[stage].reduce_seconds
        case Update(stage):
            return costs.stages[stage].update_seconds
        case Send():
            return _transfer(step, costs).wire_seconds
        case Receive():
            return 0.0


def _transfer(send: Send, costs: PipelineCosts) -> TransferCost:
    try:
        return TransferCost(*costs.transfers[send.stage, send.target, send.what])
    except KeyError:
        raise ScheduleError(
            f"{word(send)}: the {send.what} from stage {send.stage} to stage {send.target} has no cost"
        ) from None


def _tasks(program: Program, flat: list[tuple[int, Instruction]], costs: PipelineCosts) -> Tasks:
    stages = 1 + max((step.stage for _, step in flat), default=-1)
    if stages > len(costs.stages):
        raise ScheduleError(f"the program has {stages} stages, but costs are given for {len(costs.stages)}")
    number = {step: i for i, (_, step) in enumerate(flat)}
    channels: dict[tuple[int, int], int] = {}
    resources, rates = _resources(program, costs)
    executor, depends, resource, demand = [], [], [], []
    made = NOBODY  # the task of this mesh after which a send may leave
    mesh = NOBODY
    for i, (r, step) in enumerate(flat):
        if r != mesh:
            mesh, made = r, NOBODY
        used, users = NOBODY, 1
        match step:
            case Send(stage, target):
                executor.append(len(program) + channels.setdefault((stage, target), len(channels)))
                depends.append([(made, 0.0)] if made != NOBODY else [])
                used = resources.get(("link", _transfer(step, costs).link), NOBODY)
            case Receive(stage, source, what, m):
                send = Send(source, stage, what, m)
                if send not in number:
                    raise ScheduleError(f"{word(step)} has no partner {word(send)}; verify the program first")
                executor.append(r)
                depends.append([(number[send], float(_transfer(send, costs).latency_seconds))])
                made = i
            case _:
                executor.append(r)
                depends.append([])
                made = i
                used = resources.get(("mesh", r), NOBODY)
                if used != NOBODY:
                    users = len(set(costs.stages[step.stage].devices) & set(costs.cores[used].devices))
        resource.append(used)
        demand.append(users)
    return make_tasks(
        [_seconds(step, costs) for _, step in flat],
        executor,
        depends,
        resource=resource,
        demand=demand,
        resource_rates=rates,
    )


def _resources(
    program: Program, costs: PipelineCosts
) -> tuple[dict[tuple[str, int | None], int], list[tuple[float, ...]]]:
    """Numbers of the resources that matter (cores first), by mesh and by link, and their rates.

    Cores matter if using all of them slows anything; a link, if two channels name it. A mesh whose devices stand on
    several hosts takes its turns where most of them are.
    """
    rates = [cores.rates for cores in costs.cores]
    numbers: dict[tuple[str, int | None], int] = {}
    for r, row in enumerate(program):
        if not row or not costs.cores:
            continue
        devices = set(costs.stages[row[0].stage].devices)
        together = [len(devices & set(cores.devices)) for cores in costs.cores]
        most = max(range(len(together)), key=lambda k: (together[k], -k))
        if together[most] and min(rates[most]) < 1:
            numbers["mesh", r] = most
    channels: dict[int, set[tuple[int, int]]] = {}
    for (source, target, _), cost in costs.transfers.items():
        if TransferCost(*cost).link is not None:
            channels.setdefault(cost[2], set()).add((source, target))  # type: ignore[arg-type]
    for link in sorted(link for link, pairs in channels.items() if len(pairs) > 1):
        numbers["link", link] = len(rates)
        rates.append((1.0,))
    return numbers, rates


def _as_seen(flat: list[tuple[int, Instruction]], costs: PipelineCosts, start: list[float], end: list[float]) -> None:
    """From tasks to events: a ``Receive`` begins when its mesh got there, a ``Send`` ends when its bytes are there."""
    reached, mesh = 0.0, NOBODY
    for i, (r, step) in enumerate(flat):
        if r != mesh:
            reached, mesh = 0.0, r
        if isinstance(step, Send):
            end[i] += _transfer(step, costs).latency_seconds
            continue
        if isinstance(step, Receive):
            start[i] = reached
        reached = end[i]


def _live_bytes(
    program: Program, costs: PipelineCosts, start: list[float], end: list[float]
) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Bytes on each device of each mesh over time: static + saved for each live micro-batch + what runs right now."""
    live, i = [], 0
    for row in program:
        held = sum(costs.stages[stage].static_bytes for stage in sorted({step.stage for step in row}))
        steps = [(0.0, held)]
        for step in row:
            if isinstance(step, Forward | Backward):
                stage = costs.stages[step.stage]
                if isinstance(step, Forward):
                    held += stage.saved_bytes
                steps.append((start[i], held + stage.transient_bytes))
                if isinstance(step, Backward):
                    held -= stage.saved_bytes
                steps.append((end[i], held))
            i += 1
        live.append(tuple(steps))
    return tuple(live)


def _critical_path(tasks: Tasks, run: Run, events: list[Event]) -> tuple[CriticalStep, ...]:
    steps = []
    for task in run.critical_path():
        edge = run.waited_edge[task]
        latency = float(tasks.edge_latency_seconds[edge]) if edge >= 0 else 0.0
        alone = float(tasks.duration_seconds[task])
        contention = float(run.end_seconds[task] - run.start_seconds[task]) - alone
        slowed = tasks.resource[task] >= 0 and contention > 1e-9 * alone  # less is rounding
        steps.append(CriticalStep(events[task], alone, latency, contention if slowed else 0.0))
    return tuple(steps)
