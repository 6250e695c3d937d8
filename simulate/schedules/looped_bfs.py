"""Looped breadth-first: each mesh holds several stages, P apart, and runs all micro-batches through one after another.

Source: Lamy-Poirier, Breadth-First Pipeline Parallelism, MLSys 2023 (arXiv:2211.05953), section 4. With P meshes,
v chunks, f and b the seconds of one chunk, and M ≥ P, the step takes (vM + P - 1)(f + b). A chunk's parameters are
needed in one piece forward and one backward, so that sharded ones are gathered twice a step only.
"""

import numpy as np

from meshwright.simulate.schedules.base import Options, Order, Schedule, in_a_line, letters

CHUNKS = 2


def looped_bfs(meshes: int, microbatches: int, options: Options) -> Order:
    """All forwards chunk by chunk, then all backwards from the last chunk and micro-batch to the first; any M."""
    chunks = CHUNKS if options.chunks is None else options.chunks
    each = chunks * microbatches
    chunk, number = np.divmod(np.arange(each), microbatches)
    chunk, number = np.concatenate([chunk, chunk[::-1]]), np.concatenate([number, number[::-1]])
    text = "F" * each + "B" * each
    return in_a_line([letters(text, chunk * meshes + mesh, number) for mesh in range(meshes)], meshes * chunks)


def live_microbatches(stage: int, stages: int, microbatches: int) -> int:
    """Every stage holds all of them when the first backward starts."""
    return microbatches


LOOPED_BFS = Schedule(
    "looped-bfs",
    "GPipe over several stages a mesh, one after another",
    looped_bfs,
    live_microbatches,
    takes=frozenset({"chunks"}),
    chunks=CHUNKS,
)
