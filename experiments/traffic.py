"""Does traffic in the objective pay? Our search, seeded with nothing, beside every baseline, on twelve cases.

    python -m experiments.traffic [CASE ...] [--json] [--plot FILE]

Four models, one of them with branches, on three networks between two hosts. Every plan is judged by the same simulator.
Beside the baselines stands the search with parts of it taken away: the number of micro-batches of Alpa's plan given,
and only GPipe.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from meshwright.calibrate.hardware import Cluster, parse_cluster
from meshwright.errors import ModelError, PlanError
from meshwright.plan.baselines import BASELINES, Baseline
from meshwright.plan.baselines.base import fixed
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan
from meshwright.plan.search import Graphs, Request, search

TOWERS = "two-tower:layers=12,hidden=2048,heads=16,seq=2,vocab=32000,features=2048"
MODELS = {
    "gpt-1.3b": ("gpt-1.3b", 64),
    "moe-1.3b": ("moe-1.3b", 64),
    "wresnet-1b": ("wresnet-1b", 64),
    "two towers": (TOWERS, 2048),
}
NETWORKS = {"fast": ("dgx-a100:2", 1.0), "25 Gbit/s": ("p3.16xlarge:2", 1.0), "10 Gbit/s": ("p3.16xlarge:2", 0.4)}
ALPA = "Alpa's objective"


@dataclass(frozen=True, slots=True)
class Result:
    """One case: seconds of a step by who planned it; None where there is no plan."""

    case: str
    ours_seconds: float
    search_seconds: float
    plan: str
    seconds: dict[str, float | None]

    @property
    def best(self) -> float:
        """Ours over the fastest baseline's."""
        return self.ours_seconds / min(s for s in self.seconds.values() if s is not None)

    @property
    def over_alpa(self) -> float | None:
        """Alpa's step over ours, less 1."""
        theirs = self.seconds.get(ALPA)
        return None if theirs is None else theirs / self.ours_seconds - 1


def cluster_of(network: str) -> Cluster:
    """Two hosts on a network; a share of 0.4 of 25 Gbit/s is 10."""
    name, share = NETWORKS[network]
    cluster = parse_cluster(name)
    link = cluster.inter_host
    host_rate = link.host_bytes_per_second
    slower = msgspec.structs.replace(
        link,
        bytes_per_second=link.bytes_per_second.scaled(share),
        host_bytes_per_second=None if host_rate is None else host_rate.scaled(share),
    )
    return cluster if share == 1.0 else msgspec.structs.replace(cluster, inter_host=slower)


def given_microbatches(graphs: Graphs, request: Request, plan: Plan) -> Plan:
    """The full search at the first number of micro-batches that fills a pipeline of all devices four times."""
    count = max(d for d in range(1, request.batch + 1) if request.batch % d == 0 and d <= 4 * request.cluster.devices)
    return search(graphs, fixed(request, microbatches=count))


def given_schedule(graphs: Graphs, request: Request, plan: Plan) -> Plan:
    """The full search under GPipe alone."""
    return search(graphs, fixed(request, schedule="gpipe"))


ABLATIONS = (
    Baseline("ours, micro-batches given", given_microbatches),
    Baseline("ours, GPipe alone", given_schedule),
)


def run_case(case: str) -> Result:
    """Plan a case in every way."""
    from meshwright.models.zoo import get_model
    from meshwright.plan.trace.model import trace

    model_name, network = case.split(" on ")
    spec, batch = MODELS[model_name]
    model = get_model(spec)

    @cache
    def graphs(count: int) -> ModelGraph:
        return trace(model, batch, count).graph

    request = Request(cluster_of(network), batch)
    start = time.perf_counter()
    plan = search(graphs, request)
    took = time.perf_counter() - start
    seconds: dict[str, float | None] = {}
    for baseline in (*BASELINES, *ABLATIONS):
        try:
            seconds[baseline.name] = baseline.scheme(graphs, request, plan).predicted.iteration_seconds
        except (PlanError, ModelError):
            seconds[baseline.name] = None
    meshes = "|".join(str(len(stage.devices)) for stage in plan.stages)
    words = f"{plan.schedule}, {plan.microbatches} micro-batches, stages of {meshes}"
    return Result(case, plan.predicted.iteration_seconds, took, words, seconds)


def table(results: Sequence[Result]) -> str:
    """Seconds of ours, and how much longer each other takes, in Markdown."""
    names = list(results[0].seconds)
    lines = ["| case | ours, s | " + " | ".join(names) + " | our plan |", "|---|---:|" + "---:|" * len(names) + "---|"]
    for r in results:
        cells = ["no plan" if s is None else f"{s / r.ours_seconds - 1:+.1%}" for s in r.seconds.values()]
        lines.append(f"| {r.case} | {r.ours_seconds:.4g} | " + " | ".join(cells) + f" | {r.plan} |")
    alpa = [r.over_alpa for r in results if r.over_alpa is not None]
    ahead = sum(over >= 0.05 for over in alpa)
    lines += ["", f"at least 5 % ahead of Alpa's objective in {ahead} of {len(alpa)}; behind the best baseline by"]
    behind = max(results, key=lambda r: r.best)
    lines[-1] += f" at most {max(0.0, behind.best - 1):.1%} ({behind.case})"
    return "\n".join(lines)


def plot(results: Sequence[Result], path: str) -> None:
    """A group of dots a case: each way to plan over ours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.42 * len(results) + 2.2), layout="constrained")
    axes = figure.subplots()
    marks = "osD^v<>P"
    for number, name in enumerate(results[0].seconds):
        points = [(r.seconds[name], row) for row, r in enumerate(results)]
        known = [(s / results[row].ours_seconds, row) for s, row in points if s is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], marks[number % len(marks)], label=name, markersize=6)
    axes.axvline(1.0, color="black", linewidth=1, label="ours")
    axes.set(xscale="log", xlabel="seconds of a step over ours", yticks=range(len(results)))
    axes.set_yticklabels([r.case for r in results])
    ticks = [1, 1.2, 1.5, 2, 3, 5, 10]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; 1 if ours is more than 1 % behind a baseline anywhere."""
    every = [f"{model} on {network}" for model in MODELS for network in NETWORKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of: {'; '.join(every)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--plot", metavar="FILE", help="write the picture")
    args = parser.parse_args(arguments)
    if unknown := [case for case in args.cases if case not in every]:
        parser.error(f"unknown case {unknown[0]!r}; known are {'; '.join(every)}")
    results: list[Result] = []
    for case in args.cases or every:
        results.append(run_case(case))
        print(f"{case}: {results[-1].ours_seconds:.4g} s", file=sys.stderr, flush=True)
    if args.plot:
        plot(results, args.plot)
    rows: list[dict[str, Any]] = [
        {
            "case": r.case,
            "ours_seconds": r.ours_seconds,
            "search_seconds": r.search_seconds,
            "plan": r.plan,
            "seconds": r.seconds,
        }
        for r in results
    ]
    print(json.dumps({"cases": rows}) if args.json else table(results))
    return 0 if all(r.best <= 1.01 for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
