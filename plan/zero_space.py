"""ZeRO in a layer's strategy space: one more node for each trained parameter, between its reader and its gradient.

That node replaces the edge from the gradient to the parameter's reader, so the graph's treewidth stays what it was.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from meshwright.plan.choices import FloatArray, Space
from meshwright.plan.components import COMPONENTS, FC, OC, STATIC, Memory
from meshwright.plan.graph import LayerGraph, Tensor
from meshwright.plan.sharding import Axes, Collective, Spec, all_reduce, local_bytes
from meshwright.plan.zero import Charge, Storage, Stored, gathers, reductions, stored_ways


def add_storage(space: Space, parameter: int, gradient: int, memory: Memory, highest: int) -> bool:
    """Offer ways to keep a trained parameter, and charge all that depends on them; False if there is but the plain one.

    Charged are the gradient's sum and reshard, gathers, the update and what is resident; the caller then charges none.
    """
    reader, maker = space.homes[parameter], space.homes[gradient]
    if gradient in space.partial and space.node_of_operator[space.partial[gradient]] != maker.node:
        return False
    options = stored_ways(space.graph.tensors[parameter], reader.specs, space.mesh, highest)
    if len(options) == len(set(reader.specs)):
        return False
    node = len(space.node_costs)
    again = _read_backward(space.graph, parameter)
    storage = Storage(parameter, gradient, node, options, again, maker.node)
    space.stored[gradient] = storage
    space.node_costs.append(_own_costs(space, storage, memory))
    forbidden = np.zeros((len(COMPONENTS), len(reader.specs), len(options)))
    forbidden[FC] = np.where([[way.read == read for way in options] for read in reader.specs], 0.0, np.inf)
    _add_edge(space, reader.node, node, forbidden)
    _add_edge(space, maker.node, node, _gradient_costs(space, storage))
    return True


def storage_charges(space: Space, choice: Sequence[int]) -> Iterator[tuple[Storage, Charge]]:
    """All that an assignment's storage communicates."""
    for gradient, storage in space.stored.items():
        way = storage.options[choice[storage.node]]
        made, partial, summed = _sum_of(space, gradient, choice[storage.gradient_node])
        tensor = _summed_tensor(space, gradient)
        for charge in gathers(way, space.graph.tensors[storage.parameter], space.mesh, storage.read_again):
            yield storage, charge
        for charge in reductions(way, tensor, made, summed, partial, space.mesh):
            yield storage, charge


def _own_costs(space: Space, storage: Storage, memory: Memory) -> FloatArray:
    """What an option costs whatever the gradient's maker does: gathers, update, and bytes but the gradient's."""
    tensor, mesh = space.graph.tensors[storage.parameter], space.mesh
    item = tensor.bytes / max(tensor.elements, 1)
    seconds_per_byte = mesh.device.program_slowdown("once") / mesh.device.memory_bytes_per_second.value / item
    costs = np.zeros((len(COMPONENTS), len(storage.options)))
    for option, way in enumerate(storage.options):
        split, whole = local_bytes(tensor, way.kept, mesh), local_bytes(tensor, way.read, mesh)
        costs[STATIC, option] = local_bytes(tensor, way.parameter, mesh) + memory.optimizer_bytes / item * split
        accumulated = split if way.level >= 2 else whole
        costs[OC, option] = seconds_per_byte * (memory.reduce_bytes * accumulated + memory.update_bytes * split)
        for component, _, collectives in gathers(way, tensor, mesh, storage.read_again):
            costs[component, option] += sum(c.seconds for c in collectives)
    return costs


def _gradient_costs(space: Space, storage: Storage) -> FloatArray:
    """(components, strategies of the gradient's maker, options): its sum, its reshard, and its resident bytes."""
    gradient, mesh = storage.gradient, space.mesh
    tensor, summed_tensor = space.graph.tensors[gradient], _summed_tensor(space, gradient)
    costs = np.zeros((len(COMPONENTS), len(space.homes[gradient].specs), len(storage.options)))
    known: dict[tuple[Stored, Spec, Axes, tuple[Collective, ...]], FloatArray] = {}
    for strategy in range(costs.shape[1]):
        made, partial, summed = _sum_of(space, gradient, strategy)
        for option, way in enumerate(storage.options):
            key = (way, made, partial, summed)
            if key not in known:
                known[key] = np.zeros(len(COMPONENTS))
                known[key][STATIC] = local_bytes(tensor, way.gradient(made), mesh)
                for component, _, collectives in reductions(way, summed_tensor, made, summed, partial, mesh):
                    known[key][component] += sum(c.seconds for c in collectives)
            costs[:, strategy, option] = known[key]
    return costs


def _sum_of(space: Space, gradient: int, strategy: int) -> tuple[Spec, Axes, tuple[Collective, ...]]:
    """A gradient's spec under a strategy of its node, the axes of its waiting sum, and the all-reduces that end it."""
    made = space.homes[gradient].specs[strategy]
    op = space.partial.get(gradient)
    if op is None:
        return made, (), ()
    split = space.splits[op][strategy]
    value = space.graph.operators[op].outputs[0]
    summed = all_reduce(space.graph.tensors[value], split.results[0], split.contracted, space.mesh)
    return made, split.contracted, summed


def _summed_tensor(space: Space, gradient: int) -> Tensor:
    """The gradient in the dtype of its waiting sum: a cast after the contraction comes after the collective."""
    op = space.partial.get(gradient)
    tensor = space.graph.tensors[gradient]
    if op is None:
        return tensor
    return Tensor(tensor.shape, space.graph.tensors[space.graph.operators[op].outputs[0]].dtype)


def _read_backward(graph: LayerGraph, parameter: int) -> bool:
    """Whether the backward half reads a parameter, or a cast or view of it that is not kept from the forward."""
    same = {parameter}
    for op in graph.operators:
        if same.isdisjoint(op.inputs):
            continue
        if op.phase == "backward":
            return True
        if len(op.inputs) == 1 and not op.heavy:
            same.update(v for v in op.outputs if v not in graph.residuals)
    return False


def _add_edge(space: Space, other: int, node: int, costs: FloatArray) -> None:
    """Charge costs (components, strategies of ``other``, strategies of ``node``), ``other`` being the older node."""
    if (other, node) in space.edge_costs:
        space.edge_costs[other, node] += costs
    else:
        space.edge_costs[other, node] = costs
