"""Rematerialisation stage by stage: both tables in one, and plans that need a bit of each."""

from dataclasses import replace
from itertools import product

import msgspec
import numpy as np
import pytest

from meshwright.calibrate.quantity import Quantity
from meshwright.plan.inter import best_stages, peak_bytes, surrogate_seconds
from meshwright.plan.planfile import Plan
from meshwright.plan.policies import ManyWays, joined, recomputes
from meshwright.plan.search import Fix, Request, search
from meshwright.plan.space import Memory
from meshwright.plan.stages import Setting, StagePricer, mesh_kinds
from tests.plan.planned import BATCH, cpus, graph_of
from tests.plan.test_inter import every_chain, random_table
from tests.plan.test_schedule_rules import with_thirds


@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_the_joined_table_gives_the_best_policy_of_every_stage(microbatches: int) -> None:
    """Against every chain with every choice of policy; a third longer and half as much saved where it recomputes."""
    used = 0
    for seed in range(8):
        keeping = with_thirds(random_table(np.random.default_rng(seed), 3, [1, 2], memory_bytes=4.5e9))
        again = replace(keeping, seconds=keeping.seconds * 4 / 3, saved_bytes=keeping.saved_bytes / 2)
        both = joined([keeping, again], microbatches)
        best = np.inf
        for chain in every_chain(keeping):
            for kinds in product((0, 1), repeat=len(chain)):
                chosen = [replace(s, kind=s.kind + 2 * k) for s, k in zip(chain, kinds, strict=True)]
                tables = [keeping if k == 0 else again for k in kinds]
                seconds = [t.seconds[s.cell] for t, s in zip(tables, chain, strict=True)]
                if not np.isfinite(seconds).all() or max(peak_bytes(both, chosen, microbatches, "1f1b")) > 4.5e9:
                    continue
                whole = replace(both, seconds=np.concatenate([keeping.seconds, again.seconds], axis=2))
                best = min(best, surrogate_seconds(whole, chosen, microbatches, "1f1b"))
        if not np.isfinite(best):
            continue
        found = best_stages(both, microbatches, "1f1b")[0]
        assert found.surrogate_seconds == pytest.approx(best, rel=1e-9)
        used += any(s.kind >= 2 for s in found.stages)
    assert used, "memory was meant to be short somewhere"


def test_both_policies_price_as_each_of_them_does() -> None:
    cluster, graph = cpus(), graph_of(4)
    kinds = mesh_kinds(cluster)
    pricers = [StagePricer(Setting(graph, 4, remat, Memory()), kinds) for remat in (False, True)]
    both = ManyWays.of(*pricers)
    count = len(kinds)
    for kind in range(2 * count):
        assert both.cost(0, 3, kind, 0, 0) == pricers[kind // count].cost(0, 3, kind % count, 0, 0)
        assert recomputes(both, kind) == (kind >= count)
    assert [recomputes(pricer, 0) for pricer in pricers] == [False, True]
    assert both.stage_table(cluster).seconds.shape[2] == 2 * count


def tight(share: float) -> tuple[Plan, Plan, Plan]:
    """The best plans without, with mixed and with full rematerialisation where memory is that much short."""
    fix = Fix(pipeline=4, microbatches=8, schedule="1f1b")
    roomy = search(graph_of, Request(cpus(), BATCH, replace(fix, remat="none"), memory_margin=0.0))
    lean = search(graph_of, Request(cpus(), BATCH, replace(fix, remat="full"), memory_margin=0.0))
    peaks = [plan.predicted.peak_memory_bytes for plan in (roomy, lean)]
    limit = peaks[1] + share * (peaks[0] - peaks[1])
    host = cpus().hosts[0]
    device = msgspec.structs.replace(host.device, memory_bytes=Quantity(limit, "test"))
    short = msgspec.structs.replace(cpus(), hosts=(msgspec.structs.replace(host, device=device),))
    return roomy, search(graph_of, Request(short, BATCH, fix, memory_margin=0.0)), lean


def test_where_memory_is_a_little_short_only_some_stages_recompute() -> None:
    roomy, mixed, lean = tight(0.7)
    assert mixed.remat == "mixed"
    assert {stage.remat for stage in mixed.stages} == {"none", "full"}
    assert [mixed.recomputes(i) for i in range(4)] == [stage.remat == "full" for stage in mixed.stages]
    seconds = [plan.predicted.iteration_seconds for plan in (roomy, mixed, lean)]
    assert seconds == sorted(seconds)
    assert mixed.predicted.fits
