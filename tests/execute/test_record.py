"""The folder of a run: written, read back, and refused where its files do not belong together."""

from pathlib import Path

import pytest

from meshwright.errors import ExecutionError, PlanError
from meshwright.execute.record import (
    PLAN,
    SUMMARY,
    TIMELINE,
    DeviceEvents,
    device_row,
    read_run,
    together,
    versions,
    write_run,
)
from meshwright.plan.planfile import save_plan
from meshwright.simulate.program import Forward
from meshwright.simulate.timeline import Event
from tests.calibrate.simulated_runs import FOUR_STAGES, TWO_STAGES, machine, planned, run_on


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plan = planned(machine(2), TWO_STAGES)
    run = run_on(plan, plan, noise=0.1)
    write_run(tmp_path / "run", run.plan, run.steps, run.summary)
    return tmp_path / "run"


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    plan = planned(machine(2), TWO_STAGES)
    run = run_on(plan, plan, noise=0.1)
    write_run(tmp_path, run.plan, run.steps, run.summary)
    assert {path.name for path in tmp_path.iterdir()} == {PLAN, TIMELINE, SUMMARY}
    assert read_run(tmp_path) == run


def test_files_of_another_run_are_refused(folder: Path) -> None:
    save_plan(planned(machine(4), FOUR_STAGES), folder / PLAN)
    with pytest.raises(ExecutionError, match="of a run of another plan"):
        read_run(folder)


@pytest.mark.parametrize("name", [TIMELINE, SUMMARY])
@pytest.mark.parametrize(("content", "says"), [(b"{", "is damaged"), (b"", "is damaged"), (None, "cannot be read")])
def test_what_is_damaged_or_missing_is_one_line(folder: Path, name: str, content: bytes | None, says: str) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ExecutionError, match=says) as caught:
        read_run(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_newer_format_is_refused(folder: Path) -> None:
    text = (folder / SUMMARY).read_text().replace('"version": 1', '"version": 2')
    (folder / SUMMARY).write_text(text)
    with pytest.raises(ExecutionError, match="is meshwright-run 2; this Meshwright reads meshwright-run 1"):
        read_run(folder)


def test_a_folder_that_is_no_run_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match="meshwright execute PLAN -o RUN"):
        read_run(tmp_path)
    (tmp_path / PLAN).write_text("{}")
    with pytest.raises(PlanError):
        read_run(tmp_path)


def test_devices_of_a_mesh_run_from_when_all_are_there_until_all_are_done() -> None:
    """device 0: ==========      both: from 2 to 11
    device 1:   =========
    """
    rows = (DeviceEvents(0, 0, (("0F0", 0.0, 10.0),)), DeviceEvents(1, 0, (("0F0", 2.0, 11.0),)))
    assert together(rows, ((0, 1),)).events == (Event(0, Forward(0, 0), 2.0, 11.0),)


def test_devices_that_never_meet_have_no_negative_time() -> None:
    rows = (DeviceEvents(0, 0, (("0F0", 0.0, 1.0),)), DeviceEvents(1, 0, (("0F0", 2.0, 1.5),)))
    (event,) = together(rows, ((0, 1),)).events
    assert event.start_seconds <= event.end_seconds


def test_a_device_and_the_versions_say_what_they_are() -> None:
    assert device_row(3, "NVIDIA H100", "gpu").kind == "NVIDIA H100"
    assert device_row(0, "cpu", "cpu").kind != "cpu"
    assert {"python", "jax", "meshwright"} <= set(versions())
