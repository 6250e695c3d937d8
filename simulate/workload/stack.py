"""The software that runs a step, as data: what it costs per operation, what it fuses, what it overlaps.

``stacks.json`` holds what is shipped. A stack's habits are read in its source; its constants (at most three for each
system that it was measured on) are fitted to published training steps by ``experiments.fit_stacks``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from math import exp, isfinite, log
from pathlib import Path
from statistics import mean

import msgspec

from meshwright.calibrate.quantity import Quantity, Record
from meshwright.errors import ModelError

SHIPPED = Path(__file__).with_name("stacks.json")
FORMAT, VERSION = "meshwright-stacks", 1
FACTORS = ("kernel_factor", "communication_factor", "network_factor", "mixed_factor")
CONSTANTS = (*FACTORS, "operation_seconds", "overhead_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A framework's habits and constants.

    ``operation_seconds`` of its host precede each kernel and ``program_seconds`` each instruction of the pipeline
    (None: the device's ``dispatch_seconds``); hosts run ahead of devices. The factors are how much longer something
    takes in a training step than in the benchmarks of the machine file (clocks sink under a power limit, ranks wait
    for each other): ``kernel_factor`` kernels, ``communication_factor`` messages inside a host, ``network_factor``
    messages among devices of different hosts, ``mixed_factor`` collectives among several devices of each of several
    hosts, whose rings may use one network card where benchmarks use all.
    ``overhead_bytes`` of each device are held beside tensors: the driver's context, communicators, an allocator's rest.

    ``fused_pointwise``: bias, dropout and residual are one kernel, bias and activation another, rotary embedding of
    queries and keys a third. ``fused_softmax``: scale, mask and softmax of unfused attention are one kernel.
    ``fused_loss``: maximum, exponential, sum and quotient of the softmax over the vocabulary are one kernel.
    ``fused_accumulation``: a weight gradient is added to the sum of earlier micro-batches inside its matmul.
    ``overlapped_tensor``: tensor-parallel collectives of the backward run beside the weight gradients.
    ``overlapped_gradients``: gradients are summed while the last backward runs. ``spread_transfers``: tensor-parallel
    ranks send each a part of a boundary activation and gather it after. ``clipped``: gradients are clipped by their
    global norm.

    Bytes are those of one weight: of its gradient while it is summed over micro-batches, of the gradient as it is
    sent, and of the optimizer's own numbers (an f32 master weight and two moments).
    """

    name: str
    source: str
    operation_seconds: float = 0.0
    program_seconds: float | None = None
    kernel_factor: float = 1.0
    communication_factor: float = 1.0
    network_factor: float = 1.0
    mixed_factor: float = 1.0
    overhead_bytes: float = 0.0
    fused_pointwise: bool = True
    fused_softmax: bool = True
    fused_loss: bool = True
    fused_accumulation: bool = True
    overlapped_tensor: bool = False
    overlapped_gradients: bool = False
    spread_transfers: bool = False
    clipped: bool = True
    gradient_bytes: int = 4
    sent_gradient_bytes: int = 4
    optimizer_bytes: int = 12

    def __post_init__(self) -> None:
        for item in fields(self):
            number = getattr(self, item.name)
            if isinstance(number, bool | str) or number is None:
                continue
            if not (isfinite(number) and number >= 0):
                raise ModelError(f"{item.name} of stack {self.name!r} is {number}; a number of at least 0 is needed")


AS_MEASURED = Stack(name="as measured", source="kernels and messages take what they take in benchmarks")


class Habits(Record, frozen=True, kw_only=True):
    """What the framework's code does; the fields of ``Stack`` with the same names."""

    program_seconds: float | None = None
    fused_pointwise: bool = True
    fused_softmax: bool = True
    fused_loss: bool = True
    fused_accumulation: bool = True
    overlapped_tensor: bool = False
    overlapped_gradients: bool = False
    spread_transfers: bool = False
    clipped: bool = True
    gradient_bytes: int = 4
    sent_gradient_bytes: int = 4
    optimizer_bytes: int = 12


class Constants(Record, frozen=True, kw_only=True):
    """What was fitted to steps measured on one system; None leaves the stack's own."""

    kernel_factor: Quantity | None = None
    communication_factor: Quantity | None = None
    network_factor: Quantity | None = None
    mixed_factor: Quantity | None = None
    operation_seconds: Quantity | None = None
    overhead_bytes: Quantity | None = None

    def values(self) -> dict[str, float]:
        """The numbers that are known."""
        quantities = {name: getattr(self, name) for name in CONSTANTS}
        return {name: quantity.value for name, quantity in quantities.items() if quantity is not None}


class ShippedStack(Record, frozen=True, kw_only=True):
    """A stack as the file has it; ``systems`` are those that its constants were fitted on."""

    source: str
    habits: Habits
    operation_seconds: Quantity | None = None
    systems: dict[str, Constants] = msgspec.field(default_factory=dict)


class StacksFile(Record, frozen=True, kw_only=True):
    """The text form of all stacks."""

    format: str
    version: int
    stacks: dict[str, ShippedStack]


def find_stack(name: str, system: str | None = None) -> Stack:
    """The shipped stack of this name, with the constants of a system that it was measured on.

    Without a system, or on one that is not known, each factor is the geometric mean of those of all known systems:
    what to expect of a cluster that nobody has measured. Overheads of memory are not taken over.

    Raises:
        ModelError: there is no such stack; the message lists those that exist.
    """
    known = shipped_stacks()
    if name not in known:
        raise ModelError(f"software stack {name!r} is unknown; known are {', '.join(known)}")
    shipped = known[name]
    stack = Stack(name=name, source=shipped.source, **msgspec.structs.asdict(shipped.habits))
    if shipped.operation_seconds is not None:
        stack = replace(stack, operation_seconds=shipped.operation_seconds.value)
    if system in shipped.systems:
        return with_constants(stack, shipped.systems[system].values())
    return with_constants(stack, _usual(tuple(shipped.systems.values())))


def with_constants(stack: Stack, constants: Mapping[str, float]) -> Stack:
    """The stack with other constants (names of ``CONSTANTS``)."""
    return replace(stack, **constants)  # type: ignore[arg-type]


def _usual(systems: tuple[Constants, ...]) -> dict[str, float]:
    found = {}
    for name in FACTORS:
        known = [constants.values()[name] for constants in systems if name in constants.values()]
        if known:
            found[name] = exp(mean(log(value) for value in known))
    return found


@cache
def shipped_stacks() -> dict[str, ShippedStack]:
    """All stacks of ``stacks.json`` by name."""
    return msgspec.json.decode(SHIPPED.read_bytes(), type=StacksFile).stacks
