"""How fast the simulator is: ``python -m experiments.benchmarks.simulator [--json] [--plot FILE]``.

Everything is timed in this one process, side by side: SimPy and the simulator play the same 1F1B step and must agree
on its makespan. Figures are the best of several warm runs on one core, those of flows and of 10^7 tasks on shared
resources a single one; what is compiled (by Numba) is compiled
before. ``score`` is the time of a step and the memory of each device over time, as arrays, of which the peak is read;
the program is compiled once, as a planner does for many plans. ``whole`` makes it anew from the schedule's name each
time, ``read`` makes each event and each step of memory a Python object besides, as a trace or a picture needs them.
"""

import argparse
import json
import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import simpy

from meshwright.simulate.build import build_code
from meshwright.simulate.code import decode
from meshwright.simulate.compiled import Compiled, compile_program
from meshwright.simulate.costs import PipelineCosts, StageCosts, TransferCost
from meshwright.simulate.engine import Tasks, make_tasks, run_tasks
from meshwright.simulate.pipeline import simulate
from meshwright.simulate.program import Backward, Forward, compute_only

FORWARD_SECONDS, BACKWARD_SECONDS, HOP_SECONDS = 1.0, 2.0, 0.1
LATTICE_WIDTH = 64
MOST_CAPPED = 10**3  # flows, whose time grows with their square
INCLUDED = {
    "ratio_to_simpy": "the makespan, and the memory of each device over time as arrays; the program is compiled before",
    "ratio_to_simpy_whole": "the same, and the program made from the schedule's name and compiled",
    "ratio_to_simpy_read": "as ratio_to_simpy, and every event and step of memory made a Python object",
    "simpy_seconds": "SimPy's events; its rows are made before, and it keeps no memory timeline",
    "contended_seconds": "8 resources that tasks share equally, in virtual time: no max-min flows",
    "one_link_seconds": "flows that one link alone holds back, in virtual time",
    "pairs_seconds": "max-min fair flows over two links each at a tenth of the load",
    "capped_seconds": "max-min fair flows over one link, every second one with a cap: quadratic",
}


def equal_stages(stages: int, scale: float = 1.0) -> PipelineCosts:
    """A chain of equal stages whose live micro-batches weigh one byte each."""
    stage = tuple(
        StageCosts(
            devices=(s,),
            forward_seconds=scale * FORWARD_SECONDS,
            backward_seconds=scale * BACKWARD_SECONDS,
            static_bytes=16.0,
            saved_bytes=1.0,
        )
        for s in range(stages)
    )
    hop = TransferCost(0.0, HOP_SECONDS)
    forth = {(s, s + 1, "activation"): hop for s in range(stages - 1)}
    back = {(s + 1, s, "cotangent"): hop for s in range(stages - 1)}
    return PipelineCosts(stage, {**forth, **back})  # type: ignore[dict-item]


def simpy_step(rows: tuple[tuple[Any, ...], ...]) -> float:
    """One step in SimPy: a process a device, a timeout a computation, a timeout a message on its way."""
    env = simpy.Environment()
    stages = len(rows)
    sent: dict[Any, simpy.Event] = {
        step: env.event()
        for row in rows
        for step in row
        if (isinstance(step, Forward) and step.stage < stages - 1) or (isinstance(step, Backward) and step.stage > 0)
    }

    def device(row: tuple[Any, ...]) -> Generator[simpy.Event, None, None]:
        for step in row:
            forward = isinstance(step, Forward)
            source = type(step)(step.stage + (-1 if forward else 1), step.microbatch)
            if source in sent and 0 <= source.stage < stages:
                yield sent[source]
            yield env.timeout(FORWARD_SECONDS if forward else BACKWARD_SECONDS)
            if step in sent:
                event = sent[step]
                env.timeout(HOP_SECONDS).callbacks.append(lambda _, event=event: event.succeed())  # type: ignore[misc]

    for row in rows:
        env.process(device(row))
    env.run()
    return float(env.now)


def lattice(tasks: int, shared: bool) -> Tasks:
    """A pipeline-like lattice of one-second tasks: (round, column) needs (round, column - 1) and its column."""
    rounds = max(1, tasks // LATTICE_WIDTH)
    count = rounds * LATTICE_WIDTH
    column = np.tile(np.arange(LATTICE_WIDTH), rounds)
    start = np.concatenate([[0], np.cumsum(column > 0, dtype=np.int64)])
    origin = np.arange(count)[column > 0] - 1
    return make_tasks(
        np.ones(count),
        column,
        edges=(start, origin, np.zeros(len(origin))),
        resource=column % 8 if shared else None,
        resource_rates=[(1.0,)] * 8 if shared else (),
    )


def incast(flows: int) -> Tasks:
    """So many flows of unlike sizes into one link, most of them at once; it alone holds them back."""
    return _flows(flows, np.zeros((flows, 1), np.int64), np.array([flows / 2.0]))


def capped_incast(flows: int) -> Tasks:
    """The same with a cap for every second flow, so that each start and end finds all max-min rates anew."""
    return _flows(flows, np.zeros((flows, 1), np.int64), np.array([flows / 2.0]), np.tile([np.inf, 0.5], flows))


def pairs(flows: int) -> Tasks:
    """The same flows over two of ``flows`` links each, chosen at random, at a tenth of the load."""
    links = np.random.default_rng(1).integers(0, flows, (flows, 2))
    return _flows(flows, links, np.full(flows, 10.0))


def _flows(flows: int, links: Any, capacity: Any, caps: Any = np.inf) -> Tasks:
    """Flows of 1 to 2 bytes that start at random within a second."""
    rng = np.random.default_rng(0)
    starts, sizes, nothing = rng.random(flows), 1.0 + rng.random(flows), np.zeros(flows)
    waits: list[list[tuple[int, float]]] = [[] for _ in range(flows)]
    first = np.concatenate([np.zeros(flows, np.int64), links.shape[1] * np.arange(flows + 1)])
    return make_tasks(
        np.concatenate([starts, nothing]),
        np.full(2 * flows, -1),
        waits + [[(i, 0.0)] for i in range(flows)],
        flow_bytes=np.concatenate([nothing, sizes]),
        flow_links=(first, links.ravel()),
        flow_bytes_per_second=caps,
        link_bytes_per_second=capacity,
    )


def best_seconds(work: Callable[[], object], repeats: int) -> float:
    """The quickest of ``repeats`` runs, after one that compiles."""
    work()
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        spent.append(time.perf_counter() - begin)
    return min(spent)


def score(compiled: Compiled, costs: PipelineCosts) -> float:
    """What a planner asks of a plan: its time, and that its memory fits at all times."""
    timeline = simulate(compiled, costs)
    most = max(float(held.max()) for _, held in timeline.memory)
    return timeline.makespan_seconds if most < 1e9 else float("inf")


def read(compiled: Compiled, costs: PipelineCosts) -> int:
    """Everything that happened, as objects; returns how many."""
    timeline = simulate(compiled, costs)
    return len(timeline.events) + sum(map(len, timeline.live_bytes))


def measure(repeats: int = 5, largest: int = 10**7) -> dict[str, Any]:
    """All figures as plain data."""
    code = build_code("1f1b", 16, 256)
    compiled, costs = compile_program(code), equal_stages(16)
    rows = compute_only(decode(code))
    expected, ours = simpy_step(rows), simulate(compiled, costs).makespan_seconds
    if abs(expected - ours) > 1e-9 * expected:
        raise AssertionError(f"SimPy says {expected} s, the simulator {ours} s")
    simpy_seconds = best_seconds(lambda: simpy_step(rows), repeats)
    step_seconds = best_seconds(lambda: score(compiled, costs), 20 * repeats)
    whole_seconds = best_seconds(lambda: score(compile_program(build_code("1f1b", 16, 256)), costs), 4 * repeats)
    read_seconds = best_seconds(lambda: read(compiled, costs), repeats)

    large = equal_stages(64)
    large_seconds = best_seconds(lambda: score(compile_program(build_code("1f1b", 64, 1024)), large), repeats)
    small = compile_program(build_code("1f1b", 8, 32))
    plans = [equal_stages(8, 1.0 + k / 1000) for k in range(1000)]
    plans_seconds = best_seconds(lambda: [score(small, plan) for plan in plans], repeats)

    sizes = [size for size in (10**4, 10**5, 10**6, 10**7) if size <= largest]
    growth = []
    for size in sizes:
        tasks = lattice(size, shared=False)
        few = lattice(size, shared=True)
        few_repeats = repeats if size < 10**7 else 1
        growth.append(
            {
                "tasks": tasks.count,
                "seconds": best_seconds(lambda tasks=tasks: run_tasks(tasks), repeats),  # type: ignore[misc]
                "contended_tasks": few.count,
                "contended_seconds": best_seconds(lambda few=few: run_tasks(few), few_repeats),  # type: ignore[misc]
            }
        )
    flows = []
    for size in (10**2, 10**3, 10**4, 10**5):
        entry: dict[str, Any] = {"flows": size}
        made = {"one_link": incast(size), "pairs": pairs(size)}
        if size <= MOST_CAPPED:
            made["capped"] = capped_incast(size)
        for name, tasks in made.items():
            entry[f"{name}_seconds"] = best_seconds(lambda tasks=tasks: run_tasks(tasks), 1)  # type: ignore[misc]
        flows.append(entry)
    return {
        "tasks_per_second": max(entry["tasks"] / entry["seconds"] for entry in growth),
        "largest_tasks_per_second": growth[-1]["tasks"] / growth[-1]["seconds"],
        "contended_tasks_per_second": max(entry["contended_tasks"] / entry["contended_seconds"] for entry in growth),
        "ratio_to_simpy": simpy_seconds / step_seconds,
        "ratio_to_simpy_whole": simpy_seconds / whole_seconds,
        "ratio_to_simpy_read": simpy_seconds / read_seconds,
        "simpy_seconds": simpy_seconds,
        "step_seconds": step_seconds,
        "plans_per_second": len(plans) / plans_seconds,
        "step_64x1024_seconds": large_seconds,
        "included": INCLUDED,
        "growth": growth,
        "flows": flows,
        "growth_exponent": growth_exponent(growth),
    }


def growth_exponent(growth: list[dict[str, Any]]) -> float:
    """The power p of seconds ~ tasks^p over all sizes; n log n from 10^4 to 10^7 tasks is 1.08."""
    if len(growth) < 2:
        return float("nan")
    tasks, seconds = ([np.log(entry[key]) for entry in growth] for key in ("tasks", "seconds"))
    return float(np.polyfit(tasks, seconds, 1)[0])


def plot(growth: list[dict[str, Any]], flows: list[dict[str, Any]], path: str) -> None:
    """Draw time over size against the line that n log n would take from the smallest size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 5.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    tasks = np.array([entry["tasks"] for entry in growth], float)
    seconds = np.array([entry["seconds"] for entry in growth])
    contended = np.array([entry["contended_tasks"] for entry in growth], float)
    axes.loglog(tasks, seconds, "o-", color="#0072B2", label="nothing shared")
    axes.loglog(
        contended,
        [entry["contended_seconds"] for entry in growth],
        "s-",
        color="#D55E00",
        label="8 resources, shared equally",
    )
    line = seconds[0] * tasks * np.log(tasks) / (tasks[0] * np.log(tasks[0]))
    axes.loglog(tasks, line, "--", color="#7B8794", label="n log n from the smallest")
    for name, label, colour in (
        ("one_link_seconds", "flows into one link", "#009E73"),
        ("pairs_seconds", "flows over two links each, max-min", "#CC79A7"),
        ("capped_seconds", "flows into one link, half capped, max-min", "#56B4E9"),
    ):
        curve = [(entry["flows"], entry[name]) for entry in flows if name in entry]
        axes.loglog(*zip(*curve, strict=True), "^-", color=colour, label=label)
    axes.set_xlabel("tasks, or flows")
    axes.set_ylabel("seconds (one core, warm)")
    axes.grid(True, which="major", color="#E4E7EB")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How fast the simulator is, beside SimPy in the same process.")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the best counts (default: %(default)s)")
    parser.add_argument("--largest", type=int, default=10**7, help="most tasks of the growth curve (default: 10^7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="draw the growth curve")
    args = parser.parse_args(arguments)
    figures = measure(args.repeats, args.largest)
    if args.plot:
        plot(figures["growth"], figures["flows"], args.plot)
    if args.json:
        print(json.dumps(figures))
        return
    print(report(figures))


def report(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    largest = figures["growth"][-1]["tasks"]
    lines = [
        ("one core, nothing shared, at best", f"{figures['tasks_per_second'] / 1e6:.1f} M tasks/s"),
        (f"the same with {largest:,} tasks", f"{figures['largest_tasks_per_second'] / 1e6:.1f} M tasks/s"),
        ("8 resources shared equally, at best", f"{figures['contended_tasks_per_second'] / 1e6:.1f} M tasks/s"),
        ("1F1B of 16 stages × 256, SimPy", f"{figures['simpy_seconds'] * 1e3:.2f} ms"),
        ("the same here, memory timeline on", f"{figures['step_seconds'] * 1e3:.2f} ms"),
        ("so many times as fast as SimPy", f"{figures['ratio_to_simpy']:.0f}"),
        ("and with the program made anew", f"{figures['ratio_to_simpy_whole']:.0f}"),
        ("and with all events as objects", f"{figures['ratio_to_simpy_read']:.1f}"),
        ("1F1B of 64 × 1024, made and simulated", f"{figures['step_64x1024_seconds'] * 1e3:.1f} ms"),
        ("plans of 8 × 32 scored", f"{figures['plans_per_second']:,.0f} a second"),
        ("time grows as tasks to the power of", f"{figures['growth_exponent']:.2f}"),
    ]
    for entry in figures["flows"]:
        lines.append((f"{entry['flows']:,} flows into one link", f"{entry['one_link_seconds'] * 1e3:.1f} ms"))
        lines.append((f"{entry['flows']:,} over two of as many links", f"{entry['pairs_seconds'] * 1e3:.1f} ms"))
        if "capped_seconds" in entry:
            lines.append((f"{entry['flows']:,} into one, half capped", f"{entry['capped_seconds'] * 1e3:.1f} ms"))
    return "\n".join(f"{name:40} {figure:>16}" for name, figure in lines)


if __name__ == "__main__":
    main()
