"""How one operator may run on a mesh: which mesh axes split which of its factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from meshwright.plan.graph import UNSPLIT, LayerGraph, Operator
from meshwright.plan.sharding import Axes, LogicalMesh, Spec


@dataclass(frozen=True, slots=True)
class OperatorSplit:
    """How one operator runs under one strategy of its node."""

    operands: tuple[Spec, ...]
    results: tuple[Spec, ...]
    contracted: Axes  # axes over which results are partial sums
    shards: int


def split_of(op: Operator, axes_of_factor: Mapping[int, Axes], mesh: LogicalMesh) -> OperatorSplit:
    """Apply an assignment of mesh axes to factors."""

    def spec(dims: Sequence[int]) -> Spec:
        return tuple(axes_of_factor.get(f, ()) if f != UNSPLIT else () for f in dims)

    used = {a for axes in axes_of_factor.values() for a in axes}
    contracted = tuple(sorted(a for f in op.rule.contracted for a in axes_of_factor.get(f, ())))
    return OperatorSplit(
        operands=tuple(spec(d) for d in op.rule.operands),
        results=tuple(spec(d) for d in op.rule.results),
        contracted=contracted,
        shards=mesh.size(tuple(sorted(used))),
    )


def enumerate_splits(
    op: Operator, mesh: LogicalMesh, roles: Sequence[str] = (), sample_factors: frozenset[int] = frozenset()
) -> tuple[OperatorSplit, ...]:
    """All ways to give the mesh axes to the factors worth splitting, each axis to one factor or to none.

    ``sample_factors`` are those that count samples: the only ones for an axis with role "data", none for "tensor". Who
    gives an axis a role wants it used: such an axis idles only where no factor of its role divides.
    """
    factors = _worth_splitting(op, mesh)
    active = [a for a, size in enumerate(mesh.sizes) if size > 1]
    options: list[list[int]] = []
    for axis in active:
        role = roles[axis] if roles else "any"
        mine = [f for f in factors if role == "any" or (role == "data") == (f in sample_factors)]
        divides = any(op.rule.sizes[f] % mesh.sizes[axis] == 0 for f in mine)
        options.append(mine if role != "any" and divides else [UNSPLIT, *mine])
    return _valid_splits(op, mesh, active, options) or _valid_splits(op, mesh, active, [[UNSPLIT, *o] for o in options])


def _valid_splits(
    op: Operator, mesh: LogicalMesh, active: Sequence[int], options: Sequence[Sequence[int]]
) -> tuple[OperatorSplit, ...]:
    """One split for each different assignment of axes to factors whose sizes they divide."""
    found: dict[tuple[tuple[int, Axes], ...], OperatorSplit] = {}
    for assignment in product(*options):
        axes_of_factor: dict[int, Axes] = {}
        for axis, factor in zip(active, assignment, strict=True):
            if factor != UNSPLIT:
                axes_of_factor[factor] = (*axes_of_factor.get(factor, ()), axis)
        if all(op.rule.sizes[f] % mesh.size(axes) == 0 for f, axes in axes_of_factor.items()):
            found.setdefault(tuple(sorted(axes_of_factor.items())), split_of(op, axes_of_factor, mesh))
    return tuple(found.values())


def _worth_splitting(op: Operator, mesh: LogicalMesh) -> list[int]:
    """One factor for each role (left, right, contracted, …), two for batch dims of a product.

    Factors of one role cost the same however they are split, so the first that divides stands for all; where it does
    not divide over the whole mesh, the next is offered too. A product whose batch dims take every axis needs no other.
    """
    roles: dict[tuple[tuple[int, ...], tuple[int, ...], bool], list[int]] = {}
    for factor in range(len(op.rule.sizes)):
        where_in = tuple(i for i, dims in enumerate(op.rule.operands) if factor in dims)
        where_out = tuple(i for i, dims in enumerate(op.rule.results) if factor in dims)
        roles.setdefault((where_in, where_out, factor in op.rule.contracted), []).append(factor)
    active = [size for size in mesh.sizes if size > 1]
    chosen: list[int] = []
    for (where_in, where_out, _), factors in roles.items():
        batch_of_product = op.heavy and len(where_in) == 2 and bool(where_out)
        wanted = 2 if batch_of_product else 1
        mine: list[int] = []
        for factor in factors:
            if any(op.rule.sizes[factor] % size == 0 for size in active):
                mine.append(factor)
                wanted -= op.rule.sizes[factor] % mesh.devices == 0
            if wanted == 0:
                break
        if batch_of_product and len(mine) == 2 and wanted == 0:
            return mine
        chosen += mine
    return chosen


def sample_dims(graph: LayerGraph) -> dict[int, int]:
    """Value -> the dim that counts samples, followed from the batch and the boundaries (dim 0 there)."""
    known = {v: 0 for v in (*graph.batch, *graph.entries, *graph.exit_cotangents) if v >= 0 and graph.tensors[v].shape}
    for op in graph.operators:
        factors = {dims[known[v]] for v, dims in zip(op.inputs, op.rule.operands, strict=True) if v in known}
        for out, dims in zip(op.outputs, op.rule.results, strict=True):
            found = [d for d, factor in enumerate(dims) if factor != UNSPLIT and factor in factors]
            if found:
                known[out] = found[0]
    return known
