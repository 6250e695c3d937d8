"""The table of rivals and its command."""

import json
from pathlib import Path

import pytest

from experiments.rivals.__main__ import main
from experiments.rivals.report import Row, table

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "rivals").exists(), reason="rivals' plans are not beside us")


def test_the_table_shows_what_is_known_and_a_dash_for_the_rest() -> None:
    lines = table([Row("Rival", "a case", 1.25, 1.0, our_search_seconds=0.5)]).splitlines()
    assert lines[0].split() == "rival case theirs repriced ours measured their search our search".split()
    assert lines[1].split() == ["Rival", "a", "case", "1.25", "–", "1", "–", "–", "0.5"]


def test_missing_data_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--only", "galvatron"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hardware.json" in captured.err
    assert len(captured.err.splitlines()) == 1


@needs_data
def test_the_command_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(DATA), "--only", "galvatron", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["rival"] for row in rows] == ["Galvatron", "Galvatron"]
    for row in rows:
        assert row["repriced_seconds"] == pytest.approx(row["theirs_seconds"], rel=1e-12)
        assert row["ours_seconds"] <= row["theirs_seconds"] * (1 + 1e-12)
