"""Primitives that work dim by dim: elementwise operations and those that only move or repeat data."""

from collections.abc import Mapping, Sequence
from math import gcd, prod
from typing import Any

from meshwright.plan.graph import Rule, Tensor
from meshwright.plan.rules.base import Factors, replicated

ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt "
    "ceil clamp clz complex conj convert_element_type copy cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 "
    "expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p logistic "
    "lt lt_to mark_layer max min mul mulhi name ne neg nextafter not or polygamma population_count pow real "
    "reduce_precision regularized_incomplete_beta rem round rsqrt select_n sharding_constraint shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh threefry2x32 "
    "xor zeta "
).split()


def elementwise(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Dim d of every array is one factor; scalars and dims of size one have none."""
    factors = Factors(operands, results)
    for dim, size in enumerate(results[0].shape):
        places = [("out", o, dim) for o, t in enumerate(results) if t.shape == results[0].shape]
        places += [("in", i, dim) for i, t in enumerate(operands) if len(t.shape) > dim and t.shape[dim] == size]
        factors.tie(*places)
    return factors.rule()


def broadcast_in_dim(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    factors = Factors(operands, results)
    source = {out: dim for dim, out in enumerate(params["broadcast_dimensions"])}
    for out, size in enumerate(results[0].shape):
        dim = source.get(out)
        tied = dim is not None and operands[0].shape[dim] == size
        factors.tie(("out", 0, out), *([("in", 0, dim)] if tied and dim is not None else []))
    return factors.rule()


def transpose(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    factors = Factors(operands, results)
    for out, dim in enumerate(params["permutation"]):
        factors.tie(("in", 0, dim), ("out", 0, out))
    return factors.rule()


def squeeze(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    factors = Factors(operands, results)
    gone = {d % len(operands[0].shape) for d in params["dimensions"]}
    for out, dim in enumerate(d for d in range(len(operands[0].shape)) if d not in gone):
        factors.tie(("in", 0, dim), ("out", 0, out))
    return factors.rule()


def reshape(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Runs of dims with equal products belong together; in each run the major dims of both sides are one factor.

    (b, s, h*d) -> (b, s, h, d): the merged dim may be split as often as h divides.
    """
    factors = Factors(operands, results)
    for ins, outs in _runs(operands[0].shape, results[0].shape):
        major_in = next((d for d in ins if operands[0].shape[d] != 1), None)
        major_out = next((d for d in outs if results[0].shape[d] != 1), None)
        if major_in is None or major_out is None:
            continue
        size = gcd(operands[0].shape[major_in], results[0].shape[major_out])
        if size > 1:
            factors.tie(("in", 0, major_in), ("out", 0, major_out), size=size)
    return factors.rule()


def _runs(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The finest pairing of neighbouring dims whose products agree."""
    if 0 in before or prod(before) != prod(after):
        return []
    runs: list[tuple[list[int], list[int]]] = []
    i = o = 0
    while i < len(before) or o < len(after):
        ins, outs = [], []
        left = right = 1
        if i < len(before):
            ins, left, i = [i], before[i], i + 1
        if o < len(after):
            outs, right, o = [o], after[o], o + 1
        while left != right:
            if left < right:
                ins.append(i)
                left, i = left * before[i], i + 1
            else:
                outs.append(o)
                right, o = right * after[o], o + 1
        runs.append((ins, outs))
    return runs


def iota(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    factors = Factors(operands, results)
    for dim in range(len(results[0].shape)):
        factors.tie(("out", 0, dim))
    return factors.rule()


def untouched_dims(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """slice, pad, concatenate, rev, cumulative sums, sort …: dims along which nothing moves may be split."""
    rank = len(results[0].shape)
    touched: set[int] = set()
    for key in ("dimension", "axis"):
        if key in params:
            touched.add(int(params[key]) % max(rank, 1))
    touched.update(int(d) for d in params.get("dimensions", ()) or ())
    if "padding_config" in params:
        touched.update(d for d, (low, high, inner) in enumerate(params["padding_config"]) if low or high or inner)
    factors = Factors(operands, results)
    full = [t for t in (*operands, *results) if len(t.shape) == rank]
    for dim in range(rank):
        if dim in touched or len({t.shape[dim] for t in full}) != 1:
            continue
        places = [("in", i, dim) for i, t in enumerate(operands) if len(t.shape) == rank]
        places += [("out", o, dim) for o, t in enumerate(results) if len(t.shape) == rank]
        factors.tie(*places)
    return factors.rule()


def top_k(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Stays whole: to XLA's partitioner it is an opaque call, whose operand it gathers even where rows are split."""
    return replicated(operands, results)


def reduce(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """reduce_sum, reduce_max …: reduced dims are contracted."""
    return _reduce(params, operands, results, linear=False)


def reduce_sum(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    return _reduce(params, operands, results, linear=True)


def _reduce(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor], linear: bool) -> Rule:
    factors = Factors(operands, results)
    reduced = {d % len(operands[0].shape) for d in params["axes"]}
    out = 0
    for dim in range(len(operands[0].shape)):
        if dim in reduced:
            factors.tie(("in", 0, dim), contracted=True)
        else:
            factors.tie(("in", 0, dim), ("out", 0, out))
            out += 1
    return factors.rule(linear)


def kept_dims(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """argmax, argmin, a reduction by any function: what is searched or reduced stays whole; half the operands are
    initial values in the last case."""
    factors = Factors(operands, results)
    rank = len(operands[0].shape)
    reduced = params["axes"] if "axes" in params else params["dimensions"]
    for out, dim in enumerate(d for d in range(rank) if d not in reduced):
        places = [("in", i, dim) for i, t in enumerate(operands) if len(t.shape) == rank]
        factors.tie(*places, *(("out", o, out) for o in range(len(results))))
    return factors.rule()


def each_alone(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Result i is operand i, unchanged; the pairs have nothing to do with each other."""
    factors = Factors(operands, results)
    for array, tensor in enumerate(operands):
        for dim in range(len(tensor.shape)):
            factors.tie(("in", array, dim), ("out", array, dim))
    return factors.rule()


def tile(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Dims that are not repeated are free."""
    factors = Factors(operands, results)
    for dim, times in enumerate(params["reps"]):
        if times == 1:
            factors.tie(("in", 0, dim), ("out", 0, dim))
    return factors.rule()


def stack(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Arrays of one shape, side by side along a new dim."""
    factors = Factors(operands, results)
    for dim in range(len(operands[0].shape)):
        places = [("in", i, dim) for i in range(len(operands))]
        factors.tie(*places, ("out", 0, dim + (dim >= params["axis"])))
    return factors.rule()


def unstack(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """The other way round: a dim is taken apart, the others are free."""
    factors = Factors(operands, results)
    for dim in range(len(results[0].shape)):
        places = [("out", o, dim) for o in range(len(results))]
        factors.tie(*places, ("in", 0, dim + (dim >= params["axis"])))
    return factors.rule()
