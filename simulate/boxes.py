"""The boxes of a picture of a timeline: where each instruction is drawn, in which colour."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.simulate.program import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Gather,
    Instruction,
    Receive,
    Reduce,
    Send,
    Update,
)
from meshwright.simulate.timeline import Timeline
from meshwright.simulate.tracks import collectives_beside

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Okabe and Ito's palette, which colour-blind readers can tell apart; the halves of a backward mix to its orange.
COLOURS: dict[type[Instruction], tuple[str, str]] = {
    Forward: ("forward", "#56B4E9"),
    Backward: ("backward", "#E69F00"),
    BackwardInput: ("input gradient", "#D55E00"),
    BackwardWeight: ("weight gradient", "#F0E442"),
    Send: ("transfer in flight", "#CC79A7"),
    Reduce: ("reduce gradients", "#009E73"),
    Gather: ("gather parameters", "#0072B2"),
    Update: ("update", "#5D6D7E"),
}
KINDS = tuple(COLOURS)
COMPUTES = (Forward, Backward, BackwardInput, BackwardWeight)
PALEST = 0.5  # share of white in the last stage of a mesh that holds several


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """What has a shape: not waits, which are the empty places, and nothing that takes no time.

    ``kind`` indexes ``KINDS``; ``pale`` is the share of white in the colour; ``beside`` boxes belong in the thin lane
    of what runs beside the computation: transfers, and collectives where they have a stream of their own.
    ``microbatch`` is -1 where there is none.
    """

    mesh: Ints
    kind: Ints
    start_seconds: Floats
    end_seconds: Floats
    pale: Floats
    beside: NDArray[np.bool_]
    microbatch: Ints

    @property
    def computes(self) -> NDArray[np.bool_]:
        """The boxes that have a micro-batch's number on them."""
        return self.kind < len(COMPUTES)

    @property
    def seconds(self) -> Floats:
        return self.end_seconds - self.start_seconds


def boxes_of(timeline: Timeline) -> Boxes:
    """The boxes of a timeline, in the order of its events."""
    streams = collectives_beside(timeline)
    pale = _paleness(timeline)
    number = {kind: index for index, kind in enumerate(KINDS)}
    columns: list[tuple[int, int, float, float, float, bool, int]] = []
    for event in timeline.events:
        step = event.instruction
        if isinstance(step, Receive) or event.end_seconds <= event.start_seconds:
            continue
        beside = isinstance(step, Send) or (isinstance(step, Reduce | Gather) and event.mesh in streams)
        microbatch = step.microbatch if isinstance(step, COMPUTES) else -1
        light = pale[step.stage] if isinstance(step, COMPUTES) else 0.0
        columns.append(
            (event.mesh, number[type(step)], event.start_seconds, event.end_seconds, light, beside, microbatch)
        )
    mesh, kind, start, end, light_, beside_, microbatch_ = zip(*columns, strict=True) if columns else [()] * 7
    return Boxes(
        np.array(mesh, np.int64),
        np.array(kind, np.int64),
        np.array(start, np.float64),
        np.array(end, np.float64),
        np.array(light_, np.float64),
        np.array(beside_, np.bool_),
        np.array(microbatch_, np.int64),
    )


def _paleness(timeline: Timeline) -> dict[int, float]:
    """Share of white by stage: the stages of one mesh get evenly paler in the order of their numbers."""
    held: defaultdict[int, set[int]] = defaultdict(set)
    for event in timeline.events:
        if isinstance(event.instruction, COMPUTES):
            held[event.mesh].add(event.instruction.stage)
    return {
        stage: PALEST * place / max(1, len(stages) - 1)
        for stages in held.values()
        for place, stage in enumerate(sorted(stages))
    }
