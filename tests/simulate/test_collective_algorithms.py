"""Closed forms of collectives against algorithms played step by step, and measured fits."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.calibrate.link import CollectiveFit, Link, Piece
from meshwright.calibrate.quantity import Quantity
from meshwright.errors import ClusterError
from meshwright.simulate.algorithms import ALGORITHMS, CHOSEN, algorithm, best
from meshwright.simulate.collective import CollectiveKind, collective_parts, collective_seconds, port_bytes_per_second

KINDS: tuple[CollectiveKind, ...] = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "permute",
    "broadcast",
)


def q(value: float) -> Quantity:
    return Quantity(value, "test")


def fit(ranks: int, *lines: tuple[float, float], algorithm: str = "ring") -> CollectiveFit:
    (latency, rate), *others = lines
    return CollectiveFit(
        ranks=ranks,
        latency_seconds=q(latency),
        bytes_per_second=q(rate),
        pieces=tuple(Piece(latency_seconds=q(a), bytes_per_second=q(b)) for a, b in others),
        algorithm="nvls" if algorithm == "nvls" else "ring",
    )


def link(**collectives: tuple[CollectiveFit, ...]) -> Link:
    return Link(bytes_per_second=q(1e10), latency_seconds=q(1e-6), collectives=collectives)


def played_ring(ranks: int) -> tuple[np.ndarray, int]:
    """A ring all-reduce of ``ranks`` pieces that really adds: pieces sent by each rank, and steps."""
    values = np.random.default_rng(ranks).normal(size=(ranks, ranks))
    total, sent, steps = values.sum(axis=0), np.zeros(ranks), 0
    for phase in ("scatter", "gather"):
        for step in range(ranks - 1):
            moving = [(rank, (rank - step + (phase == "gather")) % ranks) for rank in range(ranks)]
            news = [((rank + 1) % ranks, piece, values[rank, piece]) for rank, piece in moving]
            for rank, piece, value in news:
                values[rank, piece] = value + (values[rank, piece] if phase == "scatter" else 0.0)
                sent[rank - 1] += 1
            steps += 1
    assert values == pytest.approx(np.tile(total, (ranks, 1)))
    return sent, steps


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_a_ring_that_adds_up_sends_what_the_formula_says(ranks: int) -> None:
    sent, steps = played_ring(ranks)
    ring = algorithm("all_reduce", "ring")
    assert steps == ring.hops(ranks)
    assert sent / ranks == pytest.approx(ring.share(ranks))


def played_halving(ranks: int) -> tuple[float, int]:
    """Recursive halving, then doubling: share of the array that each rank sends, and steps."""
    values = np.random.default_rng(ranks).normal(size=(ranks, ranks))
    total, held = values.sum(axis=0), [set(range(ranks)) for _ in range(ranks)]
    sent, steps, distance = 0, 0, ranks // 2
    while distance:
        before = values.copy()
        for rank in range(ranks):
            partner = rank ^ distance
            keep = {piece for piece in held[rank] if bool(piece & distance) == bool(rank & distance)}
            for piece in keep:
                values[rank, piece] += before[partner, piece]
            sent += len(held[rank] - keep)
            held[rank] = keep
        steps, distance = steps + 1, distance // 2
    distance = 1
    while distance < ranks:
        old, before = [set(pieces) for pieces in held], values.copy()
        for rank in range(ranks):
            partner = rank ^ distance
            for piece in old[partner]:
                values[rank, piece] = before[partner, piece]
            held[rank] = old[rank] | old[partner]
            sent += len(old[rank])
        steps, distance = steps + 1, distance * 2
    assert values == pytest.approx(np.tile(total, (ranks, 1)))
    return sent / ranks / ranks, steps


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_halving_and_doubling_send_as_much_as_a_ring_in_fewer_steps(ranks: int) -> None:
    share, steps = played_halving(ranks)
    form = algorithm("all_reduce", "halving_doubling")
    assert steps == form.hops(ranks)
    assert share == pytest.approx(form.share(ranks))
    assert form.share(ranks) == pytest.approx(algorithm("all_reduce", "ring").share(ranks))


def played_chain(ranks: int, chunks: int) -> int:
    """Steps until the last rank of a chain has all chunks; each rank passes one chunk on in a step."""
    has, steps = [chunks] + [0] * (ranks - 1), 0
    while has[-1] < chunks:
        has = [chunks] + [has[i] + (has[i - 1] > has[i]) for i in range(1, ranks)]
        steps += 1
    return steps


@pytest.mark.parametrize("ranks", [2, 3, 5, 9])
def test_a_pipelined_chain_takes_as_long_as_its_best_number_of_chunks(ranks: int) -> None:
    alpha, wire = 1e-6, 1e-3
    form = algorithm("broadcast", "chain").parts(1e6, ranks, alpha, 1e9)
    played = [played_chain(ranks, chunks) * (alpha + wire / chunks) for chunks in range(1, 200)]
    assert form.seconds <= min(played) * (1 + 1e-9)
    if ranks > 2:  # with more chunks than 200 nothing is won here
        assert form.seconds == pytest.approx(min(played), rel=1e-3)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
def test_folding_ranks_beyond_a_power_of_two_costs_more(kind: str) -> None:
    form = ALGORITHMS[kind]["halving_doubling"]
    assert form.hops(6) > form.hops(4)
    assert form.share(6) > form.share(8)


def test_the_tree_wins_where_ranks_are_many_and_messages_small() -> None:
    def ring(size: float, ranks: int) -> float:
        return algorithm("all_reduce", "ring").parts(size, ranks, 1e-5, 1e10).seconds

    assert best("all_reduce", 1e3, 512, 1e-5, 1e10).seconds < ring(1e3, 512) / 10
    assert best("all_reduce", 1e9, 8, 1e-5, 1e10).seconds == ring(1e9, 8)


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ClusterError, match="known are ring"):
        algorithm("all_gather", "gossip")
    with pytest.raises(ClusterError, match="known are all_reduce"):
        algorithm("gossip", "ring")
    assert all(name in ALGORITHMS[kind] for kind, names in CHOSEN.items() for name in names)


def test_a_fit_of_pieces_is_the_least_of_them() -> None:
    measured = link(all_reduce=(fit(4, (3e-5, 5e9), (1e-5, 1e9)),))
    assert collective_seconds("all_reduce", 1e3, 4, measured) == pytest.approx(1.1e-5)
    assert collective_seconds("all_reduce", 1e9, 4, measured) == pytest.approx(0.2 + 3e-5)


def test_pieces_carry_over_to_other_sizes_of_group() -> None:
    """Both pieces of a ring of 4 give that ring back at 8 ranks."""
    hop = {"slow": (2e-6, 1e10), "quick": (1e-6, 2e9)}
    lines = [(6 * alpha, rate * 4 / 6) for alpha, rate in hop.values()]
    for size in (1e3, 1e8):
        expected = min(14 * alpha + 14 / 8 * size / rate for alpha, rate in hop.values())
        assert collective_seconds("all_reduce", size, 8, link(all_reduce=(fit(4, *lines),))) == pytest.approx(expected)


def test_a_switch_adds_16_bits_and_more_but_not_8() -> None:
    switch, ring = fit(8, (2e-5, 2e11), algorithm="nvls"), fit(8, (2e-5, 1e11))
    both = link(all_reduce=(switch, ring))
    assert collective_seconds("all_reduce", 1e9, 8, both) == pytest.approx(5e-3 + 2e-5)
    assert collective_seconds("all_reduce", 1e9, 8, both, dtype="int8") == pytest.approx(1e-2 + 2e-5)
    assert collective_seconds("all_reduce", 1e9, 6, both) == pytest.approx(5e-3 + 2e-5)  # up and down once, always
    alone = link(all_reduce=(switch,))
    assert collective_seconds("all_gather", 1e9, 8, alone) == collective_seconds("all_gather", 1e9, 8, link())
    assert port_bytes_per_second(both) == pytest.approx(2e11)


def test_impossible_pieces_are_refused_in_one_line() -> None:
    with pytest.raises(ClusterError, match="at most 2 are possible"):
        fit(4, *[(1e-6, 1e9)] * 4)
    with pytest.raises(ClusterError, match="twice"):
        link(all_reduce=(fit(4, (1e-6, 1e9)), fit(4, (1e-6, 2e9))))


LINES = st.lists(st.tuples(st.floats(0, 1e-3), st.floats(1e6, 1e12)), min_size=1, max_size=3)


@given(
    kind=st.sampled_from(KINDS),
    ranks=st.integers(2, 64),
    measured=st.dictionaries(st.sampled_from(KINDS), st.tuples(st.integers(2, 64), LINES), max_size=2),
    sizes=st.tuples(st.floats(1, 1e12), st.floats(1, 1e12)),
)
def test_more_bytes_never_take_less_time(
    kind: CollectiveKind,
    ranks: int,
    measured: dict[str, tuple[int, list[tuple[float, float]]]],
    sizes: tuple[float, float],
) -> None:
    there = link(**{name: (fit(count, *lines),) for name, (count, lines) in measured.items()})
    less, more = (collective_seconds(kind, size, ranks, there) for size in sorted(sizes))
    assert 0 < less <= more * (1 + 1e-12)
    assert math.isfinite(more)
    parts = collective_parts(kind, sizes[0], ranks, there)
    assert parts.wire_seconds > 0 <= parts.latency_seconds


@pytest.mark.parametrize(
    ("size", "ranks", "message"),
    [
        (-1.0, 8, "a message of -1.0 bytes"),
        (float("nan"), 8, "a message of nan bytes"),
        (float("inf"), 8, "a message of inf bytes"),
        (1e6, 2.5, "a collective of 2.5 ranks"),
        (1e6, 0, "a collective of 0 ranks"),
    ],
)
def test_impossible_collectives_are_refused(size: float, ranks: int, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        collective_seconds("all_reduce", size, ranks, link())
