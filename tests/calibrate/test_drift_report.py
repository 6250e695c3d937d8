"""What a drift says: sorted by what it does to the step, in words, and with what to think of it."""

from math import exp

import msgspec
import pytest

from meshwright.calibrate.drift import Drift, find_drift
from meshwright.calibrate.drift_correct import corrected_cluster
from meshwright.calibrate.drift_fit import fit_factors, parts_of
from meshwright.calibrate.drift_report import (
    AS_PREDICTED,
    INSIDE,
    OUTSIDE,
    Row,
    corrections,
    corrections_text,
    doubts,
    in_words,
    report_data,
    report_text,
    rows_of,
)
from meshwright.calibrate.hardware import Cluster
from meshwright.execute.record import Run
from meshwright.plan.planfile import Plan
from tests.calibrate.simulated_runs import (
    TWO_STAGES,
    machine,
    planned,
    run_on,
    slower_device,
    slower_link,
    with_device,
)


def drifted(true: Cluster, noise: float = 0.02) -> tuple[Plan, Drift, tuple[Row, ...]]:
    plan = planned(machine(2), TWO_STAGES)
    drift = find_drift(run_on(planned(true, TWO_STAGES), plan, noise, seed=3))
    return plan, drift, rows_of(drift, parts_of(plan), plan.hardware)


def verdicts(rows: tuple[Row, ...], transfers: bool) -> set[str]:
    return {row.verdict for row in rows if row.observation.group.is_transfer == transfers}


def test_a_slow_link_is_outside_its_range_and_the_device_is_not() -> None:
    _, _, rows = drifted(slower_link(machine(2), 3.0))
    assert verdicts(rows, transfers=True) == {OUTSIDE}
    assert OUTSIDE not in verdicts(rows, transfers=False)


def test_what_the_file_leaves_open_is_said_so() -> None:
    """The file states 10 % each way for its rates; 7 % is more than the run's noise and less than that."""
    _, _, rows = drifted(slower_device(machine(2), 1.07), noise=0.002)
    assert verdicts(rows, transfers=False) == {INSIDE}
    assert verdicts(rows, transfers=True) <= {AS_PREDICTED, INSIDE}


def doubts_of(run: Run) -> str:
    return " | ".join(doubts(run, find_drift(run)))


def test_a_good_witness_raises_no_doubt() -> None:
    plan = planned(machine(2), TWO_STAGES)
    assert doubts_of(run_on(plan, plan, noise=0.02)) == ""


def test_a_run_that_was_disturbed_is_doubted() -> None:
    plan = planned(machine(2), TWO_STAGES)
    run = run_on(plan, plan, noise=0.02)
    seconds = run.summary.step_seconds
    uneven = tuple(each * (2.0 if n % 2 else 1.0) for n, each in enumerate(seconds))
    assert "other work may have run beside them" in doubts_of(with_steps(run, uneven))
    assert "the machine was not alike in both" in doubts_of(with_steps(run, tuple(2 * each for each in seconds)))


def test_a_short_run_and_another_cpu_are_doubted() -> None:
    plan = planned(machine(2), TWO_STAGES)
    assert "only 2 of its steps have times" in doubts_of(run_on(plan, plan, steps=2))
    cluster = with_device(machine(2), lambda d: msgspec.structs.replace(d, name="core of AMD EPYC"))
    of_a_core = planned(cluster, TWO_STAGES)
    assert "the machine file says AMD EPYC, the run was on test device" in doubts_of(run_on(of_a_core, of_a_core))


def with_steps(run: Run, seconds: tuple[float, ...]) -> Run:
    return msgspec.structs.replace(run, summary=msgspec.structs.replace(run.summary, step_seconds=seconds))


def test_the_largest_differences_are_told_in_words() -> None:
    _, drift, rows = drifted(slower_link(machine(2), 3.0))
    largest = in_words(rows[0])
    assert f"takes {exp(rows[0].observation.log_ratio or 0):.2f} times as long as predicted" in largest
    assert "makes the step" in largest
    assert largest.endswith("more than the machine file leaves open")
    text = report_text(drift, rows)
    assert [line for line in text.splitlines() if line.startswith("1. ")] == [f"1. {largest}"]
    assert "not timed, since nobody waited for it" in text
    assert text.index("\n1. ") < text.index("\n2. ") < text.index("\n3. ") < text.index("\nstep: predicted")


def test_the_data_hold_what_the_table_shows() -> None:
    _, drift, rows = drifted(slower_link(machine(2), 3.0))
    data = report_data(drift, rows)
    assert [row["group"] for row in data["groups"]] == [str(row.observation.group) for row in rows]
    effects = [abs(row["contribution_seconds"]) for row in data["groups"]]
    assert effects == sorted(effects, reverse=True)
    wire = next(row for row in data["groups"] if row["what"] == "activation")
    assert (wire["stage"], wire["target"]) == (0, 1)
    assert wire["ratio"] == pytest.approx(3.0, rel=0.1)
    assert sum(wire["parts"].values()) == pytest.approx(1.0)
    assert len(data["largest"]) == 3


def test_corrections_name_the_number_before_and_after() -> None:
    plan, drift, _ = drifted(slower_link(machine(2), 3.0))
    fit = fit_factors([(drift, parts_of(plan))], plan.hardware)
    found = corrections(plan.hardware, corrected_cluster(plan.hardware, fit, "a test"), fit)
    (row,) = found
    assert row["number"] == "wire of host 0"
    assert row["before"] == 2e7
    assert row["after"] == pytest.approx(2e7 / row["seconds_factor"])
    assert "times as slow" in corrections_text(found)
    assert corrections_text([]).startswith("no number of the machine file is wrong")
