"""A timing is a median with its quartiles; calls are repeated as often as a budget has room for."""

import time

import msgspec
import pytest

from meshwright.calibrate.timing import (
    FEWEST_REPEATS,
    MOST_REPEATS,
    Measured,
    at_mean_pace,
    merged,
    repeats_within,
    sample_batches,
    sample_within,
    timing,
    widened,
)


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


def test_rounds_are_merged_to_their_middle_and_a_spread_that_covers_both() -> None:
    both = merged([timing("memory add", 8, [1.0, 2.0, 3.0]), timing("memory add", 8, [7.0, 8.0, 9.0])])
    assert both.seconds == pytest.approx(4.0)
    assert both.rounds == (2.0, 8.0)
    assert (both.low_seconds, both.high_seconds, both.repeats) == (1.5, 8.5, 6)


def test_what_was_seen_once_is_as_uncertain_as_rounds_are_apart() -> None:
    twice = merged([timing("memory add", 8, [2.0]), timing("memory add", 8, [3.0])])
    once = merged([timing("memory add", 16, [4.0])])
    twice = msgspec.structs.replace(twice, shape=(8,))
    same, wide = widened([twice, once])
    assert same == twice
    assert (wide.low_seconds, wide.high_seconds) == (pytest.approx(4 / 1.5), pytest.approx(6.0))
    assert widened([once]) == (once,)


def test_a_batch_is_waited_for_once_and_its_time_is_shared_out() -> None:
    """A device that takes 10 µs for each call, and a way to it and back of 100 µs."""
    ends = [0.0]

    def start() -> float:
        ends[0] = max(ends[0], time.perf_counter()) + 1e-5
        return ends[0]

    def wait(result: object) -> None:
        last = result[-1] if isinstance(result, list) else result
        assert isinstance(last, float)
        while time.perf_counter() < last + 1e-4:
            pass

    samples = sample_batches(start, wait, 0.05)
    assert min(samples) < 5e-5  # one at a time, each would take 1.1e-4


def test_timings_at_a_fast_and_a_slow_moment_meet_at_the_mean_pace() -> None:
    def at(pace_seconds: float, seconds: float) -> Measured:
        taken = timing("matmul f32", 1e6, [seconds] * 5)
        return Measured(device_kind="cpu", round=0, timing=taken, spent_seconds=0.1, pace_seconds=pace_seconds)

    fast, slow = at_mean_pace([at(1e-3, 0.010), at(2e-3, 0.020)])
    assert fast.seconds == pytest.approx(0.015)
    assert slow.seconds == pytest.approx(0.015)
    assert slow.low_seconds == pytest.approx(0.015)


def test_without_a_pace_timings_stay_as_they_are() -> None:
    taken = timing("matmul f32", 1e6, [0.01] * 5)
    assert at_mean_pace([Measured(device_kind="gpu", round=0, timing=taken, spent_seconds=0.1)]) == [taken]
