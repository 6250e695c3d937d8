"""Why a plan takes as long and holds as much as it does: time, bytes and memory by cause, and what another differs by.

*On the path* are the seconds of the simulated step's critical path, which add up to the step. *On devices* is what
all devices do on average, waits included, which adds up to the step too: a cause that is large there and not on the
path is hidden behind another.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from meshwright.plan.planfile import Plan, PlannedStage
from meshwright.plan.predict import predict
from meshwright.simulate.program import Backward, Forward, Instruction, Update
from meshwright.simulate.timeline import CAUSES, Timeline

FORWARD, BACKWARD, AGAIN = "forward computation", "backward computation", "forward computed again"
FORWARD_SENT, BACKWARD_SENT = "collectives in the forward", "collectives in the backward"
SUMS, UPDATE, DISPATCH = "sums of gradients", "optimizer update", "dispatch by the host"
TRANSFERS, SHARED, WAITS = "transfers between stages", "links and cores that are shared", "waits"
NAMES = (FORWARD, BACKWARD, AGAIN, FORWARD_SENT, BACKWARD_SENT, SUMS, UPDATE, DISPATCH, TRANSFERS, SHARED, WAITS)
_OTHER = {"reduce": SUMS, "gather": "parameters gathered"}

Seconds = dict[str, float]


@dataclass(frozen=True, slots=True)
class Moved:
    """What goes from one stage to another in a step: how often, and bytes and seconds of one time."""

    source: int
    target: int
    what: str
    times: int
    bytes: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan's time and memory by cause.

    ``path_seconds`` and ``device_seconds`` each add up to ``step_seconds``; ``memory`` holds (name, bytes) parts of
    the peak on a device of each stage, ``moved`` the transfers, the longest in a step first.
    """

    plan: Plan
    step_seconds: float
    path_seconds: Seconds
    device_seconds: Seconds
    memory: tuple[tuple[tuple[str, float], ...], ...]
    moved: tuple[Moved, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain data, with the collectives of each stage."""
        return {
            "step_seconds": self.step_seconds,
            "path_seconds": self.path_seconds,
            "device_seconds": self.device_seconds,
            "stages": [
                {
                    "layers": list(stage.layers),
                    "devices": list(stage.devices),
                    "memory_bytes": dict(parts),
                    "collectives": [msgspec.to_builtins(c) for c in stage.collectives],
                }
                for stage, parts in zip(self.plan.stages, self.memory, strict=True)
            ],
            "transfers": [{name: getattr(m, name) for name in Moved.__dataclass_fields__} for m in self.moved],
        }


def explain(plan: Plan) -> Explanation:
    """Simulate a plan and say what its time and memory are made of."""
    timeline = predict(plan).timeline
    mesh_of = {devices: mesh for mesh, devices in enumerate(timeline.mesh_devices)}
    parts = [timeline.peak_parts[mesh_of[stage.devices]] for stage in plan.stages]
    return Explanation(
        plan=plan,
        step_seconds=timeline.makespan_seconds,
        path_seconds=path_seconds(plan, timeline),
        device_seconds=device_seconds(plan, timeline),
        memory=tuple(tuple((name, size) for name, size in each if size) for each in parts),
        moved=_moved(plan),
    )


def path_seconds(plan: Plan, timeline: Timeline) -> Seconds:
    """The critical path by cause."""
    spent: defaultdict[str, float] = defaultdict(float)
    for step in timeline.critical_path:
        for cause, share in _shares(plan, step.event.instruction):
            spent[cause] += share * step.own_seconds
        spent[TRANSFERS] += step.latency_seconds
        spent[SHARED] += step.contention_seconds
    return _in_order(spent)


def device_seconds(plan: Plan, timeline: Timeline) -> Seconds:
    """What the devices do, in the mean over all: seconds of one step. Devices of no stage wait all the time."""
    devices = [len(each) for each in timeline.mesh_devices]
    total = plan.hardware.devices
    spent: defaultdict[str, float] = defaultdict(float)
    for event in timeline.events:
        if CAUSES[type(event.instruction)] != "transfer":
            seconds = (event.end_seconds - event.start_seconds) * devices[event.mesh] / total
            for cause, share in _shares(plan, event.instruction):
                spent[cause] += share * seconds
    spent[WAITS] = max(0.0, timeline.makespan_seconds - sum(spent.values()))
    return _in_order(spent)


def differences(one: Explanation, other: Explanation) -> list[tuple[str, float, float]]:
    """(cause, seconds on the path of one, of the other) of two plans, the largest difference first."""
    causes = dict.fromkeys((*one.path_seconds, *other.path_seconds))
    rows = [(cause, one.path_seconds.get(cause, 0.0), other.path_seconds.get(cause, 0.0)) for cause in causes]
    return sorted(rows, key=lambda row: -abs(row[2] - row[1]))


def _shares(plan: Plan, instruction: Instruction) -> Iterator[tuple[str, float]]:
    """What an instruction's time is made of, as shares of 1."""
    kind = CAUSES[type(instruction)]
    if kind == "transfer":
        yield TRANSFERS, 1.0
        return
    stage = plan.stages[instruction.stage]
    match instruction:
        case Forward():
            parts = _forward(stage)
        case Update():
            parts = {UPDATE: stage.update_seconds, DISPATCH: stage.dispatch_seconds}
        case Backward():
            parts = _backward(stage, plan.recomputes(instruction.stage))
        case _ if kind in _OTHER:
            parts = {_OTHER[kind]: 1.0}
        case _:  # a half of a split backward
            parts = _backward(stage, plan.recomputes(instruction.stage))
    whole = sum(parts.values())
    yield from ((cause, seconds / whole) for cause, seconds in parts.items() if seconds) if whole else ((kind, 1.0),)


def _forward(stage: PlannedStage) -> Seconds:
    return {
        FORWARD: stage.forward_compute_seconds,
        FORWARD_SENT: stage.forward_communication_seconds,
        DISPATCH: stage.dispatch_seconds,
    }


def _backward(stage: PlannedStage, recomputes: bool) -> Seconds:
    """The planned backward holds what it computes again."""
    again = min(stage.forward_compute_seconds, stage.backward_compute_seconds) if recomputes else 0.0
    return {
        BACKWARD: stage.backward_compute_seconds - again,
        AGAIN: again,
        BACKWARD_SENT: stage.backward_communication_seconds,
        DISPATCH: stage.dispatch_seconds,
    }


def _moved(plan: Plan) -> tuple[Moved, ...]:
    found = [
        Moved(
            t.source,
            t.target,
            t.what,
            plan.microbatches if t.what in ("activation", "cotangent") else 1,
            t.bytes,
            t.wire_seconds + t.latency_seconds,
        )
        for t in plan.transfers
    ]
    return tuple(sorted(found, key=lambda m: (-m.times * m.seconds, m.source, m.target, m.what)))


def _in_order(spent: Seconds) -> Seconds:
    """Known causes first, in the order of a step; nothing that took no time."""
    names = dict.fromkeys((*(name for name in NAMES if name in spent), *spent))
    return {name: spent[name] for name in names if spent[name] > 0}
