"""A program made ready to be timed: its tasks and what each waits for, found once and timed again and again.

Computation runs in order on each mesh. A ``Send`` never holds its mesh up: its bytes leave over a channel of their own
(one for each ordered pair of stages, in order). A ``Receive`` ends when they have arrived.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from meshwright.errors import ScheduleError
from meshwright.simulate.code import (
    GATHER,
    KIND,
    MICROBATCH,
    OTHER,
    RECEIVE,
    REDUCE,
    SEND,
    STAGE,
    WHAT,
    WHATS,
    Code,
    Table,
    decode,
    encode,
)
from meshwright.simulate.engine import NOBODY, make_tasks, run_tasks
from meshwright.simulate.program import Payload, Program, word
from meshwright.simulate.verify import refuse_deadlock

Ints = NDArray[np.int64]
KIND_COUNT = 9  # the seconds of a computation depend on its stage and kind: slot = stage * KIND_COUNT + kind


class TransferKey(NamedTuple):
    """One transfer of a program, whatever its micro-batch."""

    source: int
    target: int
    what: Payload


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """The tasks of a program: one for each instruction, in the order of its table.

    ``executor`` is a mesh, a channel (one for each ordered pair of stages that sends) or, where reductions and gathers
    run beside the computation, a mesh's collective stream. ``slot`` says whose seconds a task takes: those of a stage
    and kind, or, from ``stages * KIND_COUNT`` on, those of a transfer. ``edge_transfer`` names the transfer whose
    latency an edge has (-1: none). ``order`` is one in which every task follows what it waits for.
    """

    code: Code
    stages: int
    transfers: tuple[TransferKey, ...]
    executor: Ints
    before: Ints
    slot: Ints
    edge_start: Ints
    edge_from: Ints
    edge_transfer: Ints
    receive_of: Ints
    mesh_of_stage: Ints
    order: Ints

    @property
    def meshes(self) -> int:
        """Number of meshes."""
        return self.code.meshes


def compile_program(program: Program | Code, *, collective_stream: bool = False) -> Compiled:
    """Find the tasks of a program and what they wait for.

    Args:
        collective_stream: let reductions and gathers run on a stream of their own, each beside whatever its mesh
            computes after the last backward of its stage (as XLA and DDP overlap them); else in the row's order.

    Raises:
        ScheduleError: a ``Receive`` has no ``Send``, or the program deadlocks.
    """
    code = program if isinstance(program, Code) else encode(program)
    table = code.table
    stages = 1 + int(table[:, STAGE].max(initial=NOBODY))
    if (table[:, OTHER] >= stages).any():
        step = code.instruction(int(table[:, OTHER].argmax()))
        raise ScheduleError(f"{word(step)} has no partner: no mesh runs stage {table[:, OTHER].max()}")
    moves = table[table[:, KIND] == SEND]
    keys = (moves[:, STAGE].astype(np.int64) * stages + moves[:, OTHER]) * len(WHATS) + moves[:, WHAT]
    distinct = np.unique(keys)
    transfers = tuple(
        TransferKey(int(key) // len(WHATS) // stages, int(key) // len(WHATS) % stages, WHATS[int(key) % len(WHATS)])
        for key in distinct
    )
    executor, slot, edge_start, edge_from, edge_transfer, receive_of, lost = _tasks(
        table, code.row_start, stages, distinct, collective_stream
    )
    if lost != NOBODY:
        step = code.instruction(lost)
        raise ScheduleError(f"{word(step)} has no partner; verify the program first")
    tasks = make_tasks(np.ones(len(table)), executor, edges=(edge_start, edge_from, np.zeros(len(edge_from))))
    try:
        order = np.argsort(run_tasks(tasks).start_seconds, kind="stable")
    except ScheduleError:
        refuse_deadlock(decode(code))
        raise
    mesh_of_stage = np.full(stages, NOBODY)
    mesh_of_stage[table[:, STAGE]] = code.mesh
    return Compiled(
        code=code,
        stages=stages,
        transfers=transfers,
        executor=executor,
        before=_before(executor),
        slot=slot,
        edge_start=edge_start,
        edge_from=edge_from,
        edge_transfer=edge_transfer,
        receive_of=receive_of,
        mesh_of_stage=mesh_of_stage,
        order=order,
    )


@njit(cache=True)
def _tasks(
    table: Table, row_start: Ints, stages: int, transfers: Ints, collective_stream: bool
) -> tuple[Ints, Ints, Ints, Ints, Ints, Ints, int]:
    """Executor, slot, edges and ``Receive`` of each task, and a ``Receive`` without partner (-1: there is none)."""
    count, meshes, whats = len(table), len(row_start) - 1, 6
    # Channels follow the meshes' streams among the executors; both halves of a transfer meet in a table by number.
    channel = np.full(stages * stages, -1, np.int64)
    channels = 0
    microbatches = 1
    for i in range(count):
        if table[i, KIND] == SEND:
            pair = table[i, STAGE] * stages + table[i, OTHER]
            if channel[pair] < 0:
                channel[pair] = channels
                channels += 1
        microbatches = max(microbatches, table[i, MICROBATCH] + 1)
    sent = np.full(channels * whats * (microbatches + 1), -1, np.int64)
    transfer_of = np.full(channels * whats, -1, np.int64)
    for t in range(len(transfers)):
        transfer_of[channel[transfers[t] // whats] * whats + transfers[t] % whats] = t
    last_backward = np.full(stages, -1, np.int64)
    for i in range(count):
        kind = table[i, KIND]
        if kind == SEND:
            place = channel[table[i, STAGE] * stages + table[i, OTHER]] * whats + table[i, WHAT]
            sent[place * (microbatches + 1) + table[i, MICROBATCH] + 1] = i
        elif kind < SEND:
            last_backward[table[i, STAGE]] = i

    executor, slot = np.empty(count, np.int64), np.empty(count, np.int64)
    edge_start = np.zeros(count + 1, np.int64)
    edge_from, edge_transfer = np.empty(count, np.int64), np.full(count, -1, np.int64)
    receive_of = np.full(count, -1, np.int64)
    edges = 0
    for mesh in range(meshes):
        made = -1  # the task of this mesh after which a send may leave
        reduced = -1  # the last reduction on the collective stream: whatever else ends the iteration waits for it
        for i in range(row_start[mesh], row_start[mesh + 1]):
            kind, stage = table[i, KIND], table[i, STAGE]
            executor[i], slot[i] = mesh, stage * 9 + kind
            if kind == SEND:
                place = channel[stage * stages + table[i, OTHER]]
                executor[i] = 2 * meshes + place
                slot[i] = stages * 9 + transfer_of[place * whats + table[i, WHAT]]
                if made >= 0:
                    edge_from[edges] = made
                    edges += 1
            elif kind == RECEIVE:
                pair = table[i, OTHER] * stages + stage
                place = channel[pair] * whats + table[i, WHAT] if channel[pair] >= 0 else -1
                origin = sent[place * (microbatches + 1) + table[i, MICROBATCH] + 1] if place >= 0 else -1
                if origin < 0:
                    return executor, slot, edge_start, edge_from, edge_transfer, receive_of, i
                edge_from[edges], edge_transfer[edges] = origin, transfer_of[place]
                receive_of[origin] = i
                edges += 1
                made = i
            elif collective_stream and kind in (REDUCE, GATHER):
                executor[i] = meshes + mesh
                need = last_backward[stage] if kind == REDUCE else made
                if need >= 0:
                    edge_from[edges] = need
                    edges += 1
                if kind == REDUCE:
                    reduced = i
                    made = i
            else:
                if reduced >= 0:
                    edge_from[edges] = reduced
                    edges += 1
                    reduced = -1
                made = i
            edge_start[i + 1] = edges
    return executor, slot, edge_start, edge_from[:edges].copy(), edge_transfer[:edges].copy(), receive_of, -1


@njit(cache=True)
def _before(executor: Ints) -> Ints:
    """The task before each one on its executor (-1: it is the first)."""
    last = np.full(executor.max() + 1 if len(executor) else 0, -1, np.int64)
    before = np.empty(len(executor), np.int64)
    for task in range(len(executor)):
        before[task] = last[executor[task]]
        last[executor[task]] = task
    return before
