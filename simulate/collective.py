"""Collectives and transfers on one link → seconds."""

import math
from typing import Literal

from meshwright.calibrate.link import COLLECTIVE_KINDS, CollectiveFit, Link
from meshwright.errors import ClusterError
from meshwright.simulate.algorithms import ALGORITHMS, CHOSEN, Algorithm, Parts, best

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute", "broadcast"]
RING_KINDS: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter")
NOTHING = Parts(0.0, 0.0)


def collective_seconds(
    kind: CollectiveKind, message_bytes: float, ranks: int, link: Link, dtype: str = "bf16"
) -> float:
    """Time of one collective of ``ranks`` devices, all at once.

    ``message_bytes`` is the size of the whole array that the group holds together or ends up with:

    - ``all_reduce``, ``broadcast``: the array on each rank (all have it whole in the end);
    - ``all_gather``: the gathered result (each rank brings 1/ranks of it);
    - ``reduce_scatter``: the input on each rank (each keeps 1/ranks of the sum);
    - ``all_to_all`` and ``permute``: the global array, of which each rank holds 1/ranks before and after.

    A link that was measured for this kind and number of ranks answers with its fit. Otherwise each straight piece of
    the nearest fit (of the same kind first, then of another ring collective) is turned into the latency and bandwidth
    of one hop, which the closed form of ``algorithms`` turns into this collective's; without any fit, the plain link's
    latency and bandwidth are put in the algorithms that libraries choose from, and the quickest counts.

    ``dtype`` matters only where a switch adds up (NVLS), which it cannot do with 8-bit numbers.

    Range and error: the fits carry theirs; closed forms alone are optimistic for small messages.
    Source: see ``algorithms``.

    Raises:
        ClusterError: the kind is unknown, or there is less than one rank.
    """
    return collective_parts(kind, message_bytes, ranks, link, dtype).seconds


def collective_parts(kind: CollectiveKind, message_bytes: float, ranks: int, link: Link, dtype: str = "bf16") -> Parts:
    """``collective_seconds`` in its two parts: what is latency, and what other traffic on the links would slow."""
    if ranks < 1 or ranks != int(ranks):
        raise ClusterError(f"a collective of {ranks} ranks was asked for; a whole number of at least 1 is needed")
    if not (math.isfinite(message_bytes) and message_bytes >= 0):
        raise ClusterError(f"a message of {message_bytes} bytes was asked for; a finite number of at least 0 is needed")
    if kind not in COLLECTIVE_KINDS:
        raise ClusterError(f"collective {kind!r} has no cost; known are {', '.join(COLLECTIVE_KINDS)}")
    if ranks == 1 or message_bytes == 0:
        return NOTHING
    fit, fit_kind = link.fitted(kind, ranks, dtype), kind
    if fit is None:
        fit, fit_kind = _nearest(kind, ranks, link, dtype)
    if fit is None:
        return best(kind, message_bytes, ranks, link.latency_seconds.value, link.bytes_per_second.value)
    if fit_kind == kind and fit.ranks == ranks:
        lines = [Parts(latency, message_bytes / rate) for latency, rate in fit.lines]
    else:
        measured, here = _form(fit_kind, fit.algorithm), _form(kind, fit.algorithm)
        hops, share = measured.hops(fit.ranks), measured.share(fit.ranks)
        lines = [here.parts(message_bytes, ranks, latency / hops, share * rate) for latency, rate in fit.lines]
    return min(lines, key=lambda parts: parts.seconds)


def collective_share(kind: CollectiveKind, ranks: int, link: Link, dtype: str = "bf16") -> float:
    """Bytes that each rank sends, and receives, for each byte of the whole array, by the algorithm that is used."""
    if ranks == 1:
        return 0.0
    fit = link.fitted(kind, ranks, dtype) or _nearest(kind, ranks, link, dtype)[0]
    return _form(kind, fit.algorithm if fit else "ring").share(ranks)


def port_bytes_per_second(link: Link) -> float:
    """What one device can send over a link at most: the quickest of all that was measured on it."""
    measured = (
        _form(kind, fit.algorithm).share(fit.ranks) * rate
        for kind, fits in link.collectives.items()
        for fit in fits
        for _, rate in fit.lines
    )
    return max((link.bytes_per_second.value, *measured))


def transfer_seconds(bytes: float, link: Link) -> float:
    """Time from one device to another: latency plus bytes over bandwidth; nothing to send takes no time."""
    return link.latency_seconds.value + bytes / link.bytes_per_second.value if bytes else 0.0


def _form(kind: str, name: str) -> Algorithm:
    """The algorithm of this name, or for kinds that do not have it the first that libraries use."""
    return ALGORITHMS[kind].get(name) or ALGORITHMS[kind][CHOSEN[kind][0]]


def _nearest(kind: CollectiveKind, ranks: int, link: Link, dtype: str) -> tuple[CollectiveFit | None, CollectiveKind]:
    """The fit that tells most about this kind and number of ranks, and its kind; a permute is a plain transfer.

    What a switch adds up tells nothing of other kinds.
    """
    others = () if kind == "permute" else tuple(other for other in RING_KINDS if other != kind)
    entries = [
        (name, fit)
        for name in (kind, *others)
        for fit in link.collectives.get(name, ())
        if fit.carries(dtype) and (name == kind or fit.algorithm == "ring")
    ]
    if not entries:
        return None, kind
    name, fit = min(entries, key=lambda entry: (entry[0] != kind, _distance(entry[1].ranks, ranks)))
    return fit, name


def _distance(some: int, ranks: int) -> tuple[float, int]:
    """How unlike two group sizes are; of two equally unlike, the smaller one is nearer."""
    return abs(math.log(some / ranks)), some
