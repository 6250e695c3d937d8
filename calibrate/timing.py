"""Timings as data, and how one is taken: warm first, repeat, keep the median and the spread. Free of JAX and MPI."""

import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

# Families of timings, each of which is fitted by itself; a collective's family is its kind.
DISPATCH, LAUNCH, MEMORY, MATMUL, P2P = "dispatch", "launch", "memory", "matmul ", "p2p"

MOST_REPEATS = 200
FEWEST_REPEATS = 5


class Timing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Repeated measurement of one thing: its family (one fit each), its size and the spread of its times.

    ``amount`` is FLOPs for matmuls and bytes for everything else; ``ranks`` is 1 unless ranks work together. Ranks of
    one group are ``stride`` apart, and ``groups`` such groups were at it at once.
    """

    family: str
    amount: float
    seconds: float
    low_seconds: float
    high_seconds: float
    repeats: int
    ranks: int = 1
    stride: int = 1
    groups: int = 1


class ComputeTimings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that was measured on one device, and what the machine says of itself."""

    device_kind: str
    platform: str
    devices: int
    cores: int
    memory_bytes: int
    jax_version: str
    settings: str  # the environment that decides how many threads compute
    timings: tuple[Timing, ...]


class BusyRanks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mean times of one matmul in each round: on one rank alone, and on ``ranks`` ranks at once."""

    ranks: int
    alone_seconds: tuple[float, ...]
    busy_seconds: tuple[float, ...]


class Overlap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A matmul program and a message on one rank: each alone, and until both end when they start together.

    ``activity`` is the message's, as in ``device.ACTIVITIES``: a collective, or a copy to or from the host.
    """

    activity: str
    message_bytes: float
    compute_seconds: float
    message_seconds: float
    together_seconds: float


class NetworkTimings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that was measured between the ranks of one machine."""

    ranks: int
    alone_seconds: tuple[float, ...]  # one matmul, while the other ranks sleep
    busy_seconds: tuple[float, ...]  # the same matmul with all ranks at it
    timings: tuple[Timing, ...]
    sharing: tuple[BusyRanks, ...] = ()  # the same by the number of busy ranks
    overlaps: tuple[Overlap, ...] = ()


def timing(family: str, amount: float, samples: Sequence[float], ranks: int = 1) -> Timing:
    """Median of the samples, with their quartiles as the spread."""
    low, middle, high = (float(q) for q in np.quantile(samples, [0.25, 0.5, 0.75]))
    return Timing(
        family=family,
        amount=amount,
        seconds=middle,
        low_seconds=low,
        high_seconds=high,
        repeats=len(samples),
        ranks=ranks,
    )


def sample(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls; ``call`` returns only when its work is done."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def repeats_within(trial_seconds: float, budget_seconds: float) -> int:
    """How many calls fit a budget, between the fewest that make a median and the most that still teach something."""
    return int(np.clip(budget_seconds / max(trial_seconds, 1e-9), FEWEST_REPEATS, MOST_REPEATS))


def sample_within(call: Callable[[], object], budget_seconds: float) -> list[float]:
    """Warm a call (it may compile), then repeat it for about ``budget_seconds``."""
    call()
    trial = min(sample(call, 2))
    return sample(call, repeats_within(trial, budget_seconds))
