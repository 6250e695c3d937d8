"""What whole programs take beside the sum of their kernels: models trained for some steps on one device.

A stage's program is more than its kernels: the executor hands arrays in and out, XLA turns layouts between products,
and a kernel finds its input where the last one left it. So some small models, none of which anybody trains, run
through the executor itself; what each phase of their step takes is fitted against what the planner prices for it.
Times are those of the CPU, not of the wall, and each step's are scaled by how much slower than priced a matmul runs
just before and after it, so that other work on the machine counts little.
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median

import msgspec
import numpy as np

from meshwright.calibrate.device import PHASES
from meshwright.calibrate.fit import fit_rate
from meshwright.calibrate.hardware import Cluster, Device, ProgramFit, Quantity, load_cluster, save_cluster
from meshwright.calibrate.session import worker_environment
from meshwright.calibrate.timing import PACE_SIZE
from meshwright.errors import ExecutionError

FORWARD, BACKWARD, ONCE = PHASES
MICROBATCHES = 2
WARM_STEPS = 2
STEPS = 10
LEAST = 3  # references that a fit needs
MATMULS = 15  # between two steps


class Reference(msgspec.Struct, frozen=True):
    """A model that is run, and how many of its sequences make a batch."""

    model: str
    batch: int


# Little work and much, one layer and several, long and short sequences, wide and narrow heads.
REFERENCES = (
    Reference("gpt:layers=1,hidden=32,heads=2,seq=16,vocab=64", 2),
    Reference("gpt:layers=1,hidden=192,heads=3,seq=96,vocab=256", 8),
    Reference("gpt:layers=1,hidden=320,heads=10,seq=192,vocab=512", 4),
    Reference("gpt:layers=1,hidden=384,heads=6,seq=64,vocab=1024", 16),
    Reference("gpt:layers=3,hidden=128,heads=4,seq=64,vocab=256", 8),
    Reference("gpt:layers=6,hidden=192,heads=6,seq=32,vocab=512", 16),
)


class Step(msgspec.Struct, frozen=True):
    """Seconds of each phase of one reference: as priced, and as measured at the speed that was priced.

    Also what its backward needs while it runs: alive at once by the planner's count, and as the compiler says.
    """

    model: str
    priced_seconds: dict[str, float]
    measured_seconds: dict[str, float]
    counted_bytes: float
    temporary_bytes: float


def measure_reference(cluster: Cluster, reference: Reference) -> Step:
    """Train a reference on the first device, with the executor, and time the phases of its steps.

    Args:
        cluster: one device, without ``programs``.
    """
    import jax
    import optax

    from meshwright.calibrate.compute import FLOAT32, matmul_call
    from meshwright.execute.train import build
    from meshwright.models.zoo import get_model
    from meshwright.plan.search import Fix, Request, search
    from meshwright.plan.trace.model import trace

    model = get_model(reference.model)
    fix = Fix(microbatches=MICROBATCHES, data=1, tensor=1, pipeline=1, remat="none", schedule="1f1b")
    request = Request(cluster, reference.batch, fix)
    plan = search(lambda count: trace(model, reference.batch, count).graph, request)
    (stage,) = plan.stages
    trainer = build(plan, model, optax.adamw(1e-3))
    state = trainer.init(jax.random.key(0))
    shapes = model.batch_fn(reference.batch)
    rng = np.random.default_rng(0)
    matmul = matmul_call(PACE_SIZE, FLOAT32)
    trainer.runtime.clock = time.process_time
    programs = trainer.runtime.programs[0]
    names = {"Forward": FORWARD, "Backward": BACKWARD, "Reduce": ONCE, "Update": ONCE}
    times: dict[str, list[float]] = {FORWARD: [], BACKWARD: [], ONCE: []}
    price = pace_seconds(cluster)
    before = fmean(cpu_seconds(matmul, MATMULS))
    for number in range(WARM_STEPS + STEPS):
        batch = jax.tree.map(lambda shape: rng.integers(0, 2, shape.shape).astype(shape.dtype), shapes)
        state, _ = trainer.step(state, batch, measure=True)
        cleared = cpu_seconds(lambda: jax.block_until_ready(programs.zeros()), 1)
        after = fmean(cpu_seconds(matmul, MATMULS))
        speed, before = 2 * price / (before + after), after
        if number >= WARM_STEPS:
            sums = dict.fromkeys(times, 0.0)
            for event in trainer.timeline.events:
                sums[names[type(event.instruction).__name__]] += event.end_seconds - event.start_seconds
            times[FORWARD].append(speed * sums[FORWARD] / MICROBATCHES)
            times[BACKWARD].append(speed * sums[BACKWARD] / MICROBATCHES)
            times[ONCE].append(speed * (sums[ONCE] + cleared[0]))
    return Step(
        model=reference.model,
        priced_seconds={
            FORWARD: stage.forward_compute_seconds,
            BACKWARD: stage.backward_compute_seconds,
            ONCE: stage.update_seconds,
        },
        measured_seconds={phase: median(seconds) for phase, seconds in times.items()},
        counted_bytes=stage.transient_bytes,
        temporary_bytes=programs.backward_temp_bytes,
    )


def pace_seconds(cluster: Cluster, busy_ranks: int = 1) -> float:
    """What the machine file says the matmul between steps takes, with so many ranks of the first host at it.

    As it was measured through the calibration, or as it is priced where that was not done.
    """
    device = cluster.device(0)
    alone = device.pace_seconds.value if device.pace_seconds is not None else _priced(device)
    return cluster.hosts[0].slowdown(busy_ranks) * alone


def _priced(device: Device) -> float:
    rate = device.peak_flops("f32") * device.matmul_efficiency.value
    return 2.0 * PACE_SIZE**3 / rate + device.launch_seconds.value


def cpu_seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """CPU time of each call, all threads together: a rank that waits for its turn on a core spends none."""
    samples = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        samples.append(time.process_time() - start)
    return samples


def fit_phases(steps: Sequence[Step], dispatch_seconds: float, measured: str) -> dict[str, ProgramFit]:
    """A fixed part and a slowdown for each phase that took any time.

    The fixed part is beside the one dispatch that is priced for every program.
    """
    fits = {}
    for phase in PHASES:
        known = [step for step in steps if step.measured_seconds[phase] > 0]
        if len({step.priced_seconds[phase] for step in known}) < 2:
            continue
        fit = fit_rate(
            [step.priced_seconds[phase] for step in known],
            [step.measured_seconds[phase] for step in known],
            f"{measured}, {phase} of {len(known)} models against the sum of their kernels",
        )
        fits[phase] = ProgramFit(
            fixed_seconds=_less(fit.fixed_seconds, dispatch_seconds),
            slowdown=_inverse(fit.amount_per_second),
            temporaries=fit_temporaries(known, measured) if phase == BACKWARD else None,
        )
    return fits


def fit_temporaries(steps: Sequence[Step], measured: str) -> Quantity | None:
    """Bytes that backwards need while they run over those that the planner counts: the median, and the extremes."""
    ratios = [
        step.temporary_bytes / step.counted_bytes for step in steps if step.counted_bytes and step.temporary_bytes
    ]
    if not ratios:
        return None
    source = f"{measured}, temporaries of {len(ratios)} backwards as compiled against what is live at once"
    return Quantity(median(ratios), source, min(ratios), max(ratios))


def _less(quantity: Quantity, seconds: float) -> Quantity:
    low, value, high = (
        max(0.0, number - seconds)
        for number in (quantity.low or quantity.value, quantity.value, quantity.high or quantity.value)
    )
    return Quantity(value, quantity.source, low, high)


def _inverse(quantity: Quantity) -> Quantity:
    low, high = quantity.low or quantity.value, quantity.high or quantity.value
    return Quantity(1 / quantity.value, quantity.source, 1 / high, 1 / low)


def with_programs(cluster: Cluster, budget_seconds: float = math.inf) -> Cluster:
    """The cluster of one CPU host with ``programs`` measured on one rank of it, in a process of its own.

    Within a budget as many references are measured as there is time for; of fewer than ``LEAST``, nothing is told and
    the cluster stays as it is.

    Raises:
        ExecutionError: the measuring process failed.
    """
    deadline = time.time() + budget_seconds
    host = cluster.hosts[0]
    bare = msgspec.structs.replace(host.device, programs={})
    one = msgspec.structs.replace(cluster, hosts=(msgspec.structs.replace(host, device=bare).resized(1),))
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        machine = Path(folder) / "machine.json"
        save_cluster(one, machine)
        out = Path(folder) / "steps.json"
        command = [sys.executable, "-m", "meshwright.calibrate.programs", str(machine), str(out), str(deadline)]
        environment = {**worker_environment(os.environ), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = [line.strip() for line in done.stderr.splitlines() if line.strip()][-1:] or ["it said nothing"]
            raise ExecutionError(f"measuring programs failed with exit code {done.returncode} ({last[0]})")
        steps = msgspec.json.decode(out.read_bytes(), type=list[Step])
    if len(steps) < LEAST:
        return cluster
    measured = f"measured {time.strftime('%Y-%m-%d', time.gmtime())}"
    device = msgspec.structs.replace(bare, programs=fit_phases(steps, bare.dispatch_seconds.value, measured))
    return msgspec.structs.replace(cluster, hosts=(msgspec.structs.replace(host, device=device),))


def main(machine: str, out: str, deadline: str) -> int:
    """Measure references on the machine of this file while there is time for one like the longest; write the steps."""
    cluster, steps, longest = load_cluster(machine), [], 0.0
    for reference in REFERENCES:
        start = time.time()
        if start + longest > float(deadline):
            break
        steps.append(measure_reference(cluster, reference))
        longest = max(longest, time.time() - start)
    Path(out).write_bytes(msgspec.json.encode(steps))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
