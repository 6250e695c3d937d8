"""Sharding one layer on one mesh: the assignment problem of its strategy space, solved for every pair of boundaries.

The graph of a layer has small treewidth, so exact elimination gives the whole boundary-by-boundary table in one pass;
the ILP (Alpa, OSDI 2022, section 4) answers where it does not, and proves in tests that both agree.
"""

from dataclasses import dataclass, field

import numpy as np

from meshwright.plan.assignment import Problem
from meshwright.plan.elimination import Elimination, TreewidthError, eliminate
from meshwright.plan.fusion import traffic
from meshwright.plan.ilp import solve_ilp
from meshwright.plan.sharding import local_bytes
from meshwright.plan.space import BC, BM, COMPONENTS, FC, FM, OC, OM, SAVED, STATIC, FloatArray, Space


@dataclass(frozen=True, slots=True)
class Weights:
    """What a cost vector is worth: seconds of one micro-batch's share of the iteration."""

    microbatches: int
    remat: bool = False  # the forward pass runs twice
    compute_slowdown: float = 1.0  # ranks that share cores
    live: int = 1  # micro-batches whose activations are held at once
    seconds_per_byte: float = 0.0  # price of memory

    def vector(self) -> FloatArray:
        weights = np.zeros(len(COMPONENTS))
        weights[[FC, BC, FM, BM]] = self.compute_slowdown, self.compute_slowdown, 1.0, 1.0
        if self.remat:
            weights[[FC, FM]] *= 2.0
        weights[[OC, OM]] = self.compute_slowdown / self.microbatches, 1.0 / self.microbatches
        weights[STATIC] = self.seconds_per_byte
        weights[SAVED] = 0.0 if self.remat else self.seconds_per_byte * self.live
        return weights


@dataclass(slots=True)
class LayerTable:
    """The best sharding of a layer for each entry layout a and exit layout b.

    objective: (A, A) weighted seconds; costs: (components, A, A); transient_bytes: (A, A), what the layer needs for a
    moment beyond what it keeps. A layer without entries has equal rows.
    """

    space: Space
    objective: FloatArray
    costs: FloatArray
    transient_bytes: FloatArray
    choices: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    ilp_solves: int = 0

    def choice(self, entry: int, leave: int) -> tuple[int, ...]:
        return self.choices[entry, leave]


def problem_of(space: Space, weights: Weights) -> Problem:
    """The weighted assignment problem of a strategy space."""
    w = weights.vector()
    return Problem(
        node_seconds=tuple(np.tensordot(w, costs, axes=1) for costs in space.node_costs),
        edge_seconds={key: np.tensordot(w, costs, axes=1) for key, costs in space.edge_costs.items()},
    )


def solve_layer(space: Space, weights: Weights, use_ilp: bool = False) -> LayerTable:
    """The best assignment for every pair of boundary layouts."""
    problem = problem_of(space, weights)
    layouts = len(space.layouts)
    keep = (space.exit_node,) if space.entry_node < 0 else (space.entry_node, space.exit_node)
    elimination: Elimination | None = None
    if not use_ilp:
        try:
            elimination = eliminate(problem, keep=keep)
        except TreewidthError:
            elimination = None
    table = LayerTable(
        space,
        objective=np.zeros((layouts, layouts)),
        costs=np.zeros((len(COMPONENTS), layouts, layouts)),
        transient_bytes=np.zeros((layouts, layouts)),
    )
    lifetimes = _lifetimes(space)
    known: dict[tuple[int, ...], tuple[FloatArray, float]] = {}
    w = weights.vector()
    for entry in range(layouts):
        for leave in range(layouts):
            fixed = (leave,) if space.entry_node < 0 else (entry, leave)
            if space.entry_node < 0 and entry > 0:
                choice = table.choices[0, leave]
            elif elimination is not None:
                choice = elimination.backtrack(fixed)
            else:
                choice = solve_ilp(problem, fixed=dict(zip(keep, fixed, strict=True))).choice
                table.ilp_solves += 1
            if choice not in known:
                transient = _transient_bytes(space, choice, lifetimes) + space.momentary_bytes(choice)
                known[choice] = (space.costs(choice), transient)
            table.choices[entry, leave] = choice
            table.costs[:, entry, leave], table.transient_bytes[entry, leave] = known[choice]
            table.objective[entry, leave] = float(w @ known[choice][0])
    return table


@dataclass(frozen=True, slots=True)
class _Lifetimes:
    """For each operator, the values that come to life and those read for the last time."""

    born: tuple[tuple[int, ...], ...]
    gone: tuple[tuple[int, ...], ...]


def _lifetimes(space: Space) -> _Lifetimes:
    graph = space.graph
    kept = {*graph.residuals, *graph.gradients, *graph.exits, *graph.entry_cotangents}
    moved = traffic(graph)
    born = tuple(tuple(v for v in t.writes if v not in kept) for t in moved)
    written = {v for values in born for v in values}
    last: dict[int, int] = {}
    for index, op in enumerate(graph.operators):
        for value in (*op.inputs, *op.outputs):
            if value in written:
                last[value] = index
    gone: list[list[int]] = [[] for _ in graph.operators]
    for value, index in last.items():
        gone[index].append(value)
    return _Lifetimes(born, tuple(tuple(values) for values in gone))


def _transient_bytes(space: Space, choice: tuple[int, ...], lifetimes: _Lifetimes) -> float:
    """Peak of what lives only inside one pass over the layer, plus what it hands on."""
    graph, mesh = space.graph, space.mesh

    def size(value: int) -> float:
        spec = space.spec(value, choice)
        return local_bytes(graph.tensors[value], spec, mesh) if spec is not None else 0.0

    live = peak = 0.0
    for born, gone in zip(lifetimes.born, lifetimes.gone, strict=True):
        live += sum(map(size, born))
        peak = max(peak, live)
        live -= sum(map(size, gone))
    handed = sum(size(v) for v in (*graph.exits, *graph.entry_cotangents) if v >= 0)
    return peak + handed
