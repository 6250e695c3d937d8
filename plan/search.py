"""The outer loop: micro-batch count × schedule × rematerialisation, stages by the DP, the simulator as the judge.

No JAX here: the caller passes a function that gives the traced graph for a number of micro-batches.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal, get_args

import msgspec
import numpy as np

from meshwright.calibrate.hardware import Cluster
from meshwright.errors import ModelError, PlanError
from meshwright.plan.assemble import Assembly, assemble
from meshwright.plan.graph import ModelGraph
from meshwright.plan.inter import (
    PipelineSchedule,
    Stage,
    StagePlan,
    StageTable,
    best_stages,
    peak_bytes,
    surrogate_seconds,
)
from meshwright.plan.planfile import FORMAT, VERSION, Plan, Predicted, Rival, bytes_text, cluster_data
from meshwright.plan.predict import judge, simulate_stages
from meshwright.plan.space import Memory
from meshwright.plan.stages import (
    MeshKind,
    Setting,
    SpaceCache,
    StagePricer,
    logical_mesh,
    mesh_kinds,
    without_wasted_devices,
)

Remat = Literal["none", "full"]
Graphs = Callable[[int], ModelGraph]
Progress = Callable[[int, int, str], None]

SEARCHED_SCHEDULES: tuple[PipelineSchedule, ...] = ("1f1b", "gpipe")
_CLOSE = 1.005  # within the simulator's own error plans count as equal, and the simpler one wins
_SIMULATED_PER_SETTING = 3
_MEMORY_PRICES = (0.0, 0.3, 3.0)  # of the seconds of a step, for filling a device's memory once


@dataclass(frozen=True, slots=True)
class Fix:
    """What the user gives instead of having it searched. ``stages`` lists a (data, tensor) mesh for each stage."""

    microbatches: int | None = None
    schedule: str | None = None
    remat: Remat | None = None
    pipeline: int | None = None
    data: int | None = None
    tensor: int | None = None
    stages: tuple[tuple[int, int], ...] | None = None

    @property
    def meshes(self) -> bool:
        """Whether the user gives submeshes."""
        return any(x is not None for x in (self.pipeline, self.data, self.tensor, self.stages))

    def __post_init__(self) -> None:
        for name in ("microbatches", "pipeline", "data", "tensor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"{name} is fixed to {value}; it is at least 1")
        if self.schedule is not None and self.schedule not in SEARCHED_SCHEDULES:
            raise PlanError(f"schedule {self.schedule!r} cannot be planned; use {' or '.join(SEARCHED_SCHEDULES)}")
        if self.remat is not None and self.remat not in get_args(Remat):
            raise PlanError(f"remat {self.remat!r} is unknown; use {' or '.join(get_args(Remat))}")


@dataclass(frozen=True, slots=True)
class Request:
    """What to plan for."""

    cluster: Cluster
    batch: int
    fix: Fix = field(default_factory=Fix)
    memory: Memory = field(default_factory=Memory)
    cross_mesh: bool = True
    use_ilp: bool = False


@dataclass(frozen=True, slots=True)
class _Candidate:
    setting: Setting
    schedule: PipelineSchedule
    pricer: StagePricer
    stages: StagePlan


@dataclass(frozen=True, slots=True)
class _Judged:
    candidate: _Candidate
    assembly: Assembly
    predicted: Predicted
    peaks: tuple[float, ...]

    @property
    def simplicity(self) -> tuple[int, int, int]:
        """Fewer stages, fewer split axes, no rematerialisation first."""
        axes = sum(size > 1 for stage in self.assembly.stages for size in stage.mesh.values())
        return len(self.assembly.stages), axes, int(self.candidate.setting.remat)


@dataclass(slots=True)
class _Clock:
    """Where the search spends its time."""

    trace: float = 0.0
    intra: float = 0.0
    inter: float = 0.0
    simulate: float = 0.0
    candidates: int = 0
    simulations: int = 0
    ilp_solves: int = 0


def search(graphs: Graphs, request: Request, progress: Progress | None = None) -> Plan:
    """The best plan found, with its runners-up.

    Errors: PlanError if no plan fits, or if what is fixed does not go together.
    """
    begun = time.perf_counter()
    clock = _Clock()
    counts = microbatch_counts(request.batch, request.fix.microbatches)
    judged: list[_Judged] = []
    reasons: list[str] = []
    untraced: ModelError | None = None
    for done, count in enumerate(counts):
        if progress:
            best = min((j.predicted.iteration_seconds for j in judged), default=None)
            text = f"{count} micro-batches" + (f", best {best:.4g} s" if best is not None else "")
            progress(done, len(counts), text)
        start = time.perf_counter()
        try:
            graph = graphs(count)
        except ModelError as error:  # micro-batches too small for the model's groups, or not allowed at all
            untraced = error
            continue
        finally:
            clock.trace += time.perf_counter() - start
        _refuse_if_hopeless(graph, request)
        found = False
        for candidate in _candidates(graph, count, request, clock, reasons):
            found = True
            judged.append(_judge(candidate, request, clock))
        if not found and judged and any(not j.candidate.setting.remat for j in judged) and count < counts[0]:
            break  # larger micro-batches need yet more memory
    fitting = [j for j in judged if j.predicted.fits]
    if progress:
        progress(len(counts), len(counts), "done")
    if not fitting:
        if untraced is not None and not judged and not reasons:
            raise untraced
        raise PlanError(_why_nothing_fits(reasons, judged, request))
    best_seconds = min(j.predicted.iteration_seconds for j in fitting)
    close = [j for j in fitting if j.predicted.iteration_seconds <= best_seconds * _CLOSE]
    winner = min(close, key=lambda j: (*j.simplicity, j.predicted.peak_memory_bytes, j.predicted.iteration_seconds))
    return _plan(winner, judged, request, clock, time.perf_counter() - begun)


def _refuse_if_hopeless(graph: ModelGraph, request: Request) -> None:
    """Say at once that weights, gradients and optimizer state alone exceed the memory of all devices together."""
    needed = graph.training_bytes(request.memory.optimizer_bytes)
    there = sum(host.devices * host.device.memory_bytes.value for host in request.cluster.hosts)
    if needed > there:
        devices = sum(host.devices for host in request.cluster.hosts)
        raise PlanError(
            f"no plan fits: weights, gradients and optimizer state of {graph.name} need {bytes_text(needed)}, and the "
            f"{devices} devices of {request.cluster.name} have {bytes_text(there)} together; "
            f"use more than {int(needed / there * devices)} such devices or a smaller model"
        )


def microbatch_counts(batch: int, fixed: int | None) -> list[int]:
    """Numbers of micro-batches to try: divisors of the batch, most first, at most one per factor of about two."""
    if batch < 1:
        raise PlanError(f"a batch of {batch} is not a batch; it is at least 1")
    if fixed is not None:
        if batch % fixed:
            divisors = [d for d in range(1, batch + 1) if batch % d == 0]
            near = " or ".join(str(d) for d in sorted(sorted(divisors, key=lambda d: abs(d - fixed))[:2]))
            raise PlanError(f"a batch of {batch} does not split into {fixed} micro-batches; use {near}")
        return [fixed]
    kept: list[int] = []
    for divisor in (d for d in range(batch, 0, -1) if batch % d == 0):
        if not kept or divisor <= kept[-1] / 1.9 or divisor == 1:
            kept.append(divisor)
    return kept


def _candidates(
    graph: ModelGraph, count: int, request: Request, clock: _Clock, reasons: list[str]
) -> Iterator[_Candidate]:
    """The stage DP's best for each schedule and remat policy at one number of micro-batches."""
    cluster, fix = request.cluster, request.fix
    slowdown = cluster.hosts[0].slowdown(cluster.hosts[0].devices)
    schedules = (
        SEARCHED_SCHEDULES if fix.schedule is None else tuple(s for s in SEARCHED_SCHEDULES if s == fix.schedule)
    )
    remats: Sequence[Remat] = ("none", "full") if fix.remat is None else (fix.remat,)
    spaces: SpaceCache = {}
    open_schedules = set(schedules)  # for which rematerialisation may still help
    for remat in remats:
        setting = Setting(graph, count, remat == "full", request.memory, slowdown)
        unsolved = [s for s in schedules if s in open_schedules]
        for price in _MEMORY_PRICES:
            if not unsolved:
                break
            kinds = _kinds(cluster, fix, price * _seconds_per_byte(graph, cluster))
            start = time.perf_counter()
            pricer = StagePricer(setting, kinds, request.use_ilp, spaces)
            table = pricer.stage_table(cluster)
            if not fix.meshes:
                table = without_wasted_devices(table)
            clock.intra += time.perf_counter() - start
            clock.ilp_solves += pricer.ilp_solves
            for schedule in tuple(unsolved):
                start = time.perf_counter()
                try:
                    plans = _stage_plans(table, kinds, request, count, schedule)
                    if price == 0.0 and _memory_is_no_matter(table, plans[0], kinds, request, count, schedule):
                        open_schedules.discard(schedule)
                except PlanError as error:
                    reasons.append(str(error))
                    continue
                finally:
                    clock.inter += time.perf_counter() - start
                unsolved.remove(schedule)
                for plan in plans:
                    clock.candidates += 1
                    yield _Candidate(setting, schedule, pricer, plan)


def _memory_is_no_matter(
    table: StageTable,
    best: StagePlan,
    kinds: Sequence[MeshKind],
    request: Request,
    count: int,
    schedule: PipelineSchedule,
) -> bool:
    """Whether unlimited memory would give no better stages: then rematerialisation, which only costs time, is out."""
    unlimited = replace(table, memory_bytes=float("inf"))
    freed = _stage_plans(unlimited, kinds, request, count, schedule, keep=1)
    return freed[0].surrogate_seconds >= best.surrogate_seconds * (1 - 1e-6)


def _stage_plans(
    table: StageTable,
    kinds: Sequence[MeshKind],
    request: Request,
    count: int,
    schedule: PipelineSchedule,
    keep: int = _SIMULATED_PER_SETTING,
) -> list[StagePlan]:
    if request.fix.stages is not None:
        return [_given_stages(table, len(request.fix.stages), count, schedule)]
    return best_stages(table, count, schedule, keep, None, request.cross_mesh, all_devices=request.fix.meshes)


def _given_stages(table: StageTable, stages: int, count: int, schedule: PipelineSchedule) -> StagePlan:
    """The best cut for a given row of meshes: kind s is stage s. Few stages, few cuts: all are tried."""
    layers, width = table.layers, table.seconds.shape[3]
    if stages > layers:
        raise PlanError(f"{stages} stages were asked of a model of {layers} layers; use at most {layers}")
    best: StagePlan | None = None
    for inner in combinations(range(1, layers), stages - 1):
        cuts = (0, *inner, layers)
        chosen = []
        device = 0
        for s in range(stages):
            block = table.seconds[cuts[s], cuts[s + 1], s]
            entry, leave = np.unravel_index(int(block.argmin()), (width, width))
            chosen.append(Stage(cuts[s], cuts[s + 1], s, int(entry), int(leave), device))
            device += int(table.devices[s])
        if not all(np.isfinite(table.seconds[stage.cell]) for stage in chosen):
            continue
        peaks = peak_bytes(table, chosen, count, schedule)
        seconds = surrogate_seconds(table, chosen, count, schedule)
        if max(peaks) <= table.memory_bytes and (best is None or seconds < best.surrogate_seconds):
            best = StagePlan(tuple(chosen), seconds, peaks)
    if best is None:
        raise PlanError(f"the given stages do not fit in {bytes_text(table.memory_bytes)} a device with any cut")
    return best


def _kinds(cluster: Cluster, fix: Fix, seconds_per_byte: float) -> tuple[MeshKind, ...]:
    """The submeshes that what is fixed leaves open."""
    total = cluster.devices
    if fix.stages is not None:
        used = sum(d * t for d, t in fix.stages)
        if used > total:
            raise PlanError(f"the given stages want {used} devices; the cluster has {total}")
        return tuple(
            MeshKind(logical_mesh(cluster, shape), ("data", "tensor"), seconds_per_byte) for shape in fix.stages
        )
    pipeline = fix.pipeline
    if fix.data is not None or fix.tensor is not None:
        given = (fix.data or 1) * (fix.tensor or 1) * (pipeline or 1)
        rest, left = divmod(total, given)
        if left:
            raise PlanError(f"fixed sizes multiply to {given}, which does not divide the cluster's {total} devices")
        data, tensor = fix.data, fix.tensor
        if data is None:
            data, rest = (rest, 1) if pipeline else (1, rest)
        elif tensor is None:
            tensor, rest = (rest, 1) if pipeline else (1, rest)
        if pipeline and rest != 1:
            raise PlanError(f"fixed sizes use {given} of the cluster's {total} devices; they must multiply to {total}")
        shape = (data, tensor or 1)
        return (MeshKind(logical_mesh(cluster, shape), ("data", "tensor"), seconds_per_byte),)
    kinds = tuple(replace(kind, seconds_per_byte=seconds_per_byte) for kind in mesh_kinds(cluster))
    if pipeline is None:
        return kinds
    if total % pipeline:
        raise PlanError(f"{pipeline} equal stages do not divide the cluster's {total} devices")
    return tuple(kind for kind in kinds if kind.mesh.devices == total // pipeline)


def _seconds_per_byte(graph: ModelGraph, cluster: Cluster) -> float:
    """The price of memory at which filling a device costs as much as computing one micro-batch on the whole cluster."""
    device = cluster.device(0)
    seconds = graph.model_flops / (device.peak_flops(compute_dtype(graph)) * cluster.devices)
    return seconds / device.memory_bytes.value


def _judge(candidate: _Candidate, request: Request, clock: _Clock) -> _Judged:
    start = time.perf_counter()
    setting, cluster = candidate.setting, request.cluster
    assembly = assemble(candidate.pricer, candidate.stages.stages, cluster)
    timeline = simulate_stages(
        cluster, candidate.schedule, setting.microbatches, assembly.stages, assembly.transfers, assembly.tied
    )
    graph = setting.graph
    predicted = judge(
        timeline,
        cluster,
        request.batch,
        graph.tokens_per_sample,
        graph.model_flops * setting.microbatches,
        compute_dtype(graph),
    )
    clock.simulate += time.perf_counter() - start
    clock.simulations += 1
    return _Judged(candidate, assembly, predicted, tuple(timeline.peak_bytes))


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


def _name(judged: _Judged) -> str:
    setting = judged.candidate.setting
    meshes = "|".join("x".join(str(n) for n in stage.mesh.values()) for stage in judged.assembly.stages)
    remat = "full" if setting.remat else "none"
    return f"{judged.candidate.schedule}, {setting.microbatches} micro-batches, remat {remat}, meshes {meshes}"


def _plan(winner: _Judged, judged: Sequence[_Judged], request: Request, clock: _Clock, seconds: float) -> Plan:
    candidate, graph = winner.candidate, winner.candidate.setting.graph
    rivals: dict[str, Rival] = {}
    for other in sorted(judged, key=lambda j: (not j.predicted.fits, j.predicted.iteration_seconds)):
        if other is winner:
            continue
        p = other.predicted
        slower = p.iteration_seconds / winner.predicted.iteration_seconds - 1
        why = f"{slower:.1%} slower" if slower >= _CLOSE - 1 else "as fast within the model's error, but less simple"
        if not p.fits:
            why = f"needs {bytes_text(p.peak_memory_bytes)} a device"
        rivals.setdefault(_name(other), Rival(_name(other), p.iteration_seconds, p.fits, why))
    stages = tuple(
        msgspec.structs.replace(stage, peak_memory_bytes=peak)
        for stage, peak in zip(winner.assembly.stages, winner.peaks, strict=True)
    )
    used = sum(len(stage.devices) for stage in stages)
    notes = []
    if graph.unknown:
        listed = ", ".join(f"{name} ×{times}" for name, times in graph.unknown)
        notes.append(f"no sharding rule for {listed}: these run replicated")
    if used < request.cluster.devices:
        why = "as the stages are given" if request.fix.stages is not None else "it is faster so"
        notes.append(f"{request.cluster.devices - used} of {request.cluster.devices} devices stay idle: {why}")
    return Plan(
        format=FORMAT,
        version=VERSION,
        model=graph.name,
        fingerprint=graph.fingerprint,
        cluster=cluster_data(request.cluster),
        batch=request.batch,
        microbatches=candidate.setting.microbatches,
        schedule=candidate.schedule,
        remat="full" if candidate.setting.remat else "none",
        tokens_per_sample=graph.tokens_per_sample,
        parameters=graph.parameter_count,
        model_flops=graph.model_flops,
        compute_dtype=compute_dtype(graph),
        stages=stages,
        layouts=winner.assembly.layouts,
        transfers=winner.assembly.transfers,
        tied=winner.assembly.tied,
        predicted=winner.predicted,
        search={
            "seconds": seconds,
            "trace_seconds": clock.trace,
            "ilp_seconds": clock.intra,
            "ilp_solves": clock.ilp_solves,
            "dp_seconds": clock.inter,
            "simulate_seconds": clock.simulate,
            "candidates": clock.candidates,
            "simulations": clock.simulations,
        },
        rivals=tuple(list(rivals.values())[:10]),
        notes=tuple(notes),
    )


def _why_nothing_fits(reasons: Sequence[str], judged: Sequence[_Judged], request: Request) -> str:
    limit = min(host.device.memory_bytes.value for host in request.cluster.hosts)
    if judged:
        least = min(j.predicted.peak_memory_bytes for j in judged)
        return (
            f"no plan fits: the leanest needs {bytes_text(least)} on a device of {bytes_text(limit)}; "
            f"use more devices, a smaller batch or a smaller model"
        )
    return f"no plan fits on {request.cluster.name}: {reasons[-1] if reasons else 'nothing was tried'}"
