"""The report of a fault: what it holds, and where it goes."""

import tempfile
from pathlib import Path

import pytest

from meshwright.cli.fault import fault_report, write_fault_log


def a_fault() -> ValueError:
    try:
        raise ValueError("two stages on one device")
    except ValueError as error:
        return error


def test_the_report_holds_command_versions_and_traceback() -> None:
    report = fault_report(a_fault(), ["plan", "my model"])
    assert "command: meshwright plan 'my model'\n" in report
    assert "\njax: " in report
    assert "\nnumpy: " in report
    assert "in a_fault" in report
    assert report.endswith("ValueError: two stages on one device\n")


def test_a_report_never_overwrites_another(tmp_path: Path) -> None:
    paths = [write_fault_log(a_fault(), [], tmp_path) for _ in range(3)]
    assert paths == [tmp_path / f"meshwright-fault-{number}.log" for number in (1, 2, 3)]


def test_a_folder_that_cannot_be_written_gives_way_to_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert write_fault_log(a_fault(), [], tmp_path / "missing") == tmp_path / "meshwright-fault-1.log"


def test_with_no_folder_at_all_there_is_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "missing"))
    assert write_fault_log(a_fault(), [], tmp_path / "missing") is None
