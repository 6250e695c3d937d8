"""The parts that GPT, the GShard MoE and the two-tower model share, on plain dicts of arrays.

Shapes: b samples, s tokens, h hidden, n heads, d size of a head, f width of the feed-forward, v vocabulary.
Master weights are float32 and cast where they are used. The heads are a dim of their own, so that splitting them
never cuts through a reshape; query, key and value come from one product whose dim of size 3 is never worth splitting,
so their input gradient needs one all-reduce under tensor parallelism instead of three.
"""

from math import sqrt
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from meshwright.models.base import PyTree
from meshwright.models.numerics import cast, gelu, normalize, softmax, spread, times
from meshwright.models.parameters import Weight

STD = 0.02  # of every kernel and table at the start: Radford et al. 2018, section 4.1
DTYPES: dict[str, Any] = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}


def norm_weights(hidden: int) -> PyTree:
    return {"scale": Weight((hidden,), mean=1.0), "bias": Weight((hidden,))}


def attention_weights(hidden: int, heads: int, layers: int) -> PyTree:
    """Projections of one attention; ``layers`` damps what enters the residual stream (GPT-2, section 2.3)."""
    size = hidden // heads
    return {
        "qkv": {"kernel": Weight((hidden, 3, heads, size), STD), "bias": Weight((3, heads, size))},
        "out": {"kernel": Weight((heads, size, hidden), STD / sqrt(2 * layers)), "bias": Weight((hidden,))},
    }


def mlp_weights(hidden: int, ffn: int, layers: int) -> PyTree:
    return {
        "up": {"kernel": Weight((hidden, ffn * hidden), STD), "bias": Weight((ffn * hidden,))},
        "down": {"kernel": Weight((ffn * hidden, hidden), STD / sqrt(2 * layers)), "bias": Weight((hidden,))},
    }


def layer_norm(weights: PyTree, x: Array) -> Array:
    return normalize(x, weights["scale"], weights["bias"], (x.ndim - 1,))


def dense(weights: PyTree, x: Array, x_dims: tuple[int, ...]) -> Array:
    """Contract ``x_dims`` of x with the first dims of the kernel, add the bias; the other dims keep their order."""
    kernel, bias = cast(weights["kernel"], x.dtype), cast(weights["bias"], x.dtype)
    y = lax.dot_general(x, kernel, ((x_dims, tuple(range(len(x_dims)))), ((), ())))
    return lax.add(y, spread(bias, y, tuple(range(y.ndim - bias.ndim, y.ndim))))


def attention(weights: PyTree, x: Array, causal: bool = True) -> Array:
    """Multi-head self-attention, (b, s, h) to (b, s, h), without the residual."""
    qkv = dense(weights["qkv"], x, (2,))  # (b, s, 3, n, d)
    q, k, v = (lax.squeeze(part, (2,)) for part in lax.split(qkv, (1, 1, 1), axis=2))
    scores = lax.dot_general(times(q, q.shape[-1] ** -0.5), k, (((3,), (3,)), ((0, 2), (0, 2))))  # (b, n, q, k)
    mixed = lax.dot_general(softmax(scores, causal), v, (((3,), (1,)), ((0, 1), (0, 2))))  # (b, n, q, d)
    return dense(weights["out"], mixed, (1, 3))


def mlp(weights: PyTree, x: Array) -> Array:
    """Two products with GELU between them, on the last dim of ``x``; without the residual."""
    last = (x.ndim - 1,)
    return dense(weights["down"], gelu(dense(weights["up"], x, last)), last)


def take_rows(table: Array, rows: Array) -> Array:
    """Rows of a table as one gather on dim 0; a row number outside the table is clipped to it."""
    dims = lax.GatherDimensionNumbers(offset_dims=(rows.ndim,), collapsed_slice_dims=(0,), start_index_map=(0,))
    return lax.gather(table, lax.expand_dims(rows, (rows.ndim,)), dims, (1, table.shape[1]), mode="clip")


def embed(weights: PyTree, tokens: Array, dtype: Any) -> Array:
    """Token rows plus learned positions, (b, s) to (b, s, h); gathered in float32, so gradients add up in float32."""
    rows = take_rows(weights["tokens"], tokens)
    return cast(lax.add(rows, spread(weights["positions"], rows, (1, 2))), dtype)


def mean(x: Array) -> Array:
    """Mean of all entries, a scalar."""
    return times(lax.reduce_sum(x, tuple(range(x.ndim))), 1.0 / x.size)
