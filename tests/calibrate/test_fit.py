"""Fits find the law that made the data, and say how far they are from it."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.calibrate.fit import fit_rate, fit_timings
from meshwright.calibrate.hardware import parse_cluster
from meshwright.calibrate.timing import timing

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SIZES = np.logspace(3, 9, 13)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-6, 1e-3), st.floats(1e8, 1e12))
def test_exact_times_give_back_latency_and_rate(latency: float, rate: float) -> None:
    fit = fit_rate(SIZES, latency + SIZES / rate, "made")
    # A latency far below the smallest transfer, or a rate never reached, cannot show in the times.
    assert fit.residual.p90 < 1e-4
    assert [fit.seconds(size) for size in SIZES] == pytest.approx(list(latency + SIZES / rate), rel=1e-3)


def test_one_wild_outlier_barely_moves_the_rate() -> None:
    seconds = 1e-5 + SIZES / 1e9
    seconds[6] *= 20
    fit = fit_rate(SIZES, seconds, "made")
    assert fit.amount_per_second.value == pytest.approx(1e9, rel=0.05)
    assert fit.residual.median < 0.05


def test_noise_widens_the_range_and_the_range_holds_the_truth() -> None:
    noise = np.random.default_rng(0).lognormal(0, 0.1, len(SIZES))
    fit = fit_rate(SIZES, (2e-5 + SIZES / 5e9) * noise, "made")
    rate = fit.amount_per_second
    assert rate.low is not None
    assert rate.high is not None
    assert rate.low < 5e9 < rate.high
    assert rate.high / rate.low > 1.05


def test_a_large_size_as_quick_as_a_small_one_keeps_a_finite_rate() -> None:
    fit = fit_rate([1e4, 1e6], [1e-3, 0.9e-3], "made")
    assert 1e6 / 0.9e-3 < fit.amount_per_second.value <= 10.01 * 1e6 / 0.9e-3


def test_two_sizes_are_as_sure_as_their_spread() -> None:
    timings = [timing("p2p", size, [0.8 * size / 1e9, size / 1e9, 1.25 * size / 1e9]) for size in (1e6, 1e8)]
    rate = fit_timings(timings, "made").amount_per_second
    assert rate.value == pytest.approx(1e9, rel=1e-3)
    assert rate.low is not None
    assert rate.high is not None
    assert rate.low < 0.95e9 < 1.05e9 < rate.high


@pytest.mark.parametrize(
    ("amounts", "seconds"),
    [([1e3], [1.0]), ([1e3, 1e3], [1.0, 2.0]), ([1e3, 1e4], [0.0, 1.0]), ([0.0, 1.0], [1.0, 1.0])],
)
def test_too_few_sizes_or_no_time_at_all_cannot_be_fitted(amounts: list[float], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two distinct positive sizes"):
        fit_rate(amounts, seconds, "made")


@pytest.mark.skipif(not DATA.exists(), reason="the measured tables (../shared/data) are not here")
@pytest.mark.parametrize(("machine", "table", "peak"), [("dgx-a100", "a100", 312e12), ("dgx-h100", "h100", 989e12)])
def test_the_shipped_matmul_efficiency_is_what_the_table_gives(machine: str, table: str, peak: float) -> None:
    with gzip.open(DATA / "kernels" / f"gemm_{table}_sxm_bf16.csv.gz", "rt") as file:
        rows = [row for row in csv.DictReader(file) if min(int(row[dim]) for dim in "mnk") >= 1024]
    flops = [2.0 * int(row["m"]) * int(row["n"]) * int(row["k"]) for row in rows]
    fit = fit_rate(flops, [float(row["latency_ms"]) / 1e3 for row in rows], table)
    shipped = parse_cluster(machine).device(0).matmul_efficiency
    assert shipped.value == pytest.approx(fit.amount_per_second.value / peak, rel=1e-3)


@pytest.mark.skipif(not DATA.exists(), reason="the measured tables (../shared/data) are not here")
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_shipped_v100_all_reduce_meets_its_table(ranks: int) -> None:
    with gzip.open(DATA / "collectives" / "nccl_other.csv.gz", "rt") as file:
        rows = [row for row in csv.DictReader(file) if row["hardware"] == "V100" and row["gpus"] == str(ranks)]
    fit = parse_cluster("p3.16xlarge").hosts[0].link.fitted("all_reduce", ranks)
    assert fit is not None
    errors = [abs(fit.seconds(float(row["bytes"])) / (float(row["time_us"]) * 1e-6) - 1) for row in rows]
    assert np.median(errors) < 0.02
