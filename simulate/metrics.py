"""The numbers people ask of a training step: how busy, how exposed, how fast, how full, and why so long.

- *Bubble*: share of device time in which a mesh neither computes, reduces, updates nor gathers; waiting for a message
  is bubble.
- *Exposed communication*: seconds of the critical path spent on transfers, reductions and gathers.
- *MFU*: the model's own FLOPs, without rematerialisation, over the devices' peak; *HFU* counts what is computed twice
  (Chowdhery et al., PaLM, 2022, section 4.1 and appendix B).
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from meshwright.errors import ScheduleError
from meshwright.simulate.costs import PipelineCosts, TransferCost
from meshwright.simulate.program import Receive, Send
from meshwright.simulate.timeline import CAUSES, Parts, Timeline


@dataclass(frozen=True, slots=True)
class Cause:
    """One reason for the length of a step: seconds of the critical path, by what was done and for which stage."""

    name: str
    stage: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Channel:
    """What goes from one stage to another: share of the step in which bytes are on their way, and their mean rate.

    ``bytes_per_second`` is over the whole step, and None where the costs do not say how many bytes a transfer has.
    """

    source: int
    target: int
    busy_fraction: float
    bytes_per_second: float | None


@dataclass(frozen=True, slots=True)
class Workload:
    """What one step does: samples and tokens, and FLOPs of the whole step over all devices.

    ``hardware_flops`` count rematerialised ones twice; None: nothing is rematerialised.
    """

    samples: int
    tokens: int
    model_flops: float
    peak_flops_per_second_per_device: float
    hardware_flops: float | None = None

    def __post_init__(self) -> None:
        if self.peak_flops_per_second_per_device <= 0:
            raise ScheduleError(
                f"a device's peak of {self.peak_flops_per_second_per_device} FLOP/s was given; more than 0 is needed"
            )


@dataclass(frozen=True, slots=True)
class Metrics:
    """All of it; ``None`` where the workload is not known. ``imbalance`` is the busiest mesh over the mean, less 1."""

    step_seconds: float
    bubble_fraction: float
    mesh_bubble_fractions: tuple[float, ...]
    imbalance: float
    exposed_communication_seconds: float
    causes: tuple[Cause, ...]
    channels: tuple[Channel, ...]
    peak_bytes: tuple[float, ...]
    peak_parts: tuple[Parts, ...]
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    model_flops_per_second_per_device: float | None = None
    mfu: float | None = None
    hfu: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as plain data, without what is not known."""
        data: dict[str, Any] = {
            name: value
            for name in self.__dataclass_fields__
            if (value := getattr(self, name)) is not None and name not in ("causes", "channels", "peak_parts")
        }
        data["causes"] = [{"name": c.name, "stage": c.stage, "seconds": c.seconds} for c in self.causes]
        data["channels"] = [{name: getattr(c, name) for name in Channel.__dataclass_fields__} for c in self.channels]
        data["peak_parts"] = [dict(parts) for parts in self.peak_parts]
        return data


def metrics(timeline: Timeline, workload: Workload | None = None, costs: PipelineCosts | None = None) -> Metrics:
    """The numbers of a timeline; with ``costs``, also the rates of its channels."""
    seconds = timeline.makespan_seconds
    busy = timeline.busy_seconds
    mean = sum(busy) / len(busy) if busy else 0.0
    rates: dict[str, float | None] = {}
    if workload is not None and seconds:
        devices = sum(len(devices) for devices in timeline.mesh_devices)
        peak = workload.peak_flops_per_second_per_device * devices * seconds
        hardware = workload.model_flops if workload.hardware_flops is None else workload.hardware_flops
        rates = {
            "samples_per_second": workload.samples / seconds,
            "tokens_per_second": workload.tokens / seconds,
            "model_flops_per_second_per_device": workload.model_flops / seconds / devices,
            "mfu": workload.model_flops / peak,
            "hfu": hardware / peak,
        }
    return Metrics(
        step_seconds=seconds,
        bubble_fraction=timeline.bubble_fraction,
        mesh_bubble_fractions=tuple(1 - b / seconds if seconds else 0.0 for b in busy),
        imbalance=max(busy) / mean - 1 if mean else 0.0,
        exposed_communication_seconds=timeline.exposed_communication_seconds,
        causes=critical_causes(timeline),
        channels=_channels(timeline, costs),
        peak_bytes=timeline.peak_bytes,
        peak_parts=tuple(timeline.peak_parts),
        **rates,
    )


def critical_causes(timeline: Timeline) -> tuple[Cause, ...]:
    """Why the step takes as long as it does: the critical path by cause and stage, largest first.

    The seconds add up to the makespan: each step of the path begins when the one before lets it, so that its own time,
    the latency before it and what sharing added to it leave no gap.
    """
    spent: defaultdict[tuple[str, int], float] = defaultdict(float)
    for step in timeline.critical_path:
        instruction = step.event.instruction
        spent[CAUSES[type(instruction)], instruction.stage] += step.own_seconds
        spent["latency", instruction.stage] += step.latency_seconds
        spent["contention", instruction.stage] += step.contention_seconds
    causes = (Cause(name, stage, seconds) for (name, stage), seconds in spent.items() if seconds)
    return tuple(sorted(causes, key=lambda cause: (-cause.seconds, cause.name, cause.stage)))


def explain(timeline: Timeline, most: int = 8) -> str:
    """The critical path for a person: the largest causes, one line each, and the rest in one; it adds up."""
    causes, whole = critical_causes(timeline), timeline.makespan_seconds
    if not causes:
        return "there is no critical path: the timeline was measured, or is empty"
    lines = [(f"{cause.name} of stage {cause.stage}", cause.seconds) for cause in causes[:most]]
    if rest := causes[most:]:
        lines.append((f"{len(rest)} smaller causes", sum(cause.seconds for cause in rest)))
    lines.append(("the whole step", sum(cause.seconds for cause in causes)))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {seconds:10.4g} s  {seconds / whole:6.1%}" for name, seconds in lines)


def _channels(timeline: Timeline, costs: PipelineCosts | None) -> tuple[Channel, ...]:
    spans: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    moved: defaultdict[tuple[int, int], float] = defaultdict(float)
    known = costs is not None
    for event in timeline.events:
        step = event.instruction
        if isinstance(step, Send):
            spans[step.stage, step.target].append((event.start_seconds, event.end_seconds))
            if costs is not None:
                moved[step.stage, step.target] += TransferCost(
                    *costs.transfers[step.stage, step.target, step.what]
                ).bytes
    whole = timeline.makespan_seconds
    return tuple(
        Channel(
            source,
            target,
            _union(intervals) / whole if whole else 0.0,
            moved[source, target] / whole if known and whole and moved[source, target] else None,
        )
        for (source, target), intervals in sorted(spans.items())
    )


def _union(intervals: list[tuple[float, float]]) -> float:
    total, until = 0.0, 0.0
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def waiting_seconds(timeline: Timeline) -> tuple[float, ...]:
    """Seconds that each mesh waits for messages."""
    waits = [0.0] * len(timeline.mesh_devices)
    for event in timeline.events:
        if isinstance(event.instruction, Receive):
            waits[event.mesh] += event.end_seconds - event.start_seconds
    return tuple(waits)
