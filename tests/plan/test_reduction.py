"""Strategies that go are not missed: the optimum of what is left is the optimum of all."""

import numpy as np
import pytest
from hypothesis import given, settings

from meshwright.errors import PlanError
from meshwright.plan.assignment import Problem
from meshwright.plan.reduction import worthwhile_strategies
from tests.plan.assignment_problems import brute_force, every_assignment, problems


@given(problems(nodes=5, limited=True))
@settings(max_examples=200, deadline=None)
def test_an_optimal_assignment_is_always_left(problem: Problem) -> None:
    best = brute_force(problem)
    try:
        left = worthwhile_strategies(problem)
    except PlanError:
        assert np.isinf(best)
        return
    inside = [c for c in every_assignment(problem) if all(s in ps for s, ps in zip(c, left, strict=True))]
    assert min(map(problem.seconds, inside), default=np.inf) == pytest.approx(best, rel=1e-12, abs=1e-18)


def test_a_strategy_never_better_goes_and_of_equals_the_lowest_stays() -> None:
    problem = Problem((np.array([2.0, 1.0, 1.0, 3.0]),))
    assert [ps.tolist() for ps in worthwhile_strategies(problem)] == [[1]]


def test_a_cheaper_node_may_pay_for_dearer_edges() -> None:
    """No row dominates: strategy 1 costs 9 less by itself and at most 2 more at the edge."""
    problem = Problem((np.array([10.0, 1.0]), np.array([0.0, 0.0])), {(0, 1): np.array([[0.0, 1.0], [2.0, 0.0]])})
    assert [ps.tolist() for ps in worthwhile_strategies(problem)] == [[1], [1]]


def test_a_lean_strategy_stays_where_memory_is_limited() -> None:
    seconds, resident = (np.array([1.0, 2.0]),), (np.array([8.0, 4.0]),)
    assert worthwhile_strategies(Problem(seconds, {}, resident))[0].tolist() == [0]
    assert worthwhile_strategies(Problem(seconds, {}, resident, memory_limit_bytes=4.0))[0].tolist() == [0, 1]


def test_kept_nodes_have_all_of_theirs_and_the_rest_suffices_for_each() -> None:
    """By itself strategy 1 of the second node never pays; with strategy 1 of the kept first node it does."""
    problem = Problem((np.array([0.0, 9.0, np.inf]), np.zeros(2)), {(0, 1): np.array([[0.0, 1], [2, 0], [0, 0]])})
    assert [ps.tolist() for ps in worthwhile_strategies(problem)] == [[0], [0]]
    assert [ps.tolist() for ps in worthwhile_strategies(problem, keep=(0,))] == [[0, 1, 2], [0, 1]]


def test_a_fixed_node_keeps_its_strategy_and_forbids_along_the_chain() -> None:
    equal = np.where(np.eye(3) == 1, 0.0, np.inf)
    chain = Problem((np.zeros(3),) * 3, {(0, 1): equal, (1, 2): equal})
    assert [ps.tolist() for ps in worthwhile_strategies(chain, {0: 2})] == [[2], [2], [2]]
    with pytest.raises(PlanError, match="each strategy of node 1 is forbidden"):
        worthwhile_strategies(chain, {0: 2, 2: 1})
