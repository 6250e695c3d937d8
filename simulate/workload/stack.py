"""The software that runs a step, as data: what it costs per operation, what it fuses, what it overlaps."""

from dataclasses import dataclass, fields
from math import isfinite

from meshwright.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A framework's habits.

    ``operation_seconds`` of its host precede each kernel and ``program_seconds`` each instruction of the pipeline
    (None: the device's ``dispatch_seconds``); hosts run ahead of devices. ``fused_pointwise``: bias, dropout and
    residual are one kernel, bias and activation another, rotary embedding of queries and keys a third.
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
    fused_pointwise: bool = True
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


EAGER_SECONDS = 60e-6  # of host time per operation; see the source of the stacks that use it
EAGER_SOURCE = (
    "60 µs of host time per operation: the floor that brought a roofline model nearest to 200 of vTrain's measured "
    "single-node steps (Megatron-DeepSpeed on A100), so not independent of that source"
)

STACKS: dict[str, Stack] = {
    stack.name: stack
    for stack in (
        Stack(
            name="megatron-2021",
            source=f"Narayanan et al., SC 2021, sections 4.1 (scatter/gather) and 4.2 (fusions); {EAGER_SOURCE}",
            operation_seconds=EAGER_SECONDS,
            program_seconds=0.0,
            fused_accumulation=False,
            spread_transfers=True,
            gradient_bytes=2,
            sent_gradient_bytes=2,
        ),
        Stack(
            name="megatron-deepspeed",
            source=f"DeepSpeed's pipeline engine over Megatron-LM's layers, fp16 gradients; {EAGER_SOURCE}",
            operation_seconds=EAGER_SECONDS,
            program_seconds=0.0,
            fused_accumulation=False,
            gradient_bytes=2,
            sent_gradient_bytes=2,
        ),
        Stack(
            name="megatron-core",
            source=f"Megatron-LM's arguments from 2022 on: overlapped, f32 gradients, fused sums; {EAGER_SOURCE}",
            operation_seconds=EAGER_SECONDS,
            program_seconds=0.0,
            overlapped_tensor=True,
            overlapped_gradients=True,
        ),
        Stack(
            name="fsdp",
            source=f"PyTorch FSDP (Zhao et al., VLDB 2023), bf16 gradients reduced as they come; {EAGER_SOURCE}",
            operation_seconds=EAGER_SECONDS,
            program_seconds=0.0,
            fused_pointwise=False,
            fused_accumulation=False,
            overlapped_gradients=True,
            gradient_bytes=4,
            sent_gradient_bytes=2,
        ),
        Stack(
            name="compiled",
            source="XLA programs: one dispatch a program, fusions, collectives scheduled beside computation",
            overlapped_tensor=True,
            overlapped_gradients=True,
        ),
    )
}


def find_stack(name: str) -> Stack:
    """The shipped stack of this name.

    Raises:
        ModelError: there is none; the message lists those that exist.
    """
    if name not in STACKS:
        raise ModelError(f"software stack {name!r} is unknown; known are {', '.join(STACKS)}")
    return STACKS[name]
