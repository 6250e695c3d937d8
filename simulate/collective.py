"""Collectives and transfers → seconds."""

import math
from collections.abc import Iterator
from typing import Literal

from meshwright.calibrate.hardware import COLLECTIVE_KINDS, CollectiveFit, Link
from meshwright.errors import ClusterError

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute"]
RING_KINDS: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter")


def collective_seconds(kind: CollectiveKind, message_bytes: float, ranks: int, link: Link) -> float:
    """Time of one collective of ``ranks`` devices, all at once.

    ``message_bytes`` is the size of the whole array that the group holds together or ends up with:

    - ``all_reduce``: the array on each rank (all have it whole, before and after);
    - ``all_gather``: the gathered result (each rank brings 1/ranks of it);
    - ``reduce_scatter``: the input on each rank (each keeps 1/ranks of the sum);
    - ``all_to_all`` and ``permute``: the global array, of which each rank holds 1/ranks before and after.

    A link that was measured for this kind and number of ranks answers with its fit. Otherwise the hop latency and
    bandwidth that make the ring formula equal the nearest fit (of the same kind first, then of another ring
    collective) are put in the formula; without any fit, those of the plain link are.

    Range and error: the fits carry theirs; the ring alone is optimistic for small messages.
    Source: Patarasuk and Yuan, J. Parallel Distrib. Comput. 69 (2009) 117-124; Thakur et al., IJHPCA 19 (2005) 49-66.

    Raises:
        ClusterError: the kind is unknown, or there is less than one rank.
    """
    if ranks < 1:
        raise ClusterError(f"a collective of {ranks} ranks was asked for; at least 1 is needed")
    hops, share = _ring(kind, ranks)
    if ranks == 1 or message_bytes == 0:
        return 0.0
    if fit := link.fitted(kind, ranks):
        return fit.seconds(message_bytes)
    latency_seconds, bytes_per_second = _hop(kind, ranks, link)
    return hops * latency_seconds + share * message_bytes / bytes_per_second


def transfer_seconds(bytes: float, link: Link) -> float:
    """Time from one device to another: latency plus bytes over bandwidth; nothing to send takes no time."""
    return link.latency_seconds.value + bytes / link.bytes_per_second.value if bytes else 0.0


def _ring(kind: str, ranks: int) -> tuple[int, float]:
    """Hops one after another, and bytes that each rank sends for each byte of the whole array."""
    others = ranks - 1
    match kind:
        case "all_reduce":
            return 2 * others, 2 * others / ranks
        case "all_gather" | "reduce_scatter":
            return others, others / ranks
        case "all_to_all":
            return others, others / ranks**2
        case "permute":
            return 1, 1 / ranks
        case _:
            raise ClusterError(f"collective {kind!r} has no cost; known are {', '.join(COLLECTIVE_KINDS)}")


def _hop(kind: str, ranks: int, link: Link) -> tuple[float, float]:
    """Latency and bandwidth of one hop, as the nearest measurement shows them."""
    nearest = min(
        _fits(kind, link), key=lambda entry: (entry[0] != kind, _distance(entry[1].ranks, ranks)), default=None
    )
    if nearest is None:
        return link.latency_seconds.value, link.bytes_per_second.value
    fit_kind, fit = nearest
    hops, share = _ring(fit_kind, fit.ranks)
    return fit.latency_seconds.value / hops, share * fit.bytes_per_second.value


def _fits(kind: str, link: Link) -> Iterator[tuple[str, CollectiveFit]]:
    """Fits that tell about this kind; a permute is a plain transfer, of which rings tell nothing."""
    others = () if kind == "permute" else (other for other in RING_KINDS if other != kind)
    for name in (kind, *others):
        for fit in link.collectives.get(name, ()):
            yield name, fit


def _distance(some: int, ranks: int) -> tuple[float, int]:
    """How unlike two group sizes are; of two equally unlike, the smaller one is nearer."""
    return abs(math.log(some / ranks)), some
