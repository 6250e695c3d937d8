"""A binary heap in two arrays, ordered by (key, identity), so that equal keys come in order of identity."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@njit(cache=True)
def push(keys: Floats, ids: Ints, size: int, key: float, identity: int) -> int:
    """Add to a binary heap ordered by (key, identity); returns the new size."""
    child = size
    while child > 0:
        parent = (child - 1) >> 1
        if keys[parent] < key or (keys[parent] == key and ids[parent] <= identity):
            break
        keys[child], ids[child] = keys[parent], ids[parent]
        child = parent
    keys[child], ids[child] = key, identity
    return size + 1


@njit(cache=True)
def pop(keys: Floats, ids: Ints, size: int) -> int:
    """Remove the first of a binary heap, which the caller has read; returns the new size."""
    size -= 1
    key, identity = keys[size], ids[size]
    parent = 0
    while True:
        child = 2 * parent + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (keys[other] < keys[child] or (keys[other] == keys[child] and ids[other] < ids[child])):
            child = other
        if key < keys[child] or (key == keys[child] and identity <= ids[child]):
            break
        keys[parent], ids[parent] = keys[child], ids[child]
        parent = child
    keys[parent], ids[parent] = key, identity
    return size


@njit(cache=True)
def with_room(keys: Floats, ids: Ints, size: int, more: int) -> tuple[Floats, Ints]:
    """The heap's arrays, or longer ones with the same contents, with room for so many more."""
    if size + more <= len(keys):
        return keys, ids
    longer = max(2 * len(keys), size + more)
    new_keys, new_ids = np.empty(longer), np.empty(longer, np.int64)
    new_keys[:size], new_ids[:size] = keys[:size], ids[:size]
    return new_keys, new_ids
