"""Random numbers: keys are small and go with their own dims; what is drawn from them is free."""

from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.plan.graph import Rule, Tensor
from meshwright.plan.rules.base import Factors


def keys(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Seed, split, fold in, wrap …: the dims that all arrays begin with count independent keys."""
    factors = Factors(operands, results)
    for dim in range(min(len(t.shape) for t in (*operands, *results))):
        if len({t.shape[dim] for t in (*operands, *results)}) == 1:
            places = [("in", i, dim) for i in range(len(operands))] + [("out", o, dim) for o in range(len(results))]
            factors.tie(*places)
    return factors.rule()


def random_bits(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Dims that are drawn are free, as those of an iota: each device counts from where its part begins.

    True of JAX's default, ``jax_threefry_partitionable``: a number depends on its key and its place alone.
    """
    factors = Factors(operands, results)
    for dim in range(len(results[0].shape)):
        factors.tie(("out", 0, dim), *([("in", 0, dim)] if dim < len(operands[0].shape) else []))
    return factors.rule()
