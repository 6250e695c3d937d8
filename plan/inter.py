"""Inter-operator planning: which layers form a stage, on which devices, with which layouts at the borders.

The stage DP is exact for a stated *surrogate* of the iteration time (``meshwright.plan.stage_table``,
``meshwright.plan.schedule_rules``); the event engine judges its finalists.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from meshwright.errors import PlanError
from meshwright.plan import stage_labels as kernels
from meshwright.plan.schedule_rules import ScheduleRule
from meshwright.plan.stage_labels import BoolArray, FloatArray, IntArray
from meshwright.plan.stage_table import (
    Stage,
    StagePlan,
    StageTable,
    fill_and_step,
    fill_share,
    peak_bytes,
    rule_of,
    surrogate_seconds,
)

__all__ = ["PipelineSchedule", "Stage", "StagePlan", "StageTable", "best_stages", "peak_bytes", "surrogate_seconds"]

PipelineSchedule = str  # a name in ``meshwright.plan.schedule_rules.SIMPLE``
_Common = tuple[FloatArray, FloatArray, FloatArray, IntArray, FloatArray, IntArray, BoolArray, int, bool]

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
    of the chain compete at one cut, they are good but need not be the very best. Where the live micro-batches of a
    schedule depend on all stages (zb-h1, zb-h2) and memory is short, stages are limited to each of 1 to 8, 16, 32, ...
    in turn, and a plan is held to what that many would hold.

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
    rule = rule_of(schedule)
    most = min(max_stages or table.layers, table.layers, table.total_devices)
    plans: list[StagePlan] = []
    misses: list[PlanError] = []
    for stages in _depths(most) if rule.live_by_total else (most,):
        search = _Search(table, microbatches, rule, stages, cross_mesh, all_devices)
        try:
            plans += search.best(keep)
        except PlanError as error:
            misses.append(error)
        if not search.memory_binds:
            break
    if not plans and misses:
        raise misses[-1]
    if rule.live_by_total:
        plans = _distinct(table, plans)[:keep]
    if not plans:
        raise PlanError(
            f"no chain of stages covers all {table.layers} layers on {table.total_devices} devices: some layer is "
            f"impossible on every submesh, or no transfer joins the layouts on both sides of a cut"
        )
    return plans


def _depths(most: int) -> Iterator[int]:
    """Limits to the number of stages, largest first."""
    stages = 1 << most.bit_length() - 1
    if stages < most:
        yield most
    while stages > 8:
        yield stages
        stages //= 2
    yield from range(min(stages, most), 0, -1)


def _distinct(table: StageTable, plans: Sequence[StagePlan]) -> list[StagePlan]:
    """The plans of searches under several limits, best first, the first of each shape."""

    def order(plan: StagePlan) -> tuple[float, int, int, tuple[Stage, ...]]:
        used = sum(int(table.devices[stage.kind]) for stage in plan.stages)
        return plan.surrogate_seconds, -used, len(plan.stages), plan.stages

    first_of: dict[tuple[tuple[int, int], ...], StagePlan] = {}
    for plan in sorted(plans, key=order):
        first_of.setdefault(plan.shape, plan)
    return list(first_of.values())


class _Search:
    """The table as the kernels read it, under one schedule and with at most so many stages."""

    def __init__(
        self,
        table: StageTable,
        microbatches: int,
        rule: ScheduleRule,
        max_stages: int,
        cross_mesh: bool,
        all_devices: bool,
    ) -> None:
        self.table, self.microbatches, self.rule = table, microbatches, rule
        self.max_stages, self.cross_mesh, self.all_devices = max_stages, cross_mesh, all_devices
        self.joint = rule.hops_wait
        self.devices = np.ascontiguousarray(table.devices[: table.meshes], dtype=np.int64)
        self.fits_at = _fits_at(table)[: table.meshes]
        self.max_depth = _max_depth(_max_live(table, microbatches), rule, max_stages, microbatches)
        possible = np.isfinite(table.seconds) & np.isfinite(table.once_seconds)
        possible &= (
            np.arange(table.layers)[:, None, None, None, None] < np.arange(table.layers + 1)[:, None, None, None]
        )
        self.memory_binds = bool((self.max_depth[possible] < kernels.NEVER).any())
        share = fill_share(table, rule, microbatches)
        seconds = np.where(possible & (self.max_depth >= 1), table.seconds, np.inf)
        self.fill, self.step = fill_and_step(seconds, None if share is None else share[..., None, None], microbatches)
        self.hops = table.hop_seconds if cross_mesh else np.zeros_like(table.hop_seconds)

    def best(self, keep: int) -> list[StagePlan]:
        """The best plans, best first; none if no chain of stages covers the layers.

        Raises:
            PlanError: memory is what is missing.
        """
        plans = self.run(self.upper_bound(), 1)
        for window in _WINDOWS if plans and keep > 1 else ():
            best = plans[0]
            near = self.run(window * best.surrogate_seconds, keep, max(_ALTERNATIVES_WIDTH, keep))
            plans = [best, *(plan for plan in near if plan.shape != best.shape)][:keep]
            if len(plans) == keep:
                break
        return plans

    def upper_bound(self) -> float:
        """The total of a good plan, found with few labels per state; +inf if it takes more to find one that fits."""
        arrays = (self.fill, self.step, self.table.once_seconds, self.hops)
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
        arrays = (self.fill, self.step, self.table.once_seconds, self.hops)
        scale = (
            upper if np.isfinite(upper) else max(float(np.max(x, where=np.isfinite(x), initial=0.0)) for x in arrays)
        )
        step = 2.0 ** (np.floor(np.log2(scale)) - _GRID_BITS) if scale > 0 else 1.0
        fill, steps, once, hops = (np.where(x <= upper, np.round(x / step) * step, np.inf) for x in arrays)
        return self._run(np.where(np.isfinite(steps), fill, np.inf), steps, once, hops, upper, keep, width)

    def _common(self, fill: FloatArray, steps: FloatArray, once: FloatArray, hops: FloatArray) -> _Common:
        return (
            np.ascontiguousarray(fill),
            np.ascontiguousarray(steps),
            np.ascontiguousarray(once),
            self.max_depth,
            np.ascontiguousarray(hops),
            self.devices,
            self.fits_at,
            self.table.devices_per_host,
            self.joint,
        )

    def _run(
        self,
        fill: FloatArray,
        steps: FloatArray,
        once: FloatArray,
        hops: FloatArray,
        upper: float,
        keep: int,
        width: int,
    ) -> list[StagePlan]:
        common = self._common(fill, steps, once, hops)
        closed, opened = kernels.prefix_bounds(*common, upper)
        ends = kernels.search_labels(
            *common,
            self.all_devices,
            float(self.microbatches - 1),
            self.max_stages,
            closed,
            opened,
            self._slack(fill),
            upper,
            keep,
            width,
        )
        return self._plans(keep, *ends)

    def _slack(self, fill: FloatArray) -> IntArray:
        """(L+1,) how deep a pipeline may get before any stage that ends at or before a cut runs out of memory."""
        depth = np.where(np.isfinite(fill), self.max_depth, kernels.NEVER).min(axis=(0, 2, 3, 4))
        return np.minimum.accumulate(np.minimum(depth, self.max_stages)).astype(np.int64)

    def _plans(self, keep: int, facts: IntArray, totals: FloatArray, pool: IntArray) -> list[StagePlan]:
        ranked = sorted(
            (float(totals[n]), int(facts[n, kernels.IDLE]), int(facts[n, kernels.STAGES]), self._stages(facts[n], pool))
            for n in range(len(totals))
        )
        plans: list[StagePlan] = []
        shapes = set()
        for _, _, _, stages in ranked:
            seconds = surrogate_seconds(self.table, stages, self.microbatches, self.rule.name, self.cross_mesh)
            plan = StagePlan(stages, seconds, peak_bytes(self.table, stages, self.microbatches, self.rule.name))
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
            layer, device = last, device + int(self.table.devices[kind])
            if following < 0:
                return tuple(stages)
            fact = pool[following]

    def _check_that_memory_fits(self) -> None:
        """Raise the error that names the missing GB, if memory is what is missing."""
        table = self.table
        possible = np.isfinite(table.seconds) & np.isfinite(table.once_seconds)
        per_depth = []
        for depth in range(1, min(self.max_stages, table.total_devices, table.layers) + 1):
            live = self.rule.live(depth, depth, self.microbatches)
            peak = table.static_bytes + live * table.saved_bytes + table.transient_bytes
            of_kind = np.where(possible, peak, np.inf).min(axis=(3, 4))
            per_depth.append(of_kind.reshape(*of_kind.shape[:2], -1, table.meshes).min(axis=2))
        least = kernels.least_peak_bytes(np.stack(per_depth), self.devices, self.fits_at, self.all_devices)
        if table.memory_bytes < least < np.inf:
            raise PlanError(
                f"no split of {table.layers} layers over {table.total_devices} devices fits in "
                f"{table.memory_bytes / 1e9:.2f} GB per device: the best attempt needs {least / 1e9:.2f} GB on its "
                f"fullest device and lacks {(least - table.memory_bytes) / 1e9:.2f} GB. Use more devices, smaller "
                f"micro-batches, rematerialisation or a sharded optimizer state."
            )


def _fits_at(table: StageTable) -> BoolArray:
    """(K, D) whether a stage of a kind may start at a device."""
    first, n, per_host = np.arange(table.total_devices), table.devices[:, None], table.devices_per_host
    inside = first % per_host + n <= per_host
    aligned = (first % per_host == 0) & (n > per_host)
    fits: BoolArray = (inside | aligned) & (first + n <= table.total_devices)
    return fits


def _max_depth(max_live: IntArray, rule: ScheduleRule, most_stages: int, microbatches: int) -> IntArray:
    """Most stages from one on with which its live micro-batches fit; ``NEVER``: no number of stages is too many."""
    depths = range(1, most_stages + 1)
    lives = [rule.live(d, most_stages if rule.live_by_total else d, microbatches) for d in depths]
    held = np.maximum.accumulate(np.array(lives))
    depth = np.searchsorted(held, max_live, side="right")
    return np.where(depth == most_stages, kernels.NEVER, depth).astype(np.int64)


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
