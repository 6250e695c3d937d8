"""The ILP and the elimination against brute force: every assignment of every small graph."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.plan.assignment import Problem
from meshwright.plan.elimination import TreewidthError, eliminate
from meshwright.plan.ilp import solve_ilp


@st.composite
def problems(draw: st.DrawFn, nodes: int = 6, limited: bool = False) -> Problem:
    count = draw(st.integers(1, nodes))
    sizes = [draw(st.integers(1, 4)) for _ in range(count)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1e-6, 1.0]))
    node_seconds = [rng.integers(0, 50, size) * scale for size in sizes]
    edges = {}
    for u in range(count):
        for v in range(u + 1, count):
            if draw(st.booleans()):
                costs = rng.integers(0, 50, (sizes[u], sizes[v])) * scale
                costs[rng.random(costs.shape) < 0.1] = np.inf
                edges[u, v] = costs
    if not limited:
        return Problem(tuple(node_seconds), edges)
    node_bytes = tuple(rng.integers(0, 20, size).astype(float) for size in sizes)
    limit = float(draw(st.integers(0, 20 * count)))
    return Problem(tuple(node_seconds), edges, node_bytes, limit)


def brute_force(problem: Problem, held: dict[int, int] | None = None) -> float:
    """Least seconds over all assignments; +inf if none is allowed."""
    limit = np.inf if problem.memory_limit_bytes is None else problem.memory_limit_bytes
    every = product(*(range(c.size) for c in problem.node_seconds))
    allowed = (c for c in every if all(c[v] == s for v, s in (held or {}).items()) and problem.bytes(c) <= limit)
    return min((problem.seconds(choice) for choice in allowed), default=np.inf)


@given(problems())
@settings(max_examples=80, deadline=None)
def test_the_ilp_equals_brute_force_on_graphs_of_up_to_six_operators(problem: Problem) -> None:
    best = brute_force(problem)
    if np.isinf(best):
        with pytest.raises(PlanError, match=r"forbidden pair|no strategy"):
            solve_ilp(problem)
    else:
        found = solve_ilp(problem)
        assert found.gap == 0
        assert found.seconds == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert problem.seconds(found.choice) == found.seconds


@given(problems(nodes=5, limited=True))
@settings(max_examples=60, deadline=None)
def test_a_memory_limit_is_kept_and_the_rest_is_still_optimal(problem: Problem) -> None:
    best = brute_force(problem)
    if np.isinf(best):
        with pytest.raises(PlanError):
            solve_ilp(problem)
    else:
        found = solve_ilp(problem)
        assert found.bytes <= (problem.memory_limit_bytes or 0)
        assert found.seconds == pytest.approx(best, rel=1e-9, abs=1e-12)


@given(problems(nodes=4))
@settings(max_examples=10, deadline=None)
def test_cbc_agrees_with_highs(problem: Problem) -> None:
    if np.isfinite(brute_force(problem)):
        highs, cbc = solve_ilp(problem), solve_ilp(problem, solver="cbc")
        assert cbc.seconds == pytest.approx(highs.seconds, rel=1e-6, abs=1e-12)


@given(problems(), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_elimination_gives_the_best_for_every_choice_of_the_kept_nodes(problem: Problem, kept: int) -> None:
    keep = tuple(range(min(kept, problem.nodes)))[::-1]
    result = eliminate(problem, keep)
    for choice in product(*(range(problem.node_seconds[v].size) for v in keep)):
        best = brute_force(problem, dict(zip(keep, choice, strict=True)))
        assert result.table[choice] == pytest.approx(best, rel=1e-9, abs=1e-12)
        if np.isfinite(best):
            whole = result.backtrack(choice)
            assert [whole[v] for v in keep] == list(choice)
            assert problem.seconds(whole) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_elimination_and_the_ilp_agree_on_a_graph_too_large_for_brute_force() -> None:
    rng = np.random.default_rng(7)
    nodes = tuple(rng.random(6) for _ in range(15))
    edges = {(v - back, v): rng.random((6, 6)) for v in range(1, 15) for back in (1, 3) if v >= back}
    problem = Problem(nodes, edges)
    assert solve_ilp(problem).seconds == pytest.approx(float(eliminate(problem).table), rel=1e-9)


def test_memory_may_be_priced_instead_of_limited() -> None:
    problem = Problem((np.array([1.0, 2.0]),), {}, (np.array([10.0, 0.0]),))
    assert eliminate(problem).backtrack(()) == (0,)
    assert eliminate(problem, price_seconds_per_byte=1.0).backtrack(()) == (1,)


def test_a_shortage_of_memory_is_named_in_gigabytes() -> None:
    problem = Problem((np.zeros(2),), {}, (np.array([3e9, 4e9]),), memory_limit_bytes=1e9)
    with pytest.raises(PlanError, match="needs 3 GB and 1 GB are there: 2 GB short"):
        solve_ilp(problem)


def test_a_graph_of_high_treewidth_is_left_to_the_ilp() -> None:
    clique = {(u, v): np.ones((3, 3)) for u in range(8) for v in range(u + 1, 8)}
    with pytest.raises(TreewidthError):
        eliminate(Problem((np.zeros(3),) * 8, clique), max_table_entries=3**6)


@pytest.mark.parametrize(
    ("nodes", "edges"),
    [
        ((np.array([]),), {}),
        ((np.array([np.nan]),), {}),
        ((np.zeros(2), np.zeros(2)), {(1, 0): np.zeros((2, 2))}),
        ((np.zeros(2), np.zeros(2)), {(0, 1): np.zeros((2, 3))}),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused_at_birth(nodes: tuple, edges: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(PlanError):
        Problem(nodes, edges)
