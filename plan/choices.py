"""A layer's strategy space: nodes that choose, edges that charge, and where the spec of each value is decided."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshwright.plan.components import COMPONENTS
from meshwright.plan.graph import LayerGraph
from meshwright.plan.sharding import Axes, LogicalMesh, Spec
from meshwright.plan.splits import OperatorSplit
from meshwright.plan.zero import Storage, Stored, momentary_bytes

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Home:
    """Where the spec of a value is decided: a node, and the value's spec for each of its strategies."""

    node: int
    specs: tuple[Spec, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """A reader in ``node`` takes a value that lives at ``home`` in the spec ``wanted`` of each of its strategies."""

    value: int
    component: int  # of the cost vector, to which the change is charged
    home: Home
    node: int
    wanted: tuple[Spec, ...]


@dataclass(slots=True)
class Space:
    """The strategy space of a layer.

    ``splits[o]`` has one entry per strategy of node ``node_of_operator[o]``, which is -1 for a constant. ``changes``
    are the reshards that the edges charge.
    """

    graph: LayerGraph
    mesh: LogicalMesh
    layouts: tuple[Axes, ...]
    node_costs: list[FloatArray] = field(default_factory=list)  # (components, strategies)
    edge_costs: dict[tuple[int, int], FloatArray] = field(default_factory=dict)  # (components, strategies, strategies)
    homes: dict[int, Home] = field(default_factory=dict)
    splits: list[tuple[OperatorSplit, ...]] = field(default_factory=list)
    node_of_operator: list[int] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    partial: dict[int, int] = field(default_factory=dict)  # value whose sum may wait -> operator that leaves it partial
    summed_by: dict[int, int] = field(default_factory=dict)  # operator whose sum may wait -> the gradient that it is of
    stored: dict[int, Storage] = field(default_factory=dict)  # gradient -> how its parameter may be kept, if more ways
    entry_node: int = -1
    exit_node: int = -1

    def partial_axes(self, value: int, choice: Sequence[int]) -> Axes:
        """Mesh axes over which ``value`` stays a partial sum until the end of the iteration."""
        if value not in self.partial:
            return ()
        op = self.partial[value]
        way = self.way(self.summed_by[op], choice)
        if way is not None and way.level >= 2:  # its sum is made, and scattered, in every micro-batch
            return ()
        return self.splits[op][choice[self.node_of_operator[op]]].contracted

    def way(self, gradient: int, choice: Sequence[int]) -> Stored | None:
        """How the parameter of a gradient is kept; None where that is not chosen apart from how it is read."""
        storage = self.stored.get(gradient)
        return None if storage is None else storage.options[choice[storage.node]]

    def momentary_bytes(self, choice: Sequence[int]) -> float:
        """Bytes of gathered parameters and whole gradients on a device while the layer runs, that are kept split."""
        total = 0.0
        for gradient, storage in self.stored.items():
            tensors = self.graph.tensors[storage.parameter], self.graph.tensors[gradient]
            made = self.homes[gradient].specs[choice[storage.gradient_node]]
            total += momentary_bytes(storage.options[choice[storage.node]], *tensors, made, self.mesh)
        return total

    def spec(self, value: int, choice: Sequence[int]) -> Spec | None:
        """The spec of a value under an assignment; None for constants, which take any."""
        home = self.homes.get(value)
        return None if home is None else home.specs[choice[home.node]]

    def costs(self, choice: Sequence[int]) -> FloatArray:
        """The cost vector of an assignment, over ``COMPONENTS``."""
        total = np.zeros(len(COMPONENTS))
        for node, strategy in enumerate(choice):
            total += self.node_costs[node][:, strategy]
        for (u, v), matrix in self.edge_costs.items():
            total += matrix[:, choice[u], choice[v]]
        return total
