"""``meshwright calibrate --from RUN`` as a user starts it, on runs that were simulated and on one that was real."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from meshwright.calibrate.hardware import load_cluster, save_cluster
from meshwright.cli.main import main
from meshwright.execute.record import read_run, write_run
from tests.calibrate.simulated_runs import FOUR_STAGES, machine, planned, run_on, slower_device, slower_link


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose link is three times and whose devices are 1.4 times as slow as the plan's machine file says."""
    plan = planned(machine(4), FOUR_STAGES)
    truth = planned(slower_link(slower_device(machine(4), 1.4), 3.0), FOUR_STAGES)
    found = run_on(truth, plan, noise=0.03)
    write_run(tmp_path / "run", found.plan, found.steps, found.summary)
    return tmp_path / "run"


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["calibrate", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_report_and_the_corrected_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "machine.json"
    assert main(["calibrate", "--from", str(run), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "1. " in text
    assert "wire of host 0" in text
    before, after = machine(4).hosts[0], load_cluster(out).hosts[0]
    assert after.link.bytes_per_second.value == pytest.approx(before.link.bytes_per_second.value / 3, rel=0.05)
    assert after.device.matmul_efficiency.value == pytest.approx(0.5 / 1.4, rel=0.06)
    assert "from run, 2026-11-23; before:" in after.link.bytes_per_second.source


def test_json_is_one_object_with_the_error_before_and_after(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--from", str(run), "--out", str(tmp_path / "machine.json"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["number"] for row in told["corrections"]} >= {"wire of host 0", "matmul of host 0"}
    assert {"latency of host 0"} <= {row["number"] for row in told["kept"]}
    (one,) = told["runs"]
    assert one["error_fraction_before"] < -0.25
    assert abs(one["error_fraction_after"]) < 0.03
    assert one["groups"][0]["verdict"] == "out of the file's range"


def test_runs_of_one_file_correct_it_together_and_of_two_files_do_not(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "machine.json", tmp_path / "again"
    plan = planned(machine(4), FOUR_STAGES)
    truth = planned(slower_link(slower_device(machine(4), 1.4), 3.0), FOUR_STAGES)
    second = run_on(truth, plan, noise=0.03, seed=1)
    write_run(again, second.plan, second.steps, second.summary)
    assert main(["calibrate", "--from", str(run), str(again), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("with the corrected file the step is predicted at") == 2
    assert "from run, again, 2026-11-23" in load_cluster(out).hosts[0].link.bytes_per_second.source
    other = planned(slower_link(machine(4), 2.0), FOUR_STAGES)
    found = run_on(other, other)
    write_run(tmp_path / "other", found.plan, found.steps, found.summary)
    assert "one machine file together" in failed(capsys, "--from", str(run), str(tmp_path / "other"), "--out", str(out))


def test_a_run_given_twice_counts_once_and_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failed(capsys, "--from", str(run), str(run), "--out", str(tmp_path / "machine.json"))
    assert "was given already" in error


def test_a_run_without_a_timed_step_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_run(run)
    write_run(run, found.plan, found.steps, msgspec.structs.replace(found.summary, step_seconds=()))
    assert "no step that took any time" in failed(capsys, "--from", str(run), "--out", str(tmp_path / "machine.json"))


def test_the_model_that_nobody_knows_has_its_rates_corrected_as_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_run(run)
    plan = msgspec.structs.replace(found.plan, fingerprint="0" * 16)
    again = run_on(planned(slower_device(machine(4), 1.4), FOUR_STAGES), plan)
    write_run(tmp_path / "other", plan, again.steps, again.summary)
    assert main(["calibrate", "--from", str(tmp_path / "other"), "--out", str(tmp_path / "m.json"), "--json"]) == 0
    told = capsys.readouterr()
    assert "corrected as one" in told.err
    assert [row["number"] for row in json.loads(told.out)["corrections"]] == ["compute of host 0"]


def test_a_file_of_another_machine_is_not_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "machine.json"
    device = msgspec.structs.replace(machine(4).hosts[0].device, name="another device")
    host = msgspec.structs.replace(machine(4).hosts[0], device=device)
    other = msgspec.structs.replace(machine(4), name="another", hosts=(host,))
    save_cluster(other, out)
    assert "give another --out" in failed(capsys, "--from", str(run), "--out", str(out))
    assert load_cluster(out) == other


def test_what_is_no_run_or_no_place_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "meshwright execute PLAN -o RUN" in failed(capsys, "--from", str(tmp_path / "absent"))
    assert "does not exist" in failed(capsys, "--from", str(run), "--out", str(tmp_path / "no" / "m.json"))
    assert "leave out --ranks" in failed(capsys, "--from", str(run), "--ranks", "2")


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_run_corrects_the_shipped_cpu(tmp_path: Path) -> None:
    """Nobody measured this machine for the shipped file; after one run of a plan, the plan's step is known."""

    def meshwright(*arguments: str) -> str:
        command = [sys.executable, "-m", "meshwright", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    model = "gpt:layers=4,hidden=128,heads=4,seq=64,vocab=256"
    fixed = ["--fix", "pipeline=2", "--fix", "microbatches=4", "--fix", "data=1", "--fix", "tensor=1"]
    meshwright("plan", model, "--cluster", "cpu:2", "--batch", "16", "-o", "plan.json", *fixed)
    meshwright("execute", "plan.json", "-o", "run", "--steps", "20", "--quiet")
    told = json.loads(meshwright("calibrate", "--from", "run", "--out", "machine.json", "--json"))["runs"][0]
    assert abs(told["error_fraction_after"]) < 0.35
    assert abs(told["error_fraction_after"]) <= abs(told["error_fraction_before"]) + 0.05
    assert load_cluster(tmp_path / "machine.json").devices == 2
    again = meshwright(
        "plan", model, "--cluster", "machine.json", "--batch", "16", "-o", "again.json", *fixed, "--json"
    )
    replanned = json.loads(again)["predicted"]["iteration_seconds"]
    assert replanned == pytest.approx(told["corrected_step_seconds"], rel=0.1)
