"""The assignment problem as an integer linear program, with a hard memory limit, by PuLP.

Binary s[v, p] says that node v takes strategy p; e[u, v, p, q], the product of two, is linearised by its row and column
sums and may stay continuous. Source: Zheng et al., Alpa, OSDI 2022, section 4.2, equation 1.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pulp

from meshwright.errors import PlanError
from meshwright.plan.assignment import Assignment, Problem

Solver = Literal["highs", "cbc"]


def solve_ilp(
    problem: Problem,
    fixed: Mapping[int, int] | None = None,
    time_limit_seconds: float = 60.0,
    solver: Solver = "highs",
) -> Assignment:
    """The best assignment, ``fixed`` nodes held, within the problem's memory limit.

    HiGHS answers; CBC where ``highspy`` is not installed. At the time limit the best found is returned with its gap.
    Errors: PlanError if none is possible; where memory is the reason, with the least that would do.
    """
    if solver == "highs" and importlib.util.find_spec("highspy") is None:
        solver = "cbc"
    held = dict(fixed or {})
    allowed = [
        [p for p in range(costs.size) if np.isfinite(costs[p]) and held.get(v, p) == p]
        for v, costs in enumerate(problem.node_seconds)
    ]
    if not all(allowed):
        raise PlanError(f"node {allowed.index([])} has no strategy that is allowed")
    scale = _scale(problem)
    model = pulp.LpProblem("layer", pulp.LpMinimize)
    chosen = {(v, p): model.add_variable(f"s_{v}_{p}", cat="Binary") for v, ps in enumerate(allowed) for p in ps}
    terms: list[tuple[Any, float]] = [(x, float(problem.node_seconds[v][p]) / scale) for (v, p), x in chosen.items()]
    for v, strategies in enumerate(allowed):
        model += pulp.lpSum(chosen[v, p] for p in strategies) == 1
    for (u, v), costs in sorted(problem.edge_seconds.items()):
        _link(model, terms, (u, v), costs / scale, chosen, allowed)
    if problem.memory_limit_bytes is not None and problem.node_bytes is not None:
        unit = max(1.0, *(float(b.max()) for b in problem.node_bytes))
        used = pulp.LpAffineExpression([(x, float(problem.node_bytes[v][p]) / unit) for (v, p), x in chosen.items()])
        model += used <= problem.memory_limit_bytes / unit
    model.setObjective(pulp.LpAffineExpression(terms))
    model.solve(_backend(solver, time_limit_seconds))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise PlanError(_why_infeasible(problem, held, allowed, model.sol_status))
    choice = tuple(max(ps, key=lambda p: chosen[v, p].varValue or 0.0) for v, ps in enumerate(allowed))
    proved = model.sol_status == pulp.LpSolutionOptimal and model.status == pulp.LpStatusOptimal
    return Assignment(choice, problem.seconds(choice), problem.bytes(choice), 0.0 if proved else float("inf"), solver)


def _link(
    model: Any,
    terms: list[tuple[Any, float]],
    edge: tuple[int, int],
    costs: Any,
    chosen: Mapping[tuple[int, int], Any],
    allowed: list[list[int]],
) -> None:
    """Add the products of an edge's two choices, or forbid pairs, or nothing where the edge costs nothing."""
    u, v = edge
    rows, columns = allowed[u], allowed[v]
    part = costs[np.ix_(rows, columns)]
    if not part.any():
        return
    product = {
        (p, q): model.add_variable(f"e_{u}_{v}_{p}_{q}", 0, 1 if np.isfinite(costs[p, q]) else 0)
        for p in rows
        for q in columns
    }
    for p in rows:
        model += pulp.lpSum(product[p, q] for q in columns) == chosen[u, p]
    for q in columns:
        model += pulp.lpSum(product[p, q] for p in rows) == chosen[v, q]
    terms += [(x, float(costs[pair])) for pair, x in product.items() if np.isfinite(costs[pair])]


def _scale(problem: Problem) -> float:
    """The largest finite cost: solvers' tolerances are absolute, and seconds of an operator are tiny."""
    every = [*problem.node_seconds, *problem.edge_seconds.values()]
    return max((float(np.abs(c[np.isfinite(c)]).max()) for c in every if np.isfinite(c).any()), default=1.0) or 1.0


def _backend(solver: Solver, seconds: float) -> Any:
    if solver == "highs":
        return pulp.HiGHS(msg=False, timeLimit=seconds, threads=1, gapRel=0.0)
    return pulp.PULP_CBC_CMD(msg=False, timeLimit=seconds, gapRel=0.0)


def _why_infeasible(problem: Problem, held: Mapping[int, int], allowed: list[list[int]], status: int) -> str:
    if status == pulp.LpSolutionNoSolutionFound:
        return "the ILP found no assignment in its time limit; allow more time"
    if problem.memory_limit_bytes is None or problem.node_bytes is None:
        return "no assignment is allowed: every combination of strategies meets a forbidden pair"
    least = sum(float(min(b[p] for p in ps)) for b, ps in zip(problem.node_bytes, allowed, strict=True))
    lacking = least - problem.memory_limit_bytes
    if lacking > 0:
        return (
            f"the leanest assignment needs {least / 1e9:.3g} GB and {problem.memory_limit_bytes / 1e9:.3g} GB are "
            f"there: {lacking / 1e9:.3g} GB short"
        )
    return f"no allowed assignment fits in {problem.memory_limit_bytes / 1e9:.3g} GB ({len(held)} nodes held)"
