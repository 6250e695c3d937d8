"""Kernels to seconds: tiles and waves by hand, the roofline's bounds, and what each kernel moves."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.calibrate.device import AttentionFit, Interference, MatmulFit
from meshwright.calibrate.hardware import Device, parse_cluster
from meshwright.errors import ClusterError
from meshwright.simulate.compute import interference_rates, kernel_seconds, matmul_seconds, op_seconds, tiled_seconds
from meshwright.simulate.operations import (
    Attention,
    Convolution,
    CrossEntropy,
    Embedding,
    Matmul,
    OptimizerStep,
    Pointwise,
)

A100 = parse_cluster("dgx-a100").device(0)
PLAIN = msgspec.structs.replace(A100, matmul={}, attention=None)
PEAK = A100.peak_flops("bf16")


def with_fit(**changes: Any) -> Device:
    """A device of 10 units whose only tile is 128 × 128 at full efficiency, and whose memory is no bound."""
    numbers: dict[str, Any] = {
        "source": "test",
        "compute_units": 10,
        "efficiency": {"128x128": 1.0},
        "overhead_k": 0.0,
        "last_wave": 1.0,
        "memory_bytes_per_second": 1e30,
        "launch_seconds": 0.0,
        "sharpness": 2.0,
    }
    fit = MatmulFit(**numbers | changes)
    return msgspec.structs.replace(PLAIN, matmul={"bf16": fit}, sheet_memory_bytes_per_second=None)


WAVE_SECONDS = 2 * 128 * 128 * 1024 / (PEAK / 10)  # one tile's inner loop of 1024 on one of 10 units


@pytest.mark.parametrize(
    ("m", "n", "waves"),
    [(1, 1, 1), (128, 128, 1), (1280, 128, 1), (1281, 128, 2), (1280, 129, 2), (2560, 128, 2), (1280, 1280, 10)],
)
def test_tiles_come_in_whole_waves(m: int, n: int, waves: int) -> None:
    assert matmul_seconds(with_fit(), m, n, 1024, "bf16") == pytest.approx(waves * WAVE_SECONDS)


def test_a_last_wave_may_be_quicker_than_a_whole_one() -> None:
    """11 tiles on 10 units: the second wave has a tenth of its tiles and takes 0.4 + 0.6 · 0.1 of a whole one."""
    assert matmul_seconds(with_fit(last_wave=0.4), 1281, 128, 1024, "bf16") == pytest.approx(1.46 * WAVE_SECONDS)


@pytest.mark.parametrize(("parts", "moved"), [(1, 0.0), (2, 0.0), (4, 0.0), (2, 6.0), (8, 6.0)])
def test_one_tile_with_a_long_inner_loop_is_cut_among_the_units(parts: int, moved: float) -> None:
    """A single tile on 10 units: p units take a p-th of the loop each, and then the partial sums move."""
    device = with_fit(splits=(1, parts), split_bytes=moved, memory_bytes_per_second=1e13, sharpness=40.0)
    cut = WAVE_SECONDS / parts + (moved * parts * 128 * 128 / 1e13 if parts > 1 else 0.0)
    assert matmul_seconds(device, 128, 128, 1024, "bf16") == pytest.approx(min(WAVE_SECONDS, cut), rel=1e-3)


def test_long_arithmetic_runs_at_the_clock_that_power_allows() -> None:
    """A fifth slower in the long run, a tenth where the plain time is ``throttle_seconds``."""
    plain = with_fit()
    for waves, slower in ((1, 1.1), (10_000, 1.2)):
        throttled = with_fit(throttle=0.2, throttle_seconds=WAVE_SECONDS)
        times = [matmul_seconds(device, 1280 * waves, 128, 1024, "bf16") for device in (throttled, plain)]
        assert times[0] / times[1] == pytest.approx(slower, rel=1e-3)


def test_matmuls_priced_together_cost_what_each_costs_alone() -> None:
    """Also across the blocks in which they are priced."""
    rng = np.random.default_rng(0)
    shape = rng.integers(1, 5000, (3, 600)).astype(float)
    fit = A100.matmul_fit("bf16")
    assert fit is not None
    together = tiled_seconds(fit, *shape, np.ones(600), A100.peak_flops("bf16"), 2)
    alone = [matmul_seconds(A100, *map(int, one), "bf16") for one in shape.T]
    assert together == pytest.approx(alone)


def test_each_tile_pays_its_overhead_and_each_kernel_its_launch() -> None:
    device = with_fit(overhead_k=1024.0, launch_seconds=1.0)
    assert matmul_seconds(device, 128, 128, 1024, "bf16") == pytest.approx(1 + 2 * WAVE_SECONDS)


def test_the_best_tile_is_chosen_either_way_round() -> None:
    """A narrow product: of 256 × 128 the turned tile wastes half, of 64 × 64 nothing is wasted."""
    device = with_fit(efficiency={"256x128": 1.0, "64x64": 0.5})
    wide = matmul_seconds(device, 256, 128, 1024, "bf16")
    assert matmul_seconds(device, 128, 256, 1024, "bf16") == wide
    assert matmul_seconds(device, 64, 640, 1024, "bf16") == pytest.approx(2 * WAVE_SECONDS / 4)


def test_batches_fill_waves_together() -> None:
    assert matmul_seconds(with_fit(), 128, 128, 1024, "bf16", batch=10) == pytest.approx(WAVE_SECONDS)
    assert matmul_seconds(with_fit(), 128, 128, 1024, "f16", batch=11) == pytest.approx(2 * WAVE_SECONDS)


def test_memory_bounds_a_thin_product() -> None:
    device = with_fit(memory_bytes_per_second=1e9, sharpness=50.0)
    assert matmul_seconds(device, 1, 4096, 4096, "bf16") == pytest.approx(2 * 4096 * 4098 / 1e9, rel=1e-3)


sizes = st.integers(1, 20000)


@given(sizes, sizes, sizes, st.sampled_from(["dgx-a100", "dgx-h100", "dgx-h200", "p3.16xlarge"]))
@settings(max_examples=150, deadline=None)
def test_no_matmul_is_quicker_than_peak_and_memory_allow(m: int, n: int, k: int, machine: str) -> None:
    device = parse_cluster(machine).device(0)
    spent = matmul_seconds(device, m, n, k, "f16")
    assert np.isfinite(spent)
    assert spent >= 2 * m * n * k / device.peak_flops("f16")


@given(sizes, sizes, sizes)
@settings(max_examples=100, deadline=None)
def test_more_work_takes_no_less_time_but_for_quantisation(m: int, n: int, k: int) -> None:
    """Twice the rows, columns or inner size never gets quicker."""
    spent = matmul_seconds(A100, m, n, k, "bf16")
    for larger in ((2 * m, n, k), (m, 2 * n, k), (m, n, 2 * k)):
        assert matmul_seconds(A100, *larger, "bf16") >= spent * (1 - 1e-12)


def test_without_a_fit_a_matmul_is_a_roofline() -> None:
    kernel = Matmul(m=4096, n=4096, k=4096, dtype="bf16")
    assert kernel_seconds(PLAIN, kernel) == op_seconds(PLAIN, "matmul", kernel.flops, 6 * 4096**2, "bf16")


def test_a_convolution_is_a_matmul_over_its_window() -> None:
    """3 × 3 over 56 × 56 pixels of 32 images: (32·56·56) × 128 by (9·64)."""
    convolution = Convolution(
        batch=32, height=56, width=56, channels_in=64, channels_out=128, kernel=(3, 3), dtype="bf16"
    )
    product = Matmul(m=32 * 56 * 56, n=128, k=9 * 64, dtype="bf16")
    assert convolution.flops == product.flops
    assert kernel_seconds(A100, convolution) == kernel_seconds(A100, product)


def attention(**changes: Any) -> Attention:
    numbers: dict[str, Any] = {"batch": 4, "heads": 32, "kv_heads": 32, "queries": 4096, "keys": 4096, "head_dim": 128}
    return Attention(**{**numbers, "dtype": "bf16", **changes})


def test_attention_counts_two_products_five_backward_and_half_if_causal() -> None:
    """4·b·h·q·k·d FLOPs forward; fused kernels skip what causality masks; the fused backward recomputes the scores."""
    whole = 4 * 4 * 32 * 4096 * 4096 * 128
    assert attention(causal=False).flops == whole
    assert attention().flops == whole / 2
    assert attention(backward=True).flops == 2.5 * whole / 2
    assert attention(fused=False).flops == whole
    assert attention(fused=False, backward=True).flops == 2 * whole


def test_fused_attention_nears_its_efficiency_for_long_sequences() -> None:
    fit = AttentionFit(source="test", efficiency=0.6, half_length=4096.0, launch_seconds=0.0, backward_share=0.5)
    device = msgspec.structs.replace(A100, attention=fit)
    forward, backward = attention(), attention(backward=True)
    assert kernel_seconds(device, forward) == pytest.approx(forward.flops / (PEAK * 0.3))
    assert kernel_seconds(device, backward) == pytest.approx(backward.flops / (PEAK * 0.15))


def test_unfused_attention_pays_for_its_scores() -> None:
    """It is slower than the fused one by more than its score matrix takes to be written once."""
    scores_bytes = 2 * 4 * 32 * 4096 * 4096
    rate = A100.memory_bytes_per_second.value
    assert kernel_seconds(A100, attention(fused=False)) > kernel_seconds(A100, attention()) + scores_bytes / rate


@pytest.mark.parametrize(
    ("kernel", "moved"),
    [
        (Pointwise(bytes=1e9), 1e9),
        (Embedding(tokens=4096, hidden=1024, dtype="bf16"), 2 * 2 * 4096 * 1024),
        (Embedding(tokens=4096, hidden=1024, dtype="f32", backward=True), 3 * 4 * 4096 * 1024),
        (CrossEntropy(tokens=2048, vocabulary=51200, dtype="bf16"), 3 * 2 * 2048 * 51200),
        (CrossEntropy(tokens=2048, vocabulary=51200, dtype="bf16", backward=True), 2 * 2 * 2048 * 51200),
        (OptimizerStep(parameters=10**8, bytes_per_parameter=30.0), 3e9),
    ],
)
def test_what_is_bound_by_memory_takes_its_bytes_and_a_launch(kernel: Any, moved: float) -> None:
    expected = A100.launch_seconds.value + moved / A100.memory_bytes_per_second.value
    assert kernel_seconds(A100, kernel) == pytest.approx(expected)


def test_interference_is_measured_for_the_v100_alone() -> None:
    v100, a100 = (interference_rates(parse_cluster(name).device(0)) for name in ("p3.16xlarge", "dgx-a100"))
    assert (a100 == 1).all()
    assert v100.shape == (16, 4)
    assert v100[0b0011, 0] < 1
    assert (v100[[0b0001, 0b0010, 0b0100, 0b1000]] == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_units": 0}, "compute_units"),
        ({"efficiency": {}}, "0 tiles"),
        ({"efficiency": {"128": 0.5}}, "is no tile"),
        ({"efficiency": {"128x128": 1.5}}, "a fraction of the peak"),
        ({"last_wave": 2.0}, "last_wave is 2"),
        ({"splits": (2, 4)}, "and 1 among them"),
        ({"split_bytes": -1.0}, "split_bytes is -1"),
        ({"throttle": float("inf")}, "throttle is inf"),
        ({"memory_bytes_per_second": float("nan")}, "memory_bytes_per_second is nan"),
    ],
)
def test_an_impossible_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        with_fit(**changes)


def test_an_impossible_table_of_interference_is_refused() -> None:
    with pytest.raises(ClusterError, match="no table of 16 masks by 4"):
        Interference(source="test", rates=((1.0,) * 4,) * 3)
    with pytest.raises(ClusterError, match="above 0 and at most 1"):
        Interference(source="test", rates=((0.0,) * 4,) * 16)


def test_an_unknown_dtype_has_no_size() -> None:
    with pytest.raises(ClusterError, match="dtype 'q4' has no known size"):
        kernel_seconds(PLAIN, Matmul(m=8, n=8, k=8, dtype="q4"))
