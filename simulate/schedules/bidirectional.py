"""What schedules share that keep two replicas of the model and send micro-batches through them from both ends.

Stages 0..P-1 run down the meshes. Stages P..2P-1 are a second copy of them that runs up: stage P + s lives on mesh
P - 1 - s. The first half of the micro-batches goes down, the second up.
"""

from collections.abc import Sequence
from dataclasses import replace

from meshwright.simulate.schedules.base import Order, Row, chain


def both_ways(rows: Sequence[Row], down: int) -> Order:
    """The order of rows in which each direction counts its own micro-batches, ``down`` of which go down."""
    meshes = len(rows)
    line = chain(meshes)
    return Order(
        rows=tuple(replace(row, microbatch=row.microbatch + down * (row.stage >= meshes)) for row in rows),
        edges=line + tuple((meshes + source, meshes + target) for source, target in line),
        copies=tuple(range(meshes)) * 2,
    )
