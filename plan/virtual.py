"""Several stages a mesh: cuts and meshes for interleaved, looped-bfs and zb-v.

Stages that share a mesh share its time and memory, which couples stages that are no neighbours. No DP over the chain is
exact then, so all meshes are alike, and cuts start as those that the stage DP finds for a line of as many stages with
v·B micro-batches, whose largest stage is small. Then cuts move, alone or two beside each other, as long as that helps
with the coupling counted:

    T = max over meshes p of  sum over stages q before p's first of (head_q + x_q)  +  B busy_p

and the largest once-per-iteration time of a mesh. Interleaved and looped-bfs go in rounds, in each of which all meshes
wait for the slowest: busy is the sum over rounds of the largest t + x (looped-bfs: t or x), and head is t. For equal
stages that is (vM + P - 1) t (Narayanan et al., SC 2021; Lamy-Poirier, MLSys 2023). zb-v mixes its two stages freely:
busy is the sum of a mesh's t, or of its x if that is more, and head is F; equal parts give 6Mt + (P - 1)t of Qi et al.,
NeurIPS 2024. Memory is what the schedule's rows hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from meshwright.errors import PlanError, ScheduleError
from meshwright.plan.inter import Stage, StagePlan, StageTable, best_stages
from meshwright.plan.schedule_rules import ScheduleRule
from meshwright.plan.stage_labels import FloatArray
from meshwright.simulate.schedules.base import FORWARD, INPUT, Ints, Options, Order, Row

_STARTS = 4  # plans of the line that are improved
_GAIN = 1e-9  # relative; less is rounding


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
            order = rule.schedule.make(meshes, microbatches, Options(chunks=rule.chunks))
            plans += _Folded(table, kind, order, microbatches, rule, cross_mesh).plans(_STARTS)
        except (PlanError, ScheduleError) as error:
            reasons.append(str(error))
    if not plans:
        why = reasons[-1] if reasons else f"no number of equal meshes has {rule.chunks} of {table.layers} layers each"
        raise PlanError(f"schedule {rule.text} finds no stages: {why}")
    distinct = {plan.stages: plan for plan in plans}
    return sorted(distinct.values(), key=lambda plan: (plan.surrogate_seconds, plan.stages))[:keep]


@dataclass(frozen=True)
class _Folded:
    """A line of stages on fewer meshes, all of one kind, under one schedule."""

    table: StageTable
    kind: int
    order: Order
    microbatches: int
    rule: ScheduleRule
    cross_mesh: bool

    @cached_property
    def mesh_of(self) -> Ints:
        """The mesh of each stage."""
        return np.array(self.order.mesh_of_stage, np.int32)

    @cached_property
    def crosses(self) -> Ints:
        """Of each hop: 0 inside a host, 1 between hosts."""
        host = self.mesh_of * int(self.table.devices[self.kind]) // self.table.devices_per_host
        return np.not_equal(host[1:], host[:-1]).astype(np.int32)

    def plans(self, starts: int) -> list[StagePlan]:
        """The plans that the line's best lead to: those of the quickest stages, else of the leanest.

        Errors: PlanError if none fits.
        """
        table = self.table
        quick = _line(table, self.kind, self.order.stages)
        live = max(float(_held(row, np.ones(self.order.stages)).max()) for row in self.order.rows)
        lean = replace(
            quick,
            static_bytes=self.rule.chunks * quick.static_bytes + live * quick.saved_bytes,
            saved_bytes=np.zeros_like(quick.saved_bytes),
            memory_bytes=table.memory_bytes,
        )
        like = "1f1b" if self._hops_wait else "gpipe"
        for line in (quick, lean):
            found = best_stages(
                line,
                self.rule.chunks * self.microbatches,
                like,
                starts,
                cross_mesh=self.cross_mesh,
                all_devices=True,
            )
            plans = [self.plan(self.improved(stages)) for stages in (plan.stages for plan in found)]
            plans += [self.plan(_Cuts.of(plan.stages)) for plan in found]
            fitting = [plan for plan in plans if max(plan.peak_bytes) <= table.memory_bytes]
            if fitting:
                return fitting
        raise PlanError(f"{self.rule.chunks} stages on each of {len(self.order.rows)} meshes do not fit in memory")

    def improved(self, stages: Sequence[Stage]) -> "_Cuts":
        """The cuts after moving them, one or two neighbours at a time, wherever that helps most; layouts stay."""
        cuts = _Cuts.of(stages)
        best = self.seconds(cuts)
        moves = [(i, width, step) for width in (1, 2) for i in range(1, len(stages) - width + 1) for step in (-1, 1)]
        while moves:
            tried = [(self.seconds(other), n) for n, m in enumerate(moves) if (other := cuts.moved(*m)) is not None]
            seconds, number = min(tried, default=(np.inf, 0))
            if seconds >= best * (1 - _GAIN):
                break
            moved = cuts.moved(*moves[number])
            assert moved is not None  # it was just tried
            best, cuts = seconds, moved
        return cuts

    def seconds(self, cuts: "_Cuts") -> float:
        """The surrogate of this module's docstring."""
        first, last = cuts.at[:-1], cuts.at[1:]
        cell = (first, last, self.kind, cuts.entry, cuts.leave)
        own = self.table.seconds[cell]
        hops = np.zeros(len(own))
        if self.cross_mesh:
            mesh = self.kind % self.table.meshes
            joints = (last[:-1], self.crosses, mesh, cuts.leave[:-1], mesh, cuts.entry[1:])
            hops[:-1] = np.where(self.mesh_of[1:] == self.mesh_of[:-1], 0.0, self.table.hop_seconds[joints])
        ahead = np.concatenate([[0.0], np.cumsum(own * self._head_shares(first, last) + hops)])
        # The first stage of mesh p is stage p, in rounds and in a V alike.
        total = (ahead[: len(self.order.rows)] + self.microbatches * self._busy(own, hops)).max()
        return float(total + np.bincount(self.mesh_of, self.table.once_seconds[cell]).max())

    def _busy(self, own: FloatArray, hops: FloatArray) -> FloatArray:
        """Seconds that one micro-batch costs each mesh, with what it waits for others in the same round."""
        if self.rule.splits_backward:
            return np.maximum(np.bincount(self.mesh_of, own), np.bincount(self.mesh_of, hops))
        rounds = (self.rule.chunks, len(self.order.rows))
        each = own + hops if self._hops_wait else np.maximum(own, hops)
        return np.full(rounds[1], each.reshape(rounds).max(axis=1).sum())

    def plan(self, cuts: "_Cuts") -> StagePlan:
        """The stages on their meshes, with the surrogate, and the peak of each stage's mesh."""
        table, devices = self.table, int(self.table.devices[self.kind])
        bounds = zip(cuts.at[:-1], cuts.at[1:], cuts.entry, cuts.leave, self.mesh_of, strict=True)
        stages = tuple(Stage(int(i), int(j), self.kind, int(a), int(b), int(m) * devices) for i, j, a, b, m in bounds)
        cell = (cuts.at[:-1], cuts.at[1:], self.kind, cuts.entry, cuts.leave)
        saved, static = table.saved_bytes[cell], np.bincount(self.mesh_of, table.static_bytes[cell])
        peaks = []
        for mesh, row in enumerate(self.order.rows):
            transient = table.transient_bytes[cell][self.mesh_of == mesh].max()
            peaks.append(float(static[mesh] + _held(row, saved).max() + transient))
        return StagePlan(stages, self.seconds(cuts), tuple(peaks[mesh] for mesh in self.mesh_of))

    @property
    def _hops_wait(self) -> bool:
        return self.rule.name == "interleaved"

    def _head_shares(self, first: Ints, last: Ints) -> FloatArray | float:
        """Part of a stage's seconds by which it holds back the meshes after it."""
        if not self.rule.splits_backward:
            return 1.0
        if self.table.forward_share is None:
            raise PlanError(f"schedule {self.rule.name} splits backwards, and the stage table does not say into what")
        share: FloatArray = self.table.forward_share[first, last, self.kind]
        return share


@dataclass(frozen=True)
class _Cuts:
    """Where a line of stages is cut (``at``, ends included), and the layouts on both sides of each stage."""

    at: Ints
    entry: Ints
    leave: Ints

    @staticmethod
    def of(stages: Sequence[Stage]) -> "_Cuts":
        at = [0, *(stage.last_layer for stage in stages)]
        return _Cuts(*(np.array(x, np.int32) for x in (at, [s.entry for s in stages], [s.exit for s in stages])))

    def moved(self, first: int, width: int, step: int) -> "_Cuts | None":
        """With ``width`` inner cuts from ``first`` on moved by ``step`` layers; None if a stage would be left empty."""
        at = self.at.copy()
        at[first : first + width] += step
        return replace(self, at=at) if (np.diff(at) > 0).all() else None


def _line(table: StageTable, kind: int, stages: int) -> StageTable:
    """One kind of mesh, with devices for that many stages and no limit of memory."""
    one = slice(kind, kind + 1)
    mesh = slice(kind % table.meshes, kind % table.meshes + 1)
    return StageTable(
        seconds=table.seconds[:, :, one],
        once_seconds=table.once_seconds[:, :, one],
        static_bytes=table.static_bytes[:, :, one],
        saved_bytes=table.saved_bytes[:, :, one],
        transient_bytes=table.transient_bytes[:, :, one],
        hop_seconds=table.hop_seconds[:, :, mesh, :, mesh, :],
        devices=table.devices[one],
        memory_bytes=np.inf,
        devices_per_host=table.devices_per_host,
        total_devices=stages * int(table.devices[kind]),
    )


def _held(row: Row, saved: FloatArray) -> FloatArray:
    """What a mesh holds after each of its computations: a forward saves, the end of its backward frees."""
    sign = np.where(row.kind == FORWARD, 1.0, np.where(row.kind == INPUT, 0.0, -1.0))
    held: FloatArray = np.cumsum(sign * saved[row.stage])
    return held
