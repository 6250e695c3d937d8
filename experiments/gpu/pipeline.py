"""Two MPI ranks as a two-stage pipeline that shares one device, predicted and measured.

The ranks take turns on the device, as ranks on a CPU take turns on its cores, and the simulator is told so: one
"core", and how much slower a matmul is while the other rank computes too, measured. Between the ranks arrays go
device → host → MPI → host → device, as the executor sends them; that way is measured too.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from experiments.gpu.cases import Case
from experiments.gpu.timing import MEMORY_FRACTION, limit_of_memory, spread
from meshwright.calibrate.hardware import Cluster, Link, Quantity, load_cluster, save_cluster
from meshwright.errors import ExecutionError
from meshwright.execute.launch import launch

RANKS = 2
MEMORY_EACH = 0.45  # of the device's memory; what is left is for the CUDA contexts
STEPS = 12
WARM_UP_STEPS = 2
ENDING_SECONDS = 8.0  # for ranks to end


@dataclass(frozen=True, slots=True)
class Probe:
    """What two ranks measured of each other; rank 0 writes it as JSON."""

    bytes_sent: tuple[int, ...]
    seconds: tuple[float, ...]  # one way, median; as long as ``bytes_sent``
    alone_seconds: tuple[float, ...]  # one matmul
    together_seconds: tuple[float, ...]  # the same with both ranks at it


def shared_device(cluster: Cluster, probe: Probe, measured: str) -> Cluster:
    """The calibrated machine as two ranks see it that share its one device (or, on a CPU, its cores)."""
    host = cluster.hosts[0]
    if host.share_cores:
        device, cores = host.resized(RANKS).device, host.cores
    else:
        memory = host.device.memory_bytes.scaled(MEMORY_EACH / MEMORY_FRACTION)  # it was calibrated with the latter
        device, cores = msgspec.structs.replace(host.device, memory_bytes=memory), 1
    # Means: a rank that waits for its turn waits in a few long calls, which a median does not see.
    ratio = max(1.0, float(np.mean(probe.together_seconds)) / float(np.mean(probe.alone_seconds)))
    slowdown = Quantity(ratio, f"{measured}, mean time of a matmul on {RANKS} ranks at once over alone")
    shared = msgspec.structs.replace(
        host,
        device=device,
        devices=RANKS,
        cores=cores,
        share_cores=True,
        busy_slowdown=slowdown,
        link=host_staged_link(probe, measured),
    )
    name = f"{cluster.name}, shared by {RANKS} ranks"
    return msgspec.structs.replace(cluster, name=name, hosts=(shared,))


def host_staged_link(probe: Probe, measured: str) -> Link:
    """A fixed part and a rate through the measured transfers, by relative least squares."""
    sizes, seconds = np.array(probe.bytes_sent, float), np.array(probe.seconds)
    columns = np.stack([1 / seconds, sizes / seconds], axis=1)
    fixed, per_byte = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)[0]
    fixed, per_byte = max(float(fixed), 0.0), max(float(per_byte), 1e-15)
    errors = np.abs((fixed + per_byte * sizes) / seconds - 1)
    residual = f"error median {np.median(errors):.0%}, worst {errors.max():.0%} over {len(sizes)} sizes"
    source = f"{measured}, host-staged between {RANKS} ranks; {residual}"
    return Link(bytes_per_second=Quantity(1 / per_byte, source), latency_seconds=Quantity(fixed, source))


def pipeline(case: Case, machine: Path, folder: Path, until: float) -> dict[str, Any]:
    """Probe, plan, run; every command of it is one that a person may type.

    Args:
        folder: for the plan, the machine file and the metrics of each step; it exists.
        until: ``time.monotonic`` at which the job should be over.
    """
    environment = limit_of_memory(dict(os.environ), MEMORY_EACH)
    probe_file = folder / "probe.json"
    code = launch(RANKS, ["-m", "experiments.gpu.probe", str(probe_file)], environment)
    if code != 0 or not probe_file.exists():
        raise ExecutionError(f"the two ranks that measure their link ended with exit code {code}")
    probe = Probe(**json.loads(probe_file.read_text()))
    measured = time.strftime("measured %Y-%m-%d", time.gmtime())
    shared = shared_device(load_cluster(machine), probe, measured)
    machine_file, plan_file, metrics_file = (folder / name for name in ("shared.json", "plan.json", "metrics.jsonl"))
    save_cluster(shared, machine_file)
    fixed = ("pipeline=2", "data=1", "tensor=1")
    plan = _command(
        ["plan", case.model, "--cluster", str(machine_file), "--batch", str(case.batch), "-o", str(plan_file), "--json"]
        + [word for text in fixed for word in ("--fix", text)],
        environment,
        until,
    )
    metrics_file.unlink(missing_ok=True)
    run = _command(
        ["execute", str(plan_file), "--steps", str(STEPS), "--metrics", str(metrics_file), "--json"], environment, until
    )
    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    samples = [row["time_metrics/end_to_end(s)"] for row in rows][WARM_UP_STEPS:]
    host = shared.hosts[0]
    return {
        "plan": {name: plan[name] for name in ("batch", "microbatches", "schedule", "remat", "stages")},
        "predicted": plan["predicted"],
        "measured": spread(samples),
        "executor_peak_bytes": run["peak_memory_bytes"],
        "loss_first": run["loss_first"],
        "loss_last": run["loss_last"],
        "link_bytes_per_second": host.link.bytes_per_second.value,
        "link_latency_seconds": host.link.latency_seconds.value,
        "link_source": host.link.bytes_per_second.source,
        "busy_slowdown": host.slowdown(RANKS),
    }


def _command(words: Sequence[str], environment: Mapping[str, str], until: float) -> dict[str, Any]:
    """Run one command of Meshwright to its JSON; what it says besides goes to our standard error.

    On any other way out it gets SIGTERM, on which it ends its ranks; killed, it would leave them on the device.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "meshwright", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        out, _ = process.communicate(timeout=max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise ExecutionError(f"meshwright {words[0]} did not end in the time of its job; give more --budget") from None
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(ENDING_SECONDS)
    if process.returncode != 0:
        raise ExecutionError(f"meshwright {words[0]} ended with exit code {process.returncode}")
    found: dict[str, Any] = json.loads(out)
    return found
