"""Parameters before they exist: a tree of ``Weight`` says every shape and how it starts."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from meshwright.models.base import PyTree


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter array to be: float32, drawn from a normal law (constant where ``std`` is 0)."""

    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0


def initialize(weights: PyTree, key: Any) -> PyTree:
    """Draw every weight of the tree; leaf number i uses ``fold_in(key, i)``, so the result depends on nothing else."""
    leaves, tree = jax.tree.flatten(weights)
    arrays = [_draw(weight, jax.random.fold_in(key, i)) for i, weight in enumerate(leaves)]
    return jax.tree.unflatten(tree, arrays)


def count(weights: PyTree) -> int:
    """Number of scalars in a tree of ``Weight``, arrays or ``ShapeDtypeStruct``."""
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(weights))


def _draw(weight: Weight, key: Any) -> jax.Array:
    if weight.std == 0.0:
        return jnp.full(weight.shape, weight.mean, jnp.float32)
    return weight.mean + weight.std * jax.random.normal(key, weight.shape, jnp.float32)
