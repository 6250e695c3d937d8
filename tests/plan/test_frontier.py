"""Time–memory frontiers against every combination of options."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.plan.frontier import Frontier, chain_frontier, undominated

_small = st.integers(0, 4)


def _beaten(row: tuple[float, ...], others: set[tuple[float, ...]]) -> bool:
    return any(other != row and all(o <= r for o, r in zip(other, row, strict=True)) for other in others)


@given(st.integers(1, 4).flatmap(lambda m: st.lists(st.lists(_small, min_size=m, max_size=m), min_size=1, max_size=12)))
@settings(max_examples=200, deadline=None)
def test_what_stays_is_what_no_other_row_beats(rows: list[list[int]]) -> None:
    costs = np.array(rows, dtype=float)
    kept = costs[undominated(costs)]
    unique = {tuple(row) for row in costs}
    assert sorted(map(tuple, kept)) == sorted(row for row in unique if not _beaten(row, unique))


@given(st.lists(st.lists(st.tuples(_small, _small, _small), min_size=1, max_size=3), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_a_frontier_holds_the_undominated_sums_of_all_combinations(layers: list[list[tuple[int, int, int]]]) -> None:
    frontier = Frontier.empty(3)
    for options in layers:
        frontier = frontier.add(np.array(options, dtype=float))
    sums = {tuple(float(x) for x in np.sum(choice, axis=0)) for choice in itertools.product(*layers)}
    assert sorted(map(tuple, frontier.costs)) == sorted(s for s in sums if not _beaten(s, sums))
    for cost, picks in zip(frontier.costs, frontier.picks, strict=True):
        chosen = [options[pick] for options, pick in zip(layers, picks, strict=True)]
        assert tuple(cost) == tuple(np.sum(chosen, axis=0))


@given(st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_a_chain_pays_for_every_change_of_option(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers, options = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    seconds = rng.integers(1, 6, (layers, options)).astype(float)
    nbytes = rng.integers(1, 6, (layers, options)).astype(float)
    kind = rng.integers(0, 2, options)  # options of one kind change into each other for nothing
    hop = np.where(kind[:, None] == kind[None, :], 0.0, 2.0)
    limit = 4.0 * layers
    sums: set[tuple[float, ...]] = set()
    for picks in itertools.product(range(options), repeat=layers):
        time = sum(seconds[n, p] for n, p in enumerate(picks)) + sum(hop[a, b] for a, b in itertools.pairwise(picks))
        held = sum(nbytes[n, p] for n, p in enumerate(picks))
        if held <= limit:
            sums.add((float(time), float(held)))
    if not sums:
        with pytest.raises(PlanError, match="no choice of options"):
            chain_frontier(seconds, nbytes, hop, limit)
        return
    frontier = chain_frontier(seconds, nbytes, hop, limit)
    assert sorted(map(tuple, frontier.costs)) == sorted(s for s in sums if not _beaten(s, sums))
    for (time, _), picks in zip(frontier.costs, frontier.picks, strict=True):
        hops = sum(hop[a, b] for a, b in itertools.pairwise(picks))
        assert time == sum(seconds[n, p] for n, p in enumerate(picks)) + hops


def test_forty_equal_layers_have_as_many_trade_offs_as_layers() -> None:
    """Fast and fat or slow and lean, forty times: what counts is how many are lean."""
    seconds, nbytes = np.tile((1.0, 2.0), (40, 1)), np.tile((9.0, 4.0), (40, 1))
    frontier = chain_frontier(seconds, nbytes, np.zeros((2, 2)), 1e9)
    assert [tuple(row) for row in frontier.costs] == [(40.0 + n, 360.0 - 5 * n) for n in range(41)]


def test_what_never_fits_says_how_much_the_leanest_choice_needs() -> None:
    with pytest.raises(PlanError, match=r"2 layers fits in 5\.00 GB: the leanest needs 6\.00 GB"):
        chain_frontier(np.ones((2, 2)), np.array([[3e9, 4e9], [9e9, 3e9]]), np.zeros((2, 2)), 5e9)
