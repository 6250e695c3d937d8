"""Fits of kernel models to tables of measured kernels: matmuls, fused attention, and streams side by side.

Every fit is of logarithms of times, so that small and large kernels weigh alike, and deterministic. What it is judged
by are points that it has not seen: shapes (n, k) are dealt out in turns to one half that is fitted and one that is not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from msgspec.structs import asdict, replace
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize

from meshwright.calibrate.device import ACTIVITIES, AttentionFit, Interference, MatmulFit
from meshwright.errors import ClusterError
from meshwright.simulate.compute import tiled_seconds

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

TILES = ("256x128", "128x128", "128x64", "64x64")  # what libraries choose among, from wide to narrow
MOST_POINTS = 2000  # of a table enter a fit; more change nothing but its duration
SPLITS = (1, 2, 3, 4, 6, 8)  # parts of the inner loop that are tried
LEAST_SHARE = 0.01  # of the peak: a tile so slow is never chosen
ROUNDS = 2  # of the simplex, each from where the one before ended
LEAST_RATE = 0.02  # of an activity beside others


@dataclass(frozen=True, slots=True)
class Error:
    """Relative errors |model / measured - 1| on points, as fractions; ``bias`` is the mean of model / measured - 1."""

    mean: float
    median: float
    p90: float
    bias: float
    points: int

    def __str__(self) -> str:
        return f"error mean {self.mean:.1%}, median {self.median:.1%}, p90 {self.p90:.1%} over {self.points} points"


def relative_error(model: Floats, measured: Floats) -> Error:
    """How far a model is from measurements."""
    ratio = model / measured - 1
    size = np.abs(ratio)
    median, p90 = (float(np.quantile(size, share)) for share in (0.5, 0.9))
    return Error(float(size.mean()), median, p90, float(ratio.mean()), len(ratio))


def halves(n: Floats, k: Floats) -> Bools:
    """True for the shapes (n, k) that are fitted: every second one in order."""
    pairs = np.unique(np.stack([n, k]), axis=1)
    chosen = {tuple(pair) for pair in pairs.T[::2].tolist()}
    return np.array([pair in chosen for pair in zip(n.tolist(), k.tolist(), strict=True)])


@dataclass(frozen=True, slots=True, eq=False)
class Matmuls:
    """Measured matmuls of one device and dtype: m × k by k × n, in seconds."""

    m: Floats
    n: Floats
    k: Floats
    seconds: Floats

    @property
    def training(self) -> Bools:
        """Shapes of training: many rows, wide matrices."""
        return (self.m >= 1024) & (self.n >= 512) & (self.k >= 512)

    def at(self, chosen: Bools | NDArray[np.int64]) -> "Matmuls":
        """Some of them."""
        return Matmuls(self.m[chosen], self.n[chosen], self.k[chosen], self.seconds[chosen])


def fit_matmul(
    table: Matmuls, compute_units: int, peak_flops_per_second: float, source: str
) -> tuple[MatmulFit, Error]:
    """Fit tiles, waves and memory to half of a table; returns the fit and its error on training shapes of the other.

    Shapes of training weigh most; some smaller ones pin what these say little of (launch and memory).

    Raises:
        ClusterError: the table has too few shapes.
    """
    fitted = halves(table.n, table.k)
    small = (table.m >= 64) & (table.n >= 256) & (table.k >= 256) & ~table.training
    chosen = [_some(table.training & fitted, MOST_POINTS), _some(small & fitted, MOST_POINTS // 5)]
    if len(chosen[0]) < 100:
        raise ClusterError(f"{len(chosen[0])} matmuls of training shapes are too few for a fit; at least 100 are")
    points = table.at(np.concatenate(chosen))
    weight = np.concatenate([np.ones(len(chosen[0])), 0.1 * np.ones(len(chosen[1]))])

    def fit_of(x: Floats) -> MatmulFit:
        return MatmulFit(
            source=source,
            compute_units=compute_units,
            efficiency=dict(zip(TILES, np.clip(np.exp(-np.exp(x[:4])), LEAST_SHARE, 1.0).tolist(), strict=True)),
            overhead_k=float(np.exp(x[4])),
            launch_seconds=float(np.exp(x[5])),
            memory_bytes_per_second=float(np.exp(x[6])),
            last_wave=float(1 / (1 + np.exp(-x[7]))),
            sharpness=float(1 + np.exp(x[8])),
            splits=SPLITS,
            split_bytes=float(np.exp(x[9])),
            throttle=float(np.exp(x[10])),
            throttle_seconds=float(np.exp(x[11])),
        )

    def seconds(fit: MatmulFit, of: Matmuls) -> Floats:
        return tiled_seconds(fit, of.m, of.n, of.k, np.ones(len(of.m)), peak_flops_per_second, 2)

    def loss(x: Floats) -> float:
        if np.abs(x).max() > 50:
            return 10.0
        log_error = np.abs(np.log(seconds(fit_of(x), points) / points.seconds))
        return float((log_error * weight).sum() / weight.sum())

    efficiencies = [np.log(-np.log(share)) for share in (0.85, 0.8, 0.7, 0.6)]
    starts = [
        np.array([*efficiencies, np.log(k0), np.log(4e-6), np.log(2e12), wave, 0.5, 1.0, np.log(0.05), np.log(1e-3)])
        for wave in (-2.0, 0.0)
        for k0 in (30.0, 150.0)
    ]
    best = min((_simplex(loss, start) for start in starts), key=lambda found: found[1])[0]
    fit = fit_of(best)
    held = table.at(table.training & ~fitted)
    error = relative_error(seconds(fit, held), held.seconds)
    rounded = {tile: round(share, 4) for tile, share in fit.efficiency.items()}
    numbers = {name: float(f"{value:.4g}") for name, value in asdict(fit).items() if isinstance(value, float)}
    return replace(fit, source=f"{source}; held-out {error}", efficiency=rounded, **numbers), error


@dataclass(frozen=True, slots=True, eq=False)
class Forwards:
    """Measured fused attention forwards of one device, in seconds.

    ``moved_bytes`` are queries, keys, values and results once; ``cached_bytes`` keys and values, which kernels of a
    server also copy into a cache.
    """

    keys: Floats
    flops: Floats
    moved_bytes: Floats
    cached_bytes: Floats
    seconds: Floats

    def at(self, chosen: Bools) -> "Forwards":
        """Some of them."""
        fields = (self.keys, self.flops, self.moved_bytes, self.cached_bytes, self.seconds)
        return Forwards(*(field[chosen] for field in fields))


def attention_seconds(
    fit: AttentionFit, of: Forwards, peak_flops_per_second: float, memory_bytes_per_second: float, cache_passes: float
) -> Floats:
    """The fit's times: arithmetic or traffic, whichever is longer, and the copy into a cache."""
    rate = peak_flops_per_second * fit.efficiency * of.keys / (of.keys + fit.half_length)
    moved = of.moved_bytes / memory_bytes_per_second
    cached = cache_passes * of.cached_bytes / memory_bytes_per_second
    return np.asarray(fit.launch_seconds + np.maximum(of.flops / rate, moved) + cached)


def fit_attention(
    table: Forwards, peak_flops_per_second: float, memory_bytes_per_second: float, source: str, backward_share: float
) -> tuple[AttentionFit, float, Error]:
    """Fit a rate that rises with the sequence to half of a table of fused forwards; the other half judges it.

    Returns the fit, how many times keys and values moved for a cache, which is no part of training and so not of the
    fit, and the error with the cache.
    """
    fitted = np.arange(len(table.keys)) % 2 == 0

    def fit_of(x: Floats) -> AttentionFit:
        efficiency, half_length, launch_seconds = np.exp(x[:3]).tolist()
        return AttentionFit(
            source=source,
            efficiency=efficiency,
            half_length=half_length,
            launch_seconds=launch_seconds,
            backward_share=backward_share,
        )

    def model(x: Floats, of: Forwards) -> Floats:
        return attention_seconds(fit_of(x), of, peak_flops_per_second, memory_bytes_per_second, float(np.exp(x[3])))

    seen, held = table.at(fitted), table.at(~fitted)

    def residual(x: Floats) -> Floats:
        difference: Floats = np.log(model(x, seen) / seen.seconds)
        return difference

    low, high = np.log([1e-3, 1e-3, 1e-7, 1e-3]), np.log([1.0, 1e5, 1e-3, 20.0])
    start = np.log([0.6, 300.0, 8e-6, 1.0])
    found = least_squares(residual, start, bounds=(low, high), loss="soft_l1", f_scale=0.1).x
    error = relative_error(model(found, held), held.seconds)
    passes = float(np.exp(found[3]))
    text = f"{source}; {passes:.1f} passes over keys and values for a cache taken off; held-out {error}"
    rounded = {name: float(f"{value:.4g}") for name, value in asdict(fit_of(found)).items() if name != "source"}
    return replace(fit_of(found), source=text, **rounded), passes, error


def fit_interference(alone_seconds: Floats, together_seconds: Floats, source: str) -> tuple[Interference, Error]:
    """Fit rates[mask][activity] to activities that were started together; half of the rows judge it.

    Args:
        alone_seconds: (rows, activities) what each takes with nothing beside it; 0: it is not there.
        together_seconds: (rows,) until the last one ends.
    """
    fitted = np.arange(len(together_seconds)) % 2 == 0
    masks = [mask for mask in range(1 << len(ACTIVITIES)) if mask.bit_count() > 1]
    places = [(mask, bit) for mask in masks for bit in range(len(ACTIVITIES)) if mask >> bit & 1]

    def table(x: Floats) -> Floats:
        rates = np.ones((1 << len(ACTIVITIES), len(ACTIVITIES)))
        for (mask, bit), rate in zip(places, x, strict=True):
            rates[mask, bit] = rate
        return rates

    def residual(x: Floats) -> Floats:
        difference: Floats = np.log(side_by_side(table(x), alone_seconds[fitted]) / together_seconds[fitted])
        return difference

    start = np.full(len(places), 0.7)
    found = least_squares(residual, start, bounds=(LEAST_RATE, 1.0), loss="soft_l1", f_scale=0.1).x
    rates = np.round(table(found), 4)
    error = relative_error(side_by_side(rates, alone_seconds[~fitted]), together_seconds[~fitted])
    return Interference(source=f"{source}; held-out {error}", rates=tuple(map(tuple, rates.tolist()))), error


def side_by_side(rates: Floats, alone_seconds: Floats) -> Floats:
    """Seconds until the last of some activities ends that start together, for each row, at the rates of the table."""
    left = alone_seconds.copy()
    now = np.zeros(len(left))
    bits = 1 << np.arange(left.shape[1])
    for _ in range(left.shape[1]):
        going = left > 0
        rate = rates[(going * bits).sum(axis=1)]
        step = np.where(going, left / rate, np.inf).min(axis=1)
        step = np.where(np.isfinite(step), step, 0.0)
        left = np.where(going & (left / rate > step[:, None] * (1 + 1e-12)), left - rate * step[:, None], 0.0)
        now += step
    return now


def _some(mask: Bools, most: int) -> NDArray[np.int64]:
    """Positions of the marked points, evenly thinned to so many."""
    marked = np.flatnonzero(mask)
    return marked if len(marked) <= most else marked[np.linspace(0, len(marked) - 1, most).astype(np.int64)]


def _simplex(loss: Callable[[Floats], float], start: Floats) -> tuple[Floats, float]:
    """Nelder and Mead's minimum, found anew a few times from where it ended: the model has kinks."""
    x, value = start, loss(start)
    for _ in range(ROUNDS):
        simplex = np.vstack([x, x + 0.3 * np.eye(len(x))])
        options = {"maxfev": 1200, "adaptive": True, "initial_simplex": simplex}
        found = minimize(loss, x, method="Nelder-Mead", options=options)
        x, value = found.x, float(found.fun)
    return x, value
