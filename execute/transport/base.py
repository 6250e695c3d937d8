"""What the executor asks of a transport: tagged point-to-point messages of numpy arrays that never block the sender."""

from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from meshwright.errors import PlanError

Array = np.ndarray[Any, Any]

ALIGNMENT_BYTES = 64
"""XLA's CPU client adopts a host buffer aligned so instead of copying it (measured: 64 MiB in 2 ms, not 59 ms)."""


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised array that ``jax.device_put`` can adopt on CPU without a copy."""
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[offset : offset + size].view(dtype).reshape(shape)


@dataclass(frozen=True, slots=True, eq=False)
class Receipt:
    """A receive under way; only the transport that made it looks inside ``buffer`` and ``requests``."""

    tag: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    source_rank: int
    buffer: Array | None = None
    requests: tuple[Any, ...] = ()


class Transport(Protocol):
    """Messages between the ranks of one job. Two messages of the same tag and ranks arrive in the order of sending."""

    @property
    def tag_upper_bound(self) -> int:
        """The largest tag."""
        ...

    def send(self, tag: int, array: Array, target_rank: int) -> None:
        """Start sending; returns at once. The array must not change until ``finish``."""
        ...

    def post_receive(self, tag: int, shape: tuple[int, ...], dtype: np.dtype[Any], source_rank: int) -> Receipt:
        """Say that a message will come, the earlier the better; returns at once."""
        ...

    def wait(self, receipt: Receipt) -> Array:
        """Block until the message is here; the array may be read-only."""
        ...

    def poll(self) -> None:
        """Push outstanding sends on and let go of those that are done; cheap, and never blocks."""
        ...

    def finish(self) -> None:
        """Block until all sends are done."""
        ...


@dataclass(frozen=True, slots=True)
class TagSpace:
    """Tags for (transfer, micro-batch, tile) that fit below a transport's upper bound.

    MPI promises 32,767 tags at least, so micro-batches may have to share: they do, ``window`` apart. That is safe,
    since both ends of a transfer go through its micro-batches in the same order and equal tags do not overtake.
    """

    transfers: int
    tiles: int  # of the transfer that has most
    upper_bound: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise PlanError(
                f"{self.transfers} transfers of up to {self.tiles} messages need {self.transfers * self.tiles} tags; "
                f"this MPI has {self.upper_bound + 1}. Use smaller meshes or fewer stages."
            )

    @property
    def window(self) -> int:
        return (self.upper_bound + 1) // max(1, self.transfers * self.tiles)

    def first_tag(self, transfer: int, microbatch: int) -> int:
        """The tag of a transfer's first tile; the others follow. Micro-batch -1 is "once per iteration"."""
        if not (0 <= transfer < self.transfers and microbatch >= -1):
            raise ValueError(f"transfer {transfer} of {self.transfers}, micro-batch {microbatch}")
        return ((microbatch + 1) % self.window * self.transfers + transfer) * self.tiles
