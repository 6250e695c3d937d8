"""The table of rules: one line a primitive. What is not in it runs replicated and is reported by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.plan.graph import Kind, Rule, Tensor
from meshwright.plan.rules import contraction, elementwise, indexing, rng
from meshwright.plan.rules.base import RuleMaker, replicated
from meshwright.plan.rules.bodies import BODIES, bodies, body_flops, body_rule, tensor_of

RULES: Mapping[str, RuleMaker] = {
    **dict.fromkeys(elementwise.ELEMENTWISE, elementwise.elementwise),
    "broadcast_in_dim": elementwise.broadcast_in_dim,
    "reshape": elementwise.reshape,
    "transpose": elementwise.transpose,
    "squeeze": elementwise.squeeze,
    "iota": elementwise.iota,
    "empty2": elementwise.iota,
    "slice": elementwise.untouched_dims,
    "pad": elementwise.untouched_dims,
    "concatenate": elementwise.untouched_dims,
    "rev": elementwise.untouched_dims,
    "cumsum": elementwise.untouched_dims,
    "cummax": elementwise.untouched_dims,
    "cummin": elementwise.untouched_dims,
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
    "reduce_prod": elementwise.reduce,
    "reduce_xor": elementwise.kept_dims,
    "reduce": elementwise.kept_dims,
    "argmax": elementwise.kept_dims,
    "argmin": elementwise.kept_dims,
    "optimization_barrier": elementwise.each_alone,
    "device_put": elementwise.each_alone,
    "tile": elementwise.tile,
    "stack": elementwise.stack,
    "unstack": elementwise.unstack,
    **dict.fromkeys(("random_seed", "random_split", "random_fold_in", "random_gamma"), rng.keys),
    **dict.fromkeys(("random_wrap", "random_unwrap", "random_clone"), rng.keys),
    "random_bits": rng.random_bits,
    "dot_general": contraction.dot_general,
    "conv_general_dilated": contraction.conv_general_dilated,
    "ragged_dot_general": contraction.ragged_dot_general,
    "reduce_window": contraction.reduce_window,
    "reduce_window_min": contraction.reduce_window,
    "select_and_scatter": contraction.reduce_window,
    "reduce_window_max": contraction.reduce_window,
    "reduce_window_sum": contraction.reduce_window,
    "select_and_scatter_add": contraction.reduce_window,
    "select_and_gather_add": contraction.reduce_window,
    "gather": indexing.gather,
    "scatter-add": indexing.scatter_add,
    "scatter-sub": indexing.scatter_add,
    **dict.fromkeys(("scatter", "scatter-max", "scatter-min", "scatter-mul"), indexing.scatter),
    "dynamic_slice": indexing.dynamic_slice,
    "dynamic_update_slice": indexing.dynamic_update_slice,
}

_KINDS: Mapping[str, Kind] = {"dot_general": "matmul", "ragged_dot_general": "matmul", "conv_general_dilated": "conv"}
_FLOPS = {
    "dot_general": contraction.dot_general_flops,
    "ragged_dot_general": contraction.ragged_dot_flops,
    "conv_general_dilated": contraction.conv_flops,
}

# Replicated on purpose, and still reported: how to split them is known, but nothing real is won, or nobody can tell.
_LINALG = "XLA calls a library on the whole array; batches of them are rare and small in training steps"
_COLLECTIVE = "the user's own collective, legal only inside shard_map, whose devices are not ours to plan"
WHOLE: Mapping[str, str] = {
    **dict.fromkeys("cholesky eig eigh hessenberg householder_product lu qr schur svd".split(), _LINALG),
    **dict.fromkeys("triangular_solve tridiagonal tridiagonal_solve custom_linear_solve".split(), _LINALG),
    **dict.fromkeys("all_gather all_to_all axis_index pmax pmin ppermute psum ragged_all_to_all".split(), _COLLECTIVE),
    **dict.fromkeys(("rng_bit_generator", "rng_uniform"), "one stateful stream: a part cannot be drawn by itself"),
    "fft": "XLA's partitioner gathers the operand of a real transform, even where only its batch is split",
    "approx_top_k": "as top_k: an opaque call to XLA's partitioner, which gathers its operand",
    **dict.fromkeys(("get", "swap"), "reads and writes a mutable reference in place, outside the dataflow we plan"),
    **dict.fromkeys(("after_all", "create_token"), "orders side effects; there is no array to split"),
    **dict.fromkeys(("custom_lin", "dce_sink", "stage"), "inside JAX's own transformations only"),
}


def rule_of(name: str, params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """The factor rule of one application of primitive ``name``; replicated, and marked so, where there is none."""
    if name in BODIES:
        return body_rule(name, params, operands, results, rule_of)
    maker = RULES.get(name)
    return replicated(operands, results, known=False) if maker is None else maker(params, operands, results)


def operator_kind(name: str, params: Mapping[str, Any]) -> Kind:
    """The cost model of one equation; what holds a body is of the heaviest kind in it."""
    if name in BODIES:
        kinds = {operator_kind(e.primitive.name, e.params) for jaxpr, _ in bodies(name, params) for e in jaxpr.eqns}
        return "matmul" if "matmul" in kinds else "conv" if "conv" in kinds else "memory"
    return _KINDS.get(name, "memory")


def is_heavy(name: str, params: Mapping[str, Any]) -> bool:
    return operator_kind(name, params) != "memory"


def operator_flops(
    name: str, params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]
) -> float:
    """FLOPs of the whole operator: two per multiply-add, one per element where nothing is multiplied and added.

    A loop counts its body times its trips (a ``while``, whose trips nobody knows, counts one), a ``cond`` its dearest
    branch; in them, too, only products count where there are any.
    """
    if name in BODIES:
        heavy = is_heavy(name, params)
        return body_flops(name, params, lambda eqn: _equation_flops(eqn, heavy))
    count = _FLOPS.get(name)
    return float(sum(t.elements for t in results)) if count is None else count(params, operands, results)


def _equation_flops(eqn: Any, heavy_only: bool) -> float:
    name, params = eqn.primitive.name, eqn.params
    if heavy_only and not is_heavy(name, params):
        return 0.0
    return operator_flops(name, params, [tensor_of(v) for v in eqn.invars], [tensor_of(v) for v in eqn.outvars])
