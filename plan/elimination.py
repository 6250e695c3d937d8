"""Exact min-plus bucket elimination: the whole table over some kept nodes in one pass.

Nodes are eliminated one by one, each time joining the tables that mention the node and minimising over it. The cost
is exponential only in the treewidth, which is small for the graph of a network layer.
Source: Dechter, Bucket elimination, Artificial Intelligence 113 (1999) 41-85; min-fill order: Kjærulff (1990).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import PlanError
from meshwright.plan.assignment import FloatArray, Problem


class TreewidthError(PlanError):
    """The graph needs larger tables than allowed; the ILP is the way."""


@dataclass(frozen=True, slots=True, eq=False)
class Elimination:
    """table[i, j, …]: least seconds when the kept nodes take strategies i, j, …, in the order they were named."""

    keep: tuple[int, ...]
    table: FloatArray
    nodes: int
    trail: tuple[tuple[int, tuple[int, ...], NDArray[np.intp]], ...]  # node, its neighbours then, its best strategy

    def backtrack(self, kept: Sequence[int]) -> tuple[int, ...]:
        """An optimal assignment in which the kept nodes take strategies ``kept``; ties go to the lowest strategy."""
        choice = dict(zip(self.keep, kept, strict=True))
        for node, scope, best in reversed(self.trail):
            choice[node] = int(best[tuple(choice[v] for v in scope)])
        return tuple(choice[v] for v in range(self.nodes))


def eliminate(
    problem: Problem,
    keep: Sequence[int] = (),
    max_table_entries: int = 20_000_000,
    price_seconds_per_byte: float = 0.0,
) -> Elimination:
    """Eliminate every node but ``keep``. Memory enters as a price; a hard limit is the ILP's work.

    Errors: TreewidthError if a table would have more than ``max_table_entries``.
    """
    sizes = [costs.size for costs in problem.node_seconds]
    tables: list[tuple[tuple[int, ...], FloatArray]] = []
    for v, costs in enumerate(problem.node_seconds):
        priced = price_seconds_per_byte and problem.node_bytes is not None
        tables.append(((v,), costs + price_seconds_per_byte * problem.node_bytes[v] if priced else costs))  # type: ignore[index]
    tables += [(edge, costs) for edge, costs in sorted(problem.edge_seconds.items())]

    neighbours: dict[int, set[int]] = {v: set() for v in range(problem.nodes)}
    for u, v in problem.edge_seconds:
        neighbours[u].add(v)
        neighbours[v].add(u)
    left = set(range(problem.nodes)) - set(keep)
    trail = []
    while left:
        node = min(left, key=lambda v: (_fill(v, neighbours), prod(sizes[n] for n in neighbours[v]), v))
        scope = tuple(sorted(neighbours[node]))
        mine = [t for t in tables if node in t[0]]
        tables = [t for t in tables if node not in t[0]]
        joined = _join(mine, (*scope, node), sizes, max_table_entries)
        best = joined.argmin(axis=-1)
        trail.append((node, scope, best))
        tables.append((scope, np.take_along_axis(joined, best[..., None], axis=-1)[..., 0]))
        for v in scope:
            neighbours[v] |= neighbours[node]
            neighbours[v] -= {v, node}
        left.remove(node)
    return Elimination(tuple(keep), _join(tables, tuple(keep), sizes, max_table_entries), problem.nodes, tuple(trail))


def _fill(node: int, neighbours: dict[int, set[int]]) -> int:
    """Edges that eliminating a node would add."""
    return sum(v not in neighbours[u] for u, v in combinations(sorted(neighbours[node]), 2))


def _join(
    tables: Sequence[tuple[tuple[int, ...], FloatArray]], scope: tuple[int, ...], sizes: Sequence[int], limit: int
) -> FloatArray:
    """The sum of tables over the nodes of ``scope``, small ones first so that most additions are small."""
    shape = tuple(sizes[v] for v in scope)
    if prod(shape) > limit:
        raise TreewidthError(f"eliminating needs a table of {prod(shape):,} entries; {limit:,} are allowed")
    total: FloatArray = np.zeros((1,) * len(scope))
    for nodes, table in sorted(tables, key=lambda t: t[1].size):
        order = sorted(range(len(nodes)), key=lambda i: scope.index(nodes[i]))
        aligned = np.transpose(table, order).reshape([sizes[v] if v in nodes else 1 for v in scope])
        total = total + aligned
    return np.array(np.broadcast_to(total, shape))  # own memory, also for a scalar
