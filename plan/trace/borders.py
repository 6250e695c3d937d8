"""Where a model branches, in the list of its equations: at towers of inputs of their own, and at forks of a trunk.

A model that is traced branch by branch lists the trunk, one branch, another, then what joins them. A layer must not
hold the end of one branch and the start of the next: the two could then never run side by side.
"""

from bisect import bisect
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

LEAST_SHARE = 1 / 16  # of the model's FLOPs; a smaller branch is not worth devices of its own
LEAST_DEPTH = 2  # operators with FLOPs one after the other; a single product beside another is no branch


def branch_borders(reads: Sequence[Collection[int]], flops: npt.NDArray[np.float64]) -> list[int]:
    """Equations at which a branch begins, and those where trunk and branches meet.

    A branch begins at c if the equations from c on, for a while, read nothing of what stands just before c: they read
    each other, and perhaps a trunk that ends at some t < c. Both [t, c) and the branch have at least ``LEAST_SHARE`` of
    all FLOPs and ``LEAST_DEPTH`` operators in a row. The end of the trunk t is a border too, and so is the equation
    that ends the branch, each unless it would leave less than ``LEAST_SHARE`` between two borders.

    Args:
        reads: for each equation, the earlier equations of which it reads a result.
        flops: of each equation.
    """
    before = np.concatenate(([0.0], np.cumsum(flops)))
    least = LEAST_SHARE * before[-1]
    borders: list[int] = []
    meetings: list[int] = []
    for start in range(1, len(reads)):
        if before[start] - before[borders[-1] if borders else 0] < least:
            continue
        trunk, end = _free_run(reads, before, start, least)
        if before[end] - before[start] < least:
            continue
        if min(_depth(reads, flops, trunk, start), _depth(reads, flops, start, end)) < LEAST_DEPTH:
            continue
        borders.append(start)
        meetings += [trunk, end]
    for at in meetings:
        place = bisect(borders, at)
        left, right = borders[place - 1] if place else 0, borders[place] if place < len(borders) else len(reads)
        if min(before[at] - before[left], before[right] - before[at]) >= least:
            borders.insert(place, at)
    return borders


def _free_run(
    reads: Sequence[Collection[int]], before: npt.NDArray[np.float64], start: int, least: float
) -> tuple[int, int]:
    """(end of the trunk, end of the run): equations from ``start`` on that read nothing between the two.

    At least ``least`` FLOPs stand between trunk and start; the trunk is what the run's first ``least`` FLOPs read.
    """
    trunk = 0
    for index in range(start, len(reads)):
        wanted = 1 + max((r for r in reads[index] if r < start), default=-1)
        if wanted > trunk and (before[start] - before[wanted] < least or before[index] - before[start] >= least):
            return trunk, index
        trunk = max(trunk, wanted)
    return trunk, len(reads)


def _depth(reads: Sequence[Collection[int]], flops: npt.NDArray[np.float64], start: int, end: int) -> int:
    """The most operators with FLOPs that follow each other in equations start..end-1."""
    depth = [0] * (end - start)
    for index in range(start, end):
        longest = max((depth[r - start] for r in reads[index] if r >= start), default=0)
        depth[index - start] = longest + (flops[index] > 0)
    return max(depth, default=0)
