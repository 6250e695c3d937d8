"""What the cost vector of an assignment is made of, and what training keeps per parameter."""

from dataclasses import dataclass

# Seconds of one micro-batch: forward and backward, computing and communicating; seconds once per iteration likewise;
# bytes on one device: parameters, gradients and optimizer state; activations kept per live micro-batch.
COMPONENTS = (
    "forward_compute", "forward_communication", "backward_compute", "backward_communication",
    "once_compute", "once_communication", "static_bytes", "saved_bytes",
)  # fmt: skip
FC, FM, BC, BM, OC, OM, STATIC, SAVED = range(len(COMPONENTS))


@dataclass(frozen=True, slots=True)
class Memory:
    """What training keeps per parameter element besides the parameter itself.

    Once per iteration, sums of gradients are zeroed, read, scaled and written (``reduce_bytes`` per element), and the
    optimizer's update reads and writes ``update_bytes``.
    """

    optimizer_bytes: float = 8.0  # Adam: two moments of four bytes
    update_bytes: float = 28.0  # Adam in f32: read parameter, gradient, two moments; write all but the gradient
    reduce_bytes: float = 12.0  # in f32
