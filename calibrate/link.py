"""How devices reach each other: a link, and the collectives that were measured on it."""

from collections.abc import Callable
from typing import Literal

import msgspec

from meshwright.calibrate.quantity import (
    Quantity,
    Record,
    need_not_negative,
    need_positive,
    need_within_sheet,
    short_dtype,
)
from meshwright.errors import ClusterError

COLLECTIVE_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute", "broadcast")
SENT_SHARE: dict[str, Callable[[int], float]] = {  # bytes that each of n devices sends per byte of the whole array
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n**2,
    "permute": lambda n: 1 / n,
    "broadcast": lambda n: 1.0,
}
MOST_PIECES = 3  # NCCL has three protocols (LL, LL128, Simple); more pieces fit noise
NOT_ON_SWITCH = ("s8", "u8", "f8")  # multimem.red of PTX adds 16 bits and more (and f8 only from Blackwell on)


class Piece(Record, frozen=True, kw_only=True):
    """One straight part of a measured curve: latency_seconds + message_bytes / bytes_per_second."""

    latency_seconds: Quantity
    bytes_per_second: Quantity

    def __post_init__(self) -> None:
        need_not_negative("latency_seconds", self.latency_seconds)
        need_positive("bytes_per_second", self.bytes_per_second)


class CollectiveFit(Record, frozen=True, kw_only=True):
    """Measured time of one kind of collective among ``ranks`` devices: the least of up to three straight pieces.

    The entry's own ``latency_seconds`` and ``bytes_per_second`` are those of large messages; ``pieces`` are further
    ones, each with less latency and less bandwidth, as a library's protocols for small messages are (NCCL user guide,
    NCCL_PROTO). ``algorithm`` says how bytes move, which decides what other group sizes and the links cost; ``nvls``
    adds on the switch (NVLink SHARP).

    ``message_bytes`` is the size of the *whole* array: the reduced one, the gathered one, the one before scattering,
    for an all-to-all and a permute what all ranks hold together.
    """

    ranks: int
    latency_seconds: Quantity
    bytes_per_second: Quantity
    pieces: tuple[Piece, ...] = ()
    algorithm: Literal["ring", "nvls"] = "ring"

    def __post_init__(self) -> None:
        if self.ranks < 2:
            raise ClusterError(f"ranks is {self.ranks}; a collective has at least 2")
        need_not_negative("latency_seconds", self.latency_seconds)
        need_positive("bytes_per_second", self.bytes_per_second)
        if len(self.pieces) >= MOST_PIECES:
            raise ClusterError(
                f"pieces are {len(self.pieces)} beside the entry's own; at most {MOST_PIECES - 1} are possible"
            )

    @property
    def lines(self) -> tuple[tuple[float, float], ...]:
        """(latency in seconds, bytes per second) of each piece, that of the largest messages first."""
        own = (self.latency_seconds.value, self.bytes_per_second.value)
        return (own, *((piece.latency_seconds.value, piece.bytes_per_second.value) for piece in self.pieces))

    def seconds(self, message_bytes: float) -> float:
        """Time of one collective on an array of ``message_bytes``."""
        return min(latency + message_bytes / rate for latency, rate in self.lines)

    def bus_bytes_per_second(self, kind: str) -> float:
        """What each device sends in a second of a large collective of a kind, if bytes go around a ring.

        Source: NVIDIA, nccl-tests, PERFORMANCE.md (bus bandwidth), for arrays whose size is that of the whole.
        """
        return SENT_SHARE[kind](self.ranks) * max(rate for _, rate in self.lines)

    def carries(self, dtype: str) -> bool:
        """Whether arrays of this dtype take this algorithm: a switch cannot add 8-bit numbers."""
        return self.algorithm != "nvls" or not short_dtype(dtype).startswith(NOT_ON_SWITCH)

    def scaled(self, factor: float) -> "CollectiveFit":
        """The same collective with all bandwidths times a factor."""
        return msgspec.structs.replace(
            self,
            bytes_per_second=self.bytes_per_second.scaled(factor),
            pieces=tuple(
                msgspec.structs.replace(piece, bytes_per_second=piece.bytes_per_second.scaled(factor))
                for piece in self.pieces
            ),
        )


class Link(Record, frozen=True, kw_only=True):
    """How one device reaches another.

    ``bytes_per_second`` is what one device sends to one other, per direction, with nobody else on the link;
    ``host_bytes_per_second``, where given, caps what all devices of a host send over it together (a shared NIC).
    ``sheet_bytes_per_second`` is the data sheet's rate of one device to all others, per direction: no measured rate may
    exceed it by a fifth, and no collective may send more.
    """

    bytes_per_second: Quantity
    latency_seconds: Quantity
    host_bytes_per_second: Quantity | None = None
    collectives: dict[str, tuple[CollectiveFit, ...]] = msgspec.field(default_factory=dict)
    sheet_bytes_per_second: Quantity | None = None

    def __post_init__(self) -> None:
        need_positive("bytes_per_second", self.bytes_per_second)
        need_not_negative("latency_seconds", self.latency_seconds)
        if self.host_bytes_per_second is not None:
            need_positive("host_bytes_per_second", self.host_bytes_per_second)
        if self.sheet_bytes_per_second is not None:
            need_positive("sheet_bytes_per_second", self.sheet_bytes_per_second)
        need_within_sheet("bytes_per_second.value", self.bytes_per_second.value, self.sheet_bytes_per_second)
        for kind, fits in self.collectives.items():
            if kind not in COLLECTIVE_KINDS:
                raise ClusterError(f"collectives.{kind} is not a collective; known are {', '.join(COLLECTIVE_KINDS)}")
            entries = [(fit.ranks, fit.algorithm) for fit in fits]
            if len(set(entries)) != len(entries):
                ranks = [fit.ranks for fit in fits]
                raise ClusterError(f"collectives.{kind} lists a number of ranks twice: {ranks}")
            for fit in fits:
                where = f"collectives.{kind} (bus bandwidth of {fit.ranks} ranks)"
                need_within_sheet(where, fit.bus_bytes_per_second(kind), self.sheet_bytes_per_second)

    def fitted(self, kind: str, ranks: int, dtype: str = "bf16") -> CollectiveFit | None:
        """The first measured entry for exactly this kind, number of ranks and dtype, if there is one."""
        entries = self.collectives.get(kind, ())
        return next((fit for fit in entries if fit.ranks == ranks and fit.carries(dtype)), None)

    def scaled(self, factor: float) -> "Link":
        """The link with all its bandwidths, the measured ones too, times a factor, and no further cap."""
        sheet = self.sheet_bytes_per_second
        if factor == 1.0:
            return msgspec.structs.replace(self, host_bytes_per_second=None)
        return msgspec.structs.replace(
            self,
            bytes_per_second=self.bytes_per_second.scaled(factor),
            host_bytes_per_second=None,
            collectives={kind: tuple(fit.scaled(factor) for fit in fits) for kind, fits in self.collectives.items()},
            sheet_bytes_per_second=None if sheet is None else sheet.scaled(factor),
        )
