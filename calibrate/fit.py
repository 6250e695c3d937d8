"""Fits of measured times: a fixed part and a rate, with ranges and residuals.

Matmuls (FLOPs), memory-bound kernels (bytes) and messages (bytes) all follow the same law over their size:
``seconds = fixed_seconds + amount / amount_per_second``. For messages it is Hockney's alpha-beta model
(R. W. Hockney, Parallel Computing 20 (1994) 389-398).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from meshwright.calibrate.quantity import Quantity
from meshwright.calibrate.timing import Timing

OUTLIER_LOG_ERROR = 0.1  # residuals beyond about 10 % count linearly, not squared: a busy machine has outliers
SMALLEST_SECONDS = 1e-9  # below the clock's resolution, so that the logarithm of a vanishing fixed part exists
GREATEST_RATE_RATIO = 10.0  # a fitted rate is at most this many times the best mean rate of any size


@dataclass(frozen=True, slots=True)
class Residual:
    """How far a fit is from its measurements: relative errors |model / measured - 1| as fractions.

    ``low`` and ``high`` are the 10 % and 90 % quantiles of log(measured / model): negative where the kernel is quicker
    than the model says.
    """

    median: float
    p90: float
    points: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        text = f"error median {self.median:.0%}, p90 {self.p90:.0%} over {self.points} points"
        if self.low is None or self.high is None:
            return text
        return f"{text}, 10 % and 90 % of log(measured / model) {self.low:+.2f} and {self.high:+.2f}"


def residual_of(model: ArrayLike, measured: ArrayLike) -> Residual:
    """The residual of a model's times against those that were measured."""
    ratio = np.asarray(model, float) / np.asarray(measured, float)
    errors, signed = np.abs(ratio - 1), -np.log(ratio)
    low, high = (float(quantile) for quantile in np.quantile(signed, [0.1, 0.9]))
    return Residual(float(np.median(errors)), float(np.quantile(errors, 0.9)), len(ratio), low, high)


@dataclass(frozen=True, slots=True)
class RateFit:
    """``seconds = fixed_seconds + amount / amount_per_second`` with 95 % ranges."""

    fixed_seconds: Quantity
    amount_per_second: Quantity
    residual: Residual

    def seconds(self, amount: float) -> float:
        """The model's time for one amount (bytes or FLOPs)."""
        return self.fixed_seconds.value + amount / self.amount_per_second.value


@dataclass(frozen=True, slots=True)
class FittedFamily:
    """One row of the residual table; ``unit`` is of ``fit.amount_per_second``."""

    name: str
    ranks: int
    fit: RateFit
    unit: str


def fit_rate(amounts: ArrayLike, seconds: ArrayLike, source: str) -> RateFit:
    """Fit a fixed part and a rate to times over several orders of magnitude.

    Both parameters and the residuals are logarithms, so small and large sizes weigh alike, nothing turns negative, and
    a robust loss (soft L1) bounds the pull of outliers. Ranges are twice the standard error from the Jacobian at the
    solution, scaled by the remaining misfit.

    Args:
        amounts: bytes or FLOPs, positive.
        seconds: measured times, positive.
        source: where the times come from; the residual is appended to it.

    Raises:
        ValueError: fewer than two distinct amounts, or something not positive.
    """
    x = np.asarray(amounts, dtype=float)
    y = np.asarray(seconds, dtype=float)
    if x.shape != y.shape or len(np.unique(x)) < 2 or not (np.all(x > 0) and np.all(y > 0)):
        raise ValueError(f"a fit needs positive times of at least two distinct positive sizes, not {len(x)} points")

    def log_error(parameters: np.ndarray) -> np.ndarray:
        fixed, per_amount = np.exp(parameters)
        return np.asarray(np.log((fixed + x * per_amount) / y))

    order = np.argsort(x)
    start = np.log([max(y[order[0]], SMALLEST_SECONDS), y[order[-1]] / x[order[-1]]])
    # Noise can make a large size as quick as a small one: the rate stays within reach of those that were seen.
    lower = np.log([SMALLEST_SECONDS, np.min(y / x) / GREATEST_RATE_RATIO])
    found = least_squares(
        log_error, np.maximum(start, lower), bounds=(lower, np.inf), loss="soft_l1", f_scale=OUTLIER_LOG_ERROR
    )
    residual = residual_of(np.exp(log_error(found.x)), np.ones_like(x))
    spread = 2.0 * _standard_errors(found.jac, found.fun)
    fixed, per_amount = np.exp(found.x)
    text = f"{source}; {residual}"
    return RateFit(
        fixed_seconds=_ranged(fixed, spread[0], text),
        amount_per_second=_ranged(1.0 / per_amount, spread[1], text),
        residual=residual,
    )


def fit_timings(timings: Sequence[Timing], source: str) -> RateFit:
    """Fit the medians; the ranges also cover the fits of the lower and of the upper end of each timing's spread.

    So two sizes alone, which any line meets exactly, still tell how sure they are, and what rounds differ by counts.
    """
    amounts = [timing.amount for timing in timings]
    middle = fit_rate(amounts, [timing.seconds for timing in timings], source)
    quick = fit_rate(amounts, [timing.low_seconds for timing in timings], source)
    slow = fit_rate(amounts, [timing.high_seconds for timing in timings], source)
    return RateFit(
        fixed_seconds=_cover(middle.fixed_seconds, quick.fixed_seconds, slow.fixed_seconds),
        amount_per_second=_cover(middle.amount_per_second, quick.amount_per_second, slow.amount_per_second),
        residual=middle.residual,
    )


def _cover(middle: Quantity, *others: Quantity) -> Quantity:
    values = [other.value for other in others]
    low = middle.value if middle.low is None else middle.low
    high = middle.value if middle.high is None else middle.high
    return Quantity(middle.value, middle.source, min(low, *values), max(high, *values))


def _standard_errors(jacobian: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    freedom = max(1, len(residuals) - jacobian.shape[1])
    covariance = np.linalg.pinv(jacobian.T @ jacobian) * float(residuals @ residuals) / freedom
    return np.asarray(np.sqrt(np.diag(covariance)))


def _ranged(value: float, log_spread: float, source: str) -> Quantity:
    width = float(np.exp(min(log_spread, 3.0)))  # a parameter that the data do not determine keeps a wide, finite range
    return Quantity(float(value), source, float(value / width), float(value * width))
