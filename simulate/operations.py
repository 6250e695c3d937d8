"""What a device is asked to do, kernel by kernel: the input of the cost models and of the simulation of one stage.

Sizes are those of one device, after sharding. What XLA fuses into one kernel is one ``Pointwise``.
"""

from dataclasses import dataclass, fields
from math import isfinite

from meshwright.errors import ScheduleError
from meshwright.simulate.collective import CollectiveKind


class _Checked:
    """Numbers of a kernel are finite and not negative; counts are at least 1."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            number = getattr(self, item.name)
            if isinstance(number, bool | str | tuple):
                continue
            least = 1 if isinstance(number, int) and not item.name.endswith(("bytes", "flops")) else 0
            if not (isfinite(number) and number >= least):
                raise ScheduleError(f"{item.name} of a {type(self).__name__} is {number}; at least {least} is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Matmul(_Checked):
    """``batch`` products of an m × k with a k × n matrix."""

    m: int
    n: int
    k: int
    dtype: str
    batch: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(_Checked):
    """Softmax(Q Kᵀ) V; ``fused`` keeps the scores on the chip (FlashAttention), unfused writes and reads them."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str
    causal: bool = True
    fused: bool = True
    backward: bool = False

    @property
    def flops(self) -> float:
        """Arithmetic without recomputation; a causal kernel skips half, and the backward has 5 products for 2.

        Source: Dao, FlashAttention-2, 2023, section 4.1 (backward = 2.5 forwards).
        """
        whole = 4.0 * self.batch * self.heads * self.queries * self.keys * self.head_dim
        return (
            whole
            * (0.5 if self.causal and self.fused else 1.0)
            * (2.5 if self.backward and self.fused else 1.0)
            * (2.0 if self.backward and not self.fused else 1.0)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution(_Checked):
    """A 2-D convolution; ``height`` and ``width`` are those of the result."""

    batch: int
    height: int
    width: int
    channels_in: int
    channels_out: int
    kernel: tuple[int, int]
    dtype: str

    @property
    def flops(self) -> float:
        window = self.kernel[0] * self.kernel[1] * self.channels_in
        return 2.0 * self.batch * self.height * self.width * self.channels_out * window


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointwise(_Checked):
    """One fusion bound by memory: ``bytes`` read and written together."""

    bytes: float
    flops: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding(_Checked):
    """Rows gathered from a table, or with ``backward`` their gradients added into it."""

    tokens: int
    hidden: int
    dtype: str
    backward: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy(_Checked):
    """Softmax cross-entropy over logits already computed; logits are read in ``dtype``, sums are f32."""

    tokens: int
    vocabulary: int
    dtype: str
    backward: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerStep(_Checked):
    """An elementwise update: all states and gradients read, states and weights written, once."""

    parameters: int
    bytes_per_parameter: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective(_Checked):
    """A collective of ``ranks`` devices along a mesh axis; ``message_bytes`` as in ``collective_seconds``."""

    kind: CollectiveKind
    message_bytes: float
    ranks: int
    axis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy(_Checked):
    """Bytes between the device and its host (offloading)."""

    bytes: float
    to_host: bool


Compute = Matmul | Attention | Convolution | Pointwise | Embedding | CrossEntropy | OptimizerStep
Kernel = Compute | Collective | Copy


@dataclass(frozen=True, slots=True)
class Operation:
    """One kernel in a stage's program.

    ``needs`` are the positions of earlier operations whose results it reads; None is the one right before it.
    """

    name: str
    kernel: Kernel
    needs: tuple[int, ...] | None = None
