"""Lower bounds that prune: closed forms, every chain tried, and the simulator's word."""

import numpy as np
import pytest

from meshwright.calibrate.hardware import parse_cluster
from meshwright.plan.bounds import least_seconds
from meshwright.plan.candidates import Priced
from meshwright.plan.request import Request
from meshwright.plan.search import Fix, search
from tests.plan.planned import BATCH, graph_of
from tests.plan.test_inter import even_table, every_chain, random_table


def test_layers_that_split_evenly_take_their_work_over_all_devices() -> None:
    """Eight layers of a second, four micro-batches, eight devices."""
    assert least_seconds(even_table(8, 8, 8, 0.5), 4) == pytest.approx(8 * 4 / 8)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_no_chain_of_stages_has_less_work(microbatches: int) -> None:
    for seed in range(6):
        table = random_table(np.random.default_rng(seed), 3, [1, 2, 4])
        work = [
            sum(
                float(table.devices[s.kind])
                * (microbatches * float(table.seconds[s.cell]) + float(table.once_seconds[s.cell]))
                for s in chain
            )
            / table.total_devices
            for chain in every_chain(table)
        ]
        assert least_seconds(table, microbatches) <= min(work) * (1 + 1e-12)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_no_plan_is_simulated_to_be_faster(microbatches: int) -> None:
    """On devices that do not share cores, whatever the schedule."""
    cluster = parse_cluster("dgx-h100:1")
    request = Request(cluster, BATCH, Fix(microbatches=microbatches, pipeline=2), schedules=("1f1b", "gpipe", "zb-h1"))
    _, table = Priced(graph_of(microbatches), microbatches, request).at(("none", 0.0))
    least = least_seconds(table, microbatches)
    plan = search(graph_of, request)
    assert least <= plan.predicted.iteration_seconds
    assert all(least <= rival.iteration_seconds for rival in plan.rivals)
