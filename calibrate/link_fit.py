"""From timings between ranks to a link: each family fitted by itself, residuals and sources kept."""

import numpy as np

from meshwright.calibrate.fit import FittedFamily, fit_timings
from meshwright.calibrate.hardware import COLLECTIVE_KINDS, CollectiveFit, Link, Quantity
from meshwright.calibrate.timing import P2P, NetworkTimings
from meshwright.errors import ClusterError


def link_of(network: NetworkTimings, measured: str) -> tuple[Link, list[FittedFamily]]:
    """The link, and a row of the residual table for each family.

    Raises:
        ClusterError: no point-to-point transfer was measured.
    """
    rows: list[FittedFamily] = []
    collectives: dict[str, list[CollectiveFit]] = {}
    for family, ranks in sorted({(timing.family, timing.ranks) for timing in network.timings}):
        timings = [timing for timing in network.timings if (timing.family, timing.ranks) == (family, ranks)]
        if len({timing.amount for timing in timings}) < 2:
            continue  # the budget ended here; the simulator falls back on the link for this kind
        rows.append(FittedFamily(family, ranks, fit_timings(timings, f"{measured}, {ranks} ranks"), "B/s"))
        if family in COLLECTIVE_KINDS:
            fit = rows[-1].fit
            entry = CollectiveFit(
                ranks=ranks, latency_seconds=fit.fixed_seconds, bytes_per_second=fit.amount_per_second
            )
            collectives.setdefault(family, []).append(entry)
    p2p = next((row.fit for row in rows if row.name == P2P), None)
    if p2p is None:
        raise ClusterError("no point-to-point transfer was measured; give calibrate a larger --budget")
    link = Link(
        bytes_per_second=p2p.amount_per_second,
        latency_seconds=p2p.fixed_seconds,
        collectives={kind: tuple(entries) for kind, entries in collectives.items()},
    )
    return link, rows


def busy_slowdown_of(network: NetworkTimings, measured: str) -> Quantity:
    """Time of a matmul with all ranks busy over its time alone.

    Means, not medians: a rank that waits for its turn on a core waits in a few long calls, which a median does not see.
    """
    alone, busy = float(np.mean(network.alone_seconds)), float(np.mean(network.busy_seconds))
    value = max(1.0, busy / alone)
    return Quantity(value, f"{measured}, mean time of a matmul on {network.ranks} ranks at once over alone")
