"""Failures against closed forms: published intervals, brute force over intervals, and runs sampled one by one."""

from math import exp, expm1

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.goodput import (
    Failures,
    daly_interval_seconds,
    goodput,
    mean_run_seconds,
    sample_runs,
    young_interval_seconds,
)

MINUTE, HOUR = 60, 3600


def failures(mean: float, checkpoint: float, restart: float = 0, lag: float = 0, devices: int = 1) -> Failures:
    return Failures(
        devices=devices,
        mean_seconds_between_failures=mean * devices,
        checkpoint_seconds=checkpoint,
        restart_seconds=restart,
        checkpoint_lag_seconds=lag,
    )


@pytest.mark.parametrize(("mean_minutes", "best_minutes"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_the_best_interval_is_that_of_dalys_figures(mean_minutes: float, best_minutes: float) -> None:
    """Daly 2006, captions of figures 3 to 5: checkpoints of 5 min, restarts of 10 min."""
    best = daly_interval_seconds(failures(mean_minutes * MINUTE, 5 * MINUTE, 10 * MINUTE)) / MINUTE
    assert best == pytest.approx(best_minutes, rel=0.006)  # they print two or three digits


def test_youngs_interval_is_the_limit_of_dalys_for_rare_failures() -> None:
    rare = failures(1e8, 1)
    assert daly_interval_seconds(rare) == pytest.approx(young_interval_seconds(rare), rel=1e-4)


@settings(deadline=None)
@given(st.floats(-6, 1), st.floats(0, 2))
def test_no_interval_beats_dalys_by_more_than_the_promised_part(log_ratio: float, restart: float) -> None:
    """Brute force over intervals, for checkpoints of a millionth to ten times the mean between failures."""
    cluster = failures(1.0, 10**log_ratio, restart)
    step = daly_interval_seconds(cluster) / 1000
    scan = np.unique(np.geomspace(1, 100_000, 2000).astype(int))
    scanned = max(
        goodput(step, cluster, checkpoint_interval_steps=k).fraction
        for k in scan.tolist()
        if k * step + cluster.checkpoint_seconds < 15  # beyond, there is no progress to speak of
    )
    assert goodput(step, cluster).fraction >= 0.998 * scanned


def test_the_whole_step_on_the_better_side_of_the_best_interval_is_taken() -> None:
    cluster = failures(6 * HOUR, 5 * MINUTE, 10 * MINUTE)
    shares = {k: goodput(600, cluster, checkpoint_interval_steps=k).fraction for k in range(1, 40)}
    assert goodput(600, cluster).checkpoint_interval_steps == max(shares, key=lambda k: shares[k])


def test_all_time_is_progress_saved_away_or_lost() -> None:
    """The closed form by hand: t / (M e^(R/M) (e^((t+d)/M) - 1)); devices fail side by side."""
    got = goodput(10, failures(1000, 30, 50, devices=8), checkpoint_interval_steps=20)
    assert got.fraction == pytest.approx(200 / (1000 * exp(0.05) * expm1(0.23)), rel=1e-12)
    assert got.checkpoint_fraction == pytest.approx(got.fraction * 30 / 200)
    assert got.fraction + got.checkpoint_fraction + got.lost_fraction == pytest.approx(1)
    assert got.effective_step_seconds == pytest.approx(10 / got.fraction)


def test_without_failures_only_saving_costs() -> None:
    got = goodput(1.0, failures(1e15, 1), checkpoint_interval_steps=9)
    assert got.fraction == pytest.approx(0.9, rel=1e-9)
    assert got.lost_fraction == pytest.approx(0, abs=1e-9)
    run = sample_runs(20, 1.0, failures(1e15, 1, lag=4), checkpoint_interval_steps=9, samples=3)
    assert run.seconds.tolist() == [20 + 3 + 4] * 3  # three checkpoints; only the last one's lag is waited for
    assert run.failures.tolist() == [0] * 3


@pytest.mark.parametrize(
    ("mean", "checkpoint", "restart", "lag", "steps"),
    [(100, 5, 0, 0, 40), (100, 5, 20, 0, 43), (60, 0, 90, 0, 31), (100, 2, 20, 30, 40), (50, 2, 10, 30, 101)],
)
def test_sampled_runs_have_the_mean_of_the_closed_form(
    mean: float, checkpoint: float, restart: float, lag: float, steps: int
) -> None:
    """With restarts that fail themselves, checkpoints written in the background and a shorter last cycle."""
    cluster = failures(mean, checkpoint, restart, lag, devices=4)
    run = sample_runs(steps, 3.0, cluster, checkpoint_interval_steps=10, samples=20_000, seed=steps)
    exact = mean_run_seconds(steps, 3.0, cluster, checkpoint_interval_steps=10)
    assert abs(run.mean_seconds - exact) < 4 * run.standard_error_seconds
    per_second = run.failures.mean() / exact  # failures come at the same rate whatever the run does
    assert per_second == pytest.approx(1 / mean, rel=0.03)


def test_the_share_of_a_long_run_is_its_goodput() -> None:
    cluster = failures(3 * HOUR, 30, 300, devices=16_384)
    got = goodput(10.0, cluster)
    run = sample_runs(100_000, 10.0, cluster, samples=500, seed=5)
    assert abs(run.mean_seconds - 100_000 * got.effective_step_seconds) < 4 * run.standard_error_seconds + 300
    assert run.low_seconds < run.quantile(0.5) < run.high_seconds


def test_a_checkpoint_in_the_background_is_worth_the_stall_it_saves() -> None:
    waiting, behind = failures(3 * HOUR, 120, 300), failures(3 * HOUR, 5, 300, lag=115)
    assert goodput(10, behind).fraction > goodput(10, waiting).fraction
    assert goodput(10, behind).checkpoint_interval_steps < goodput(10, waiting).checkpoint_interval_steps


def test_runs_are_the_same_for_the_same_seed_on_any_number_of_threads() -> None:
    cluster = failures(100, 5, 20)
    before = numba.get_num_threads()
    runs = []
    try:
        for threads in {1, numba.config.NUMBA_NUM_THREADS}:
            numba.set_num_threads(threads)
            runs.append(sample_runs(50, 3.0, cluster, samples=200, seed=9).seconds.tobytes())
    finally:
        numba.set_num_threads(before)
    assert len(set(runs)) == 1
    assert sample_runs(50, 3.0, cluster, samples=200, seed=10).seconds.tobytes() != runs[0]
    assert sample_runs(50, 3.0, cluster, samples=20, seed=9).seconds.tobytes() == runs[0][: 20 * 8]


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(ScheduleError, match="0 devices"):
        Failures(devices=0, mean_seconds_between_failures=1, checkpoint_seconds=1, restart_seconds=1)
    with pytest.raises(ScheduleError, match="mean_seconds_between_failures is 0"):
        failures(0, 1)
    with pytest.raises(ScheduleError, match="restart_seconds is -1"):
        failures(1, 1, -1)
    with pytest.raises(ScheduleError, match="no progress: 1 devices fail every 1 s"):
        goodput(100, failures(1, 1, 1))
    with pytest.raises(ScheduleError, match="no progress"):
        mean_run_seconds(5, 1.0, failures(1, 1, 10_000))
    with pytest.raises(ScheduleError, match=r"every 2 steps of 10 s is not possible.*at least 3 steps"):
        goodput(10, failures(1e6, 1, lag=25), checkpoint_interval_steps=2)
    with pytest.raises(ScheduleError, match="every 0 steps; at least 1"):
        goodput(10, failures(1e6, 1), checkpoint_interval_steps=0)
    with pytest.raises(ScheduleError, match="step_seconds is 0"):
        goodput(0, failures(1e6, 1))
    with pytest.raises(ScheduleError, match="a run of 0 steps"):
        sample_runs(0, 1.0, failures(1e6, 1))
    with pytest.raises(ScheduleError, match="ask for fewer samples or steps"):
        sample_runs(10**12, 1.0, failures(1e6, 1), samples=1000)
