"""The whole script on this CPU, with tiny models: every phase in processes of its own."""

import json
from pathlib import Path

import pytest

from experiments.gpu import measure, worker


@pytest.mark.slow
@pytest.mark.mpi
def test_every_phase_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # half the time is XLA's
    assert measure.main(["--out", str(tmp_path), "--tiny", "--budget", "290s"]) == 0, (tmp_path / "log.txt").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert {job["status"] for job in results["jobs"].values()} == {"done"}
    assert len(list(tmp_path.iterdir())) <= 8  # as many files as come back from a lent machine
    text = (tmp_path / "results.json").read_text() + (tmp_path / "log.txt").read_text()
    assert str(measure.ROOT) not in text


def test_a_job_without_its_machine_file_leaves_no_result(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    words = ["train", "--result", str(result), "--limit", "9", "--machine", str(tmp_path / "none.json")]
    with pytest.raises(ValueError, match=r"none\.json"):
        worker.main([*words, "--model", "gpt-125m", "--batch", "1"])
    assert not result.exists()
