"""Failures: how often to save, how much of a long run is progress, and when the run ends.

Every device fails on its own at random, with exponential times between failures; any failure stops all. The run then
restarts, which takes a while and may itself fail, from the last checkpoint that was complete. A checkpoint stops the
run for ``checkpoint_seconds``, and is complete ``checkpoint_lag_seconds`` later (0: it is written while all wait;
else in the background, from a copy).

With M the mean seconds between failures of the whole, and a checkpoint of d seconds after each t seconds of work, the
mean seconds from one checkpoint to the next are M e^((R + lag) / M) (e^((t + d) / M) - 1), exactly: the more complete
cost function of Daly (Future Generation Computer Systems 22 (2006) 303-312), in which the lag acts as a longer restart
R, since both are lost once a failure and neither otherwise.
"""

from dataclasses import dataclass, fields
from math import ceil, exp, expm1, inf, sqrt

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from meshwright.errors import ScheduleError
from meshwright.simulate.draws import FAILURE, Sampled, check_samples, refuse_outside, uniforms

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_EVENTS = 10**10  # checkpoints and failures of one call: some minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """How often devices fail and what saving and restarting cost.

    Args:
        devices: all that the run needs.
        mean_seconds_between_failures: of one device, with its share of the host and the network.
        checkpoint_seconds: for which a checkpoint stops the run.
        restart_seconds: from a failure until the last checkpoint is loaded and work goes on.
        checkpoint_lag_seconds: from then on until the checkpoint is complete.

    Raises:
        ScheduleError: a number is out of range.
    """

    devices: int
    mean_seconds_between_failures: float
    checkpoint_seconds: float
    restart_seconds: float
    checkpoint_lag_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ScheduleError(f"a run on {self.devices} devices; at least 1 is needed")
        for item in fields(self)[1:]:
            refuse_outside(item.name, getattr(self, item.name), 0)
        if self.mean_seconds_between_failures == 0:
            raise ScheduleError("mean_seconds_between_failures is 0; give the mean seconds that one device lasts")

    @property
    def mean_seconds(self) -> float:
        """Mean seconds between failures of any of the devices."""
        return self.mean_seconds_between_failures / self.devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Of all time of a long run, in the mean: the share that is progress, that is saved away, and that is lost.

    ``lost_fraction`` is work that is done again, saving that is done again, and restarts.
    """

    checkpoint_interval_steps: int
    fraction: float
    checkpoint_fraction: float
    lost_fraction: float
    effective_step_seconds: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RunSamples(Sampled):
    """Seconds of each sampled run from its start to its last checkpoint, and its number of failures."""

    failures: Ints


def young_interval_seconds(failures: Failures) -> float:
    """Seconds of work between checkpoints that lose least, to first order: sqrt(2 d M).

    Source: Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974) 530-531.
    """
    return sqrt(2 * failures.checkpoint_seconds * failures.mean_seconds)


def daly_interval_seconds(failures: Failures) -> float:
    """Seconds of work between checkpoints that lose least: its goodput is within 0.2 % of the best.

    Source: Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
    Computer Systems 22 (2006) 303-312.
    """
    checkpoint, mean = failures.checkpoint_seconds, failures.mean_seconds
    if checkpoint >= 2 * mean:
        return mean
    ratio = checkpoint / (2 * mean)
    return young_interval_seconds(failures) * (1 + sqrt(ratio) / 3 + ratio / 9) - checkpoint


def goodput(step_seconds: float, failures: Failures, *, checkpoint_interval_steps: int | None = None) -> Goodput:
    """Progress of a long run with failures.

    Args:
        step_seconds: of one step without failures, in the mean (``sample_steps`` has it with stragglers).
        checkpoint_interval_steps: steps between checkpoints; None: the best by Daly, in whole steps.

    Raises:
        ScheduleError: a number is out of range, a checkpoint would start before the last is complete, or failures
            come so fast that the run makes no progress.
    """
    interval = _interval_steps(step_seconds, failures, checkpoint_interval_steps)
    work = interval * step_seconds
    fraction = work / _mean_cycle_seconds(work, failures)
    if fraction < 1e-9:
        raise ScheduleError(
            f"the run makes no progress: {failures.devices} devices fail every {failures.mean_seconds:.3g} s, but one "
            f"checkpoint to the next takes {work + failures.checkpoint_seconds:.3g} s and a restart "
            f"{failures.restart_seconds + failures.checkpoint_lag_seconds:.3g} s; use fewer devices or shorten these"
        )
    saving = fraction * failures.checkpoint_seconds / work
    return Goodput(
        checkpoint_interval_steps=interval,
        fraction=fraction,
        checkpoint_fraction=saving,
        lost_fraction=max(0.0, 1 - fraction - saving),
        effective_step_seconds=step_seconds / fraction,
    )


def mean_run_seconds(
    steps: int, step_seconds: float, failures: Failures, *, checkpoint_interval_steps: int | None = None
) -> float:
    """Mean seconds of a run of so many steps, the checkpoint at its end included; exact.

    Arguments and errors are those of ``goodput``.
    """
    interval = _plan_run(steps, step_seconds, failures, checkpoint_interval_steps)
    whole, left = divmod(steps, interval)
    cycles = whole * _mean_cycle_seconds(interval * step_seconds, failures)
    if left:
        cycles += _mean_cycle_seconds(left * step_seconds, failures)
    # Before the first checkpoint nothing is under way yet, so its lag is waited for; later ones end as the next begins.
    mean = failures.mean_seconds
    return cycles + mean * exp(failures.restart_seconds / mean) * expm1(failures.checkpoint_lag_seconds / mean)


def sample_runs(
    steps: int,
    step_seconds: float,
    failures: Failures,
    *,
    checkpoint_interval_steps: int | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> RunSamples:
    """When many runs of so many steps end, each with failures of its own, the checkpoint at the end included.

    The answer depends on the seed alone, to the last bit, and not on the number of threads. Arguments and errors are
    those of ``goodput``; also refused are runs with more checkpoints and failures than can be walked through.
    """
    key = check_samples(samples, seed)
    interval = _plan_run(steps, step_seconds, failures, checkpoint_interval_steps)
    seconds = mean_run_seconds(steps, step_seconds, failures, checkpoint_interval_steps=interval)
    events = samples * (steps / interval + seconds / failures.mean_seconds)
    if events > MOST_EVENTS:
        raise ScheduleError(
            f"{samples} runs of {steps} steps have about {events:.1e} checkpoints and failures; "
            f"the most is {MOST_EVENTS:.0e}, so ask for fewer samples or steps"
        )
    whole, left = divmod(steps, interval)
    ended, failed = _sample(
        key,
        samples,
        whole,
        interval * step_seconds + failures.checkpoint_seconds,
        left * step_seconds + failures.checkpoint_seconds if left else 0.0,
        failures.checkpoint_lag_seconds,
        failures.restart_seconds,
        failures.mean_seconds,
    )
    return RunSamples(seconds=ended, failures=failed)


def _plan_run(steps: int, step_seconds: float, failures: Failures, interval: int | None) -> int:
    """Steps between the checkpoints of a run that can be finished."""
    if steps < 1:
        raise ScheduleError(f"a run of {steps} steps; at least 1 is needed")
    return goodput(step_seconds, failures, checkpoint_interval_steps=interval).checkpoint_interval_steps


def _interval_steps(step_seconds: float, failures: Failures, asked: int | None) -> int:
    """Steps between checkpoints: as asked, or the better of the two around Daly's interval."""
    refuse_outside("step_seconds", step_seconds, 0)
    if step_seconds == 0:
        raise ScheduleError("step_seconds is 0; give the seconds of one step")
    least = max(1, ceil(failures.checkpoint_lag_seconds / step_seconds))
    if asked is not None and asked < 1:
        raise ScheduleError(f"a checkpoint every {asked} steps; at least 1 step lies between")
    if asked is not None and asked < least:
        raise ScheduleError(
            f"a checkpoint every {asked} steps of {step_seconds:g} s is not possible: the one before is complete only "
            f"after {failures.checkpoint_lag_seconds:g} s of work; use at least {least} steps"
        )
    if asked is not None:
        return asked
    below = max(least, int(daly_interval_seconds(failures) / step_seconds))
    return min((below, below + 1), key=lambda k: _mean_cycle_seconds(k * step_seconds, failures) / k)


def _mean_cycle_seconds(work_seconds: float, failures: Failures) -> float:
    """Mean seconds from the completion of one checkpoint to that of the next; infinite beyond all numbers."""
    mean = failures.mean_seconds
    lost_once = (failures.restart_seconds + failures.checkpoint_lag_seconds) / mean
    cycle = (work_seconds + failures.checkpoint_seconds) / mean
    return mean * exp(lost_once) * expm1(cycle) if lost_once + cycle < 700 else inf


@njit(cache=True, parallel=True)
def _sample(
    seed: np.uint64, samples: int, whole: int, cycle: float, last: float, lag: float, restart: float, mean: float
) -> tuple[Floats, Ints]:
    """End and number of failures of each run: ``whole`` cycles and, unless it is 0, a shorter last one."""
    ended, failed = np.empty(samples), np.zeros(samples, np.int64)
    for sample in prange(samples):
        ended[sample], failed[sample] = _run(seed, sample, whole, cycle, last, lag, restart, mean)
    return ended, failed


@njit(cache=True)
def _run(
    seed: np.uint64, sample: int, whole: int, cycle: float, last: float, lag: float, restart: float, mean: float
) -> tuple[float, int]:
    now, failures = 0.0, 0
    failure = _lifetime(seed, sample, 0, mean)
    ahead = 0.0  # how long work has gone on since the state that the last complete checkpoint holds
    for number in range(whole + (last > 0)):
        need = cycle if number < whole else last
        while failure < now + need + lag - ahead:
            now = failure
            failures += 1
            failure = now + _lifetime(seed, sample, failures, mean)
            while failure < now + restart:
                now = failure
                failures += 1
                failure = now + _lifetime(seed, sample, failures, mean)
            now += restart
            ahead = 0.0
        now += need + lag - ahead
        ahead = lag
    return now, failures


@njit(cache=True)
def _lifetime(seed: np.uint64, sample: int, index: int, mean: float) -> float:
    """Seconds from one failure, or the start, to the next."""
    lifetime: float = -mean * np.log(uniforms(seed, sample, FAILURE, index)[0])
    return lifetime
