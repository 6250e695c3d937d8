"""Forward and backward of one layer as a single list of equations over shared values.

The planner shards this joint list, and the executor runs its two halves, so what was planned is what runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from meshwright.plan.graph import LayerGraph, Operator, Phase, Tensor
from meshwright.plan.rules import operator_flops, operator_kind, rule_of
from meshwright.plan.trace.equations import (
    CALLS,
    DIFFERENTIATION_CALLS,
    Atom,
    Equation,
    Listing,
    abstract,
    atom_tensor,
    evaluate,
    live_equations,
)
from meshwright.plan.trace.forward import Cut, as_value

# Results of these are made again in the backward pass, and their operand kept in their place: it is never larger.
_VIEWS = frozenset({"broadcast_in_dim", "reshape", "transpose", "squeeze", "copy", "copy_p", "stop_gradient"})


@dataclass(frozen=True, slots=True, eq=False)
class JointLayer:
    """The runnable side of a ``LayerGraph``: the same value numbers, with the equations themselves."""

    forward: tuple[Equation, ...]
    backward: tuple[Equation, ...]
    graph: LayerGraph


def join(cut: Cut, tensors: Sequence[Tensor], active: frozenset[int], differentiated: frozenset[int]) -> JointLayer:
    """Differentiate one layer.

    ``active``: values that a gradient can reach; ``differentiated``: those exits whose cotangent will be known (a
    later layer reads them, or they are the loss).
    """
    inputs = (*cut.parameters, *cut.entries, *cut.batch)
    wanted = [v for v in (*cut.parameters, *cut.entries) if v in active]
    through = [v for v in cut.exits if v in active and v in differentiated]
    others = [v for v in cut.exits if v not in through]
    given = [v for v in inputs if v not in wanted]

    def layer(wanted_values: Sequence[Any], given_values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        values = dict(zip((*wanted, *given), (*wanted_values, *given_values), strict=True))
        evaluate(cut.equations, values)
        return [values[v] for v in through], [values[v] for v in others]

    trees: list[Any] = []

    def with_residuals(wanted_values: Sequence[Any], given_values: Sequence[Any]) -> tuple[Any, Any, Any]:
        outs, pull_back, rest = jax.vjp(lambda w: layer(w, given_values), wanted_values, has_aux=True)
        residuals, tree = jax.tree.flatten(pull_back)
        trees.append(tree)
        return outs, rest, residuals

    wanted_shapes = [abstract(tensors[v]) for v in wanted]
    forward_jaxpr, shapes = jax.make_jaxpr(with_residuals, return_shape=True)(
        wanted_shapes, [abstract(tensors[v]) for v in given]
    )
    residual_shapes = shapes[2]

    def pull(residuals: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        return jax.tree.unflatten(trees[-1], residuals)(list(cotangents))[0]

    backward_jaxpr = jax.make_jaxpr(pull)(residual_shapes, [abstract(tensors[v]) for v in through])

    listing = Listing()
    numbers = {v: listing.new(tensors[v]) for v in (*wanted, *given)}
    calls = {**CALLS, **DIFFERENTIATION_CALLS}
    results = listing.append(forward_jaxpr, list(numbers.values()), calls)
    taken: set[int] = set(numbers.values())
    exit_numbers: dict[int, int] = {}
    for value, atom in zip((*through, *others), results[: len(cut.exits)], strict=True):
        exit_numbers[value] = as_value(listing, atom, taken)
        taken.add(exit_numbers[value])
    forward = listing.equations
    listing.equations = []
    cotangents = {v: listing.new(tensors[v]) for v in through}
    pulled = listing.append(backward_jaxpr, [*results[len(cut.exits) :], *cotangents.values()], calls)
    taken.update(cotangents.values())
    pulled_numbers: dict[int, int] = {}
    for value, atom in zip(wanted, pulled, strict=True):
        pulled_numbers[value] = as_value(listing, atom, taken)
        taken.add(pulled_numbers[value])
    backward = live_equations(listing.equations, pulled_numbers.values())
    backward = _remake_views(listing, forward, backward, frozenset(numbers[v] for v in (*cut.parameters,)))
    made_forward = {out for eqn in forward for out in eqn.outputs}
    residuals = sorted({v for eqn in backward for v in eqn.reads if v in made_forward})
    forward = live_equations(forward, [*exit_numbers.values(), *residuals])
    read_back = {v for eqn in backward for v in eqn.reads}

    def ids(values: Sequence[int], table: dict[int, int]) -> tuple[int, ...]:
        return tuple(table.get(v, -1) for v in values)

    return _renumber(
        forward,
        backward,
        listing.tensors,
        {
            "parameters": ids(cut.parameters, numbers),
            "batch": ids(cut.batch, numbers),
            "entries": ids(cut.entries, numbers),
            "exits": ids(cut.exits, exit_numbers),
            "entry_cotangents": ids(cut.entries, pulled_numbers),
            "exit_cotangents": ids(cut.exits, cotangents),
            "gradients": ids(cut.parameters, pulled_numbers),
            "residuals": tuple(residuals),
            "kept_entries": tuple(numbers[v] for v in cut.entries if numbers[v] in read_back),
        },
    )


def _remake_views(
    listing: Listing, forward: Sequence[Equation], backward: Sequence[Equation], parameters: frozenset[int]
) -> list[Equation]:
    """Repeat in the backward pass what only rearranges data or needs only parameters, instead of keeping it.

    So a weight, or its cast to a shorter dtype, is never held once per live micro-batch.
    """
    maker = {out: eqn for eqn in forward for out in eqn.outputs}
    from_parameters = set(parameters)
    for eqn in forward:
        if operator_kind(eqn.name, eqn.params) == "memory" and from_parameters.issuperset(eqn.reads):
            from_parameters.update(eqn.outputs)
    again: dict[int, int] = {}
    remade: list[Equation] = []

    def backward_name(value: int) -> int:
        eqn = maker.get(value)
        if eqn is None or not (value in from_parameters or eqn.name in _VIEWS):
            return value
        if value not in again:
            inputs = tuple(backward_name(x) if isinstance(x, int) else x for x in eqn.inputs)
            for out in eqn.outputs:
                again[out] = listing.new(listing.tensors[out])
            remade.append(Equation(eqn.primitive, eqn.params, inputs, tuple(again[out] for out in eqn.outputs)))
        return again[value]

    renamed = [
        Equation(
            eqn.primitive,
            eqn.params,
            tuple(backward_name(x) if isinstance(x, int) else x for x in eqn.inputs),
            eqn.outputs,
        )
        for eqn in backward
    ]
    return [*remade, *renamed]


def _renumber(
    forward: Sequence[Equation],
    backward: Sequence[Equation],
    tensors: Sequence[Tensor],
    roles: dict[str, tuple[int, ...]],
) -> JointLayer:
    """Number the values that are left from 0 in order of appearance, so that equal layers become identical."""
    order: dict[int, int] = {}
    for role in ("entries", "parameters", "batch"):
        for value in roles[role]:
            order.setdefault(value, len(order))
    seeds = [v for v in roles["exit_cotangents"] if v >= 0]

    def number(equations: Sequence[Equation]) -> tuple[Equation, ...]:
        renamed = []
        for eqn in equations:
            for value in (*eqn.reads, *eqn.outputs):
                order.setdefault(value, len(order))
            inputs: tuple[Atom, ...] = tuple(order[x] if isinstance(x, int) else x for x in eqn.inputs)
            renamed.append(Equation(eqn.primitive, eqn.params, inputs, tuple(order[v] for v in eqn.outputs)))
        return tuple(renamed)

    new_forward = number(forward)
    for value in seeds:
        order.setdefault(value, len(order))
    new_backward = number(backward)
    kept = [tensors[v] for v in order]
    named = {role: tuple(order.get(v, -1) for v in values) for role, values in roles.items()}
    operators = [operator_of(eqn, kept, "forward") for eqn in new_forward]
    operators += [operator_of(eqn, kept, "backward") for eqn in new_backward]
    graph = LayerGraph(tensors=tuple(kept), operators=tuple(operators), **named)
    return JointLayer(new_forward, new_backward, graph)


def operator_of(eqn: Equation, tensors: Sequence[Tensor], phase: Phase) -> Operator:
    """The planner's view of one equation; literal operands have no row in its rule."""
    operands = [atom_tensor(x, tensors) for x in eqn.inputs]
    results = [tensors[v] for v in eqn.outputs]
    rule = rule_of(eqn.name, eqn.params, operands, results)
    rows = tuple(row for row, x in zip(rule.operands, eqn.inputs, strict=True) if isinstance(x, int))
    rule = type(rule)(rows, rule.results, rule.sizes, rule.contracted, rule.linear, rule.known)
    flops = operator_flops(eqn.name, eqn.params, operands, results)
    return Operator(eqn.name, eqn.reads, eqn.outputs, rule, operator_kind(eqn.name, eqn.params), flops, phase)
