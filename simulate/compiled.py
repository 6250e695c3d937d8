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
    UPDATE,
    WHAT,
    WHATS,
    Code,
    Table,
    decode,
    encode,
)
from meshwright.simulate.engine import NOBODY
from meshwright.simulate.program import Payload, Program, word
from meshwright.simulate.verify import refuse_deadlock

Ints = NDArray[np.int32]
PAYLOAD_COUNT = len(WHATS)
OF_GRADIENTS = tuple(WHATS.index(what) for what in ("gradient", "square", "norm"))
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
    run beside the computation, a mesh's collective stream; ``before`` is the task before on it. ``slot`` says whose
    seconds a task takes: those of a stage and kind, or, from ``stages * KIND_COUNT`` on, those of a transfer. ``need``
    is the one other task that it waits for, and ``need_slot`` the transfer, as a slot, whose latency lies between.
    ``receive_of`` is the ``Receive`` of each ``Send``. In all of them -1 is none. ``order`` is one in which every task
    follows what it waits for.
    """

    code: Code
    stages: int
    transfers: tuple[TransferKey, ...]
    executor: Ints
    before: Ints
    slot: Ints
    need: Ints
    need_slot: Ints
    receive_of: Ints
    mesh_of_stage: NDArray[np.int64]
    order: Ints

    @property
    def meshes(self) -> int:
        """Number of meshes."""
        return self.code.meshes

    @property
    def edges(self) -> tuple[NDArray[np.int64], Ints, Ints]:
        """The dependencies as CSR arrays: start, task waited for, and slot of the latency between (-1: none)."""
        some = self.need != NOBODY
        start = np.concatenate([[0], np.cumsum(some, dtype=np.int64)])
        return start, self.need[some], self.need_slot[some]


def compile_program(program: Program | Code, *, collective_stream: bool = False) -> Compiled:
    """Find the tasks of a program and what they wait for.

    Args:
        collective_stream: let reductions and gathers run on a stream of their own, each beside whatever its mesh
            computes after the last backward of its stage (as XLA and DDP overlap them); else in the row's order.

    Raises:
        ScheduleError: a ``Receive`` has no ``Send`` or a ``Send`` no ``Receive``, or the program deadlocks.
    """
    code = program if isinstance(program, Code) else encode(program)
    table = code.table
    stages = 1 + int(table[:, STAGE].max(initial=NOBODY))
    if (table[:, OTHER] >= stages).any():
        step = code.instruction(int(table[:, OTHER].argmax()))
        raise ScheduleError(f"{word(step)} has no partner: no mesh runs stage {table[:, OTHER].max()}")
    distinct = np.unique(_sent_keys(table, stages))
    transfers = tuple(
        TransferKey(int(key) // len(WHATS) // stages, int(key) // len(WHATS) % stages, WHATS[int(key) % len(WHATS)])
        for key in distinct
    )
    executor, slot, need, need_slot, receive_of, lost = _tasks(
        table, code.row_start, stages, distinct, collective_stream
    )
    if lost != NOBODY:
        step = code.instruction(lost)
        raise ScheduleError(f"{word(step)} has no partner; verify the program first")
    order, stuck = _order(table, code.row_start, receive_of)
    if stuck:
        refuse_deadlock(decode(code))
    mesh_of_stage = np.full(stages, NOBODY)
    mesh_of_stage[table[:, STAGE]] = code.mesh
    return Compiled(
        code=code,
        stages=stages,
        transfers=transfers,
        executor=executor,
        before=_before(executor),
        slot=slot,
        need=need,
        need_slot=need_slot,
        receive_of=receive_of,
        mesh_of_stage=mesh_of_stage,
        order=order,
    )


@njit(cache=True)
def _sent_keys(table: Table, stages: int) -> NDArray[np.int64]:
    """One number for source, target and payload of each ``Send`` but those just repeated."""
    keys = np.empty(len(table), np.int64)
    found = 0
    for i in range(len(table)):
        if table[i, KIND] == SEND:
            key = (np.int64(table[i, STAGE]) * stages + table[i, OTHER]) * PAYLOAD_COUNT + table[i, WHAT]
            new = True
            for back in range(1, min(found, 4) + 1):  # a mesh sends to few others, in turn
                new = new and keys[found - back] != key
            if new:
                keys[found] = key
                found += 1
    return keys[:found]


@njit(cache=True)
def _tasks(
    table: Table, row_start: NDArray[np.int64], stages: int, transfers: NDArray[np.int64], collective_stream: bool
) -> tuple[Ints, Ints, Ints, Ints, Ints, int]:
    """The arrays of ``Compiled``, and a transfer without its other half (-1: there is none)."""
    count, meshes = len(table), len(row_start) - 1
    # Channels follow the meshes' streams among the executors; both halves of a transfer meet in a table by number.
    channel = np.full(stages * stages, -1, np.int64)
    channels, microbatches = 0, 1
    for i in range(count):
        if table[i, KIND] == SEND:
            pair = table[i, STAGE] * stages + table[i, OTHER]
            if channel[pair] < 0:
                channel[pair] = channels
                channels += 1
        microbatches = max(microbatches, table[i, MICROBATCH] + 1)
    transfer_of = np.full(channels * PAYLOAD_COUNT, -1, np.int64)
    for t in range(len(transfers)):
        place = channel[transfers[t] // PAYLOAD_COUNT] * PAYLOAD_COUNT + transfers[t] % PAYLOAD_COUNT
        transfer_of[place] = t
    sent = np.full((len(transfers), microbatches + 1), -1, np.int32)
    last_backward = np.full(stages, -1, np.int64)
    for i in range(count):
        kind = table[i, KIND]
        if kind == SEND:
            place = channel[table[i, STAGE] * stages + table[i, OTHER]] * PAYLOAD_COUNT + table[i, WHAT]
            sent[transfer_of[place], table[i, MICROBATCH] + 1] = i
        elif kind < SEND:
            last_backward[table[i, STAGE]] = i

    executor, slot = np.empty(count, np.int32), np.empty(count, np.int32)
    need, need_slot = np.full(count, -1, np.int32), np.full(count, -1, np.int32)
    receive_of = np.full(count, -1, np.int32)
    for mesh in range(meshes):
        made = -1  # the task of this mesh after which a send may leave
        reduced = -1  # the last reduction on the collective stream, which its results and the update wait for
        for i in range(row_start[mesh], row_start[mesh + 1]):
            kind, stage = table[i, KIND], table[i, STAGE]
            executor[i], slot[i] = mesh, stage * KIND_COUNT + kind
            if kind == SEND:
                place = channel[stage * stages + table[i, OTHER]]
                executor[i] = 2 * meshes + place
                slot[i] = stages * KIND_COUNT + transfer_of[place * PAYLOAD_COUNT + table[i, WHAT]]
                need[i] = reduced if reduced >= 0 and table[i, WHAT] in OF_GRADIENTS else made
            elif kind == RECEIVE:
                pair = table[i, OTHER] * stages + stage
                moved = transfer_of[channel[pair] * PAYLOAD_COUNT + table[i, WHAT]] if channel[pair] >= 0 else -1
                origin = sent[moved, table[i, MICROBATCH] + 1] if moved >= 0 else -1
                if origin < 0:
                    return executor, slot, need, need_slot, receive_of, i
                need[i], need_slot[i] = origin, stages * KIND_COUNT + moved
                receive_of[origin] = i
                made = i
            elif collective_stream and kind in (REDUCE, GATHER):
                executor[i] = meshes + mesh
                need[i] = last_backward[stage] if kind == REDUCE else made
                if kind == REDUCE:
                    reduced = i
            else:
                if kind == UPDATE:
                    need[i] = reduced
                made = i
    for i in range(count):
        if table[i, KIND] == SEND and receive_of[i] < 0:
            return executor, slot, need, need_slot, receive_of, i
    return executor, slot, need, need_slot, receive_of, -1


@njit(cache=True)
def _order(table: Table, row_start: NDArray[np.int64], receive_of: Ints) -> tuple[Ints, bool]:
    """The tasks in an order that keeps every dependency, and whether some can never start.

    Only a ``Receive`` waits for another row, so rows run on until one whose ``Send`` has not left.
    """
    meshes = len(row_start) - 1
    order = np.empty(len(table), np.int32)
    at = row_start[:-1].copy()
    sent = np.zeros(len(table), np.bool_)  # by the Receive that waits for it
    mesh_of = np.empty(len(table), np.int64)
    for mesh in range(meshes):
        mesh_of[row_start[mesh] : row_start[mesh + 1]] = mesh
    asleep = np.zeros(meshes, np.bool_)
    awake = np.arange(meshes)[::-1].copy()  # a stack, which each mesh is on at most once
    waking, placed = meshes, 0
    while waking > 0:
        waking -= 1
        mesh = awake[waking]
        while at[mesh] < row_start[mesh + 1]:
            i = at[mesh]
            if table[i, KIND] == RECEIVE and not sent[i]:
                asleep[mesh] = True
                break
            if table[i, KIND] == SEND and receive_of[i] >= 0:
                receive = receive_of[i]
                sent[receive] = True
                other = mesh_of[receive]
                if asleep[other] and at[other] == receive:
                    asleep[other] = False
                    awake[waking] = other
                    waking += 1
            order[placed] = i
            placed += 1
            at[mesh] += 1
    return order, placed < len(table)


@njit(cache=True)
def _before(executor: Ints) -> Ints:
    """The task before each one on its executor (-1: it is the first)."""
    last = np.full(executor.max() + 1 if len(executor) else 0, -1, np.int32)
    before = np.empty(len(executor), np.int32)
    for task in range(len(executor)):
        before[task] = last[executor[task]]
        last[executor[task]] = task
    return before
