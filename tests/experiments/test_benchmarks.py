"""The benchmark of the simulator runs, agrees with SimPy and prints what scripts read; its figures are no test."""

import json
import math

import pytest

from experiments.benchmarks.simulator import growth_exponent, main


def test_one_json_object_holds_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    """A disagreement with SimPy about the makespan raises."""
    main(["--json", "--repeats", "1", "--largest", "100000"])
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    figures = json.loads(out)
    assert {"tasks_per_second", "ratio_to_simpy", "plans_per_second", "step_64x1024_seconds", "growth"} <= set(figures)
    assert [entry["tasks"] for entry in figures["growth"]] == [9984, 99968]
    assert [entry["flows"] for entry in figures["flows"]] == [100, 1000, 10_000, 100_000]
    curves = [value for entry in (*figures["growth"], *figures["flows"]) for value in entry.values()]
    numbers = [value for name, value in figures.items() if name not in ("growth", "flows", "included")]
    assert all(math.isfinite(value) for value in (*numbers, *curves))


def test_the_exponent_of_a_straight_line_is_one() -> None:
    growth = [{"tasks": 10**k, "seconds": 3e-9 * 10**k} for k in range(4, 8)]
    assert growth_exponent(growth) == pytest.approx(1)
