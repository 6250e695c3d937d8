"""How well a machine file's link tells what collectives and transfers take: measured medians beside predictions.

    mpiexec --oversubscribe -n 4 python -m mpi4py -m experiments.link_check --cluster machine.json [--json]

Measures as ``meshwright calibrate`` does, and asks ``simulate.collective`` for the same messages: by the file's fits,
and by the closed forms of ``simulate.algorithms`` over its plain link alone, as for a machine without measured
collectives. Without ``--cluster`` the fits are those of this very measurement.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np

from meshwright.calibrate.hardware import COLLECTIVE_KINDS, Link, load_cluster
from meshwright.calibrate.link_fit import curves, link_of
from meshwright.calibrate.timing import P2P, NetworkTimings
from meshwright.ranks import single_threaded
from meshwright.simulate.collective import CollectiveKind, collective_seconds, transfer_seconds


class Row(NamedTuple):
    """One curve; errors are |predicted / measured - 1| over its sizes."""

    family: str
    ranks: int
    sizes: int
    smallest_bytes: float
    largest_bytes: float
    fit_error_median: float
    fit_error_largest: float
    inside: float  # share of sizes where the prediction lies within the measured spread
    closed_form_error_median: float


def rows_of(network: NetworkTimings, link: Link) -> list[Row]:
    """Each curve of one group of neighbouring ranks beside what the link says of it."""
    plain = msgspec.structs.replace(link, collectives={})
    rows = []
    for (family, ranks, stride, groups), timings in curves(network.timings).items():
        if stride > 1 or groups > 1:
            continue
        sizes = [timing.amount for timing in timings]
        measured = np.array([timing.seconds for timing in timings])
        predicted, closed = (np.array([_seconds(family, size, ranks, way) for size in sizes]) for way in (link, plain))
        errors = np.abs(predicted / measured - 1)
        low, high = (
            np.array([getattr(timing, name) for timing in timings]) for name in ("low_seconds", "high_seconds")
        )
        inside = (low <= predicted) & (predicted <= high)
        rows.append(
            Row(
                family,
                ranks,
                len(sizes),
                min(sizes),
                max(sizes),
                float(np.median(errors)),
                float(errors.max()),
                float(inside.mean()),
                float(np.median(np.abs(closed / measured - 1))),
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| kind | ranks | sizes | from | to | error of the fit, median | largest | inside the spread | closed form |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.family} | {row.ranks} | {row.sizes} | {row.smallest_bytes / 1024:,.0f} KiB "
        f"| {row.largest_bytes / 2**20:,.2f} MiB | {row.fit_error_median:.0%} | {row.fit_error_largest:.0%} "
        f"| {row.inside:.0%} | {row.closed_form_error_median:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)


def _seconds(family: str, message_bytes: float, ranks: int, link: Link) -> float:
    if family == P2P:
        return transfer_seconds(message_bytes, link)
    assert family in COLLECTIVE_KINDS
    return collective_seconds(cast(CollectiveKind, family), message_bytes, ranks, link)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure on all ranks of the MPI job; rank 0 prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", metavar="FILE", help="machine file (default: fitted to this measurement)")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args(arguments)
    link = load_cluster(args.cluster).hosts[0].link if args.cluster else None
    # XLA reads its flags when JAX starts, and a rank computes on one thread: both before the first import of JAX.
    os.environ.update({**single_threaded(os.environ), "JAX_PLATFORMS": "cpu"})
    network = _measure(args.budget)
    if network is None:
        return 0
    rows = rows_of(network, link or link_of(network, "measured just now")[0])
    data: dict[str, Any] = {"ranks": network.ranks, "rows": [row._asdict() for row in rows]}
    print(json.dumps(data) if args.json else table(rows))
    return 0


def _measure(budget_seconds: float) -> NetworkTimings | None:
    import jax
    from mpi4py import MPI

    from meshwright.calibrate.network import measure_network, start_jax

    comm = MPI.COMM_WORLD
    start_jax(comm)
    network = measure_network(comm, budget_seconds, lambda done, text: None)
    jax.distributed.shutdown()
    return network


if __name__ == "__main__":
    sys.exit(main())
