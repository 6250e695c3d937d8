"""ZeRO as strategies: a trained parameter may be kept more finely split than it is read.

Level 1 splits the optimizer's state and the update: at the iteration's end the gradient is reduce-scattered to that
split and the new parameter gathered, the bytes of the all-reduce that they replace. Level 2 splits the accumulated
gradient as well; an accumulator that is split cannot take partial sums, so every micro-batch reduce-scatters its
gradient. Level 3 splits the parameter itself, which every micro-batch gathers forward, and once more if its backward
half reads it.
Source: Rajbhandari et al., ZeRO, SC 2020, sections 5 and 7; FSDP: Zhao et al., VLDB 2023, section 3.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from meshwright.plan.components import BM, FM, OM
from meshwright.plan.graph import Tensor
from meshwright.plan.sharding import Axes, Collective, LogicalMesh, Spec, local_bytes, reduce_to, reshard

LEVELS = (0, 1, 2, 3)
# Further prices of memory at which layers are sharded, beside ``candidates.MEMORY_PRICES``: each level saves as many
# bytes as the one before for two to three times the traffic, so its price is that much higher. The last is for what
# fits in no other way.
ZERO_PRICES = (1.0, 100.0)
AUTO = LEVELS[-1]  # the highest level that is offered if the search may choose

Charge = tuple[int, Tensor, tuple[Collective, ...]]  # component of the cost vector, what is moved, and how


@dataclass(frozen=True, slots=True)
class Stored:
    """One way to keep a parameter: it is read in ``read``; what ``level`` covers is kept in ``kept``."""

    level: int
    read: Spec
    kept: Spec

    @property
    def parameter(self) -> Spec:
        """How the parameter itself is kept."""
        return self.kept if self.level >= 3 else self.read

    def gradient(self, made: Spec) -> Spec:
        """How the accumulated gradient is kept, if it is made in ``made``."""
        return self.kept if self.level >= 2 else made


@dataclass(frozen=True, slots=True)
class Storage:
    """A trained parameter whose storage is chosen at ``node``, whose strategies are ``options``.

    ``read_again``: the backward half reads the parameter too. ``gradient_node``: where the gradient's spec is decided.
    """

    parameter: int
    gradient: int
    node: int
    options: tuple[Stored, ...]
    read_again: bool
    gradient_node: int


def stored_ways(tensor: Tensor, reads: Iterable[Spec], mesh: LogicalMesh, highest: int) -> tuple[Stored, ...]:
    """All ways to keep a parameter that is read in one of ``reads``, the plain one of each first.

    A finer split is over some of the axes along which the parameter is whole. Splits that do not divide are left out.
    """
    found = []
    for read in dict.fromkeys(reads):
        found.append(Stored(0, read, read))
        used = {a for axes in read for a in axes}
        free = [a for a, size in enumerate(mesh.sizes) if size > 1 and a not in used]
        for count in range(1, len(free) + 1):
            for axes in combinations(free, count):
                kept = finer(tensor, read, axes, mesh)
                if kept is not None:
                    found += [Stored(level, read, kept) for level in range(1, highest + 1)]
    return tuple(found)


def finer(tensor: Tensor, spec: Spec, axes: Axes, mesh: LogicalMesh) -> Spec | None:
    """The spec with each of ``axes`` also splitting a dim, whole dims first; None where none divides."""
    dims = [tuple(axes_of_dim) for axes_of_dim in spec]
    for axis in axes:
        order = sorted(range(len(dims)), key=lambda d: (len(dims[d]), d))
        fitting = [d for d in order if tensor.shape[d] % mesh.size((*dims[d], axis)) == 0]
        if not fitting:
            return None
        dims[fitting[0]] = tuple(sorted((*dims[fitting[0]], axis)))
    return tuple(dims)


def gathers(way: Stored, tensor: Tensor, mesh: LogicalMesh, read_again: bool) -> tuple[Charge, ...]:
    """What bringing the parameter from where it is kept to where it is read costs."""
    if way.level == 0 or way.kept == way.read:
        return ()
    collectives = reshard(tensor, way.kept, way.read, mesh)
    when = (OM,) if way.level < 3 else (FM, BM) if read_again else (FM,)
    return tuple((component, tensor, collectives) for component in when)


def reductions(
    way: Stored, tensor: Tensor, made: Spec, summed: Sequence[Collective], partial: Axes, mesh: LogicalMesh
) -> tuple[Charge, ...]:
    """What bringing the gradient from where it is made to where it is kept, or used, costs.

    Args:
        tensor: the gradient, of the dtype in which it is summed.
        made: its spec as the backward pass leaves it, a partial sum over ``partial``.
        summed: the all-reduces that make it whole if nothing is split further.
    """
    if way.level == 0:
        return ((OM, tensor, tuple(summed)), (OM, tensor, reshard(tensor, made, way.read, mesh)))
    return ((OM if way.level == 1 else BM, tensor, reduce_to(tensor, made, partial, way.kept, mesh)),)


def momentary_bytes(way: Stored, parameter: Tensor, gradient: Tensor, made: Spec, mesh: LogicalMesh) -> float:
    """Bytes that live only while the layer runs: the gathered parameter, the gradient before it is scattered."""
    gathered = local_bytes(parameter, way.read, mesh) if way.level >= 3 else 0.0
    whole = local_bytes(gradient, made, mesh) if way.level >= 2 else 0.0
    return gathered + whole
