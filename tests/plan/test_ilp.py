"""The ILP against brute force on every small graph, with both solvers, to the last byte of memory."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.benchmarks.assignment import random_problem
from meshwright.errors import PlanError
from meshwright.plan.assignment import Problem
from meshwright.plan.elimination import eliminate
from meshwright.plan.ilp import Solver, solve_ilp
from tests.plan.assignment_problems import brute_force, every_assignment, problems

pytestmark = pytest.mark.filterwarnings("ignore:PULP_CBC_CMD:DeprecationWarning")


def agrees_with_brute_force(problem: Problem, solver: Solver = "highs", fixed: dict[int, int] | None = None) -> None:
    best = brute_force(problem, fixed)
    if np.isinf(best):
        with pytest.raises(PlanError, match=r"no assignment is allowed|GB short"):
            solve_ilp(problem, fixed, solver=solver)
        return
    found = solve_ilp(problem, fixed, solver=solver)
    assert found.gap == 0
    assert found.solver == solver
    assert found.choice in every_assignment(problem, fixed)  # which keep the memory limit
    assert found.seconds == problem.seconds(found.choice) == pytest.approx(best, rel=1e-9, abs=1e-18)
    assert found.bytes == problem.bytes(found.choice)


@given(problems())
@settings(max_examples=150, deadline=None)
def test_it_equals_brute_force_on_graphs_of_up_to_six_nodes(problem: Problem) -> None:
    agrees_with_brute_force(problem)


@given(problems(limited=True))
@settings(max_examples=150, deadline=None)
def test_it_equals_brute_force_within_a_memory_limit(problem: Problem) -> None:
    agrees_with_brute_force(problem)


@given(problems(nodes=5, limited=True), st.data())
@settings(max_examples=60, deadline=None)
def test_it_equals_brute_force_with_a_node_held(problem: Problem, data: st.DataObject) -> None:
    node = data.draw(st.integers(0, problem.nodes - 1))
    agrees_with_brute_force(problem, fixed={node: data.draw(st.integers(0, problem.node_seconds[node].size - 1))})


@given(problems(nodes=5, limited=True))
@settings(max_examples=40, deadline=None)
def test_cbc_equals_brute_force_too(problem: Problem) -> None:
    agrees_with_brute_force(problem, solver="cbc")


@given(problems(limited=True))
@settings(max_examples=40, deadline=None)
def test_the_least_memory_it_names_is_the_least_that_works(problem: Problem) -> None:
    allowed = [
        c
        for c in every_assignment(Problem(problem.node_seconds, problem.edge_seconds))
        if np.isfinite(problem.seconds(c))
    ]
    if not allowed or np.isfinite(brute_force(problem)):
        return
    least = min(map(problem.bytes, allowed))
    with pytest.raises(PlanError) as caught:
        solve_ilp(problem)
    short = least - (problem.memory_limit_bytes or 0.0)
    assert f"needs {least / 1e9:.6g} GB" in str(caught.value)
    assert f"{short / 1e9:.3g} GB short" in str(caught.value)


def test_a_shortage_counts_only_what_forbidden_pairs_allow() -> None:
    """Two lean strategies that exclude each other do not make a lean assignment: 1 + 9 GB is the least."""
    apart = np.array([[np.inf, 0.0], [0.0, np.inf]])
    problem = Problem((np.zeros(2),) * 2, {(0, 1): apart}, (np.array([1e9, 9e9]),) * 2, memory_limit_bytes=5e9)
    with pytest.raises(PlanError, match="needs 10 GB and 5 GB are there: 5 GB short"):
        solve_ilp(problem)


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_the_limit_is_kept_to_the_last_byte(solver: Solver) -> None:
    """Six nodes of 10 GB or, for 1 s, half of that; one byte too few for all six at 10 GB."""
    problem = Problem((np.array([0.0, 1.0]),) * 6, {}, (np.array([1e10, 5e9]),) * 6, memory_limit_bytes=6e10 - 1)
    found = solve_ilp(problem, solver=solver)
    assert (found.seconds, found.bytes) == (1.0, 5.5e10)


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_a_microsecond_counts_beside_a_second(solver: Solver) -> None:
    """A frustrated triangle whose edges differ by microseconds, beside a node's choice between one second and two."""
    unlike = np.array([[1.0, 0.0], [0.0, 1.0]])
    edges = {(0, 1): 3e-6 * unlike, (0, 2): 2e-6 * unlike, (1, 2): 1e-6 * unlike}
    problem = Problem((np.array([1.0, 2.0]), np.zeros(2), np.zeros(2)), edges)
    found = solve_ilp(problem, solver=solver)
    assert found.choice == (0, 1, 1)
    assert found.seconds == pytest.approx(1 + 1e-6, rel=1e-12)


def test_an_endless_memory_limit_is_no_limit() -> None:
    assert solve_ilp(Problem((np.array([1.0, 2.0]),), {}, (np.array([2.0, 1.0]),), np.inf)).choice == (0,)


def test_a_problem_without_a_choice_needs_no_solver() -> None:
    problem = Problem((np.array([1.0]), np.array([2.0])), {(0, 1): np.array([[4.0]])}, (np.array([3e9]),) * 2, 5e9)
    with pytest.raises(PlanError, match="needs 6 GB and 5 GB are there: 1 GB short"):
        solve_ilp(problem)
    assert solve_ilp(Problem(problem.node_seconds, problem.edge_seconds)).seconds == 7


@pytest.mark.parametrize("fixed", [{5: 0}, {-1: 0}, {0: 2}, {0: -1}])
def test_a_node_or_strategy_that_does_not_exist_cannot_be_fixed(fixed: dict[int, int]) -> None:
    with pytest.raises(PlanError, match="cannot be fixed to strategy"):
        solve_ilp(Problem((np.zeros(2),)), fixed)


def test_cbc_stands_in_where_highspy_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "highspy" else found(name))
    assert solve_ilp(Problem((np.array([2.0, 1.0]),))).solver == "cbc"


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_no_time_is_said_to_be_too_little(solver: Solver) -> None:
    with pytest.raises(PlanError, match="found no assignment in 0 s; allow more time"):
        solve_ilp(random_problem(seed=0, nodes=24, treewidth=5, strategies=8), time_limit_seconds=0.0, solver=solver)


def test_stopped_early_it_returns_the_best_found_and_a_gap_that_covers_the_optimum() -> None:
    problem = random_problem(seed=0, nodes=24, treewidth=5, strategies=8)
    optimum = float(eliminate(problem).table)
    found = solve_ilp(problem, time_limit_seconds=3.0)
    assert 0 < found.gap < 1
    assert found.seconds * (1 - found.gap) <= optimum * (1 + 1e-9)
    assert optimum <= found.seconds * (1 + 1e-9)


@given(problems(limited=True))
@settings(max_examples=20, deadline=None)
def test_the_same_problem_twice_gives_the_same_choice(problem: Problem) -> None:
    if np.isfinite(brute_force(problem)):
        assert solve_ilp(problem) == solve_ilp(problem)
