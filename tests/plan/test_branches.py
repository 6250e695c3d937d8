"""Chains and forks of layers: known shapes, and hypothesis against the order itself."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.plan.branches import Chain, Fork, decompose, span


def chain(*parts: int | Fork) -> Chain:
    return Chain(parts)


def test_a_chain_has_no_forks() -> None:
    assert decompose(4, [(0, 1), (1, 2), (2, 3)]) == chain(0, 1, 2, 3)
    assert not decompose(4, [(0, 1), (1, 2), (2, 3)]).branches


def test_a_skip_connection_is_no_branch() -> None:
    assert decompose(4, [(0, 1), (1, 2), (2, 3), (0, 3)]) == chain(0, 1, 2, 3)


def test_two_towers_and_their_head() -> None:
    """0 → 1 ↘
             4
    2 → 3 ↗"""
    edges = [(0, 1), (2, 3), (1, 4), (3, 4)]
    assert decompose(5, edges) == chain(Fork((chain(0, 1), chain(2, 3))), 4)


def test_heads_on_a_trunk_and_a_fork_inside_a_branch() -> None:
    edges = [(0, 1), (1, 2), (2, 3), (1, 4), (1, 5), (4, 6), (5, 6)]
    inner = chain(Fork((chain(4), chain(5))), 6)
    assert decompose(7, edges) == chain(0, 1, Fork((chain(2, 3), inner)))


def test_what_is_no_series_and_no_fork_stays_a_chain() -> None:
    """The letter N: 0 → 2, 1 → 2, 1 → 3."""
    assert decompose(4, [(0, 2), (1, 2), (1, 3)]) == chain(0, 1, 2, 3)


def test_branches_whose_layers_alternate_stay_a_chain() -> None:
    assert decompose(5, [(0, 2), (1, 3), (2, 4), (3, 4)]) == chain(0, 1, 2, 3, 4)


def flat(part: int | Fork | Chain) -> list[int]:
    if isinstance(part, int):
        return [part]
    inner = part.parts if isinstance(part, Chain) else part.branches
    return [layer for each in inner for layer in flat(each)]


def apart(part: int | Fork | Chain) -> set[tuple[int, int]]:
    """Pairs of layers that the decomposition runs side by side."""
    if isinstance(part, int):
        return set()
    inner = part.parts if isinstance(part, Chain) else part.branches
    found = {pair for each in inner for pair in apart(each)}
    if isinstance(part, Fork):
        for one, other in combinations(part.branches, 2):
            found |= {(u, v) for u in flat(one) for v in flat(other)}
    return found


@given(
    st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.tuples(st.integers(0, 8), st.integers(0, 8)))))
)
def test_every_layer_is_there_once_in_order_and_no_edge_joins_branches(
    drawn: tuple[int, set[tuple[int, int]]],
) -> None:
    layers, pairs = drawn
    edges = [(u, v) for u, v in pairs if u < v < layers]
    found = decompose(layers, edges)
    assert flat(found) == list(range(layers))
    assert not apart(found) & set(edges)
    assert found.layers == (0, layers)


@pytest.mark.parametrize(("part", "layers"), [(3, (3, 4)), (Fork((chain(1, 2), chain(3))), (1, 4))])
def test_a_part_covers_its_layers(part: int | Fork, layers: tuple[int, int]) -> None:
    assert span(part) == layers
