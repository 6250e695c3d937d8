"""From chosen stages to the parts of a plan: planned stages, layer layouts, transfers and ties."""

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.calibrate.hardware import Cluster, Link
from meshwright.plan.graph import LayerGraph, ModelGraph
from meshwright.plan.inter import Stage
from meshwright.plan.planfile import Layout, PlannedStage, Transfer
from meshwright.plan.sharding import AXIS_NAMES, Axes, local_bytes, spec_text
from meshwright.plan.space import Space
from meshwright.plan.stages import MeshKind, StageCost, StagePricer, moving_cost, transfer_cost


@dataclass(frozen=True, slots=True)
class Assembly:
    """The part of a plan that the simulator needs and the executor runs."""

    stages: tuple[PlannedStage, ...]
    layouts: dict[str, Layout]
    transfers: tuple[Transfer, ...]
    tied: tuple[tuple[int, int], ...]


def assemble(pricer: StagePricer, chosen: Sequence[Stage], cluster: Cluster) -> Assembly:
    """Spell out the chosen stages."""
    costs = [pricer.cost(s.first_layer, s.last_layer, s.kind, s.entry, s.exit) for s in chosen]
    names: dict[bytes, str] = {}
    layouts: dict[str, Layout] = {}
    stages = []
    for stage, cost in zip(chosen, costs, strict=True):
        kind = pricer.kinds[stage.kind]
        axis_names = _axis_names(kind, cost)
        used = []
        for table, choice in zip(cost.tables, cost.choices, strict=True):
            layout = layer_layout(table.space, choice, axis_names)
            key = repr(layout).encode()
            if key not in names:
                names[key] = f"layout {len(names)}"
                layouts[names[key]] = layout
            used.append(names[key])
        stages.append(_planned(stage, kind, cost, tuple(used), axis_names))
    owner_stage = {layer: i for i, s in enumerate(chosen) for layer in range(s.first_layer, s.last_layer)}
    transfers = _transfers(pricer, chosen, costs, owner_stage, cluster)
    ties, tied = _ties(pricer.setting.graph, chosen, costs, owner_stage, cluster)
    return Assembly(tuple(stages), layouts, (*transfers, *ties), tied)


def _axis_names(kind: MeshKind, cost: StageCost) -> tuple[str, ...]:
    """What the mesh's axes are called: a lone axis is "tensor" if it splits most bytes of the weights, else "data"."""
    if len(kind.mesh.sizes) > 1:
        return AXIS_NAMES
    whole = split = 0
    for table, choice in zip(cost.tables, cost.choices, strict=True):
        for parameter in table.space.graph.parameters:
            size = table.space.graph.tensors[parameter].bytes
            whole += size
            split += size * any(table.space.spec(parameter, choice) or ())
    return ("tensor",) if 2 * split > whole else ("data",)


def layer_layout(space: Space, choice: Sequence[int], names: Sequence[str] = AXIS_NAMES) -> Layout:
    """The specs that a layer's assignment pins, with the mesh axes called ``names``."""
    graph = space.graph

    def axes_of(value: int) -> str:
        return axes_text(space.partial_axes(value, choice), names)

    values: dict[str, str] = {}
    for value, what in _pinned(space, choice).items():
        spec = space.spec(value, choice)
        if spec is not None:
            values[f"{value}:{what}"] = spec_text(spec, names)
    operands: dict[str, str] = {}
    for index, op in enumerate(graph.operators):
        node = space.node_of_operator[index]
        if node < 0:
            continue
        split = space.splits[index][choice[node]]
        for position, operand in enumerate(op.inputs):
            home = space.spec(operand, choice)
            if home is not None and home != split.operands[position]:
                operands[f"{index}.{position}"] = spec_text(split.operands[position], names)
    partial = {str(v): axes_of(v) for v in space.partial if space.partial_axes(v, choice)}
    splits: dict[str, str] = {}
    for index in sorted({space.partial[int(v)] for v in partial}):
        split = space.splits[index][choice[space.node_of_operator[index]]]
        rule = graph.operators[index].rule
        for position, (dims, spec) in enumerate(zip(rule.operands, split.operands, strict=True)):
            for dim, (factor, axes) in enumerate(zip(dims, spec, strict=True)):
                if factor in rule.contracted and axes:
                    splits[f"{index}.{position}.{dim}"] = axes_text(axes, names)
    ways = [(storage.parameter, space.way(gradient, choice)) for gradient, storage in space.stored.items()]
    kept = {p: way for p, way in ways if way is not None and way.level}
    return Layout(
        values=values,
        operands=operands,
        partial=partial,
        splits=splits,
        stored={str(p): spec_text(way.kept, names) for p, way in kept.items()},
        zero={str(p): way.level for p, way in kept.items()},
    )


def _pinned(space: Space, choice: Sequence[int]) -> dict[int, str]:
    """The values whose spec the plan states, and what they are: all that an operator of some node gives.

    Followers too: the compiler would else choose for them, and now and then choose what was not priced.
    """
    graph: LayerGraph = space.graph
    named: dict[int, str] = {}
    for index, op in enumerate(graph.operators):
        if space.node_of_operator[index] >= 0:
            named.update(dict.fromkeys(op.outputs, op.primitive))
    for what, group in (
        ("residual", graph.residuals),
        ("parameter", graph.parameters),
        ("batch", graph.batch),
        ("entry", graph.entries),
        ("entry_cotangent", graph.entry_cotangents),
        ("exit_cotangent", graph.exit_cotangents),
        ("gradient", graph.gradients),
        ("exit", graph.exits),
    ):
        named.update({v: what for v in group if v >= 0})
    return dict(sorted(named.items()))


def axes_text(axes: Axes, names: Sequence[str] = AXIS_NAMES) -> str:
    return "+".join(names[a] for a in axes) or "-"


def _planned(
    stage: Stage, kind: MeshKind, cost: StageCost, used: tuple[str, ...], names: Sequence[str]
) -> PlannedStage:
    mesh = kind.mesh
    return PlannedStage(
        layers=(stage.first_layer, stage.last_layer),
        devices=tuple(range(stage.first_device, stage.first_device + mesh.devices)),
        mesh=dict(zip(names, mesh.sizes, strict=False)),
        boundaries=tuple(axes_text(kind.layouts[b], names) for b in cost.layouts),
        layouts=used,
        forward_compute_seconds=cost.forward_compute_seconds,
        forward_communication_seconds=cost.forward_communication_seconds,
        backward_compute_seconds=cost.backward_compute_seconds,
        backward_communication_seconds=cost.backward_communication_seconds,
        reduce_seconds=cost.once_communication_seconds,
        update_seconds=cost.once_compute_seconds,
        dispatch_seconds=mesh.device.dispatch_seconds.value,
        static_bytes=cost.static_bytes,
        saved_bytes=cost.saved_bytes,
        transient_bytes=cost.transient_bytes,
        peak_memory_bytes=0.0,  # the simulation of the whole plan tells
    )


def _link(cluster: Cluster, left: Stage, right: Stage) -> Link:
    same = cluster.host_of(left.first_device) == cluster.host_of(right.first_device)
    return cluster.hosts[cluster.host_of(left.first_device)].link if same else cluster.inter_host


def _transfers(
    pricer: StagePricer,
    chosen: Sequence[Stage],
    costs: Sequence[StageCost],
    owner_stage: dict[int, int],
    cluster: Cluster,
) -> list[Transfer]:
    graph = pricer.setting.graph
    maker = graph.owner_of_value()
    needs: dict[tuple[int, int], dict[int, int]] = {}  # (source, target) -> value -> first layer that reads it
    active: set[int] = set()
    for layer, use in enumerate(graph.layers):
        for value, cotangent in zip(use.entries, graph.classes[use.layer_class].entry_cotangents, strict=True):
            source, target = owner_stage[maker[value]], owner_stage[layer]
            if source != target:
                needs.setdefault((source, target), {}).setdefault(value, layer)
                if cotangent >= 0:
                    active.add(value)
    found = []
    for (source, target), values in sorted(needs.items()):
        left, right = chosen[source], chosen[target]
        there, back = pricer.kinds[left.kind], pricer.kinds[right.kind]
        link = _link(cluster, left, right)
        for what, group in (("activation", list(values)), ("cotangent", [v for v in values if v in active])):
            wire = latency = 0.0
            for value in group:
                entry = back.layouts[costs[target].layouts[values[value] - right.first_layer]]
                leave = there.layouts[costs[source].layouts[maker[value] - left.first_layer + 1]]
                arguments = (there.mesh, back.mesh, entry) if what == "activation" else (back.mesh, there.mesh, leave)
                seconds, latency = transfer_cost([graph.values[value]], *arguments, link)
                wire += seconds
            if group:
                ends = (source, target) if what == "activation" else (target, source)
                size = float(sum(graph.values[v].bytes for v in group))
                found.append(Transfer(*ends, what, tuple(group), size, wire, latency))  # type: ignore[arg-type]
    return found


def _ties(
    graph: ModelGraph,
    chosen: Sequence[Stage],
    costs: Sequence[StageCost],
    owner_stage: dict[int, int],
    cluster: Cluster,
) -> tuple[list[Transfer], tuple[tuple[int, int], ...]]:
    """Parameters read by several stages: the first owns them, the others send gradients and are sent the new value."""
    first_use: dict[int, dict[int, int]] = {}  # leaf -> stage -> the first of its layers that reads it
    for layer, use in enumerate(graph.layers):
        for leaf in use.parameters:
            first_use.setdefault(leaf, {}).setdefault(owner_stage[layer], layer)
    shared: dict[tuple[int, int], list[int]] = {}
    for leaf, uses in first_use.items():
        owner, *users = uses
        for user in users:
            shared.setdefault((owner, user), []).append(leaf)
    found = []
    for (owner, user), leaves in sorted(shared.items()):
        size = float(sum(graph.parameters[leaf].tensor.bytes for leaf in leaves))
        link = _link(cluster, chosen[owner], chosen[user])
        for what, source, target in (("gradient", user, owner), ("parameter", owner, user)):
            part = sum(
                parameter_bytes(graph, first_use[leaf][target], leaf, costs[target], chosen[target]) for leaf in leaves
            )
            here, there = (costs[stage].tables[0].space.mesh.devices for stage in (source, target))
            wire, latency = moving_cost(part, here, there, link)
            found.append(Transfer(source, target, what, tuple(leaves), size, wire, latency))  # type: ignore[arg-type]
    return found, tuple(sorted(shared))


def parameter_bytes(graph: ModelGraph, layer: int, leaf: int, cost: StageCost, stage: Stage) -> float:
    """Bytes of a parameter on one device of a stage, as one of its layers has it."""
    place = layer - stage.first_layer
    space, choice = cost.tables[place].space, cost.choices[place]
    value = space.graph.parameters[graph.layers[layer].parameters.index(leaf)]
    spec = space.spec(value, choice)
    tensor = graph.parameters[leaf].tensor
    return float(tensor.bytes) if spec is None else local_bytes(tensor, spec, space.mesh)
