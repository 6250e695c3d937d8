"""The loop closed on a CPU: calibrate it, run plans on MPI ranks for real, hold the runs against the plans.

    python -m experiments.closed_loop [--machine machine.json] [--ranks 2 4] [--steps 30] [--json]

Each rank computes on one thread. For every plan: the step time (median over steps that nothing else is asked of), the
peak memory (arrays alive plus what XLA says its programs need, not the process), and, from further steps in which each
instruction is waited for, seconds by kind of instruction, so that an error has a name.

A core that is shared with strangers changes its pace from second to second. So before each step all ranks run a fixed
matmul at once: the *pace* of a run is what it took, in the mean, over what the machine file says of as many busy ranks.
It tells a reader how alike calibration and run were; no error is corrected by it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from meshwright.calibrate.hardware import Cluster, parse_cluster, save_cluster
from meshwright.execute.launch import launch
from meshwright.plan.planfile import Plan, load_plan, save_plan
from meshwright.plan.predict import predict
from meshwright.plan.search import Fix
from meshwright.simulate.timeline import Timeline

MODEL = "gpt:layers=4,hidden=256,heads=4,seq=128,vocab=512"
BATCH = 16
CALIBRATION_SECONDS = 150.0
WARM_STEPS = 3
NAMED_STEPS = 7  # in which each instruction is waited for, by the wall's clock and then by the CPU's
PLANS: dict[int, dict[str, Fix]] = {
    2: {
        "data 2": Fix(data=2, tensor=1, pipeline=1, microbatches=2, remat="none"),
        "tensor 2": Fix(data=1, tensor=2, pipeline=1, microbatches=2, remat="none"),
        "pipeline 2": Fix(data=1, tensor=1, pipeline=2, microbatches=4, schedule="1f1b", remat="none"),
        "pipeline 2, gpipe": Fix(data=1, tensor=1, pipeline=2, microbatches=8, schedule="gpipe", remat="none"),
    },
    4: {
        "data 4": Fix(data=4, tensor=1, pipeline=1, microbatches=2, remat="none"),
        "pipeline 2 x tensor 2": Fix(data=1, tensor=2, pipeline=2, microbatches=4, schedule="1f1b", remat="none"),
        "pipeline 2 x data 2": Fix(data=2, tensor=1, pipeline=2, microbatches=4, schedule="1f1b", remat="none"),
        "pipeline 4": Fix(data=1, tensor=1, pipeline=4, microbatches=8, schedule="1f1b", remat="none"),
    },
}
LIMITS = {2: 0.15, 4: 0.25}  # of the error of the step time, by ranks
MEMORY_LIMIT = 0.10


class Kind(msgspec.Struct, frozen=True):
    """Seconds of one kind of instruction: the mean over all of that kind on all meshes.

    Where the CPU's are fewer than measured, the rank waited: for another, or for a core that other work had.
    """

    kind: str
    count: int
    predicted_seconds: float
    measured_seconds: float
    cpu_seconds: float  # of one rank, all threads together


class Row(msgspec.Struct, frozen=True):
    """One plan: predicted and measured."""

    ranks: int
    name: str
    predicted_seconds: float
    measured_seconds: float
    measured_low_seconds: float
    measured_high_seconds: float
    pace: float  # of a matmul between the steps: its time over the one predicted
    predicted_bytes: float
    measured_bytes: float
    kinds: tuple[Kind, ...]

    @property
    def error(self) -> float:
        """Predicted over measured step time, less 1."""
        return self.predicted_seconds / self.measured_seconds - 1

    @property
    def memory_error(self) -> float:
        """Predicted over measured peak memory, less 1."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def good(self) -> bool:
        """Whether both errors are within the limits."""
        return (
            abs(self.error) <= LIMITS.get(self.ranks, max(LIMITS.values())) and abs(self.memory_error) <= MEMORY_LIMIT
        )


class Measured(msgspec.Struct, frozen=True):
    """What the ranks saw together: times of the steps, the peak of any device, and mean seconds by kind."""

    step_seconds: tuple[float, ...]
    matmul_seconds: float  # of the fixed matmul, mean over ranks and steps
    peak_bytes: float
    kind_seconds: dict[str, float]
    kind_cpu_seconds: dict[str, float]


def make_plan(cluster: Cluster, fix: Fix) -> Plan:
    """The plan of the demo model that ``fix`` leaves open."""
    from meshwright.models.zoo import get_model
    from meshwright.plan.search import Request, search
    from meshwright.plan.trace.model import trace

    model = get_model(MODEL)
    return search(lambda count: trace(model, BATCH, count).graph, Request(cluster, BATCH, fix))


def run_plan(plan: Plan, steps: int) -> Measured:
    """Run a plan on as many ranks as it has devices."""
    with tempfile.TemporaryDirectory(prefix="closed-loop-") as folder:
        plan_file, out = Path(folder) / "plan.json", Path(folder) / "measured.json"
        save_plan(plan, plan_file)
        command = ["-m", "experiments.closed_loop", "--rank-of", str(plan_file), "--out", str(out)]
        code = launch(plan.devices, [*command, "--steps", str(steps)])
        if code != 0:
            raise SystemExit(code)
        return msgspec.json.decode(out.read_bytes(), type=Measured)


def rank_main(plan: Plan, steps: int, out: Path) -> None:
    """One rank: train, time, and on rank 0 write what all ranks measured."""
    import jax
    import optax

    from meshwright.calibrate.compute import FLOAT32, matmul_call
    from meshwright.calibrate.programs import MATMULS
    from meshwright.calibrate.timing import PACE_SIZE, sample
    from meshwright.execute.process_group import ProcessGroup, guard
    from meshwright.execute.train import build
    from meshwright.models.text import byte_batches
    from meshwright.models.zoo import get_model

    with guard():
        group = ProcessGroup.start(distributed=any(len(stage.devices) > 1 for stage in plan.stages))
        model = get_model(plan.model)
        trainer = build(plan, model, optax.adamw(1e-3), group)
        state = trainer.init(jax.random.key(0))
        batches = byte_batches(model.tokens_per_sample, plan.batch, 0)
        comm = group.communicator
        for _ in range(WARM_STEPS):
            state, _ = trainer.step(state, next(batches))
        seconds, matmuls = [], []
        matmul = matmul_call(PACE_SIZE, FLOAT32)
        matmul()
        for _ in range(steps):
            batch = next(batches)
            comm.Barrier()
            matmuls += sample(matmul, MATMULS)
            comm.Barrier()
            state, metrics = trainer.step(state, batch)
            seconds.append(metrics.step_seconds)
        kinds: list[dict[str, float]] = []
        peak = 0.0
        for clock in (time.perf_counter, time.process_time):
            trainer.runtime.clock = clock
            named = []
            for _ in range(NAMED_STEPS):
                batch = next(batches)
                comm.Barrier()
                state, _ = trainer.step(state, batch, measure=True)
                named.append(seconds_by_kind(trainer.timeline))
                peak = max(peak, *trainer.runtime.peak_bytes.values())
            kinds.append({kind: statistics.median(row[kind] for row in named) for kind in named[0]})
        everyone = comm.gather((seconds, statistics.fmean(matmuls), peak, kinds))
        if everyone is not None:
            measured = Measured(
                tuple(max(each) for each in zip(*(times for times, _, _, _ in everyone), strict=True)),
                statistics.fmean(mean for _, mean, _, _ in everyone),
                max(held for _, _, held, _ in everyone),
                mean_by_kind([wall for _, _, _, (wall, _) in everyone]),
                mean_by_kind([cpu for _, _, _, (_, cpu) in everyone]),
            )
            out.write_bytes(msgspec.json.encode(measured))


def seconds_by_kind(timeline: Timeline) -> dict[str, float]:
    """Mean seconds of each kind of instruction."""
    found: dict[str, list[float]] = {}
    for event in timeline.events:
        found.setdefault(type(event.instruction).__name__, []).append(event.end_seconds - event.start_seconds)
    return {kind: statistics.fmean(seconds) for kind, seconds in found.items()}


def mean_by_kind(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over those rows that know a kind."""
    kinds = dict.fromkeys(kind for row in rows for kind in row)
    return {kind: statistics.fmean(row[kind] for row in rows if kind in row) for kind in kinds}


def compare(name: str, plan: Plan, measured: Measured) -> Row:
    """The run of a plan beside its prediction."""
    from meshwright.calibrate.programs import pace_seconds

    prediction = predict(plan)
    low, middle, high = statistics.quantiles(measured.step_seconds, n=4)
    counts: dict[str, int] = {}
    for event in prediction.timeline.events:
        kind = type(event.instruction).__name__
        counts[kind] = counts.get(kind, 0) + 1
    expected = seconds_by_kind(prediction.timeline)
    return Row(
        ranks=plan.devices,
        name=name,
        predicted_seconds=prediction.predicted.iteration_seconds,
        measured_seconds=middle,
        measured_low_seconds=low,
        measured_high_seconds=high,
        pace=measured.matmul_seconds / pace_seconds(plan.hardware, plan.devices),
        predicted_bytes=prediction.predicted.peak_memory_bytes,
        measured_bytes=measured.peak_bytes,
        kinds=tuple(
            Kind(
                kind, n, expected[kind], measured.kind_seconds.get(kind, 0.0), measured.kind_cpu_seconds.get(kind, 0.0)
            )
            for kind, n in counts.items()
        ),
    )


def table(rows: Sequence[Row]) -> str:
    """Predicted beside measured, in Markdown."""
    head = "ranks, plan, predicted step, measured: median (quartiles), error, pace"
    columns = [*head.split(", "), "predicted peak", "measured", "error"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        low, middle, high = (
            f"{1e3 * x:.1f}" for x in (row.measured_low_seconds, row.measured_seconds, row.measured_high_seconds)
        )
        lines.append(
            f"| {row.ranks} | {row.name} | {1e3 * row.predicted_seconds:.1f} ms | {middle} ms ({low} to {high}) "
            f"| {row.error:+.1%} | {row.pace:.2f} "
            f"| {row.predicted_bytes / 1e6:.1f} MB | {row.measured_bytes / 1e6:.1f} MB | {row.memory_error:+.1%} |"
        )
    return "\n".join(lines)


def kinds_table(rows: Sequence[Row]) -> str:
    """Milliseconds an instruction by kind: predicted, measured, and of the CPU in it; in Markdown."""
    kinds = dict.fromkeys(kind.kind for row in rows for kind in row.kinds)
    lines = ["| ranks | plan | " + " | ".join(kinds) + " |", "|---|---|" + "---|" * len(kinds)]
    for row in rows:
        cells = dict.fromkeys(kinds, "")
        for kind in row.kinds:
            milliseconds = (kind.predicted_seconds, kind.measured_seconds, kind.cpu_seconds)
            cells[kind.kind] = f"{kind.count} x " + " / ".join(f"{1e3 * seconds:.2f}" for seconds in milliseconds)
        lines.append(f"| {row.ranks} | {row.name} | " + " | ".join(cells.values()) + " |")
    return "\n".join(lines)


def calibrate(path: Path, ranks: int) -> None:
    """Measure this machine, its links among so many ranks and whole programs, and write the machine file."""
    from meshwright.calibrate.session import calibrate_machine

    print(f"calibrating for {CALIBRATION_SECONDS:.0f} s", file=sys.stderr)
    save_cluster(calibrate_machine(CALIBRATION_SECONDS, ranks, lambda done, text: None).cluster, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate, plan, run, compare; 1 if a plan misses its limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", metavar="FILE", help="used if it exists, else calibrated and kept there")
    parser.add_argument("--ranks", type=int, nargs="+", choices=sorted(PLANS), default=sorted(PLANS))
    parser.add_argument("--steps", type=int, default=30, metavar="K", help="timed steps of each plan (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument("--rank-of", metavar="PLAN", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.rank_of:
        rank_main(load_plan(args.rank_of), args.steps, Path(args.out))
        return 0
    import jax

    jax.config.update("jax_platforms", "cpu")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="closed-loop-") as folder:
        machine = Path(args.machine) if args.machine else Path(folder) / "machine.json"
        if not machine.exists():
            calibrate(machine, max(args.ranks))
        for ranks in args.ranks:
            cluster = parse_cluster(f"{machine}:{ranks}")
            for name, fix in PLANS[ranks].items():
                print(f"{ranks} ranks, {name}", file=sys.stderr)
                plan = make_plan(cluster, fix)
                rows.append(compare(name, plan, run_plan(plan, args.steps)))
    if args.json:
        print(json.dumps({"model": MODEL, "batch": BATCH, "rows": msgspec.to_builtins(rows)}))
    else:
        print(f"{MODEL}, batch {BATCH}\n\n{table(rows)}\n")
        print(f"Milliseconds of each instruction, predicted / measured / of the CPU:\n\n{kinds_table(rows)}")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
