"""A Llama decoder: pre-norm by root mean square, rotary positions, grouped queries, a gated feed-forward, no biases.

Sources: Touvron et al., "LLaMA" (arXiv 2302.13971), section 2.2, and "Llama 2" (arXiv 2307.09288), section 2.2 and
appendix A.1 (grouped queries at 70B); Su et al., "RoFormer" (arXiv 2104.09864), section 3.2.2, in the form that turns
the first half of a head against the second. Everything is spelled with ``jax.lax``, as in ``numerics``.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from meshwright.errors import ModelError
from meshwright.models import transformer as tf
from meshwright.models.base import Model, PyTree
from meshwright.models.gpt import check_heads, check_sizes, token_batch
from meshwright.models.numerics import cast, cross_entropy, plus, softmax, spread, times
from meshwright.models.parameters import Weight, initialize

_EPSILON = 1e-5  # added to the mean square
_BASE = 10000.0  # of the rotary wavelengths: RoFormer, section 3.2.2


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Sizes of a Llama; ``ffn`` is the width itself, and ``kv_heads`` of the ``heads`` have keys and values."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 32
    ffn: int = 11008
    seq: int = 2048
    vocab: int = 32000
    dtype: str = "f32"  # of activations and products; master weights are float32

    def __post_init__(self) -> None:
        check_sizes(self, "layers", "hidden", "heads", "kv_heads", "ffn", "seq", "vocab")
        check_heads(self.hidden, self.heads)
        if self.heads % self.kv_heads:
            fits = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise ModelError(f"heads={self.heads} do not share kv_heads={self.kv_heads} equally: use one of {fits}")
        if self.hidden // self.heads % 2:
            raise ModelError(f"rotary positions turn pairs, but hidden/heads={self.hidden // self.heads} is odd")


def weights(config: LlamaConfig) -> PyTree:
    """Every parameter's shape and start."""
    hidden, size = config.hidden, config.hidden // config.heads

    def kernel(*shape: int) -> Weight:
        return Weight(shape, tf.STD)

    layer = {
        "norm1": Weight((hidden,), mean=1.0),
        "query": kernel(hidden, config.kv_heads, config.heads // config.kv_heads, size),
        "key": kernel(hidden, config.kv_heads, size),
        "value": kernel(hidden, config.kv_heads, size),
        "out": kernel(config.kv_heads, config.heads // config.kv_heads, size, hidden),
        "norm2": Weight((hidden,), mean=1.0),
        "gate": kernel(hidden, config.ffn),
        "up": kernel(hidden, config.ffn),
        "down": kernel(config.ffn, hidden),
    }
    return {
        "tokens": kernel(config.vocab, hidden),
        "layers": [dict(layer) for _ in range(config.layers)],
        "final_norm": Weight((hidden,), mean=1.0),
        "head": kernel(config.vocab, hidden),
    }


def rms_norm(scale: Array, x: Array) -> Array:
    """Bring the last dim to root mean square 1, then scale it; statistics in float32, result in the dtype of x."""
    wide, others = cast(x, jnp.float32), tuple(range(x.ndim - 1))
    square = times(lax.reduce_sum(lax.mul(wide, wide), (x.ndim - 1,)), 1.0 / x.shape[-1])
    unit = lax.mul(wide, spread(lax.rsqrt(plus(square, _EPSILON)), wide, others))
    return cast(lax.mul(unit, spread(scale, wide, (x.ndim - 1,))), x.dtype)


def rotate(x: Array) -> Array:
    """Turn each pair (i, i + d/2) of the last dim by its token's angle; tokens are dim 1."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), _BASE ** (-np.arange(half) / half)).astype(np.float32)
    dims = (1, x.ndim - 1)
    cosine, sine = (spread(cast(jnp.asarray(f(angles)), x.dtype), x[..., :half], dims) for f in (np.cos, np.sin))
    left, right = lax.split(x, (half, half), axis=x.ndim - 1)
    turned = (
        lax.sub(lax.mul(left, cosine), lax.mul(right, sine)),
        lax.add(lax.mul(right, cosine), lax.mul(left, sine)),
    )
    return lax.concatenate(turned, x.ndim - 1)


def attention(weights: PyTree, x: Array) -> Array:
    """Causal self-attention in which g query heads share each of the k key and value heads; (b, s, h) to (b, s, h)."""

    def project(kernel: Array) -> Array:
        return lax.dot_general(x, cast(kernel, x.dtype), (((2,), (0,)), ((), ())))

    query = rotate(project(weights["query"]))  # (b, s, k, g, d)
    key, value = rotate(project(weights["key"])), project(weights["value"])  # (b, s, k, d)
    scaled = times(query, query.shape[-1] ** -0.5)
    scores = lax.dot_general(key, scaled, (((3,), (4,)), ((0, 2), (0, 2))))  # (b, k, t, s, g)
    shares = softmax(lax.transpose(scores, (0, 1, 4, 3, 2)), True)  # (b, k, g, s, t)
    mixed = lax.dot_general(shares, value, (((4,), (1,)), ((0, 1), (0, 2))))  # (b, k, g, s, d)
    return lax.dot_general(mixed, cast(weights["out"], x.dtype), (((1, 2, 4), (0, 1, 2)), ((), ())))


def feed_forward(weights: PyTree, x: Array) -> Array:
    """SwiGLU: down(silu(gate x) * up x). Source: Shazeer 2020 (arXiv 2002.05202), equation 6."""

    def product(y: Array, name: str) -> Array:
        return lax.dot_general(y, cast(weights[name], y.dtype), (((2,), (0,)), ((), ())))

    gate = product(x, "gate")
    return product(lax.mul(lax.mul(gate, lax.logistic(gate)), product(x, "up")), "down")


def logits(config: LlamaConfig, params: PyTree, tokens: Array) -> Array:
    """Scores of the next token, (b, s) to (b, s, v), in the compute dtype."""
    x = cast(tf.take_rows(params["tokens"], tokens), tf.DTYPES[config.dtype])
    for layer in params["layers"]:
        x = lax.add(x, attention(layer, rms_norm(layer["norm1"], x)))
        x = lax.add(x, feed_forward(layer, rms_norm(layer["norm2"], x)))
    x = rms_norm(params["final_norm"], x)
    return lax.dot_general(x, cast(params["head"], x.dtype), (((2,), (1,)), ((), ())))


def loss(config: LlamaConfig, params: PyTree, batch: PyTree) -> Array:
    """Mean over all tokens of the negative log likelihood, in nats."""
    return tf.mean(cross_entropy(logits(config, params, batch["tokens"]), batch["targets"]))


def build(config: LlamaConfig, name: str) -> Model:
    return Model(
        name=name,
        loss_fn=partial(loss, config),
        init_fn=partial(initialize, weights(config)),
        batch_fn=partial(token_batch, config.seq),
        tokens_per_sample=config.seq,
    )
