"""Residuals are honest: a group's constants are what a fit without it would have found. The command writes its file."""

import csv
import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from scipy.optimize import minimize

from experiments import fit_intervals
from experiments.fit_intervals import calibrated, coverage, elsewhere, main, measured_systems
from experiments.residuals import Residual, constants_without, expected_constants, shipped_constants
from experiments.validation.fitting import SCATTER
from experiments.validation.rows import DataError
from meshwright.calibrate.uncertainty import Interval, IntervalsFile
from meshwright.simulate.workload.stack import shipped_stacks

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "measured_runs.csv"
SMALL = (
    "megatron_sc21",
    "megatron_bridge",
    "torchtitan",
    "dgxc_2505",
    "sailor",
)  # few rows, that are quickly simulated


def rows(system: str, ratios: list[float], source: str = "") -> list[Residual]:
    return [Residual(source or system, system, "stack", index, ratio) for index, ratio in enumerate(ratios)]


def test_constants_move_as_a_fit_without_the_rows_would_have_it() -> None:
    """Of a linear model with residuals far below the robust bend, the step is exact: brute force finds the same."""
    random = np.random.default_rng(3)
    slopes = random.uniform(0.0, 1.0, (12, 2))
    spreads, prior = np.array([0.15, 0.4]), np.array([0.08, 0.18])
    truth = slopes @ np.array([0.1, 0.3]) + random.normal(0.0, 1e-3, 12)

    def best(kept: list[int]) -> np.ndarray:
        def loss(x: np.ndarray) -> float:
            away = (truth - slopes @ x)[kept] / SCATTER
            return float(np.sum(away**2) + np.sum(((x - prior) / spreads) ** 2))

        return np.asarray(minimize(loss, prior, method="BFGS", options={"gtol": 1e-9}).x)

    fitted = best(list(range(12)))
    moved = constants_without([0, 5], truth - slopes @ fitted, slopes, fitted - prior, spreads)
    expected = best([row for row in range(12) if row not in (0, 5)]) - fitted
    assert moved == pytest.approx(expected, rel=0.02, abs=0.02 * np.abs(expected).max())


def test_without_any_row_a_constant_is_as_usual() -> None:
    slopes, away = np.array([[0.5], [0.7]]), np.array([0.01, -0.01])
    moved = constants_without([0, 1], away, slopes, np.array([0.3]), np.array([0.15]))
    pulled = (slopes[:, 0] @ away / SCATTER**2 - 0.3 / 0.15**2) / (slopes[:, 0] @ slopes[:, 0] / SCATTER**2 + 0.15**-2)
    assert moved == pytest.approx([-0.3 - pulled], rel=0.02)  # to the usual, less what the fit was short of its optimum


def test_an_unknown_source_is_expected_to_be_like_the_others() -> None:
    """Its own constants do not count; without others, benchmarks stand as they are."""
    shipped = shipped_stacks()["megatron-deepspeed"]
    own = [system for system in shipped.systems if system.startswith("vtrain_single:")]
    assert own
    others = [known.values() for system, known in shipped.systems.items() if system not in own]
    mean = math.exp(np.mean([math.log(constants["kernel_factor"]) for constants in others]))
    assert expected_constants("megatron-deepspeed", "vtrain_single")["kernel_factor"] == pytest.approx(mean)
    alone = {system.partition(":")[0] for system in shipped_stacks()["megatron-2021"].systems}
    if len(alone) == 1:
        assert expected_constants("megatron-2021", alone.pop())["kernel_factor"] == 1.0


def test_only_constants_with_a_range_were_fitted() -> None:
    for stack, shipped in shipped_stacks().items():
        for system in shipped.systems:
            found = shipped_constants(stack, system)
            assert found is not None
            assert 1 <= len(found[1]) <= 3
    assert shipped_constants("compiled", "a garage") is None


def test_systems_with_few_groups_have_the_pool() -> None:
    many, few = rows("many", [0.01, -0.02, 0.03, -0.04, 0.05]), rows("few", [0.3, 0.4])
    systems, pooled = measured_systems([*many, *few, *rows("third", [0.0]), *rows("fourth", [-0.1])], 0)
    assert systems["few", "stack"] is pooled
    assert systems["many", "stack"].high == pytest.approx(math.exp(0.05), rel=1e-3)
    assert pooled.high == pytest.approx(math.exp(0.4), rel=1e-3)  # 4 of 5 parts, the fifth being the new system


def test_sources_are_what_is_exchangeable_elsewhere() -> None:
    each = [one for name, far in zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True) for one in rows(name, [far] * 50)]
    assert elsewhere(each).high == pytest.approx(math.exp(0.4), rel=1e-3)
    with pytest.raises(DataError, match="at least 4 are needed"):
        elsewhere(each[:150])


def test_coverage_counts_rows_inside() -> None:
    own = Interval(low=0.9, high=1.1, rows=1, groups=1, source="a test")
    other = Interval(low=0.5, high=2.0, rows=1, groups=1, source="a test")
    found = coverage([*rows("known", [0.0, 0.2]), *rows("new", [0.2])], {("known", "stack"): own}, other)
    assert [(one.source, one.rows, one.inside) for one in found] == [("known", 2, 1), ("new", 1, 1)]
    assert found[1].width == pytest.approx(4.0)


def test_plans_that_ran_more_than_once_are_one_group_each(tmp_path: Path) -> None:
    paths = []
    for run in range(2):
        plans = [
            {"ranks": 2, "name": f"plan {i}", "predicted_seconds": 1.0, "measured_seconds": 1.0 + 0.02 * i}
            for i in range(4)
        ]
        paths.append(tmp_path / f"{run}.json")
        paths[-1].write_text(json.dumps({"rows": plans}))
    found = calibrated(paths)
    assert found is not None
    assert (found.rows, found.groups) == (8, 4)
    assert found.high == pytest.approx(1.06, rel=1e-3)
    assert calibrated([]) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"ranks": 2}]}'])
def test_another_file_is_no_closed_loop(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"no answer of experiments\.closed_loop --json"):
        calibrated([path])


@pytest.mark.slow
def test_the_command_writes_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not DATA.exists():
        pytest.skip(f"needs {DATA.name} in shared/data beside the checkout")
    with DATA.open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["source_id"] in SMALL]
    part, written = tmp_path / "part.csv", tmp_path / "intervals.json"
    with part.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(lines[0]))
        table.writeheader()
        table.writerows(lines)
    monkeypatch.setattr(fit_intervals, "SHIPPED", written)
    assert main(["--data", str(part), "--write"]) == 0
    out, _ = capsys.readouterr()
    found = msgspec.json.decode(written.read_bytes(), type=IntervalsFile)
    assert f"elsewhere: {found.elsewhere.low:.3f} to {found.elsewhere.high:.3f}" in out
    assert "Rows held out by seed 0" in out
    assert found.elsewhere.groups == len(SMALL)
    assert "torchtitan: H100-96GB-HBM2e-500W" in found.systems["fsdp"]
