"""A timing is a median with its quartiles; calls are repeated as often as a budget has room for."""

from meshwright.calibrate.timing import FEWEST_REPEATS, MOST_REPEATS, repeats_within, sample_within, timing


def test_the_median_stands_between_its_quartiles() -> None:
    taken = timing("matmul f32", 8.0, [5.0, 1.0, 2.0, 3.0, 4.0])
    assert (taken.low_seconds, taken.seconds, taken.high_seconds, taken.repeats) == (2.0, 3.0, 4.0, 5)


def test_repeats_fill_the_budget_between_their_bounds() -> None:
    assert repeats_within(0.01, 1.0) == 100
    assert repeats_within(10.0, 1.0) == FEWEST_REPEATS
    assert repeats_within(0.0, 1.0) == MOST_REPEATS


def test_a_call_is_warmed_before_it_is_timed() -> None:
    calls: list[None] = []
    samples = sample_within(lambda: calls.append(None), 0.0)
    assert len(samples) == FEWEST_REPEATS
    assert len(calls) == FEWEST_REPEATS + 3  # one that warms, two that say how long a call takes
