"""Microbenchmarks of one device: which kernels are timed, when, and how, within a budget of wall time.

Two rounds, apart in time. The first sees a coarse design and then goes where the fits are worst; the second takes the
coarse design again and as much of the rest as fits, so that what a machine does from one minute to the next is inside
the stated ranges.
"""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from meshwright.calibrate.benchmarks import (
    FLOAT32,
    Case,
    Program,
    amount,
    input_bytes,
    matmul_call,
    program_of,
    random_array,
)
from meshwright.calibrate.candidates import NEEDED, NEEDED_SIZES, candidates, coarse, next_case
from meshwright.calibrate.timing import (
    ARGUMENT,
    DISPATCH,
    LAUNCH,
    PACE_SIZE,
    ComputeTimings,
    Measured,
    Timing,
    at_mean_pace,
    merged,
    sample,
    sample_batches,
    sample_within,
    timing,
    widened,
)

__all__ = ["FLOAT32", "busy_matmul_seconds", "matmul_call", "measure_compute", "random_array"]

CHAIN = 64  # operations in one program, long enough that their launches outweigh the one dispatch
ARGUMENTS = 64
PACE_MATMULS = 4  # that say how fast a CPU runs just now: some 2 ms
CASE_SHARE = 1 / 400  # of the budget for the calls of one case: a few hundred fit
FIRST_ROUND_SHARE = 0.65
SMALLEST_CASE_SECONDS, LARGEST_CASE_SECONDS = 0.01, 0.25
LONGEST_CALL_SHARE = 1 / 8  # of the time that is left, for the calls that a case needs at least
CALLS = 8  # warming, the trial, and those that count
MEMORY_SHARE = 0.25  # of the device's memory for the arrays of one case
MOST_HOST_BYTES = 1 << 31  # of random numbers that are drawn for one case
MOST_CPU_BYTES = 1 << 28
KEPT_BYTES = 1 << 22  # arrays of a program that is kept from the first round to the second


def measure_compute(
    budget_seconds: float,
    progress: Callable[[float, str], None],
    known: Iterable[Measured] = (),
    keep: Callable[[Measured], None] = lambda measured: None,
) -> ComputeTimings:
    """Measure the first device of this process.

    Args:
        budget_seconds: wall time to stay within; two sizes of the families that a device cannot be without are measured
            even beyond it.
        progress: called with the share done (0..1) and what comes next.
        known: what an earlier run measured on this device; it is not done again, and its time counts as spent.
        keep: called with each timing as soon as it is there.
    """
    run = _Run(budget_seconds, progress, known, keep)
    run.first_round()
    run.second_round()
    device = run.device
    cases = [[rounds[index] for index in sorted(rounds)] for rounds in run.measured.values()]
    fair = iter(at_mean_pace([measured for rounds in cases for measured in rounds]))
    taken = [merged([next(fair) for _ in rounds]) for rounds in cases]
    return ComputeTimings(
        device_kind=device.device_kind,
        platform=device.platform,
        devices=jax.local_device_count(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=_memory_bytes(device),
        jax_version=jax.__version__,
        settings=" ".join(f"{name}={os.environ[name]}" for name in ("XLA_FLAGS", "NPROC") if os.environ.get(name)),
        timings=widened(taken),
        compute_units=int(getattr(device, "core_count", 1)) if device.platform != "cpu" else 1,
        skipped=tuple(run.skipped.values()),
        paces_seconds=tuple(m.pace_seconds for rounds in cases for m in rounds if m.pace_seconds > 0),
    )


class _Run:
    """The state of one measurement: what is known by case and round, and the clock."""

    def __init__(
        self,
        budget_seconds: float,
        progress: Callable[[float, str], None],
        known: Iterable[Measured],
        keep: Callable[[Measured], None],
    ) -> None:
        self.device = jax.devices()[0]
        self.accelerator = self.device.platform != "cpu"
        self.progress, self.keep = progress, keep
        self.measured: dict[Case, dict[int, Measured]] = {}
        self.skipped: dict[str, str] = {}
        self.failed: set[Case] = set()
        self.matmul = None if self.accelerator else matmul_call(PACE_SIZE, FLOAT32)
        self.programs: dict[Case, Program] = {}  # of small arrays, for the second round: compiling takes longest
        spent = 0.0
        for measured in known:
            if measured.device_kind == self.device.device_kind:
                case = Case(measured.timing.family, measured.timing.shape)
                self.measured.setdefault(case, {})[measured.round] = measured
                spent += measured.spent_seconds
        self.budget_seconds = budget_seconds
        self.start = time.perf_counter() - min(spent, budget_seconds)
        self.case_seconds = min(max(CASE_SHARE * budget_seconds, SMALLEST_CASE_SECONDS), LARGEST_CASE_SECONDS)
        limit = MEMORY_SHARE * _memory_bytes(self.device)
        self.most_bytes = min(limit, MOST_HOST_BYTES if self.accelerator else MOST_CPU_BYTES)

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the budget is used up."""
        return share * self.budget_seconds - (time.perf_counter() - self.start)

    def first_round(self) -> None:
        self._host(0)
        for place, case in enumerate(coarse(self.accelerator)):
            if place < NEEDED_SIZES * len(NEEDED) or self.left(FIRST_ROUND_SHARE) > 0:
                self._kernel(case, 0)
        pool = candidates(self.accelerator)
        while (left := self.left(FIRST_ROUND_SHARE)) > 0:
            pool = tuple(case for case in pool if case not in self.measured and case not in self.failed)
            pool = tuple(case for case in pool if case.family not in self.skipped)
            seen = {case: rounds[0].timing for case, rounds in self.measured.items() if 0 in rounds}
            chosen = next_case(pool, seen, LONGEST_CALL_SHARE * left / CALLS, self.most_bytes)
            if chosen is None:
                break
            self._kernel(chosen, 0)

    def second_round(self) -> None:
        self._host(1)
        # From early to late, the coarse design first: the two looks at a case are then about equally far apart.
        for case in [case for case in self.measured if case.family not in _HOST]:
            longest = CALLS * self.measured[case][0].timing.seconds if 0 in self.measured[case] else 0.0
            if self.left() > longest and case.family not in self.skipped:
                self._kernel(case, 1)

    def _host(self, index: int) -> None:
        for family, measure in _HOST.items():
            self._measure(Case(family, ()), index, measure)

    def _kernel(self, case: Case, index: int) -> None:
        if case in self.failed or case.family in self.skipped or input_bytes(case) > self.most_bytes:
            return
        try:
            self._measure(case, index, lambda seconds: self._time_kernel(case, seconds))
        except Exception as error:  # what this device or its libraries do not run is left out, and said
            self.failed.add(case)
            if any(known.family == case.family for known in self.measured):
                return  # the family runs; this shape has not enough memory
            if case.family in NEEDED:
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.skipped[case.family] = f"{case} was not run: {lines[0][:160]}"

    def _time_kernel(self, case: Case, seconds: float) -> Timing:
        program = self.programs.get(case) or program_of(case)
        if input_bytes(case) <= KEPT_BYTES:
            self.programs[case] = program
        samples = sample_batches(program.start, jax.block_until_ready, seconds)
        taken = timing(case.family, amount(case), [total / program.copies for total in samples])
        return msgspec.structs.replace(taken, shape=case.shape)

    def _measure(self, case: Case, index: int, measure: Callable[[float], Timing]) -> None:
        if index in self.measured.get(case, {}):
            return
        self.progress(
            min(1.0, max(0.0, 1 - self.left() / self.budget_seconds)), str(case) if case.shape else case.family
        )
        began = time.perf_counter()
        before = self._pace()
        taken = measure(self.case_seconds)
        pace = (before + self._pace()) / 2
        measured = Measured(
            device_kind=self.device.device_kind,
            round=index,
            timing=taken,
            spent_seconds=time.perf_counter() - began,
            pace_seconds=pace,
        )
        self.measured.setdefault(case, {})[index] = measured
        self.keep(measured)

    def _pace(self) -> float:
        """Mean seconds of a fixed matmul now; 0 on an accelerator, whose clock is its own."""
        return 0.0 if self.matmul is None else float(np.mean(sample(self.matmul, PACE_MATMULS)))


def _time_dispatch(seconds: float) -> Timing:
    """Host seconds of one call of a compiled program, from many calls in a row that each need the last one's result."""
    first = random_array((8,))
    step = jax.jit(lambda a: a * 0.5).lower(first).compile()

    def calls() -> object:
        x = first
        for _ in range(CHAIN):
            x = step(x)
        return jax.block_until_ready(x)

    return timing(DISPATCH, CHAIN, [total / CHAIN for total in sample_within(calls, seconds)])


def _time_argument(seconds: float) -> Timing:
    """Host seconds of one more argument (and result) of a call: 1 and ``ARGUMENTS`` + 1 small arrays passed through."""
    arrays = [random_array((8,), seed=seed) for seed in range(1 + ARGUMENTS)]

    def program(count: int) -> Callable[[], object]:
        chosen = arrays[:count]
        # One operation whatever the number of arguments: the others are handed through.
        run = jax.jit(lambda head, rest: (head * 0.5, rest)).lower(chosen[0], chosen[1:]).compile()
        return lambda: run(chosen[0], chosen[1:])

    base = min(sample_batches(program(1), jax.block_until_ready, seconds / 4))
    many = sample_batches(program(1 + ARGUMENTS), jax.block_until_ready, seconds / 2)
    return timing(ARGUMENT, ARGUMENTS, [max(total - base, 0.0) / ARGUMENTS for total in many])


def _time_launch(seconds: float) -> Timing:
    """Seconds of one more operation inside a program: 1 and ``CHAIN`` + 1 small matmuls, which XLA cannot fuse."""
    x = random_array((16, 16))

    def program(operations: int) -> Callable[[], object]:
        def chain(a: jax.Array) -> jax.Array:
            for _ in range(operations):
                a = jnp.tanh(a @ x)
            return a

        run = jax.jit(chain).lower(x).compile()
        return lambda: jax.block_until_ready(run(x))

    short, long = program(1), program(1 + CHAIN)
    base = min(sample_within(short, seconds / 4))
    # Two kernels a step (matmul and tanh). The clock can put the long program below the short one on a busy machine.
    samples = [max(total - base, 0.0) / (2 * CHAIN) for total in sample_within(long, seconds / 2)]
    return timing(LAUNCH, 2 * CHAIN, samples)


_HOST: dict[str, Callable[[float], Timing]] = {
    DISPATCH: _time_dispatch,
    ARGUMENT: _time_argument,
    LAUNCH: _time_launch,
}


def busy_matmul_seconds(seconds: float, size: int = 256) -> list[float]:
    """Times of one matmul, repeated until ``seconds`` are over: how ranks that share cores slow each other."""
    call = matmul_call(size, FLOAT32)
    call()
    end = time.perf_counter() + seconds
    samples: list[float] = []
    while time.perf_counter() < end or len(samples) < 5:
        samples += sample(call, 1)
    return samples


def _memory_bytes(device: jax.Device) -> int:
    """What the device may use: its allocator's limit, else the memory of the machine or of its control group."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(machine, int(text)) if text.isdigit() else machine
