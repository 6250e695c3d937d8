"""Random numbers by address, and what a set of samples says.

A number is a pure function of (seed, sample, purpose, index) and not of what was drawn before it, so samples may run on
any number of threads in any order, and two runs that differ in one setting meet the same chances everywhere else.
"""

from dataclasses import dataclass
from math import isfinite

import numpy as np
from numba import njit
from numpy.typing import NDArray

from meshwright.errors import ScheduleError

Floats = NDArray[np.float64]
TASK, DEVICE, HOST, LINK, FAILURE = (np.uint64(purpose) for purpose in range(5))
MOST_SAMPLES = 10**7
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@njit(cache=True)
def philox(
    c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Philox4x32-10: four random words of 32 bits from a counter of four and a key of two, each held in a uint64.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.
    """
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _STEPS[0]) & _LOW, (k1 + _STEPS[1]) & _LOW
    return c0, c1, c2, c3


@njit(cache=True)
def uniforms(seed: np.uint64, sample: int, purpose: np.uint64, index: int) -> tuple[float, float]:
    """Two independent numbers, uniform on (0, 1) with 52 bits; ``index`` is below 2^32."""
    s = np.uint64(sample)
    a, b, c, d = philox(np.uint64(index), purpose, s & _LOW, s >> _HALF, seed & _LOW, seed >> _HALF)
    high, low = np.uint64(12), np.uint64(20)
    # The half in the middle of the last step keeps 0 and 1 themselves out, whose logarithms are not numbers to use.
    first = (np.float64((a << low) | (b >> high)) + 0.5) * 2.0**-52
    second = (np.float64((c << low) | (d >> high)) + 0.5) * 2.0**-52
    return first, second


@njit(cache=True)
def normals(seed: np.uint64, sample: int, purpose: np.uint64, index: int) -> tuple[float, float]:
    """Two independent standard normal numbers (Box and Muller, Ann. Math. Stat. 29 (1958) 610-611)."""
    first, second = uniforms(seed, sample, purpose, index)
    radius, angle = np.sqrt(-2.0 * np.log(first)), 2.0 * np.pi * second
    return radius * np.cos(angle), radius * np.sin(angle)


@njit(cache=True)
def lognormal(sigma: float, normal: float) -> float:
    """A factor of mean 1 whose logarithm has the standard deviation ``sigma``."""
    factor: float = np.exp(sigma * (normal - 0.5 * sigma))
    return factor


def check_samples(samples: int, seed: int) -> np.uint64:
    """The seed as the generator wants it.

    Raises:
        ScheduleError: the number of samples or the seed is out of range.
    """
    if not 1 <= samples <= MOST_SAMPLES:
        raise ScheduleError(f"{samples} samples were asked for; give 1 to {MOST_SAMPLES}")
    if not 0 <= seed < 2**64:
        raise ScheduleError(f"the seed is {seed}; give an integer from 0 to 2^64 - 1")
    return np.uint64(seed)


def refuse_outside(name: str, number: float, low: float, high: float = np.inf) -> None:
    """Raise ``ScheduleError`` unless the number is finite and from ``low`` to ``high``."""
    if not (isfinite(number) and low <= number <= high):
        wanted = f"a finite number of at least {low:g}" if high == np.inf else f"a number from {low:g} to {high:g}"
        raise ScheduleError(f"{name} is {number}; {wanted} is needed")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Sampled:
    """Seconds of each sample, in the order of the samples."""

    seconds: Floats

    @property
    def mean_seconds(self) -> float:
        """Mean over the samples."""
        return float(self.seconds.mean())

    @property
    def std_seconds(self) -> float:
        """Standard deviation of one sample (n - 1 in the denominator); 0 for a single one."""
        return float(self.seconds.std(ddof=1)) if len(self.seconds) > 1 else 0.0

    @property
    def standard_error_seconds(self) -> float:
        """How far the mean may be from that of infinitely many samples: one standard deviation of it."""
        return self.std_seconds / float(np.sqrt(len(self.seconds)))

    def quantile(self, share: float) -> float:
        """Seconds that this share of the samples does not exceed (linear between neighbouring samples)."""
        refuse_outside("the share of a quantile", share, 0, 1)
        return float(np.quantile(self.seconds, share))

    @property
    def low_seconds(self) -> float:
        """Lower end of the interval that holds the middle 80 % of the samples."""
        return self.quantile(0.1)

    @property
    def high_seconds(self) -> float:
        """Upper end of the interval that holds the middle 80 % of the samples."""
        return self.quantile(0.9)
