"""The table of rules: one line a primitive. What is not in it runs replicated and is reported by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.plan.graph import Kind, Rule, Tensor
from meshwright.plan.rules import contraction, elementwise, indexing
from meshwright.plan.rules.base import RuleMaker, replicated

RULES: Mapping[str, RuleMaker] = {
    **dict.fromkeys(elementwise.ELEMENTWISE, elementwise.elementwise),
    "broadcast_in_dim": elementwise.broadcast_in_dim,
    "reshape": elementwise.reshape,
    "transpose": elementwise.transpose,
    "squeeze": elementwise.squeeze,
    "iota": elementwise.iota,
    "slice": elementwise.untouched_dims,
    "pad": elementwise.untouched_dims,
    "concatenate": elementwise.untouched_dims,
    "rev": elementwise.untouched_dims,
    "cumsum": elementwise.untouched_dims,
    "cummax": elementwise.untouched_dims,
    "cumprod": elementwise.untouched_dims,
    "cumlogsumexp": elementwise.untouched_dims,
    "sort": elementwise.untouched_dims,
    "split": elementwise.untouched_dims,
    "top_k": elementwise.top_k,
    "reduce_sum": elementwise.reduce_sum,
    "reduce_max": elementwise.reduce,
    "reduce_min": elementwise.reduce,
    "reduce_and": elementwise.reduce,
    "reduce_or": elementwise.reduce,
    "argmax": elementwise.arg_reduce,
    "argmin": elementwise.arg_reduce,
    "dot_general": contraction.dot_general,
    "conv_general_dilated": contraction.conv_general_dilated,
    "reduce_window_max": contraction.reduce_window,
    "reduce_window_sum": contraction.reduce_window,
    "select_and_scatter_add": contraction.reduce_window,
    "select_and_gather_add": contraction.reduce_window,
    "gather": indexing.gather,
    "scatter-add": indexing.scatter_add,
    "scatter_add": indexing.scatter_add,
}

_KINDS: Mapping[str, Kind] = {"dot_general": "matmul", "conv_general_dilated": "conv"}
_FLOPS = {"dot_general": contraction.dot_general_flops, "conv_general_dilated": contraction.conv_flops}


def rule_of(name: str, params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """The factor rule of one application of primitive ``name``; replicated, and marked so, where there is none."""
    maker = RULES.get(name)
    return replicated(operands, results, known=False) if maker is None else maker(params, operands, results)


def operator_kind(name: str) -> Kind:
    return _KINDS.get(name, "memory")


def is_heavy(name: str) -> bool:
    return name in _KINDS


def operator_flops(
    name: str, params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]
) -> float:
    """FLOPs of the whole operator: two per multiply-add, one per element where nothing is multiplied and added."""
    count = _FLOPS.get(name)
    return float(sum(t.elements for t in results)) if count is None else count(params, operands, results)
