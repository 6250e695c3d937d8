"""The strategy space of one layer on one mesh: which choices there are and what each costs.

Heavy operators choose freely; everything else follows a neighbour, so that a layer of two hundred equations becomes a
graph of some twenty nodes. Costs are vectors over ``COMPONENTS``: a node has one per strategy, an edge one per pair.
"""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from meshwright.plan.choices import Change, FloatArray, Home, Space
from meshwright.plan.components import BC, BM, COMPONENTS, FC, FM, OC, OM, SAVED, STATIC, Memory
from meshwright.plan.fusion import Traffic, traffic
from meshwright.plan.graph import UNSPLIT, LayerGraph, Operator, Tensor
from meshwright.plan.sharding import (
    Axes,
    LogicalMesh,
    Spec,
    all_reduce,
    boundary_layouts,
    boundary_spec,
    local_bytes,
    replicated,
    reshard,
)
from meshwright.plan.splits import OperatorSplit, enumerate_splits, sample_dims, split_of
from meshwright.plan.zero_space import add_storage
from meshwright.simulate.compute import op_seconds

__all__ = [
    "BC", "BM", "COMPONENTS", "FC", "FM", "OC", "OM", "SAVED", "STATIC",
    "Change", "FloatArray", "Home", "IntArray", "Memory", "Space", "build_space",
]  # fmt: skip

IntArray = NDArray[np.int64]

# Passing these keeps a partial sum a partial sum: they rearrange, or are linear in their one operand.
_LINEAR_VIEWS = frozenset({"transpose", "reshape", "convert_element_type", "copy", "copy_p", "squeeze", "reduce_sum"})


def build_space(
    graph: LayerGraph,
    mesh: LogicalMesh,
    memory: Memory,
    layouts: Sequence[Axes] | None = None,
    roles: Sequence[str] = (),
    zero: int = 0,
) -> Space:
    """Enumerate the strategies of a layer and price them. Source of the method: Alpa, OSDI 2022, section 4.

    ``layouts`` are the boundary layouts to offer (default: all). ``roles`` may bind an axis to "data" (it splits only
    dims that count samples) or to "tensor" (it splits none of those). ``zero`` is the highest level of ZeRO to offer
    (``meshwright.plan.zero``).
    """
    chosen = boundary_layouts(mesh) if layouts is None else tuple(layouts)
    return _Builder(graph, mesh, memory, chosen, tuple(roles), zero).build()


class _Builder:
    def __init__(
        self,
        graph: LayerGraph,
        mesh: LogicalMesh,
        memory: Memory,
        layouts: tuple[Axes, ...],
        roles: tuple[str, ...],
        zero: int,
    ) -> None:
        self.graph, self.mesh, self.memory, self.roles, self.zero = graph, mesh, memory, roles, zero
        self.space = Space(graph, mesh, layouts)
        self.sample_dims = sample_dims(graph) if roles else {}
        self.producer = graph.producer()
        self.pending = {*graph.parameters, *graph.batch}  # no home yet: the first reader decides
        self.free: set[int] = set()  # constants: any spec at no cost
        self.of_parameters = set(graph.parameters)  # functions of parameters alone
        self.content = [t.elements for t in graph.tensors]  # elements, those of a broadcast counted once
        self.changes: set[Change] = set()
        self._reshard: dict[tuple[Tensor, tuple[Spec, ...], tuple[Spec, ...]], FloatArray] = {}
        self._reshard_of: dict[Tensor, dict[tuple[Spec, Spec], float]] = {}

    # -- nodes and edges ------------------------------------------------------------------------------------------

    def _new_node(self, strategies: int) -> int:
        self.space.node_costs.append(np.zeros((len(COMPONENTS), strategies)))
        return len(self.space.node_costs) - 1

    def _add_edge(self, component: int, value: int, node: int, wanted: Sequence[Spec]) -> None:
        """Charge resharding from a value's home to the specs that each strategy of ``node`` wants."""
        home, tensor = self.space.homes[value], self.graph.tensors[value]
        here = tuple(dict.fromkeys(home.specs))
        there = tuple(dict.fromkeys(wanted))
        if here == there and len(here) == 1:
            return
        small = self._reshard_seconds(tensor, here, there)
        if not small.any():
            return
        change = Change(value, component, home, node, tuple(wanted))
        if change in self.changes:  # another reader that follows the same node takes the same copy
            return
        self.changes.add(change)
        self.space.changes.append(change)
        rows = np.array([here.index(s) for s in home.specs])
        columns = np.array([there.index(s) for s in wanted])
        if home.node == node:
            self.space.node_costs[node][component] += small[rows, columns]
            return
        full = small[np.ix_(rows, columns)]
        key = (home.node, node) if home.node < node else (node, home.node)
        if key not in self.space.edge_costs:
            shape = tuple(self.space.node_costs[n].shape[1] for n in key)
            self.space.edge_costs[key] = np.zeros((len(COMPONENTS), *shape))
        self.space.edge_costs[key][component] += full if key[0] == home.node else full.T

    def _reshard_seconds(self, tensor: Tensor, here: tuple[Spec, ...], there: tuple[Spec, ...]) -> FloatArray:
        """Seconds from each spec to each; many values of a layer have the same shape and the same specs."""
        key = (tensor, here, there)
        if key not in self._reshard:
            known = self._reshard_of.setdefault(tensor, {})
            for change in product(here, there):
                if change not in known:
                    known[change] = sum(c.seconds for c in reshard(tensor, *change, self.mesh))
            self._reshard[key] = np.array([[known[a, b] for b in there] for a in here])
        return self._reshard[key]

    def _demand(self, value: int, node: int, wanted: tuple[Spec, ...], component: int) -> None:
        """A reader in ``node`` wants ``value`` so: settle its home if it has none, else charge the change."""
        if value in self.free:
            return
        if value in self.space.homes:
            self._add_edge(component, value, node, wanted)
            return
        self.pending.discard(value)
        self.space.homes[value] = Home(node, wanted)
        maker = self.producer.get(value)
        if maker is None:
            return
        # A cast or a reshape of a parameter: its operand follows backwards.
        op = self.graph.operators[maker]
        implied = {spec: self._split_from(op, op.rule.results[0], spec) for spec in dict.fromkeys(wanted)}
        splits = tuple(implied[spec] for spec in wanted)
        self._settle(maker, node, splits)
        for position, operand in enumerate(op.inputs):
            self._demand(operand, node, tuple(s.operands[position] for s in splits), component)

    def _split_from(self, op: Operator, dims: Sequence[int], spec: Spec) -> OperatorSplit:
        """The split that a neighbour's spec implies; axes that the operator cannot keep are dropped."""
        axes_of_factor: dict[int, Axes] = {}
        for factor, axes in zip(dims, spec, strict=True):
            if factor == UNSPLIT or not axes or factor in axes_of_factor:
                continue
            if op.rule.sizes[factor] % self.mesh.size(axes) == 0:
                axes_of_factor[factor] = axes
        return split_of(op, axes_of_factor, self.mesh)

    def _settle(self, index: int, node: int, splits: tuple[OperatorSplit, ...]) -> None:
        """Operator ``index`` belongs to ``node``: note how it runs and give its results their home."""
        self.space.splits[index] = splits
        self.space.node_of_operator[index] = node
        for position, out in enumerate(self.graph.operators[index].outputs):
            self.pending.discard(out)
            self.space.homes[out] = Home(node, tuple(s.results[position] for s in splits))

    # -- the walk -------------------------------------------------------------------------------------------------

    def build(self) -> Space:
        graph, space = self.graph, self.space
        space.splits = [() for _ in graph.operators]
        space.node_of_operator = [-1] * len(graph.operators)
        self._boundaries()
        for index, op in enumerate(graph.operators):
            self._place(index, op)
        self._close()
        self._price_operators()
        return space

    def _boundaries(self) -> None:
        graph, space = self.graph, self.space

        def home_all(node: int, values: Sequence[int]) -> None:
            for value in values:
                if value >= 0:
                    specs = tuple(
                        boundary_spec(graph.tensors[value], layout, self.mesh.size(layout)) for layout in space.layouts
                    )
                    space.homes[value] = Home(node, specs)

        if graph.entries:
            space.entry_node = self._new_node(len(space.layouts))
            home_all(space.entry_node, graph.entries)
        space.exit_node = self._new_node(len(space.layouts))
        home_all(space.exit_node, graph.exit_cotangents)

    def _place(self, index: int, op: Operator) -> None:
        component = FM if op.phase == "forward" else BM
        settled = [v for v in op.inputs if v in self.space.homes]
        if not op.heavy and op.inputs:
            content = max(self.content[v] for v in op.inputs)
            for out in op.outputs:
                self.content[out] = min(self.content[out], content)
            if all(v in self.of_parameters or v in self.free for v in op.inputs):
                self.of_parameters.update(op.outputs)
                if any(self.graph.tensors[out].elements > content for out in op.outputs):
                    self.pending.update(op.outputs)  # a bias spread over activations is laid out as they are
                    return
        if not settled:
            if all(v in self.free for v in op.inputs) and not op.heavy:
                self.free.update(op.outputs)
                return
            from_batch = self._reads_batch(op)
            if not op.heavy and not from_batch:
                self.pending.update(op.outputs)  # a function of parameters alone: its reader will decide
                return
        if op.heavy or not settled:
            rows = zip(op.inputs, op.rule.operands, strict=True)
            samples = frozenset(dims[self.sample_dims[v]] for v, dims in rows if v in self.sample_dims) - {UNSPLIT}
            splits = enumerate_splits(op, self.mesh, self.roles, samples)
            node = self._new_node(len(splits))
        else:
            leader = max(settled, key=lambda v: (self.content[v], self.producer.get(v, -1)))
            home = self.space.homes[leader]
            node = home.node
            dims = op.rule.operands[op.inputs.index(leader)]
            implied = {spec: self._split_from(op, dims, spec) for spec in dict.fromkeys(home.specs)}
            splits = tuple(implied[spec] for spec in home.specs)
        self._settle(index, node, splits)
        for position, operand in enumerate(op.inputs):
            self._demand(operand, node, tuple(s.operands[position] for s in splits), component)

    def _reads_batch(self, op: Operator) -> bool:
        stack, seen = list(op.inputs), set()
        while stack:
            value = stack.pop()
            if value in self.graph.batch:
                return True
            if value not in seen and value in self.producer:
                seen.add(value)
                stack.extend(self.graph.operators[self.producer[value]].inputs)
        return False

    def _close(self) -> None:
        """Tie the layer's results to its boundaries and gradients to their parameters, and find sums that may wait."""
        graph, space = self.graph, self.space
        for value in [*graph.parameters, *graph.batch, *self.pending]:
            if value not in space.homes and value not in self.free:
                node = self._new_node(1)
                space.homes[value] = Home(node, (replicated(graph.tensors[value]),))
        if graph.entries:
            for value in graph.entry_cotangents:
                if value >= 0:
                    self._return(value, space.entry_node, BM)
        for value in graph.exits:
            self._return(value, space.exit_node, FM)
        readers: dict[int, list[int]] = {}
        for index, op in enumerate(graph.operators):
            for operand in op.inputs:
                readers.setdefault(operand, []).append(index)
        for parameter, gradient in zip(graph.parameters, graph.gradients, strict=True):
            if gradient < 0:
                continue
            self._find_partial(gradient, readers)
            if gradient not in space.homes:
                continue
            if not (self.zero and add_storage(space, parameter, gradient, self.memory, self.zero)):
                home = space.homes[parameter]
                self._add_edge(OM, gradient, home.node, home.specs)

    def _return(self, value: int, node: int, component: int) -> None:
        wanted = tuple(
            boundary_spec(self.graph.tensors[value], layout, self.mesh.size(layout)) for layout in self.space.layouts
        )
        if value in self.space.homes:
            self._add_edge(component, value, node, wanted)

    def _find_partial(self, gradient: int, readers: Mapping[int, list[int]]) -> None:
        """Mark the chain from a contraction to a gradient: its sum over devices may wait until the iteration's end."""
        chain: list[int] = []
        value = gradient
        while True:
            maker = self.producer.get(value)
            if maker is None or len(readers.get(value, ())) != (0 if value == gradient else 1):
                return
            op = self.graph.operators[maker]
            chain.append(value)
            if op.rule.contracted:
                if op.rule.linear and len(op.outputs) == 1:
                    self.space.partial.update(dict.fromkeys(chain, maker))
                    self.space.summed_by[maker] = gradient
                return
            if op.primitive not in _LINEAR_VIEWS or len(op.inputs) != 1:
                return
            value = op.inputs[0]

    # -- prices ---------------------------------------------------------------------------------------------------

    def _price_operators(self) -> None:
        graph, space, mesh = self.graph, self.space, self.mesh
        moved = traffic(graph)
        waiting = space.summed_by
        charged = {index for index, gradient in waiting.items() if gradient in space.stored}  # with how that is kept
        for index, op in enumerate(graph.operators):
            node = space.node_of_operator[index]
            if node < 0:
                continue
            compute, communicate = (FC, FM) if op.phase == "forward" else (BC, BM)
            priced: dict[OperatorSplit, tuple[float, float]] = {}
            for strategy, split in enumerate(space.splits[index]):
                if split not in priced:
                    sums = sum(
                        collective.seconds
                        for v, spec in zip(op.outputs, split.results, strict=True)
                        for collective in all_reduce(graph.tensors[v], spec, split.contracted, mesh)
                    )
                    slowdown = mesh.device.program_slowdown(op.phase)
                    priced[split] = (slowdown * self._compute_seconds(op, moved[index], split), sums)
                seconds, sums = priced[split]
                space.node_costs[node][compute, strategy] += seconds
                if index not in charged:
                    space.node_costs[node][OM if index in waiting else communicate, strategy] += sums
        self._price_memory()

    def _compute_seconds(self, op: Operator, moved: Traffic, split: OperatorSplit) -> float:
        tensors, mesh = self.graph.tensors, self.mesh
        specs = {
            **dict(zip(op.inputs, split.operands, strict=True)),
            **dict(zip(op.outputs, split.results, strict=True)),
        }
        touched = sum(local_bytes(tensors[v], specs[v], mesh) for v in (*moved.reads, *moved.writes))
        dtype = tensors[op.inputs[0]].dtype if op.inputs else tensors[op.outputs[0]].dtype
        flops = op.flops / split.shards if op.heavy else 0.0
        if not op.heavy and not moved.launches and not touched:
            return 0.0
        return op_seconds(mesh.device, op.kind, flops, touched, dtype, moved.launches)

    def _price_memory(self) -> None:
        graph, space, mesh = self.graph, self.space, self.mesh

        def charge(component: int, value: int, scale: float) -> None:
            home = space.homes.get(value)
            if home is not None:
                per_spec = {s: local_bytes(graph.tensors[value], s, mesh) * scale for s in dict.fromkeys(home.specs)}
                space.node_costs[home.node][component] += np.array([per_spec[s] for s in home.specs])

        for value in (*graph.residuals, *graph.kept_entries):
            charge(SAVED, value, 1.0)
        for parameter, gradient in zip(graph.parameters, graph.gradients, strict=True):
            item = graph.tensors[parameter].bytes / max(graph.tensors[parameter].elements, 1)
            if gradient < 0:
                charge(STATIC, parameter, 1.0)
                continue
            if gradient in space.stored:
                continue
            charge(STATIC, parameter, 1.0 + self.memory.optimizer_bytes / item)
            charge(STATIC, gradient, 1.0)
            moved = (self.memory.reduce_bytes + self.memory.update_bytes) / item
            slowdown = mesh.device.program_slowdown("once")
            charge(OC, parameter, slowdown * moved / mesh.device.memory_bytes_per_second.value)
