"""Which optimizers treat each row of a stacked parameter by itself, so that its rows may live on several stages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshwright.plan.graph import UNSPLIT
from meshwright.plan.rules import rule_of
from meshwright.plan.trace.equations import tensor_of

# What these give depends on the place in the array, not on its entries alone: a row by itself would be taken for row 0.
_BY_PLACE = frozenset({"iota", "random_bits", "rng_bit_generator", "rng_uniform", "threefry2x32"})


@dataclass(frozen=True, slots=True)
class RowState:
    """An optimizer state that has one row for each row of parameter leaf ``leaf``, along ``dim``."""

    leaf: int
    dim: int


def row_states(
    update: Any, row_dims: Mapping[int, int], parameters: int, state_leaves: Sequence[frozenset[int]]
) -> dict[int, RowState] | None:
    """The states that go by rows; None if rows of some stack cannot be updated by themselves.

    Args:
        update: closed jaxpr from (gradients, states, weights) to (weights, states).
        row_dims: stacked parameter leaf -> the dim that counts its rows.
        parameters: how many leaves of parameters there are.
        state_leaves: for each state, the parameter leaves that it depends on.

    A row is free if no equation on its way mixes it with another: the rows are a factor (``meshwright.plan.rules``)
    that nothing contracts or moves.
    """
    if any(name in _BY_PLACE for name in _primitives(update.jaxpr)):
        return None
    operands, results = [tensor_of(a) for a in update.in_avals], [tensor_of(a) for a in update.out_avals]
    rule = rule_of("jit", {"jaxpr": update}, operands, results)
    used = {id(v) for eqn in update.jaxpr.eqns for v in eqn.invars}
    states = len(state_leaves)
    found: dict[int, RowState] = {}
    for leaf, dim in row_dims.items():
        factor = rule.results[leaf][dim]
        sources = [p for p in (leaf, parameters + states + leaf) if id(update.jaxpr.invars[p]) in used]
        if factor == UNSPLIT or any(rule.operands[p][dim] != factor for p in sources):
            return None
        for state, leaves in enumerate(state_leaves):
            if leaf in leaves:
                before, after = rule.operands[parameters + state], rule.results[parameters + state]
                places = [d for d, f in enumerate(after) if f == factor and before[d] == factor]
                if len(leaves) > 1 or len(places) != 1:
                    return None
                found[state] = RowState(leaf, places[0])
    return found


def _primitives(jaxpr: Any) -> Iterator[str]:
    """Names of all primitives of a program and of the programs in it."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _primitives(getattr(inner, "jaxpr", inner))
