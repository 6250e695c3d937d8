"""Intervals: the conformal rank in closed form, its coverage by simulation, and what the shipped file holds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.calibrate.quantity import Quantity
from meshwright.calibrate.uncertainty import (
    COVERAGE,
    Interval,
    conformal_interval,
    find_interval,
    shipped_intervals,
)
from meshwright.errors import ClusterError
from meshwright.simulate.workload.stack import shipped_stacks

RATIOS = st.lists(st.floats(-2.0, 2.0), min_size=4, max_size=40)


def interval(low: float, high: float) -> Interval:
    return Interval(low=low, high=high, rows=1, groups=1, source="a test")


def test_many_single_rows_give_the_ranks_of_split_conformal_prediction() -> None:
    """Of n = 99, the 90th and the 10th: (n + 1)(1 - 0.1) and (n + 1) 0.1."""
    ratios = np.random.default_rng(0).permutation(np.linspace(-1.0, 1.0, 99))
    ranked = np.sort(ratios)
    assert conformal_interval(ratios, range(99)) == pytest.approx((math.exp(ranked[9]), math.exp(ranked[89])))


@pytest.mark.parametrize(("count", "rank"), [(4, 4), (5, 5), (6, 6), (9, 8), (14, 12), (18, 16)])
def test_few_rows_give_the_rank_of_the_distance(count: int, rank: int) -> None:
    """The least rank of at least 0.8 (n + 1)."""
    ratios = [(-1) ** i * 0.01 * (i + 1) for i in range(count)]
    far = 0.01 * rank
    assert conformal_interval(ratios, range(count)) == pytest.approx((math.exp(-far), math.exp(far)))


def test_fewer_than_four_groups_tell_nothing() -> None:
    assert conformal_interval([0.1, 0.2, 0.3], "abc") is None
    assert conformal_interval([0.1] * 100, ["a", "b"] * 50) is None


@given(RATIOS, st.randoms(use_true_random=False))
def test_neither_order_nor_repeated_rows_matter(ratios: list[float], random: object) -> None:
    rows = [(ratio, group) for group, ratio in enumerate(ratios) for _ in range(group % 3 + 1)]
    random.shuffle(rows)  # type: ignore[attr-defined]
    again = conformal_interval([ratio for ratio, _ in rows], [group for _, group in rows])
    once = conformal_interval(ratios, range(len(ratios)))
    assert once is not None
    assert again == pytest.approx(once)
    assert once[0] <= 1.0 <= once[1]


def test_a_large_pool_weighs_no_more_than_a_small_one() -> None:
    """Nine pools are right, the tenth is off by a factor 2: with 1,000 rows or with one, it is one of ten."""
    exact = list(range(9))
    for many in (1, 1000):
        ratios = [0.0] * 9 + [math.log(2.0)] * many
        groups = [*exact, *range(9, 9 + many)]
        pools = [*exact, *[9] * many]
        assert conformal_interval(ratios, groups, pools) == (1.0, 1.0)
    assert conformal_interval(ratios, groups) != (1.0, 1.0)


@pytest.mark.parametrize("groups", [5, 12, 60])
def test_rows_of_a_new_group_lie_inside_as_often_as_promised(groups: int) -> None:
    """Groups with an error of their own, rows with another: 80 %, and no more than rounding up to a rank adds."""
    random = np.random.default_rng(groups)
    inside = []
    names = np.repeat(np.arange(groups), 6)
    for _ in range(1500):
        errors = random.normal(0.02, 0.1, groups + 1)[:, None] + random.normal(0.0, 0.05, (groups + 1, 6))
        found = conformal_interval(errors[:-1].ravel(), names.tolist())
        assert found is not None
        inside.append(np.mean((errors[-1] >= math.log(found[0])) & (errors[-1] <= math.log(found[1]))))
    spread = 4 * np.std(inside) / math.sqrt(len(inside))
    assert COVERAGE - spread <= np.mean(inside) <= COVERAGE + 1 / (groups + 1) + spread


def test_an_independent_range_adds_in_squares() -> None:
    """3, 4, 5: a rate that may be higher makes the step quicker."""
    rate = Quantity(1.0, "a test", low=math.exp(-0.4), high=math.exp(0.04))
    wide = interval(math.exp(-0.03), math.exp(0.3)).widened(rate)
    assert (math.log(wide.low), math.log(wide.high)) == pytest.approx((-0.05, 0.5))


def test_a_rate_without_a_range_adds_nothing() -> None:
    narrow = interval(0.9, 1.1)
    wide = narrow.widened(Quantity(0.7, "assumed"))
    assert (wide.low, wide.high) == pytest.approx((narrow.low, narrow.high))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.1), (1.01, 1.1), (0.9, 0.99), (0.9, math.inf), (math.nan, 1.1)])
def test_an_interval_holds_the_prediction_itself(low: float, high: float) -> None:
    with pytest.raises(ClusterError, match="0 < low <= 1 <= high is needed"):
        interval(low, high)


def test_an_interval_has_a_source() -> None:
    with pytest.raises(ClusterError, match="say which measured steps"):
        Interval(low=0.9, high=1.1, rows=1, groups=1, source=" ")


def test_every_shipped_interval_is_of_a_system_with_constants() -> None:
    known = shipped_intervals()
    for stack, systems in known.systems.items():
        assert set(systems) <= set(shipped_stacks()[stack].systems)
        for system, mine in systems.items():
            assert find_interval(stack, system) is mine


def test_unknown_systems_have_the_interval_of_sources_left_out() -> None:
    other = shipped_intervals().elsewhere
    assert find_interval() is find_interval("compiled") is find_interval("compiled", "a garage") is other
    pooled = shipped_intervals().calibrated
    assert other.low <= pooled.low
    assert other.high >= pooled.high
