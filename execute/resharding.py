"""Cross-mesh transfers as data: which device sends which box of an array to which device.

Index algebra alone: nothing here moves a byte or imports JAX. ``execute/exchange.py`` carries a transfer out.
The rule is "tiles that intersect", as in Alpa (Zheng et al., OSDI 2022, section 6): each box that a target device needs
is the disjoint union of its intersections with the distinct source boxes, and each of those comes from one replica.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import ml_dtypes
import numpy as np

from meshwright.errors import PlanError

Box = tuple[tuple[int, int], ...]
"""(start, stop) for each dim; a scalar's box is ``()``."""


def box_elements(box: Box) -> int:
    return prod(stop - start for start, stop in box)


def dtype_of(name: str) -> np.dtype[np.generic]:
    """The numpy dtype of a name, with the small floats that numpy itself does not know (``bfloat16``)."""
    return np.dtype(getattr(ml_dtypes, name, name))


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Which device holds which box of one array; devices with the same box are replicas.

    The distinct boxes tile the array: they do not overlap and leave nothing out.
    """

    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[tuple[int, Box], ...]  # (device, its box)

    def __post_init__(self) -> None:
        dtype_of(self.dtype)
        devices = [device for device, _ in self.boxes]
        if len(set(devices)) < len(devices):
            raise PlanError(f"a layout of shape {self.shape} names a device twice: {devices}")
        for device, box in self.boxes:
            inside = len(box) == len(self.shape) and all(
                0 <= start <= stop <= size for (start, stop), size in zip(box, self.shape, strict=True)
            )
            if not inside:
                raise PlanError(f"the box {box} of device {device} lies outside the shape {self.shape}")
        distinct = list(dict.fromkeys(box for _, box in self.boxes))
        held = sum(map(box_elements, distinct))
        if held != prod(self.shape) or _overlaps(distinct):
            raise PlanError(
                f"the boxes of a layout must tile the shape {self.shape}, each element once: "
                f"{len(distinct)} distinct boxes hold {held} of {prod(self.shape)} elements"
            )

    @property
    def item_bytes(self) -> int:
        return dtype_of(self.dtype).itemsize

    @property
    def devices(self) -> tuple[int, ...]:
        return tuple(device for device, _ in self.boxes)

    def box_of(self, device: int) -> Box:
        return next(box for holder, box in self.boxes if holder == device)


def layout_of(
    shape: tuple[int, ...],
    dtype: str,
    spec: tuple[tuple[str, ...], ...],
    mesh_axes: tuple[tuple[str, int], ...],
    devices: tuple[int, ...],
) -> TensorLayout:
    """The layout that ``jax.sharding.NamedSharding`` gives an array.

    Args:
        spec: for each dim the mesh axes that split it, the slowest-varying first; missing dims at the end are whole.
        mesh_axes: the (name, size) of the mesh's axes.
        devices: the mesh's devices, row-major, as in ``np.array(devices).reshape(sizes)``.
    """
    sizes = dict(mesh_axes)
    used = [axis for axes in spec for axis in axes]
    if prod(sizes.values()) != len(devices):
        raise PlanError(f"a mesh of axes {dict(sizes)} needs {prod(sizes.values())} devices, not {len(devices)}")
    if unknown := [axis for axis in used if axis not in sizes]:
        raise PlanError(f"the spec {spec} names the axes {unknown}; the mesh has {list(sizes)}")
    if len(set(used)) < len(used) or len(spec) > len(shape):
        raise PlanError(f"the spec {spec} does not fit the shape {shape}: an axis splits one dim, a dim has one entry")
    whole = (*spec, *((),) * (len(shape) - len(spec)))
    parts = [prod(sizes[axis] for axis in axes) for axes in whole]
    for dim, (size, count, axes) in enumerate(zip(shape, parts, whole, strict=True)):
        if size % count:
            raise PlanError(
                f"dim {dim} of the shape {shape} has size {size}, which the axes {axes} split by {count}: "
                f"{size % count} left over. Use a size that is a multiple of {count}."
            )

    def box_at(position: dict[str, int]) -> Box:
        def interval(size: int, count: int, axes: tuple[str, ...]) -> tuple[int, int]:
            part = 0
            for axis in axes:
                part = part * sizes[axis] + position[axis]
            return part * (size // count), (part + 1) * (size // count)

        return tuple(map(interval, shape, parts, whole))

    positions = product(*(range(size) for size in sizes.values()))
    boxes = tuple(
        (device, box_at(dict(zip(sizes, position, strict=True))))
        for device, position in zip(devices, positions, strict=True)
    )
    return TensorLayout(shape, dtype, boxes)


@dataclass(frozen=True, slots=True)
class Message:
    """One box of an array, in global indices, from one device to another."""

    source: int
    target: int
    box: Box


@dataclass(frozen=True, slots=True)
class Transfer:
    """All that must move so that an array laid out as ``source`` becomes one laid out as ``target``.

    A process that is sent the same box for two of its devices is sent it twice: ``repeated_bytes`` says how much a
    local broadcast would save.
    """

    source: TensorLayout
    target: TensorLayout
    ranks: tuple[int, ...]  # device -> rank of the process that drives it
    copies: tuple[Message, ...]  # boxes that a target device already holds (source == target)
    messages: tuple[Message, ...]  # boxes that change device, in the order both sides agree on

    @property
    def tiles(self) -> tuple[Message, ...]:
        """Copies and messages: together they cover the box of each target device exactly once."""
        return self.copies + self.messages

    def bytes_of(self, message: Message) -> int:
        return box_elements(message.box) * self.source.item_bytes

    @property
    def bytes_between_ranks(self) -> dict[tuple[int, int], int]:
        """Bytes from rank to other rank; what stays within a rank is not counted."""
        counted: dict[tuple[int, int], int] = defaultdict(int)
        for message in self._between_ranks():
            counted[self.ranks[message.source], self.ranks[message.target]] += self.bytes_of(message)
        return dict(sorted(counted.items()))

    @property
    def repeated_bytes(self) -> int:
        """Bytes that reach a rank which has been sent the very same box already."""
        arrivals = [(self.ranks[message.target], message.box) for message in self._between_ranks()]
        sent = sum(box_elements(box) for _, box in arrivals)
        return (sent - sum(box_elements(box) for _, box in set(arrivals))) * self.source.item_bytes

    def _between_ranks(self) -> Iterator[Message]:
        return (m for m in self.messages if self.ranks[m.source] != self.ranks[m.target])


def plan_transfer(
    source: TensorLayout,
    target: TensorLayout,
    ranks: Sequence[int],
    sent_bytes: Mapping[int, int] | None = None,
) -> Transfer:
    """Choose a sender for every box that a target device needs.

    The device itself comes first, then a device of the same rank, then the rank that has sent least to others and in
    it the device that has sent least; ties go to the lower device.

    Args:
        ranks: device -> rank.
        sent_bytes: what each device sends to other ranks in transfers planned before, so that a step's transfers share
            the load.
    """
    if (source.shape, source.dtype) != (target.shape, target.dtype):
        raise PlanError(
            f"a transfer keeps shape and dtype: the source is {source.dtype}{list(source.shape)}, "
            f"the target {target.dtype}{list(target.shape)}"
        )
    device_bytes: dict[int, int] = defaultdict(int, sent_bytes or {})
    rank_bytes: dict[int, int] = defaultdict(int)
    for device, count in device_bytes.items():
        rank_bytes[ranks[device]] += count
    holders: dict[Box, list[int]] = defaultdict(list)
    for device, box in source.boxes:
        holders[box].append(device)
    needed = _intersections(list(holders), list(dict.fromkeys(box for _, box in target.boxes)))

    copies: list[Message] = []
    messages: list[Message] = []
    for device, wanted in target.boxes:
        for held, tile in needed[wanted]:
            sender = min(
                holders[held],
                key=lambda holder: (
                    holder != device,
                    ranks[holder] != ranks[device],
                    rank_bytes[ranks[holder]],
                    device_bytes[holder],
                    holder,
                ),
            )
            message = Message(sender, device, tile)
            (copies if sender == device else messages).append(message)
            if ranks[sender] != ranks[device]:
                device_bytes[sender] += box_elements(tile) * source.item_bytes
                rank_bytes[ranks[sender]] += box_elements(tile) * source.item_bytes
    return Transfer(source, target, tuple(ranks), tuple(copies), tuple(messages))


def plan_transfers(pairs: Sequence[tuple[TensorLayout, TensorLayout]], ranks: Sequence[int]) -> tuple[Transfer, ...]:
    """Plan the transfers of a whole step, each knowing what the earlier ones load on the senders."""
    sent_bytes: dict[int, int] = defaultdict(int)
    transfers = []
    for source, target in pairs:
        transfer = plan_transfer(source, target, ranks, sent_bytes)
        for message in transfer.messages:
            if ranks[message.source] != ranks[message.target]:
                sent_bytes[message.source] += transfer.bytes_of(message)
        transfers.append(transfer)
    return tuple(transfers)


def _bounds(boxes: Sequence[Box]) -> np.ndarray:
    """Boxes as integers [box, dim, start or stop]."""
    return np.array(boxes, dtype=np.int64).reshape(len(boxes), len(boxes[0]), 2)


def _overlaps(boxes: Sequence[Box]) -> bool:
    bounds = _bounds(boxes)
    low = np.maximum(bounds[:, None, :, 0], bounds[None, :, :, 0])
    high = np.minimum(bounds[:, None, :, 1], bounds[None, :, :, 1])
    meets = (low < high).all(axis=-1)
    np.fill_diagonal(meets, False)
    return bool(meets.any())


def _intersections(sources: Sequence[Box], targets: Sequence[Box]) -> dict[Box, list[tuple[Box, Box]]]:
    """For each target box its (source box, tile) pairs, the empty ones left out."""
    source_bounds, target_bounds = _bounds(sources), _bounds(targets)
    low = np.maximum(target_bounds[:, None, :, 0], source_bounds[None, :, :, 0])
    high = np.minimum(target_bounds[:, None, :, 1], source_bounds[None, :, :, 1])
    found: dict[Box, list[tuple[Box, Box]]] = {target: [] for target in targets}
    for t, s in np.argwhere((low < high).all(axis=-1)):
        tile = tuple((int(start), int(stop)) for start, stop in zip(low[t, s], high[t, s], strict=True))
        found[targets[t]].append((sources[s], tile))
    return found
