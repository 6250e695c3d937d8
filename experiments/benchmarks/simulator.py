"""How many tasks a second the event engine times: ``python -m experiments.benchmarks.simulator [--json]``.

A pipeline-like lattice: task (round, stage) needs (round, stage - 1) and its stage's executor. Once without resources
(the longest-path pass), once with links that are shared (the event queue). Best of several warm runs, on one core.
"""

import argparse
import json
import time

import numpy as np

from meshwright.simulate.engine import Tasks, make_tasks, run_tasks

STAGES = 64


def lattice(rounds: int, shared: bool) -> Tasks:
    """``rounds * STAGES`` tasks of one second; with ``shared``, eight links carry them."""
    count = rounds * STAGES
    stage = np.tile(np.arange(STAGES), rounds)
    needs = (stage > 0).astype(np.int64)
    start = np.concatenate([[0], np.cumsum(needs)])
    origin = np.arange(count)[stage > 0] - 1
    return make_tasks(
        np.ones(count),
        stage,
        edges=(start, origin, np.zeros(len(origin))),
        resource=stage % 8 if shared else None,
        resource_rates=[(1.0,)] * 8 if shared else (),
    )


def tasks_per_second(tasks: Tasks, repeats: int) -> float:
    """Best of ``repeats`` runs after one that compiles."""
    run_tasks(tasks)
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run_tasks(tasks)
        spent.append(time.perf_counter() - begin)
    return tasks.count / min(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tasks a second of the event engine.")
    parser.add_argument("--rounds", type=int, default=1 << 14, help="tasks are 64 times as many (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rates = {
        f"{name}_tasks_per_second": tasks_per_second(lattice(args.rounds, shared), args.repeats)
        for name, shared in (("alone", False), ("shared", True))
    }
    if args.json:
        print(json.dumps({"tasks": args.rounds * STAGES, **rates}))
    else:
        print("\n".join(f"{name:26} {rate / 1e6:6.1f} million" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
