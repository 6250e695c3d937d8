"""The program: for each mesh, the list of instructions that the simulator times and the executor runs.

One row per mesh. A row runs in order. ``Send`` never blocks the row; ``Receive`` waits until the matching ``Send``
has arrived. A transfer is named by (source stage, target stage, what, micro-batch), so the two halves match by value.

The text form is one word an instruction, made for eyes: ``0F2`` is the forward of micro-batch 2 on stage 0, ``0B2``
its backward (``0I2`` and ``0W2`` its halves, the gradients of the input and of the weights, where it is split),
``0>1a2`` its activation on the way to stage 1 and ``1<0a2`` the wait for it there (``c`` for a cotangent, ``g`` for a
tied weight's gradient, ``p`` for its parameter, ``s`` for a partial sum of squared gradients, ``n`` for their norm),
``0R`` the reduction, ``0U`` the update and ``0G`` the gathering of updated parameters.
"""

import re
from dataclasses import dataclass
from typing import Literal

from meshwright.errors import ScheduleError

Payload = Literal["activation", "cotangent", "gradient", "parameter", "square", "norm"]
PAYLOADS: dict[str, Payload] = {
    "a": "activation",
    "c": "cotangent",
    "g": "gradient",
    "p": "parameter",
    "s": "square",
    "n": "norm",
}
MOST = 2**31 - 2
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
class BackwardInput:
    """The input-gradient half of a backward: what earlier stages wait for. A recomputed forward is charged here."""

    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class BackwardWeight:
    """The weight-gradient half of a backward: nobody waits for it before the reduction."""

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


@dataclass(frozen=True, slots=True)
class Gather:
    """Bring the updated parameters of a stage, of which each device has updated a share, back to all of them."""

    stage: int


Compute = Forward | Backward | BackwardInput | BackwardWeight
Instruction = Compute | Send | Receive | Reduce | Update | Gather
Program = tuple[tuple[Instruction, ...], ...]


LETTERS: dict[type[Compute], str] = {Forward: "F", Backward: "B", BackwardInput: "I", BackwardWeight: "W"}
COMPUTES: dict[str, type[Compute]] = {letter: kind for kind, letter in LETTERS.items()}
ONCE_LETTERS: dict[type[Reduce | Update | Gather], str] = {Reduce: "R", Update: "U", Gather: "G"}
ONCE_KINDS: dict[str, type[Reduce | Update | Gather]] = {letter: kind for kind, letter in ONCE_LETTERS.items()}


def makers(send: Send) -> tuple[Instruction, ...]:
    """The instructions one of which makes what is sent: a cotangent comes from a whole backward or its first half."""
    match send.what:
        case "activation":
            return (Forward(send.stage, send.microbatch),)
        case "cotangent":
            return Backward(send.stage, send.microbatch), BackwardInput(send.stage, send.microbatch)
        case "gradient" | "square" | "norm":
            return (Reduce(send.stage),)
        case "parameter":
            return (Update(send.stage),)


def word(instruction: Instruction) -> str:
    """One instruction as a word without spaces; ``parse_word`` is the inverse."""
    match instruction:
        case Send(stage, target, what, microbatch):
            return f"{stage}>{target}{what[0]}{_number(microbatch)}"
        case Receive(stage, source, what, microbatch):
            return f"{stage}<{source}{what[0]}{_number(microbatch)}"
        case Reduce() | Update() | Gather():
            return f"{instruction.stage}{ONCE_LETTERS[type(instruction)]}"
        case _:
            return f"{instruction.stage}{LETTERS[type(instruction)]}{instruction.microbatch}"


def show(program: Program) -> str:
    """The whole program as text, one line a mesh; ``parse`` is the inverse."""
    return "\n".join(f"mesh {r}: " + " ".join(map(word, row)) for r, row in enumerate(program))


def parse_word(text: str) -> Instruction:
    """The instruction that a word means.

    Raises:
        ScheduleError: the text is no word of a program.
    """
    if match := re.fullmatch(r"([0-9]+)([FBIW])([0-9]+)", text):
        stage, kind, microbatch = match.groups()
        return COMPUTES[kind](_count(stage), _count(microbatch))
    if match := re.fullmatch(r"([0-9]+)([<>])([0-9]+)([acgpsn])([0-9]*)", text):
        stage, way, other, letter, microbatch = match.groups()
        make = Send if way == ">" else Receive
        number = _count(microbatch) if microbatch else ONCE
        return make(_count(stage), _count(other), PAYLOADS[letter], number)
    if match := re.fullmatch(r"([0-9]+)([RUG])", text):
        stage, kind = match.groups()
        return ONCE_KINDS[kind](_count(stage))
    raise ScheduleError(
        f"{text!r} is not an instruction; words look like 0F2, 0B2, 0I2, 0W2, 0>1a2, 1<0a2, 0R, 0U or 0G"
    )


def parse(text: str) -> Program:
    """The program that ``show`` wrote; the ``mesh 0:`` in front of a line may be left out.

    Raises:
        ScheduleError: a word is no instruction, or a label is not the number of its line.
    """
    lines = [line.rpartition(":") for line in text.splitlines() if line.strip()]
    for number, (label, colon, _) in enumerate(lines):
        if colon and label.split() != ["mesh", str(number)]:
            raise ScheduleError(f"line {number + 1} begins with {label.strip()!r}: it is mesh {number}")
    return tuple(tuple(map(parse_word, words.split())) for _, _, words in lines)


def compute_only(program: Program) -> Program:
    """The forwards and backwards alone: the schedule without transfers and tail."""
    return tuple(tuple(step for step in row if isinstance(step, Compute)) for row in program)


def _count(digits: str) -> int:
    """A number of a stage or micro-batch; programs are stored in 32 bits."""
    if len(digits) > len(str(MOST)) or int(digits) > MOST:
        raise ScheduleError(f"{digits} is too large a number; stages and micro-batches end at {MOST:,}")
    return int(digits)


def _number(microbatch: int) -> str:
    return "" if microbatch == ONCE else str(microbatch)
