"""Cutting a model's list of operators into layers: equal blocks where it repeats itself, equal FLOPs elsewhere."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from numba import njit

from meshwright.errors import PlanError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Span = tuple[int, int]  # first operator, last operator (exclusive)

MARKER = "mark_layer"  # the primitive by which a model ends a layer itself
_DEFAULT_LAYERS = 8  # where nothing repeats
_DOMINANT_SHARE = 0.25  # a repetition with a smaller share of the FLOPs is an accident, not the model's plan
_SMALL_SHARE = 0.25  # an end piece below this share of a block's FLOPs joins the block beside it
_LARGE_SHARE = 1.5  # an end piece above this many blocks is cut by itself
_EXACT = 1e-12  # relative; sums of FLOPs in another order differ by less


def cluster_layers(flops: FloatArray, cut_bytes: FloatArray, layers: int, imbalance: float = 0.5) -> list[Span]:
    """Cut a list of operators into layers of about equal FLOPs with little traffic between them.

    Exact minimum of (largest cut bytes, sum of cut bytes, sum of squared deviations of the layers' FLOPs), compared in
    that order, over all cuts into ``layers`` non-empty layers none of which has more FLOPs than
    max((1 + imbalance) * total / layers, largest operator). The first condition is settled by bisection, the others by
    a DP over the cuts that it leaves: O(n log n + n^2 (1 + imbalance)).

    Args:
        flops: (n,) of each operator.
        cut_bytes: (n+1,) bytes that cross a cut before operator c; the two ends do not count.
        imbalance: at least 0; with 1 or more there always is a solution.
    Raises:
        PlanError: more layers than operators, or the imbalance is too small for these operators.
    Source: Zheng et al. (Alpa), OSDI 2022, section 5.2, equation 6; it breaks ties by FLOPs alone.
    """
    _check(flops, cut_bytes)
    n = len(flops)
    if not 1 <= layers <= n:
        raise PlanError(f"{n} operators cannot be cut into {layers} layers; use 1 to {n}")
    if not imbalance >= 0:
        raise PlanError(f"an imbalance of {imbalance} makes no sense; use at least 0, 0.5 is usual")
    before = np.concatenate(([0.0], np.cumsum(flops)))
    mean = before[-1] / layers
    largest = max((1 + imbalance) * mean, float(flops.max())) * (1 + _EXACT)
    thresholds = np.unique(cut_bytes[1:n])
    if layers == 1:
        return [(0, n)]
    low, high = 0, len(thresholds) - 1
    if not _can_cut(_allowed(cut_bytes, thresholds[high]), before, layers, largest):
        raise PlanError(
            f"no cut of {n} operators into {layers} layers keeps each within {1 + imbalance:g} times the mean of "
            f"{mean:.3g} FLOPs; use an imbalance of 1 or fewer layers"
        )
    while low < high:
        middle = (low + high) // 2
        if _can_cut(_allowed(cut_bytes, thresholds[middle]), before, layers, largest):
            high = middle
        else:
            low = middle + 1
    allowed = _allowed(cut_bytes, thresholds[low])
    inner = np.where((allowed > 0) & (allowed < n), cut_bytes[allowed], 0.0)
    chosen = allowed[_least_traffic(before[allowed], inner, layers, mean, largest)]
    return [(int(a), int(b)) for a, b in pairwise(chosen)]


def repeated_blocks(signatures: Sequence[Hashable]) -> tuple[int, int, int]:
    """The dominant repetition: (first operator, operators in a block, number of blocks).

    It is the run that covers the most operators with at least two whole blocks, then the one of the shortest period,
    then the first. Without any repetition the whole list is one block. Compares the list with itself shifted by each
    period: n^2 / 2 integer comparisons, 0.1 s for 10,000 operators.
    """
    start, period, length = _longest_run(_numbered(signatures))
    return start, period, length // period


def default_cuts(flops: FloatArray, cut_bytes: FloatArray, signatures: Sequence[Hashable]) -> list[Span]:
    """Layers of a model without being told how many.

    Where blocks repeat they become the layers, equal operator for operator, cut at the place in the block that least
    crosses (the earliest of those). What lies before and after is cut in the same manner, by its own repetitions, if
    it has more than one and a half blocks' FLOPs (the groups of a ResNet). A piece with less than a quarter of the
    FLOPs of a layer beside it joins that layer, across the cut that more bytes cross, if at least two of its equals
    remain. Where nothing repeats, ``cluster_layers`` makes eight layers, or as many as there are operators with FLOPs.

    A model that marks where its layers end (``meshwright.plan.trace.markers``) is cut there and nowhere else.

    Args:
        flops: (n,) of each operator, 0 for those not worth counting.
        cut_bytes: (n+1,) bytes that cross a cut before operator c.
        signatures: (n,) equal for operators that do the same to the same shapes; tuples start with the operator's name.
    """
    _check(flops, cut_bytes)
    if len(signatures) != len(flops):
        raise PlanError(f"{len(flops)} operators have {len(signatures)} signatures; one each is needed")
    marks = [isinstance(s, tuple) and s[:1] == (MARKER,) for s in signatures]
    if any(marks):
        return _between_marks(marks)
    pieces = _cuts(flops, cut_bytes, _numbered(signatures), 0, len(flops), None)
    return [(piece.start, piece.stop) for piece in _without_crumbs(flops, cut_bytes, pieces)]


def _between_marks(marks: Sequence[bool]) -> list[Span]:
    """Spans that end with a mark; marks that follow one another (of one layer's several results) end one layer."""
    last = len(marks) - 1
    ends = [i + 1 for i, mark in enumerate(marks) if i < last and mark and not marks[i + 1]]
    return list(pairwise((0, *ends, len(marks))))


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    stop: int
    run: int | None = None  # equal blocks share the first operator of their run; None: not one of several equals


def _cuts(
    flops: FloatArray, cut_bytes: FloatArray, labels: IntArray, low: int, high: int, block_flops: float | None
) -> list[_Piece]:
    """Cut operators low..high-1; ``block_flops`` is the size of the equal layers beside them, if there are any."""
    if low == high:
        return []
    whole = float(flops[low:high].sum())
    if block_flops is not None and whole <= _LARGE_SHARE * block_flops:
        return [_Piece(low, high)]
    start, period, length = _longest_run(labels[low:high])
    if length < 2 * period or whole == 0 or flops[low + start : low + start + length].sum() < _DOMINANT_SHARE * whole:
        wanted = _DEFAULT_LAYERS if block_flops is None else round(whole / block_flops)
        return _clusters(flops, cut_bytes, low, high, max(1, min(wanted, int(np.count_nonzero(flops[low:high])))))
    first, count = _first_block(cut_bytes, low + start, period, length)
    last = first + count * period
    block = float(flops[first : first + period].sum())
    return [
        *_cuts(flops, cut_bytes, labels, low, first, block),
        *(_Piece(at, at + period, run=first) for at in range(first, last, period)),
        *_cuts(flops, cut_bytes, labels, last, high, block),
    ]


def _without_crumbs(flops: FloatArray, cut_bytes: FloatArray, pieces: list[_Piece]) -> list[_Piece]:
    """Let each small piece join a layer beside it, as ``default_cuts`` says."""
    equals = Counter(piece.run for piece in pieces)

    def total(piece: _Piece) -> float:
        return float(flops[piece.start : piece.stop].sum())

    def takes(layer: _Piece, crumb: _Piece) -> bool:
        return total(crumb) < _SMALL_SHARE * total(layer) and (layer.run is None or equals[layer.run] > 2)

    kept = list(pieces)
    at = 0
    while at < len(kept):
        crumb = kept[at]
        beside = [n for n in (at - 1, at + 1) if 0 <= n < len(kept) and takes(kept[n], crumb)]
        if crumb.run is not None or not beside:
            at += 1
            continue
        # The cut towards a neighbour vanishes: the one with more bytes; of equal ones the right.
        other = max(beside, key=lambda n: (cut_bytes[kept[max(n, at)].start], n))
        equals[kept[other].run] -= 1
        left, right = min(at, other), max(at, other)
        kept[left : right + 1] = [_Piece(kept[left].start, kept[right].stop)]
        at = left
    return kept


def _first_block(cut_bytes: FloatArray, start: int, period: int, length: int) -> tuple[int, int]:
    """Where the first block starts and how many there are, so that the cuts between blocks carry the fewest bytes."""

    def key(offset: int) -> tuple[float, int]:
        between = np.arange(start + offset + period, start + length - period + 1, period)
        return float(cut_bytes[between].max()), offset

    offset = min(range(min(period, length - 2 * period + 1)), key=key)
    return start + offset, (length - offset) // period


def _clusters(flops: FloatArray, cut_bytes: FloatArray, low: int, high: int, layers: int) -> list[_Piece]:
    inside = flops[low:high], cut_bytes[low : high + 1], layers
    try:
        spans = cluster_layers(*inside)
    except PlanError:
        spans = cluster_layers(*inside, imbalance=1.0)  # always has a solution
    return [_Piece(low + a, low + b) for a, b in spans]


def _numbered(signatures: Sequence[Hashable]) -> IntArray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(s, len(numbers)) for s in signatures], dtype=np.int64)


@njit(cache=True)
def _longest_run(labels: IntArray) -> tuple[int, int, int]:
    """(start, period, length) of the run with labels[i] == labels[i + period] that covers the most whole blocks."""
    n = len(labels)
    best_start, best_period, best_length = 0, max(n, 1), n
    covered = 0
    for period in range(1, n // 2 + 1):
        equal = 0
        for i in range(n - period + 1):
            if i < n - period and labels[i] == labels[i + period]:
                equal += 1
                continue
            length = equal + period
            blocks = length // period * period
            if equal >= period and blocks > covered:
                best_start, best_period, best_length, covered = i - equal, period, length, blocks
            equal = 0
    return best_start, best_period, best_length


def _allowed(cut_bytes: FloatArray, threshold: float) -> IntArray:
    """The cuts of at most ``threshold`` bytes, and the two ends."""
    allowed = cut_bytes <= threshold
    allowed[[0, -1]] = True
    return np.flatnonzero(allowed)


def _can_cut(allowed: IntArray, before: FloatArray, layers: int, largest: float) -> bool:
    """Whether the allowed cuts make that many layers: the fewest (greedily) can be cut further."""
    if layers > len(allowed) - 1:
        return False
    at = fewest = 0
    flops = before[allowed]
    while at < len(allowed) - 1:
        reach = int(np.searchsorted(flops, flops[at] + largest, side="right")) - 1
        if reach == at or fewest == layers:
            return False
        at, fewest = reach, fewest + 1
    return True


@njit(cache=True)
def _least_traffic(before: FloatArray, inner: FloatArray, layers: int, mean: float, largest: float) -> IntArray:
    """Indices of layers + 1 cuts with the least (sum of bytes, sum of squared deviations); the earliest of equals."""
    cuts = len(before)
    traffic = np.full((layers + 1, cuts), np.inf)
    squares = np.full((layers + 1, cuts), np.inf)
    chosen = np.full((layers + 1, cuts), -1, np.int64)
    traffic[0, 0] = squares[0, 0] = 0.0
    for q in range(1, layers + 1):
        nearest = 0  # the first cut from which a layer that ends here is not too large
        for right in range(1, cuts):
            while before[right] - before[nearest] > largest:
                nearest += 1
            for left in range(nearest, right):
                if traffic[q - 1, left] == np.inf:
                    continue
                total = traffic[q - 1, left] + inner[right]
                square = squares[q - 1, left] + (before[right] - before[left] - mean) ** 2
                if total < traffic[q, right] or (total == traffic[q, right] and square < squares[q, right]):
                    traffic[q, right], squares[q, right], chosen[q, right] = total, square, left
    path = np.empty(layers + 1, np.int64)
    at = cuts - 1
    for q in range(layers, 0, -1):
        path[q] = at
        at = chosen[q, at]
    path[0] = 0
    return path


def _check(flops: FloatArray, cut_bytes: FloatArray) -> None:
    if len(flops) == 0 or cut_bytes.shape != (len(flops) + 1,):
        raise PlanError(
            f"{len(flops)} operators have {len(flops) + 1} cuts, got bytes of {len(cut_bytes)}; "
            f"a model has at least one operator"
        )
    if not ((flops >= 0) & np.isfinite(flops)).all() or not ((cut_bytes >= 0) & np.isfinite(cut_bytes)).all():
        raise PlanError("the FLOPs of operators and the bytes of cuts are finite and at least 0")
