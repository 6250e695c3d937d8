"""Sharding specs and what it costs to change one: the vocabulary of the intra-operator planner."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import prod

from meshwright.calibrate.hardware import Device, Link
from meshwright.plan.graph import Tensor
from meshwright.simulate.collective import CollectiveKind, collective_seconds

Axes = tuple[int, ...]  # mesh axes, by position, in rising order
Spec = tuple[Axes, ...]  # for each dim of an array, the mesh axes that split it

AXIS_NAMES = ("data", "tensor", "third")


@dataclass(frozen=True)
class LogicalMesh:
    """Devices in a box with named axes, the last axis over the fastest links; ``links[a]`` connects axis a."""

    sizes: tuple[int, ...]
    links: tuple[Link, ...]
    device: Device

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.links) or len(self.sizes) > len(AXIS_NAMES) or min(self.sizes, default=1) < 1:
            raise ValueError(f"a mesh of sizes {self.sizes} with {len(self.links)} links is not a mesh")

    @cached_property
    def devices(self) -> int:
        return prod(self.sizes)

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        return tuple(zip(AXIS_NAMES, self.sizes, strict=False))

    def size(self, axes: Axes) -> int:
        return prod(self.sizes[a] for a in axes)

    @cached_property
    def _known_seconds(self) -> dict[tuple[CollectiveKind, float, int], float]:
        return {}

    def collective_seconds(self, kind: CollectiveKind, message_bytes: float, axis: int) -> float:
        """Seconds of one collective along one axis; ``message_bytes`` as ``simulate.collective`` defines it."""
        key = (kind, message_bytes, axis)
        if key not in self._known_seconds:
            self._known_seconds[key] = collective_seconds(kind, message_bytes, self.sizes[axis], self.links[axis])
        return self._known_seconds[key]

    def all_reduce_seconds(self, local_bytes: float, axes: Axes) -> float:
        """Sum an array that every device holds in full: axis by axis."""
        return sum(self.collective_seconds("all_reduce", local_bytes, axis) for axis in axes)


def replicated(tensor: Tensor) -> Spec:
    return ((),) * len(tensor.shape)


def shards(spec: Spec, mesh: LogicalMesh) -> int:
    """Number of distinct pieces an array is cut into."""
    return prod(mesh.sizes[a] for axes in spec for a in axes)


def local_bytes(tensor: Tensor, spec: Spec, mesh: LogicalMesh) -> float:
    return tensor.bytes / shards(spec, mesh)


def divides(tensor: Tensor, spec: Spec, mesh: LogicalMesh) -> bool:
    return all(size % mesh.size(axes) == 0 for size, axes in zip(tensor.shape, spec, strict=True))


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective over mesh axes: ``elements`` of its result on one device, and the seconds it is priced at."""

    kind: CollectiveKind
    axes: Axes
    elements: float
    seconds: float


def all_reduce(tensor: Tensor, spec: Spec, axes: Axes, mesh: LogicalMesh) -> tuple[Collective, ...]:
    """The sum over ``axes`` of an array whose partial results lie in ``spec``; none where there is nothing to sum."""
    if not axes:
        return ()
    seconds = mesh.all_reduce_seconds(local_bytes(tensor, spec, mesh), axes)
    return (Collective("all_reduce", axes, tensor.elements / shards(spec, mesh), seconds),)


def reshard(tensor: Tensor, before: Spec, after: Spec, mesh: LogicalMesh) -> tuple[Collective, ...]:
    """The collectives that bring an array from one spec to another on the same mesh.

    An axis that moves to another dim is an all-to-all, one that disappears an all-gather, one that appears a slice,
    which is free. All-to-alls and slices come first: they work on the smallest pieces.
    """
    if before == after:
        return ()
    old = {axis: dim for dim, axes in enumerate(before) for axis in axes}
    new = {axis: dim for dim, axes in enumerate(after) for axis in axes}
    item_bytes = tensor.bytes / max(tensor.elements, 1)
    local = tensor.elements / shards(before, mesh)
    found = []
    for axis, dim in sorted(old.items()):
        if axis in new and new[axis] != dim:
            seconds = mesh.collective_seconds("all_to_all", local * item_bytes * mesh.sizes[axis], axis)
            found.append(Collective("all_to_all", (axis,), local, seconds))
    for axis in new:
        if axis not in old:
            local /= mesh.sizes[axis]
    for axis in sorted(old):
        if axis not in new:
            local *= mesh.sizes[axis]
            seconds = mesh.collective_seconds("all_gather", local * item_bytes, axis)
            found.append(Collective("all_gather", (axis,), local, seconds))
    return tuple(found)


def reduce_to(tensor: Tensor, before: Spec, partial: Axes, after: Spec, mesh: LogicalMesh) -> tuple[Collective, ...]:
    """The collectives that bring partial sums over ``partial``, which lie in ``before``, to their sum in ``after``.

    An axis that splits the result is summed by a reduce-scatter, the fastest first, so that slow links carry the
    smallest pieces; the others by all-reduces of what is left. Any further change is a reshard.
    """
    split = {axis: dim for dim, axes in enumerate(after) for axis in axes}
    item_bytes = tensor.bytes / max(tensor.elements, 1)
    local = tensor.elements / shards(before, mesh)
    found = []
    summed = [list(axes) for axes in before]
    for axis in sorted(set(partial) & set(split), reverse=True):
        seconds = mesh.collective_seconds("reduce_scatter", local * item_bytes, axis)
        local /= mesh.sizes[axis]
        found.append(Collective("reduce_scatter", (axis,), local, seconds))
        summed[split[axis]].append(axis)
    rest = tuple(a for a in partial if a not in split)
    if rest:
        found.append(Collective("all_reduce", rest, local, mesh.all_reduce_seconds(local * item_bytes, rest)))
    return (*found, *reshard(tensor, tuple(tuple(sorted(axes)) for axes in summed), after, mesh))


def boundary_layouts(mesh: LogicalMesh) -> tuple[Axes, ...]:
    """How values between layers may be laid out: their first dim split over a subset of the mesh axes."""
    axes = [a for a, size in enumerate(mesh.sizes) if size > 1]
    return tuple(subset for count in range(len(axes) + 1) for subset in combinations(axes, count))


def boundary_spec(tensor: Tensor, layout: Axes, parts: int) -> Spec:
    """The spec of a value between layers, ``parts`` pieces by ``layout``; whole where its first dim does not divide."""
    if tensor.shape and tensor.shape[0] % parts == 0:
        return (layout, *((),) * (len(tensor.shape) - 1))
    return replicated(tensor)


def spec_text(spec: Spec, names: Sequence[str] = AXIS_NAMES) -> str:
    """("data,-,tensor") one word a dim: the axes that split it joined by "+", or "-"."""
    return ",".join("+".join(names[a] for a in axes) or "-" for axes in spec)


def parse_spec(text: str) -> Spec:
    """The spec that ``spec_text`` wrote. Errors: ValueError on an unknown axis."""
    if not text:
        return ()
    return tuple(() if word == "-" else tuple(AXIS_NAMES.index(a) for a in word.split("+")) for word in text.split(","))
