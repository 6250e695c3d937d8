"""The forward pass of a model as a flat list of equations, cut into layers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from meshwright.errors import ModelError
from meshwright.models.base import Model
from meshwright.plan.graph import Leaf, Tensor
from meshwright.plan.rules import is_heavy
from meshwright.plan.trace.borders import branch_borders
from meshwright.plan.trace.equations import (
    CALLS,
    Equation,
    Listing,
    Literal,
    atom_tensor,
    heavy_flops,
    live_equations,
    tensor_of,
)
from meshwright.plan.trace.parts import Part
from meshwright.plan.trace.scans import unroll_scans

Cutter = Callable[[np.ndarray, np.ndarray, Sequence[Any]], Sequence[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Forward:
    """The loss as equations over numbered values: first the parameters, then the batch, then what is computed.

    Parameter i is ``parts[i]`` of ``user_parameters``, the leaves of ``parameter_tree``.
    """

    tensors: tuple[Tensor, ...]
    equations: tuple[Equation, ...]
    parameters: tuple[Leaf, ...]
    batch: tuple[Leaf, ...]
    loss: int
    aux: tuple[int, ...]
    parts: tuple[Part, ...]
    user_parameters: tuple[Leaf, ...]
    parameter_tree: Any
    batch_tree: Any
    aux_tree: Any
    notes: tuple[str, ...]

    @property
    def parameter_values(self) -> range:
        return range(len(self.parameters))

    @property
    def batch_values(self) -> range:
        return range(len(self.parameters), len(self.parameters) + len(self.batch))


@dataclass(frozen=True, slots=True)
class Cut:
    """One layer of the forward pass: its equations and what it reads and gives, in order of first use."""

    equations: tuple[Equation, ...]
    parameters: tuple[int, ...]
    batch: tuple[int, ...]
    entries: tuple[int, ...]
    exits: tuple[int, ...]


def named_leaves(tree: Any) -> tuple[Leaf, ...]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return tuple(Leaf(jax.tree_util.keystr(path, simple=True, separator="."), tensor_of(leaf)) for path, leaf in pairs)


def trace_forward(model: Model, microbatch_size: int) -> Forward:
    """Trace ``model.loss_fn`` for one micro-batch; no array is allocated.

    Errors: ModelError if the loss cannot be traced or is not one floating-point number.
    """
    params = jax.eval_shape(model.init_fn, jax.random.key(0))
    batch = model.batch_fn(microbatch_size)
    try:
        closed, out_shape = jax.make_jaxpr(model.loss_fn, return_shape=True)(params, batch)
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ModelError(f"the loss of model {model.name!r} cannot be traced: {lines[0]}") from error
    loss_shape, aux_shape = out_shape if model.has_aux else (out_shape, ())
    if getattr(loss_shape, "shape", None) != ():
        hint = "" if model.has_aux else "; if it also returns auxiliary values, set has_aux=True"
        raise ModelError(f"the loss of model {model.name!r} is not one number{hint}")
    parameters, batch_leaves = named_leaves(params), named_leaves(batch)
    listing = Listing()
    inputs = [listing.new(leaf.tensor) for leaf in (*parameters, *batch_leaves)]
    unrolled = unroll_scans(listing, listing.append(closed, inputs, CALLS), parameters, len(batch_leaves))
    listing = unrolled.listing
    outputs = [as_value(listing, atom) for atom in unrolled.outputs]
    return Forward(
        tensors=tuple(listing.tensors),
        equations=tuple(live_equations(listing.equations, outputs)),
        parameters=unrolled.parameters,
        batch=batch_leaves,
        loss=outputs[0],
        aux=tuple(outputs[1:]),
        parts=unrolled.parts,
        user_parameters=parameters,
        parameter_tree=jax.tree.structure(params),
        batch_tree=jax.tree.structure(batch),
        aux_tree=jax.tree.structure(aux_shape),
        notes=unrolled.notes,
    )


def as_value(listing: Listing, atom: int | Literal, taken: frozenset[int] | set[int] = frozenset()) -> int:
    """``atom`` as a value that an equation writes: literals and values in ``taken`` are copied first."""
    if isinstance(atom, int) and atom not in taken:
        return atom
    tensor = atom_tensor(atom, listing.tensors)
    copy = jax.make_jaxpr(lambda x: jax.numpy.array(x, copy=True))(jax.ShapeDtypeStruct(tensor.shape, tensor.dtype))
    (result,) = listing.append(copy, [atom], CALLS)
    if not isinstance(result, int) or result == atom:
        raise AssertionError("a copy made no new value; please report this with the model")
    return result


def cut_into_layers(forward: Forward, cutter: Cutter) -> list[Cut]:
    """Cut the forward pass where ``cutter(flops, cut_bytes, signatures)`` says.

    Equations that read only parameters and constants (casts, masks) are repeated in every layer that uses them, so
    they never become traffic between layers. No layer spans the border of two branches (``borders``).
    """
    cheap = _cheap_equations(forward)
    chain = [eqn for eqn in forward.equations if id(eqn) not in cheap]
    from_batch = set(forward.batch_values)
    for eqn in chain:
        if from_batch.intersection(eqn.reads):
            from_batch.update(eqn.outputs)
    if forward.loss not in from_batch:
        raise ModelError("the loss does not depend on the batch; there is nothing to plan")
    leaves = len(forward.parameters) + len(forward.batch)
    maker = {out: eqn for eqn in forward.equations for out in eqn.outputs}

    last_use: dict[int, int] = {}
    writer = {out: index for index, eqn in enumerate(chain) for out in eqn.outputs}
    reads: list[set[int]] = []
    for index, eqn in enumerate(chain):
        values = _reads_through(eqn, cheap, maker)
        last_use.update(dict.fromkeys(values, index))
        reads.append({writer[value] for value in values if value in writer})
    cut_bytes = np.zeros(len(chain) + 1)
    for index, eqn in enumerate(chain):
        for out in eqn.outputs:
            if last_use.get(out, index) > index:
                cut_bytes[index + 1 : last_use[out] + 1] += forward.tensors[out].bytes
    flops = np.array([heavy_flops(eqn, forward.tensors) for eqn in chain])
    signatures = [_signature(eqn, forward.tensors) for eqn in chain]

    final = {forward.loss, *forward.aux}
    cuts: list[Cut] = []
    ends = [0, *branch_borders(reads, flops), len(chain)]
    spans = [
        (first + start, first + stop)
        for first, last in pairwise(ends)
        for start, stop in cutter(flops[first:last], cut_bytes[first : last + 1], signatures[first:last])
    ]
    for start, stop in spans:
        own = chain[start:stop]
        written = {out for eqn in own for out in eqn.outputs}
        body = sorted({id(e): e for eqn in own for e in _with_cheap(eqn, cheap, maker)}.values(), key=_birth)
        order: dict[int, None] = {}
        for eqn in body:
            order.update(dict.fromkeys(eqn.reads))
        made = {out for eqn in body for out in eqn.outputs}
        outside = [v for v in order if v not in made]
        exits = [v for v in sorted(written) if v in final or last_use.get(v, -1) >= stop]
        cuts.append(
            Cut(
                equations=tuple(body),
                parameters=tuple(v for v in outside if v < len(forward.parameters)),
                batch=tuple(v for v in outside if len(forward.parameters) <= v < leaves),
                entries=tuple(v for v in outside if v >= leaves),
                exits=tuple(exits),
            )
        )
    return cuts


def active_values(forward: Forward) -> frozenset[int]:
    """Values through which a gradient can reach a parameter."""
    active = {v for v in forward.parameter_values if _has_cotangent(forward.tensors[v])}
    for eqn in forward.equations:
        if eqn.name != "stop_gradient" and active.intersection(eqn.reads):
            active.update(out for out in eqn.outputs if _has_cotangent(forward.tensors[out]))
    return frozenset(active)


def _has_cotangent(tensor: Tensor) -> bool:
    return tensor.is_float or tensor.dtype.startswith("complex")


def _birth(eqn: Equation) -> int:
    return eqn.outputs[0] if eqn.outputs else -1


def _cheap_equations(forward: Forward) -> frozenset[int]:
    """Identities of the equations that need nothing but parameters and constants and cost next to nothing."""
    cheap_values = set(forward.parameter_values)
    final = {forward.loss, *forward.aux}
    cheap: set[int] = set()
    for eqn in forward.equations:
        if is_heavy(eqn.name, eqn.params) or final.intersection(eqn.outputs):
            continue
        if cheap_values.issuperset(eqn.reads):
            cheap.add(id(eqn))
            cheap_values.update(eqn.outputs)
    return frozenset(cheap)


def _with_cheap(eqn: Equation, cheap: frozenset[int], maker: Mapping[int, Equation]) -> Iterable[Equation]:
    yield eqn
    for value in eqn.reads:
        source = maker.get(value)
        if source is not None and id(source) in cheap:
            yield from _with_cheap(source, cheap, maker)


def _reads_through(eqn: Equation, cheap: frozenset[int], maker: Mapping[int, Equation]) -> set[int]:
    return {value for e in _with_cheap(eqn, cheap, maker) for value in e.reads}


def _signature(eqn: Equation, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return (
        eqn.name,
        tuple(atom_tensor(x, tensors).shape for x in eqn.inputs),
        tuple(tensors[v].shape for v in eqn.outputs),
    )
