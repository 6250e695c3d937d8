"""From timings between ranks to a link: each curve fitted by itself, with ranges, residuals and sources kept.

Curves are the least of up to three straight pieces (``collectives.fit_pieces``); a further piece counts only where it
predicts sizes better that its fit has not seen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec
import numpy as np

from meshwright.calibrate.collectives import PieceFit, fit_pieces
from meshwright.calibrate.device import ACTIVITIES, Interference
from meshwright.calibrate.fit import FittedFamily, RateFit, Residual, fit_timings
from meshwright.calibrate.hardware import COLLECTIVE_KINDS, CollectiveFit, Link, Piece, Quantity
from meshwright.calibrate.link import MOST_PIECES
from meshwright.calibrate.timing import P2P, BusyRanks, NetworkTimings, Overlap, Timing
from meshwright.errors import ClusterError

WORTH_A_PIECE = 0.9  # a further piece must bring the held-out error below this share of that with fewer
LEAST_GAIN = 0.002  # of that error, below which both are exact
LEAST_MISFIT = 0.02  # a curve that a line meets well may still bend where nobody has looked
FOLDS = 4  # parts of a curve that are held out in turn
FARTHEST = 8  # times beyond what was measured: the time of larger messages is a guess
LEAST_RATE = 0.01  # of an activity beside others


class Doubt(NamedTuple):
    """A size that is worth measuring next; ``doubt`` grows with the gap around it and the misfit at its ends."""

    doubt: float
    message_bytes: int
    seconds: float


def link_of(network: NetworkTimings, measured: str) -> tuple[Link, list[FittedFamily]]:
    """The link, and a row of the residual table for each curve.

    The entries are those of one group of neighbouring ranks. Groups of ranks s apart, and n groups at once, have rows
    of their own, marked ``s2`` and ``x2``.

    Raises:
        ClusterError: no point-to-point transfer was measured.
    """
    rows: list[FittedFamily] = []
    collectives: dict[str, list[CollectiveFit]] = {}
    for (family, ranks, stride, groups), timings in curves(network.timings).items():
        if len({timing.amount for timing in timings}) < 2:
            continue  # the budget ended here; the simulator falls back on the link for this kind
        entry, fit = fit_curve(timings, f"{measured}, {ranks} ranks")
        name = family + (f" s{stride}" if stride > 1 else "") + (f" x{groups}" if groups > 1 else "")
        rows.append(FittedFamily(name, ranks, fit, "B/s"))
        if family in COLLECTIVE_KINDS and stride == groups == 1:
            collectives.setdefault(family, []).append(entry)
    p2p = next((row.fit for row in rows if row.name == P2P), None)
    if p2p is None:
        raise ClusterError("no point-to-point transfer was measured; give calibrate a larger --budget")
    link = Link(
        bytes_per_second=p2p.amount_per_second,
        latency_seconds=p2p.fixed_seconds,
        collectives={kind: tuple(entries) for kind, entries in collectives.items()},
    )
    return link, rows


def curves(timings: Iterable[Timing]) -> dict[tuple[str, int, int, int], list[Timing]]:
    """Timings by family, ranks, stride and groups at once, in this order."""
    found: dict[tuple[str, int, int, int], list[Timing]] = {}
    for timing in timings:
        found.setdefault((timing.family, timing.ranks, timing.stride, timing.groups), []).append(timing)
    return dict(sorted(found.items()))


def fit_curve(timings: Sequence[Timing], source: str) -> tuple[CollectiveFit, RateFit]:
    """A curve as a machine file has it, and the same by its piece for large messages, for tables.

    One piece has the ranges of ``fit_timings``. Several have one range for all their numbers: the factor by which nine
    in ten sizes are off, or by which their quartiles are apart, whichever is greater; a machine that is quicker or
    slower by a factor moves every number by it.
    """
    sizes = [timing.amount for timing in timings]
    pieces = fewest_pieces(sizes, [timing.seconds for timing in timings])
    text, width = f"{source}; {pieces}", float(np.exp(_log_width(timings, pieces)))
    if len(pieces.lines) == 1:
        fit = fit_timings(timings, source)
        text = f"{fit.fixed_seconds.source}{_held_out(pieces)}"
        named = RateFit(_renamed(fit.fixed_seconds, text), _renamed(fit.amount_per_second, text), fit.residual)
    else:
        fixed, rate = (Quantity(value, text, value / width, value * width) for value in pieces.lines[0])
        errors = np.abs(pieces.seconds(sizes) / [timing.seconds for timing in timings] - 1)
        residual = Residual(float(np.median(errors)), float(np.quantile(errors, 0.9)), len(sizes))
        named = RateFit(fixed, rate, residual)
    further = tuple(
        Piece(
            latency_seconds=Quantity(latency, text, latency / width, latency * width),
            bytes_per_second=Quantity(per_second, text, per_second / width, per_second * width),
        )
        for latency, per_second in pieces.lines[1:]
    )
    entry = CollectiveFit(
        ranks=max(2, timings[0].ranks),
        latency_seconds=named.fixed_seconds,
        bytes_per_second=named.amount_per_second,
        pieces=further,
    )
    return entry, named


def fewest_pieces(message_bytes: Sequence[float], seconds: Sequence[float]) -> PieceFit:
    """As few pieces as predict held-out sizes nearly as well as more do; one where there are too few sizes to tell."""
    best: PieceFit | None = None
    for most in range(1, MOST_PIECES + 1):
        fit = replace(fit_pieces(message_bytes, seconds, most), held_out=_held_out_error(message_bytes, seconds, most))
        if (
            best is None or fit.held_out < WORTH_A_PIECE * best.held_out - LEAST_GAIN
        ):  # never true of a number that is not one
            best = fit
    assert best is not None
    return best


def _held_out_error(message_bytes: Sequence[float], seconds: Sequence[float], most: int) -> float:
    """Mean |model / measured - 1| of sizes by a fit of the rest, a quarter of them at a time.

    Curves have few sizes here, of which half (``collectives.held_out_error``) are too few for a second piece.
    """
    x, y = np.array(message_bytes), np.array(seconds)
    sizes = np.unique(x)
    if len(sizes) < FOLDS:
        return float("nan")
    errors = []
    for fold in range(FOLDS):
        hidden = np.isin(x, sizes[fold::FOLDS])
        fit = fit_pieces(x[~hidden], y[~hidden], most)
        errors += np.abs(fit.seconds(x[hidden]) / y[hidden] - 1).tolist()
    return float(np.mean(errors))


def least_known(timings: Sequence[Timing], candidates: Sequence[int], most_seconds: float) -> Doubt | None:
    """The candidate that tells most about a curve, by a line through what is known; None where none is affordable.

    Args:
        candidates: sizes in bytes that were not measured.
        most_seconds: how long one message may take.
    """
    if len({timing.amount for timing in timings}) < 2 or not candidates:
        return None
    sizes = np.array(sorted(timing.amount for timing in timings))
    seconds = np.array([timing.seconds for timing in sorted(timings, key=lambda timing: timing.amount)])
    fit = fit_timings(timings, "so far")
    predicted = np.array([fit.seconds(size) for size in sizes])
    misfit = LEAST_MISFIT + np.abs(np.log(predicted / seconds))
    found = []
    for size in candidates:
        if fit.seconds(size) > most_seconds or not sizes[0] / FARTHEST <= size <= sizes[-1] * FARTHEST:
            continue
        doublings = np.abs(np.log2(sizes / size))
        near = np.argsort(doublings, kind="stable")[:2]
        found.append(Doubt(float(doublings.min() * misfit[near].mean()), size, fit.seconds(size)))
    return max(found, default=None)


def busy_slowdown_of(network: NetworkTimings, measured: str) -> Quantity:
    """Time of a matmul with all ranks busy over its time alone.

    Means, not medians: a rank that waits for its turn on a core waits in a few long calls, which a median does not see.
    """
    by_count = busy_slowdowns_of(network, measured)
    if by_count:
        return by_count[-1]
    value = max(1.0, float(np.mean(network.busy_seconds)) / float(np.mean(network.alone_seconds)))
    return Quantity(value, f"{measured}, mean time of a matmul on {network.ranks} ranks at once over alone")


def busy_slowdowns_of(network: NetworkTimings, measured: str) -> tuple[Quantity, ...]:
    """The same with 2, 3, ... all ranks busy, as ``Host`` wants it; numbers that were not measured lie in between."""
    measured_counts = [1, *(shared.ranks for shared in network.sharing)]
    if measured_counts[-1] != network.ranks or network.ranks == 1:
        return ()
    ratios = [(1.0, 1.0, 1.0), *(_slowdown(shared) for shared in network.sharing)]
    found = []
    for count in range(2, network.ranks + 1):
        value, low, high = (float(np.interp(count, measured_counts, column)) for column in zip(*ratios, strict=True))
        how = "mean time of a matmul" if count in measured_counts else "interpolated time of a matmul"
        found.append(Quantity(value, f"{measured}, {how} on {count} ranks at once over alone", low, high))
    return tuple(found)


def _slowdown(shared: BusyRanks) -> tuple[float, float, float]:
    """Median, least and greatest of the turns; what is below 1 is noise."""
    turns = np.maximum(1.0, np.array(shared.busy_seconds) / np.array(shared.alone_seconds))
    return float(np.median(turns)), float(turns.min()), float(turns.max())


def groups_slowdown_of(network: NetworkTimings, measured: str) -> dict[int, Quantity]:
    """By the number of groups that are at it at once: time of their collectives over that of one group alone.

    Median over kinds, sizes and strides; the range goes from the least to the greatest, but not below 1.
    """
    alone = {
        (timing.family, timing.ranks, timing.stride, timing.amount): timing.seconds
        for timing in network.timings
        if timing.groups == 1
    }
    ratios: dict[int, list[float]] = {}
    for timing in network.timings:
        single = alone.get((timing.family, timing.ranks, timing.stride, timing.amount))
        if timing.groups > 1 and single is not None:
            ratios.setdefault(timing.groups, []).append(max(1.0, timing.seconds / single))
    return {
        groups: Quantity(
            float(np.median(found)),
            f"{measured}, collectives of {groups} groups at once over one alone, {len(found)} pairs",
            min(found),
            max(found),
        )
        for groups, found in sorted(ratios.items())
    }


def notes_of(network: NetworkTimings) -> list[str]:
    """What was learnt of the links that no field of a machine file holds."""
    return [
        f"collectives of {groups} groups at once took {slowdown.value:.2f} times as long as those of one group "
        f"({slowdown.low:.2f} to {slowdown.high:.2f})"
        for groups, slowdown in groups_slowdown_of(network, "measured").items()
    ]


def interference_of(network: NetworkTimings, measured: str) -> Interference | None:
    """How compute and messages slow each other on a rank; None where it was not measured.

    Both of a pair run at one rate. Where more than two go on, each runs at the least of its
    rates beside any one of them: such sets were not measured.
    """
    if not network.overlaps:
        return None
    beside: dict[int, list[Overlap]] = {}
    for overlap in network.overlaps:
        beside.setdefault(ACTIVITIES.index(overlap.activity), []).append(overlap)
    compute = ACTIVITIES.index("compute")
    pair = np.ones((len(ACTIVITIES), len(ACTIVITIES)))
    for activity, overlaps in beside.items():
        pair[compute, activity] = pair[activity, compute] = pair_rate(overlaps)
    table = []
    for mask in range(1 << len(ACTIVITIES)):
        going = [bit for bit in range(len(ACTIVITIES)) if mask >> bit & 1]
        table.append(
            tuple(
                round(float(min((pair[bit, other] for other in going if other != bit), default=1.0)), 4)
                if bit in going
                else 1.0
                for bit in range(len(ACTIVITIES))
            )
        )
    spread = ", ".join(f"{ACTIVITIES[activity]} {_spread(overlaps)}" for activity, overlaps in sorted(beside.items()))
    source = f"{measured}, matmuls beside messages of two ranks: {spread}; more than two at once assumed"
    return Interference(source=source, rates=tuple(table))


def pair_rate(overlaps: Sequence[Overlap]) -> float:
    """The one rate at which two activities run while both go on, from when the last of them ends.

    With a <= b alone the shorter ends at a / r and the rest of the longer takes b - a: together = a / r + b - a. Half
    is one after the other, 1 side by side. Of several measurements it is sum a / sum (together - (b - a)): those with
    more to share tell more.
    """
    shorter = sum(min(overlap.compute_seconds, overlap.message_seconds) for overlap in overlaps)
    longer = sum(max(overlap.compute_seconds, overlap.message_seconds) for overlap in overlaps)
    shared = sum(overlap.together_seconds for overlap in overlaps) - (longer - shorter)
    return 1.0 if shared <= shorter else max(LEAST_RATE, shorter / shared)


def _spread(overlaps: Sequence[Overlap]) -> str:
    rates = [pair_rate([overlap]) for overlap in overlaps]
    return f"{min(rates):.2f} to {max(rates):.2f}"


def _log_width(timings: Sequence[Timing], pieces: PieceFit) -> float:
    seconds = np.array([timing.seconds for timing in timings])
    errors = np.abs(np.log(pieces.seconds([timing.amount for timing in timings]) / seconds))
    apart = [
        np.log(max(timing.high_seconds / timing.seconds, timing.seconds / timing.low_seconds)) for timing in timings
    ]
    return float(max(np.quantile(errors, 0.9), np.quantile(apart, 0.9)))


def _held_out(pieces: PieceFit) -> str:
    return "" if np.isnan(pieces.held_out) else f", at sizes held out mean {pieces.held_out:.0%}"


def _renamed(quantity: Quantity, source: str) -> Quantity:
    return msgspec.structs.replace(quantity, source=source)
