"""A parameter of the planned graph is one of the user's leaves, or one layer's row of a leaf that stacks layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of the user's parameter leaf ``leaf``: all of it, or index ``row`` along ``dim``, without that dim."""

    leaf: int
    row: int | None = None
    dim: int = 0

    def of(self, leaves: Sequence[Any] | Mapping[int, Any]) -> Any:
        """The part, from the user's leaves; NumPy and JAX arrays alike."""
        array = leaves[self.leaf]
        return array if self.row is None else array[(slice(None),) * self.dim + (self.row,)]


def join_parts(parts: Sequence[Part], arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """The user's leaves again, from one host array for each part, in the order of ``parts``."""
    joined: list[np.ndarray[Any, Any]] = []
    for leaf in range(1 + max((part.leaf for part in parts), default=-1)):
        own = [(part, array) for part, array in zip(parts, arrays, strict=True) if part.leaf == leaf]
        first, array = own[0]
        joined.append(array if first.row is None else np.stack([a for _, a in own], axis=first.dim))
    return joined
