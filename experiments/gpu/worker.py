"""The process of one job: ``measure`` starts it with a limit, and reads the JSON that it leaves.

A process each, so that a crash, a lack of memory or a hang costs one job, and the allocator's peak is of one model.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.gpu.cases import PHASES, PREPARE, TINY_PIPELINE_CASE, Case

ENDING_SECONDS = 5.0  # of a job's limit, for writing results and leaving
LEAST_CALIBRATE_SECONDS = 5.0


def main(arguments: list[str]) -> int:
    """Do one job and write its result, whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=(PREPARE, *PHASES))
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True, help="seconds")
    parser.add_argument("--machine", type=Path, required=True, help="written by calibrate, read by the others")
    parser.add_argument("--model", default="")
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--variant", default="")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    until = time.monotonic() + max(1.0, args.limit - ENDING_SECONDS)
    result = do(args, until)
    partial = args.result.with_name(args.result.name + ".partial")
    partial.write_text(json.dumps(result, allow_nan=False))
    os.replace(partial, args.result)
    return 0


def do(args: argparse.Namespace, until: float) -> dict[str, Any]:
    """The job that the arguments name; imports come late, since each needs other packages."""
    case = Case(args.model, args.batch)
    if args.phase == PREPARE:
        return prepare()
    if args.phase == "calibrate":
        return calibrate(args.machine, until)
    if args.phase == "train":
        from experiments.gpu.train import train

        return train(case, args.machine, until)
    if args.phase == "mfu":
        from experiments.gpu.mfu import train_plainly

        machine = args.machine if args.machine.exists() else None
        return train_plainly(case, args.microbatches, args.variant, machine, until)
    from experiments.gpu.pipeline import pipeline

    with tempfile.TemporaryDirectory(prefix="meshwright-gpu-") as folder:
        return pipeline(case, args.machine, Path(folder), until)


def prepare() -> dict[str, Any]:
    """Plan a tiny pipeline on the CPU: what Numba compiles for it lies in its cache when other jobs plan."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from meshwright.api import find_plan
    from meshwright.models.zoo import get_model
    from meshwright.plan.search import Fix

    began, case = time.monotonic(), TINY_PIPELINE_CASE
    fix = Fix(pipeline=2, data=1, tensor=1, microbatches=2)
    find_plan(get_model(case.model), cluster="cpu:2", batch_size=case.batch, fix=fix)
    return {"seconds": time.monotonic() - began}


def calibrate(machine: Path, until: float) -> dict[str, Any]:
    """Measure the device within the time that is left; the file holds all numbers, the result the few of the table."""
    from meshwright.calibrate.hardware import Quantity, save_cluster
    from meshwright.calibrate.session import calibrate_machine

    def say(done: float, text: str) -> None:
        print(f"{done:4.0%} {text}", file=sys.stderr, flush=True)

    budget_seconds = max(LEAST_CALIBRATE_SECONDS, until - time.monotonic())
    calibration = calibrate_machine(budget_seconds, 1, say)
    save_cluster(calibration.cluster, machine)
    device = calibration.cluster.hosts[0].device
    names = ("matmul_efficiency", "memory_bytes_per_second", "launch_seconds", "dispatch_seconds", "memory_bytes")
    quantities: dict[str, Quantity] = {name: getattr(device, name) for name in names}
    quantities |= {f"{dtype}_flops_per_second": rate for dtype, rate in device.flops_per_second.items()}
    return {
        "device": device.name,
        "quantities": {
            name: {"value": q.value, "low": q.low, "high": q.high, "source": q.source} for name, q in quantities.items()
        },
        "notes": list(calibration.cluster.notes),
    }


def _interrupt(number: int, frame: FrameType | None) -> None:
    """``measure`` ends a job that is late with SIGTERM; what the job started is ended on the way out."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
