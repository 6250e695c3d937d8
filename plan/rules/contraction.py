"""Matrix products, convolutions and windows."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from meshwright.plan.graph import Rule, Tensor
from meshwright.plan.rules.base import Factors


def dot_general(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """(b, i, k), (b, k, j) -> (b, i, j): batch, left and right dims, and k contracted."""
    (left_contract, right_contract), (left_batch, right_batch) = params["dimension_numbers"]
    factors = Factors(operands, results)
    for a, b in zip(left_contract, right_contract, strict=True):
        factors.tie(("in", 0, a), ("in", 1, b), contracted=True)
    out = 0
    for a, b in zip(left_batch, right_batch, strict=True):
        factors.tie(("in", 0, a), ("in", 1, b), ("out", 0, out))
        out += 1
    for array, used in ((0, {*left_contract, *left_batch}), (1, {*right_contract, *right_batch})):
        for dim in range(len(operands[array].shape)):
            if dim not in used:
                factors.tie(("in", array, dim), ("out", 0, out))
                out += 1
    return factors.rule()


def dot_general_flops(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> float:
    """Two per multiply-add: 2 · |result| · contracted size."""
    (left_contract, _), _ = params["dimension_numbers"]
    return float(2 * results[0].elements * prod(operands[0].shape[d] for d in left_contract))


def ragged_dot_general(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Rows in groups, each times a matrix of its own: (m, k), (g, k, j) -> (m, j), where the ragged m stays whole.

    In the gradient of the matrices the ragged dim is contracted, (m, k), (m, j) -> (g, k, j): it stays whole too.
    """
    numbers = params["ragged_dot_dimension_numbers"]
    (left_contract, right_contract), (left_batch, right_batch) = numbers.dot_dimension_numbers
    ragged, groups = set(numbers.lhs_ragged_dimensions), set(numbers.rhs_group_dimensions)
    factors = Factors(operands, results)
    out = 0 if groups else 1  # the groups come first where the right operand has none
    for a, b in zip(left_contract, right_contract, strict=True):
        if a not in ragged:
            factors.tie(("in", 0, a), ("in", 1, b), contracted=True)
    for a, b in zip(left_batch, right_batch, strict=True):
        if a not in ragged:
            factors.tie(("in", 0, a), ("in", 1, b), ("out", 0, out))
        out += 1
    for array, used in ((0, {*left_contract, *left_batch}), (1, {*right_contract, *right_batch, *groups})):
        for dim in range(len(operands[array].shape)):
            if dim in used:
                continue
            if array == 1 or dim not in ragged:
                factors.tie(("in", array, dim), ("out", 0, out))
            out += 1
    return factors.rule()


def ragged_dot_flops(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> float:
    """As of a product of the rows with one matrix: every row meets the matrix of its own group alone."""
    numbers = params["ragged_dot_dimension_numbers"]
    (_, right_contract), (_, right_batch) = numbers.dot_dimension_numbers
    apart = {*right_contract, *right_batch, *numbers.rhs_group_dimensions}
    free = prod(size for dim, size in enumerate(operands[1].shape) if dim not in apart)
    return float(2 * operands[0].elements * free)


def conv_general_dilated(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Batch and output channels are free, input channels contracted; spatial dims stay whole (no halo exchange).

    Grouped convolutions stay whole: XLA's partitioner exchanges data for every way to split them, even by the batch.
    """
    numbers = params["dimension_numbers"]
    lhs_batch, lhs_feature = numbers.lhs_spec[0], numbers.lhs_spec[1]
    rhs_out, rhs_in = numbers.rhs_spec[0], numbers.rhs_spec[1]
    out_batch, out_feature = numbers.out_spec[0], numbers.out_spec[1]
    factors = Factors(operands, results)
    if params["feature_group_count"] == 1 and params["batch_group_count"] == 1:
        factors.tie(("in", 0, lhs_batch), ("out", 0, out_batch))
        factors.tie(("in", 1, rhs_out), ("out", 0, out_feature))
        factors.tie(("in", 0, lhs_feature), ("in", 1, rhs_in), contracted=True)
    return factors.rule()


def conv_flops(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> float:
    """2 · |result| · window · input channels per group, without the zeros that an input dilation puts in.

    The gradient of a strided convolution is written with such a dilation.
    """
    numbers = params["dimension_numbers"]
    kernel = operands[1].shape
    window = prod(kernel[d] for d in numbers.rhs_spec[2:])
    by_results = 2.0 * results[0].elements * window * kernel[numbers.rhs_spec[1]]
    lhs_dilation = prod(params["lhs_dilation"] or (1,))
    return float(by_results / lhs_dilation)


def reduce_window(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Pooling forward and backward: dims with a window of one may be split."""
    window = params["window_dimensions"]
    factors = Factors(operands, results)
    for dim, size in enumerate(window):
        if size == 1 and len({t.shape[dim] for t in (*operands, *results) if len(t.shape) == len(window)}) == 1:
            places = [("in", i, dim) for i, t in enumerate(operands) if len(t.shape) == len(window)]
            factors.tie(*places, *(("out", o, dim) for o in range(len(results))))
    return factors.rule()
