"""Boxes as columns of pixels, each in the mean colour of what is in it: pictures of more boxes than pixels."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def painted(
    shape: tuple[int, int], row: Ints, start: Floats, end: Floats, colour: Floats, background: Floats
) -> Floats:
    """An image of (rows, columns, 3): every box covers its row from ``start`` to ``end``, in columns.

    A column that boxes cover in part has their colours and the background's, each by its share, so the mean of the
    image is that of the true picture however small the boxes are. Where boxes overlap they share.
    """
    rows, columns = shape
    weighted = np.column_stack([colour, np.ones(len(row))])
    first = np.minimum(start.astype(np.int64), columns - 1)
    last = np.minimum(end.astype(np.int64), columns - 1)
    one = first == last
    ends, inner = np.zeros((rows, columns, 4)), np.zeros((rows, columns + 1, 4))
    np.add.at(ends, (row, first), weighted * (np.where(one, end, first + 1.0) - start)[:, None])
    wide = ~one
    np.add.at(ends, (row[wide], last[wide]), weighted[wide] * (end - last)[wide, None])
    np.add.at(inner, (row[wide], first[wide] + 1), weighted[wide])
    np.add.at(inner, (row[wide], last[wide]), -weighted[wide])
    covered = ends + np.cumsum(inner, axis=1)[:, :columns]
    share = covered[..., 3:]
    mixed: Floats = covered[..., :3] / np.maximum(share, 1.0) + background * np.clip(1.0 - share, 0.0, 1.0)
    return np.clip(mixed, 0.0, 1.0)


def highest(columns: int, seconds: Floats, held: Floats, end_seconds: float) -> Floats:
    """The most that is held within each of ``columns`` equal parts of 0 .. ``end_seconds``.

    ``held[k]`` holds from ``seconds[k]`` until the next step; before the first one nothing is.
    """
    edges = np.linspace(0.0, end_seconds, columns + 1)
    most = np.zeros(columns)
    before = np.searchsorted(seconds, edges[:-1], side="right") - 1
    most[before >= 0] = held[before[before >= 0]]
    column = np.minimum((seconds / end_seconds * columns).astype(np.int64), columns - 1)
    np.maximum.at(most, column, held)
    return most
