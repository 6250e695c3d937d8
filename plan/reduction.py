"""Strategies that no optimal assignment needs, found before any solver is asked."""

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import PlanError
from meshwright.plan.assignment import FloatArray, Problem

IntArray = NDArray[np.intp]


def worthwhile_strategies(
    problem: Problem, fixed: Mapping[int, int] | None = None, keep: Collection[int] = ()
) -> tuple[IntArray, ...]:
    """For each node the strategies that suffice for an optimal assignment, lowest first.

    ``fixed`` nodes have one. ``keep`` nodes have all of theirs, and the rest suffices whichever of these they take.

    Two rules run until neither finds anything. A strategy goes if it is forbidden, by itself or because an edge forbids
    it with every strategy left at the other end. And strategy p goes if one q is never worse: it needs no more bytes
    (where they are limited), and in exchanging p for q every edge at its least favourable and the node itself
    together lose nothing. Of two that never differ the lower stays.

    Errors: PlanError if a node is left without a strategy, so no assignment is allowed.
    Source: Goldstein, Biophysical Journal 66 (1994) 1335-1340, equation 2; weaker than it is row-by-row dominance.
    """
    left = [
        np.arange(costs.size) if v in keep else np.flatnonzero(np.isfinite(costs))
        for v, costs in enumerate(problem.node_seconds)
    ]
    for v, strategy in (fixed or {}).items():
        left[v] = left[v][left[v] == strategy]
    edges: list[list[tuple[int, FloatArray]]] = [[] for _ in left]
    for (u, v), costs in sorted(problem.edge_seconds.items()):
        edges[u].append((v, costs))
        edges[v].append((u, costs.T))
    stale = set(range(len(left))) - set(keep)
    while stale:
        node = min(stale)
        stale.remove(node)
        before = left[node].size
        around = [(other, costs[np.ix_(left[node], left[other])]) for other, costs in edges[node]]
        allowed = np.ones(before, dtype=bool)
        for _, costs in around:
            allowed &= np.isfinite(costs).any(axis=1)
        left[node] = left[node][allowed]
        if left[node].size == 0:
            raise PlanError(
                f"no assignment is allowed: each strategy of node {node} is forbidden, by itself or with its neighbours"
            )
        left[node] = left[node][_undominated(problem, node, left[node], [costs[allowed] for _, costs in around])]
        if left[node].size < before:
            stale |= {other for other, _ in edges[node]} - set(keep)
    return tuple(left)


def _undominated(problem: Problem, node: int, strategies: IntArray, edges: list[FloatArray]) -> NDArray[np.bool_]:
    """Which of a node's strategies no other makes superfluous; ``edges`` have a row for each."""
    own = problem.node_seconds[node][strategies]
    regret = own[:, None] - own[None, :]  # [p, q]: what p costs more than q, at the least
    for costs in edges:
        with np.errstate(invalid="ignore"):
            difference = costs[:, None, :] - costs[None, :, :]
        difference[np.isnan(difference)] = np.inf  # both forbidden: p is not possible there
        regret = regret + difference.min(axis=2)
    worse = regret >= 0
    if problem.node_bytes is not None and problem.memory_limit_bytes is not None:
        resident = problem.node_bytes[node][strategies]
        worse &= resident[:, None] >= resident[None, :]
    stays = np.ones(strategies.size, dtype=bool)
    for p in reversed(range(strategies.size)):  # one by one: of equals, one must stay
        stays[p] = False
        stays[p] = not (worse[p] & stays).any()
    return stays
