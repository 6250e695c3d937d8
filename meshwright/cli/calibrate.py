"""``meshwright calibrate``: measure this machine and write its cluster file."""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright.calibrate.hardware import cluster_to_data, save_cluster
from meshwright.cli.progress import progress_display
from meshwright.errors import ClusterError

DEFAULT_OUT = "machine.json"
DEFAULT_BUDGET_SECONDS = 120.0
SMALLEST_BUDGET_SECONDS = 5.0
MOST_RANKS_A_CORE = 16  # more only wait for each other
REPORT_SHARE = 0.15  # of the budget, kept for drawing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``calibrate``."""
    parser.add_argument("--out", "-o", default=DEFAULT_OUT, metavar="FILE", help="cluster file (default: %(default)s)")
    parser.add_argument(
        "--budget", type=seconds, default=DEFAULT_BUDGET_SECONDS, metavar="TIME", help="30s, 2m; default 120s"
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="MPI ranks for the links (default: one a core, at least 2; 1: no links)"
    )
    parser.add_argument(
        "--from",
        dest="from_runs",
        nargs="+",
        metavar="RUN",
        help="measure nothing: correct the machine file by runs that `meshwright execute PLAN -o RUN` kept",
    )
    parser.add_argument("--report", metavar="DIR", help="write a page with a picture of every fit into this folder")
    parser.add_argument("--fresh", action="store_true", help="measure all anew after an interrupted calibration")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Measure, write the file, print the residuals; under ``mpiexec``, rank 0 does it for as many ranks."""
    if args.from_runs is not None:
        from meshwright.cli.calibrate_from import correct_from

        if args.ranks is not None or args.report or args.fresh:
            raise ClusterError("--from measures nothing; leave out --ranks, --report and --fresh")
        return correct_from(args.from_runs, args.out, as_json=args.json)
    from meshwright.calibrate.partial import Partial
    from meshwright.calibrate.session import calibrate_machine, worker_environment
    from meshwright.execute.launch import sigterm_interrupts

    rank, size = mpi_place(os.environ)
    if rank != 0:
        return 0
    cores = len(os.sched_getaffinity(0))
    ranks = args.ranks if args.ranks is not None else size or max(2, cores)
    if ranks < 1:
        raise ClusterError(f"--ranks is {ranks}; at least 1 is needed")
    if ranks > MOST_RANKS_A_CORE * cores:
        raise ClusterError(f"--ranks is {ranks} on {cores} cores; at most {MOST_RANKS_A_CORE} a core can be measured")
    out = Path(args.out)
    if out.is_dir():
        raise ClusterError(f"--out {out} is a folder; give the name of a file")
    if args.report and Path(args.report).is_file():
        raise ClusterError(f"--report {args.report} is a file; give the name of a folder")
    if not out.absolute().parent.is_dir():
        raise ClusterError(f"--out {out}: the folder {out.parent} does not exist; make it or choose another")
    start = time.perf_counter()
    partial = Partial(out, worker_environment(os.environ), args.fresh)
    if partial.notice:
        print(partial.notice, file=sys.stderr)
    with progress_display("calibrate") as progress, sigterm_interrupts():
        budget_seconds = args.budget * (1 - REPORT_SHARE if args.report else 1)
        calibration = calibrate_machine(budget_seconds, ranks, progress, partial)
    save_cluster(calibration.cluster, out)
    partial.remove()
    if args.report:
        from meshwright.calibrate.report import write_report

        page = write_report(calibration, Path(args.report))
    spent_seconds = time.perf_counter() - start
    rows = [
        {
            "family": row.name,
            "ranks": row.ranks,
            "fixed_seconds": row.fit.fixed_seconds.value,
            "amount_per_second": row.fit.amount_per_second.value,
            "unit": row.unit,
            "error_median": row.fit.residual.median,
            "error_p90": row.fit.residual.p90,
            "error_low": row.fit.residual.low,
            "error_high": row.fit.residual.high,
            "points": row.fit.residual.points,
        }
        for row in calibration.fits
    ]
    if args.json:
        data = {
            "out": str(out),
            "seconds": spent_seconds,
            "fits": rows,
            "cluster": cluster_to_data(calibration.cluster),
        }
        print(json.dumps(data, allow_nan=False))
        return 0
    print(residual_table(rows))
    slowdown = calibration.cluster.hosts[0].busy_slowdown
    if slowdown is not None:
        print(f"{ranks} ranks at once on {cores} cores: each {slowdown.value:.2f} times slower than alone")
    for dtype, choice in calibration.matmuls.items():
        print(f"matmul {dtype}: {choice}")
    if args.report:
        print(f"report: {page}")
    print(f"wrote {out} after {spent_seconds:.0f} s; plan for it with --cluster {out}")
    return 0


def seconds(text: str) -> float:
    """``30``, ``30s`` or ``2m`` as seconds; an ``argparse`` type."""
    factor = {"s": 1.0, "m": 60.0}.get(text[-1:])
    try:
        value = float(text if factor is None else text[:-1]) * (factor or 1.0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 30s or 2m") from None
    if not SMALLEST_BUDGET_SECONDS <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range; from {SMALLEST_BUDGET_SECONDS:g}s to one day")
    return value


def mpi_place(environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and size of the MPI job that we were started in, (0, 0) outside one; asks the environment, not MPI."""
    for rank, size in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size])
    return 0, 0


def residual_table(rows: list[dict[str, Any]]) -> str:
    """The fits as a plain table: fixed part, rate, and how far the fit is from the measurements."""
    head = f"{'measured':<16}{'ranks':>6}{'fixed µs':>12}{'rate':>16}{'median err':>12}{'p90 err':>9}{'points':>8}"
    lines = [
        f"{row['family']:<16}{row['ranks']:>6}{row['fixed_seconds'] * 1e6:>12.1f}"
        f"{row['amount_per_second'] / 1e9:>9.2f} G{row['unit']:<6}{row['error_median']:>11.0%}{row['error_p90']:>9.0%}"
        f"{row['points']:>8}"
        for row in rows
    ]
    return "\n".join((head, *lines))
