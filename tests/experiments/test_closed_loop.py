"""The closed loop's own arithmetic and tables; a real run of two ranks is marked slow."""

from dataclasses import replace

import pytest

from experiments.closed_loop import (
    PLANS,
    Kind,
    Row,
    kinds_table,
    make_plan,
    mean_by_kind,
    run_plan,
    seconds_by_kind,
    table,
)
from meshwright.calibrate.hardware import parse_cluster
from meshwright.simulate.program import Forward, Send
from meshwright.simulate.timeline import Event, Timeline

ROW = Row(2, "data 2", 0.110, 0.100, 0.09, 0.12, 1.2, 95e6, 100e6, (Kind("Forward", 4, 0.01, 0.02, 0.015),))


def test_errors_are_predicted_over_measured() -> None:
    assert ROW.error == pytest.approx(0.10)
    assert ROW.memory_error == pytest.approx(-0.05)
    assert ROW.good


@pytest.mark.parametrize(("ranks", "seconds", "good"), [(2, 0.114, True), (2, 0.116, False), (4, 0.124, True)])
def test_more_ranks_than_cores_may_err_by_more(ranks: int, seconds: float, good: bool) -> None:
    row = Row(ranks, "", seconds, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0, ())
    assert row.good is good


def test_memory_must_be_good_too() -> None:
    assert not Row(2, "", 0.1, 0.1, 0.1, 0.1, 1.0, 112.0, 100.0, ()).good


def test_tables_show_each_number_once() -> None:
    assert "| 2 | data 2 | 110.0 ms | 100.0 ms (90.0 to 120.0) | +10.0% | 1.20 | 95.0 MB | 100.0 MB | -5.0% |" in table(
        [ROW]
    )
    assert kinds_table([ROW]).splitlines()[-1] == "| 2 | data 2 | 4 x 10.00 / 20.00 / 15.00 |"


def test_kinds_are_means_over_instructions_then_over_ranks() -> None:
    events = (
        Event(0, Forward(0, 0), 0.0, 1.0),
        Event(0, Forward(0, 1), 1.0, 4.0),
        Event(0, Send(0, 1, "activation", 0), 4.0, 4.5),
    )
    first = seconds_by_kind(Timeline(((0,),), events))
    assert first == {"Forward": 2.0, "Send": 0.5}
    assert mean_by_kind([first, {"Forward": 4.0}]) == {"Forward": 3.0, "Send": 0.5}


@pytest.mark.slow
def test_two_ranks_measure_every_kind_that_was_predicted() -> None:
    fix = replace(PLANS[2]["pipeline 2"], microbatches=2)
    measured = run_plan(make_plan(parse_cluster("cpu:2"), fix), steps=2)
    assert len(measured.step_seconds) == 2
    assert {"Forward", "Backward", "Send", "Receive", "Reduce", "Update"} <= set(measured.kind_seconds)
    assert measured.kind_cpu_seconds["Forward"] > 0
    assert measured.peak_bytes > 0
