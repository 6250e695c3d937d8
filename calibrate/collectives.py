"""Fits of measured collectives: the least of up to three straight pieces, and the share of a network's wire.

A library changes its protocol with the size of the message (NCCL: LL, LL128, Simple, each with more latency and more
bandwidth than the one before), so one straight line is 13 % off where three are 4 % (``experiments/fit_links.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares, nnls

from meshwright.calibrate.fit import OUTLIER_LOG_ERROR, fit_rate
from meshwright.calibrate.link import MOST_PIECES, CollectiveFit, Piece
from meshwright.calibrate.quantity import Quantity

Floats = NDArray[np.float64]
POINTS_PER_PIECE = 3  # two parameters each, and a point to see whether the line is one
MOST_CUTS = 24  # places where one piece may end and the next begin that are tried
STARTS = 4  # of them, those from which the fit is polished
LOWER, UPPER = np.log([1e-9, 1e-17]), np.log([1e3, 1e-2])  # seconds, and seconds per byte, that a piece may have
DIGITS = 4  # of a fitted number that are worth keeping


@dataclass(frozen=True, slots=True)
class PieceFit:
    """Straight pieces (latency in seconds, bytes per second), that of the largest messages first, and their error.

    Errors are means of |model / measured - 1|; ``held_out`` is that at sizes which a fit of every other size has not
    seen, the mean over both halves.
    """

    lines: tuple[tuple[float, float], ...]
    error: float
    held_out: float
    points: int

    def __str__(self) -> str:
        held_out = "" if np.isnan(self.held_out) else f", at sizes held out {self.held_out:.1%}"
        return f"error mean {self.error:.1%}{held_out}, {self.points} points"

    def seconds(self, message_bytes: ArrayLike) -> Floats:
        """The model's times."""
        return _seconds(np.log([[a, 1 / rate] for a, rate in self.lines]), np.asarray(message_bytes, float))

    def entry(self, ranks: int, source: str, algorithm: str = "ring") -> CollectiveFit:
        """The fit as a machine file has it."""
        text = f"{source}; {self}"
        pairs = [(Quantity(_rounded(latency), text), Quantity(_rounded(rate), text)) for latency, rate in self.lines]
        return CollectiveFit(
            ranks=ranks,
            latency_seconds=pairs[0][0],
            bytes_per_second=pairs[0][1],
            pieces=tuple(Piece(latency_seconds=latency, bytes_per_second=rate) for latency, rate in pairs[1:]),
            algorithm="nvls" if algorithm == "nvls" else "ring",
        )


def fit_pieces(message_bytes: ArrayLike, seconds: ArrayLike, most: int = MOST_PIECES) -> PieceFit:
    """Fit the least of up to ``most`` straight pieces to measured times.

    Residuals are logarithms under a robust loss (as in ``fit.fit_rate``). The starts are all ways to cut the sizes
    into neighbouring runs with a line each, of which the best are polished; nothing is random.

    Raises:
        ValueError: fewer than two distinct sizes, or something not positive.
    """
    x, y = np.asarray(message_bytes, float), np.asarray(seconds, float)
    if x.shape != y.shape or len(np.unique(x)) < 2 or not (np.all(x > 0) and np.all(y > 0)):
        raise ValueError(f"a fit needs positive times of at least two distinct positive sizes, not {len(x)} points")
    found = _fit(x, y, most)
    latency, per_byte = np.exp(found).T
    lines = tuple(zip(latency.tolist(), (1 / per_byte).tolist(), strict=True))
    error = float(np.mean(np.abs(_seconds(found, x) / y - 1)))
    return PieceFit(lines, error, held_out_error(x, y, most), len(x))


def held_out_error(message_bytes: ArrayLike, seconds: ArrayLike, most: int = MOST_PIECES) -> float:
    """Mean |model / measured - 1| at every other size by a fit of the rest, the mean over both halves.

    With fewer than four sizes there is nothing to hold out, and the error is not a number.
    """
    x, y = np.asarray(message_bytes, float), np.asarray(seconds, float)
    sizes = np.unique(x)
    if len(sizes) < 4:
        return float("nan")
    errors = []
    for half in (0, 1):
        seen = np.isin(x, sizes[half::2])
        errors.append(np.mean(np.abs(_seconds(_fit(x[seen], y[seen], most), x[~seen]) / y[~seen] - 1)))
    return float(np.mean(errors))


def wire_share(
    message_bytes: ArrayLike, seconds: ArrayLike, sent_share: float, wire_bytes_per_second: float, source: str
) -> Quantity:
    """Share of a network's nominal bandwidth that large collectives reach.

    Args:
        message_bytes: sizes of an array, large enough to be bound by the network.
        seconds: measured times.
        sent_share: bytes that each host sends for each byte of the array, 2(k-1)/k for an all-reduce over k hosts.
        wire_bytes_per_second: nominal bandwidth of a host, one way.
        source: where the times come from; the residual is appended to it.
    """
    rate = fit_rate(message_bytes, seconds, source).amount_per_second
    share = rate.scaled(sent_share / wire_bytes_per_second)
    return Quantity(_rounded(share.value), share.source)


def spread(sizes: Sequence[float], per_doubling: int = 4) -> list[int]:
    """Positions of sizes that lie evenly by their logarithm, so that a table of equal steps does not weigh its end."""
    order = np.argsort(sizes, kind="stable")
    logs = np.log2(np.asarray(sizes, float)[order])
    _, first = np.unique(np.round(logs * per_doubling), return_index=True)
    return [int(order[index]) for index in first]


def _seconds(lines: Floats, x: Floats) -> Floats:
    """Times by rows of (log latency, log seconds per byte)."""
    latency, per_byte = np.exp(lines).T
    return np.asarray((latency[:, None] + per_byte[:, None] * x).min(axis=0))


def _fit(x: Floats, y: Floats, most: int) -> Floats:
    sizes = np.unique(x)
    count = max(1, min(most, len(sizes) // POINTS_PER_PIECE))

    def log_error(parameters: Floats) -> Floats:
        return np.asarray(np.log(_seconds(parameters.reshape(-1, 2), x) / y))

    starts = [np.array(lines) for lines in _cuts(x, y, sizes, count)]
    starts.sort(key=lambda lines: float(np.mean(np.abs(log_error(lines.ravel())))))
    bounds = (np.tile(LOWER, count), np.tile(UPPER, count))
    polished = [
        least_squares(log_error, lines.ravel(), bounds=bounds, loss="soft_l1", f_scale=OUTLIER_LOG_ERROR / 2)
        for lines in starts[:STARTS]
    ]
    lines = min(polished, key=lambda found: float(found.cost)).x.reshape(-1, 2)
    latency, per_byte = np.exp(lines).T
    used = np.unique(np.argmin(latency[:, None] + per_byte[:, None] * sizes, axis=0))
    lines = lines[used]
    return np.asarray(lines[np.argsort(-lines[:, 0], kind="stable")])


def _cuts(x: Floats, y: Floats, sizes: Floats, count: int) -> list[list[Floats]]:
    """For each way to cut the sizes into runs of at least two, the line of each run."""
    places: Sequence[int] = (
        np.unique(np.linspace(2, len(sizes) - 2, MOST_CUTS).round().astype(int)).tolist() if count > 1 else []
    )
    known: dict[tuple[int, int], Floats] = {}

    def line(first: int, stop: int) -> Floats:
        if (first, stop) not in known:
            inside = (x >= sizes[first]) & (x <= sizes[stop - 1])
            known[first, stop] = _line(x[inside], y[inside])
        return known[first, stop]

    ways = []
    for cuts in combinations(places, count - 1):
        edges = (0, *cuts, len(sizes))
        runs = list(pairwise(edges))
        if all(stop - first >= 2 for first, stop in runs):
            ways.append([line(first, stop) for first, stop in runs])
    return ways


def _line(x: Floats, y: Floats) -> Floats:
    """The line of least relative error, as logarithms inside the bounds."""
    found, _ = nnls(np.stack([1 / y, x / y], axis=1), np.ones(len(x)))
    margin = 1e-6  # a start must lie inside the bounds, not on them
    return np.asarray(np.clip(np.log(np.maximum(found, np.exp(LOWER))), LOWER + margin, UPPER - margin))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
