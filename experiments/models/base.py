"""What a model must tell the planner; plain data, no JAX needed to read it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

PyTree = Any


@dataclass(frozen=True, slots=True)
class Model:
    """A training problem: a loss, its parameters and what a batch looks like.

    ``loss_fn(params, batch)`` returns a scalar, or ``(scalar, aux)`` when ``has_aux``.
    ``init_fn(key)`` returns the parameters, a pytree of arrays.
    ``batch_fn(batch_size)`` returns the batch as a pytree of ``jax.ShapeDtypeStruct``.
    """

    name: str
    loss_fn: Callable[[PyTree, PyTree], Any]
    init_fn: Callable[[Any], PyTree]
    batch_fn: Callable[[int], PyTree]
    has_aux: bool = False
    batch_dim: int = 0  # the dim of every batch leaf that counts samples
    loss_reduction: Literal["mean", "sum"] = "mean"  # how losses of micro-batches combine
    microbatchable: bool = True  # False where samples interact (BatchNorm, in-batch contrastive losses)
    tokens_per_sample: int = 1  # sequence length of a language model; 1 for an image
