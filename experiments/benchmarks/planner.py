"""How long the planner searches: ``python -m experiments.benchmarks.planner [CASE …] [--first] [--json] [--plot F]``.

Every search runs in a fresh process, timed from its start to the plan, everything included: the interpreter, imports,
the trace of the model, layers, stages, simulation. ``compiled`` searches find Numba's kernels compiled on disk, as
every search but the first one after an installation does; ``first`` searches start with an empty folder for them
(``--first``). Results of earlier searches are never used. ``cpu`` is the processor time of the whole process: on a
machine with other work it says more than the clock.

Sizes are those of Alpa's experiments (Zheng et al., OSDI 2022, section 8 and its artifact): 1,024 sequences or 1,536
images a step on 64 V100s, the MoE models with Adafactor, whose moments are a row and a column; GPT-175B on 1,024 A100s
has the 1,536 sequences of Narayanan et al., SC 2021, table 2.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """A search, and the seconds it may take (None: no target)."""

    model: str
    cluster: str
    batch: int
    target_seconds: float | None = None
    adafactor: bool = False


CASES = {
    "gpt-39b": Case("gpt-39b", "p3.16xlarge:8", 1024, 30.0),
    "gpt-175b": Case("gpt-175b", "dgx-a100:128", 1536, 90.0),
    "moe-70b": Case("moe-70b", "p3.16xlarge:8", 1024, 60.0, adafactor=True),
    "wresnet-13b": Case("wresnet-13b", "p3.16xlarge:8", 1536, 60.0),
}
_SPEC = "gpt:layers={},hidden=2048,heads=16,seq=1024,vocab=51200,dtype=f16"
GROWTH = {
    "layers": {n: Case(_SPEC.format(n), "p3.16xlarge:4", 256) for n in (12, 24, 48, 96)},
    "devices": {8 * n: Case(_SPEC.format(24), f"p3.16xlarge:{n}", 256) for n in (1, 2, 4, 8, 16)},
    "sequences a step": {n: Case(_SPEC.format(24), "p3.16xlarge:4", n) for n in (16, 64, 256, 1024)},
}
_GROWTH_LINES = ("total", "trace", "layers and stage tables", "stages", "simulate")
_MOST_SECONDS = 900.0  # after which a search is given up


def find(case: Case) -> dict[str, Any]:
    """One search in this process, as ``meshwright plan --json`` does it."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from meshwright.calibrate.hardware import parse_cluster
    from meshwright.models.zoo import get_model
    from meshwright.plan.graph import ModelGraph
    from meshwright.plan.planfile import public_json
    from meshwright.plan.search import Request, search
    from meshwright.plan.space import Memory
    from meshwright.plan.trace.model import trace

    model = get_model(case.model)
    traced: list[ModelGraph] = []

    def graphs(microbatches: int) -> ModelGraph:
        traced.append(trace(model, case.batch, microbatches, like=traced[0] if traced else None).graph)
        return traced[-1]

    # Adafactor reads the parameter and its gradient and writes the parameter, in f32.
    memory = Memory(optimizer_bytes=0.0, update_bytes=12.0) if case.adafactor else Memory()
    return public_json(search(graphs, Request(parse_cluster(case.cluster), case.batch, memory=memory)))


def search_once(case: Case, numba_folder: str) -> dict[str, float | str]:
    """One search in a fresh process.

    Errors: subprocess.CalledProcessError if it finds no plan, subprocess.TimeoutExpired after ``_MOST_SECONDS``.
    """
    command = [sys.executable, "-m", "experiments.benchmarks.planner", "--find", json.dumps(asdict(case))]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command,
        env={**os.environ, "NUMBA_CACHE_DIR": numba_folder},
        check=True,
        capture_output=True,
        text=True,
        timeout=_MOST_SECONDS,
    )
    total, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = json.loads(done.stdout)
    spent = answer["search"]
    return {
        "total": total,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "start and end": total - spent["seconds"],
        "trace": spent["trace_seconds"],
        "layers and stage tables": spent["ilp_seconds"],
        "stages": spent["dp_seconds"],
        "simulate": spent["simulate_seconds"],
        "microbatch_counts": spent["microbatch_counts"],
        "iteration_seconds": answer["predicted"]["iteration_seconds"],
        "microbatches": answer["microbatches"],
        "schedule": answer["schedule"],
    }


def measure(name: str, case: Case, numba_folder: str, first: bool) -> dict[str, Any]:
    """The figures of a case, told on stderr as they come."""
    row: dict[str, Any] = {"case": name, **asdict(case)}
    folders = {"compiled": numba_folder}
    with tempfile.TemporaryDirectory() as empty:
        if first:
            folders["first"] = empty
        for kind, folder in folders.items():
            try:
                row[kind] = search_once(case, folder)
            except subprocess.CalledProcessError as error:
                row[kind] = {"failed": str(error.stderr).strip().splitlines()[-1]}
            except subprocess.TimeoutExpired:
                row[kind] = {"failed": f"not done after {_MOST_SECONDS:g} s"}
            print(f"{name} {kind}: {row[kind]}", file=sys.stderr, flush=True)
    return row


def growth(numba_folder: str) -> dict[str, dict[str, Any]]:
    """Figures over the number of layers, of devices and of sequences a step."""
    return {
        what: {str(n): measure(f"{what} {n}", case, numba_folder, first=False) for n, case in cases.items()}
        for what, cases in GROWTH.items()
    }


def plot(grown: dict[str, dict[str, Any]], path: str) -> None:
    """One panel a dimension, seconds over size, on logarithmic axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(1, len(grown), figsize=(12, 4), sharey=True, layout="constrained")
    for axis, (what, rows) in zip(axes, grown.items(), strict=True):
        sizes = [int(n) for n, row in rows.items() if "total" in row["compiled"]]
        for line in _GROWTH_LINES:
            seconds = [rows[str(n)]["compiled"][line] for n in sizes]
            axis.plot(sizes, seconds, marker="o", label=line, linewidth=2.5 if line == "total" else 1.2)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(what)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)}; default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--first", action="store_true", help="also search with an empty folder of compiled kernels")
    parser.add_argument("--plot", metavar="FILE", help="draw the growth with layers, devices and batch")
    parser.add_argument("--find", metavar="CASE", help=argparse.SUPPRESS)  # what the fresh processes do
    args = parser.parse_args()
    if args.find:
        print(json.dumps(find(Case(**json.loads(args.find)))))
        return
    unknown = set(args.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; known are {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        small = Case(_SPEC.format(4), "p3.16xlarge:1", 8)
        print("compiling what all searches use", file=sys.stderr, flush=True)
        search_once(small, folder)
        rows = [measure(name, CASES[name], folder, args.first) for name in args.cases or CASES]
        grown = growth(folder) if args.plot else {}
    if args.plot:
        plot(grown, args.plot)
    print(json.dumps({"cpus": os.cpu_count(), "cases": rows, "growth": grown}) if args.json else table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Seconds of each case beside its target."""
    lines = [f"{'case':12} {'kernels':9} {'seconds':>8} {'cpu':>6} {'target':>7}  parts"]
    for row in rows:
        for kind in ("compiled", "first"):
            found = row.get(kind)
            if isinstance(found, dict):
                parts = ", ".join(f"{part} {found[part]:.1f}" for part in _GROWTH_LINES[1:] if part in found)
                seconds = f"{found['total']:.1f}" if "total" in found else "-"
                target = row["target_seconds"]
                cpu = f"{found['cpu']:.1f}" if "cpu" in found else "-"
                lines.append(f"{row['case']:12} {kind:9} {seconds:>8} {cpu:>6} {target:>7}  {parts or found['failed']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
