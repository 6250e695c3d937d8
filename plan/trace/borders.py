"""Where one branch of a model ends and the next begins, in the list of its equations.

A model that is traced branch by branch lists one tower, then another, then what joins them. A layer must not hold the
end of one tower and the start of the next: the two could then never run side by side.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

LEAST_SHARE = 1 / 16  # of the model's FLOPs; a smaller branch is not worth devices of its own


def branch_borders(earliest_read: Sequence[int], flops: npt.NDArray[np.float64]) -> list[int]:
    """Equations at which a branch begins: from there on, for a while, nothing written before is read.

    Args:
        earliest_read: for each equation, the first equation of which it reads a result; its own index if of none.
        flops: of each equation.

    Returns:
        Indices c, so that the equations from c until the first that reads what was written before c have at least
        ``LEAST_SHARE`` of all FLOPs, and so have those between one border and the next.
    """
    count = len(earliest_read)
    before = np.concatenate(([0.0], np.cumsum(flops)))
    least = LEAST_SHARE * before[-1]
    borders: list[int] = []
    for start in range(1, count):
        if earliest_read[start] < start or before[start] - before[borders[-1] if borders else 0] < least:
            continue
        end = start
        while end < count and earliest_read[end] >= start:
            end += 1
        if before[end] - before[start] >= least:
            borders.append(start)
    return borders
