"""``meshwright simulate`` on bare schedules: its numbers, its files and its refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.cli.main import main

BARE = ["simulate", "--schedule", "1f1b", "--stages", "8", "--microbatches", "32"]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert err == ""
    return json.loads(out)


def test_one_json_object_holds_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, *BARE, "--times", "F=1,I=1,W=1") == {
        "makespan_seconds": 117,
        "span_seconds": 117,
        "peak_activations": [8, 7, 6, 5, 4, 3, 2, 1],
        "bubble_fraction": pytest.approx(21 / 117),
    }


def test_hops_and_uneven_times_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """(M + S - 1)(F + B) + 2c[M(S - 1)/S + S - 2] with F = 2, B = 1.5 and c = 0.25."""
    data = answer(capsys, *BARE, "--times", "F=2,W=0.5", "--hop", "0.25")
    assert data["makespan_seconds"] == 39 * 3.5 + 0.5 * (28 + 6)


def test_show_adds_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--schedule", "gpipe", "--lifo", "--stages", "2", "--microbatches", "2", "--show"]
    assert answer(capsys, *arguments)["program"] == ["0F0 0F1 0B1 0B0", "1F0 1F1 1B1 1B0"]
    assert main(arguments) == 0
    assert "device 1: 1F0 1F1 1B1 1B0" in capsys.readouterr().out


def test_a_person_reads_where_the_time_goes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BARE, "--hop", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "step time    151 s" in out
    assert "critical     forward 39 s, transfer 34 s, backward 78 s" in out
    assert "activations  8 7 6 5 4 3 2 1" in out


def test_trace_and_picture_are_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace, picture = tmp_path / "t.json", tmp_path / "p.png"
    assert main([*BARE, "--trace", str(trace), "--plot", str(picture)]) == 0
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give a PLAN or a --program, or for a bare schedule also --schedule, --stages, --microbatches"),
        (["--schedule", "1f1b"], 2, "also --stages, --microbatches"),
        (["plan.json", "--schedule", "1f1b"], 2, "leave out --schedule"),
        (["gpt-2.6b"], 2, "gpt-2.6b is no file but a model; give --cluster and --batch too"),
        ([*BARE[1:], "--times", "F=1,Q=2"], 2, "'Q=2' is not one of F=, I=, W="),
        ([*BARE[1:], "--times", "F=-1"], 2, "'-1' is negative"),
        ([*BARE[1:], "--hop", "nan"], 2, "negative or not finite"),
        ([*BARE[1:], "--lifo"], 1, "--lifo is a variant of gpipe, not of 1f1b"),
        (["--schedule", "zb", "--stages", "2", "--microbatches", "2"], 1, "schedule 'zb' is unknown"),
        (["--schedule", "1f1b", "--stages", "0", "--microbatches", "2"], 1, "0 stages was asked for"),
        ([*BARE[1:], "--plot", "picture.exe"], 1, "use .png, .svg or .pdf"),
        (["no-such-plan.json"], 1, "no-such-plan.json"),
    ],
)
def test_wrong_input_ends_with_one_line_that_says_what_to_change(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.splitlines()[-1].startswith("meshwright")
