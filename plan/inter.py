"""Inter-operator planning: which layers form a stage, on which devices, with which layouts at the borders.

The stage DP is exact for a stated *surrogate* of the iteration time; the event engine judges its finalists. Stage s
takes t_s for the forward and backward of one micro-batch, the hop after it x_s (activation out, cotangent back; 0 for
the last), u_s once per iteration (gradient sync, update). With B micro-batches

    1F1B:   T = sum_s (t_s + x_s) + (B - 1) max_s (t_s + x_s)           + max_s u_s
    GPipe:  T = sum_s (t_s + x_s) + (B - 1) max(max_s t_s, max_s x_s)   + max_s u_s

and stage s of S holds min(B, S - s) live micro-batches under 1F1B, B under GPipe. For equal stages without hops both
are the exact makespan (B + S - 1) t of Narayanan et al., SC 2021, section 2.2, and for any stages without hops and
once-costs they are Alpa's objective (Zheng et al., OSDI 2022, equation 2). The form of the hop follows the exact
makespans with overlappable hop latency c each way: GPipe pays (S - 1) 2c, in fill and drain only; 1F1B pays
2c (B(S - 1)/S + S - 2), about once per micro-batch, because its steady state waits for each transfer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from meshwright.errors import PlanError
from meshwright.plan import stage_labels as kernels
from meshwright.plan.stage_labels import BoolArray, FloatArray, IntArray

PipelineSchedule = Literal["gpipe", "1f1b"]
_Common = tuple[FloatArray, FloatArray, IntArray, FloatArray, IntArray, BoolArray, int, bool]

_ROUNDING = 1e-9  # relative; far above the error of the DP's grid, far below what a plan can gain
_GRID_BITS = 48  # costs become multiples of total / 2**48, so that float64 sums are exact in any order
_GUESSES = (
    1.1,
    1.5,
    3.0,
    np.inf,
)  # of the best total, in units of its lower bound, tried in turn with one label per state
_WIDER = 16  # labels per state where one finds no plan that fits
_WINDOWS = (1.01, 1.05)  # alternatives are sought within these ratios to the best total, in turn
_ALTERNATIVES_WIDTH = 16  # labels per state of that search


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
    # (L+1, 2, K, A, K, A): [layer after the cut, 1 = cut between hosts, kind and exit layout of the left stage, kind
    # and entry layout of the right]: activation there and cotangent back, one micro-batch
    hop_seconds: FloatArray
    devices: IntArray  # (K,)
    memory_bytes: float  # limit per device
    devices_per_host: int
    total_devices: int

    def __post_init__(self) -> None:
        shape = self.seconds.shape
        if len(shape) != 5 or 0 in shape or shape[1] != shape[0] + 1 or shape[3] != shape[4]:
            raise PlanError(f"stage seconds have shape {shape}; needed is (L, L+1, K, A, A) with L layers, K kinds")
        layers, _, kinds, layouts, _ = shape
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("once_seconds", "static_bytes", "saved_bytes", "transient_bytes"), shape
        )
        wanted |= {"hop_seconds": (layers + 1, 2, kinds, layouts, kinds, layouts), "devices": (kinds,)}
        for name, needed in wanted.items():
            if getattr(self, name).shape != needed:
                raise PlanError(f"{name} has shape {getattr(self, name).shape}; beside these seconds it is {needed}")
        for name in ("seconds", *wanted):
            array = getattr(self, name)
            if not (array >= 0).all():  # also false for NaN
                raise PlanError(f"{name} holds {array[~(array >= 0)][0]}; a cost is at least 0 (+inf = impossible)")
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


def surrogate_seconds(
    table: StageTable, stages: Sequence[Stage], microbatches: int, schedule: PipelineSchedule, cross_mesh: bool = True
) -> float:
    """The surrogate of one iteration's time (formulas and sources: this module's docstring)."""
    times = [float(table.seconds[s.cell]) for s in stages]
    hops = [_hop_seconds(table, left, right) if cross_mesh else 0.0 for left, right in pairwise(stages)] + [0.0]
    joint = [t + x for t, x in zip(times, hops, strict=True)]
    largest = max(joint) if schedule == "1f1b" else max(*times, *hops)
    return sum(joint) + (microbatches - 1) * largest + max(float(table.once_seconds[s.cell]) for s in stages)


def peak_bytes(
    table: StageTable, stages: Sequence[Stage], microbatches: int, schedule: PipelineSchedule
) -> tuple[float, ...]:
    """Peak per device of each stage: static + live micro-batches x saved + transient."""
    peaks = []
    for to_end, stage in zip(range(len(stages), 0, -1), stages, strict=True):
        live = min(microbatches, to_end) if schedule == "1f1b" else microbatches
        static, saved = table.static_bytes[stage.cell], table.saved_bytes[stage.cell]
        peaks.append(float(static + live * saved + table.transient_bytes[stage.cell]))
    return tuple(peaks)


def best_stages(
    table: StageTable,
    microbatches: int,
    schedule: PipelineSchedule,
    keep: int = 1,
    max_stages: int | None = None,
    cross_mesh: bool = True,
    all_devices: bool = False,
) -> list[StagePlan]:
    """The best plans of the chain by the surrogate in this module's docstring, best first.

    Stages take devices one after another from device 0. A stage smaller than a host stays inside one, a larger one
    starts at a host; a cut at a multiple of ``devices_per_host`` is a cut between hosts. Peak memory holds per stage.

    Guaranteed: the first plan is an optimum of the surrogate (to a relative 1e-9). Ties go to fewer idle devices, then
    to fewer stages, then to the lexicographically first stages: a plan that leaves devices idle wins only by being
    faster. The others are of different *shapes* (a shape is the cuts and kinds), each with its best layouts, within 5 %
    of the optimum (choosing by the surrogate alone loses 1 to 5 % against simulation), so there may be fewer than
    ``keep``. They are the very best of those on small tables; on large ones, where more than 16 ways to run the rest
    of the chain compete at one cut, they are good but need not be the very best.

    Args:
        keep: number of plans wanted.
        max_stages: most stages of a plan; default: as many as there are layers.
        cross_mesh: False drops the hops from the objective (Alpa's own); hops of +inf are then ignored too.
        all_devices: True allows only plans that use every device, as Alpa does.

    Raises:
        PlanError: no plan fits; says by how many GB the best attempt misses.
    Source: pruned Pareto labels over Alpa's recursion (Zheng et al., OSDI 2022, equation 3).
    """
    if microbatches < 1 or keep < 1 or (max_stages is not None and max_stages < 1):
        raise PlanError(
            f"micro-batches, plans kept and stages are at least 1; got {microbatches}, {keep} and {max_stages}"
        )
    if schedule not in ("gpipe", "1f1b"):
        raise PlanError(f"the stage search knows the schedules gpipe and 1f1b, not {schedule!r}")
    search = _Search(table, microbatches, schedule, max_stages or table.layers, cross_mesh, all_devices)
    plans = search.run(search.upper_bound(), 1)
    for window in _WINDOWS if plans and keep > 1 else ():
        best = plans[0]
        near = search.run(window * best.surrogate_seconds, keep, max(_ALTERNATIVES_WIDTH, keep))
        plans = [best, *(plan for plan in near if plan.shape != best.shape)][:keep]
        if len(plans) == keep:
            break
    if not plans:
        raise PlanError(
            f"no chain of stages covers all {table.layers} layers on {table.total_devices} devices: some layer is "
            f"impossible on every submesh, or no transfer joins the layouts on both sides of a cut"
        )
    return plans


class _Search:
    """The table as the kernels read it, under one schedule."""

    def __init__(
        self,
        table: StageTable,
        microbatches: int,
        schedule: PipelineSchedule,
        max_stages: int,
        cross_mesh: bool,
        all_devices: bool,
    ) -> None:
        self.table, self.microbatches, self.schedule = table, microbatches, schedule
        self.max_stages, self.cross_mesh, self.all_devices = max_stages, cross_mesh, all_devices
        self.joint = schedule == "1f1b"
        self.devices = np.ascontiguousarray(table.devices, dtype=np.int64)
        self.fits_at = _fits_at(table)
        self.max_live = _max_live(table, microbatches)
        fits = self.max_live >= (1 if self.joint else microbatches)
        fits &= np.isfinite(table.once_seconds)
        fits &= np.arange(table.layers)[:, None, None, None, None] < np.arange(table.layers + 1)[:, None, None, None]
        self.seconds = np.where(fits, table.seconds, np.inf)
        self.hops = table.hop_seconds if cross_mesh else np.zeros_like(table.hop_seconds)

    def upper_bound(self) -> float:
        """The total of a good plan, found with few labels per state; +inf if it takes more to find one that fits."""
        arrays = (self.seconds, self.table.once_seconds, self.hops)
        closed, _ = kernels.prefix_bounds(*self._common(*arrays), np.inf)
        least_sum, least_largest, least_once = closed[-1].min(axis=(0, 1, 2))
        repeated = (self.microbatches - 1) * least_largest if self.microbatches > 1 else 0.0  # 0 · inf is no number
        least = least_sum + repeated + least_once
        for upper in [guess * least for guess in _GUESSES] if np.isfinite(least) and least > 0 else [np.inf]:
            plans = self._run(*arrays, upper, 1, 1)
            if plans:
                return plans[0].surrogate_seconds
        self._check_that_memory_fits()
        plans = self._run(*arrays, np.inf, 1, _WIDER)
        return plans[0].surrogate_seconds if plans else np.inf

    def run(self, upper: float, keep: int, width: int = int(kernels.NEVER)) -> list[StagePlan]:
        """The ``keep`` best plans among those up to ``upper``; exact if the labels per state are not limited."""
        upper *= 1 + _ROUNDING
        arrays = (self.seconds, self.table.once_seconds, self.hops)
        scale = (
            upper if np.isfinite(upper) else max(float(np.max(x, where=np.isfinite(x), initial=0.0)) for x in arrays)
        )
        step = 2.0 ** (np.floor(np.log2(scale)) - _GRID_BITS) if scale > 0 else 1.0
        seconds, once, hops = (np.where(x <= upper, np.round(x / step) * step, np.inf) for x in arrays)
        return self._run(seconds, once, hops, upper, keep, width)

    def _common(self, seconds: FloatArray, once: FloatArray, hops: FloatArray) -> _Common:
        return (
            np.ascontiguousarray(seconds),
            np.ascontiguousarray(once),
            self.max_live,
            np.ascontiguousarray(hops),
            self.devices,
            self.fits_at,
            self.table.devices_per_host,
            self.joint,
        )

    def _run(
        self, seconds: FloatArray, once: FloatArray, hops: FloatArray, upper: float, keep: int, width: int
    ) -> list[StagePlan]:
        common = self._common(seconds, once, hops)
        closed, opened = kernels.prefix_bounds(*common, upper)
        ends = kernels.search_labels(
            *common,
            self.all_devices,
            float(self.microbatches - 1),
            self.max_stages,
            closed,
            opened,
            self._slack(seconds),
            upper,
            keep,
            width,
        )
        return self._plans(keep, *ends)

    def _slack(self, seconds: FloatArray) -> IntArray:
        """(L+1,) how deep a pipeline may get before any stage that ends at or before a cut runs out of memory."""
        live = np.where(np.isfinite(seconds), self.max_live, kernels.NEVER).min(axis=(0, 2, 3, 4))
        return np.minimum.accumulate(np.minimum(live, self.max_stages)).astype(np.int64)

    def _plans(self, keep: int, facts: IntArray, totals: FloatArray, pool: IntArray) -> list[StagePlan]:
        ranked = sorted(
            (float(totals[n]), int(facts[n, kernels.IDLE]), int(facts[n, kernels.STAGES]), self._stages(facts[n], pool))
            for n in range(len(totals))
        )
        plans: list[StagePlan] = []
        shapes = set()
        for _, _, _, stages in ranked:
            seconds = surrogate_seconds(self.table, stages, self.microbatches, self.schedule, self.cross_mesh)
            plan = StagePlan(stages, seconds, peak_bytes(self.table, stages, self.microbatches, self.schedule))
            if plan.shape not in shapes:
                shapes.add(plan.shape)
                plans.append(plan)
        return plans[:keep]

    def _stages(self, fact: IntArray, pool: IntArray) -> tuple[Stage, ...]:
        stages = []
        layer = device = 0
        while True:
            last, kind, entry, exit_, following = (int(x) for x in fact[kernels.LAST :])
            stages.append(Stage(layer, last, kind, entry, exit_, device))
            layer, device = last, device + int(self.devices[kind])
            if following < 0:
                return tuple(stages)
            fact = pool[following]

    def _check_that_memory_fits(self) -> None:
        """Raise the error that names the missing GB, if memory is what is missing."""
        table = self.table
        possible = np.isfinite(table.seconds) & np.isfinite(table.once_seconds)
        per_depth = []
        for depth in range(1, min(self.max_stages, table.total_devices, table.layers) + 1):
            live = min(self.microbatches, depth) if self.joint else self.microbatches
            peak = table.static_bytes + live * table.saved_bytes + table.transient_bytes
            per_depth.append(np.where(possible, peak, np.inf).min(axis=(3, 4)))
        least = kernels.least_peak_bytes(np.stack(per_depth), self.devices, self.fits_at, self.all_devices)
        if table.memory_bytes < least < np.inf:
            raise PlanError(
                f"no split of {table.layers} layers over {table.total_devices} devices fits in "
                f"{table.memory_bytes / 1e9:.2f} GB per device: the best attempt needs {least / 1e9:.2f} GB on its "
                f"fullest device and lacks {(least - table.memory_bytes) / 1e9:.2f} GB. Use more devices, smaller "
                f"micro-batches, rematerialisation or a sharded optimizer state."
            )


def _hop_seconds(table: StageTable, left: Stage, right: Stage) -> float:
    crosses = int(right.first_device % table.devices_per_host == 0)
    return float(table.hop_seconds[right.first_layer, crosses, left.kind, left.exit, right.kind, right.entry])


def _fits_at(table: StageTable) -> BoolArray:
    """(K, D) whether a stage of a kind may start at a device."""
    first, n, per_host = np.arange(table.total_devices), table.devices[:, None], table.devices_per_host
    inside = first % per_host + n <= per_host
    aligned = (first % per_host == 0) & (n > per_host)
    fits: BoolArray = (inside | aligned) & (first + n <= table.total_devices)
    return fits


def _max_live(table: StageTable, microbatches: int) -> IntArray:
    """Most live micro-batches that fit, by the very comparison that peaks are checked with; ``NEVER`` from B on."""

    def fits(live: FloatArray) -> BoolArray:
        with np.errstate(invalid="ignore"):  # impossible stages may hold +inf bytes; none of them fits
            peak = table.static_bytes + live * table.saved_bytes + table.transient_bytes
        return np.asarray(peak <= table.memory_bytes)

    room = table.memory_bytes - table.static_bytes - table.transient_bytes
    with np.errstate(divide="ignore", invalid="ignore"):
        live = np.where(table.saved_bytes > 0, np.floor(room / table.saved_bytes), np.where(room >= 0, np.inf, 0.0))
    live = np.clip(np.nan_to_num(live, nan=0.0, posinf=float(microbatches)), 0.0, float(microbatches))
    live = np.where(fits(live), live, live - 1)  # the quotient may be off by one in the last place
    live = np.where(fits(live + 1), live + 1, live)
    return np.where(live >= microbatches, kernels.NEVER, live.astype(np.int64)).astype(np.int64)
