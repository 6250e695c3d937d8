"""A GPT-2 decoder: pre-norm transformer layers, unrolled, with a next-token loss.

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3; the parameter
count is that of Narayanan et al., SC 2021, section 5, plus the last layer norm.
With ``dtype=f16`` the loss is not scaled: the time and memory are those of a float16 run, but small gradients
underflow. Train with bf16 or f32.
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
from meshwright.models.numerics import cast, cross_entropy
from meshwright.models.parameters import Weight, initialize


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """Sizes of a GPT. ``tied`` uses the token table as the output projection too."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    seq: int = 1024
    vocab: int = 51200
    ffn: int = 4  # width of the feed-forward over hidden
    tied: bool = True
    dtype: str = "f32"  # of activations and products; master weights are float32

    def __post_init__(self) -> None:
        check_sizes(self, "layers", "hidden", "heads", "seq", "vocab", "ffn")
        check_heads(self.hidden, self.heads)


def check_sizes(config: Any, *names: str) -> None:
    """Every named field is at least 1, or one line says which is not."""
    for name in names:
        if getattr(config, name) < 1:
            raise ModelError(f"{name}={getattr(config, name)} is not a size; give {name} as a whole number from 1 on")


def check_heads(hidden: int, heads: int) -> None:
    """The heads share the hidden dim equally."""
    if hidden % heads:
        fits = [n for n in range(1, hidden + 1) if hidden % n == 0]
        around = [max(n for n in fits if n < heads), *(n for n in fits if n > heads)][:2]
        raise ModelError(
            f"hidden={hidden} does not split over heads={heads}: use heads={' or heads='.join(map(str, around))}"
        )


def weights(config: GPTConfig) -> PyTree:
    """Every parameter's shape and start."""
    hidden = config.hidden
    tree = {
        "embedding": embedding_weights(config.vocab, config.seq, hidden),
        "layers": [
            {
                "norm1": tf.norm_weights(hidden),
                "attention": tf.attention_weights(hidden, config.heads, config.layers),
                "norm2": tf.norm_weights(hidden),
                "mlp": tf.mlp_weights(hidden, config.ffn, config.layers),
            }
            for _ in range(config.layers)
        ],
        "final_norm": tf.norm_weights(hidden),
    }
    return tree if config.tied else {**tree, "head": Weight((config.vocab, hidden), tf.STD)}


def embedding_weights(vocab: int, seq: int, hidden: int) -> PyTree:
    return {"tokens": Weight((vocab, hidden), tf.STD), "positions": Weight((seq, hidden), tf.STD)}


def logits(config: GPTConfig, params: PyTree, tokens: Array) -> Array:
    """Scores of the next token, (b, s) to (b, s, v), in the compute dtype."""
    x = tf.embed(params["embedding"], tokens, tf.DTYPES[config.dtype])
    for layer in params["layers"]:
        x = lax.add(x, tf.attention(layer["attention"], tf.layer_norm(layer["norm1"], x)))
        x = lax.add(x, tf.mlp(layer["mlp"], tf.layer_norm(layer["norm2"], x)))
    return head(params, x)


def head(params: PyTree, x: Array) -> Array:
    """Last norm and product with the head, or with the token table where the two are tied."""
    table = cast(params["head"] if "head" in params else params["embedding"]["tokens"], x.dtype)
    return lax.dot_general(tf.layer_norm(params["final_norm"], x), table, (((2,), (1,)), ((), ())))


def loss(config: GPTConfig, params: PyTree, batch: PyTree) -> Array:
    """Mean over all tokens of the negative log likelihood, in nats."""
    return tf.mean(cross_entropy(logits(config, params, batch["tokens"]), batch["targets"]))


def token_batch(seq: int, batch_size: int) -> PyTree:
    """What a batch of a language model looks like."""
    ids = jax.ShapeDtypeStruct((batch_size, seq), jnp.int32)
    return {"tokens": ids, "targets": ids}


def build(config: GPTConfig, name: str) -> Model:
    return Model(
        name=name,
        loss_fn=partial(loss, config),
        init_fn=partial(initialize, weights(config)),
        batch_fn=partial(token_batch, config.seq),
        tokens_per_sample=config.seq,
    )
