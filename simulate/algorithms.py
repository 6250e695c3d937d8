"""Collective algorithms in closed form: time on equal links of one latency and one bandwidth.

``message_bytes`` is the whole array, as in ``collective.collective_seconds``; ``ranks`` is n, alpha the latency of one
hop and s the seconds that the whole array takes over one link. Sending and receiving go on at once.

Sources: [T] Thakur, Rabenseifner, Gropp, IJHPCA 19 (2005) 49-66; [P] Patarasuk, Yuan, J. Parallel Distrib. Comput. 69
(2009) 117-124; [S] Sanders, Speck, Träff, Parallel Computing 35 (2009) 581-594; [N] Klenk et al., ISCA 2020 (sums on
the switch, which NCCL calls NVLS).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from meshwright.errors import ClusterError


class Parts(NamedTuple):
    """A collective's time in two parts: only the second needs the links, and other traffic can slow it."""

    latency_seconds: float
    wire_seconds: float

    @property
    def seconds(self) -> float:
        return self.latency_seconds + self.wire_seconds


@dataclass(frozen=True, slots=True)
class Algorithm:
    """``hops(n)`` one after another; ``share(n)`` bytes that the busiest rank sends in all for each byte of the array.

    A ``pipelined`` algorithm cuts the array into as many chunks as pay off. With k chunks of s/k it needs hops + k - 1
    steps, (hops + k - 1)(alpha + s/k), least at k = sqrt((hops - 1) s / alpha) [S, section 2].
    """

    hops: Callable[[int], int]
    share: Callable[[int], float]
    pipelined: bool = False

    def parts(self, message_bytes: float, ranks: int, latency_seconds: float, bytes_per_second: float) -> Parts:
        """Latency and wire time on links that all ranks have alike."""
        hops = self.hops(ranks)
        wire_seconds = self.share(ranks) * message_bytes / bytes_per_second
        if not self.pipelined or latency_seconds == 0:
            return Parts(hops * latency_seconds, wire_seconds)
        chunks = max(1.0, math.sqrt((hops - 1) * wire_seconds / latency_seconds))
        return Parts((hops - 1 + chunks) * latency_seconds + (hops - 1) * wire_seconds / chunks, wire_seconds)


def _rounds(ranks: int) -> int:
    return (ranks - 1).bit_length()  # ceil(log2 n)


def _rest(ranks: int) -> float:
    return (ranks - 1) / ranks


def _halvings(ranks: int) -> int:
    """Steps of recursive halving; beyond a power of two, ranks fold into a partner first and unfold last."""
    return ranks.bit_length() - 1 + 2 * _folded(ranks)


def _folded(ranks: int) -> int:
    return 0 if ranks & (ranks - 1) == 0 else 1


def _halved_share(ranks: int) -> float:
    """Folding sends a whole array one way and one rank's share the other [T, section 4.5]."""
    return _rest(1 << (ranks.bit_length() - 1)) + _folded(ranks) * (1 + 1 / ranks)


# In a two-tree [S, section 3] each rank is inside one tree and a leaf of the other, so that both halves of the array
# flow at full bandwidth; a tree is 2 ceil(log2 n) steps deep, since an inner rank feeds its two children in turn.
_TREE = Algorithm(lambda n: 2 * _rounds(n), lambda n: 1.0, pipelined=True)

ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "all_reduce": {
        "ring": Algorithm(lambda n: 2 * (n - 1), lambda n: 2 * (n - 1) / n),  # [P, section 3]
        "tree": Algorithm(lambda n: 4 * _rounds(n), lambda n: 2.0, pipelined=True),  # up one two-tree, down again
        "halving_doubling": Algorithm(  # [T, section 4.4], Rabenseifner's
            lambda n: 2 * _halvings(n) - 2 * _folded(n),
            lambda n: 2 * _rest(1 << (n.bit_length() - 1)) + 2 * _folded(n),
        ),
        "direct": Algorithm(lambda n: 2, lambda n: 2 * _rest(n)),  # each rank sums its share, all at once
        "nvls": Algorithm(lambda n: 2, lambda n: 1.0),  # up to the switch, which adds, and down again [N]
    },
    "all_gather": {
        "ring": Algorithm(lambda n: n - 1, _rest),
        "halving_doubling": Algorithm(_halvings, _halved_share),  # [T, section 4.1]
        "direct": Algorithm(lambda n: 1, _rest),
    },
    "reduce_scatter": {
        "ring": Algorithm(lambda n: n - 1, _rest),
        "halving_doubling": Algorithm(_halvings, _halved_share),  # [T, section 4.2]
        "direct": Algorithm(lambda n: 1, _rest),
    },
    "all_to_all": {
        "pairwise": Algorithm(lambda n: n - 1, lambda n: (n - 1) / n**2),  # [T, section 4.3], long messages
        "direct": Algorithm(lambda n: 1, lambda n: (n - 1) / n**2),  # a switch with full bisection
    },
    "permute": {"direct": Algorithm(lambda n: 1, lambda n: 1 / n)},
    "broadcast": {
        "chain": Algorithm(lambda n: n - 1, lambda n: 1.0, pipelined=True),
        "tree": _TREE,
    },
}
# What today's libraries choose from without a measurement to say better (NCCL user guide, NCCL_ALGO).
CHOSEN: dict[str, tuple[str, ...]] = {
    "all_reduce": ("ring", "tree"),
    "all_gather": ("ring",),
    "reduce_scatter": ("ring",),
    "all_to_all": ("pairwise",),
    "permute": ("direct",),
    "broadcast": ("chain", "tree"),
}


def algorithm(kind: str, name: str) -> Algorithm:
    """One algorithm of a kind of collective.

    Raises:
        ClusterError: there is no such kind, or the kind has no such algorithm.
    """
    if kind not in ALGORITHMS:
        raise ClusterError(f"collective {kind!r} has no cost; known are {', '.join(ALGORITHMS)}")
    if name not in ALGORITHMS[kind]:
        raise ClusterError(f"{kind} has no algorithm {name!r}; known are {', '.join(ALGORITHMS[kind])}")
    return ALGORITHMS[kind][name]


def best(kind: str, message_bytes: float, ranks: int, latency_seconds: float, bytes_per_second: float) -> Parts:
    """The quickest of the algorithms that libraries choose from.

    Raises:
        ClusterError: the kind is unknown.
    """
    names = CHOSEN.get(kind, ("",))
    options = [algorithm(kind, name).parts(message_bytes, ranks, latency_seconds, bytes_per_second) for name in names]
    return min(options, key=lambda parts: parts.seconds)
