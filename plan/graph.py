"""Operators and tensors of one layer, forward and backward together: plain data, no JAX.

A *layer graph* is what the sharding ILP works on. Values are numbered; every operator names the values it reads and
writes and carries a *factor rule* (``meshwright.plan.rules``): which of its dims may be split together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

_ITEM_BYTES: Mapping[str, int] = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8, "uint64": 8,
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip
_FLOATS = frozenset({"bfloat16", "float16", "float32", "float64"})

Phase = Literal["forward", "backward"]
Kind = Literal["matmul", "conv", "memory"]
Dims = tuple[int, ...]  # a factor for each dim of an array; -1 where the dim cannot be split
UNSPLIT = -1


@dataclass(frozen=True, slots=True)
class Tensor:
    """Shape and dtype of a value."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        # Extended dtypes (rng keys) and sub-byte types are rare and small: four bytes is close enough.
        return self.elements * _ITEM_BYTES.get(self.dtype, 4)

    @property
    def is_float(self) -> bool:
        return self.dtype in _FLOATS or self.dtype.startswith("float")


@dataclass(frozen=True, slots=True)
class Rule:
    """How an operator may be split, written as an einsum writes it.

    ``operands`` and ``results`` give a factor for each dim; ``sizes`` the size of each factor. A mesh axis given to a
    factor splits every dim that carries it. Splitting a factor in ``contracted`` leaves a partial result on each
    device, so an all-reduce over that axis follows.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    sizes: tuple[int, ...]
    contracted: frozenset[int] = frozenset()
    linear: bool = True  # partial results are sums: a gradient may stay partial until the end of the iteration
    known: bool = True  # False: no rule for this primitive, it runs replicated and is reported


@dataclass(frozen=True, slots=True)
class Operator:
    """One equation. ``flops`` counts the whole operator, before any split; ``kind`` selects its cost model."""

    primitive: str
    inputs: tuple[int, ...]  # values; literals are left out, and so are their rows in ``rule.operands``
    outputs: tuple[int, ...]
    rule: Rule
    kind: Kind
    flops: float
    phase: Phase

    @property
    def heavy(self) -> bool:
        return self.kind != "memory"


@dataclass(frozen=True, slots=True)
class LayerGraph:
    """One layer, forward then backward, over values ``0 .. len(tensors) - 1``.

    entries: values that come from earlier layers; exits: values that later layers (or the user) read.
    entry_cotangents[i] belongs to entries[i] (-1: it has none), likewise exit_cotangents, and gradients[i] to
    parameters[i].
    residuals: forward values kept for the backward pass; entries, batch and parameters are not among them.
    """

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    parameters: tuple[int, ...]
    batch: tuple[int, ...]
    entries: tuple[int, ...]
    exits: tuple[int, ...]
    entry_cotangents: tuple[int, ...]
    exit_cotangents: tuple[int, ...]
    gradients: tuple[int, ...]
    residuals: tuple[int, ...]
    kept_entries: tuple[int, ...]  # entries that the backward pass reads again

    def producer(self) -> dict[int, int]:
        """Value -> index of the operator that writes it."""
        return {out: index for index, op in enumerate(self.operators) for out in op.outputs}


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of the parameters or of the batch, named by its path in the pytree."""

    name: str
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class LayerUse:
    """One layer of the model: its class and what its values are called model-wide.

    entries/exits: model-wide value numbers; parameters/batch: leaf indices.
    """

    layer_class: int
    entries: tuple[int, ...]
    exits: tuple[int, ...]
    parameters: tuple[int, ...]
    batch: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """The whole training step of one micro-batch as a chain of layers, equal layers sharing one class."""

    name: str
    classes: tuple[LayerGraph, ...]
    layers: tuple[LayerUse, ...]
    parameters: tuple[Leaf, ...]
    batch: tuple[Leaf, ...]
    values: tuple[Tensor, ...]  # the model-wide values that cross layers
    loss: int
    aux: tuple[int, ...]
    microbatch_size: int
    samples: int  # per optimizer step, over all micro-batches
    tokens_per_sample: int
    fingerprint: str  # of the traced program; a plan holds only for the same one
    unknown: tuple[tuple[str, int], ...]  # primitives without a rule and how often
    notes: tuple[str, ...] = ()  # what the user should know about how the model was read

    @property
    def parameter_count(self) -> int:
        return sum(leaf.tensor.elements for leaf in self.parameters)

    def training_bytes(self, optimizer_bytes: float) -> float:
        """What training keeps however it is split: weights once, and gradient and optimizer state of those trained.

        Args:
            optimizer_bytes: optimizer state per parameter element.
        """
        uses = [(use.parameters, self.classes[use.layer_class].gradients) for use in self.layers]
        trained = {leaf for leaves, grads in uses for leaf, grad in zip(leaves, grads, strict=True) if grad >= 0}
        weights = sum(leaf.tensor.bytes for leaf in self.parameters)
        tensors = [self.parameters[leaf].tensor for leaf in sorted(trained)]
        return float(weights + sum(t.bytes + optimizer_bytes * t.elements for t in tensors))

    @property
    def model_flops(self) -> float:
        """Matmul and convolution FLOPs of one micro-batch, forward and backward, nothing counted twice."""
        per_class = [sum(op.flops for op in graph.operators if op.heavy) for graph in self.classes]
        return float(sum(per_class[use.layer_class] for use in self.layers))

    def owner_of_value(self) -> dict[int, int]:
        """Model-wide value -> the layer that writes it."""
        return {value: index for index, use in enumerate(self.layers) for value in use.exits}
