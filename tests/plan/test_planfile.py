"""A plan is one file that comes back exactly, or is refused with one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshwright.errors import PlanError
from meshwright.plan.planfile import (
    VERSION,
    Plan,
    bytes_text,
    load_plan,
    parse_plan,
    plan_json,
    public_json,
    save_plan,
    seconds_text,
)
from meshwright.plan.predict import predict
from meshwright.plan.search import Fix
from tests.plan.planned import cpus, planned

FIXES = [Fix(), Fix(stages=((2, 1), (1, 1))), Fix(pipeline=2, data=1, tensor=2, remat="full")]


@pytest.mark.parametrize("fix", FIXES)
def test_a_plan_equals_its_file_to_the_byte(fix: Fix, tmp_path: Path) -> None:
    plan = planned(fix=fix)
    path = tmp_path / "deep" / "plan.json"
    save_plan(plan, path)
    again = load_plan(path)
    assert again == plan
    assert plan_json(again) == path.read_bytes() == plan_json(plan)
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]
    assert again.hardware == cpus()


def test_the_file_holds_every_field() -> None:
    data = json.loads(plan_json(planned()))
    assert set(data) == set(Plan.__struct_fields__)
    assert data["stages"][0].keys() == set(type(planned().stages[0]).__struct_fields__)


@pytest.mark.parametrize("fix", FIXES)
def test_what_the_file_says_is_what_the_simulator_says_again(fix: Fix) -> None:
    plan = planned(fix=fix)
    assert predict(plan).predicted == plan.predicted


def test_a_file_that_is_cut_anywhere_is_refused_with_one_line() -> None:
    whole = plan_json(planned()).rstrip()
    for end in {0, 1, *range(0, len(whole), len(whole) // 60), len(whole) - 1}:
        with pytest.raises(PlanError) as caught:
            parse_plan(whole[:end], "p.json")
        assert str(caught.value).startswith("p.json is damaged")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda d: d.update(version=VERSION + 1), f"has version {VERSION + 1}.*update meshwright"),
        (lambda d: d.update(version="1"), "version is '1'"),
        (lambda d: d.update(version=True), "version is True"),
        (lambda d: d.pop("version"), "version is None"),
        (lambda d: d.update(colour="red"), "unknown field `colour`"),
        (lambda d: d["stages"][0].update(colour="red"), r"unknown field `colour`.*stages"),
        (lambda d: d.pop("fingerprint"), "fingerprint"),
        (lambda d: d.update(remat="half"), "remat"),
        (lambda d: d.update(microbatches=3), "8 does not split into 3 micro-batches"),
        (lambda d: d.update(stages=[]), "stages hold layers"),
        (lambda d: d["stages"].pop(0), "follow one another from 0"),
        (lambda d: d["stages"].append(d["stages"][-1]), "is damaged"),
        (lambda d: d["stages"][0].update(devices=[1, 1]), "device is in two meshes"),
        (lambda d: d["stages"][0].update(mesh={"data": 3}), r"stages\[0\] has 1 devices but a mesh of"),
        (lambda d: d["layouts"].clear(), "names layout 'layout 0'"),
        (lambda d: d["stages"][0].update(layouts=[]), "layouts"),
        (lambda d: d["cluster"].update(hosts=[]), "hosts"),
        (lambda d: d["cluster"]["hosts"][0].update(cores=0), "cores is 0"),
    ],
)
def test_a_plan_that_is_not_right_is_refused_with_one_line(edit: Callable[[Any], Any], line: str) -> None:
    data = json.loads(plan_json(planned()))
    edit(data)
    with pytest.raises(PlanError, match=line) as caught:
        parse_plan(json.dumps(data).encode(), "p.json")
    assert str(caught.value).startswith("p.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"[]", b"3", b"{}", b'{"format": "meshwright-cluster", "version": 1}'])
def test_a_file_of_another_kind_is_no_plan(data: bytes) -> None:
    with pytest.raises(PlanError, match='it has no "format": "meshwright-plan"'):
        parse_plan(data)


def test_a_file_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot be read .*meshwright plan") as caught:
        load_plan(tmp_path / "none.json")
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    save_plan(planned(), path)
    before = path.read_bytes()
    monkeypatch.setattr("meshwright.plan.planfile.os.replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save_plan(planned(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert path.read_bytes() == before


def test_the_public_json_is_the_documented_contract() -> None:
    plan = planned()
    data = msgspec.json.decode(msgspec.json.encode(public_json(plan)))
    assert set(data) == {
        "model", "cluster", "batch", "microbatches", "schedule", "remat", "stages", "predicted", "search", "rivals",
        "notes", "fallback",
    }  # fmt: skip
    stage = {"layers", "devices", "mesh", "forward_seconds", "backward_seconds", "peak_memory_bytes"}
    assert stage <= set(data["stages"][0])
    assert {"iteration_seconds", "tokens_per_second", "mfu", "bubble_fraction", "fits"} <= set(data["predicted"])
    assert {"seconds", "trace_seconds", "ilp_seconds", "dp_seconds", "simulate_seconds"} <= set(data["search"])


def test_the_table_has_a_line_a_stage() -> None:
    lines = str(planned()).splitlines()
    assert sum(line.lstrip()[:1].isdigit() for line in lines) == len(planned().stages)
    assert any(line.startswith("predicted: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (seconds_text(1.5), "1.5 s"),
        (seconds_text(0.0123), "12.3 ms"),
        (seconds_text(1234.0), "1234 s"),
        (seconds_text(4.2e-8), "0.042 µs"),
        (bytes_text(80e9), "80 GB"),
        (bytes_text(1.5e6), "1.5 MB"),
        (bytes_text(12), "12 B"),
    ],
)
def test_numbers_are_short(text: str, wanted: str) -> None:
    assert text == wanted
