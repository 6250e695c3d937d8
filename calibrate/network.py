"""Which messages between MPI ranks are measured, and when: within a budget, densest where fits are worst.

Every kind gets a coarse grid of sizes first, then a second round of the same sizes, so that what a machine does from
one minute to the next is inside the stated ranges; what is left of the budget goes to sizes that the fits so far know
least. Ranks that do not take part sleep instead of polling, so that they leave the shared cores to those that do.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from mpi4py import MPI

from meshwright.calibrate.compute import busy_matmul_seconds
from meshwright.calibrate.link_fit import least_known
from meshwright.calibrate.timing import P2P, BusyRanks, NetworkTimings, Overlap, Timing
from meshwright.calibrate.traffic import (
    COLLECTIVES,
    Pattern,
    collective_program,
    sleep_until,
    time_beside_collective,
    time_beside_transfer,
    time_together,
    time_transfer,
)

COARSE_SIZES_BYTES = (1 << 16, 1 << 22, 1 << 10, 1 << 19, 1 << 13, 1 << 24)  # the first two make a line
SIZES_BYTES = tuple(1 << power for power in range(10, 30))
PATTERN_SIZES_BYTES = (1 << 16, 1 << 22)  # for strides and for groups at once, which are compared with one group
OVERLAP_SIZES_BYTES = (1 << 20, 1 << 23)
COMPILE_SECONDS = 0.3  # about what a new shape takes before its first call
CALLS = 8  # a measurement's fewest: warming, the trial, and those that count
MOST_OF_WHAT_IS_LEFT = 8  # one size takes at most this part of the time left
ROUND_SHARE = 0.35  # of the budget, for each of the two rounds over the coarse grid
PROBE_SHARE = 1 / 40  # of the budget, for a matmul on each number of ranks in each round
PROBE_TURNS = 4  # in which all numbers of ranks take turns, so that what is compared saw the same moments
LEAST_SAMPLE_SECONDS = 0.02


class Case(NamedTuple):
    """One thing to measure."""

    family: str
    pattern: Pattern
    message_bytes: int

    def __str__(self) -> str:
        size, (ranks, stride, groups) = self.message_bytes, self.pattern
        text = f"{self.family} {size >> 20} MiB" if size >= 1 << 20 else f"{self.family} {size >> 10} KiB"
        apart = f", stride {stride}" if stride > 1 else ""
        return f"{text}, {groups}x{ranks} ranks{apart}" if groups > 1 else f"{text}, {ranks} ranks{apart}"


Samples = dict[Case, list[tuple[float, list[float]]]]  # of each round: the bytes that were moved, and the times


def start_jax(comm: MPI.Intracomm) -> None:
    """Join the ranks into one JAX runtime; rank 0 finds a free port and tells the others."""
    address = None
    if comm.rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
    jax.distributed.initialize(
        coordinator_address=comm.bcast(address), num_processes=comm.size, process_id=comm.rank, local_device_ids=[0]
    )
    jax.devices()  # the first look at the devices waits for every process, so all of them look now


def measure_network(
    comm: MPI.Intracomm, budget_seconds: float, progress: Callable[[float, str], None]
) -> NetworkTimings | None:
    """Measure the links among all ranks; the result is on rank 0, None elsewhere.

    ``start_jax`` comes first. Within ``budget_seconds`` as much as there is time for is measured, two sizes of each
    kind in any case.
    """
    return _Session(comm, budget_seconds, progress).measure()


class _Session:
    """One measurement of all links. Rank 0 decides what comes next, so that no rank measures alone."""

    def __init__(self, comm: MPI.Intracomm, budget_seconds: float, progress: Callable[[float, str], None]) -> None:
        self.comm = comm
        self.start = time.perf_counter()
        self.budget_seconds = budget_seconds
        self.progress = progress
        self.samples: Samples = {}
        self.overlaps: list[Overlap] = []
        self.matmul_seconds: dict[int, list[list[float]]] = {count: [] for count in busy_counts(comm.size)}
        self.groups = {ranks: _subgroup(comm, ranks) for ranks in _member_sets(comm.size)}

    def measure(self) -> NetworkTimings | None:
        coarse = coarse_cases(self.comm.size)
        needed = sum(1 for case in coarse if case.message_bytes in COARSE_SIZES_BYTES[:2] and case.pattern.groups == 1)
        each_seconds = ROUND_SHARE * self.budget_seconds / len(coarse) / 2
        for share in (ROUND_SHARE, 2 * ROUND_SHARE):
            self._busy_matmuls()
            first_round = share == ROUND_SHARE
            for index, case in enumerate(coarse):
                # The first round goes on until the second must begin; what a line needs is measured in any case.
                if not self._agree(self._spent() < share * self.budget_seconds or (first_round and index < needed)):
                    break
                self._take(case, each_seconds)
            self._overlap(each_seconds)
        self._refine(2 * each_seconds)
        if self.comm.rank != 0:
            return None
        alone = self.matmul_seconds[1]
        return NetworkTimings(
            ranks=self.comm.size,
            alone_seconds=tuple(taken for seconds in alone for taken in seconds),
            busy_seconds=tuple(taken for seconds in self.matmul_seconds[self.comm.size] for taken in seconds),
            timings=tuple(merged(case, rounds) for case, rounds in self.samples.items()),
            sharing=tuple(
                BusyRanks(ranks=count, alone_seconds=_means(alone), busy_seconds=_means(busy))
                for count, busy in self.matmul_seconds.items()
                if count > 1
            ),
            overlaps=tuple(self.overlaps),
        )

    def _refine(self, each_seconds: float) -> None:
        """Sizes that the fits know least, twice each: a batch of one size for every family, then the batch again."""
        while True:
            batch = self._next_batch() if self.comm.rank == 0 else []
            chosen = np.array([[case_index, size] for case_index, size in batch], np.int64).reshape(-1, 2)
            count = int(self._bcast(np.array([len(chosen)], np.int64))[0])
            if count == 0:
                return
            chosen = self._bcast(chosen if self.comm.rank == 0 else np.empty((count, 2), np.int64))
            families = families_of(self.comm.size)
            for _ in range(2):
                for family_index, size in chosen.tolist():
                    if not self._agree(self._spent() < self.budget_seconds):
                        return
                    self._take(Case(*families[family_index], size), each_seconds)

    def _next_batch(self) -> list[tuple[int, int]]:
        """(Family, size) of what is measured next: as many as the time left allows, the least known first."""
        left = self.budget_seconds - self._spent()
        found: list[tuple[float, int, int, float]] = []
        for index, (family, pattern) in enumerate(families_of(self.comm.size)):
            known = {
                case.message_bytes: merged(case, rounds)
                for case, rounds in self.samples.items()
                if (case.family, case.pattern) == (family, pattern)
            }
            candidates = [size for size in SIZES_BYTES if size not in known and size <= most_bytes(pattern.ranks)]
            most_seconds = (left / MOST_OF_WHAT_IS_LEFT / 2 - COMPILE_SECONDS) / CALLS
            best = least_known(list(known.values()), candidates, most_seconds)
            if best is not None:
                found.append((best.doubt, index, best.message_bytes, 2 * (COMPILE_SECONDS + CALLS * best.seconds)))
        batch = []
        for _, index, size, cost_seconds in sorted(found, reverse=True):
            if cost_seconds < left:
                left -= cost_seconds
                batch.append((index, size))
        return batch

    def _take(self, case: Case, seconds: float) -> None:
        """Measure one case, on the ranks that it needs; the others sleep."""
        self.progress(min(1.0, self._spent() / self.budget_seconds), str(case))
        group = self.groups[frozenset(rank for members in case.pattern.members for rank in members)]
        if group is not None:
            seconds = max(seconds, LEAST_SAMPLE_SECONDS)
            if case.family == P2P:
                moved, taken = case.message_bytes, time_transfer(group, case.message_bytes, seconds)
            else:
                call, moved = collective_program(case.family, case.pattern, case.message_bytes)
                taken = time_together(group, call, seconds)
            self.samples.setdefault(case, []).append((float(moved), taken))
        wait_for_all(self.comm)

    def _busy_matmuls(self) -> None:
        """A matmul on one rank alone, and on more and more at once."""
        self.progress(min(1.0, self._spent() / self.budget_seconds), "one matmul on more and more ranks")
        seconds = min(1.0, PROBE_SHARE * self.budget_seconds) / PROBE_TURNS
        for _ in range(PROBE_TURNS):
            for count, turns in self.matmul_seconds.items():
                if self.comm.rank < count:
                    turns.append(busy_matmul_seconds(seconds))
                wait_for_all(self.comm)

    def _overlap(self, seconds: float) -> None:
        """Messages beside compute, on two ranks."""
        pair = self.groups[frozenset((0, 1))]
        for nbytes in OVERLAP_SIZES_BYTES:
            if not self._agree(self._spent() < self.budget_seconds):
                return
            self.progress(min(1.0, self._spent() / self.budget_seconds), f"matmuls beside {nbytes >> 10} KiB")
            if pair is not None:
                share = max(seconds, LEAST_SAMPLE_SECONDS)
                self.overlaps += [
                    time_beside_collective(pair, nbytes, share),
                    *time_beside_transfer(pair, nbytes, share),
                ]
            wait_for_all(self.comm)

    def _spent(self) -> float:
        return time.perf_counter() - self.start

    def _agree(self, go_on: bool) -> bool:
        """Rank 0's decision."""
        return bool(self._bcast(np.array([go_on]))[0])

    def _bcast(self, numbers: np.ndarray) -> np.ndarray:
        """Rank 0's numbers; those who wait sleep."""
        sleep_until(self.comm.Ibcast(numbers))
        return numbers


def wait_for_all(comm: MPI.Intracomm) -> None:
    """A barrier that sleeps: MPI's own spins, and would take a core from the rank that is being measured."""
    sleep_until(comm.Ibarrier())


def group_sizes(ranks: int) -> list[int]:
    """Sizes that an axis of a mesh of these ranks can have: their divisors but for 1."""
    return [size for size in range(2, ranks + 1) if ranks % size == 0]


def families_of(ranks: int) -> list[tuple[str, Pattern]]:
    """What has a curve over sizes of its own: transfers, and each kind of collective on each size of group."""
    sizes = sorted(group_sizes(ranks), reverse=True)
    return [(P2P, Pattern(2)), *((kind, Pattern(size)) for kind in COLLECTIVES for size in sizes)]


def coarse_cases(ranks: int) -> list[Case]:
    """The coarse grid; what matters most comes first, since a short budget ends the list early.

    Beside the curves: the other axis of each 2-D mesh (strided groups), and all groups of an axis at once.
    """
    families = families_of(ranks)
    line = [Case(*family, size) for family in families for size in COARSE_SIZES_BYTES[:2]]
    more = [Case(*family, size) for size in COARSE_SIZES_BYTES[2:] for family in families]
    patterns = [
        Pattern(size, stride, groups)
        for size in group_sizes(ranks)
        for stride, groups in ((1, ranks // size), (ranks // size, 1), (ranks // size, ranks // size))
        if size < ranks
    ]
    beside = [
        Case(kind, pattern, size)
        for kind in ("all_reduce", "all_gather")
        for pattern in dict.fromkeys(patterns)
        for size in PATTERN_SIZES_BYTES
    ]
    return [*line, *beside, *more]


def busy_counts(ranks: int) -> list[int]:
    """How many ranks compute at once, from one to all; at most eight counts."""
    return sorted({int(count) for count in np.linspace(1, ranks, min(ranks, 8)).round()})


def most_bytes(ranks: int) -> int:
    """The largest message that leaves half of the free memory: each rank holds it before and after, gloo in between."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // 2 // (4 * ranks)


def merged(case: Case, rounds: Iterable[tuple[float, list[float]]]) -> Timing:
    """The mean over all rounds, with a spread that holds the quartiles of each.

    The mean, since a step adds up many messages: where most are quick and some wait for a core, medians add up to less
    than the step takes.
    """
    moved, samples = zip(*rounds, strict=True)
    quartiles = np.array([np.quantile(taken, [0.25, 0.75]) for taken in samples])
    mean = float(np.mean([np.mean(taken) for taken in samples]))
    return Timing(
        family=case.family,
        amount=moved[0],
        seconds=mean,
        low_seconds=min(mean, float(quartiles[:, 0].min())),
        high_seconds=max(mean, float(quartiles[:, 1].max())),
        repeats=sum(len(taken) for taken in samples),
        ranks=case.pattern.ranks,
        stride=case.pattern.stride,
        groups=case.pattern.groups,
    )


def _member_sets(ranks: int) -> list[frozenset[int]]:
    """The sets of ranks that measure something together, in the same order on every rank."""
    cases = coarse_cases(ranks)
    sets = [frozenset(rank for members in case.pattern.members for rank in members) for case in cases]
    return list(dict.fromkeys([frozenset((0, 1)), *sets]))


def _subgroup(comm: MPI.Intracomm, ranks: frozenset[int]) -> MPI.Intracomm | None:
    """A communicator of some ranks, None on the others; called by all."""
    group = comm.Split(0 if comm.rank in ranks else MPI.UNDEFINED, comm.rank)
    return group if isinstance(group, MPI.Intracomm) and group != MPI.COMM_NULL else None


def _means(turns: Iterable[list[float]]) -> tuple[float, ...]:
    return tuple(float(np.mean(taken)) for taken in turns)
