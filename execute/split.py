"""What each stage of a plan holds, reads, sends and receives: the plan's cut applied to the traced model."""

from dataclasses import dataclass
from math import prod

from meshwright.errors import PlanError
from meshwright.plan.graph import ModelGraph, Tensor
from meshwright.plan.planfile import Layout, Plan, PlannedStage
from meshwright.plan.sharding import AXIS_NAMES, boundary_spec, parse_spec

NamedSpec = tuple[tuple[str, ...], ...]  # for each dim, the names of the mesh axes that split it


@dataclass(frozen=True, slots=True)
class GradientKey:
    """A gradient accumulator: a parameter leaf, and the mesh axes over which its sum still waits."""

    leaf: int
    partial: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """A plan's ``Layout`` with its texts read: keys are value and equation numbers."""

    values: dict[int, NamedSpec]
    operands: dict[tuple[int, int], NamedSpec]
    partial: dict[int, tuple[str, ...]]
    splits: dict[tuple[int, int, int], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class StageSplit:
    """One stage. Values and leaves are numbered model-wide; specs are those of this stage's mesh.

    received: activations that come from earlier stages; produced: all values that its layers give.
    cotangents_in: (value, stage that sends it); cotangents_out: received values whose cotangent goes back.
    """

    index: int
    planned: PlannedStage
    layers: range
    layouts: tuple[LayerLayout, ...]
    parameters: tuple[int, ...]
    parameter_specs: dict[int, NamedSpec]
    batch: tuple[int, ...]
    batch_specs: dict[int, NamedSpec]
    received: tuple[int, ...]
    received_specs: dict[int, NamedSpec]
    produced: tuple[int, ...]
    produced_specs: dict[int, NamedSpec]
    sent: tuple[int, ...]
    cotangents_in: tuple[tuple[int, int], ...]
    cotangents_out: tuple[int, ...]
    gradients: tuple[GradientKey, ...]
    gradient_specs: dict[GradientKey, NamedSpec]
    has_loss: bool

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        return tuple(self.planned.mesh.items())


def split_plan(plan: Plan, graph: ModelGraph) -> tuple[StageSplit, ...]:
    """Apply the plan to the graph it was made for.

    Errors: PlanError if the graph is another one, or the plan asks for ZeRO, which is not executed yet.
    """
    if graph.fingerprint != plan.fingerprint:
        raise PlanError(
            f"the plan was made for another program than model {graph.name!r} gives here (fingerprint "
            f"{plan.fingerprint}, now {graph.fingerprint}); plan again with this model and this version of JAX"
        )
    if plan.zero:
        raise PlanError(
            f"the plan keeps parameters at ZeRO-{plan.zero}, which cannot be executed yet; plan with --zero 0"
        )
    maker = graph.owner_of_value()
    stage_of = {layer: i for i, stage in enumerate(plan.stages) for layer in range(*stage.layers)}
    readers: dict[int, list[int]] = {}
    active: set[int] = set()
    for layer, use in enumerate(graph.layers):
        for value, cotangent in zip(use.entries, graph.classes[use.layer_class].entry_cotangents, strict=True):
            readers.setdefault(value, []).append(stage_of[layer])
            if cotangent >= 0:
                active.add(value)
    splits = []
    for index, planned in enumerate(plan.stages):
        layers = range(*planned.layers)
        layouts = tuple(read_layout(plan.layouts[name]) for name in planned.layouts)
        parameters: dict[int, NamedSpec] = {}
        batch: dict[int, NamedSpec] = {}
        received: dict[int, NamedSpec] = {}
        produced: dict[int, NamedSpec] = {}
        gradients: dict[GradientKey, NamedSpec] = {}
        for layer, layout in zip(layers, layouts, strict=True):
            use = graph.layers[layer]
            inner = graph.classes[use.layer_class]
            before, after = planned.boundaries[layer - layers.start], planned.boundaries[layer - layers.start + 1]
            for leaf, number in zip(use.parameters, inner.parameters, strict=True):
                parameters.setdefault(leaf, layout.values[number])
            for leaf, number in zip(use.batch, inner.batch, strict=True):
                batch.setdefault(leaf, layout.values[number])
            for value in use.entries:
                if maker[value] not in layers:
                    received.setdefault(value, named_boundary(graph.values[value], before, planned.mesh))
            for value in use.exits:
                produced[value] = named_boundary(graph.values[value], after, planned.mesh)
            for leaf, number in zip(use.parameters, inner.gradients, strict=True):
                if number >= 0:
                    key = GradientKey(leaf, layout.partial.get(number, ()))
                    gradients.setdefault(key, layout.values[number])
        later = {v: sorted({s for s in readers.get(v, ()) if s != index}) for v in produced}
        splits.append(
            StageSplit(
                index=index,
                planned=planned,
                layers=layers,
                layouts=layouts,
                parameters=tuple(sorted(parameters)),
                parameter_specs=parameters,
                batch=tuple(sorted(batch)),
                batch_specs=batch,
                received=tuple(sorted(received)),
                received_specs=received,
                produced=tuple(produced),
                produced_specs=produced,
                sent=tuple(v for v in produced if later[v]),
                cotangents_in=tuple((v, s) for v in produced if v in active for s in later[v]),
                cotangents_out=tuple(v for v in sorted(received) if v in active),
                gradients=tuple(gradients),
                gradient_specs=gradients,
                has_loss=graph.loss in produced,
            )
        )
    return tuple(splits)


def owners(splits: tuple[StageSplit, ...]) -> dict[int, int]:
    """Parameter leaf -> the stage that owns it: the first that reads it."""
    found: dict[int, int] = {}
    for split in splits:
        for leaf in split.parameters:
            found.setdefault(leaf, split.index)
    return found


def read_layout(layout: Layout) -> LayerLayout:
    return LayerLayout(
        values={int(key.partition(":")[0]): named(text) for key, text in layout.values.items()},
        operands={_pair(key): named(text) for key, text in layout.operands.items()},
        partial={int(key): tuple(text.split("+")) for key, text in layout.partial.items()},
        splits={_triple(key): tuple(text.split("+")) for key, text in layout.splits.items()},
    )


def named(text: str) -> NamedSpec:
    return tuple(tuple(AXIS_NAMES[a] for a in axes) for axes in parse_spec(text))


def named_boundary(tensor: Tensor, boundary: str, mesh: dict[str, int]) -> NamedSpec:
    """The spec of a value between layers, from the text of the plan's boundary."""
    names = () if boundary == "-" else tuple(boundary.split("+"))
    axes = tuple(AXIS_NAMES.index(name) for name in names)
    spec = boundary_spec(tensor, axes, prod(mesh[name] for name in names))
    return tuple(tuple(AXIS_NAMES[a] for a in dim) for dim in spec)


def _pair(key: str) -> tuple[int, int]:
    equation, _, operand = key.partition(".")
    return int(equation), int(operand)


def _triple(key: str) -> tuple[int, int, int]:
    equation, operand, dim = key.split(".")
    return int(equation), int(operand), int(dim)
