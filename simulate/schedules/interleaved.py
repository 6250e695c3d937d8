"""Interleaved 1F1B: each mesh holds several stages, P apart, and the micro-batches go round in groups.

Source: Narayanan et al., SC 2021, section 2.2 (interleaved schedule). With P meshes, v chunks, f and b the seconds of
one chunk, and P dividing M, the step takes (vM + P - 1)(f + b): the bubble of 1F1B by v.
"""

import numpy as np

from meshwright.errors import ScheduleError
from meshwright.simulate.schedules.base import WHOLE, Options, Order, Row, Schedule, in_a_line, letters
from meshwright.simulate.schedules.one_f_one_b import alternating

CHUNKS = 2


def interleaved(meshes: int, microbatches: int, options: Options) -> Order:
    """1F1B over the chunks of each mesh, in groups of as many micro-batches as meshes.

    Where the micro-batches are no multiple of the meshes, max(1, M // P) equal groups of more (as in
    torch.distributed.pipelining); with fewer micro-batches than meshes, one group.

    Raises:
        ScheduleError: the groups would not be equal; says which numbers of micro-batches do.
    """
    chunks = CHUNKS if options.chunks is None else options.chunks
    group = group_size(meshes, microbatches)
    return in_a_line([_row(mesh, meshes, microbatches, chunks, group) for mesh in range(meshes)], meshes * chunks)


def group_size(meshes: int, microbatches: int) -> int:
    """Micro-batches that pass one chunk before the next chunk's turn."""
    groups = max(1, microbatches // meshes)
    if microbatches % groups:
        known = sorted(m for m in {*range(meshes + 1), *_near(meshes, microbatches)} if m and not _uneven(meshes, m))
        below = max(m for m in known if m < microbatches)
        above = min(m for m in known if m > microbatches)
        raise ScheduleError(
            f"{microbatches} micro-batches do not go round {meshes} meshes in {groups} equal groups: schedule "
            f"interleaved takes multiples of {meshes}, and others as near as {below} and {above}"
        )
    return microbatches // groups


def _near(meshes: int, microbatches: int) -> range:
    """All numbers of micro-batches up to one multiple of the meshes away."""
    return range(max(1, microbatches - meshes), microbatches + meshes + 1)


def _uneven(meshes: int, microbatches: int) -> bool:
    return microbatches % max(1, microbatches // meshes) != 0


def _row(mesh: int, meshes: int, microbatches: int, chunks: int, group: int) -> Row:
    total = chunks * microbatches
    warmup = min(total, (chunks - 1) * group + 2 * (meshes - 1 - mesh))
    text = alternating(min(total, warmup + 1), total)
    counted = letters(text, mesh)  # forwards and backwards numbered through, chunks ignored
    place = counted.microbatch % (group * chunks)
    chunk = np.where(counted.kind == WHOLE, chunks - 1 - place // group, place // group)
    number = counted.microbatch // (group * chunks) * group + place % group
    return letters(text, chunk * meshes + mesh, number)


INTERLEAVED = Schedule(
    "interleaved",
    "1F1B over several stages a mesh; the bubble is divided by their number",
    interleaved,
    takes=frozenset({"chunks"}),
    chunks=CHUNKS,
)
