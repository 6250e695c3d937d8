"""The pipeline of least bottleneck whose stages are replicated unequally: exact, for a thousand devices in seconds.

A stage of tensor width t with d replicas takes ``work / d + sync · (d - 1) / d`` seconds per sample and holds
``fixed + ceil(s / d) · live`` bytes, s being the sum of the replicas of itself and of all stages after it: a stage of d
replicas has that many micro-batches in flight on each under 1F1B when stages are replicated unequally.
Source: Tarnawski et al., "Piper" (NeurIPS 2021, section 4), after PipeDream (Narayanan et al., SOSP 2019, section 3.1).
Their dynamic program fills a table over devices × replicas. Here the bottleneck is guessed instead: under a guess, only
the undominated pairs (devices, replicas) of each cut matter, and there are few. A search over the seconds that any
stage can take then ends at the least bottleneck itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.errors import PlanError
from meshwright.plan.frontier import BoolArray, FloatArray, IntArray, undominated

_COARSE = 1.01  # the guess is bracketed within this ratio before its candidates are listed
_WIDEN = 1.2  # steps of the guess until a pipeline is found
_ROUNDING = 1e-9  # relative: a bound on sums is no bound to the last digit
_UNLIMITED = 2**40  # replicas in flight of a stage that holds nothing per micro-batch


@dataclass(frozen=True, slots=True)
class Piece:
    """A possible stage: what lies between two cuts, on ``width`` devices a replica.

    Cuts are numbered from the model's end: 0 has nothing after it. Each row of ``costs`` is one undominated way to run
    the piece: (work_seconds, sync_seconds, live_bytes, fixed_bytes).
    """

    lower: int
    upper: int
    width: int
    costs: FloatArray  # (ways, 4)

    def __post_init__(self) -> None:
        if not 0 <= self.lower < self.upper or self.width < 1 or len(self.costs) == 0:
            raise PlanError(f"a stage from cut {self.upper} down to cut {self.lower} of width {self.width} is no stage")


@dataclass(frozen=True, slots=True)
class ReplicatedStage:
    """One stage of the answer: which piece, in which way, with how many replicas."""

    piece: int
    way: int
    replicas: int
    seconds: float  # per sample


@dataclass(frozen=True, slots=True)
class _Labels:
    """Undominated ends of the rest of the pipeline at one cut: devices and replicas used, and how."""

    used: IntArray  # (labels, 2)
    piece: IntArray
    replicas: IntArray
    previous: IntArray  # label at the piece's lower cut


def least_bottleneck(
    pieces: Sequence[Piece], devices: int, replicas: Sequence[int], memory_bytes: float, most_replicas: int
) -> tuple[ReplicatedStage, ...]:
    """The stages, first to last, whose slowest takes the least seconds per sample; exact.

    Args:
        pieces: every possible stage; cut 0 is the end of the model, the highest cut its start.
        devices: how many there are; some may stay idle.
        replicas: the counts of replicas that a stage may have.
        most_replicas: bound on their sum over all stages: the micro-batches in flight.

    Raises:
        PlanError: no pipeline fits in the memory.
    """
    search = _Search(pieces, devices, sorted(set(replicas)), memory_bytes, most_replicas)
    return search.run()


class _Search:
    """The pieces as arrays over (piece, way, replicas)."""

    def __init__(
        self, pieces: Sequence[Piece], devices: int, replicas: Sequence[int], memory_bytes: float, most: int
    ) -> None:
        self.pieces, self.devices, self.memory_bytes, self.most = pieces, devices, memory_bytes, most
        self.replicas = np.array([d for d in replicas if 1 <= d <= devices], dtype=np.int64)
        if not pieces or len(self.replicas) == 0:
            raise PlanError(f"there is no stage, or no count of replicas, to place on {devices} devices")
        self.lower = np.array([piece.lower for piece in pieces])
        self.width = np.array([piece.width for piece in pieces])
        ways = max(len(piece.costs) for piece in pieces)
        costs = np.zeros((len(pieces), ways, 4))
        costs[:, :, 0] = costs[:, :, 3] = np.inf  # rows that only fill up are never fast and never fit
        for n, piece in enumerate(pieces):
            costs[n, : len(piece.costs)] = piece.costs
        d = self.replicas
        self.seconds = costs[:, :, :1] / d + costs[:, :, 1:2] * ((d - 1) / d)
        self.seconds[(self.width[:, None] * d > devices)[:, None, :].repeat(ways, axis=1)] = np.inf
        self.fastest = self.seconds.min(axis=(1, 2))
        self.in_flight = _in_flight(costs, memory_bytes)
        self.least_work = costs[:, :, 0].min(axis=1) * self.width
        self.into = [np.flatnonzero([piece.upper == cut for piece in pieces]) for cut in range(self._top() + 1)]

    def _top(self) -> int:
        return max(piece.upper for piece in self.pieces)

    def run(self) -> tuple[ReplicatedStage, ...]:
        low = self._least_total_work() / self.devices * (1 - _ROUNDING)
        slowest = float(self.seconds[np.isfinite(self.seconds)].max(initial=0.0))
        guess = low if low > 0 else slowest
        best = self._probe(guess)
        while best is None and guess < slowest:  # good plans waste little: start at the bound
            low, guess = guess, min(_WIDEN * guess, slowest)
            best = self._probe(guess)
        if best is None:
            raise PlanError(
                f"no pipeline on {self.devices} devices fits in {self.memory_bytes / 1e9:.2f} GB per device with at "
                f"most {self.most} micro-batches in flight. Use more devices, wider tensor parallelism or "
                f"rematerialisation."
            )
        high = _bottleneck(best)
        while low > 0 and high > _COARSE * low:
            guess = float(np.sqrt(low * high))
            stages = self._probe(guess)
            if stages is None:
                low = guess
            else:
                best, high = stages, _bottleneck(stages)
        return self._exact(best, low, high)

    def _exact(self, best: tuple[ReplicatedStage, ...], low: float, high: float) -> tuple[ReplicatedStage, ...]:
        """Search the seconds that some stage takes between an impossible bound and a possible one."""
        inside = self.seconds[(self.seconds > low) & (self.seconds < high)]
        candidates = np.unique(inside)
        first, last = 0, len(candidates)  # candidates before ``first`` are impossible, those from ``last`` on possible
        while first < last:
            middle = (first + last) // 2
            stages = self._probe(float(candidates[middle]))
            if stages is None:
                first = middle + 1
            else:
                best = stages
                last = int(np.searchsorted(candidates, _bottleneck(stages)))
        return best

    def _least_total_work(self) -> float:
        """Device-seconds that any pipeline needs per sample: no bottleneck is below this share of the devices."""
        total = np.full(len(self.into), np.inf)
        total[0] = 0.0
        for cut, into in enumerate(self.into):
            if len(into):
                total[cut] = np.min(total[self.lower[into]] + self.least_work[into])
        return float(total[-1])

    def _probe(self, bottleneck_seconds: float) -> tuple[ReplicatedStage, ...] | None:
        """A pipeline within the guess that uses the fewest devices; None if there is none."""
        useful = self.fastest <= bottleneck_seconds
        most = np.zeros((len(self.pieces), len(self.replicas)), dtype=np.int64)
        most[useful] = np.where(self.seconds[useful] <= bottleneck_seconds, self.in_flight[useful, :, None], 0).max(
            axis=1
        )
        nobody = np.zeros(1, dtype=np.int64)
        labels: list[_Labels | None] = [_Labels(np.zeros((1, 2), dtype=np.int64), nobody, nobody, nobody)]
        for into in self.into[1:]:
            labels.append(self._arrive(into[useful[into]], most, labels))
        return self._trace(labels) if labels[-1] is not None else None

    def _arrive(self, into: IntArray, most: IntArray, labels: list[_Labels | None]) -> _Labels | None:
        """Undominated labels of a cut: each piece with the fewest replicas that fit before each label of its lower cut.

        Fewer replicas take fewer devices and leave more micro-batches to others, so the fewest dominate.
        """
        known = [(piece, after) for piece in into if (after := labels[self.lower[piece]]) is not None]
        if not known:
            return None
        counts = [len(after.used) for _, after in known]
        piece = np.repeat([piece for piece, _ in known], counts)
        used = np.concatenate([after.used for _, after in known])
        previous = np.concatenate([np.arange(count) for count in counts])
        fits: BoolArray = most[piece] >= 1 - (-used[:, 1:] // self.replicas)
        replicas = self.replicas[fits.argmax(axis=1)]
        used = used + np.stack((self.width[piece] * replicas, replicas), axis=1)
        inside = np.flatnonzero(fits.any(axis=1) & (used[:, 0] <= self.devices) & (used[:, 1] <= self.most))
        if len(inside) == 0:
            return None
        kept = inside[undominated(used[inside])]
        return _Labels(used[kept], piece[kept], replicas[kept], previous[kept])

    def _trace(self, labels: list[_Labels | None]) -> tuple[ReplicatedStage, ...]:
        stages = []
        cut, label = len(labels) - 1, 0  # labels rise in devices: the first uses the fewest
        while cut > 0:
            here = labels[cut]
            assert here is not None
            piece, replicas = int(here.piece[label]), int(here.replicas[label])
            live = -(-int(here.used[label, 1]) // replicas)
            column = int(np.searchsorted(self.replicas, replicas))
            seconds = np.where(self.in_flight[piece] >= live, self.seconds[piece, :, column], np.inf)
            way = int(seconds.argmin())
            stages.append(ReplicatedStage(piece, way, replicas, float(seconds[way])))
            cut, label = int(self.lower[piece]), int(here.previous[label])
        return tuple(stages)


def _bottleneck(stages: tuple[ReplicatedStage, ...]) -> float:
    return max(stage.seconds for stage in stages)


def _in_flight(costs: FloatArray, memory_bytes: float) -> IntArray:
    """Most micro-batches that each way may hold on a device."""
    live, fixed = costs[:, :, 2], costs[:, :, 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        most = np.where(live > 0, np.floor((memory_bytes - fixed) / live), _UNLIMITED)
        most = np.where(live * (most + 1) + fixed <= memory_bytes, most + 1, most)  # the quotient may be off by one
        most = np.where(live * most + fixed > memory_bytes, most - 1, most)
    most = np.where(np.isfinite(fixed) & (fixed <= memory_bytes), most, 0)
    in_flight: IntArray = np.clip(np.nan_to_num(most), 0, _UNLIMITED).astype(np.int64)
    return in_flight
