"""Real ranks: arrays go between unequal meshes exactly, and a rank's failure is everybody's, shown once."""

import time
from pathlib import Path

import pytest

from meshwright.execute.launch import launch

RANKS = Path(__file__).parent / "ranks"

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_an_array_goes_from_one_rank_to_three_and_back_exactly(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(4, [str(RANKS / "reshard.py")]) == 0, capfd.readouterr().err
    shown = capfd.readouterr()
    assert sorted(shown.out.splitlines()) == [f"rank {rank}: exact" for rank in range(4)]
    assert "[Gloo]" not in shown.err


@pytest.mark.parametrize(
    ("how", "ranks", "code", "last_line"),
    [
        ("one", 4, 1, "meshwright: rank 2: the wheel came off"),
        ("bug", 2, 3, "meshwright: rank 1: KeyError: 'the wheel came off'"),
        ("differ", 3, 1, "the plan of rank 1 differs from that of rank 0"),
    ],
)
def test_a_failing_rank_ends_the_job_and_says_why_once(
    how: str, ranks: int, code: int, last_line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    assert launch(ranks, [str(RANKS / "fail.py"), how]) == code
    assert time.monotonic() - started < 20
    error = capfd.readouterr().err
    assert last_line in error.splitlines()[-1]
    assert error.count("meshwright: ") == 1
    assert "MPI_ABORT" not in error
    assert "\0" not in error
    if code == 1:
        assert len(error.splitlines()) == 1


def test_what_mpiexec_says_of_a_killed_rank_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, [str(RANKS / "fail.py"), "killed"]) == 137
    assert "signal 9" in capfd.readouterr().err
