"""The program: for each mesh, the list of instructions that the simulator times and the executor runs.

One row per mesh. A row runs in order. ``Send`` never blocks the row; ``Receive`` waits until the matching ``Send``
has arrived. A transfer is named by (source stage, target stage, what, micro-batch), so the two halves match by value.
"""

from dataclasses import dataclass
from typing import Literal

Payload = Literal["activation", "cotangent", "gradient", "parameter"]


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
