"""An optimizer cut by owner gives exactly what it gives on the whole tree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meshwright.errors import PlanError
from meshwright.execute.optimizer import StagewiseOptimizer
from meshwright.plan.graph import Leaf, Tensor

TREE = {"a": jnp.ones((3, 2)), "b": jnp.arange(4.0), "c": [jnp.full((2, 3), 0.5), jnp.zeros(2)]}
OWNERS = {0: 0, 1: 0, 2: 1, 3: 1}  # in the order of the leaves: a, b, c[0], c[1]
NAMES = ("a", "b", "c[0]", "c[1]")

OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam on a schedule": optax.adam(optax.cosine_decay_schedule(0.1, 5)),
    "adamw with a mask": optax.adamw(0.1, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "lamb": optax.lamb(0.1),
    "clipped by value": optax.chain(optax.clip(0.3), optax.rmsprop(0.1)),
    "clipped by block": optax.chain(optax.clip_by_block_rms(0.3), optax.sgd(0.1)),
}


def cut(optimizer: optax.GradientTransformation, owners: dict[int, int] = OWNERS) -> StagewiseOptimizer:
    leaves, tree = jax.tree.flatten(TREE)
    described = [Leaf(name, Tensor(leaf.shape, str(leaf.dtype))) for name, leaf in zip(NAMES, leaves, strict=True)]
    return StagewiseOptimizer(optimizer, tree, described, owners)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stages_together_do_what_the_whole_does(name: str) -> None:
    optimizer = OPTIMIZERS[name]
    parts = cut(optimizer)
    weights, state = TREE, optimizer.init(TREE)
    mine = {stage: [jax.tree.leaves(TREE)[leaf] for leaf in parts.owned(stage)] for stage in (0, 1)}
    states = {stage: parts.init(stage, mine[stage]) for stage in (0, 1)}
    rng = np.random.default_rng(0)
    for _ in range(3):
        gradient: Any = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), TREE)
        changes, state = optimizer.update(gradient, state, weights)
        weights = optax.apply_updates(weights, changes)
        for stage in (0, 1):
            own = [jax.tree.leaves(gradient)[leaf] for leaf in parts.owned(stage)]
            mine[stage], states[stage] = parts.update(stage, own, states[stage], mine[stage])
            for leaf, found in zip(parts.owned(stage), mine[stage], strict=True):
                np.testing.assert_allclose(found, jax.tree.leaves(weights)[leaf], rtol=1e-6, atol=1e-7)
            for number, kept in zip(parts.states(stage), states[stage], strict=True):
                np.testing.assert_allclose(kept, jax.tree.leaves(state)[number], rtol=1e-6, atol=1e-7)


def test_moments_live_with_their_parameter_and_counts_everywhere() -> None:
    parts = cut(optax.adam(0.1))
    shapes = [state.shape for state in parts.state_shapes]
    counts = [i for i, shape in enumerate(shapes) if shape == ()]
    assert set(parts.states(0)) & set(parts.states(1)) == set(counts)
    assert set(parts.states(0)) | set(parts.states(1)) == set(range(len(shapes)))
    owner_of = [parts.parameter_of_state(i) for i in range(len(shapes))]
    assert owner_of == [None, 0, 1, 2, 3, 0, 1, 2, 3]  # the count, first moments, second moments


@pytest.mark.parametrize(
    "optimizer",
    [optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), optax.apply_if_finite(optax.sgd(0.1), 3)],
)
def test_an_update_that_couples_stages_is_refused_unless_one_stage_owns_all(
    optimizer: optax.GradientTransformation,
) -> None:
    with pytest.raises(PlanError, match=r"--fix pipeline=1") as refused:
        cut(optimizer)
    assert "\n" not in str(refused.value)
    assert cut(optimizer, dict.fromkeys(OWNERS, 0)).owned(0) == (0, 1, 2, 3)
