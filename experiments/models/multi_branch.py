"""A trunk that forks into branches which join again: residual MLPs on features, fitted to a target.

The branches read the trunk and nothing of each other, so they can run side by side between one stage that forks and
one that joins. With ``after=0`` the join is little more than their mean.
Sources: Lee et al., "Why M heads are better than one" (2015), section 3 (a shared trunk, then branches, averaged);
Jeon et al., "GraphPipe", ASPLOS 2025 (models with branches as a test of pipelines that are graphs).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from meshwright.errors import ModelError
from meshwright.models import transformer as tf
from meshwright.models.base import Model, PyTree
from meshwright.models.gpt import check_sizes
from meshwright.models.numerics import cast, times
from meshwright.models.parameters import Weight, initialize


@dataclass(frozen=True, slots=True)
class MultiBranchConfig:
    """Sizes: ``trunk`` layers, then ``branches`` of ``layers`` each, then ``after`` layers, all of width ``hidden``."""

    branches: int = 3
    layers: int = 4
    trunk: int = 2
    after: int = 0
    hidden: int = 256
    features: int = 512
    targets: int = 16
    ffn: int = 4
    dtype: str = "f32"

    def __post_init__(self) -> None:
        check_sizes(self, "branches", "layers", "trunk", "hidden", "features", "targets", "ffn")
        if self.after < 0:
            raise ModelError(f"after={self.after} is not a number of layers; use 0 or more")


def weights(config: MultiBranchConfig) -> PyTree:
    """Every parameter's shape and start."""
    hidden = config.hidden

    def blocks(count: int) -> list[PyTree]:
        return [
            {"norm": tf.norm_weights(hidden), "mlp": tf.mlp_weights(hidden, config.ffn, count)} for _ in range(count)
        ]

    return {
        "entry": {"kernel": Weight((config.features, hidden), tf.STD), "bias": Weight((hidden,))},
        "trunk": blocks(config.trunk),
        "branches": [blocks(config.layers) for _ in range(config.branches)],
        "after": blocks(config.after),
        "final_norm": tf.norm_weights(hidden),
        "exit": {"kernel": Weight((hidden, config.targets), tf.STD), "bias": Weight((config.targets,))},
    }


def through(blocks: list[PyTree], x: Array) -> Array:
    """Residual MLPs one after the other."""
    for block in blocks:
        x = lax.add(x, tf.mlp(block["mlp"], tf.layer_norm(block["norm"], x)))
    return x


def answers(config: MultiBranchConfig, params: PyTree, features: Array) -> Array:
    """Features (b, features) to answers (b, targets), float32."""
    x = tf.dense(params["entry"], cast(features, tf.DTYPES[config.dtype]), (1,))
    x = through(params["trunk"], x)
    first, *others = [through(branch, x) for branch in params["branches"]]
    for branch in others:
        first = lax.add(first, branch)
    x = through(params["after"], times(first, 1.0 / config.branches))
    return cast(tf.dense(params["exit"], tf.layer_norm(params["final_norm"], x), (1,)), jnp.float32)


def loss(config: MultiBranchConfig, params: PyTree, batch: PyTree) -> Array:
    """Mean squared error of the answers."""
    error = lax.sub(answers(config, params, batch["features"]), batch["answers"])
    return tf.mean(lax.mul(error, error))


def feature_batch(config: MultiBranchConfig, batch_size: int) -> PyTree:
    """What a batch of features and their answers looks like."""

    def rows(width: int) -> Any:
        return jax.ShapeDtypeStruct((batch_size, width), jnp.float32)

    return {"features": rows(config.features), "answers": rows(config.targets)}


def build(config: MultiBranchConfig, name: str) -> Model:
    return Model(
        name=name,
        loss_fn=partial(loss, config),
        init_fn=partial(initialize, weights(config)),
        batch_fn=partial(feature_batch, config),
    )
