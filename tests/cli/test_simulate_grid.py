"""``meshwright simulate MODEL --cluster C --batch N --fix ...``: a grid by hand, without JAX."""

import json
import subprocess
import sys
from typing import Any

import pytest

from meshwright.calibrate.uncertainty import shipped_intervals
from meshwright.cli.main import main

GPT = ["simulate", "gpt-2.6b", "--cluster", "dgx-a100:2", "--batch", "256"]
GRID = ["--fix", "tensor=2", "--fix", "pipeline=4", "--fix", "microbatch-size=2"]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert err == ""
    return json.loads(out)


def test_the_answer_holds_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    data = answer(capsys, *GPT, *GRID)
    assert (data["model"], data["cluster"], data["batch"]) == ("gpt-2.6b", "dgx-a100:2", 256)
    assert (data["microbatches"], data["schedule"], data["remat"]) == (64, "1f1b", "none")
    assert [stage["layers"] for stage in data["stages"]] == [8] * 4
    assert [stage["mesh"] for stage in data["stages"]] == [{"data": 2, "context": 1, "tensor": 2}] * 4
    predicted = data["predicted"]
    assert predicted["tokens_per_second"] == pytest.approx(256 * 1024 / predicted["iteration_seconds"])
    assert 0 < predicted["mfu"] < 1
    assert predicted["fits"] is True
    assert sum(predicted["peak_memory_parts"].values()) == pytest.approx(predicted["peak_memory_bytes"])
    assert sum(cause["seconds"] for cause in data["causes"]) == pytest.approx(predicted["iteration_seconds"])
    assert {(c["source"], c["target"]) for c in data["channels"]} >= {(0, 1), (1, 0), (2, 3), (3, 2)}
    assert all(0 < channel["busy_fraction"] <= 1 for channel in data["channels"])


def test_data_parallelism_takes_the_devices_that_are_left(capsys: pytest.CaptureFixture[str]) -> None:
    data = answer(capsys, *GPT, "--fix", "tensor=2")
    assert data["stages"][0]["mesh"]["data"] == 8
    assert data["microbatches"] == 32


def test_schedules_with_chunks_and_split_backwards(capsys: pytest.CaptureFixture[str]) -> None:
    """On equal stages without tensor parallelism both shorten the bubble: (S - 1)(F + I - W) against (S - 1)(F + B)."""
    equal = ["simulate", "gpt:layers=48,hidden=4096,heads=32,vocab=1024,dtype=bf16", "--cluster", "dgx-a100:1"]
    grid = ["--batch", "16", "--fix", "pipeline=8"]
    steps = {
        name: answer(capsys, *equal, *grid, "--fix", f"schedule={name}")["predicted"]["bubble_fraction"]
        for name in ("1f1b", "interleaved:2", "zb-h1")
    }
    assert steps["zb-h1"] < steps["interleaved:2"] < steps["1f1b"]


def test_the_step_is_the_same_with_zero_but_holds_less(capsys: pytest.CaptureFixture[str]) -> None:
    held = [answer(capsys, *GPT, "--fix", f"zero={z}")["predicted"]["peak_memory_bytes"] for z in (0, 1, 3)]
    assert held[0] > held[1] > held[2]


def test_megatrons_count_of_flops_is_reported_beside_ours(capsys: pytest.CaptureFixture[str]) -> None:
    predicted = answer(capsys, *GPT, *GRID, "--flops", "megatron")["predicted"]
    assert predicted["megatron_flops_per_second_per_device"] > predicted["model_flops_per_second_per_device"]


def test_samples_with_a_seed_give_the_same_answer(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (answer(capsys, *GPT, *GRID, "--samples", "40", "--seed", "7")["samples"] for _ in range(2))
    assert first == second
    assert first["p10_seconds"] < first["p50_seconds"] < first["p90_seconds"]


def test_stages_that_are_not_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """32 layers on meshes of 8, 4 and 4 devices; the first recomputes."""
    unlike = ["--fix", "tensor=8,4,4", "--fix", "layers=16,8,8", "--fix", "remat=full,none,none"]
    data = answer(capsys, *GPT, *unlike)
    assert [stage["layers"] for stage in data["stages"]] == [16, 8, 8]
    assert [stage["mesh"]["tensor"] for stage in data["stages"]] == [8, 4, 4]
    assert [stage["devices"][0] for stage in data["stages"]] == [0, 8, 12]
    assert data["remat"] == ["full", "none", "none"]
    assert main([*GPT, *unlike]) == 0
    assert "tensor 8,4,4 × pipeline 3" in capsys.readouterr().out


def test_no_jax_is_imported() -> None:
    code = f"""
import sys
from meshwright.calibrate.uncertainty import shipped_intervals
from meshwright.cli.main import main
assert main({[*GPT, *GRID]!r}) == 0
assert not {{"jax", "mpi4py"}} & set(sys.modules), "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_person_reads_where_the_time_goes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GPT, *GRID]) == 0
    out = capsys.readouterr().out
    assert "data 2 × tensor 2 × pipeline 4, 1f1b, 64 micro-batches of 2" in out
    assert "peak memory" in out
    assert "the whole step" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([*GPT, "--fix", "tensor=3"], 1, "tensor × pipeline × context = 3 does not divide the 16 devices"),
        ([*GPT, "--fix", "tensor=x"], 1, "--fix tensor=x: a whole number is needed"),
        ([*GPT, "--fix", "tensor=8,x"], 1, "--fix tensor=8,x: a whole number is needed for each stage"),
        ([*GPT, "--fix", "tensor=8,4"], 1, "tensor of all meshes × context = 12 does not divide the 16 devices"),
        ([*GPT, "--fix", "tensor=8,8", "--fix", "layers=30,3"], 1, "do not add up to the model's 32 layers"),
        ([*GPT, "--fix", "tensor=8,8", "--fix", "remat=full,all"], 1, "recompute 'all' is unknown"),
        ([*GPT, "--fix", "tensor"], 1, "--fix tensor has no value"),
        ([*GPT, "--fix", "colour=red"], 1, "--fix colour is unknown"),
        ([*GPT, "--fix", "schedule=zb"], 1, "schedule 'zb' is unknown"),
        ([*GPT, "--fix", "microbatch-size=7"], 1, "Use a batch of"),
        ([*GPT, "--fix", "microbatches=5"], 1, "does not split into 5 micro-batches"),
        ([*GPT, "--fix", "remat=some"], 1, "recompute 'some' is unknown"),
        ([*GPT, "--fix", "zero=9"], 1, "ZeRO"),
        (["simulate", "moe-380m", *GPT[2:]], 1, "no plain transformer"),
        (["simulate", "gpt:layers=2,colour=3", *GPT[2:]], 1, "there is no key 'colour'"),
        (["simulate", "gpt-175b", "--cluster", "dgx-a100:1", "--batch", "8"], 1, "GB more than their 80.0 GB"),
        (["simulate", "gpt-2.6b", "--cluster", "dgx-a100:1"], 2, "needs --cluster and --batch"),
        (["simulate", "gpt-2.6b", "--cluster", "dgx-z9:1", "--batch", "8"], 1, "cluster 'dgx-z9:1' is unknown"),
    ],
)
def test_wrong_input_ends_with_one_line_that_says_what_to_change(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.strip().count("\n") == 0


def test_the_range_is_that_of_systems_that_nobody_measured(capsys: pytest.CaptureFixture[str]) -> None:
    predicted = answer(capsys, *GPT, *GRID)["predicted"]
    wide = shipped_intervals().elsewhere
    assert predicted["iteration_seconds_low"] / predicted["iteration_seconds"] == pytest.approx(wide.low, rel=0.01)
    assert predicted["iteration_seconds_high"] / predicted["iteration_seconds"] == pytest.approx(wide.high, rel=0.01)


def test_a_system_that_was_measured_brings_its_constants_and_its_range(capsys: pytest.CaptureFixture[str]) -> None:
    system = "zero_bubble: A100-SXM"
    predicted = answer(capsys, *GPT, *GRID, "--stack", f"megatron-core@{system}")["predicted"]
    mine = shipped_intervals().systems["megatron-core"][system]
    assert predicted["iteration_seconds_high"] / predicted["iteration_seconds"] == pytest.approx(mine.high, rel=0.01)
    usual = answer(capsys, *GPT, *GRID, "--stack", "megatron-core")["predicted"]
    assert usual["iteration_seconds"] != predicted["iteration_seconds"]


def test_the_table_says_where_the_range_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GPT, *GRID]) == 0
    out, _ = capsys.readouterr()
    assert "80% range" in out
    assert shipped_intervals().elsewhere.source in out


def test_an_unknown_system_is_answered_with_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GPT, *GRID, "--stack", "megatron-core@a garage"]) == 1
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "not measured on 'a garage'; known are" in err
    assert "zero_bubble: A100-SXM" in err
