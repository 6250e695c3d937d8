"""How far a measured step is from its prediction: intervals as data, and the conformal rule that makes them.

Errors of single kernels average out over the thousands of a step. What is left is common to all of them (clocks, the
software, how busy the network is), so the range of a step comes from steps that were measured whole. ``intervals.json``
holds what such steps say, each interval with its source; ``experiments.fit_intervals`` writes it.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cache
from math import exp, hypot, isfinite, log
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.calibrate.quantity import Quantity, Record
from meshwright.errors import ClusterError

SHIPPED = Path(__file__).with_name("intervals.json")
FORMAT, VERSION = "meshwright-intervals", 1
COVERAGE = 0.8
EXTREMES = 2  # groups that must lie beyond a quantile, so that it is not the most extreme group itself
ROUNDING = 1e-9  # sums of shares

Floats = NDArray[np.float64]


class Interval(Record, frozen=True, kw_only=True):
    """Measured over predicted seconds lie from ``low`` to ``high`` in ``COVERAGE`` of all cases; 1 is inside.

    ``groups`` of ``rows`` measured steps tell so: rows of a group are alike, groups are not.
    """

    low: float
    high: float
    rows: int
    groups: int
    source: str

    def __post_init__(self) -> None:
        if not (0 < self.low <= 1 <= self.high and isfinite(self.high)):
            raise ClusterError(
                f"low and high are {self.low:g} and {self.high:g}; "
                "of measured over predicted seconds, 0 < low <= 1 <= high is needed"
            )
        if not self.source.strip():
            raise ClusterError("source is empty; say which measured steps the interval comes from")

    def widened(self, quantity: Quantity) -> "Interval":
        """With the range of a rate of one device as a second, independent error: the logarithms add in squares.

        A step can be as much quicker as the rate can be higher.
        """
        quicker = 0.0 if quantity.high is None else log(quantity.high / quantity.value)
        slower = 0.0 if not quantity.low else log(quantity.value / quantity.low)
        low, high = exp(-hypot(log(self.low), quicker)), exp(hypot(log(self.high), slower))
        return msgspec.structs.replace(self, low=low, high=high)


class IntervalsFile(Record, frozen=True, kw_only=True):
    """The text form.

    ``systems`` are, by software stack, those on which whole steps were measured and constants fitted. ``elsewhere`` is
    for steps on a system that nobody measured, ``calibrated`` for a machine file that knows whole programs.
    """

    format: str
    version: int
    systems: dict[str, dict[str, Interval]]
    elsewhere: Interval
    calibrated: Interval


def conformal_interval(
    log_ratios: Sequence[float], groups: Sequence[Hashable], pools: Sequence[Hashable] | None = None
) -> tuple[float, float] | None:
    """Range of measured over predicted seconds that a step of a new group falls into with probability ``COVERAGE``.

    Groups weigh alike, and one more stands for the new one, at infinity. Each tail gets half of what may be missed
    where ``EXTREMES`` groups fit into it; with fewer groups both ends are equally far from 1. None of groups so few
    that no finite interval can be told (fewer than 4). With ``pools``, that is said of a new pool.

    Args:
        log_ratios: logarithm of measured over predicted seconds of each row, of rows that the prediction has not seen.
        groups: of each row; exchangeable with the new one.
        pools: of each row; where given, they are what is exchangeable: they weigh alike, and groups within each.
    Source: Lee, Barber and Willett, "Distribution-free inference with hierarchical data", arXiv:2306.06342, after Dunn,
    Wasserman and Ramdas, arXiv:1809.07441. That the range always holds 1, the prediction itself, is ours.
    """
    ratios = np.asarray(log_ratios, np.float64)
    count = len(set(pools or groups))
    masses = _masses(groups, pools) * count / (count + 1)
    if count / (count + 1) < COVERAGE - ROUNDING:
        return None
    missed = (1.0 - COVERAGE) / 2
    if (count + 1) * missed >= EXTREMES - ROUNDING:
        low, high = -_quantile(-ratios, masses, 1.0 - missed), _quantile(ratios, masses, 1.0 - missed)
    else:
        high = _quantile(np.abs(ratios), masses, COVERAGE)
        low = -high
    return exp(min(low, 0.0)), exp(max(high, 0.0))


def _masses(groups: Sequence[Hashable], pools: Sequence[Hashable] | None) -> Floats:
    """The weight of each row; all of them together weigh 1."""
    keys = list(zip(pools or [None] * len(groups), groups, strict=True))
    rows = Counter(keys)
    inside = Counter(pool for pool, _ in rows)
    return np.array([1.0 / (len(inside) * inside[pool] * rows[pool, group]) for pool, group in keys])


def _quantile(values: Floats, masses: Floats, share: float) -> float:
    """The least value at or below which lies the share; what is missing to a mass of 1 lies at infinity."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(masses[order])
    reached = int(np.searchsorted(below, share - ROUNDING))
    return float(values[order[min(reached, len(values) - 1)]])


def find_interval(stack: str | None = None, system: str | None = None) -> Interval:
    """The interval of steps of a software stack on a system that it was measured on; elsewhere, the wider one."""
    known = shipped_intervals()
    return known.systems.get(stack or "", {}).get(system or "", known.elsewhere)


@cache
def shipped_intervals() -> IntervalsFile:
    """What ``intervals.json`` says."""
    return msgspec.json.decode(SHIPPED.read_bytes(), type=IntervalsFile)
