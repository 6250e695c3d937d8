"""A ``lax.scan`` over stacked layers as those layers, one after the other, so that each can live on another stage.

A scan is unrolled if it reads parameters trip by trip and does a good part of the model's work. Its stacked parameters
become one parameter a layer (``Part``): no operator ever reads the whole stack. A stack that is also read in another
way cannot be taken apart, and its scan stays one operator, costed as its body times its trips.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
from jax import lax

from meshwright.plan.graph import Leaf, Tensor
from meshwright.plan.trace.equations import (
    CALLS,
    Atom,
    Equation,
    Listing,
    abstract,
    atom_tensor,
    heavy_flops,
    live_equations,
)
from meshwright.plan.trace.parts import Part

LEAST_SHARE = 1 / 16  # of the model's FLOPs; the trips of a smaller scan are not worth being layers
# These act on each row of a stack by itself; casts and layouts stand between a parameter and its scan.
_ROW_BY_ROW = frozenset({"convert_element_type", "copy", "copy_p", "reduce_precision", "transpose"})


@dataclass(frozen=True, slots=True)
class Unrolled:
    """A listing whose values are first the parts of parameters, then the batch leaves, then what is computed."""

    listing: Listing
    outputs: tuple[Atom, ...]
    parameters: tuple[Leaf, ...]
    parts: tuple[Part, ...]
    notes: tuple[str, ...]


def unroll_scans(listing: Listing, outputs: Sequence[Atom], parameters: Sequence[Leaf], batch: int) -> Unrolled:
    """Unroll the scans over stacked parameters.

    Args:
        listing: its first values are the ``parameters``, then ``batch`` leaves of the batch.
        outputs: what is wanted of it.
    """
    equations = live_equations(listing.equations, [x for x in outputs if isinstance(x, int)])
    final = {x for x in outputs if isinstance(x, int)}
    chosen, notes = _scans_to_unroll(equations, listing.tensors, final, parameters)
    if not chosen:
        whole = tuple(Part(leaf) for leaf in range(len(parameters)))
        return Unrolled(listing, tuple(outputs), tuple(parameters), whole, notes)
    stacked = {v: dim for v, dim in _row_dims(equations, chosen, final).items() if dim is not None}
    replay = _Replay(listing.tensors, {id(eqn) for eqn in chosen}, stacked)
    parts, leaves = replay.begin(parameters, batch)
    for eqn in equations:
        replay.add(eqn)
    return Unrolled(replay.listing, tuple(map(replay.renamed, outputs)), leaves, parts, notes)


def _scans_to_unroll(
    equations: Sequence[Equation], tensors: Sequence[Tensor], final: set[int], parameters: Sequence[Leaf]
) -> tuple[list[Equation], tuple[str, ...]]:
    """The scans whose stacked parameters can all be taken apart, and a note on each that might have been one."""
    flops = {id(eqn): heavy_flops(eqn, tensors) for eqn in equations}
    least = LEAST_SHARE * sum(flops.values())
    origin = _origins(equations, len(parameters))
    fixed = _made_of_parameters(equations, len(parameters))
    chosen = [
        eqn
        for eqn in equations
        if eqn.name == "scan"
        and eqn.params["length"] > 1
        and flops[id(eqn)] >= max(least, 1.0)
        and _stacks_layers(eqn, tensors, fixed)
    ]
    notes = []
    while True:
        dims = _row_dims(equations, chosen, final)
        kept = []
        for eqn in chosen:
            # One that is computed from parameters in another way than row by row would be needed whole by every layer.
            bad = [x for x in _scanned(eqn) if (dims[x] is None or origin.get(x) is None) and x in fixed]
            if not bad:
                kept.append(eqn)
                continue
            names = sorted({parameters[origin[x]].name for x in bad if x in origin})
            why = f"{', '.join(names)} is also read outside it" if names else "what it scans is computed before it"
            notes.append(
                f"a scan of {eqn.params['length']} trips is one operator and stays on one stage: {why}; "
                "let the scan alone read its stacked parameters, as they are"
            )
        if len(kept) == len(chosen):
            return chosen, tuple(notes)
        chosen = kept


def _stacks_layers(eqn: Equation, tensors: Sequence[Tensor], fixed: set[int]) -> bool:
    """Whether most of the parameters that a scan reads come trip by trip: in a loop over time they stay the same."""

    def size(values: Iterable[Atom]) -> int:
        return sum(tensors[x].bytes for x in values if isinstance(x, int) and x in fixed)

    return size(_scanned(eqn)) > size(eqn.inputs[: eqn.params["num_consts"]])


def _scanned(eqn: Equation) -> list[int]:
    """The values that a scan reads trip by trip."""
    first = eqn.params["num_consts"] + eqn.params["num_carry"]
    return [x for x in eqn.inputs[first:] if isinstance(x, int)]


def _origins(equations: Sequence[Equation], parameters: int) -> dict[int, int]:
    """Value -> the parameter of which it is made row by row."""
    origin = {leaf: leaf for leaf in range(parameters)}
    for eqn in equations:
        if eqn.name in _ROW_BY_ROW and eqn.inputs[0] in origin:
            origin[eqn.outputs[0]] = origin[eqn.inputs[0]]
    return origin


def _made_of_parameters(equations: Sequence[Equation], parameters: int) -> set[int]:
    """Values computed from parameters alone, and constants."""
    made = set(range(parameters))
    for eqn in equations:
        if eqn.reads and made.issuperset(eqn.reads):
            made.update(eqn.outputs)
    return made


def _row_dims(equations: Sequence[Equation], scans: Sequence[Equation], final: set[int]) -> dict[int, int | None]:
    """For each value that is read or given, the one dim along which the scans alone read it; None if there is none."""
    unrolled = {id(eqn) for eqn in scans}
    dims: dict[int, int | None] = dict.fromkeys(final)

    def wants(value: int, dim: int | None) -> None:
        dims[value] = dim if dims.setdefault(value, dim) == dim else None

    for eqn in reversed(equations):
        if id(eqn) in unrolled:
            first = eqn.params["num_consts"] + eqn.params["num_carry"]
            for position, x in enumerate(eqn.inputs):
                if isinstance(x, int):
                    wants(x, 0 if position >= first else None)
        elif eqn.name in _ROW_BY_ROW and eqn.reads:
            dim = dims[eqn.outputs[0]]
            wants(eqn.reads[0], eqn.params["permutation"][dim] if eqn.name == "transpose" and dim is not None else dim)
        else:
            for x in eqn.reads:
                wants(x, None)
    return dims


class _Replay:
    """Writes the equations anew: stacks as their rows, chosen scans as their trips."""

    def __init__(self, tensors: Sequence[Tensor], chosen: set[int], stacked: Mapping[int, int]) -> None:
        self.tensors, self.chosen, self.stacked = tensors, chosen, stacked
        self.listing = Listing()
        self.names: dict[int, Atom] = {}
        self.rows: dict[int, list[int]] = {}

    def begin(self, parameters: Sequence[Leaf], batch: int) -> tuple[tuple[Part, ...], tuple[Leaf, ...]]:
        parts, leaves = [], []
        for number, leaf in enumerate(parameters):
            if number not in self.stacked:
                self.names[number] = self.listing.new(leaf.tensor)
                parts.append(Part(number))
                leaves.append(leaf)
                continue
            dim, row = self.stacked[number], _row(leaf.tensor, self.stacked[number])
            self.rows[number] = [self.listing.new(row) for _ in range(leaf.tensor.shape[dim])]
            parts += [Part(number, i, dim) for i in range(leaf.tensor.shape[dim])]
            leaves += [Leaf(f"{leaf.name}[{i}]", row) for i in range(leaf.tensor.shape[dim])]
        for number in range(len(parameters), len(parameters) + batch):
            self.names[number] = self.listing.new(self.tensors[number])
        return tuple(parts), tuple(leaves)

    def renamed(self, atom: Atom) -> Atom:
        return self.names[atom] if isinstance(atom, int) else atom

    def add(self, eqn: Equation) -> None:
        if id(eqn) in self.chosen:
            self._unroll(eqn)
        elif eqn.reads and eqn.reads[0] in self.rows:
            self._each_row(eqn)
        else:
            outputs = tuple(self.listing.new(self.tensors[v]) for v in eqn.outputs)
            self.names.update(zip(eqn.outputs, outputs, strict=True))
            inputs = tuple(map(self.renamed, eqn.inputs))
            self.listing.equations.append(Equation(eqn.primitive, eqn.params, inputs, outputs))

    def _each_row(self, eqn: Equation) -> None:
        (out,) = eqn.outputs
        params = dict(eqn.params)
        if eqn.name == "transpose":
            at, gone = self.stacked[out], self.stacked[eqn.reads[0]]
            kept = [dim for place, dim in enumerate(params["permutation"]) if place != at]
            params["permutation"] = tuple(dim - (dim > gone) for dim in kept)
        self.rows[out] = []
        for row in self.rows[eqn.reads[0]]:
            result = self.listing.new(_row(self.tensors[out], self.stacked[out]))
            self.listing.equations.append(Equation(eqn.primitive, params, (row,), (result,)))
            self.rows[out].append(result)

    def _unroll(self, eqn: Equation) -> None:
        body, length = eqn.params["jaxpr"], int(eqn.params["length"])
        consts, carried = int(eqn.params["num_consts"]), int(eqn.params["num_carry"])
        fixed = [self.renamed(x) for x in eqn.inputs[:consts]]
        carry = [self.renamed(x) for x in eqn.inputs[consts : consts + carried]]
        # All before the first trip: a row's number would make its layer unlike the others.
        scanned = [list(self._rows_of(x, length)) for x in eqn.inputs[consts + carried :]]
        given: list[list[Atom]] = [[] for _ in range(length)]
        for trip in reversed(range(length)) if eqn.params["reverse"] else range(length):
            own = [rows[trip] for rows in scanned]
            results = self.listing.append(body, [*fixed, *carry, *own], CALLS)
            carry, given[trip] = results[:carried], results[carried:]
        self.names.update(zip(eqn.outputs[:carried], carry, strict=True))
        for position, out in enumerate(eqn.outputs[carried:]):
            stack = jax.make_jaxpr(lambda *rows: lax.concatenate([lax.expand_dims(r, (0,)) for r in rows], 0))
            shape = abstract(_row(self.tensors[out], 0))
            rows = [trip[position] for trip in given]
            (self.names[out],) = self.listing.append(stack(*[shape] * length), rows, CALLS)

    def _rows_of(self, atom: Atom, length: int) -> Iterator[Atom]:
        if isinstance(atom, int) and atom in self.rows:
            yield from self.rows[atom]
            return
        shape = abstract(atom_tensor(atom, self.tensors))
        for trip in range(length):
            row = jax.make_jaxpr(lambda x, trip=trip: lax.index_in_dim(x, trip, 0, keepdims=False))(shape)
            yield self.listing.append(row, [self.renamed(atom)], CALLS)[0]


def _row(tensor: Tensor, dim: int) -> Tensor:
    return Tensor((*tensor.shape[:dim], *tensor.shape[dim + 1 :]), tensor.dtype)
