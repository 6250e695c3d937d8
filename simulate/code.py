"""A program as one table of numbers: what the simulator compiles and compares without making objects.

``encode`` and ``decode`` go between the table and the instructions; they are inverse to each other.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from meshwright.simulate.program import (
    COMPUTES,
    LETTERS,
    ONCE,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Gather,
    Instruction,
    Payload,
    Program,
    Receive,
    Reduce,
    Send,
    Update,
)
from meshwright.simulate.schedules.base import KINDS

Table = NDArray[np.int32]

WHATS: tuple[Payload, ...] = get_args(Payload)
FORWARD, BACKWARD, INPUT, WEIGHT, SEND, RECEIVE, REDUCE, UPDATE, GATHER = range(9)
CODES: dict[type[Instruction], int] = {
    Forward: FORWARD,
    Backward: BACKWARD,
    BackwardInput: INPUT,
    BackwardWeight: WEIGHT,
    Send: SEND,
    Receive: RECEIVE,
    Reduce: REDUCE,
    Update: UPDATE,
    Gather: GATHER,
}
KIND, STAGE, OTHER, WHAT, MICROBATCH = range(5)  # the columns
NONE = -1
assert [CODES[COMPUTES[letter]] for letter in KINDS] == list(range(len(LETTERS)))


@dataclass(frozen=True, slots=True, eq=False)
class Code:
    """All instructions of a program, mesh by mesh: those of mesh r are ``row_start[r]:row_start[r + 1]`` of the table.

    The columns of ``table`` are kind, stage, other stage (of a transfer), payload and micro-batch; -1 is none.
    """

    table: Table
    row_start: NDArray[np.int64]

    @property
    def meshes(self) -> int:
        """Number of rows."""
        return len(self.row_start) - 1

    @property
    def count(self) -> int:
        """Number of instructions."""
        return len(self.table)

    @property
    def mesh(self) -> NDArray[np.int64]:
        """The mesh of each instruction."""
        return np.repeat(np.arange(self.meshes), np.diff(self.row_start))

    def instruction(self, index: int) -> Instruction:
        """One instruction as an object."""
        return _instruction(*self.table[index].tolist())


def encode(program: Program) -> Code:
    """The table of a program."""
    lengths = [len(row) for row in program]
    table = np.array([_columns(step) for row in program for step in row], np.int32).reshape(-1, 5)
    return Code(table, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


def decode(code: Code) -> Program:
    """The instructions of a table."""
    steps = [_instruction(*columns) for columns in code.table.tolist()]
    starts = code.row_start.tolist()
    return tuple(tuple(steps[starts[r] : starts[r + 1]]) for r in range(code.meshes))


def _columns(step: Instruction) -> tuple[int, int, int, int, int]:
    match step:
        case Send(stage, other, what, microbatch) | Receive(stage, other, what, microbatch):
            return CODES[type(step)], stage, other, WHATS.index(what), microbatch
        case Reduce(stage) | Update(stage) | Gather(stage):
            return CODES[type(step)], stage, NONE, NONE, ONCE
        case _:
            return CODES[type(step)], step.stage, NONE, NONE, step.microbatch


_MAKERS = {code: make for make, code in CODES.items()}


def _instruction(kind: int, stage: int, other: int, what: int, microbatch: int) -> Instruction:
    if kind == SEND:
        return Send(stage, other, WHATS[what], microbatch)
    if kind == RECEIVE:
        return Receive(stage, other, WHATS[what], microbatch)
    if kind in (REDUCE, UPDATE, GATHER):
        return _MAKERS[kind](stage)  # type: ignore[call-arg]
    return _MAKERS[kind](stage, microbatch)  # type: ignore[call-arg]
