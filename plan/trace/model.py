"""A whole model as a chain of layers, equal layers traced and differentiated once."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from meshwright.errors import ModelError
from meshwright.models.base import Model
from meshwright.plan.graph import LayerUse, Leaf, ModelGraph
from meshwright.plan.layers import default_cuts
from meshwright.plan.trace.equations import Equation, Literal, literal_tensor
from meshwright.plan.trace.forward import Cut, Cutter, Forward, active_values, cut_into_layers, trace_forward
from meshwright.plan.trace.identity import function_text, functions_in
from meshwright.plan.trace.joint import JointLayer, join
from meshwright.plan.trace.parts import Part

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # JAX prints a jaxpr in colour where it thinks a terminal reads it


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """``graph`` is what the planner reads; ``classes`` are the equations that the executor runs, one per class.

    ``parts[i]`` says which part of the user's parameters parameter i of the graph is; ``parameter_tree`` and
    ``user_parameters`` are the user's own, before stacked layers were taken apart.
    """

    model: Model
    graph: ModelGraph
    classes: tuple[JointLayer, ...]
    parts: tuple[Part, ...]
    user_parameters: tuple[Leaf, ...]
    parameter_tree: Any
    batch_tree: Any
    aux_tree: Any


def trace(
    model: Model, batch: int, microbatches: int, cutter: Cutter = default_cuts, like: ModelGraph | None = None
) -> Trace:
    """Trace one micro-batch of ``batch / microbatches`` samples, forward and backward, on abstract values only.

    ``like`` is the graph of the same model at another micro-batch size: layers that were proved equal there, custom
    derivatives included, and whose forward pass is equal here too, are not differentiated one by one again.

    Errors: ModelError if the batch does not split or the loss cannot be traced.
    """
    if batch < 1 or microbatches < 1 or batch % microbatches:
        fits = [m for m in range(max(1, microbatches), 0, -1) if batch % m == 0][:1]
        raise ModelError(
            f"a batch of {batch} does not split into {microbatches} micro-batches; use {fits[0] if fits else 1}"
        )
    if microbatches > 1 and not model.microbatchable:
        raise ModelError(f"model {model.name!r} mixes its samples, so it cannot be micro-batched; use 1 micro-batch")
    forward = trace_forward(model, batch // microbatches)
    cuts = cut_into_layers(forward, cutter)
    active = active_values(forward)
    if forward.loss not in active:
        raise ModelError(f"the loss of model {model.name!r} does not depend on its parameters")
    read_later = {v for cut in cuts for v in cut.entries} | {forward.loss}

    classes: list[JointLayer] = []
    by_text: dict[str, int] = {}  # the forward text of a layer -> its class, where that text says all
    by_joint: dict[str, int] = {}
    owners = []
    proved = [use.layer_class for use in like.layers] if like is not None and len(like.layers) == len(cuts) else None
    for index, cut in enumerate(cuts):
        text, complete = _cut_text(cut, forward, active, read_later)
        if not complete and proved is not None:
            text, complete = f"{text}\nclass {proved[index]}", True
        known = by_text.get(text) if complete else None
        if known is None:
            joint = join(cut, forward.tensors, active, frozenset(read_later))
            known = by_joint.setdefault(_joint_text(joint), len(classes))
            if known == len(classes):
                classes.append(joint)
            by_text[text] = known
        owners.append(known)

    graph = _model_graph(model, forward, cuts, owners, classes, batch, microbatches)
    return Trace(
        model=model,
        graph=graph,
        classes=tuple(classes),
        parts=forward.parts,
        user_parameters=forward.user_parameters,
        parameter_tree=forward.parameter_tree,
        batch_tree=forward.batch_tree,
        aux_tree=forward.aux_tree,
    )


def _model_graph(
    model: Model,
    forward: Forward,
    cuts: list[Cut],
    owners: list[int],
    classes: list[JointLayer],
    batch: int,
    microbatches: int,
) -> ModelGraph:
    crossing = sorted({v for cut in cuts for v in cut.exits})
    number = {v: i for i, v in enumerate(crossing)}
    first_batch = len(forward.parameters)
    layers = tuple(
        LayerUse(
            layer_class=owner,
            entries=tuple(number[v] for v in cut.entries),
            exits=tuple(number[v] for v in cut.exits),
            parameters=cut.parameters,
            batch=tuple(v - first_batch for v in cut.batch),
        )
        for cut, owner in zip(cuts, owners, strict=True)
    )
    per_class = [Counter(op.primitive for op in c.graph.operators if not op.rule.known) for c in classes]
    unknown: Counter[str] = Counter()
    for owner in owners:
        unknown.update(per_class[owner])
    loops = Counter(op.primitive for use in owners for op in classes[use].graph.operators)["while"]
    trips = (f"{loops} while loops count as one trip each: nobody knows how many they make",) if loops else ()
    digest = sha256()
    for joint in classes:
        digest.update(_joint_text(joint).encode())
    digest.update(repr((layers, forward.parameters, forward.batch)).encode())
    return ModelGraph(
        name=model.name,
        classes=tuple(c.graph for c in classes),
        layers=layers,
        parameters=forward.parameters,
        batch=forward.batch,
        values=tuple(forward.tensors[v] for v in crossing),
        loss=number[forward.loss],
        aux=tuple(number[v] for v in forward.aux),
        microbatch_size=batch // microbatches,
        samples=batch,
        tokens_per_sample=model.tokens_per_sample,
        fingerprint=digest.hexdigest()[:16],
        unknown=tuple(sorted(unknown.items())),
        notes=(*forward.notes, *trips),
    )


def _cut_text(cut: Cut, forward: Forward, active: frozenset[int], read_later: set[int]) -> tuple[str, bool]:
    """A text that two cuts share if they are the same layer; False if functions in it keep it from saying all."""
    local: dict[int, int] = {}
    for value in (*cut.entries, *cut.parameters, *cut.batch):
        local.setdefault(value, len(local))
    lines = [
        repr([(local[v], forward.tensors[v], v in active) for v in group])
        for group in (cut.entries, cut.parameters, cut.batch)
    ]
    complete = True
    for eqn in cut.equations:
        for out in eqn.outputs:
            local.setdefault(out, len(local))
        text, whole = _equation_text(eqn, local, by_identity=True)
        complete &= whole
        lines.append(text)
    lines.append(repr([(local[v], v in active, v in read_later) for v in cut.exits]))
    return "\n".join(lines), complete


def _joint_text(joint: JointLayer) -> str:
    identity = {v: v for v in range(len(joint.graph.tensors))}
    equations = [_equation_text(eqn, identity, by_identity=False)[0] for eqn in (*joint.forward, *joint.backward)]
    g = joint.graph
    roles = (g.tensors, g.parameters, g.batch, g.entries, g.exits, g.entry_cotangents, g.exit_cotangents, g.gradients)
    return "\n".join([*equations, repr(roles)])


def _equation_text(eqn: Equation, names: Mapping[int, int], by_identity: bool) -> tuple[str, bool]:
    """The equation in words; False if functions in it keep the words from saying all. ``by_identity`` names functions
    by their address: right within one run, and different in the next.
    """
    complete = True
    parts = []
    for key, value in sorted(eqn.params.items()):
        inside = list(functions_in(value))
        same = [function_text(f) if by_identity else None for f in inside]
        complete &= None not in same
        named = [text or str(getattr(f, "__name__", type(f).__name__)) for f, text in zip(inside, same, strict=True)]
        words = "" if [id(f) for f in inside] == [id(value)] else _COLOURS.sub("", str(value))
        parts.append(f"{key}={words}<{','.join(named)}>" if inside else f"{key}={words}")
    inputs = [str(names[x]) if isinstance(x, int) else _literal_text(x) for x in eqn.inputs]
    outputs = [str(names[v]) for v in eqn.outputs]
    return f"{','.join(outputs)} = {eqn.name}[{';'.join(parts)}] {','.join(inputs)}", complete


def _literal_text(literal: Literal) -> str:
    array = np.asarray(literal.value)
    if array.size <= 8:
        return f"{array.dtype}{array.shape}{array.tolist()}"
    return f"{literal_tensor(literal)}{sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
