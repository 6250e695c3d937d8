"""``meshwright execute``: train as a plan says, and hold the run against the prediction."""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.errors import ExecutionError
from meshwright.execute.launch import inside_mpi, launch
from meshwright.execute.record import (
    FORMAT,
    METRICS,
    VERSION,
    DeviceRow,
    Summary,
    device_events,
    device_row,
    digest,
    versions,
    write_run,
)
from meshwright.plan.planfile import Plan, bytes_text, load_plan, seconds_text
from meshwright.simulate.timeline import Timeline

DEFAULT_STEPS = 20
WARM_UP_STEPS = 1  # the first step still warms caches and communicators; it is trained but not timed
MEASURED_STEPS = (
    7  # for a run's folder: steps in which each instruction is waited for, and the first of them is not kept
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``execute``."""
    parser.add_argument("plan", metavar="PLAN", help="a plan file; without mpiexec, its ranks are started here")
    parser.add_argument("--data", metavar="FILE", help="text to train on, read as bytes (default: Python's own source)")
    parser.add_argument(
        "--steps",
        type=int,
        default=DEFAULT_STEPS,
        metavar="K",
        help="optimizer steps, the first not timed (%(default)s)",
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3, metavar="R", help="of AdamW (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters and batches (%(default)s)")
    parser.add_argument(
        "--run", "-o", metavar="DIR", help="keep the run in this folder, for `meshwright calibrate --from DIR`"
    )
    parser.add_argument("--metrics", metavar="FILE", help="append one JSON line a step")
    parser.add_argument("--trace", metavar="FILE", help="write predicted and measured timelines for ui.perfetto.dev")
    parser.add_argument("--plot", metavar="FILE", help="draw them, predicted above measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--quiet", action="store_true", help="no progress and no notes on stderr")


def run(args: argparse.Namespace) -> int:
    """Start the ranks, or be one of them."""
    if args.steps < 1:
        raise ExecutionError(f"--steps is {args.steps}; at least 1 is needed")
    if not 0 < args.learning_rate < math.inf:
        raise ExecutionError(f"--learning-rate is {args.learning_rate}; a positive number is needed, such as 1e-3")
    plan = load_plan(args.plan)
    if args.run:
        Path(args.run).mkdir(parents=True, exist_ok=True)
    if not inside_mpi():
        return launch(plan.devices, ["-m", "meshwright", *sys.argv[1:]])
    from meshwright.cli.fault import write_fault_log
    from meshwright.execute.process_group import guard

    def log(error: BaseException) -> Path:
        return write_fault_log(error, sys.argv[1:], Path.cwd()) or Path("no log could be written")

    with guard(log):
        train(plan, args)
    return 0


@dataclass(frozen=True, slots=True)
class RankRun:
    """What one rank tells rank 0 at the end: its measured steps, its peaks by stage, and what it ran on."""

    timelines: tuple[Timeline, ...]
    peak_bytes: Mapping[int, float]
    device: DeviceRow


def train(plan: Plan, args: argparse.Namespace) -> None:
    """The work of one rank; rank 0 reports."""
    import jax
    import optax

    from meshwright.execute.process_group import ProcessGroup
    from meshwright.execute.train import build
    from meshwright.models.zoo import get_model

    spans = any(len(stage.devices) > 1 for stage in plan.stages)
    group = ProcessGroup.start(devices_per_rank=1, distributed=spans)
    if group.size != plan.devices:
        raise ExecutionError(
            f"the plan is for {plan.devices} ranks and {group.size} were started; use mpiexec -n {plan.devices}"
        )
    model = get_model(plan.model)
    batches, note = batches_of(model, plan, args)
    chief = group.rank == 0
    say = Progress(args.steps) if chief and not args.quiet else None
    if chief and args.run:
        (Path(args.run) / METRICS).unlink(missing_ok=True)  # of an earlier run
    if say:
        if note:
            print(note, file=sys.stderr)
        say.line("compiling")
    trainer = build(plan, model, optax.adamw(args.learning_rate), group)
    state = trainer.init(jax.random.key(args.seed))
    group.communicator.Barrier()
    history = []
    for step in range(args.steps):
        state, metrics = trainer.step(state, next(batches))
        history.append(metrics)
        if say:
            say.step(step + 1, metrics.loss, metrics.step_seconds)
        for path in metrics_files(args) if chief else ():
            append_metrics(path, plan, metrics)
    measured = []
    for _ in range(1 + MEASURED_STEPS if args.run or args.plot or args.trace else 0):
        batch = next(batches)
        group.communicator.Barrier()  # the zero of all clocks
        state, _ = trainer.step(state, batch, measure=True)
        measured.append(trainer.timeline)
    own = jax.local_devices()[0]
    seen = RankRun(
        tuple(measured[1:]),  # the first pays once for what waiting for each instruction needs
        dict(trainer.runtime.peak_bytes),
        device_row(group.rank, own.device_kind, own.platform),
    )
    gathered = group.communicator.gather(seen)
    if gathered is not None:  # rank 0
        timed = history[WARM_UP_STEPS:] or history
        report(plan, args, [m.loss for m in history], [m.step_seconds for m in timed], gathered)


def batches_of(model: Any, plan: Plan, args: argparse.Namespace) -> tuple[Iterator[Any], str]:
    """Text as bytes for a language model that can read bytes, else random numbers of the right shapes; and a note.

    Errors: ExecutionError if ``--data`` is given for a model that does not read bytes; ModelError if it is no text.
    """
    from meshwright.models.text import VOCAB, byte_batches, read_text

    shapes = model.batch_fn(plan.batch)
    if isinstance(shapes, dict) and set(shapes) == {"tokens", "targets"} and _vocabulary(model) >= VOCAB:
        text = None if args.data is None else read_text(args.data)
        return byte_batches(shapes["tokens"].shape[1], plan.batch, args.seed, text=text), ""
    if args.data is not None:
        raise ExecutionError(
            f"model {model.name!r} does not read text as bytes, so --data cannot be used; leave it out"
        )
    return random_batches(shapes, args.seed), "note: the model does not read text as bytes; it trains on random numbers"


def random_batches(shapes: Any, seed: int) -> Iterator[Any]:
    """Batches without end: zeros and ones where whole numbers are wanted, which any vocabulary knows; else normals."""
    import jax
    import numpy as np

    rng = np.random.default_rng(seed)

    def draw(shape: Any) -> Any:
        if np.issubdtype(shape.dtype, np.integer):
            return rng.integers(0, 2, shape.shape).astype(shape.dtype)
        return rng.normal(size=shape.shape).astype(shape.dtype)

    while True:
        yield jax.tree.map(draw, shapes)


def _vocabulary(model: Any) -> int:
    """The number of tokens that a zoo model knows: rows of its largest two-dimensional table of tokens."""
    import jax

    tables = jax.eval_shape(model.init_fn, jax.random.key(0))
    rows = [leaf.shape[0] for path, leaf in jax.tree_util.tree_leaves_with_path(tables) if "token" in str(path)]
    return max(rows, default=0)


class Progress:
    """A live line on a terminal, a line every tenth of the steps elsewhere; on stderr."""

    def __init__(self, steps: int) -> None:
        self.steps, self.live, self.told = steps, sys.stderr.isatty(), -1

    def line(self, text: str) -> None:
        print(f"\r\033[K{text}" if self.live else text, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def step(self, done: int, loss: float, seconds: float) -> None:
        tenth = 10 * done // self.steps
        if self.live or tenth > self.told:
            self.told = tenth
            filled = 30 * done // self.steps
            bar = f"[{'#' * filled}{'.' * (30 - filled)}] " if self.live else ""
            self.line(f"{bar}step {done}/{self.steps}  loss {loss:.4f}  {seconds_text(seconds)} a step")
        if self.live and done == self.steps:
            print(file=sys.stderr)


def finite_or_none(number: float) -> float | None:
    """JSON knows neither NaN nor infinity, which a diverged loss may be; they become null."""
    return number if math.isfinite(number) else None


def metrics_files(args: argparse.Namespace) -> list[str]:
    """The files that get a line a step: the one that was asked for, and the one of the run's folder."""
    return [str(path) for path in (args.metrics, args.run and Path(args.run) / METRICS) if path]


def append_metrics(path: str, plan: Plan, metrics: Any) -> None:
    """One JSON line under the names that torchtitan's users know; tokens per second are per device."""
    tokens = plan.batch * plan.tokens_per_sample / plan.devices
    row = {
        "step": metrics.step,
        "time": time.time(),
        "loss_metrics/global_avg_loss": finite_or_none(metrics.loss),
        "time_metrics/end_to_end(s)": metrics.step_seconds,
        "throughput(tps)": tokens / metrics.step_seconds,
    }
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def report(
    plan: Plan, args: argparse.Namespace, losses: Sequence[float], seconds: Sequence[float], ranks: Sequence[RankRun]
) -> None:
    """Predicted against measured, as a table or as JSON; and the pictures that were asked for."""
    from meshwright.plan.predict import predict

    prediction = predict(plan)
    median = statistics.median(seconds)
    predicted, planned_peak = prediction.predicted.iteration_seconds, prediction.predicted.peak_memory_bytes
    time_error = predicted / median - 1
    peak = max((held for rank in ranks for held in rank.peak_bytes.values()), default=0.0)
    if args.plot or args.trace:
        both = [("predicted", prediction.timeline), ("measured", median_timeline(plan, ranks))]
        if args.plot:
            from meshwright.simulate.gantt import plot_timelines

            plot_timelines(both, args.plot)
        if args.trace:
            from meshwright.simulate.trace import write_trace

            write_trace(both, args.trace)
    if args.run:
        keep_run(plan, args.run, losses, seconds, ranks, predicted, peak)
    result = {
        "steps": len(losses),
        "loss_first": finite_or_none(losses[0]),
        "loss_last": finite_or_none(losses[-1]),
        "step_seconds_median": median,
        "predicted_step_seconds": predicted,
        "error_fraction": time_error,
        "peak_memory_bytes": peak,
        "predicted_peak_memory_bytes": planned_peak,
        "checkpoint": None,
    }
    if args.json:
        print(json.dumps(result, allow_nan=False))
        return
    memory_error = planned_peak / peak - 1 if peak else 0.0
    print(
        f"{'':<24}{'predicted':>12}{'measured':>12}{'error':>9}\n"
        f"{'step time (median)':<24}{seconds_text(predicted):>12}{seconds_text(median):>12}{time_error:>+9.1%}\n"
        f"{'peak memory a device':<24}{bytes_text(planned_peak):>12}{bytes_text(peak):>12}{memory_error:>+9.1%}\n"
        f"loss: {losses[0]:.4f} at the first step, {losses[-1]:.4f} at step {len(losses)}"
    )
    print("measured memory: arrays alive plus what XLA says its programs need; without the Python process itself")
    if args.run:
        print(f"kept in {args.run}; what differs, and a corrected machine file: meshwright calibrate --from {args.run}")


def median_timeline(plan: Plan, ranks: Sequence[RankRun]) -> Timeline:
    """Of the steps that were measured instruction by instruction, the one of median length, over all ranks."""
    from meshwright.execute.train import merge_timelines

    devices = tuple(stage.devices for stage in plan.stages)
    steps = [merge_timelines(parts, devices) for parts in zip(*(rank.timelines for rank in ranks), strict=True)]
    return sorted(steps, key=lambda step: step.makespan_seconds)[len(steps) // 2]


def keep_run(
    plan: Plan,
    folder: str,
    losses: Sequence[float],
    seconds: Sequence[float],
    ranks: Sequence[RankRun],
    predicted_seconds: float,
    peak_bytes: float,
) -> None:
    """Write the run's folder."""
    each_rank = [[device_events(timeline, rank.device.device) for timeline in rank.timelines] for rank in ranks]
    steps = [[row for rows in step for row in rows] for step in zip(*each_rank, strict=True)]
    summary = Summary(
        format=FORMAT,
        version=VERSION,
        plan_digest=digest(plan),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        step_seconds=tuple(seconds),
        losses=tuple(map(finite_or_none, losses)),
        predicted_step_seconds=predicted_seconds,
        peak_memory_bytes=peak_bytes,
        devices=tuple(rank.device for rank in ranks),
        versions=versions(),
    )
    write_run(folder, plan, steps, summary)
