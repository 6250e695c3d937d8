"""Chimera: two replicas of the model, whose pipelines run through the meshes from both ends.

Source: Li and Hoefler, Chimera, SC 2021 (arXiv:2107.06925), sections 3.1 and 3.5 (direct concatenation). With P meshes
dividing M, equal stages and B ≥ F the step takes P·F + (2P - 2)B + (M/P - 1)(2F + (2P - 2)B): a bubble of P - 2
forwards where B = F, but one for every P micro-batches where B = 2F.
"""

import numpy as np

from meshwright.errors import ScheduleError
from meshwright.simulate.schedules.base import Ints, Options, Order, Row, Schedule, letters
from meshwright.simulate.schedules.bidirectional import both_ways


def chimera(meshes: int, microbatches: int, options: Options) -> Order:
    """Units of P micro-batches, half of them down and half up, in the order of time slots that suit F = B.

    Raises:
        ScheduleError: the meshes are odd in number, or there is no micro-batch for one direction.
    """
    if meshes % 2 or microbatches < 2:
        raise ScheduleError(
            f"schedule chimera needs an even number of meshes and at least 2 micro-batches, one for each direction; "
            f"{meshes} meshes and {microbatches} micro-batches were asked for"
        )
    down = (microbatches + 1) // 2
    return both_ways([_row(mesh, meshes, down, microbatches - down) for mesh in range(meshes)], down)


def _row(mesh: int, meshes: int, down: int, up: int) -> Row:
    """Both directions' computations on one mesh, sorted by their slots."""
    ways = ((mesh, down, mesh), (meshes - 1 - mesh, up, 2 * meshes - 1 - mesh))  # place in the pipeline, count, stage
    slots = np.concatenate([_slots(place, meshes, count) for place, count, _ in ways])
    stage = np.repeat([stage for *_, stage in ways], [2 * count for _, count, _ in ways])
    order = np.argsort(slots)
    text = np.frombuffer(("F" * down + "B" * down + "F" * up + "B" * up).encode(), np.uint8)
    return letters(text[order].tobytes().decode(), stage[order])


def _slots(place: int, meshes: int, count: int) -> Ints:
    """When the stage at this place runs its forwards, then its backwards, if each takes one slot."""
    unit, number = np.divmod(np.arange(count), meshes // 2)
    forward = 2 * meshes * unit + 2 * number + place
    return np.concatenate([forward, forward + 2 * (meshes - place) - 1]).astype(np.int32)


CHIMERA = Schedule(
    "chimera", "two replicas, pipelines from both ends", chimera, replicas=2, runnable=False
)  # fmt: skip
