"""What every stage costs, as the stage DP reads it, and the surrogate of the step time of a chain of stages.

The surrogates and their sources are listed in ``meshwright.plan.schedule_rules``. For equal stages without hops those
of gpipe and 1f1b are the exact makespan (B + S - 1) t of Narayanan et al., SC 2021, section 2.2, and for any stages
without hops and once-costs they are Alpa's objective (Zheng et al., OSDI 2022, equation 2). The form of the hop follows
the exact makespans with overlappable hop latency c each way: GPipe pays (S - 1) 2c, in fill and drain only; 1F1B pays
2c (B(S - 1)/S + S - 2), about once per micro-batch, because its steady state waits for each transfer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from meshwright.errors import PlanError
from meshwright.plan.schedule_rules import SIMPLE, ScheduleRule
from meshwright.plan.stage_labels import FloatArray, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class StageTable:
    """What every possible stage and every hop between stages costs: the input of the stage DP.

    A *kind* of submesh is a number of devices with a logical mesh shape; entry and exit layouts are small ints.
    Arrays are indexed [first layer, last layer (exclusive), kind, entry layout, exit layout], shape (L, L+1, K, A, A).
    """

    seconds: FloatArray  # forward and backward of one micro-batch; +inf = impossible
    once_seconds: FloatArray  # gradient sync and update, once per iteration
    static_bytes: FloatArray  # per device: parameters, gradients, optimizer state
    saved_bytes: FloatArray  # per device and live micro-batch
    transient_bytes: FloatArray  # per device, one micro-batch's at a time
    # (L+1, 2, M, A, M, A): [layer after the cut, 1 = cut between hosts, mesh and exit layout of the left stage, mesh
    # and entry layout of the right]: activation there and cotangent back, one micro-batch. Kind k runs on mesh k % M:
    # kinds beyond the M-th are other ways to run a stage on the same mesh
    hop_seconds: FloatArray
    devices: IntArray  # (K,)
    memory_bytes: float  # limit per device
    devices_per_host: int
    total_devices: int
    # (L, L+1, K): parts of ``seconds`` that are the forward and the weight-gradients; needed where backwards are split
    forward_share: FloatArray | None = None
    weight_share: FloatArray | None = None

    def __post_init__(self) -> None:
        shape = self.seconds.shape
        if len(shape) != 5 or 0 in shape or shape[1] != shape[0] + 1 or shape[3] != shape[4]:
            raise PlanError(f"stage seconds have shape {shape}; needed is (L, L+1, K, A, A) with L layers, K kinds")
        layers, _, kinds, layouts, _ = shape
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("once_seconds", "static_bytes", "saved_bytes", "transient_bytes"), shape
        )
        meshes = self.hop_seconds.shape[2] if self.hop_seconds.ndim == 6 else kinds
        if not meshes or kinds % meshes:
            raise PlanError(
                f"{kinds} kinds of stages do not run on {meshes} meshes alike; one number divides the other"
            )
        wanted |= {"hop_seconds": (layers + 1, 2, meshes, layouts, meshes, layouts), "devices": (kinds,)}
        for name, needed in wanted.items():
            if getattr(self, name).shape != needed:
                raise PlanError(f"{name} has shape {getattr(self, name).shape}; beside these seconds it is {needed}")
        for name in ("seconds", *wanted):
            array = getattr(self, name)
            if not (array >= 0).all():  # also false for NaN
                raise PlanError(f"{name} holds {array[~(array >= 0)][0]}; a cost is at least 0 (+inf = impossible)")
        for share in (self.forward_share, self.weight_share):
            if share is not None and not (share.shape == shape[:3] and (share >= 0).all() and (share <= 1).all()):
                raise PlanError(f"a share of the seconds has shape {share.shape}; needed are {shape[:3]}, from 0 to 1")
        if not self.memory_bytes > 0 or self.devices_per_host < 1 or self.total_devices < 1:
            raise PlanError(
                f"stages need memory and devices: got {self.memory_bytes} bytes per device, "
                f"{self.devices_per_host} devices per host, {self.total_devices} in all"
            )
        for n in self.devices.tolist():
            if n < 1 or (n > self.devices_per_host and n % self.devices_per_host):
                raise PlanError(
                    f"a submesh of {n} devices does not tile hosts of {self.devices_per_host}: "
                    f"use part of one host or whole hosts"
                )

    @property
    def layers(self) -> int:
        return len(self.seconds)

    @property
    def meshes(self) -> int:
        """Kinds of mesh; a stage of kind k runs on mesh k % meshes."""
        return int(self.hop_seconds.shape[2])


@dataclass(frozen=True, slots=True, order=True)
class Stage:
    """Layers ``first_layer``..``last_layer``-1 on one submesh, from ``first_device`` on."""

    first_layer: int
    last_layer: int
    kind: int
    entry: int
    exit: int
    first_device: int

    @property
    def cell(self) -> tuple[int, int, int, int, int]:
        """Where the stage's costs lie in a ``StageTable``."""
        return self.first_layer, self.last_layer, self.kind, self.entry, self.exit


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One way to run the chain, with what the surrogate says of it."""

    stages: tuple[Stage, ...]
    surrogate_seconds: float
    peak_bytes: tuple[float, ...]  # of the fullest device of each stage

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """Cuts and kinds, without the layouts."""
        return tuple((s.last_layer, s.kind) for s in self.stages)


def rule_of(schedule: str) -> ScheduleRule:
    """The rule of a schedule with one stage a mesh. Errors: PlanError."""
    if schedule not in SIMPLE:
        raise PlanError(f"the stage search knows the schedules {', '.join(SIMPLE)}, not {schedule!r}")
    return SIMPLE[schedule]


def fill_share(table: StageTable, rule: ScheduleRule, microbatches: int) -> FloatArray | None:
    """(L, L+1, K) the part of a stage's seconds that adds to the sum of the surrogate; None: all of it.

    Weight halves that fill waits leave the sum. There are no more of them than micro-batches after the first.
    """
    halves = min(rule.hidden_halves, microbatches - 1)
    if halves == 0:
        return None
    if table.forward_share is None or table.weight_share is None:
        raise PlanError(
            f"schedule {rule.name} splits backwards, and the stage table does not say which part of its seconds is the "
            "forward and which the weight-gradients"
        )
    share: FloatArray = np.maximum(table.forward_share, 1 - halves * table.weight_share)
    return share


def fill_and_step(seconds: FloatArray, share: FloatArray | None, microbatches: int) -> tuple[FloatArray, FloatArray]:
    """What stages add to the sum of the surrogate, and their steps there, which count B - 1 times.

    The bottleneck's own hidden halves come back once, as part of its steps.
    """
    if share is None:
        return seconds, seconds
    possible = np.where(np.isfinite(seconds), seconds, 0.0)
    step = np.where(np.isfinite(seconds), possible * (1 + (1 - share) / (microbatches - 1)), np.inf)
    return np.where(np.isfinite(seconds), possible * share, np.inf), step


def surrogate_seconds(
    table: StageTable, stages: Sequence[Stage], microbatches: int, schedule: str, cross_mesh: bool = True
) -> float:
    """The surrogate of one iteration's time (formulas and sources: ``meshwright.plan.schedule_rules``)."""
    rule = rule_of(schedule)
    share = fill_share(table, rule, microbatches)
    seconds = np.array([table.seconds[s.cell] for s in stages])
    shares = None if share is None else np.array([share[s.cell[:3]] for s in stages])
    fill, step = fill_and_step(seconds, shares, microbatches)
    hops = [hop_seconds(table, left, right) if cross_mesh else 0.0 for left, right in pairwise(stages)] + [0.0]
    steps = step.tolist()
    largest = max(t + x for t, x in zip(steps, hops, strict=True)) if rule.hops_wait else max(*steps, *hops)
    once = max(float(table.once_seconds[s.cell]) for s in stages)
    return float(sum(fill.tolist()) + sum(hops) + (microbatches - 1) * largest + once)


def peak_bytes(table: StageTable, stages: Sequence[Stage], microbatches: int, schedule: str) -> tuple[float, ...]:
    """Peak per device of each stage: static + live micro-batches x saved + transient."""
    rule = rule_of(schedule)
    peaks = []
    for to_end, stage in zip(range(len(stages), 0, -1), stages, strict=True):
        live = rule.live(to_end, len(stages), microbatches)
        static, saved = table.static_bytes[stage.cell], table.saved_bytes[stage.cell]
        peaks.append(float(static + live * saved + table.transient_bytes[stage.cell]))
    return tuple(peaks)


def hop_seconds(table: StageTable, left: Stage, right: Stage) -> float:
    """What the transfer between two neighbours takes, there and back."""
    crosses = int(right.first_device % table.devices_per_host == 0)
    meshes = (left.kind % table.meshes, right.kind % table.meshes)
    return float(table.hop_seconds[right.first_layer, crosses, meshes[0], left.exit, meshes[1], right.entry])
