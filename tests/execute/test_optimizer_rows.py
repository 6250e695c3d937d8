"""Which optimizers may update the rows of a stack one by one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meshwright.execute.optimizer import StagewiseOptimizer
from meshwright.plan.graph import Leaf, Tensor
from meshwright.plan.trace.parts import Part

ROWS = 3
TREE = {"plain": jnp.linspace(0, 1, 4), "stack": jnp.linspace(-1, 1, 2 * ROWS * 4).reshape(2, ROWS, 4)}
PARTS = (Part(0), *(Part(1, row, 1) for row in range(ROWS)))
OWNERS = {0: 0, 1: 0, 2: 0, 3: 1}

BY_ROWS: dict[str, optax.GradientTransformation] = {
    "sgd": optax.sgd(0.1),
    "adamw": optax.adamw(optax.linear_schedule(0.1, 0.01, 3)),
    "decay by rank": optax.adamw(0.1, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 2, tree)),
    "the clipping of each entry": optax.chain(optax.clip(0.3), optax.rmsprop(0.1)),
    "a frozen leaf": optax.multi_transform(
        {"train": optax.sgd(0.1), "keep": optax.set_to_zero()}, {"plain": "keep", "stack": "train"}
    ),
}
WHOLE: dict[str, optax.GradientTransformation] = {
    "lamb": optax.lamb(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "global norm": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
}


def cut(optimizer: optax.GradientTransformation, owners: dict[int, int]) -> StagewiseOptimizer:
    leaves, tree = jax.tree.flatten(TREE)
    described = [Leaf(n, Tensor(leaf.shape, str(leaf.dtype))) for n, leaf in zip(TREE, leaves, strict=True)]
    return StagewiseOptimizer(optimizer, tree, described, owners, PARTS)


def assert_like_the_whole(optimizer: optax.GradientTransformation, owners: dict[int, int]) -> None:
    """Three steps of every stage on its parts against three steps of the optimizer on the tree."""
    parts, stages = cut(optimizer, owners), sorted(set(owners.values()))
    weights: Any = TREE
    state = optimizer.init(TREE)
    mine = {s: [PARTS[p].of(jax.tree.leaves(TREE)) for p in parts.owned(s)] for s in stages}
    states = {s: parts.init(s, mine[s]) for s in stages}
    rng = np.random.default_rng(0)
    for _ in range(3):
        slope: Any = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), TREE)
        changes, state = optimizer.update(slope, state, weights)
        weights = optax.apply_updates(weights, changes)
        for s in stages:
            own = [PARTS[p].of(jax.tree.leaves(slope)) for p in parts.owned(s)]
            mine[s], states[s] = parts.update(s, own, states[s], mine[s])
            for p, found in zip(parts.owned(s), mine[s], strict=True):
                np.testing.assert_allclose(found, PARTS[p].of(jax.tree.leaves(weights)), rtol=1e-5, atol=1e-6)
            for number, kept in zip(parts.states(s), states[s], strict=True):
                assert kept.shape == parts.state_shapes[number].shape


@pytest.mark.parametrize("name", BY_ROWS)
def test_rows_on_two_stages_are_updated_as_the_stack_is(name: str) -> None:
    assert_like_the_whole(BY_ROWS[name], OWNERS)


@pytest.mark.parametrize("name", WHOLE)
def test_what_mixes_rows_is_refused_on_two_stages_and_right_on_one(name: str) -> None:
    with pytest.raises(ValueError, match=r"update of (plain|stack).* needs gradients that another stage owns"):
        cut(WHOLE[name], OWNERS)
    assert_like_the_whole(WHOLE[name], dict.fromkeys(OWNERS, 0))


def test_moments_of_a_row_lie_as_the_row_does() -> None:
    parts = cut(optax.adam(0.1), OWNERS)
    assert [parts.parameter_of_state(s) for s in parts.states(1)] == [None, 3, 3]  # the count and two moments
    assert [parts.state_shapes[s].shape for s in parts.states(1)] == [(), (2, 4), (2, 4)]
