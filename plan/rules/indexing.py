"""Gather and scatter-add, as embeddings and label look-ups use them."""

from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.plan.graph import Rule, Tensor
from meshwright.plan.rules.base import Factors


def gather(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Embedding look-up (v, h), (b, s, 1) -> (b, s, h).

    Dims of the indices are free; window dims taken whole are free; an operand dim that is looked up in may be split:
    each device answers for its part and the answers are summed.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    operand, indices = operands[0], operands[1]
    offsets = list(numbers.offset_dims)
    out_batch = [d for d in range(len(results[0].shape)) if d not in offsets]
    index_dims = list(range(len(indices.shape) - 1))  # the last dim of the indices holds the coordinates
    shared = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    factors = Factors(operands, results)
    for out, dim in zip(out_batch, index_dims, strict=True):
        operand_dim = [("in", 0, shared[dim])] if dim in shared else []
        factors.tie(("in", 1, dim), ("out", 0, out), *operand_dim)
    hidden = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = [d for d in range(len(operand.shape)) if d not in hidden]
    for out, dim in zip(offsets, window, strict=True):
        if sizes[dim] == operand.shape[dim]:
            factors.tie(("in", 0, dim), ("out", 0, out))
    for dim in numbers.collapsed_slice_dims:
        if dim in numbers.start_index_map:
            factors.tie(("in", 0, dim), contracted=True)
    return factors.rule()


def scatter_add(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """The transpose of ``gather``: (v, h), (b, s, 1), (b, s, h) -> (v, h).

    Dims of the indices are contracted (the operand counts once: it is zero in a gradient); window dims are free; a
    looked-up dim may be split, as each device keeps what falls into its part.
    """
    numbers = params["dimension_numbers"]
    operand, indices, updates = operands[0], operands[1], operands[2]
    windows = list(numbers.update_window_dims)
    update_batch = [d for d in range(len(updates.shape)) if d not in windows]
    index_dims = list(range(len(indices.shape) - 1))
    shared = dict(zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    factors = Factors(operands, results)
    for update, dim in zip(update_batch, index_dims, strict=True):
        if dim in shared:
            factors.tie(("in", 1, dim), ("in", 2, update), ("in", 0, shared[dim]), ("out", 0, shared[dim]))
        else:
            factors.tie(("in", 1, dim), ("in", 2, update), contracted=True)
    hidden = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = [d for d in range(len(operand.shape)) if d not in hidden]
    for update, dim in zip(windows, window, strict=True):
        if updates.shape[update] == operand.shape[dim]:
            factors.tie(("in", 0, dim), ("in", 2, update), ("out", 0, dim))
    for dim in numbers.inserted_window_dims:
        factors.tie(("in", 0, dim), ("out", 0, dim))
    return factors.rule()


def scatter(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Scatter that sets, or keeps the larger, smaller or product: as ``scatter_add``, but the indices stay together.

    Partial results of these are no sums, so nothing is contracted.
    """
    numbers = params["dimension_numbers"]
    operand, updates = operands[0], operands[2]
    windows = list(numbers.update_window_dims)
    update_batch = [d for d in range(len(updates.shape)) if d not in windows]
    shared = dict(zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    factors = Factors(operands, results)
    for dim, update in enumerate(update_batch):
        if dim in shared:
            factors.tie(("in", 1, dim), ("in", 2, update), ("in", 0, shared[dim]), ("out", 0, shared[dim]))
    hidden = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = [d for d in range(len(operand.shape)) if d not in hidden]
    for update, dim in zip(windows, window, strict=True):
        if updates.shape[update] == operand.shape[dim]:
            factors.tie(("in", 0, dim), ("in", 2, update), ("out", 0, dim))
    return factors.rule()


def dynamic_slice(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Dims that are taken whole are free; the starts are scalars."""
    factors = Factors(operands, results)
    for dim, size in enumerate(operands[0].shape):
        if results[0].shape[dim] == size:
            factors.tie(("in", 0, dim), ("out", 0, dim))
    return factors.rule()


def dynamic_update_slice(params: Mapping[str, Any], operands: Sequence[Tensor], results: Sequence[Tensor]) -> Rule:
    """Dims that the update covers whole are free; the starts are scalars."""
    factors = Factors(operands, results)
    for dim, size in enumerate(operands[0].shape):
        if operands[1].shape[dim] == size:
            factors.tie(("in", 0, dim), ("in", 1, dim), ("out", 0, dim))
    return factors.rule()
