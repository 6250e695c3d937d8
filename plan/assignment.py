"""The assignment problem behind intra-operator planning: one strategy per node, pairwise costs on edges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import PlanError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Choose one strategy per node so that node and edge seconds sum to the least; +inf forbids.

    node_seconds[v]: (strategies of v,); edge_seconds[u, v], u < v: (strategies of u, strategies of v);
    node_bytes[v]: resident bytes of each strategy; their sum over the nodes is at most ``memory_limit_bytes``, if any.
    Errors: PlanError if shapes disagree, or a cost is NaN or -inf, or bytes are negative or not finite.
    """

    node_seconds: tuple[FloatArray, ...]
    edge_seconds: Mapping[tuple[int, int], FloatArray] = field(default_factory=dict)
    node_bytes: tuple[FloatArray, ...] | None = None
    memory_limit_bytes: float | None = None

    def __post_init__(self) -> None:
        for v, costs in enumerate(self.node_seconds):
            if costs.ndim != 1 or costs.size == 0:
                raise PlanError(
                    f"node {v} has costs of shape {costs.shape}; one row of at least one strategy is needed"
                )
            _check_costs(f"node {v}", costs)
        for (u, v), costs in self.edge_seconds.items():
            if not 0 <= u < v < len(self.node_seconds):
                raise PlanError(f"edge ({u}, {v}) does not run between two of {len(self.node_seconds)} nodes in order")
            wanted = (self.node_seconds[u].size, self.node_seconds[v].size)
            if costs.shape != wanted:
                raise PlanError(f"edge ({u}, {v}) has shape {costs.shape}; its nodes have {wanted} strategies")
            _check_costs(f"edge ({u}, {v})", costs)
        if self.node_bytes is not None:
            if [b.shape for b in self.node_bytes] != [c.shape for c in self.node_seconds]:
                raise PlanError("node bytes and node seconds differ in shape")
            if any(not (np.isfinite(b).all() and (b >= 0).all()) for b in self.node_bytes):
                raise PlanError("node bytes are finite and at least 0")
        if self.memory_limit_bytes is not None and (self.node_bytes is None or not self.memory_limit_bytes >= 0):
            raise PlanError(f"a memory limit of {self.memory_limit_bytes} needs node bytes and is at least 0")

    @property
    def nodes(self) -> int:
        return len(self.node_seconds)

    def seconds(self, choice: Sequence[int]) -> float:
        """The cost of an assignment."""
        total = sum((float(costs[s]) for costs, s in zip(self.node_seconds, choice, strict=True)), 0.0)
        return total + sum(float(costs[choice[u], choice[v]]) for (u, v), costs in self.edge_seconds.items())

    def bytes(self, choice: Sequence[int]) -> float:
        """The resident bytes of an assignment; 0 if none are given."""
        if self.node_bytes is None:
            return 0.0
        return sum((float(b[s]) for b, s in zip(self.node_bytes, choice, strict=True)), 0.0)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A solution. ``gap``: the optimum is proved to be at least seconds - gap * |seconds|; 0 when this is one."""

    choice: tuple[int, ...]
    seconds: float
    bytes: float
    gap: float
    solver: str


def _check_costs(name: str, costs: FloatArray) -> None:
    if np.isnan(costs).any() or (costs == -np.inf).any():
        raise PlanError(f"{name} has a cost that is no number; costs are finite, or +inf where forbidden")
