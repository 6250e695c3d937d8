"""The few non-linear functions of the zoo, each with its derivative written out.

Why by hand: a derivative chooses what the forward pass must keep. Left to themselves, softmax, layer norm and cross
entropy keep several float32 copies of their largest array; here each keeps one, in the dtype of its input, as the
activation counts of Korthikanti et al. (MLSys 2023, section 4.1) assume. Statistics are float32 throughout.

Everything is spelled with ``jax.lax``, so that tracing a deep model stays quick and the primitives stay few.
"""

from functools import partial
from math import pi, prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

EPSILON = 1e-5  # added to variances
_F32 = jnp.float32


def cast(x: Array, dtype: Any) -> Array:
    """``x`` in ``dtype``; no operation at all where it has that dtype already."""
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)


def times(x: Array, number: float) -> Array:
    """``x`` times a number, in the dtype of ``x``."""
    return lax.mul(x, x.dtype.type(number))


def plus(x: Array, number: float) -> Array:
    """``x`` plus a number, in the dtype of ``x``."""
    return lax.add(x, x.dtype.type(number))


def spread(x: Array, like: Array, dims: tuple[int, ...]) -> Array:
    """Broadcast ``x`` to the shape of ``like``; dim i of ``x`` becomes dim ``dims[i]``."""
    return lax.broadcast_in_dim(x, like.shape, dims)


def _others(x: Array, dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d for d in range(x.ndim) if d not in dims)


def _mean(x: Array, dims: tuple[int, ...]) -> Array:
    """Mean over ``dims``, with the shape of ``x`` again."""
    total = lax.reduce_sum(x, dims)
    return spread(times(total, 1.0 / prod(x.shape[d] for d in dims)), x, _others(x, dims))


# --- normalisation ------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: Array, scale: Array, bias: Array, dims: tuple[int, ...]) -> Array:
    """Bring ``x`` to mean 0 and variance 1 over ``dims``, then scale and shift.

    ``scale`` and ``bias`` align with the last dims of ``x``. Layer norm: ``dims`` is the last dim; batch norm: all
    but the last; group norm: an image whose channels were split in groups. Result in the dtype of ``x``.
    """
    return _normalize_forward(x, scale, bias, dims)[0]


def _normalize_forward(x: Array, scale: Array, bias: Array, dims: tuple[int, ...]) -> tuple[Array, Any]:
    wide = cast(x, _F32)
    centred = lax.sub(wide, _mean(wide, dims))
    variance = times(lax.reduce_sum(lax.mul(centred, centred), dims), 1.0 / prod(x.shape[d] for d in dims))
    inverse = lax.rsqrt(plus(variance, EPSILON))
    unit = lax.mul(centred, spread(inverse, wide, _others(x, dims)))
    tail = tuple(range(x.ndim - scale.ndim, x.ndim))
    y = lax.add(lax.mul(unit, spread(scale, wide, tail)), spread(bias, wide, tail))
    return cast(y, x.dtype), (cast(unit, x.dtype), inverse, scale)


def _normalize_backward(dims: tuple[int, ...], kept: Any, g: Array) -> tuple[Array, Array, Array]:
    unit, inverse, scale = kept
    wide, unit = cast(g, _F32), cast(unit, _F32)
    head = tuple(range(g.ndim - scale.ndim))
    d_bias = lax.reduce_sum(wide, head)
    d_scale = lax.reduce_sum(lax.mul(wide, unit), head)
    d_unit = lax.mul(wide, spread(scale, wide, tuple(range(g.ndim - scale.ndim, g.ndim))))
    along = lax.mul(unit, _mean(lax.mul(d_unit, unit), dims))
    d_x = lax.sub(lax.sub(d_unit, _mean(d_unit, dims)), along)
    d_x = lax.mul(d_x, spread(inverse, wide, _others(g, dims)))
    return cast(d_x, g.dtype), d_scale, d_bias


normalize.defvjp(_normalize_forward, _normalize_backward)


# --- activations --------------------------------------------------------------------------------------------------

_GELU_SLOPE = sqrt(2.0 / pi)
_GELU_CUBIC = 0.044715


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """GELU in the tanh form of GPT-2 (Hendrycks and Gimpel 2016, section 2); keeps only ``x``."""
    return _gelu_forward(x)[0]


def _gelu_tanh(x: Array) -> Array:
    inner = plus(times(lax.mul(x, x), _GELU_SLOPE * _GELU_CUBIC), _GELU_SLOPE)
    return lax.tanh(lax.mul(x, inner))


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    half = times(x, 0.5)
    return lax.add(half, lax.mul(half, _gelu_tanh(x))), x


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    t = _gelu_tanh(x)
    slope = plus(times(lax.mul(x, x), 3.0 * _GELU_SLOPE * _GELU_CUBIC), _GELU_SLOPE)
    bend = lax.mul(lax.mul(x, slope), plus(lax.neg(lax.mul(t, t)), 1.0))
    return (lax.mul(g, times(lax.add(plus(t, 1.0), bend), 0.5)),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def relu(x: Array) -> Array:
    """The larger of ``x`` and 0; keeps only its result, which the next operator keeps as well."""
    return _relu_forward(x)[0]


def _relu_forward(x: Array) -> tuple[Array, Array]:
    y = lax.max(x, x.dtype.type(0))
    return y, y


def _relu_backward(y: Array, g: Array) -> tuple[Array]:
    return (lax.select(lax.gt(y, y.dtype.type(0)), g, lax.full_like(g, 0.0)),)


relu.defvjp(_relu_forward, _relu_backward)


# --- softmax ------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(x: Array, causal: bool = False) -> Array:
    """Softmax over the last dim; ``causal`` gives weight 0 to keys (last dim) after the query (the dim before).

    Keeps its result alone: the backward of a masked entry is 0 because its weight is, so no mask is kept.
    """
    return _softmax_forward(x, causal)[0]


def _softmax_forward(x: Array, causal: bool) -> tuple[Array, Array]:
    wide, last = cast(x, _F32), x.ndim - 1
    others = tuple(range(last))
    if causal:
        queries_by_keys = x.shape[-2:]
        query = lax.broadcasted_iota(jnp.int32, queries_by_keys, 0)
        key = lax.broadcasted_iota(jnp.int32, queries_by_keys, 1)
        seen = spread(lax.ge(query, key), wide, (last - 1, last))
        wide = lax.select(seen, wide, lax.full_like(wide, -jnp.inf))
    powers = lax.exp(lax.sub(wide, spread(lax.reduce_max(wide, (last,)), wide, others)))
    y = cast(lax.div(powers, spread(lax.reduce_sum(powers, (last,)), wide, others)), x.dtype)
    return y, y


def _softmax_backward(causal: bool, y: Array, g: Array) -> tuple[Array]:
    wide, weights = cast(g, _F32), cast(y, _F32)
    weighted = lax.mul(wide, weights)
    total = lax.reduce_sum(weighted, (g.ndim - 1,))
    shared = lax.mul(weights, spread(total, wide, tuple(range(g.ndim - 1))))
    return (cast(lax.sub(weighted, shared), g.dtype),)


softmax.defvjp(_softmax_forward, _softmax_backward)


# --- cross entropy ------------------------------------------------------------------------------------------------


def one_hot(labels: Array, classes: int, dtype: Any) -> Array:
    """1 where the (new, last) class dim equals the label, else 0: compare with iota, so that every dim can be split."""
    shape = (*labels.shape, classes)
    each = lax.broadcast_in_dim(lax.iota(labels.dtype, classes), shape, (labels.ndim,))
    hit = lax.eq(each, lax.broadcast_in_dim(labels, shape, tuple(range(labels.ndim))))
    return lax.convert_element_type(hit, dtype)


@jax.custom_vjp
def cross_entropy(logits: Array, labels: Array) -> Array:
    """Minus the log probability (nats, float32) of each label; ``logits`` has one more dim, the classes, at its end.

    The label's logit is chosen by comparison and a sum, never by a gather, so the class dim may be split over
    devices: what they then exchange is one number a label. Keeps the logits and the log of the sum.
    """
    return _cross_entropy_forward(logits, labels)[0]


def _cross_entropy_forward(logits: Array, labels: Array) -> tuple[Array, Any]:
    wide, last = cast(logits, _F32), logits.ndim - 1
    top = lax.reduce_max(wide, (last,))
    powers = lax.exp(lax.sub(wide, spread(top, wide, tuple(range(last)))))
    log_sum = lax.add(lax.log(lax.reduce_sum(powers, (last,))), top)
    chosen = lax.reduce_sum(lax.mul(wide, one_hot(labels, logits.shape[-1], _F32)), (last,))
    return lax.sub(log_sum, chosen), (logits, labels, log_sum)


def _cross_entropy_backward(kept: Any, g: Array) -> tuple[Array, None]:
    logits, labels, log_sum = kept
    wide = cast(logits, _F32)
    others = tuple(range(logits.ndim - 1))
    share = lax.exp(lax.sub(wide, spread(log_sum, wide, others)))
    error = lax.sub(share, one_hot(labels, logits.shape[-1], _F32))
    return cast(lax.mul(error, spread(g, wide, others)), logits.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
