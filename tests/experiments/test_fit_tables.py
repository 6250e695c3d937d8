"""Readers make shapes and bytes that the tables' own numbers bear out; reports draw what they are given."""

from pathlib import Path

import numpy as np
import pytest

from experiments.device_tables import read_attention, read_layers, read_profile, read_streams
from experiments.fit_links import REDUCED, reduced_entries
from experiments.fit_report import Picture, Series, write_report
from experiments.link_tables import profile_curves, transfers
from meshwright.calibrate.collectives import fit_pieces
from meshwright.calibrate.hardware import parse_cluster

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the measured tables (../shared/data) are not here")


@needs_data
@pytest.mark.parametrize(
    ("folder", "machine"),
    [("mist/profile_a10g", "g5.48xlarge"), ("mist/profile_l4", "g6.48xlarge"), ("aceso/v100", "v100-32gb")],
)
def test_operators_of_gpt_layers_stay_below_what_the_device_can(folder: str, machine: str) -> None:
    """No matmul above the peak and none of the large ones below a quarter of it; no stream far above the memory."""
    profile, device = read_profile(DATA, folder), parse_cluster(machine).device(0)
    matmuls = profile.matmuls
    share = 2 * matmuls.m * matmuls.n * matmuls.k / matmuls.seconds / device.peak_flops("f16")
    assert len(share) > 200
    assert share.max() < 1
    assert share[matmuls.m * matmuls.n * matmuls.k > 1e11].min() > 0.25
    rates = profile.stream_bytes / profile.stream_seconds
    sheet = device.sheet_memory_bytes_per_second
    assert sheet is not None
    assert np.quantile(rates, 0.9) < 1.1 * sheet.value


@needs_data
def test_a_layer_of_opt_350m_in_float32_takes_what_the_shipped_card_says() -> None:
    """Each RTX card's matmuls and memory add up to Sailor's layers."""
    for system, machine in (("RTX-2080", "rtx-2080ti"), ("Titan-RTX", "titan-rtx"), ("RTX-3090", "rtx-3090")):
        layers, device = read_layers(DATA, system), parse_cluster(machine).device(0)
        rate = device.matmul_efficiency.value * device.peak_flops("f32")
        model = layers.flops / rate + layers.bytes / device.memory_bytes_per_second.value
        assert model == pytest.approx(layers.seconds, rel=0.05)


@needs_data
def test_forwards_of_attention_move_less_than_memory_carries() -> None:
    """A100 of 80 GB: 2039 GB/s."""
    forwards = read_attention(DATA, "a100")
    assert len(forwards.keys) > 1000
    assert (forwards.moved_bytes / forwards.seconds).max() < 2.039e12
    assert (forwards.cached_bytes <= forwards.moved_bytes / 2).all()


@needs_data
def test_the_largest_gelu_reaches_the_memory_rate_of_the_machine_file() -> None:
    moved, seconds = read_streams(DATA, "gelu")
    assert (moved / seconds).max() == pytest.approx(
        parse_cluster("dgx-a100").device(0).memory_bytes_per_second.value, 1e-3
    )


@needs_data
def test_a_curve_that_jumps_between_two_ways_is_left_out() -> None:
    """A10G, four ranks: 1.2 or 3.2 GB/s from one size to the next."""
    curves = [curve for curve in profile_curves(DATA) if curve.system == "a10g" and curve.kind == "all_reduce"]
    fits = {curve.name: fit_pieces(curve.message_bytes, curve.seconds) for curve in curves}
    machine = next(reduced for reduced in REDUCED if reduced.machine == "g5.48xlarge")
    found = reduced_entries(machine, curves, fits)
    assert [fit.ranks for fit in found["all_reduce"]] == [2, 8]
    assert found == parse_cluster("g5.48xlarge").hosts[0].link.collectives


@needs_data
def test_transfers_grow_with_their_size() -> None:
    size, seconds = transfers(DATA, "aceso/v100")
    assert size[0] == 2**20
    assert (np.diff(seconds) > 0).all()


def test_a_report_has_a_picture_and_the_errors_of_each_fit(tmp_path: Path) -> None:
    measured = np.array([1.0, 2.0, 4.0])
    curve = Series("four ranks", measured * 1e6, measured, measured * 1.1)
    write_report(tmp_path / "new", "Fits", "a command", [Picture("All reduce", "bytes", (curve,))])
    page = (tmp_path / "new" / "index.md").read_text(encoding="utf-8")
    assert "| four ranks | 10.0% |" in page
    assert (tmp_path / "new" / "all_reduce.png").read_bytes().startswith(b"\x89PNG")
