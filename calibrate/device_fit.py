"""Fits of one device's kernels: matmuls by a line, a roofline or tiles, whichever predicts best; attention; streams.

Here a device has tens of timings, not the ten thousands of a published table (``kernels``), so every form is kept to
as few parameters as it can do with, and is judged by timings that its fit has not seen, a quarter of them at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from msgspec.structs import asdict, replace
from numpy.typing import NDArray
from scipy.optimize import least_squares

from meshwright.calibrate.benchmarks import Case, attention_of
from meshwright.calibrate.device import AttentionFit, MatmulFit
from meshwright.calibrate.fit import OUTLIER_LOG_ERROR, Residual, fit_rate, residual_of
from meshwright.calibrate.kernels import TILES
from meshwright.calibrate.timing import Timing
from meshwright.simulate.compute import tiled_seconds

Floats = NDArray[np.float64]
FOLDS = 4
FEWEST_MATMULS = 8  # of a dtype for a roofline of its own
FEWEST_TILED = 40  # for tiles, which have more parameters
WORTH_A_FORM = 0.95  # a form with more parameters must bring the held-out error below this share of a simpler one's
ONE = "1x1"  # the tile of a device that has none: arithmetic in proportion to its FLOPs
SHARPEST = 8.0  # of the corner between arithmetic and memory


@dataclass(frozen=True, slots=True)
class MatmulChoice:
    """The form that won for a dtype: None is the line of ``matmul_efficiency``; with the held-out error of each."""

    fit: MatmulFit | None
    held_out: dict[str, float]
    residual: Residual

    def __str__(self) -> str:
        errors = ", ".join(f"{form} {error:.1%}" for form, error in self.held_out.items() if isfinite(error))
        return f"mean error at shapes held out: {errors or 'too few to tell'}; {self.residual}"


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Matmuls as columns."""

    shape: Floats  # (timings, 4): batch, m, n, k
    seconds: Floats

    def at(self, chosen: NDArray[np.bool_]) -> "_Table":
        return _Table(self.shape[chosen], self.seconds[chosen])


Model = Callable[[Floats], Floats]  # shapes to seconds


def fit_matmuls(
    timings: Sequence[Timing], peak_flops_per_second: float, element_bytes: int, compute_units: int, source: str
) -> MatmulChoice:
    """The form that predicts a dtype's matmuls best at shapes that its fit has not seen.

    Three are tried, from simple to rich: a line over FLOPs; a roofline with a start-up time, whose inner loops have a
    fixed part (``MatmulFit`` of one tile of 1 × 1); and tiles in waves. On a CPU, tiles mean little and seldom win.

    Args:
        peak_flops_per_second: of the dtype; efficiencies are relative to it, and at most 1.
    """
    table = _Table(
        np.array([timing.shape for timing in timings], float), np.array([timing.seconds for timing in timings])
    )
    forms: dict[str, Callable[[_Table], tuple[Model, MatmulFit | None]]] = {"line": _line}
    if len(timings) >= FEWEST_MATMULS:
        forms["roofline"] = lambda of: _tiled(of, (ONE,), peak_flops_per_second, element_bytes, 1, source)
    if len(timings) >= FEWEST_TILED:
        forms["tiles"] = lambda of: _tiled(of, TILES, peak_flops_per_second, element_bytes, compute_units, source)
    held_out = {form: _held_out(fit, table) for form, fit in forms.items()}
    best = "line"
    for form, error in held_out.items():
        if error < WORTH_A_FORM * held_out[best]:
            best = form
    model, fit = forms[best](table)
    choice = MatmulChoice(fit, held_out, residual_of(model(table.shape), table.seconds))
    if fit is None:
        return choice
    return MatmulChoice(_rounded(fit, f"{source}, {best}; {choice}"), held_out, choice.residual)


def fit_attention(
    forward: Sequence[Timing], backward: Sequence[Timing], peak_flops_per_second: float, source: str
) -> tuple[AttentionFit, Residual] | None:
    """A rate that rises with the sequence; None with fewer than three shapes. A backward's timing holds its forward.

    ``backward_share`` is the median over the shapes of backwards, at most 1, which is as far as the form goes.
    """
    if len(forward) < 3:
        return None
    keys = np.array([timing.shape[2] for timing in forward], float)
    flops = np.array([timing.amount for timing in forward])
    seconds = np.array([timing.seconds for timing in forward])

    def model(x: Floats, keys: Floats, flops: Floats) -> Floats:
        efficiency, half, launch = np.exp(x)
        found: Floats = launch + flops * (keys + half) / (peak_flops_per_second * efficiency * keys)
        return found

    def log_error(x: Floats) -> Floats:
        found: Floats = np.log(model(x, keys, flops) / seconds)
        return found

    low, high = np.log([1e-4, 1e-1, 1e-7]), np.log([1.0, 1e5, max(1e-3, seconds.min())])
    start = np.log([min(0.9, max(2e-4, (flops / seconds).max() / peak_flops_per_second)), 64.0, 5e-6])
    x = least_squares(log_error, start, bounds=(low, high), loss="soft_l1", f_scale=OUTLIER_LOG_ERROR).x
    shares = []
    for timing in backward:
        length = np.array([float(timing.shape[2])])
        whole = attention_of(Case(timing.family, timing.shape), backward=True).flops
        ahead = float(model(x, length, np.array([timing.amount - whole]))[0])
        launch = float(np.exp(x[2]))
        rate = float((whole / (model(x, length, np.array([whole])) - launch))[0])
        shares.append(whole / max(timing.seconds - ahead - launch, 1e-9) / rate)
    residual = residual_of(model(x, keys, flops), seconds)
    efficiency, half, launch = (float(f"{number:.4g}") for number in np.exp(x))
    share = float(np.clip(np.median(shares), 0.05, 1.0)) if shares else 1.0
    text = f"{source}; {residual}; backward from {len(shares)} shapes"
    fit = AttentionFit(
        source=text, efficiency=efficiency, half_length=half, launch_seconds=launch, backward_share=round(share, 4)
    )
    return fit, residual


def _line(table: _Table) -> tuple[Model, None]:
    fit = fit_rate(2 * table.shape.prod(axis=1), table.seconds, "line")
    fixed, rate = fit.fixed_seconds.value, fit.amount_per_second.value
    return lambda shape: fixed + 2 * shape.prod(axis=1) / rate, None


def _tiled(
    table: _Table, tiles: tuple[str, ...], peak: float, element_bytes: int, compute_units: int, source: str
) -> tuple[Model, MatmulFit]:
    """Least squares of log times; with one tile of 1 × 1, waves are whole and play no part."""
    whole = tiles == (ONE,)

    def fit_of(x: Floats) -> MatmulFit:
        shares = np.exp(-np.exp(x[4:])) if whole else np.exp(-np.exp(x[5:]))
        return MatmulFit(
            source=source,
            compute_units=compute_units,
            efficiency=dict(zip(tiles, np.clip(shares, 1e-9, 1.0).tolist(), strict=True)),
            overhead_k=float(np.exp(x[0])),
            launch_seconds=float(np.exp(x[1])),
            memory_bytes_per_second=float(np.exp(x[2])),
            sharpness=float(1 + np.exp(x[3])),
            last_wave=1.0 if whole else float(1 / (1 + np.exp(-x[4]))),
        )

    def seconds(fit: MatmulFit, shape: Floats) -> Floats:
        batch, m, n, k = shape.T
        return tiled_seconds(fit, m, n, k, batch, peak, element_bytes)

    def log_error(x: Floats) -> Floats:
        found: Floats = np.log(seconds(fit_of(x), table.shape) / table.seconds)
        return found

    moved = element_bytes * _elements(table.shape)
    stream = float(np.max(moved / table.seconds))  # no traffic was quicker, so memory is at least so fast
    best = float(np.clip(np.max(2 * table.shape.prod(axis=1) / table.seconds) / peak, 1e-3, 0.98))
    shares = [float(np.log(-np.log(best)))] * len(tiles)
    wave = [] if whole else [0.0]
    start = np.array(
        [np.log(16.0), np.log(max(1e-7, 0.3 * table.seconds.min())), np.log(2 * stream), 0.0, *wave, *shares]
    )
    low = np.array([-3.0, np.log(1e-8), np.log(0.5 * stream), -4.0, *(-6.0 for _ in wave), *(-7.0 for _ in tiles)])
    high = np.array(
        [np.log(1e3), np.log(table.seconds.min()), np.log(1e3 * stream), np.log(SHARPEST), *(6.0 for _ in wave)]
        + [2.5 for _ in tiles]
    )
    start = np.clip(start, low + 1e-6, high - 1e-6)
    found = least_squares(log_error, start, bounds=(low, high), loss="soft_l1", f_scale=OUTLIER_LOG_ERROR, max_nfev=300)
    fit = fit_of(found.x)
    return lambda shape: seconds(fit, shape), fit


def _held_out(fit: Callable[[_Table], tuple[Model, MatmulFit | None]], table: _Table) -> float:
    """Mean |model / measured - 1| of timings by a fit of the others, every fourth of them (by FLOPs) at a time."""
    places = np.argsort(np.argsort(table.shape.prod(axis=1), kind="stable"), kind="stable") % FOLDS
    errors: list[float] = []
    for fold in range(FOLDS):
        hidden = places == fold
        if hidden.any() and len(np.unique(table.shape[~hidden].prod(axis=1))) > 1:
            model, _ = fit(table.at(~hidden))
            errors += np.abs(model(table.shape[hidden]) / table.seconds[hidden] - 1).tolist()
    return float(np.mean(errors)) if errors else float("inf")


def _elements(shape: Floats) -> Floats:
    batch, m, n, k = shape.T
    moved: Floats = batch * (m * k + k * n + m * n)
    return moved


def _rounded(fit: MatmulFit, source: str) -> MatmulFit:
    rounded = {tile: float(f"{share:.4g}") for tile, share in fit.efficiency.items()}
    numbers = {name: float(f"{value:.4g}") for name, value in asdict(fit).items() if isinstance(value, float)}
    return replace(fit, source=source, efficiency=rounded, **numbers)
