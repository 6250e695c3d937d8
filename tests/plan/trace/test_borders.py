"""Borders between branches: synthetic lists of equations, and real models with towers and with a trunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models.base import Model
from meshwright.models.zoo import get_model
from meshwright.plan.branches import Chain, Fork, decompose, layer_edges
from meshwright.plan.graph import ModelGraph
from meshwright.plan.trace.borders import branch_borders
from meshwright.plan.trace.model import trace


def parts_of(graph: ModelGraph) -> tuple[int | Fork, ...]:
    return decompose(len(graph.layers), layer_edges(graph)).parts


def test_a_chain_has_no_border() -> None:
    assert branch_borders([[], [0], [1], [2], [3]], np.ones(5)) == []


def test_skips_in_a_chain_are_no_branches() -> None:
    """x + f(x), twice: what stands before the sum is always read by it."""
    assert branch_borders([[], [0], [1], [0, 2], [3], [4], [3, 5], [6]], np.ones(8)) == []


def test_towers_begin_where_nothing_before_is_read() -> None:
    """0-1-2 and 3-4-5 are joined by 6; of 0-1, 2-3 and 4-5 the outer two are joined first."""
    assert branch_borders([[], [0], [1], [], [3], [4], [2, 5]], np.ones(7)) == [3, 6]
    assert branch_borders([[], [0], [], [2], [], [4], [1, 5], [3, 6]], np.ones(8)) == [2, 4, 6]


def test_a_trunk_ends_where_its_branches_begin_and_they_end_where_they_join() -> None:
    """Trunk 0-1, branches 2-3 and 4-5 and 6-7 of it, and 8-9 that join them."""
    reads = [[], [0], [1], [2], [1], [4], [1], [6], [3, 5, 7], [8]]
    assert branch_borders(reads, np.ones(10)) == [2, 4, 6, 8]


def test_a_join_of_no_weight_stays_with_the_last_branch() -> None:
    reads = [[], [0], [1], [2], [1], [4], [3, 5]]
    assert branch_borders(reads, np.array([1.0, 1, 1, 1, 1, 1, 0])) == [2, 4]


def test_products_side_by_side_are_no_branches() -> None:
    """Query, key and value of one layer; gate and up of the next."""
    reads = [[], [0], [0], [0], [1, 2], [3, 4], [5], [5], [6, 7], [8]]
    assert branch_borders(reads, np.ones(10)) == []


def test_labels_and_other_small_inputs_are_no_branch() -> None:
    flops = np.array([10.0, 10.0, 0.0, 10.0])
    assert branch_borders([[], [0], [], [1, 2]], flops) == []


def test_a_model_with_two_towers_is_cut_between_them() -> None:
    model = get_model("two-tower:layers=3,hidden=64,heads=2,seq=2,vocab=64,features=64")
    graph = trace(model, 8, 2).graph
    (fork, *joined) = parts_of(graph)
    assert isinstance(fork, Fork)
    assert [type(branch) for branch in fork.branches] == [Chain, Chain]
    assert joined == [len(graph.layers) - 1]


@pytest.mark.parametrize(("branches", "after"), [(2, 0), (3, 2)])
def test_a_model_that_forks_from_a_trunk_has_its_branches_side_by_side(branches: int, after: int) -> None:
    """Trunk, fork, join, in layers; the branches are equal, so all but the last share one class of layers."""
    spec = f"multi-branch:branches={branches},layers=2,trunk=2,after={after},hidden=32,features=32"
    graph = trace(get_model(spec), 8, 2).graph
    parts = parts_of(graph)
    forks = [part for part in parts if isinstance(part, Fork)]
    assert len(forks) == 1
    assert len(forks[0].branches) == branches
    place = parts.index(forks[0])
    assert parts[:place] == tuple(range(place))
    assert place >= 1
    assert len(parts) - place - 1 >= max(after, 1)
    layers = [range(*branch.layers) for branch in forks[0].branches]
    owners = [{graph.layers[layer].layer_class for layer in branch} for branch in layers]
    assert owners[0] == owners[-2] if branches > 2 else owners[0]


def test_a_trunk_with_two_heads_that_never_join_but_in_the_loss() -> None:
    """Written as a user writes it, with jax.numpy."""

    def loss(params: list[jax.Array], batch: jax.Array) -> jax.Array:
        x = batch
        for w in params[:2]:
            x = jnp.tanh(x @ w)
        left, right = x, x
        for w in params[2:5]:
            left = jnp.tanh(left @ w)
        for w in params[5:]:
            right = jax.nn.relu(right @ w)
        return jnp.mean(left**2) + jnp.mean(jnp.abs(right))

    shape = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    model = Model("heads", loss, lambda key: [jnp.zeros((16, 16))] * 8, lambda n: shape)
    graph = trace(model, 8, 1).graph
    (fork,) = [part for part in parts_of(graph) if isinstance(part, Fork)]
    assert len(fork.branches) == 2
