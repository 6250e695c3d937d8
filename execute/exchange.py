"""Carries a planned transfer out on JAX arrays.

Each process handles the devices it drives: ``devices`` maps their plan indices to ``jax.Device``. In one process with
fake devices that is all of them; under MPI it is the rank's own (``ProcessGroup.local_devices``).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from meshwright.errors import ExecutionError
from meshwright.execute.resharding import Box, Message, Transfer, dtype_of
from meshwright.execute.transport.base import Array, Receipt, Transport, aligned_empty


@dataclass(frozen=True, slots=True)
class Incoming:
    """The posted receives of one transfer, for the target devices of this process."""

    transfer: Transfer
    receipts: tuple[tuple[Message, Receipt], ...]


def send_array(
    transport: Transport, transfer: Transfer, array: jax.Array, first_tag: int, devices: Mapping[int, jax.Device]
) -> None:
    """Start sending the tiles that this process's devices owe; waits for the array's value, not for the receivers.

    On CPU no byte is copied here: a message is a view of the shard. Donating the array before ``Transport.finish``
    is safe; XLA then writes elsewhere, as it sees the view.
    """
    shards = {shard.device: shard for shard in array.addressable_shards}
    boxes = dict(transfer.source.boxes)
    on_host: dict[int, Array] = {}
    for position, tile in enumerate(transfer.tiles):
        device = devices.get(tile.source)
        if device is None:
            continue
        box = boxes[tile.source]
        if tile.source not in on_host:
            shard = shards.get(device)
            if array.dtype != dtype_of(transfer.source.dtype) or shard is None or shard.data.shape != _extent(box):
                raise ExecutionError(
                    f"{array.dtype}{list(array.shape)} with sharding {array.sharding} does not lie as planned: device "
                    f"{tile.source} should hold {transfer.source.dtype}{list(_extent(box))}, the box {box}"
                )
            on_host[tile.source] = np.asarray(shard.data)
        transport.send(first_tag + position, on_host[tile.source][_within(tile.box, box)], transfer.ranks[tile.target])


def post_array(transport: Transport, transfer: Transfer, first_tag: int, devices: Mapping[int, jax.Device]) -> Incoming:
    """Post the receives of a transfer ahead of its use, so that bytes move while something else is computed."""
    dtype = dtype_of(transfer.target.dtype)
    return Incoming(
        transfer,
        tuple(
            (
                tile,
                transport.post_receive(first_tag + position, _extent(tile.box), dtype, transfer.ranks[tile.source]),
            )
            for position, tile in enumerate(transfer.tiles)
            if tile.target in devices
        ),
    )


def receive_array(
    transport: Transport, incoming: Incoming, sharding: jax.sharding.Sharding, devices: Mapping[int, jax.Device]
) -> jax.Array:
    """Wait for a posted transfer and build its array; only for a process that holds a shard of the target."""
    target = incoming.transfer.target
    tiles: dict[int, list[tuple[Message, Receipt]]] = defaultdict(list)
    for tile, receipt in incoming.receipts:
        tiles[tile.target].append((tile, receipt))
    mine = [(device, box) for device, box in target.boxes if device in devices]
    if not mine:
        raise ExecutionError(f"the target devices {target.devices} are not among this process's {sorted(devices)}")
    shards = [
        jax.device_put(_assemble(transport, tiles[device], box, dtype_of(target.dtype)), devices[device])
        for device, box in mine
    ]
    return jax.make_array_from_single_device_arrays(target.shape, sharding, shards)


def _assemble(
    transport: Transport, tiles: list[tuple[Message, Receipt]], box: Box, dtype: np.dtype[np.generic]
) -> Array:
    """One device's box from its tiles; a single tile is the box itself and is not copied."""
    if len(tiles) == 1:
        return transport.wait(tiles[0][1])
    buffer = aligned_empty(_extent(box), dtype)
    for tile, receipt in tiles:
        buffer[_within(tile.box, box)] = transport.wait(receipt)
    return buffer


def _extent(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where ``box`` lies in an array that holds ``outer``."""
    return tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(box, outer, strict=True))
