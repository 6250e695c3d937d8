"""Fits of kernel models: they find what made the data, and hold on measurements that they have not seen."""

from pathlib import Path

import numpy as np
import pytest

from experiments.device_tables import read_attention, read_matmuls, read_overlap
from meshwright.calibrate.hardware import parse_cluster
from meshwright.calibrate.kernels import Forwards, fit_attention, fit_interference, halves, relative_error, side_by_side
from meshwright.simulate.compute import tiled_seconds

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "kernels").is_dir(), reason="the measured tables are not at hand")


@needs_data
@pytest.mark.parametrize(
    ("name", "machine", "most"), [("a100", "dgx-a100", 0.036), ("h100", "dgx-h100", 0.056), ("h200", "dgx-h200", 0.08)]
)
def test_shipped_matmul_fits_hold_on_shapes_held_out(name: str, machine: str, most: float) -> None:
    """Mean error on training shapes whose (n, k) the fit has not seen."""
    table, device = read_matmuls(DATA, name), parse_cluster(machine).device(0)
    held = table.at(table.training & ~halves(table.n, table.k))
    fit = device.matmul_fit("bf16")
    assert fit is not None
    model = tiled_seconds(fit, held.m, held.n, held.k, np.ones(len(held.m)), device.peak_flops("bf16"), 2)
    assert len(held.m) > 4000
    assert relative_error(model, held.seconds).mean < most


@needs_data
@pytest.mark.parametrize(
    ("name", "machine", "most"), [("a100", "dgx-a100", 0.03), ("h100", "dgx-h100", 0.05), ("h200", "dgx-h200", 0.065)]
)
def test_shipped_attention_fits_hold_on_every_second_row(name: str, machine: str, most: float) -> None:
    device = parse_cluster(machine).device(0)
    peak = device.peak_flops("bf16")
    fit, _, error = fit_attention(read_attention(DATA, name), peak, device.memory_bytes_per_second.value, "test", 1.0)
    shipped = device.attention
    assert shipped is not None
    assert shipped.efficiency == pytest.approx(fit.efficiency)
    assert error.mean < most


@needs_data
def test_the_shipped_interference_is_the_fit() -> None:
    fit, error = fit_interference(*read_overlap(DATA, "v100-sxm2-32gb"), "test")
    shipped = parse_cluster("p3.16xlarge").device(0).interference
    assert shipped is not None
    assert shipped == parse_cluster("v100-32gb").device(0).interference
    np.testing.assert_allclose(shipped.rates, fit.rates, atol=0.02)
    assert error.median < 0.06


def test_an_attention_fit_finds_what_made_the_data() -> None:
    keys = np.array([512.0, 1024, 2048, 4096, 8192, 16384] * 4)
    flops = 1e9 * keys * np.repeat([1.0, 2, 4, 8], 6)
    moved = flops / keys * np.tile([0.5, 1.0, 2.0], 8)  # the last of them bound by memory
    cached = moved * np.repeat([0.1, 0.5], 12)
    arithmetic = flops / (300e12 * 0.5 * keys / (keys + 700))
    seconds = 5e-6 + np.maximum(arithmetic, moved / 1e12) + 3 * cached / 1e12
    fit, passes, error = fit_attention(Forwards(keys, flops, moved, cached, seconds), 300e12, 1e12, "test", 1.0)
    assert (fit.efficiency, fit.half_length) == (pytest.approx(0.5, rel=1e-3), pytest.approx(700, rel=1e-2))
    assert passes == pytest.approx(3, rel=1e-2)
    assert error.mean < 1e-3


def test_activities_side_by_side_by_hand() -> None:
    """4 s and 2 s: at half speed and full speed until 2 s, when 3 s of the first are left."""
    rates = np.ones((16, 4))
    rates[0b0011] = [0.5, 1, 1, 1]
    alone = np.array([[4.0, 2.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert side_by_side(rates, alone).tolist() == [5, 4, 0]


def test_an_interference_fit_finds_what_made_the_data() -> None:
    rng = np.random.default_rng(0)
    rates = np.ones((16, 4))
    for mask in range(16):
        for bit in range(4):
            if mask.bit_count() > 1 and mask >> bit & 1:
                rates[mask, bit] = rng.uniform(0.3, 1)
    alone = rng.uniform(1, 3, (600, 4)) * (rng.random((600, 4)) < 0.7)
    together = side_by_side(rates, alone)
    seen = together > 0
    fit, error = fit_interference(alone[seen], together[seen], "test")
    assert error.mean < 0.02
    assert np.abs(np.array(fit.rates) - rates).mean() < 0.05


def test_halves_deal_shapes_out_in_turns() -> None:
    n, k = np.array([1.0, 1, 2, 2, 3]), np.array([1.0, 1, 1, 1, 1])
    assert halves(n, k).tolist() == [True, True, False, False, True]
