"""``meshwright plan``: what it prints, and the one line that each wrong request gets."""

import json
from pathlib import Path

import pytest

from meshwright.calibrate.hardware import cluster_to_data, parse_cluster
from meshwright.cli.main import main
from meshwright.cli.plan import fallback_path, parse_fixes, parse_schedules
from meshwright.errors import PlanError
from meshwright.plan.planfile import load_plan
from meshwright.plan.schedule_rules import ALL_SCHEDULES, RUNNABLE
from meshwright.plan.search import Fix

TINY = "gpt:layers=2,hidden=32,heads=2,seq=16,vocab=256"


@pytest.fixture(scope="module")
def tiny_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["plan", TINY, "--cluster", "cpu:2", "--batch", "4", "-o", str(path), "--fix", "pipeline=2"]) == 0
    return path


def test_the_json_has_the_fields_of_the_contract_and_nothing_else_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", TINY, "--cluster", "cpu:2", "--batch", "4", "--fix", "microbatches=2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["microbatches"] == 2
    assert {"model", "cluster", "batch", "schedule", "remat", "stages", "predicted", "search", "rivals"} <= set(data)
    assert {"layers", "devices", "mesh", "forward_seconds", "backward_seconds", "peak_memory_bytes"} <= set(
        data["stages"][0]
    )
    assert data["predicted"]["fits"] is True
    assert data["predicted"]["iteration_seconds"] > 0


def test_the_plan_file_is_what_was_asked_for(tiny_plan: Path) -> None:
    plan = load_plan(tiny_plan)
    assert (plan.model, plan.batch, len(plan.stages)) == (TINY, 4, 2)


def test_all_schedules_can_be_searched_and_what_cannot_be_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["--fix", "pipeline=2", "--fix", "microbatches=4"]
    assert main(["plan", TINY, "--cluster", "dgx-h100:1", "--batch", "4", *fixed, "--schedules", "all", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    names = {rival["name"].partition(",")[0] for rival in data["rivals"]} | {data["schedule"]}
    assert len(names & {"1f1b", "gpipe", "eager-1f1b", "zb-h1", "zb-h2", "interleaved:2", "looped-bfs:2", "zb-v"}) >= 6
    assert all(rival["why_not"] for rival in data["rivals"])
    if data["schedule"] not in RUNNABLE:
        assert any("cannot be executed yet" in note for note in data["notes"])


def test_a_fallback_is_written_beside_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On devices with hardly more memory than the plan needs."""
    fixed = ["--fix", "pipeline=2", "--fix", "microbatches=4", "--batch", "4"]
    out, small = tmp_path / "plan.json", tmp_path / "small.json"
    assert main(["plan", TINY, "--cluster", "cpu:2", *fixed, "-o", str(out)]) == 0
    assert not fallback_path(str(out)).exists()
    needed = load_plan(out).predicted.peak_memory_bytes
    cluster = cluster_to_data(parse_cluster("cpu:2"))
    cluster["hosts"][0]["device"]["memory_bytes"]["value"] = 1.1 * needed
    small.write_text(json.dumps(cluster))
    capsys.readouterr()
    assert main(["plan", TINY, "--cluster", str(small), *fixed, "-o", str(out)]) == 0
    plan, fallback = load_plan(out), load_plan(tmp_path / "plan.fallback.json")
    assert plan.fallback == fallback
    assert fallback.predicted.peak_memory_bytes < plan.predicted.peak_memory_bytes
    assert f"should memory run out: meshwright execute {tmp_path / 'plan.fallback.json'}" in capsys.readouterr().out


def test_lists_of_schedules_are_read_as_they_are_written() -> None:
    assert parse_schedules("gpipe, zb-v") == ("gpipe", "zb-v")
    assert parse_schedules("all") == ALL_SCHEDULES
    assert parse_schedules("zb-v,all")[0] == "zb-v"
    assert set(parse_schedules("zb-v,all")) == set(ALL_SCHEDULES)


def test_a_plan_can_be_simulated_drawn_and_traced(
    tiny_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, traced = tmp_path / "t.png", tmp_path / "t.json"
    assert main(["simulate", str(tiny_plan), "--json", "--plot", str(picture), "--trace", str(traced)]) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted"]
    assert predicted["iteration_seconds"] == load_plan(tiny_plan).predicted.iteration_seconds
    assert picture.stat().st_size > 0
    assert json.loads(traced.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (["gpt-3b", "--cluster", "cpu:2", "--batch", "4"], "did you mean"),
        (["gpt:layers=two", "--cluster", "cpu:2", "--batch", "4"], "layers"),
        ([TINY, "--cluster", "p4.16xlarge:2", "--batch", "4"], "p3.16xlarge"),
        ([TINY, "--cluster", "absent.json", "--batch", "4"], "absent.json"),
        ([TINY, "--cluster", "cpu:2", "--batch", "0"], "at least 1"),
        ([TINY, "--cluster", "cpu:2", "--batch", "10", "--fix", "microbatches=4"], "use 2 or 5"),
        ([TINY, "--cluster", "cpu:2", "--batch", "10", "--fix", "microbatch-size=4"], "divisor of 10"),
        ([TINY, "--cluster", "cpu:2", "--batch", "4", "--fix", "pipeline=3"], "2 devices"),
        ([TINY, "--cluster", "cpu:2", "--batch", "4", "--fix", "colour=red"], "known are"),
        (
            [TINY, "--cluster", "cpu:2", "--batch", "4", "--fix", "schedule=chimera"],
            "keeps two copies of all weights; use one of 1f1b, gpipe",
        ),
        (["gpt-175b", "--cluster", "p3.16xlarge:1", "--batch", "1024"], "use more than 174 such devices"),
        ([TINY, "--cluster", "cpu:2", "--batch", "4", "--schedules", "1f1b,zigzag"], "'zigzag' cannot be planned"),
        ([TINY, "--cluster", "cpu:2", "--batch", "4", "--fix", "schedule=graph-1f1b"], "use 1f1b for graph-1f1b"),
        ([TINY, "--cluster", "cpu:2", "--batch", "4", "--schedules", ","], "no schedule is left"),
        ([TINY, "--cluster", "cpu:2", "--batch", "4", "--memory-margin", "1.5"], "1.5 is no share"),
        ([TINY, "--cluster", "cpu:2", "--batch", "4", "--time-limit", "0"], "give more than 0"),
        ([TINY, "--cluster", "cpu:2", "--batch", "4", "--fix", "remat=some"], "none or full"),
        ([TINY, "--cluster", "cpu:2", "--batch", "4", "--fix", "zero=3"], "leave it out"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_that_says_what_to_change(
    request_: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *request_, "--json"]) == 1
    out, err = capsys.readouterr()
    complaint = [line for line in err.splitlines() if not line.startswith("plan:")]  # without progress
    assert out == ""
    assert len(complaint) == 1
    assert complaint[0].startswith("meshwright: ")
    assert says in complaint[0]


def damaged(data: bytes) -> bytes:
    return data[: len(data) // 2]


def newer(data: bytes) -> bytes:
    return data.replace(b'"version": 1', b'"version": 99', 1)


@pytest.mark.parametrize(("harm", "says"), [(damaged, "make it again"), (newer, "update meshwright")])
@pytest.mark.parametrize("command", ["simulate", "execute"])
def test_a_plan_that_is_damaged_or_newer_is_refused(
    command: str, harm: type[bytes], says: str, tiny_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_bytes(harm(tiny_plan.read_bytes()))
    assert main([command, str(bad)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert says in err


def test_fixes_are_read_as_they_are_written() -> None:
    given = ["schedule=gpipe", "remat=full", "microbatch-size=2", "tensor=4", "stages=1x1,1x3"]
    wanted = Fix(microbatches=4, schedule="gpipe", remat="full", tensor=4, stages=((1, 1), (1, 3)))
    assert parse_fixes(given, batch=8) == wanted


@pytest.mark.parametrize("text", ["pipeline", "pipeline=two", "pipeline=0", "stages=1-1", "zero=3", "remat=selective"])
def test_a_fix_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(PlanError, match=text.partition("=")[0]):
        parse_fixes([text], batch=8)
