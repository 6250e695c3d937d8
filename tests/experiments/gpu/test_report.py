"""Tables come from results alone, and the page of the documents holds those of every committed result."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments.gpu import report
from experiments.gpu.cases import Case
from experiments.gpu.mfu import train_plainly
from experiments.gpu.train import train
from meshwright.calibrate.hardware import parse_cluster, save_cluster

TINY = Case("gpt:layers=1,hidden=16,heads=2,seq=8,vocab=32", 2)


def test_the_page_is_what_the_committed_results_say() -> None:
    page = report.PAGE.read_text("utf-8")
    assert page == report.renewed(page, report.page_part(report.committed())), "run python -m experiments.gpu.report"


def test_no_committed_result_is_of_tiny_models_or_of_a_cpu() -> None:
    for folder in report.committed():
        results = json.loads((folder / "results.json").read_text("utf-8"))
        assert not results["tiny"], folder.name
        assert all(run["environment"]["gpu"] for run in results["runs"]), folder.name


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the marks"):
        report.renewed("some page", "part")


def results_of(jobs: dict[str, Any]) -> dict[str, Any]:
    machine = {"gpu": [], "cores": 2, "python": "3.12", "versions": {"jax": "0.11"}, "commit": None}
    runs = [{"date": "2026-01-02 03:04 UTC", "command": "python -m experiments.gpu.measure", "environment": machine}]
    return {"tiny": True, "runs": runs, "jobs": jobs}


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """Most of the test would be XLA's optimisation of programs that run for a millisecond."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compilation")
def test_a_real_training_on_this_cpu_becomes_a_page(tmp_path: Path) -> None:
    """Both trainings start from the same weights and batch, so their first losses agree."""
    machine, until = tmp_path / "machine.json", time.monotonic() + 1
    save_cluster(parse_cluster("cpu:1"), machine)
    ours, plain = train(TINY, machine, until), train_plainly(TINY, 1, "xla", machine, until)
    assert ours["loss_first"] == pytest.approx(plain["loss_first"], rel=1e-4)
    assert ours["model_flops"] == plain["model_flops"] > 0
    jobs = {
        f"train {TINY.model}": {"status": "done", "result": json.loads(json.dumps(ours, allow_nan=False))},
        f"mfu {TINY.model} xla": {"status": "done", "result": json.loads(json.dumps(plain, allow_nan=False))},
        f"pipeline {TINY.model}": {"status": "skipped", "reason": "needs mpi4py"},
    }
    folder = tmp_path / "2026-01-02-cpu"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results_of(jobs)))
    page = report.renewed(f"before\n{report.BEGIN}old{report.END}\nafter\n", report.page_part([folder]))
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "### 2026-01-02-cpu" in page
    assert "Tiny models, made to try the script: these figures mean nothing." in page
    predicted = f"{ours['predicted']['iteration_seconds'] * 1e3:.4g}"
    assert f"| {TINY.model}, batch 2 | 1, none | {predicted} | " in page
    assert "plain JAX" in page
    assert f"- pipeline {TINY.model}: skipped, needs mpi4py" in page


def test_errors_are_of_the_prediction_over_what_was_measured() -> None:
    found = {
        "plan": {"batch": 16, "microbatches": 4, "schedule": "1f1b"},
        "predicted": {"iteration_seconds": 0.09, "peak_memory_bytes": 30e9},
        "measured": {"median_seconds": 0.1, "low_seconds": 0.099, "high_seconds": 0.102, "steps": 10},
        "executor_peak_bytes": 29e9,
        "link_bytes_per_second": 8e9,
        "link_latency_seconds": 50e-6,
        "busy_slowdown": 2.0,
    }
    text = report.markdown(results_of({"pipeline gpt-350m": {"status": "done", "result": found}}))
    assert "| gpt-350m, batch 16 | 4, 1f1b | 90 | 100 (99 to 102) | -10.0% | 30 | 29 | 8 GB/s, 50 µs | 2.00 |" in text
