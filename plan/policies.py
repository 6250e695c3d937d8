"""Rematerialisation stage by stage: the stage DP chooses between two tables, its policy one more label of a kind."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.calibrate.hardware import Cluster
from meshwright.plan.backward_split import flop_shares
from meshwright.plan.inter import StageTable
from meshwright.plan.stage_labels import FloatArray
from meshwright.plan.stages import StageCost, StagePricer


@dataclass
class BothPolicies(StagePricer):
    """Prices stages of two pricers that differ in their rematerialisation: kinds 0..K-1 keep, K..2K-1 recompute."""

    policies: tuple[StagePricer, ...] = ()

    @staticmethod
    def of(keeping: StagePricer, recomputing: StagePricer) -> "BothPolicies":
        """Both, on the same kinds of mesh."""
        kinds = (*keeping.kinds, *recomputing.kinds)
        return BothPolicies(keeping.setting, kinds, keeping.use_ilp, keeping.spaces, policies=(keeping, recomputing))

    def cost(self, first: int, last: int, kind: int, entry: int, leave: int) -> StageCost:
        """One stage in full."""
        policy, of_policy = divmod(kind, len(self.policies[0].kinds))
        return self.policies[policy].cost(first, last, of_policy, entry, leave)

    def stage_table(self, cluster: Cluster, max_layers: Sequence[int] | None = None) -> StageTable:
        """The input of the stage DP: all (i, j) on all kinds, under both policies."""
        keeping, recomputing = (with_shares(p.stage_table(cluster, max_layers), p) for p in self.policies)
        return joined(keeping, recomputing, self.setting.microbatches)

    def recomputes(self, kind: int) -> bool:
        """Whether a stage of this kind recomputes its forward."""
        return kind >= len(self.policies[0].kinds)


def recomputes(pricer: StagePricer, kind: int) -> bool:
    """Whether a stage of this kind recomputes its forward."""
    return pricer.recomputes(kind) if isinstance(pricer, BothPolicies) else pricer.setting.remat


def with_shares(table: StageTable, pricer: StagePricer) -> StageTable:
    """The table of one policy with the parts of its seconds that schedules with split backwards ask for."""
    forward, weight = flop_shares(pricer.setting.graph, pricer.setting.remat)
    shape = (*forward.shape, len(pricer.kinds))
    return replace(
        table,
        forward_share=np.broadcast_to(forward[..., None], shape),
        weight_share=np.broadcast_to(weight[..., None], shape),
    )


def joined(keeping: StageTable, recomputing: StageTable, microbatches: int) -> StageTable:
    """Both tables as one, the recomputing kinds last.

    A recomputing stage only saves memory, so it is left out where the same stage fits with all micro-batches live.
    """
    held = keeping.static_bytes + microbatches * keeping.saved_bytes + keeping.transient_bytes
    idle = np.isfinite(keeping.seconds) & (held <= keeping.memory_bytes)
    seconds = np.concatenate([keeping.seconds, np.where(idle, np.inf, recomputing.seconds)], axis=2)

    def both(name: str) -> FloatArray:
        return np.concatenate([getattr(keeping, name), getattr(recomputing, name)], axis=2)

    return replace(
        keeping,
        seconds=seconds,
        once_seconds=both("once_seconds"),
        static_bytes=both("static_bytes"),
        saved_bytes=both("saved_bytes"),
        transient_bytes=both("transient_bytes"),
        forward_share=both("forward_share"),
        weight_share=both("weight_share"),
        devices=np.tile(keeping.devices, 2),
    )
