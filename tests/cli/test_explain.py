"""``meshwright explain`` as a user starts it."""

import json
from pathlib import Path

import pytest

from meshwright.cli.main import main

PLAN = ["plan", "gpt:layers=4,hidden=64,heads=4,seq=32,vocab=256", "--cluster", "p3.16xlarge:1", "--batch", "16"]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("plans")
    grid, data = folder / "grid.json", folder / "data.json"
    fixed = ["--fix", "microbatches=4", "--fix", "remat=none"]
    assert main([*PLAN, *fixed, "--fix", "tensor=4", "--fix", "pipeline=2", "-o", str(grid)]) == 0
    assert main([*PLAN, *fixed, "--fix", "data=8", "--fix", "pipeline=1", "-o", str(data)]) == 0
    return grid, data


def test_text_and_picture(plans: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    assert main(["explain", str(plans[0]), "--against", str(plans[1]), "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    for part in ("where the time goes", "what moves inside stages", "what fills a device", "how layers are split"):
        assert part in text
    assert f"than {plans[0]}" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_adds_up(plans: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(plans[0]), "--against", str(plans[1]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(told["path_seconds"].values()) == pytest.approx(told["step_seconds"])
    apart = told["against"]["step_seconds"] - told["step_seconds"]
    assert sum(row["against_seconds"] - row["seconds"] for row in told["differences"]) == pytest.approx(apart)
    assert told["stages"][0]["collectives"][0]["kind"] == "all_reduce"
    assert {row["stage"] for row in told["layers"]} == {0, 1}


def test_an_unknown_model_still_has_its_time_told(
    plans: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    text = plans[0].read_text(encoding="utf-8")
    other.write_text(text.replace('"model": "gpt:', '"model": "nobody:'), encoding="utf-8")
    assert main(["explain", str(other)]) == 0
    told = capsys.readouterr()
    assert "where the time goes" in told.out
    assert "how layers are split" not in told.out
    assert told.err.count("\n") == 1


def test_no_plan_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
