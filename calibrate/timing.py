"""Timings as data, and how one is taken: warm first, repeat, keep the median and the spread. Free of JAX and MPI."""

import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

# Families of timings, each of which is fitted by itself; a collective's family is its kind. Those that end with a
# space are followed by what they come in: a dtype, or the kind of kernel.
DISPATCH, ARGUMENT, LAUNCH, MATMUL, P2P = "dispatch", "argument", "launch", "matmul ", "p2p"
ATTENTION, CONVOLUTION, MEMORY, COPY = "attention ", "convolution ", "memory ", "copy "

PACE_SIZE = 256  # of the f32 matmul by which a core's pace is told
MOST_REPEATS = 200
FEWEST_REPEATS = 5
BATCH_SECONDS = 5e-4  # calls are waited for in batches of about this long
MOST_CALLS = 256  # of a batch


class Timing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Repeated measurement of one thing: its family (one fit each), its size and the spread of its times.

    ``amount`` is FLOPs for matmuls and bytes for everything else; ``ranks`` is 1 unless ranks work together. Ranks of
    one group are ``stride`` apart, and ``groups`` such groups were at it at once. ``shape`` is a kernel's (its meaning
    is the family's, see ``benchmarks``), ``rounds`` the median of each round in which it was measured.
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
    shape: tuple[int, ...] = ()
    rounds: tuple[float, ...] = ()


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One timing of one round, as an interrupted calibration keeps it.

    ``spent_seconds`` is wall time; ``pace_seconds`` the mean of a fixed matmul just before and after, 0 if none ran.
    """

    device_kind: str
    round: int
    timing: Timing
    spent_seconds: float
    pace_seconds: float = 0.0


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
    compute_units: int = 1  # multiprocessors of a GPU
    skipped: tuple[str, ...] = ()  # families that this device or this JAX does not run, with the reason
    paces_seconds: tuple[float, ...] = ()  # of the fixed matmul beside each timing


class BusyRanks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mean times of one matmul in each of some turns: on one rank alone, and on ``ranks`` ranks at once."""

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


def merged(timings: Sequence[Timing]) -> Timing:
    """One timing of several rounds of the same thing: the geometric mean of medians, and a spread that covers all."""
    first = timings[0]
    medians = [timing.seconds for timing in timings]
    middle = float(np.exp(np.mean(np.log(np.maximum(medians, 1e-12))))) if min(medians) > 0 else float(np.mean(medians))
    return msgspec.structs.replace(
        first,
        seconds=middle,
        low_seconds=min(middle, *(timing.low_seconds for timing in timings)),
        high_seconds=max(middle, *(timing.high_seconds for timing in timings)),
        repeats=sum(timing.repeats for timing in timings),
        rounds=tuple(medians),
    )


def at_mean_pace(timings: Sequence[Measured]) -> list[Timing]:
    """Timings as if each had been taken at the mean pace of all.

    A core that is shared with strangers (a virtual machine's, or one whose clock drifts) may run at half its speed for
    seconds at a time. A training step is long and sees the mean of that; what lasts milliseconds sees one or the other,
    and a fit to medians prefers the more frequent. A fixed matmul beside each timing says which it was.
    """
    paces = [measured.pace_seconds for measured in timings if measured.pace_seconds > 0]
    mean_seconds = float(np.mean(paces)) if paces else 0.0
    found = []
    for measured in timings:
        factor = mean_seconds / measured.pace_seconds if measured.pace_seconds > 0 else 1.0
        taken = measured.timing
        found.append(
            msgspec.structs.replace(
                taken,
                seconds=factor * taken.seconds,
                low_seconds=factor * taken.low_seconds,
                high_seconds=factor * taken.high_seconds,
            )
        )
    return found


def widened(timings: Sequence[Timing]) -> tuple[Timing, ...]:
    """The same, with a spread that also has what rounds typically differ by.

    Kernels that were seen in two rounds have it; a host's dispatch stands alone, with no fit over many to even it out.

    That is the 90 % quantile of |log(a later round / the first)| over whatever was measured in more than one.
    """
    apart = [
        abs(float(np.log(later / timing.rounds[0])))
        for timing in timings
        for later in timing.rounds[1:]
        if min(later, timing.rounds[0]) > 0
    ]
    factor = float(np.exp(np.quantile(apart, 0.9))) if apart else 1.0
    return tuple(
        timing
        if len(timing.rounds) > 1 and timing.shape
        else msgspec.structs.replace(
            timing,
            low_seconds=min(timing.low_seconds, timing.seconds / factor),
            high_seconds=max(timing.high_seconds, timing.seconds * factor),
        )
        for timing in timings
    )


def sample_batches(start: Callable[[], object], wait: Callable[[object], object], budget_seconds: float) -> list[float]:
    """Seconds of one call, from batches of calls that are started in a row and waited for once.

    JAX returns from a call before the device is done: a wait after each call would count the host's way to the device
    and back as the kernel's time. A program is warmed (it may compile) and tried before its batch is sized.
    """
    wait(start())
    trial = min(sample(lambda: wait(start()), 2))
    calls = int(np.clip(BATCH_SECONDS / max(trial, 1e-9), 1, MOST_CALLS))

    def batch() -> object:
        results = [start() for _ in range(calls)]
        return wait(results)

    repeats = repeats_within(trial * calls, budget_seconds)
    return [seconds / calls for seconds in sample(batch, repeats)]


def repeats_within(trial_seconds: float, budget_seconds: float) -> int:
    """How many calls fit a budget, between the fewest that make a median and the most that still teach something."""
    return int(np.clip(budget_seconds / max(trial_seconds, 1e-9), FEWEST_REPEATS, MOST_REPEATS))


def sample_within(call: Callable[[], object], budget_seconds: float) -> list[float]:
    """Warm a call (it may compile), then repeat it for about ``budget_seconds``."""
    call()
    trial = min(sample(call, 2))
    return sample(call, repeats_within(trial, budget_seconds))
