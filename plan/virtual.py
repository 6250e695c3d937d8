"""Several stages a mesh: cuts and meshes for interleaved, looped-bfs and zb-v.

Stages that share a mesh share its time and memory, which couples stages that are no neighbours. No DP over the chain is
exact then, so all meshes are alike, and cuts are those that the stage DP finds for a line of as many stages with
v·B micro-batches: they make the largest stage small, exactly. What they are worth is then counted with the coupling:

    T = max over meshes p of  sum over stages q before p's first of (head_q + x_q)  +  B sum over p's stages of (t + x)

and the largest once-per-iteration time of a mesh, where head is t for interleaved and looped-bfs (their closed forms,
Narayanan et al., SC 2021, and Lamy-Poirier, MLSys 2023) and F for zb-v (Qi et al., NeurIPS 2024). Hops of looped-bfs
and zb-v run beside: the B-fold sum is over t or over x, whichever is more. Memory is what the schedule's rows hold.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from meshwright.errors import PlanError, ScheduleError
from meshwright.plan.inter import Stage, StagePlan, StageTable, best_stages
from meshwright.plan.schedule_rules import ScheduleRule
from meshwright.plan.stage_labels import FloatArray
from meshwright.simulate.schedules.base import FORWARD, INPUT, Ints, Options, Order


def virtual_stages(
    table: StageTable, microbatches: int, rule: ScheduleRule, keep: int = 1, cross_mesh: bool = True
) -> list[StagePlan]:
    """The best plans found with ``rule.chunks`` stages on each of equal meshes that fill the cluster, best first.

    Raises:
        PlanError: none fits, or the schedule's rule holds for no number of meshes; says why.
    """
    plans: list[StagePlan] = []
    reasons: list[str] = []
    for kind, devices in enumerate(table.devices.tolist()):
        meshes, left = divmod(table.total_devices, devices)
        if left or meshes < 2 or meshes * rule.chunks > table.layers:
            continue
        try:
            plans += _on_meshes(table, microbatches, rule, kind, meshes, keep, cross_mesh)
        except (PlanError, ScheduleError) as error:
            reasons.append(str(error))
    if not plans:
        why = reasons[-1] if reasons else f"no number of equal meshes has {rule.chunks} of {table.layers} layers each"
        raise PlanError(f"schedule {rule.text} finds no stages: {why}")
    return sorted(plans, key=lambda plan: (plan.surrogate_seconds, plan.stages))[:keep]


def _on_meshes(
    table: StageTable, microbatches: int, rule: ScheduleRule, kind: int, meshes: int, keep: int, cross_mesh: bool
) -> list[StagePlan]:
    """The plans on one kind of mesh: the quickest if they fit, else those whose stages share memory equally."""
    order = rule.schedule.make(meshes, microbatches, Options(chunks=rule.chunks))
    quick = _line(table, kind, meshes * rule.chunks)
    live = max(float(_live(row.kind, row.stage, [1.0] * order.stages).max()) for row in order.rows)
    lean = replace(
        quick,
        static_bytes=rule.chunks * quick.static_bytes + live * quick.saved_bytes,
        saved_bytes=np.zeros_like(quick.saved_bytes),
        memory_bytes=table.memory_bytes,
    )
    like = "1f1b" if _hops_wait(rule) else "gpipe"
    for line in (quick, lean):
        found = best_stages(line, rule.chunks * microbatches, like, keep, cross_mesh=cross_mesh, all_devices=True)
        plans = [_plan(table, plan.stages, kind, order, microbatches, rule, cross_mesh) for plan in found]
        fitting = [plan for plan in plans if max(plan.peak_bytes) <= table.memory_bytes]
        if fitting:
            return fitting
    raise PlanError(f"{rule.chunks} stages on each of {meshes} meshes do not fit in memory")


def _hops_wait(rule: ScheduleRule) -> bool:
    return rule.name == "interleaved"


def _line(table: StageTable, kind: int, stages: int) -> StageTable:
    """One kind of mesh, with devices for that many stages and no limit of memory."""
    one = slice(kind, kind + 1)
    return StageTable(
        seconds=table.seconds[:, :, one],
        once_seconds=table.once_seconds[:, :, one],
        static_bytes=table.static_bytes[:, :, one],
        saved_bytes=table.saved_bytes[:, :, one],
        transient_bytes=table.transient_bytes[:, :, one],
        hop_seconds=table.hop_seconds[:, :, one, :, one, :],
        devices=table.devices[one],
        memory_bytes=np.inf,
        devices_per_host=table.devices_per_host,
        total_devices=stages * int(table.devices[kind]),
    )


def _plan(
    table: StageTable,
    line: Sequence[Stage],
    kind: int,
    order: Order,
    microbatches: int,
    rule: ScheduleRule,
    cross_mesh: bool,
) -> StagePlan:
    """The stages of a line on their meshes, with the coupled surrogate and memory."""
    mesh_of, devices = order.mesh_of_stage, int(table.devices[kind])
    stages = tuple(replace(s, kind=kind, first_device=mesh_of[i] * devices) for i, s in enumerate(line))
    own = np.array([float(table.seconds[s.cell]) for s in stages])
    hops = np.array([_hop(table, *pair) if cross_mesh else 0.0 for pair in pairwise(stages)] + [0.0])
    head = own * [_head_share(table, s, rule) for s in stages] + hops
    once = np.array([float(table.once_seconds[s.cell]) for s in stages])
    totals, peaks, onces = [], [], []
    for mesh, row in enumerate(order.rows):
        mine = [i for i, home in enumerate(mesh_of) if home == mesh]
        work, moved = own[mine].sum(), hops[mine].sum()
        busy = work + moved if _hops_wait(rule) else max(work, moved)
        totals.append(head[: mine[0]].sum() + microbatches * busy)
        onces.append(once[mine].sum())
        saved = [float(table.saved_bytes[s.cell]) for s in stages]
        static = sum(float(table.static_bytes[stages[i].cell]) for i in mine)
        transient = max(float(table.transient_bytes[stages[i].cell]) for i in mine)
        peaks.append(static + float(_live(row.kind, row.stage, saved).max()) + transient)
    return StagePlan(stages, float(max(totals) + max(onces)), tuple(peaks[mesh] for mesh in mesh_of))


def _head_share(table: StageTable, stage: Stage, rule: ScheduleRule) -> float:
    """Part of a stage's seconds by which it holds back the meshes after it."""
    if not rule.splits_backward:
        return 1.0
    if table.forward_share is None:
        raise PlanError(f"schedule {rule.name} splits backwards, and the stage table does not say into what")
    return float(table.forward_share[stage.cell[:3]])


def _hop(table: StageTable, left: Stage, right: Stage) -> float:
    if left.first_device == right.first_device:
        return 0.0
    hosts = [stage.first_device // table.devices_per_host for stage in (left, right)]
    inside = hosts[0] == hosts[1]
    return float(table.hop_seconds[right.first_layer, int(not inside), left.kind, left.exit, right.kind, right.entry])


def _live(kinds: Ints, stages: Ints, saved: Sequence[float]) -> FloatArray:
    """What a mesh holds after each of its computations: a forward saves, the end of its backward frees."""
    sign = np.where(kinds == FORWARD, 1.0, np.where(kinds == INPUT, 0.0, -1.0))
    held: FloatArray = np.cumsum(sign * np.array(saved)[stages])
    return held
