"""Ways to run a stage on the same mesh, recomputing or not and at several prices of memory: the stage DP chooses.

Each way has a table of its own, in which a layer's sharding is the best at one price of a byte. Joined, they are one
table whose kinds run over the ways: a stage's way is one more label of it, so that one stage may recompute, another
keep its activations in a leaner sharding, and a third be as quick as can be.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.calibrate.hardware import Cluster
from meshwright.plan.backward_split import flop_shares
from meshwright.plan.inter import StageTable
from meshwright.plan.stage_labels import BoolArray, FloatArray
from meshwright.plan.stages import StageCost, StagePricer

_COSTS = ("seconds", "once_seconds", "static_bytes", "saved_bytes", "transient_bytes")


@dataclass
class ManyWays(StagePricer):
    """Prices stages of several pricers for the same meshes: of K meshes, way w of mesh k is kind wK + k."""

    ways: tuple[StagePricer, ...] = ()

    @staticmethod
    def of(*ways: StagePricer) -> "ManyWays":
        """All of them, in this order."""
        first = ways[0]
        kinds = tuple(kind for way in ways for kind in way.kinds)
        return ManyWays(first.setting, kinds, first.use_ilp, first.spaces, ways=ways)

    def cost(self, first: int, last: int, kind: int, entry: int, leave: int) -> StageCost:
        """One stage in full."""
        way, mesh = divmod(kind, len(self.ways[0].kinds))
        return self.ways[way].cost(first, last, mesh, entry, leave)

    def stage_table(self, cluster: Cluster, max_layers: Sequence[int] | None = None) -> StageTable:
        """The input of the stage DP: all (i, j) on all meshes in all ways."""
        tables = [with_shares(way.stage_table(cluster, max_layers), way) for way in self.ways]
        return joined(tables, self.setting.microbatches)

    def recomputes(self, kind: int) -> bool:
        """Whether a stage of this kind recomputes its forward."""
        return self.ways[kind // len(self.ways[0].kinds)].setting.remat


def recomputes(pricer: StagePricer, kind: int) -> bool:
    """Whether a stage of this kind recomputes its forward."""
    return pricer.recomputes(kind) if isinstance(pricer, ManyWays) else pricer.setting.remat


def with_shares(table: StageTable, pricer: StagePricer) -> StageTable:
    """The table of one policy with the parts of its seconds that schedules with split backwards ask for."""
    forward, weight = flop_shares(pricer.setting.graph, pricer.setting.remat)
    shape = (*forward.shape, len(pricer.kinds))
    return replace(
        table,
        forward_share=np.broadcast_to(forward[..., None], shape),
        weight_share=np.broadcast_to(weight[..., None], shape),
    )


def joined(tables: Sequence[StageTable], microbatches: int) -> StageTable:
    """The tables of several ways as one. Where another way is no worse in anything that matters, a way is left out."""
    first = tables[0]

    def all_of(name: str) -> FloatArray:
        return np.concatenate([getattr(table, name) for table in tables], axis=2)

    kept = [table.seconds.copy() for table in tables]
    for mine, seconds in enumerate(kept):
        for other, table in enumerate(tables):
            if other != mine:
                seconds[_no_worse(table, tables[mine], microbatches, first=other < mine)] = np.inf
    return replace(
        first,
        seconds=np.concatenate(kept, axis=2),
        once_seconds=all_of("once_seconds"),
        static_bytes=all_of("static_bytes"),
        saved_bytes=all_of("saved_bytes"),
        transient_bytes=all_of("transient_bytes"),
        forward_share=all_of("forward_share"),
        weight_share=all_of("weight_share"),
        devices=np.tile(first.devices, len(tables)),
    )


def _no_worse(one: StageTable, other: StageTable, microbatches: int, *, first: bool) -> BoolArray:
    """Where a way costs no more than another in time, and in memory or fits with all micro-batches live.

    Of two that are alike in all of that the first stays.
    """
    fits = one.static_bytes + microbatches * one.saved_bytes + one.transient_bytes <= one.memory_bytes
    time = (one.seconds <= other.seconds) & (one.once_seconds <= other.once_seconds) & np.isfinite(one.seconds)
    memory = np.logical_and.reduce([getattr(one, name) <= getattr(other, name) for name in _COSTS[2:]])
    no_worse = time & (fits | memory)
    if first:
        return np.asarray(no_worse)
    fits_too = other.static_bytes + microbatches * other.saved_bytes + other.transient_bytes <= other.memory_bytes
    alike = np.logical_and.reduce([getattr(one, name) == getattr(other, name) for name in _COSTS[:2]])
    same_bytes = np.logical_and.reduce([getattr(one, name) == getattr(other, name) for name in _COSTS[2:]])
    return np.asarray(no_worse & ~(alike & ((fits & fits_too) | same_bytes)))
