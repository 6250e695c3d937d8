"""How long elimination and the ILP take on random assignment problems: `python -m experiments.benchmarks.assignment`.

The costs are independent and uniform, the hardest kind: nothing is dominated and the linear relaxation says little. A
real layer's costs are correlated and easier for the ILP; elimination takes the same time whatever the costs.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter

import numpy as np

from meshwright.errors import PlanError
from meshwright.plan.assignment import Problem
from meshwright.plan.elimination import eliminate
from meshwright.plan.ilp import solve_ilp

CASES = {  # nodes, treewidth, strategies
    "chain of blocks": (60, 2, 12),
    "layer": (24, 5, 6),
    "stress": (40, 5, 12),
}


def random_problem(seed: int, nodes: int, treewidth: int, strategies: int, density: float = 1.0) -> Problem:
    """A random k-tree, of whose edges a part is there: each node joins a clique of earlier ones; costs up to 1 µs."""
    rng = np.random.default_rng(seed)
    first = tuple(range(treewidth))
    pairs = [(u, v) for v in first for u in first[:v]]
    cliques = [first]
    for v in range(treewidth, nodes):
        clique = cliques[rng.integers(len(cliques))]
        pairs += [(u, v) for u in clique]
        cliques += [(*clique[:i], *clique[i + 1 :], v) for i in range(treewidth)]
    node_seconds = tuple(rng.random(strategies) * 1e-6 for _ in range(nodes))
    edge_seconds = {pair: rng.random((strategies, strategies)) * 1e-6 for pair in pairs if rng.random() < density}
    return Problem(node_seconds, edge_seconds, tuple(rng.random(strategies) * 1e9 for _ in range(nodes)))


@dataclass(frozen=True, slots=True)
class Row:
    """One case, two nodes at opposite ends kept; where they are, they widen the tables between them.

    ``ilp_excess``: how far the ILP's answer is above the optimum; ``ilp_gap``: how far it may be by its own proof.
    """

    case: str
    nodes: int
    treewidth: int
    strategies: int
    table_entries: int  # of the largest table
    eliminate_all_seconds_median: float  # no node kept
    eliminate_seconds_best: float
    eliminate_seconds_median: float
    backtrack_seconds_median: float
    ilp_seconds: float
    ilp_gap: float | None
    ilp_excess: float | None


def measure(case: str, repeats: int, ilp_limit_seconds: float, seed: int) -> Row:
    """Elimination with two kept nodes, one backtrack for each of their pairs, and the ILP for the best of all."""
    nodes, treewidth, strategies = CASES[case]
    problem = random_problem(seed, nodes, treewidth, strategies)
    eliminations, backtracks, without_kept = [], [], []
    for _ in range(repeats):
        start = perf_counter()
        eliminate(problem)
        without_kept.append(perf_counter() - start)
        start = perf_counter()
        result = eliminate(problem, keep=(0, nodes - 1))
        eliminations.append(perf_counter() - start)
        start = perf_counter()
        for kept in np.ndindex(result.table.shape):
            result.backtrack(kept)
        backtracks.append((perf_counter() - start) / result.table.size)
    optimum = float(result.table.min())
    gap = excess = None
    start = perf_counter()
    try:
        found = solve_ilp(problem, time_limit_seconds=ilp_limit_seconds)
        gap, excess = found.gap, found.seconds / optimum - 1
    except PlanError:  # nothing found in time: the table says so
        pass
    ilp = perf_counter() - start
    return Row(
        case,
        nodes,
        treewidth,
        strategies,
        max(strategies ** (len({v for table in tables for v in table.scope}) - 1) for _, tables in result.trail),
        median(without_kept),
        min(eliminations),
        median(eliminations),
        median(backtracks),
        ilp,
        gap,
        excess,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=9, help="of the elimination; the ILP runs once")
    parser.add_argument("--ilp-limit-seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    cases = list(CASES) if asked.case == "all" else [asked.case]
    rows = [measure(case, asked.repeats, asked.ilp_limit_seconds, asked.seed) for case in cases]
    if asked.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        print(json.dumps({**machine, **versions, "seed": asked.seed, "rows": [asdict(row) for row in rows]}, indent=2))
        return 0
    heads = ("nodes", "width", "strategies", "entries", "none kept", "two kept", "backtrack", "ILP", "gap", "excess")
    print(f"{'case':16}" + "".join(f"{head:>11}" for head in heads))
    for r in rows:
        cells = (
            *(str(r.nodes), str(r.treewidth), str(r.strategies), f"{r.table_entries:,}"),
            *(f"{s * 1e3:.1f} ms" for s in (r.eliminate_all_seconds_median, r.eliminate_seconds_median)),
            *(f"{r.backtrack_seconds_median * 1e6:.0f} µs", f"{r.ilp_seconds:.1f} s"),
            *("none" if share is None else f"{share:.1%}" for share in (r.ilp_gap, r.ilp_excess)),
        )
        print(f"{r.case:16}" + "".join(f"{cell:>11}" for cell in cells))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
