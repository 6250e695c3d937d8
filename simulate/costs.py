"""What a program costs: seconds and bytes of its stages, its transfers, and what they share."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import NamedTuple

from meshwright.errors import ScheduleError
from meshwright.simulate.program import Payload
from meshwright.simulate.topology import CoreSharing


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """Seconds and bytes of one stage; bytes are those of each of its devices.

    Seconds are those of devices that have their host's cores to themselves. ``input_seconds`` and ``weight_seconds``
    are the halves of a split backward; a recomputed forward is in ``backward_seconds`` and in ``input_seconds``, once,
    and never in ``weight_seconds``.

    ``saved_bytes`` are held for each live micro-batch, from the start of its forward to the end of its backward, of
    which ``weight_saved_bytes`` (None: all) stay between the halves of a split one; ``transient_bytes`` only while a
    forward or backward runs; ``static_bytes`` (weights, gradients, optimizer) always, and ``static_parts`` names what
    they are made of.
    """

    devices: tuple[int, ...]
    forward_seconds: float
    backward_seconds: float
    input_seconds: float | None = None
    weight_seconds: float | None = None
    reduce_seconds: float = 0.0
    update_seconds: float = 0.0
    gather_seconds: float = 0.0
    static_bytes: float = 0.0
    saved_bytes: float = 0.0
    weight_saved_bytes: float | None = None
    transient_bytes: float = 0.0
    static_parts: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.devices:
            raise ScheduleError("a stage has no devices; at least 1 is needed")
        for item in fields(self):
            number = getattr(self, item.name)
            if item.name in ("devices", "static_parts") or number is None:
                continue
            if not (isfinite(number) and number >= 0):
                raise ScheduleError(f"{item.name} of a stage is {number}; a finite number of at least 0 is needed")
        if self.weight_saved_bytes is not None and self.weight_saved_bytes > self.saved_bytes:
            raise ScheduleError(
                f"weight_saved_bytes of a stage is {self.weight_saved_bytes}, more than its saved_bytes of "
                f"{self.saved_bytes}"
            )
        named = sum(held for _, held in self.static_parts)
        if self.static_parts and abs(named - self.static_bytes) > 1e-6 * max(named, self.static_bytes):
            raise ScheduleError(
                f"static_parts of a stage add up to {named} bytes, but static_bytes is {self.static_bytes}"
            )


class TransferCost(NamedTuple):
    """``wire_seconds`` occupy the channel, ``latency_seconds`` do not.

    Transfers that name one ``link`` share it equally. Those with ``links`` (numbers in ``link_bytes_per_second`` of the
    costs) are flows of ``bytes``, of which ``weights[k]`` cross link k for each byte, at max-min fair rates; alone
    they take ``wire_seconds``. ``buffer_bytes`` are held on each receiving device from the moment the bytes leave
    until they are used, and on each sending one until they have arrived.
    """

    wire_seconds: float
    latency_seconds: float
    link: int | None = None
    buffer_bytes: float = 0.0
    bytes: float = 0.0
    links: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PipelineCosts:
    """What a program costs: its stages, the transfers between them, and the cores and links that they share.

    With ``collective_stream`` reductions and gathers run beside the computation of their mesh.
    """

    stages: tuple[StageCosts, ...]
    transfers: Mapping[tuple[int, int, Payload], TransferCost]
    cores: tuple[CoreSharing, ...] = ()
    link_bytes_per_second: tuple[float, ...] = ()
    collective_stream: bool = False
