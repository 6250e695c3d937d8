"""Constants of software stacks: recovered from steps that were made with known ones, on halves that share no group."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.fit_stacks import constants, main, write
from experiments.validation.cases import Case, read_case
from experiments.validation.evaluate import evaluate, in_halves, predict_case
from experiments.validation.fitting import USUAL, constants_of, fit_constants, seconds
from experiments.validation.halves import FIT, HELD_OUT, halves
from experiments.validation.questions import read_questions
from meshwright.simulate.workload.stack import SHIPPED, StacksFile
from tests.experiments.test_validation import row, text

GRIDS = (("1", "1", "8"), ("2", "1", "4"), ("4", "2", "1"), ("8", "1", "1"), ("1", "2", "4"), ("2", "4", "1"))


def cases(truth: dict[str, float], **cells: str) -> list[Case]:
    """Plans of two batches whose measured steps are what the simulator says with the constants ``truth``."""
    made = []
    for batch in ("32", "64"):
        for tensor, pipeline, data in GRIDS:
            case = read_case(row(tp=tensor, pp=pipeline, dp=data, gbs=batch, seq="2048", hidden="2048", **cells))
            made.append(replace(case, measured_seconds=seconds(case, truth)))
    return made


def test_constants_that_made_the_steps_are_found_again() -> None:
    truth = {"kernel_factor": 1.2, "communication_factor": 1.7, "operation_seconds": 60e-6}
    fit = fit_constants(cases(truth))
    assert fit.constants["kernel_factor"] == pytest.approx(1.2, rel=0.02)
    assert fit.constants["communication_factor"] == pytest.approx(1.7, rel=0.15)
    assert fit.mape_percent < 1.0
    for name, (low, high) in fit.ranges.items():
        assert low <= fit.constants[name] <= high


def test_rings_that_use_one_card_of_eight_are_told_from_slow_kernels() -> None:
    truth = {"kernel_factor": 1.08, "mixed_factor": 8.0}
    one_stage = {"framework": "Megatron-DeepSpeed", "sharding": "ZeRO-3"}
    made = []
    for gpus, batch in (("16", "64"), ("32", "64"), ("16", "128")):
        plan = {"tp": "1", "pp": "1", "dp": gpus, "gpus": gpus, "gbs": batch, "hidden": "4096", "heads": "32"}
        case = read_case(row(**plan, **one_stage))
        made.append(replace(case, measured_seconds=seconds(case, truth)))
    fit = fit_constants(made)
    assert fit.constants["kernel_factor"] == pytest.approx(1.08, rel=0.1)
    assert fit.constants["mixed_factor"] > 4.0
    assert fit.mape_percent < 3.0


def test_few_rows_leave_constants_near_what_is_usual() -> None:
    case = cases({"kernel_factor": 1.08, "communication_factor": 1.2, "operation_seconds": 60e-6})[1]
    fit = fit_constants([replace(case, measured_seconds=case.measured_seconds * 1.03)])
    for name in ("kernel_factor", "communication_factor", "operation_seconds"):
        assert fit.constants[name] == pytest.approx(USUAL[name].value, rel=0.1)


def test_overhead_of_memory_is_the_median_of_what_is_left() -> None:
    base = [read_case(row(tp=tensor, pp=pipeline, dp=data)) for tensor, pipeline, data in GRIDS[:3]]
    more = (1.0, 2.0, 6.0)  # GiB
    held = [
        read_case(row(tp=tensor, pp=pipeline, dp=data, mem_gib=repr(predict_case(case).peak_bytes / 2**30 + over)))
        for case, over, (tensor, pipeline, data) in zip(base, more, GRIDS[:3], strict=True)
    ]
    fit = fit_constants(held)
    assert fit.constants["overhead_bytes"] == pytest.approx(2.0 * 2**30, rel=1e-3)


def test_never_more_than_three_constants() -> None:
    inside, outside = read_case(row()), read_case(row(gpus="16", dp="4"))
    for case in (inside, outside, read_case(row(mem_gib="9")), read_case(row(gpus="16", dp="4", mem_gib="9"))):
        choices = constants_of([case])
        assert choices
        assert all(len(set(names)) == len(names) <= 3 for names in choices)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(0, 9))
def test_halves_cut_no_group_and_are_balanced(groups: list[int], seed: int) -> None:
    sides = halves(groups, seed)
    assert sides == halves(groups, seed)
    assert all(len({side for side, group in zip(sides, groups, strict=True) if group == one}) == 1 for one in groups)
    biggest = max(groups.count(group) for group in groups)
    assert abs(sides.count(FIT) - sides.count(HELD_OUT)) <= biggest
    assert HELD_OUT in sides


def test_what_is_held_out_moves_no_constant(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    plans = [{"gbs": str(8 * size), "iter_time_s": str(0.4 * size)} for size in range(1, 5)]

    def fits(factor: float) -> dict[tuple[str, str], dict[str, float]]:
        rows = [{**row().cells, **plan} for plan in plans]
        first = [predict_case(read_case(row(**plan))) for plan in plans]
        for cells, result in zip(rows, in_halves(first, 0), strict=True):
            if result.half == HELD_OUT:
                cells["iter_time_s"] = str(float(cells["iter_time_s"]) * factor)
        path.write_text(text(*rows))
        (source,) = evaluate(read_questions(path), lambda line: None, seed=0, fit=True)
        return {key: fit.constants for key, fit in source.fits.items()}

    assert fits(1.0) == fits(7.0)


def test_a_file_of_stacks_takes_constants_with_source_and_range_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "stacks.json"
    path.write_bytes(SHIPPED.read_bytes())
    before = msgspec.json.decode(path.read_bytes(), type=StacksFile).stacks
    fit = fit_constants(cases({"kernel_factor": 1.1})[:2])
    write({("some paper: A100-SXM", "megatron-2021"): constants("some paper", fit, 0, 3, 4.2)}, path)
    after = msgspec.json.decode(path.read_bytes(), type=StacksFile).stacks
    added = after["megatron-2021"].systems.pop("some paper: A100-SXM")
    assert added.kernel_factor is not None
    assert added.kernel_factor.low < added.kernel_factor.value < added.kernel_factor.high  # type: ignore[operator]
    assert "4.2 % on 3 rows held out" in added.kernel_factor.source
    assert after == before


def test_the_command_shows_each_system_and_refuses_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text(*({**row().cells, "gbs": str(8 * size)} for size in (1, 2, 3, 4))))
    assert main(["--data", str(path)]) == 0
    assert "some paper: A100-SXM, megatron-2021: kernel_factor" in capsys.readouterr().out
    assert main(["--data", str(tmp_path / "none.csv")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
