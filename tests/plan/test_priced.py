"""The list of collectives and the cost vector are two readings of one assignment."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.calibrate.hardware import parse_cluster
from meshwright.models.zoo import get_model
from meshwright.plan.graph import ModelGraph, Tensor
from meshwright.plan.intra import Weights, solve_layer
from meshwright.plan.priced import priced_collectives
from meshwright.plan.sharding import all_reduce, reshard
from meshwright.plan.space import BM, FM, OM, Memory, Space, build_space
from meshwright.plan.stages import logical_mesh
from meshwright.plan.trace.model import trace

_CLUSTER = parse_cluster("p3.16xlarge:1")
_MESHES = {sizes: logical_mesh(_CLUSTER, sizes) for sizes in ((8,), (2, 4))}
_SPECS = (
    "gpt:layers=1,hidden=64,heads=8,vocab=128,seq=32",
    "moe:layers=2,hidden=64,heads=8,vocab=128,seq=32,experts=8,group=64",
)


def _graph(spec: str) -> ModelGraph:
    return trace(get_model(spec), 16, 2).graph


@pytest.fixture(scope="module")
def spaces() -> list[Space]:
    return [
        build_space(layer, mesh, Memory())
        for spec in _SPECS
        for layer in _graph(spec).classes
        for mesh in _MESHES.values()
    ]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_seconds_of_the_list_add_up_to_the_cost_vector(spaces: list[Space], seed: int) -> None:
    """Whatever is chosen, the best or the silliest: nothing is charged that is not listed, nor the other way."""
    random = np.random.default_rng(seed)
    space = spaces[int(random.integers(len(spaces)))]
    choice = [int(random.integers(costs.shape[1])) for costs in space.node_costs]
    totals = dict.fromkeys(("forward", "backward", "once"), 0.0)
    for priced in priced_collectives(space, choice):
        totals[priced.phase] += priced.seconds
    costs = space.costs(choice)
    assert list(totals.values()) == pytest.approx([costs[FM], costs[BM], costs[OM]], rel=1e-9, abs=1e-15)


def test_a_bias_never_leads_the_activations_that_it_is_added_to() -> None:
    """Data parallelism of a transformer layer communicates nothing but its loss before the end of the iteration."""
    graph = trace(get_model("gpt:layers=1,hidden=1024,heads=16,vocab=512,seq=512"), 64, 2).graph
    layer = max(graph.classes, key=lambda g: len(g.operators))
    space = build_space(layer, _MESHES[8,], Memory(), [(0,)], ("data",))
    choice = solve_layer(space, Weights(microbatches=2)).choice(0, 0)
    kinds = {(p.kind, p.phase) for p in priced_collectives(space, choice) if p.elements > 1}
    assert kinds == {("all_reduce", "once")}


def test_an_axis_that_goes_is_a_gather_and_one_that_moves_an_all_to_all() -> None:
    """An 8 × 16 array on data 2 × tensor 4."""
    mesh, tensor = _MESHES[2, 4], Tensor((8, 16), "float32")

    def kinds(before: tuple[tuple[int, ...], ...], after: tuple[tuple[int, ...], ...]) -> list[tuple[str, float]]:
        return [(c.kind, c.elements) for c in reshard(tensor, before, after, mesh)]

    assert kinds(((0,), (1,)), ((0,), ())) == [("all_gather", 64.0)]
    assert kinds(((0,), (1,)), ((), ())) == [("all_gather", 32.0), ("all_gather", 128.0)]
    assert kinds(((1,), ()), ((), (1,))) == [("all_to_all", 32.0)]
    assert kinds(((), ()), ((0,), (1,))) == []
    assert [(c.kind, c.elements) for c in all_reduce(tensor, ((0,), ()), (1,), mesh)] == [("all_reduce", 64.0)]
    assert all_reduce(tensor, ((0,), ()), (), mesh) == ()
