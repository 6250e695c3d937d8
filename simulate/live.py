"""Bytes on each device of each mesh over time, and what the peak is made of.

A device holds its static bytes always, the saved ones of a micro-batch from the start of its forward to the end of its
backward (part of them to the end of the weight-gradient, where that comes later), the transient ones of what runs
right now, and the buffers of transfers on their way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numba import njit
from numpy.typing import NDArray

from meshwright.simulate.code import FORWARD, INPUT, KIND, SEND, STAGE, WEIGHT, Table
from meshwright.simulate.compiled import KIND_COUNT, Compiled
from meshwright.simulate.costs import StageCosts, TransferCost
from meshwright.simulate.timeline import MemoryStep, Parts

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Index = NDArray[np.int32]
ACTIVATIONS, TRANSIENT, IN_FLIGHT = range(3)
NAMES = ("activations", "transient", "in flight")


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Steps of all meshes, those of mesh r at ``first[r]:first[r + 1]``; ``peak[r]`` by (static, then ``NAMES``)."""

    first: Ints
    seconds: Floats
    held_bytes: Floats
    static_bytes: Floats
    peak: Floats

    @property
    def peak_bytes(self) -> tuple[float, ...]:
        """The most on each device of each mesh."""
        return tuple(self.peak.sum(axis=1).tolist())

    def arrays(self) -> tuple[tuple[Floats, Floats], ...]:
        """Seconds, and bytes from then on, of each mesh."""
        first = self.first.tolist()
        return tuple((self.seconds[i:j], self.held_bytes[i:j]) for i, j in pairwise(first))

    def steps(self) -> tuple[tuple[MemoryStep, ...], ...]:
        """The same as pairs, and what is held before the first."""
        static = self.static_bytes.tolist()
        return tuple(
            ((0.0, before), *zip(seconds.tolist(), held.tolist(), strict=True))
            for before, (seconds, held) in zip(static, self.arrays(), strict=True)
        )


def live_memory(
    compiled: Compiled,
    stages: Sequence[StageCosts],
    transfers: Sequence[TransferCost],
    start: Floats,
    end: Floats,
    slot_latency_seconds: Floats,
) -> Memory:
    """The memory of a run, given by the start and end of its tasks and the latency of each of their slots."""
    held = stages[: compiled.stages]
    saved = np.array([stage.saved_bytes for stage in held])
    kept = np.array([s.saved_bytes if s.weight_saved_bytes is None else s.weight_saved_bytes for s in held])
    transient = np.array([stage.transient_bytes for stage in held])
    static = np.zeros(compiled.meshes)
    np.add.at(static, compiled.mesh_of_stage, [stage.static_bytes for stage in held])
    table, rows = compiled.code.table, compiled.code.row_start
    buffers = np.array([cost.buffer_bytes for cost in transfers])
    if not buffers.any():
        first, seconds, bytes_, peak = _in_row_order(table, rows, start, end, saved, kept, transient)
    else:
        arrival = end + slot_latency_seconds[compiled.slot]
        moved = np.where(table[:, KIND] == SEND, compiled.slot - compiled.stages * KIND_COUNT, -1)
        mesh, when, what, delta = _changes(
            table, rows, compiled.mesh_of_stage, start, end, arrival, compiled.receive_of, moved, buffers,
            saved, kept, transient,
        )  # fmt: skip
        order = np.lexsort((when, mesh))  # stable: what happens at one instant keeps the order of the program
        mesh, when, what, delta = mesh[order], when[order], what[order], delta[order]
        first = np.searchsorted(mesh, np.arange(compiled.meshes + 1))
        seconds, (bytes_, peak) = when, _summed(first, what, delta)
    counts = np.repeat(static, np.diff(first))
    return Memory(first, seconds, counts + bytes_, static, np.column_stack([static, peak]))


def peak_parts(memory: Memory, compiled: Compiled, stages: Sequence[StageCosts]) -> tuple[Parts, ...]:
    """What the peak of each mesh is made of, as (name, bytes), in a fixed order and without what is empty."""
    parts = []
    for mesh, peak in enumerate(memory.peak.tolist()):
        named: dict[str, float] = {}
        for stage in np.flatnonzero(compiled.mesh_of_stage == mesh).tolist():
            cost = stages[stage]
            for name, held in cost.static_parts or (("static", cost.static_bytes),):
                named[name] = named.get(name, 0.0) + held
        named |= dict(zip(NAMES, peak[1:], strict=True))
        parts.append(tuple((name, held) for name, held in named.items() if held))
    return tuple(parts)


@njit(cache=True)
def _in_row_order(
    table: Table, row_start: Ints, start: Floats, end: Floats, saved: Floats, kept: Floats, transient: Floats
) -> tuple[Ints, Floats, Floats, Floats]:
    """Two steps for each computation. A row runs in order, so nothing need be sorted."""
    meshes = len(row_start) - 1
    size = 0
    for i in range(len(table)):
        if table[i, KIND] < SEND:
            size += 2
    first = np.zeros(meshes + 1, np.int64)
    seconds, held_bytes = np.empty(size), np.empty(size)
    peak = np.zeros((meshes, 3))
    out = 0
    for mesh in range(meshes):
        held, most = 0.0, 0.0
        for i in range(row_start[mesh], row_start[mesh + 1]):
            kind, stage = table[i, KIND], table[i, STAGE]
            if kind >= SEND:
                continue
            if kind == FORWARD:
                held += saved[stage]
            seconds[out], held_bytes[out] = start[i], held + transient[stage]
            if held + transient[stage] > most:
                most = held + transient[stage]
                peak[mesh, ACTIVATIONS], peak[mesh, TRANSIENT] = held, transient[stage]
            if kind == INPUT:
                held -= saved[stage] - kept[stage]
            elif kind == WEIGHT:
                held -= kept[stage]
            elif kind != FORWARD:
                held -= saved[stage]
            seconds[out + 1], held_bytes[out + 1] = end[i], held
            out += 2
        first[mesh + 1] = out
    return first, seconds, held_bytes, peak


@njit(cache=True)
def _changes(
    table: Table,
    row_start: Ints,
    mesh_of_stage: Ints,
    start: Floats,
    end: Floats,
    arrival: Floats,
    receive_of: Index,
    moved: Ints,
    buffers: Floats,
    saved: Floats,
    kept: Floats,
    transient: Floats,
) -> tuple[Ints, Floats, Ints, Floats]:
    """Every change of what a mesh holds as (mesh, seconds, kind, bytes), buffers of transfers included.

    A buffer is there on the receiving side until the computation after its ``Receive`` starts, which then counts it
    among what it saves.
    """
    count = len(table)
    size = 4 * count  # no instruction changes more than four things
    mesh, when = np.empty(size, np.int64), np.empty(size)
    what, delta = np.empty(size, np.int64), np.empty(size)
    out = 0
    for row in range(len(row_start) - 1):
        for i in range(row_start[row], row_start[row + 1]):
            kind, stage = table[i, KIND], table[i, STAGE]
            if kind < SEND:
                freed = saved[stage]
                if kind == INPUT:
                    freed = saved[stage] - kept[stage]
                elif kind == WEIGHT:
                    freed = kept[stage]
                if kind == FORWARD:
                    mesh[out], when[out], what[out], delta[out] = row, start[i], ACTIVATIONS, saved[stage]
                    out += 1
                mesh[out], when[out], what[out], delta[out] = row, start[i], TRANSIENT, transient[stage]
                mesh[out + 1], when[out + 1], what[out + 1], delta[out + 1] = row, end[i], TRANSIENT, -transient[stage]
                out += 2
                if kind != FORWARD:
                    mesh[out], when[out], what[out], delta[out] = row, end[i], ACTIVATIONS, -freed
                    out += 1
            elif kind == SEND and buffers[moved[i]] > 0:
                bytes_ = buffers[moved[i]]
                receive = receive_of[i]
                there = mesh_of_stage[table[receive, STAGE]]
                used = receive + 1
                while used < row_start[there + 1] and table[used, KIND] >= SEND:
                    used += 1
                until = start[used] if used < row_start[there + 1] else arrival[i]
                mesh[out], when[out], what[out], delta[out] = row, start[i], IN_FLIGHT, bytes_
                mesh[out + 1], when[out + 1], what[out + 1], delta[out + 1] = row, arrival[i], IN_FLIGHT, -bytes_
                mesh[out + 2], when[out + 2], what[out + 2], delta[out + 2] = there, start[i], IN_FLIGHT, bytes_
                mesh[out + 3], when[out + 3], what[out + 3], delta[out + 3] = there, until, IN_FLIGHT, -bytes_
                out += 4
    return mesh[:out], when[:out], what[:out], delta[:out]


@njit(cache=True)
def _summed(first: Ints, what: Ints, delta: Floats) -> tuple[Floats, Floats]:
    """Bytes after each change, and the parts of each mesh's peak."""
    held_bytes, peak = np.empty(len(what)), np.zeros((len(first) - 1, 3))
    for mesh in range(len(first) - 1):
        held = np.zeros(3)
        most = 0.0
        for i in range(first[mesh], first[mesh + 1]):
            held[what[i]] += delta[i]
            held_bytes[i] = held.sum()
            if held_bytes[i] > most:
                most = held_bytes[i]
                peak[mesh] = held
    return held_bytes, peak
