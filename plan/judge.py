"""The simulator's verdict on a candidate, which of the judged wins, and why each of the others lost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log

import msgspec

from meshwright.plan.assemble import Assembly, assemble
from meshwright.plan.backward_split import weight_seconds
from meshwright.plan.graph import ModelGraph
from meshwright.plan.inter import StagePlan
from meshwright.plan.planfile import Predicted, bytes_text
from meshwright.plan.policies import recomputes
from meshwright.plan.predict import judge, simulate_stages, step_interval, usual_interval
from meshwright.plan.request import Request
from meshwright.plan.schedule_rules import RUNNABLE, ScheduleRule
from meshwright.plan.stages import StagePricer

# What simplicity may cost at most, whatever the model's error: half of the 1 % by which a search may be behind the best
# plan that is known.
MOST_FOR_SIMPLICITY = 0.005
_EQUAL = 1e-9  # relative; sums of the same seconds in another order


@dataclass(frozen=True, slots=True)
class Candidate:
    """Stages that the stage search found, and the schedule they are meant for."""

    rule: ScheduleRule
    pricer: StagePricer
    stages: StagePlan

    @property
    def microbatches(self) -> int:
        """Micro-batches of one step."""
        return self.pricer.setting.microbatches

    @property
    def graph(self) -> ModelGraph:
        """The model at that number of micro-batches."""
        return self.pricer.setting.graph

    @property
    def recomputing(self) -> tuple[bool, ...]:
        """Whether each stage recomputes its forward."""
        return tuple(recomputes(self.pricer, stage.kind) for stage in self.stages.stages)

    @property
    def remat(self) -> str:
        """The policy in a word."""
        return "mixed" if len(set(self.recomputing)) > 1 else "full" if self.recomputing[0] else "none"


@dataclass(frozen=True, slots=True)
class Judged:
    """A candidate with the simulator's answer. ``peaks`` are bytes of the fullest device of each stage's mesh."""

    candidate: Candidate
    assembly: Assembly
    predicted: Predicted
    peaks: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Of one step."""
        return self.predicted.iteration_seconds

    @property
    def name(self) -> str:
        """What it is, in a line."""
        c = self.candidate
        shape_of = {stage.devices: "x".join(str(n) for n in stage.mesh.values()) for stage in self.assembly.stages}
        meshes = "|".join(shape_of.values())
        return f"{c.rule.text}, {c.microbatches} micro-batches, remat {c.remat}, meshes {meshes}"

    @property
    def simplicity(self) -> tuple[int, int, int, int, int]:
        """Smaller is simpler: kinds of stages, stages, split axes, stages that recompute, a schedule's rank."""
        stages, recomputing = self.assembly.stages, self.candidate.recomputing
        kinds = {
            (tuple(s.mesh.values()), s.layers[1] - s.layers[0], r) for s, r in zip(stages, recomputing, strict=True)
        }
        axes = sum(size > 1 for stage in stages for size in stage.mesh.values())
        name = self.candidate.rule.name
        rank = RUNNABLE.index(name) if name in RUNNABLE else len(RUNNABLE)
        return len(kinds), len(stages), axes, sum(recomputing), rank

    @property
    def parts(self) -> dict[str, float]:
        """Where the device-seconds of a step go, as seconds of a step."""
        idle = self.predicted.bubble_fraction * self.seconds
        busy = [
            (
                len(s.devices),
                s.forward_communication_seconds + s.backward_communication_seconds,
                s.reduce_seconds,
            )
            for s in self.assembly.stages
        ]
        devices = sum({s.devices: len(s.devices) for s in self.assembly.stages}.values())
        count = self.candidate.microbatches
        sent = sum(n * (count * each + once) for n, each, once in busy) / devices
        return {"computes": max(self.seconds - idle - sent, 0.0), "communicates": sent, "waits": idle}


def judge_candidate(candidate: Candidate, request: Request) -> Judged:
    """Assemble the candidate's stages and simulate them."""
    assembly = assemble(candidate.pricer, candidate.stages.stages, request.cluster)
    policies = zip(assembly.stages, candidate.recomputing, strict=True)
    stages = tuple(msgspec.structs.replace(s, remat="full" if again else "none") for s, again in policies)
    if candidate.rule.splits_backward:
        costs = [candidate.pricer.cost(*stage.cell) for stage in candidate.stages.stages]
        late = [weight_seconds(cost) for cost in costs]
        stages = tuple(
            msgspec.structs.replace(stage, weight_gradient_seconds=seconds)
            for stage, seconds in zip(stages, late, strict=True)
        )
    cluster, graph, count = request.cluster, candidate.graph, candidate.microbatches
    timeline = simulate_stages(cluster, candidate.rule.name, count, stages, assembly.transfers, assembly.tied)
    predicted = judge(
        timeline,
        cluster,
        request.batch,
        graph.tokens_per_sample,
        graph.model_flops * count,
        compute_dtype(graph),
    )
    peak_of = dict(zip(timeline.mesh_devices, timeline.peak_bytes, strict=True))
    peaks = tuple(peak_of[stage.devices] for stage in stages)
    return Judged(candidate, replace(assembly, stages=stages), predicted, peaks)


def compute_dtype(graph: ModelGraph) -> str:
    """The dtype in which most matmul FLOPs are done."""
    flops: dict[str, float] = {}
    for use in graph.layers:
        layer = graph.classes[use.layer_class]
        for op in layer.operators:
            if op.heavy:
                dtype = layer.tensors[op.inputs[0]].dtype
                flops[dtype] = flops.get(dtype, 0.0) + op.flops
    return max(sorted(flops), key=lambda d: flops[d]) if flops else "float32"


def within(judged: Sequence[Judged], limit_bytes: float) -> list[Judged]:
    """Those whose every device holds no more, by the simulator."""
    return [j for j in judged if j.predicted.peak_memory_bytes <= limit_bytes]


def difference_error(one: Judged, other: Judged, request: Request) -> float:
    """Relative error of the difference of two predictions, as far as the calibration can tell.

    The interval of the calibration is an error that all plans of a model on a cluster share where they spend their time
    alike (``meshwright.calibrate.uncertainty``): it cancels from the difference. It counts for the part of the step
    that the two spend differently: half the sum of the differences of the shares.
    """
    around = step_interval(request.cluster, usual_interval(request.cluster))
    unlike = sum(abs(one.parts[part] / one.seconds - other.parts[part] / other.seconds) for part in one.parts) / 2
    return unlike * max(log(around.high), -log(around.low))


def winner_of(judged: Sequence[Judged], request: Request) -> Judged:
    """The fastest, or a simpler one that is as fast within the model's own error (at most ``MOST_FOR_SIMPLICITY``)."""
    fastest = min(judged, key=lambda j: (j.seconds, j.simplicity, j.name))

    def near(other: Judged) -> bool:
        error = min(max(difference_error(fastest, other, request), _EQUAL), MOST_FOR_SIMPLICITY)
        return other.seconds <= fastest.seconds * (1 + error)

    close = [j for j in judged if near(j)]
    return min(close, key=lambda j: (j.simplicity, j.predicted.peak_memory_bytes, j.seconds, j.name))


def why_not(other: Judged, winner: Judged, request: Request) -> str:
    """Why a candidate is not the plan, in a line."""
    peak = other.predicted.peak_memory_bytes
    if peak > request.device_bytes:
        return f"needs {bytes_text(peak)} on a device of {bytes_text(request.device_bytes)}"
    if peak > request.usable_bytes:
        return f"needs {bytes_text(peak)} a device, more than the memory margin of {request.memory_margin:.0%} leaves"
    slower = other.seconds / winner.seconds - 1
    if slower < 0:
        return "faster by less than the model can tell, and less simple"
    more = {part: other.parts[part] - seconds for part, seconds in winner.parts.items()}
    cause = max(more, key=lambda part: more[part])
    if slower == 0 or more[cause] <= 0:
        return "as fast, and no simpler"
    return f"{slower:.1%} slower: {cause} {other.parts[cause]:.3g} s of the step, not {winner.parts[cause]:.3g} s"
