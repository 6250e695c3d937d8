"""The program: for each mesh, the list of instructions that the simulator times and the executor runs.

One row per mesh. A row runs in order. ``Send`` never blocks the row; ``Receive`` waits until the matching ``Send``
has arrived. A transfer is named by (source stage, target stage, what, micro-batch), so the two halves match by value.

The text form is one word an instruction, made for eyes: ``0F2`` is the forward of micro-batch 2 on stage 0, ``0B2``
its backward, ``0>1a2`` its activation on the way to stage 1 and ``1<0a2`` the wait for it there (``c`` for a
cotangent, ``g`` for a tied weight's gradient, ``p`` for its parameter), ``0R`` the reduction and ``0U`` the update.
"""

import re
from dataclasses import dataclass
from typing import Literal

from meshwright.errors import ScheduleError

Payload = Literal["activation", "cotangent", "gradient", "parameter"]
PAYLOADS: dict[str, Payload] = {"a": "activation", "c": "cotangent", "g": "gradient", "p": "parameter"}
ONCE = -1  # the micro-batch number of what is sent once per iteration


@dataclass(frozen=True, slots=True)
class Forward:
    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Backward:
    """Input- and weight-gradient of one micro-batch together."""

    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Send:
    """Start sending ``what`` from ``stage`` to ``target``; ``microbatch`` is -1 for once-per-iteration payloads."""

    stage: int
    target: int
    what: Payload
    microbatch: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait until ``what`` sent by stage ``source`` to ``stage`` is here."""

    stage: int
    source: int
    what: Payload
    microbatch: int


@dataclass(frozen=True, slots=True)
class Reduce:
    """Finish the gradients of a stage: sum partial gradients over the mesh axes that hold them, once per iteration."""

    stage: int


@dataclass(frozen=True, slots=True)
class Update:
    """The optimizer's step on the parameters that this stage owns."""

    stage: int


Instruction = Forward | Backward | Send | Receive | Reduce | Update
Program = tuple[tuple[Instruction, ...], ...]


def maker(send: Send) -> Instruction:
    """The instruction whose result is sent."""
    match send.what:
        case "activation":
            return Forward(send.stage, send.microbatch)
        case "cotangent":
            return Backward(send.stage, send.microbatch)
        case "gradient":
            return Reduce(send.stage)
        case "parameter":
            return Update(send.stage)


def word(instruction: Instruction) -> str:
    """One instruction as a word without spaces; ``parse_word`` is the inverse."""
    match instruction:
        case Forward(stage, microbatch):
            return f"{stage}F{microbatch}"
        case Backward(stage, microbatch):
            return f"{stage}B{microbatch}"
        case Send(stage, target, what, microbatch):
            return f"{stage}>{target}{what[0]}{_number(microbatch)}"
        case Receive(stage, source, what, microbatch):
            return f"{stage}<{source}{what[0]}{_number(microbatch)}"
        case Reduce(stage):
            return f"{stage}R"
        case Update(stage):
            return f"{stage}U"


def show(program: Program) -> str:
    """The whole program as text, one line a mesh; ``parse`` is the inverse."""
    return "\n".join(f"mesh {r}: " + " ".join(map(word, row)) for r, row in enumerate(program))


def parse_word(text: str) -> Instruction:
    """The instruction that a word means.

    Raises:
        ScheduleError: the text is no word of a program.
    """
    if match := re.fullmatch(r"(\d+)([FB])(\d+)", text):
        stage, kind, microbatch = match.groups()
        return (Forward if kind == "F" else Backward)(int(stage), int(microbatch))
    if match := re.fullmatch(r"(\d+)([<>])(\d+)([acgp])(\d*)", text):
        stage, way, other, letter, microbatch = match.groups()
        make = Send if way == ">" else Receive
        return make(int(stage), int(other), PAYLOADS[letter], int(microbatch) if microbatch else ONCE)
    if match := re.fullmatch(r"(\d+)([RU])", text):
        stage, kind = match.groups()
        return (Reduce if kind == "R" else Update)(int(stage))
    raise ScheduleError(f"{text!r} is not an instruction; words look like 0F2, 0B2, 0>1a2, 1<0a2, 0R or 0U")


def parse(text: str) -> Program:
    """The program that ``show`` wrote; the ``mesh 0:`` in front of a line may be left out.

    Raises:
        ScheduleError: a word is no instruction.
    """
    lines = [line.rpartition(":")[2].split() for line in text.splitlines() if line.strip()]
    return tuple(tuple(map(parse_word, words)) for words in lines)


def compute_only(program: Program) -> Program:
    """The forwards and backwards alone: the schedule without transfers and tail."""
    return tuple(tuple(step for step in row if isinstance(step, Forward | Backward)) for row in program)


def _number(microbatch: int) -> str:
    return "" if microbatch == ONCE else str(microbatch)
