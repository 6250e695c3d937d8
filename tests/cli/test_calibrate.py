"""``meshwright calibrate`` from outside: its file, its table, its one line when it cannot."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshwright.calibrate.hardware import load_cluster
from meshwright.cli.calibrate import mpi_place, seconds
from meshwright.cli.main import main

COMMAND = (sys.executable, "-m", "meshwright", "calibrate")
TREE = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("text", "value"), [("30", 30.0), ("30s", 30.0), ("2m", 120.0), ("7.5s", 7.5)])
def test_a_budget_is_written_in_seconds_or_minutes(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "s", "soon", "-5s", "0", "nan", "inf", "1s"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        seconds(text)


def test_the_place_in_an_mpi_job_is_read_from_the_environment() -> None:
    assert mpi_place({}) == (0, 0)
    assert mpi_place({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}) == (3, 4)
    assert mpi_place({"PMI_RANK": "1", "PMI_SIZE": "2"}) == (1, 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--out", "no/such/place.json"], "does not exist"),
        (["--ranks", "0"], "at least 1"),
        (["--ranks", "100000"], "at most 16 a core"),
    ],
)
def test_what_cannot_be_met_is_one_line(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", *options]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.mpi
def test_two_ranks_are_measured_and_the_file_can_be_planned_for(tmp_path: Path) -> None:
    out = tmp_path / "machine.json"
    done = subprocess.run(
        [*COMMAND, "--budget", "6s", "--ranks", "2", "--json", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=TREE,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    cluster = load_cluster(out)
    assert cluster.devices == 2
    assert cluster.hosts[0].share_cores
    assert cluster.hosts[0].link.bytes_per_second.value > 1e6
    assert {"matmul f32", "memory-bound", "p2p"} <= {row["family"] for row in told["fits"]}
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]


@pytest.fixture
def children_heed_interrupts() -> Iterator[None]:
    """Background jobs of a shell ignore SIGINT and pass that on to what they start; a handler is not passed on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("children_heed_interrupts")
def test_an_interrupted_run_leaves_its_timings_for_the_next_and_no_machine_file(tmp_path: Path) -> None:
    out = tmp_path / "machine.json"
    process = subprocess.Popen(
        [*COMMAND, "--budget", "60s", "--ranks", "1", "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=TREE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    partial = tmp_path / "machine.json.partial"
    process.stderr.readline()  # the first line of progress: the worker is at it
    while partial.read_text().count("\n") < 4:
        time.sleep(0.05)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert time.monotonic() - start < 30
    assert list(tmp_path.iterdir()) == [partial]
    kept = {line for line in partial.read_text().splitlines() if '"measured"' in line}
    assert len(kept) >= 3
    again = subprocess.run(
        [*COMMAND, "--budget", "5s", "--ranks", "1", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=TREE,
    )
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stderr
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_agree_within_the_ranges_that_they_state(tmp_path: Path) -> None:
    """Generous: of all ranged numbers of the device, four in five overlap; and each run keeps its budget."""
    budget_seconds = 60
    found = []
    for name in ("first", "second"):
        out = tmp_path / f"{name}.json"
        start = time.monotonic()
        command = [*COMMAND, "--budget", f"{budget_seconds}s", "--ranks", "1", "--out", str(out)]
        subprocess.run(command, capture_output=True, timeout=400, check=True, cwd=TREE)
        assert time.monotonic() - start < 1.25 * budget_seconds
        device = load_cluster(out).hosts[0].device
        numbers = {f"{dtype} flops": rate for dtype, rate in device.flops_per_second.items()}
        for field in ("matmul_efficiency", "memory_bytes_per_second", "launch_seconds", "dispatch_seconds"):
            numbers[field] = getattr(device, field)
        found.append(numbers)
    first, second = found
    assert first.keys() == second.keys()
    apart = []
    for name in first:
        lows, highs = zip(*((each[name].low, each[name].high) for each in found), strict=True)
        assert None not in lows + highs, name
        if max(lows) > min(highs):
            apart.append(name)
    assert len(apart) <= len(first) // 5, apart
