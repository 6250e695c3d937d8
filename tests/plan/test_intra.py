"""Sharding one layer: what the tables hold, and the two strategies that everybody knows, found in their bytes."""

from functools import cache
from itertools import product

import numpy as np
import pytest

from meshwright.calibrate.hardware import Device, Link, parse_cluster
from meshwright.calibrate.quantity import Quantity
from meshwright.models.zoo import get_model
from meshwright.plan.graph import LayerGraph, ModelGraph
from meshwright.plan.intra import LayerTable, Weights, problem_of, solve_layer
from meshwright.plan.sharding import LogicalMesh
from meshwright.plan.space import BC, BM, FC, FM, OC, OM, SAVED, STATIC, Memory, Space, build_space
from meshwright.plan.stages import MeshKind, Setting, StagePricer
from meshwright.plan.trace.model import trace

BATCH, SEQ, HIDDEN = 4, 16, 32
SPEC = f"gpt:layers=4,hidden={HIDDEN},heads=4,seq={SEQ},vocab=64"
RATE = 1e6  # bytes per second of every link: slow enough for communication to count


def device() -> Device:
    return parse_cluster("dgx-a100:1").device(0)


def mesh(*sizes: int, rate: float = RATE) -> LogicalMesh:
    """Links without latency, so that seconds times rate are bytes."""
    link = Link(bytes_per_second=Quantity(rate, "test"), latency_seconds=Quantity(0.0, "test"))
    return LogicalMesh(sizes, (link,) * len(sizes), device())


@cache
def model_graph() -> ModelGraph:
    return trace(get_model(SPEC), BATCH, 1).graph


def block() -> LayerGraph:
    """The class of the equal blocks in the middle."""
    graph = model_graph()
    return graph.classes[graph.layers[1].layer_class]


def solved(sizes: tuple[int, ...], roles: tuple[str, ...] = (), weights: Weights = Weights(4)) -> LayerTable:  # noqa: B008
    kind = MeshKind(mesh(*sizes), roles)
    return solve_layer(build_space(block(), kind.mesh, Memory(), kind.layouts, roles), weights)


@pytest.mark.parametrize("sizes", [(1,), (2,), (4,), (2, 2)])
@pytest.mark.parametrize(
    "weights",
    [Weights(1), Weights(8, remat=True, compute_slowdown=2.0), Weights(4, live=3, seconds_per_byte=1e-9)],
)
def test_the_costs_of_a_choice_are_what_was_minimised(sizes: tuple[int, ...], weights: Weights) -> None:
    table = solved(sizes, weights=weights)
    layouts = len(table.space.layouts)
    problem = problem_of(table.space, weights)
    for entry, leave in product(range(layouts), repeat=2):
        choice = table.choice(entry, leave)
        costs = table.space.costs(choice)
        np.testing.assert_array_equal(costs, table.costs[:, entry, leave])
        assert table.objective[entry, leave] == pytest.approx(float(weights.vector() @ costs), rel=1e-12)
        assert problem.seconds(choice) == pytest.approx(table.objective[entry, leave], rel=1e-9)
        assert (choice[table.space.entry_node], choice[table.space.exit_node]) == (entry, leave)


@pytest.mark.parametrize("sizes", [(2,), (2, 2)])
def test_elimination_and_the_ilp_find_the_same_optimum(sizes: tuple[int, ...]) -> None:
    kind = MeshKind(mesh(*sizes))
    space = build_space(block(), kind.mesh, Memory(), kind.layouts)
    weights = Weights(4, seconds_per_byte=1e-10)
    by_elimination, by_ilp = solve_layer(space, weights), solve_layer(space, weights, use_ilp=True)
    np.testing.assert_allclose(by_elimination.objective, by_ilp.objective, rtol=1e-9)
    assert by_ilp.ilp_solves == len(space.layouts) ** 2
    assert by_elimination.ilp_solves == 0


def test_random_assignments_are_never_better() -> None:
    table = solved((2, 2))
    space, weights = table.space, Weights(4).vector()
    rng = np.random.default_rng(0)
    for _ in range(300):
        choice = [int(rng.integers(costs.shape[1])) for costs in space.node_costs]
        entry, leave = choice[space.entry_node], choice[space.exit_node]
        assert float(weights @ space.costs(choice)) >= table.objective[entry, leave] * (1 - 1e-9)


def parameter_bytes(space: Space) -> int:
    return sum(space.graph.tensors[v].bytes for v in space.graph.parameters)


def test_data_parallelism_sums_the_gradients_once_and_sends_nothing_else() -> None:
    """A ring all-reduce of n ranks sends 2(n-1)/n of the parameters' bytes: Patarasuk and Yuan, 2009."""
    ranks = 4
    table = solved((ranks,), ("data",))
    assert table.objective.shape == (1, 1)
    costs = table.costs[:, 0, 0]
    alone = solved((1,)).costs[:, 0, 0]
    assert costs[FM] == costs[BM] == 0
    sent = 2 * (ranks - 1) / ranks * parameter_bytes(table.space)
    assert costs[OM] * RATE == pytest.approx(sent, rel=1e-9)
    assert costs[STATIC] == alone[STATIC]
    assert costs[SAVED] == pytest.approx(alone[SAVED] / ranks, rel=0.01)
    assert costs[OC] == alone[OC]
    assert alone[FC] / ranks <= costs[FC] < alone[FC]
    assert alone[BC] / ranks <= costs[BC] < alone[BC]


def test_tensor_parallelism_communicates_as_megatron_does() -> None:
    """Two all-reduces of b·s·h forward, two backward: Shoeybi et al., Megatron-LM, 2019, section 3.

    Found, not given: memory has a price, so the weights are split, and links are so slow that no value is split whose
    layout would have to change. All weights are halved but the few that meet b·s·h whole (norms, the last biases).
    """
    ranks, rate = 2, 1e9
    kind = MeshKind(mesh(ranks, rate=rate), ("tensor",))
    space = build_space(block(), kind.mesh, Memory(), kind.layouts, kind.roles)
    table = solve_layer(space, Weights(4, seconds_per_byte=1e-9))
    costs = table.costs[:, 0, 0]
    activation = 4 * BATCH * SEQ * HIDDEN
    all_reduce = 2 * (ranks - 1) / ranks * activation
    assert costs[FM] * rate == pytest.approx(2 * all_reduce, rel=1e-9)
    assert costs[BM] * rate == pytest.approx(2 * all_reduce, rel=1e-9)
    assert costs[OM] == 0
    whole = 6 * HIDDEN * 4  # two norms' scales and biases, two biases after all-reduces
    kept = 4 * (parameter_bytes(space) + whole) / ranks  # Adam: a parameter, its gradient and two moments
    assert costs[STATIC] == pytest.approx(kept, rel=1e-9)


def test_one_device_sends_nothing() -> None:
    costs = solved((1,)).costs[:, 0, 0]
    assert costs[FM] == costs[BM] == costs[OM] == 0
    assert (costs[[FC, BC, OC, STATIC, SAVED]] > 0).all()


def test_memory_that_costs_is_saved() -> None:
    free, dear = solved((4,)), solved((4,), weights=Weights(4, seconds_per_byte=1e-3))
    assert (dear.costs[STATIC] <= free.costs[STATIC]).all()
    assert dear.costs[STATIC].min() < free.costs[STATIC].max()
    assert (dear.costs[STATIC] >= parameter_bytes(dear.space) / 4).all()


@pytest.mark.parametrize("sizes", [(2,), (2, 2)])
def test_a_stage_costs_the_least_sum_over_the_layouts_between_its_layers(sizes: tuple[int, ...]) -> None:
    """Every row of layouts tried by hand, on a chain of four layers of three classes."""
    kind = MeshKind(mesh(*sizes))
    pricer = StagePricer(Setting(model_graph(), 1, False, Memory()), (kind,))
    layers = len(model_graph().layers)
    tables = [pricer.layer_table(use.layer_class, 0) for use in model_graph().layers]
    for entry, leave in product(range(len(kind.layouts)), repeat=2):
        cost = pricer.cost(0, layers, 0, entry, leave)
        total = (
            cost.forward_compute_seconds + cost.forward_communication_seconds + cost.backward_compute_seconds
            + cost.backward_communication_seconds + cost.once_compute_seconds + cost.once_communication_seconds
        )  # fmt: skip
        rows = product(range(len(kind.layouts)), repeat=layers - 1)
        least = min(
            sum(t.objective[a, b] for t, a, b in zip(tables, (entry, *row), (*row, leave), strict=True)) for row in rows
        )
        assert total == pytest.approx(least, rel=1e-9)
        assert (cost.layouts[0], cost.layouts[-1]) == (entry, leave)


def test_planned_as_one_layer_the_model_communicates_no_more() -> None:
    """Between layers a value is whole or split by its first dim; inside one it may take any spec besides."""
    kind = MeshKind(mesh(2))
    joined = trace(get_model(SPEC), BATCH, 1, cutter=lambda flops, *_: [(0, len(flops))]).graph
    apart = StagePricer(Setting(model_graph(), 1, False, Memory()), (kind,))
    whole = solve_layer(build_space(joined.classes[0], kind.mesh, Memory(), kind.layouts), Weights(1))
    for leave in range(len(kind.layouts)):
        cost = apart.cost(0, len(model_graph().layers), 0, 0, leave)
        seconds = cost.forward_communication_seconds + cost.backward_communication_seconds
        seconds += cost.once_communication_seconds
        assert whole.costs[[FM, BM, OM], 0, leave].sum() <= seconds * (1 + 1e-9)
