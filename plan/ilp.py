"""The assignment problem as an integer linear program, with a hard memory limit, by PuLP.

Binary s[v, p] says that node v takes strategy p; e[u, v, p, q], the product of two, is linearised by its row and column
sums and may stay continuous. Source: Zheng et al., Alpa, OSDI 2022, section 4.2, equation 1.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
import pulp

from meshwright.errors import PlanError
from meshwright.plan.assignment import Assignment, FloatArray, Problem
from meshwright.plan.reduction import IntArray, worthwhile_strategies

Solver = Literal["highs", "cbc"]

_LARGEST_COST = 1e3  # in the solver's unit: its absolute tolerances, 1e-5 at worst, are then 1e-8 of the largest cost
_TOLERANCE = 1e-9  # of a constraint, in HiGHS


def solve_ilp(
    problem: Problem,
    fixed: Mapping[int, int] | None = None,
    time_limit_seconds: float = 60.0,
    solver: Solver = "highs",
) -> Assignment:
    """The best assignment, ``fixed`` nodes held, within the problem's memory limit.

    HiGHS answers; CBC where ``highspy`` is not installed. At the time limit the best found is returned with its gap.
    The limit is kept to the last byte: where an answer oversteps it within the solver's tolerance, it is cut off and
    the solver asked again.
    Errors: PlanError if no assignment is possible (where memory is the reason, with the least that would do), or none
    was found in time, or ``fixed`` names a node or strategy that does not exist.
    """
    start = perf_counter()
    if solver == "highs" and importlib.util.find_spec("highspy") is None:
        solver = "cbc"
    held = dict(fixed or {})
    for v, strategy in held.items():
        if not 0 <= v < problem.nodes or not 0 <= strategy < problem.node_seconds[v].size:
            raise PlanError(
                f"node {v} cannot be fixed to strategy {strategy}: the problem has no such node or strategy"
            )
    left = worthwhile_strategies(problem, held)
    program = _program(problem, left)
    while True:
        seconds_left = time_limit_seconds - (perf_counter() - start)
        if program.chosen:
            program.model.solve(_backend(solver, max(seconds_left, 0.0)))
            status = program.model.sol_status
        else:  # nothing to choose: every node has one strategy left
            status = pulp.LpSolutionOptimal
        if status == pulp.LpSolutionInfeasible:
            raise PlanError(_why_infeasible(problem, held, time_limit_seconds, solver))
        if status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            raise PlanError(f"the ILP found no assignment in {time_limit_seconds:g} s; allow more time")
        choice = program.choice()
        if problem.memory_limit_bytes is None or problem.bytes(choice) <= problem.memory_limit_bytes:
            break
        if not program.chosen:
            raise PlanError(_why_infeasible(problem, held, time_limit_seconds, solver))
        if seconds_left <= 0:
            raise PlanError(f"the ILP found no assignment in {time_limit_seconds:g} s; allow more time")
        program.cut_off(problem, choice)
    seconds = problem.seconds(choice)
    gap = 0.0 if status == pulp.LpSolutionOptimal else _gap(seconds, program.bound_seconds(solver))
    return Assignment(choice, seconds, problem.bytes(choice), gap, solver)


@dataclass(slots=True)
class _Program:
    """An integer program and what its variables mean."""

    model: Any
    chosen: dict[tuple[int, int], Any]  # binary of each (node, strategy), where the node has a choice
    left: tuple[IntArray, ...]
    unit_seconds: float  # the model's objective is (seconds - offset_seconds) / unit_seconds
    offset_seconds: float

    def choice(self) -> tuple[int, ...]:
        def value(v: int, p: int) -> float:
            return self.chosen[v, p].varValue or 0.0 if (v, p) in self.chosen else 1.0

        return tuple(int(max(ps, key=lambda p: value(v, p))) for v, ps in enumerate(self.left))

    def cut_off(self, problem: Problem, choice: tuple[int, ...]) -> None:
        """Forbid a choice whose bytes are too many, and with it all that need no fewer at any node."""
        assert problem.node_bytes is not None
        heavy = [x for (v, p), x in self.chosen.items() if problem.node_bytes[v][p] >= problem.node_bytes[v][choice[v]]]
        self.model += pulp.lpSum(heavy) <= len({v for v, _ in self.chosen}) - 1

    def bound_seconds(self, solver: Solver) -> float:
        """What the optimum is at least. PuLP does not read CBC's bound: every cost of the model is at least 0."""
        if solver == "cbc":
            return self.offset_seconds
        bound = float(self.model.solverModel.getInfo().mip_dual_bound)
        return self.offset_seconds + self.unit_seconds * max(bound, 0.0)


def _program(problem: Problem, left: tuple[IntArray, ...]) -> _Program:
    """The program over the strategies left: a node with a single one, and its edges, fold into their neighbours.

    Each cost is counted from the least of its node or edge, so that the model's numbers are differences that matter,
    none is negative, and the sum of the leasts is a lower bound by itself.
    """
    nodes = [costs[ps] for costs, ps in zip(problem.node_seconds, left, strict=True)]
    edges: dict[tuple[int, int], FloatArray] = {}
    for (u, v), costs in sorted(problem.edge_seconds.items()):
        part = costs[np.ix_(left[u], left[v])]
        if left[v].size == 1:
            nodes[u] = nodes[u] + part[:, 0]
        elif left[u].size == 1:
            nodes[v] = nodes[v] + part[0]
        else:
            edges[u, v] = part
    offset = sum(float(costs.min()) for costs in (*nodes, *edges.values()))
    nodes = [costs - costs.min() for costs in nodes]
    edges = {edge: costs - costs.min() for edge, costs in edges.items()}
    largest = max((float(costs[np.isfinite(costs)].max()) for costs in (*nodes, *edges.values())), default=0.0)
    unit = largest / _LARGEST_COST or 1.0

    model = pulp.LpProblem("assignment", pulp.LpMinimize)
    terms: list[tuple[Any, float]] = []
    chosen: dict[tuple[int, int], Any] = {}
    for v, ps in enumerate(left):
        if ps.size > 1:
            mine = [model.add_variable(f"s_{v}_{p}", cat="Binary") for p in ps]
            chosen.update({(v, int(p)): x for p, x in zip(ps, mine, strict=True)})
            terms += zip(mine, (nodes[v] / unit).tolist(), strict=True)
            model += pulp.lpSum(mine) == 1
    for (u, v), costs in edges.items():
        if costs.any():
            ends = [[chosen[w, int(p)] for p in left[w]] for w in (u, v)]
            terms += _product(model, (u, v), costs / unit, ends[0], ends[1])
    if problem.memory_limit_bytes is not None and problem.node_bytes is not None:
        _limit_memory(model, problem.node_bytes, problem.memory_limit_bytes, left, chosen)
    model.setObjective(pulp.LpAffineExpression(terms))
    return _Program(model, chosen, left, unit, offset)


def _product(
    model: Any, edge: tuple[int, int], costs: FloatArray, rows: list[Any], columns: list[Any]
) -> list[tuple[Any, float]]:
    """Add the products of an edge's two choices, forbidden ones fixed to 0; returns their part of the objective."""
    u, v = edge
    allowed = np.isfinite(costs)
    products = [
        [model.add_variable(f"e_{u}_{v}_{i}_{j}", 0, int(allowed[i, j])) for j in range(len(columns))]
        for i in range(len(rows))
    ]
    for row, x in zip(products, rows, strict=True):
        model += pulp.lpSum(row) == x
    for column, x in zip(zip(*products, strict=True), columns, strict=True):
        model += pulp.lpSum(column) == x
    return [(products[i][j], float(costs[i, j])) for i, j in np.argwhere(allowed)]


def _limit_memory(
    model: Any,
    node_bytes: tuple[FloatArray, ...],
    limit_bytes: float,
    left: tuple[IntArray, ...],
    chosen: Mapping[tuple[int, int], Any],
) -> None:
    """Bytes above each node's least, in units of the largest of them, within what the limit leaves for them."""
    least = [float(resident[ps].min()) for resident, ps in zip(node_bytes, left, strict=True)]
    above = {(v, p): float(node_bytes[v][p]) - least[v] for v, p in chosen}
    unit = max(above.values(), default=0.0) or 1.0
    spare = (limit_bytes - sum(least)) / unit
    if spare < len(left):  # otherwise every choice fits
        model += pulp.LpAffineExpression([(chosen[key], extra / unit) for key, extra in above.items()]) <= spare


def _backend(solver: Solver, seconds: float) -> Any:
    if solver == "cbc":
        return pulp.PULP_CBC_CMD(msg=False, timeLimit=seconds, gapRel=0.0, gapAbs=0.0, threads=1)
    return pulp.HiGHS(
        msg=False,
        timeLimit=seconds,
        threads=1,
        gapRel=0.0,
        gapAbs=0.0,
        mip_feasibility_tolerance=_TOLERANCE,
        primal_feasibility_tolerance=_TOLERANCE,
        dual_feasibility_tolerance=_TOLERANCE,
    )


def _gap(seconds: float, bound_seconds: float) -> float:
    if seconds <= bound_seconds:
        return 0.0
    return (seconds - bound_seconds) / abs(seconds) if seconds else float("inf")


def _why_infeasible(problem: Problem, held: Mapping[int, int], time_limit_seconds: float, solver: Solver) -> str:
    """Tell too little memory from forbidden pairs by solving again for the least bytes, costs aside."""
    if problem.memory_limit_bytes is None or problem.node_bytes is None:
        return "no assignment is allowed: every combination of strategies meets a forbidden pair"
    leanest = Problem(
        tuple(
            np.where(np.isfinite(costs), resident, np.inf)
            for costs, resident in zip(problem.node_seconds, problem.node_bytes, strict=True)
        ),
        {edge: np.where(np.isfinite(costs), 0.0, np.inf) for edge, costs in problem.edge_seconds.items()},
    )
    try:
        found = solve_ilp(leanest, held, time_limit_seconds, solver)
    except PlanError as error:
        return str(error)
    needed = problem.bytes(found.choice)
    word = "needs" if found.gap == 0 else "that was found needs"
    return (
        f"the leanest assignment {word} {needed / 1e9:.6g} GB and {problem.memory_limit_bytes / 1e9:.6g} GB are there: "
        f"{(needed - problem.memory_limit_bytes) / 1e9:.3g} GB short; use more devices or a smaller micro-batch"
    )
