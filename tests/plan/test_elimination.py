"""Elimination against brute force for every choice of the kept nodes, and against the ILP where that is too slow."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.benchmarks.assignment import random_problem
from meshwright.errors import PlanError
from meshwright.plan import elimination
from meshwright.plan.assignment import Problem
from meshwright.plan.elimination import Elimination, TreewidthError, eliminate
from meshwright.plan.ilp import solve_ilp
from meshwright.plan.reduction import worthwhile_strategies
from tests.plan.assignment_problems import brute_force, problems


def backtracks_to_its_table(problem: Problem, result: Elimination) -> None:
    """Each finite entry is what the assignment behind it costs; an entry of +inf has none."""
    for kept, least in np.ndenumerate(result.table):
        if np.isinf(least):
            with pytest.raises(PlanError, match="no allowed assignment has strategies"):
                result.backtrack(kept)
        else:
            choice = result.backtrack(kept)
            assert tuple(choice[v] for v in result.keep) == kept
            assert problem.seconds(choice) == pytest.approx(least, rel=1e-9, abs=1e-18)


@given(problems(), st.data())
@settings(max_examples=250, deadline=None)
def test_the_table_equals_brute_force_for_every_choice_of_the_kept_nodes(problem: Problem, data: st.DataObject) -> None:
    keep = data.draw(st.permutations(range(problem.nodes)))[: data.draw(st.integers(0, 3))]
    result = eliminate(problem, keep)
    assert result.table.shape == tuple(problem.node_seconds[v].size for v in keep)
    for kept in product(*map(range, result.table.shape)):
        best = brute_force(problem, dict(zip(keep, kept, strict=True)))
        assert result.table[kept] == pytest.approx(best, rel=1e-9, abs=1e-18)
    backtracks_to_its_table(problem, result)


@given(problems())
@settings(max_examples=50, deadline=None)
def test_blocks_of_any_size_give_the_same_table(problem: Problem) -> None:
    """The size of a block is a matter of speed alone: here so small that every loop has several turns."""
    whole = eliminate(problem, (0,)).table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elimination, "_BLOCK_ENTRIES", 2)
        np.testing.assert_array_equal(eliminate(problem, (0,)).table, whole)


@pytest.mark.parametrize("seed", range(6))
def test_it_agrees_with_the_ilp_on_fifteen_nodes(seed: int) -> None:
    problem = random_problem(seed, nodes=15, treewidth=3, strategies=4, density=0.8)
    result = eliminate(problem, keep=(14, 0))
    backtracks_to_its_table(problem, result)
    kept = np.unravel_index(seed, result.table.shape)
    found = solve_ilp(problem, fixed={14: int(kept[0]), 0: int(kept[1])})
    assert found.seconds == pytest.approx(float(result.table[kept]), rel=1e-9)
    assert solve_ilp(problem).seconds == pytest.approx(float(result.table.min()), rel=1e-9)


@given(problems(nodes=5, limited=True), st.sampled_from([0.0, 1e-9, 1.0]))
@settings(max_examples=50, deadline=None)
def test_a_price_adds_its_bytes_to_the_cost(problem: Problem, price: float) -> None:
    assert problem.node_bytes is not None
    priced = tuple(c + price * b for c, b in zip(problem.node_seconds, problem.node_bytes, strict=True))
    least = brute_force(Problem(priced, problem.edge_seconds))
    assert eliminate(problem, price_seconds_per_byte=price).table == pytest.approx(least, rel=1e-9, abs=1e-18)


def test_ties_go_to_the_lowest_strategy() -> None:
    ring = {(0, 1): np.zeros((3, 3)), (1, 2): np.zeros((3, 3)), (0, 2): np.zeros((3, 3))}
    assert eliminate(Problem((np.zeros(3),) * 3, ring), keep=(1,)).backtrack((2,)) == (0, 2, 0)


@given(problems())
@settings(max_examples=30, deadline=None)
def test_the_same_problem_twice_gives_the_same_choice(problem: Problem) -> None:
    first, second = eliminate(problem), eliminate(problem)
    np.testing.assert_array_equal(first.table, second.table)
    if np.isfinite(first.table):
        assert first.backtrack(()) == second.backtrack(())


def test_a_chain_of_any_length_has_treewidth_one() -> None:
    """50 nodes in a row, whose ends are kept: no table is larger than two nodes' strategies."""
    chain = {(v, v + 1): np.ones((5, 5)) - np.eye(5) for v in range(49)}
    table = eliminate(Problem((np.zeros(5),) * 50, chain), keep=(0, 49), max_table_entries=25).table
    np.testing.assert_array_equal(table, np.ones((5, 5)) - np.eye(5))


@given(problems(), st.data())
@settings(max_examples=100, deadline=None)
def test_strategies_dropped_first_change_no_entry(problem: Problem, data: st.DataObject) -> None:
    """What large problems do to save work, done here to small ones."""
    keep = data.draw(st.permutations(range(problem.nodes)))[: data.draw(st.integers(0, 2))]
    whole = eliminate(problem, keep).table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elimination, "_REDUCE_ABOVE_ENTRIES", 0)
        reduced = eliminate(problem, keep)
    np.testing.assert_allclose(reduced.table, whole, rtol=1e-9, atol=1e-18)
    backtracks_to_its_table(problem, reduced)


def test_a_graph_of_high_treewidth_is_left_to_the_ilp() -> None:
    """Eight nodes all of which are neighbours: the first to go leaves a table over the other seven."""
    problem = random_problem(seed=0, nodes=8, treewidth=7, strategies=3)
    assert [ps.size for ps in worthwhile_strategies(problem)] == [3] * 8
    with pytest.raises(TreewidthError, match=r"table of 2,187 entries and 2,186 are allowed; .* with the ILP"):
        eliminate(problem, max_table_entries=3**7 - 1)
    assert eliminate(problem, max_table_entries=3**7).table == pytest.approx(brute_force(problem), rel=1e-9)


def test_a_table_that_is_too_large_only_with_superfluous_strategies_is_made() -> None:
    clique = {(u, v): np.ones((3, 3)) for u in range(8) for v in range(u + 1, 8)}
    result = eliminate(Problem((np.zeros(3),) * 8, clique), keep=(2,), max_table_entries=3)
    assert result.table.tolist() == [28, 28, 28]
    assert result.backtrack((2,)) == (0, 0, 2, 0, 0, 0, 0, 0)


def test_too_many_kept_nodes_are_refused() -> None:
    with pytest.raises(TreewidthError, match="table of 64 entries and 63 are allowed; keep fewer nodes"):
        eliminate(Problem((np.zeros(4),) * 3), keep=(0, 1, 2), max_table_entries=63)


@pytest.mark.parametrize("keep", [(0, 0), (2,), (-1,)])
def test_kept_nodes_are_different_and_exist(keep: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="must name different nodes of 0 to 1"):
        eliminate(Problem((np.zeros(2),) * 2), keep)


@pytest.mark.parametrize("kept", [(), (0, 0), (2,), (-1,)])
def test_a_choice_that_does_not_fit_the_kept_nodes_is_refused(kept: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="do not fit the kept nodes"):
        eliminate(Problem((np.zeros(2),) * 2), keep=(1,)).backtrack(kept)
