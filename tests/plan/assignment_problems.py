"""Small problems to draw, and every assignment of them tried: what the tests of both solvers share."""

from collections.abc import Mapping
from itertools import product

import numpy as np
from hypothesis import strategies as st

from meshwright.plan.assignment import Problem


@st.composite
def problems(draw: st.DrawFn, nodes: int = 6, limited: bool = False) -> Problem:
    """Up to ``nodes`` nodes of 1 to 4 strategies, any edges, one pair in eight forbidden, one strategy in sixteen.

    Costs are whole numbers of a unit from 0.1 µs to 1 s, so that ties are common; some are 10,000 times as large.
    """
    count = draw(st.integers(1, nodes))
    sizes = [draw(st.integers(1, 4)) for _ in range(count)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    unit = draw(st.sampled_from([1e-7, 1e-6, 1.0]))
    lowest = draw(st.sampled_from([0, -5]))  # a cost may be a saving, too

    def costs(*shape: int) -> np.ndarray:
        drawn = rng.integers(lowest, draw(st.sampled_from([3, 50])), shape) * unit
        return drawn * np.where(rng.random(shape) < 0.05, 1e4, 1.0)

    def forbidding(drawn: np.ndarray, share: float) -> np.ndarray:
        return np.where(rng.random(drawn.shape) < share, np.inf, drawn)

    pairs = [(u, v) for u in range(count) for v in range(u + 1, count) if draw(st.booleans())]
    nodes_seconds = tuple(forbidding(costs(size), 1 / 16) for size in sizes)
    edges = {(u, v): forbidding(costs(sizes[u], sizes[v]), 1 / 8) for u, v in pairs}
    if not limited:
        return Problem(nodes_seconds, edges)
    byte_unit = draw(st.sampled_from([1.0, 123_456_789.0]))
    node_bytes = tuple(rng.integers(0, 12, size) * byte_unit for size in sizes)
    limit = draw(st.integers(0, 10 * count)) * byte_unit - draw(st.integers(0, 1))  # also one byte short
    return Problem(nodes_seconds, edges, node_bytes, max(limit, 0.0))


def every_assignment(problem: Problem, fixed: Mapping[int, int] | None = None) -> list[tuple[int, ...]]:
    """All that the memory limit allows, forbidden ones included."""
    limit = np.inf if problem.memory_limit_bytes is None else problem.memory_limit_bytes
    ranges = [
        [(fixed or {}).get(v, -1)] if v in (fixed or {}) else range(c.size) for v, c in enumerate(problem.node_seconds)
    ]
    return [choice for choice in product(*ranges) if problem.bytes(choice) <= limit]


def brute_force(problem: Problem, fixed: Mapping[int, int] | None = None) -> float:
    """Least seconds over all assignments; +inf if none is allowed."""
    return min(map(problem.seconds, every_assignment(problem, fixed)), default=np.inf)
