"""Fits of few timings find the law that made them, and the form that predicts best wins."""

from collections.abc import Callable
from itertools import product

import msgspec
import numpy as np
import pytest

from meshwright.calibrate.benchmarks import Case, amount, attention_of
from meshwright.calibrate.device import MatmulFit
from meshwright.calibrate.device_fit import fit_attention, fit_matmuls
from meshwright.calibrate.timing import Timing, timing
from meshwright.simulate.compute import tiled_seconds

PEAK = 100e9
SHAPES = [
    *((1, side, side, side) for side in (64, 128, 256, 512, 768, 1024)),
    *((1, m, n, k) for m, n, k in product((16, 128, 2048), (256, 1024), (64, 768))),
    *((batch, 128, 128, 64) for batch in (8, 32)),
]


def measured(
    family: str, seconds_of: Callable[[tuple[int, ...]], float], shapes: list[tuple[int, ...]]
) -> list[Timing]:
    found = []
    for shape in shapes:
        taken = timing(family, amount(Case(family, shape)), [seconds_of(shape)] * 5)
        found.append(msgspec.structs.replace(taken, shape=shape))
    return found


def test_a_line_is_a_line() -> None:
    timings = measured("matmul f32", lambda shape: 1e-5 + 2 * np.prod(shape) / 50e9, SHAPES)
    choice = fit_matmuls(timings, PEAK, 4, 1, "made")
    assert choice.fit is None
    assert choice.held_out["line"] < 1e-3
    assert choice.residual.p90 < 1e-3


def test_a_roofline_is_found_and_predicts_what_it_was_not_shown() -> None:
    truth = MatmulFit(
        source="made",
        compute_units=1,
        efficiency={"1x1": 0.8},
        overhead_k=20.0,
        last_wave=1.0,
        memory_bytes_per_second=8e9,
        launch_seconds=2e-6,
        sharpness=2.0,
    )

    def seconds(shape: tuple[int, ...]) -> float:
        batch, m, n, k = (np.array([float(size)]) for size in shape)
        return float(tiled_seconds(truth, m, n, k, batch, PEAK, 4)[0])

    choice = fit_matmuls(measured("matmul f32", seconds, SHAPES), PEAK, 4, 1, "made")
    assert choice.fit is not None
    assert choice.held_out["roofline"] < 0.05 < choice.held_out["line"]
    assert choice.fit.efficiency["1x1"] == pytest.approx(0.8, rel=0.05)
    assert choice.fit.memory_bytes_per_second == pytest.approx(8e9, rel=0.1)
    assert "held out" in choice.fit.source


def test_few_matmuls_are_not_asked_for_more_than_a_line() -> None:
    timings = measured("matmul f32", lambda shape: 1e-5 + float(np.prod(shape)) / 1e9, SHAPES[:4])
    assert set(fit_matmuls(timings, PEAK, 4, 1, "made").held_out) == {"line"}


def test_attention_gives_back_its_rate_length_and_backward() -> None:
    shapes = [(batch, 8, sequence, 64) for batch in (1, 4) for sequence in (128, 512, 2048, 4096)]

    def one_way(shape: tuple[int, ...], backward: bool) -> float:
        flops = attention_of(Case("attention xla f32", shape), backward).flops
        rate = PEAK * 0.5 * shape[2] / (shape[2] + 300)
        return 1e-5 + flops / (rate * (0.7 if backward else 1.0))

    forward = measured("attention xla f32", lambda shape: one_way(shape, False), shapes)
    both = measured("attention xla backward f32", lambda shape: one_way(shape, False) + one_way(shape, True), shapes)
    found = fit_attention(forward, both, PEAK, "made")
    assert found is not None
    fit, residual = found
    assert fit.efficiency == pytest.approx(0.5, rel=0.02)
    assert fit.half_length == pytest.approx(300, rel=0.1)
    assert fit.backward_share == pytest.approx(0.7, rel=0.02)
    assert residual.p90 < 0.02
    assert fit_attention(forward[:2], both, PEAK, "made") is None
