"""A two-tower model: a transformer reads a text, an MLP reads features, and their agreement is fitted to a rating.

The towers meet in one inner product alone, so they can run side by side: a graph whose stages are not a line.
Sources: Huang et al., CIKM 2013 (two towers that meet in a product); Jeon et al., "GraphPipe", ASPLOS 2025 (models
with branches as a test of pipelines that are graphs).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from meshwright.models import transformer as tf
from meshwright.models.base import Model, PyTree
from meshwright.models.gpt import check_heads, check_sizes, embedding_weights
from meshwright.models.numerics import cast, times
from meshwright.models.parameters import Weight, initialize


@dataclass(frozen=True, slots=True)
class TwoTowerConfig:
    """Sizes of the towers, which have ``layers`` layers of width ``hidden`` each."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    seq: int = 128
    vocab: int = 256
    features: int = 512
    ffn: int = 4
    dtype: str = "f32"

    def __post_init__(self) -> None:
        check_sizes(self, "layers", "hidden", "heads", "seq", "vocab", "features", "ffn")
        check_heads(self.hidden, self.heads)


def weights(config: TwoTowerConfig) -> PyTree:
    """Every parameter's shape and start."""
    hidden, layers = config.hidden, config.layers
    return {
        "text": {
            "embedding": embedding_weights(config.vocab, config.seq, hidden),
            "layers": [
                {
                    "norm1": tf.norm_weights(hidden),
                    "attention": tf.attention_weights(hidden, config.heads, layers),
                    "norm2": tf.norm_weights(hidden),
                    "mlp": tf.mlp_weights(hidden, config.ffn, layers),
                }
                for _ in range(layers)
            ],
            "final_norm": tf.norm_weights(hidden),
        },
        "features": {
            "entry": {"kernel": Weight((config.features, hidden), tf.STD), "bias": Weight((hidden,))},
            "layers": [
                {"norm": tf.norm_weights(hidden), "mlp": tf.mlp_weights(hidden, config.ffn, layers)}
                for _ in range(layers)
            ],
            "final_norm": tf.norm_weights(hidden),
        },
    }


def read_text(params: PyTree, tokens: Array, dtype: jnp.dtype) -> Array:
    """Tokens (b, s) to one vector a sample, (b, h): attention in both directions, then the mean over tokens."""
    x = tf.embed(params["embedding"], tokens, dtype)
    for layer in params["layers"]:
        x = lax.add(x, tf.attention(layer["attention"], tf.layer_norm(layer["norm1"], x), causal=False))
        x = lax.add(x, tf.mlp(layer["mlp"], tf.layer_norm(layer["norm2"], x)))
    return times(lax.reduce_sum(tf.layer_norm(params["final_norm"], x), (1,)), 1.0 / tokens.shape[1])


def read_features(params: PyTree, features: Array, dtype: jnp.dtype) -> Array:
    """Features (b, features) to one vector a sample, (b, h), by residual MLPs."""
    x = tf.dense(params["entry"], cast(features, dtype), (1,))
    for layer in params["layers"]:
        x = lax.add(x, tf.mlp(layer["mlp"], tf.layer_norm(layer["norm"], x)))
    return tf.layer_norm(params["final_norm"], x)


def ratings(config: TwoTowerConfig, params: PyTree, batch: PyTree) -> Array:
    """Mean product of the two vectors of each sample, (b,), float32."""
    dtype = tf.DTYPES[config.dtype]
    left = cast(read_text(params["text"], batch["tokens"], dtype), jnp.float32)
    right = cast(read_features(params["features"], batch["features"], dtype), jnp.float32)
    return times(lax.reduce_sum(lax.mul(left, right), (1,)), 1.0 / config.hidden)


def loss(config: TwoTowerConfig, params: PyTree, batch: PyTree) -> Array:
    """Mean squared error of the ratings."""
    error = lax.sub(ratings(config, params, batch), batch["ratings"])
    return tf.mean(lax.mul(error, error))


def pair_batch(config: TwoTowerConfig, batch_size: int) -> PyTree:
    """What a batch of texts, features and ratings looks like."""
    return {
        "tokens": jax.ShapeDtypeStruct((batch_size, config.seq), jnp.int32),
        "features": jax.ShapeDtypeStruct((batch_size, config.features), jnp.float32),
        "ratings": jax.ShapeDtypeStruct((batch_size,), jnp.float32),
    }


def build(config: TwoTowerConfig, name: str) -> Model:
    return Model(
        name=name,
        loss_fn=partial(loss, config),
        init_fn=partial(initialize, weights(config)),
        batch_fn=partial(pair_batch, config),
        tokens_per_sample=config.seq,
    )
