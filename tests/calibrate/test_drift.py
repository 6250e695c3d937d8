"""A run held against its prediction: what is measured, what it costs the step, and which runs are refused."""

from math import exp, log, sqrt
from statistics import NormalDist

import msgspec
import numpy as np
import pytest

from meshwright.calibrate.drift import (
    Group,
    collect,
    cost_of,
    find_drift,
    log_error,
    log_ratio,
    matching_costs,
    measured_spans,
    with_costs,
)
from meshwright.calibrate.hardware import Quantity
from meshwright.errors import ClusterError
from meshwright.plan.predict import costs_of, program_of
from meshwright.simulate.pipeline import simulate
from meshwright.simulate.program import Forward, Receive, Send
from meshwright.simulate.timeline import Event, Timeline
from tests.calibrate.simulated_runs import FOUR_STAGES, TWO_STAGES, machine, planned, run_on, slower_device, slower_link


def test_a_transfer_is_timed_only_where_somebody_waited_for_it() -> None:
    """mesh 0: F0 send F1 send          the second activation finds mesh 1 busy
    mesh 1: wait....F0.....wait
    """
    timeline = Timeline(
        ((0,), (1,)),
        (
            Event(0, Forward(0, 0), 0.0, 1.0),
            Event(1, Receive(1, 0, "activation", 0), 0.0, 3.0),
            Event(0, Send(0, 1, "activation", 0), 1.0, 1.5),
            Event(0, Forward(0, 1), 1.5, 2.5),
            Event(0, Send(0, 1, "activation", 1), 2.5, 3.0),
            Event(1, Forward(1, 0), 3.0, 9.0),
            Event(1, Receive(1, 0, "activation", 1), 9.0, 9.5),
        ),
    )
    found = dict(measured_spans(timeline))
    assert found == {
        Forward(0, 0): 1.0,
        Forward(0, 1): 1.0,
        Forward(1, 0): 6.0,
        Send(0, 1, "activation", 0): 2.0,  # from the send to the end of the wait, not the send alone
    }


def test_one_slow_step_and_one_slow_instruction_do_not_move_the_ratio() -> None:
    ones = [Forward(0, m) for m in range(3)]
    predicted = dict(zip(ones, (1.0, 2.0, 4.0), strict=True))
    steps = [[(one, 1.5 * predicted[one] * (9.0 if one.microbatch == 2 else 1.0)) for one in ones] for _ in range(5)]
    steps.append([(one, 100.0) for one in ones])
    assert log_ratio(steps, predicted) == pytest.approx(log(1.5))


def test_the_error_of_a_ratio_is_that_of_a_median() -> None:
    """The standard error of a median of n normal numbers is sigma times the square root of pi / 2n."""
    n, sigma = 401, 0.2
    quantiles = [NormalDist(0, sigma).inv_cdf((k + 0.5) / n) for k in range(n)]
    steps = [[(Forward(0, 0), exp(x))] for x in quantiles]
    assert log_error(steps, {Forward(0, 0): 1.0}) == pytest.approx(sigma * sqrt(np.pi / 2 / n), rel=0.02)


def test_few_steps_know_little_of_their_own_spread() -> None:
    """With n steps the error has the one-sigma quantile of Student's t of n - 1: 1.84 for 2 steps, 1.32 for 3."""
    steps = [[(Forward(0, 0), exp(x))] for x in (-0.1, 0.0, 0.1)]
    usual = 1.4826 * 0.1 * sqrt(np.pi / 2 / 3)
    assert log_error(steps, {Forward(0, 0): 1.0}) == pytest.approx(1.3213 * usual, rel=1e-3)


@pytest.mark.parametrize("fix", [TWO_STAGES, FOUR_STAGES])
def test_a_run_that_is_as_predicted_has_no_drift(fix: object) -> None:
    plan = planned(machine(4 if fix is FOUR_STAGES else 2), fix)  # type: ignore[arg-type]
    drift = find_drift(run_on(plan, plan))
    assert {seen.group.what for seen in drift.observations} >= {"forward", "backward", "update", "activation"}
    for seen in drift.observations:
        assert seen.found_seconds == pytest.approx(seen.cost_seconds)
        assert seen.contribution_seconds == pytest.approx(0.0, abs=1e-12)
    assert drift.explained_step_seconds == pytest.approx(drift.predicted_step_seconds)
    assert drift.step_seconds == pytest.approx(plan.predicted.iteration_seconds)


def test_groups_as_measured_explain_the_step() -> None:
    plan = planned(machine(4), FOUR_STAGES)
    truth = planned(slower_link(slower_device(machine(4), 1.7), 2.5), FOUR_STAGES)
    drift = find_drift(run_on(truth, plan))
    assert drift.predicted_step_seconds == pytest.approx(plan.predicted.iteration_seconds)
    # Nobody sees how long the gradients of tied weights travel: they come while the owner is still at work.
    assert drift.explained_step_seconds == pytest.approx(truth.predicted.iteration_seconds, rel=0.03)
    assert [abs(o.contribution_seconds) for o in drift.observations] == sorted(
        (abs(o.contribution_seconds) for o in drift.observations), reverse=True
    )


def test_what_computation_hides_costs_the_step_nothing() -> None:
    """With the updates of a stage that ends early twice as long, the step is as long as before."""
    plan = planned(machine(4), FOUR_STAGES)
    stages = list(plan.stages)
    stages[2] = msgspec.structs.replace(stages[2], update_seconds=2 * stages[2].update_seconds)
    drift = find_drift(run_on(msgspec.structs.replace(plan, stages=tuple(stages)), plan))
    seen = next(o for o in drift.observations if o.group == Group(2, "update"))
    assert seen.log_ratio == pytest.approx(log(2), rel=0.05)
    assert seen.contribution_seconds == pytest.approx(0.0, abs=1e-12)


def test_costs_are_found_where_ranks_share_cores() -> None:
    """Seconds on the wall are not costs there: how much they are stretched depends on who else is busy."""
    host = msgspec.structs.replace(
        machine(4).hosts[0], share_cores=True, cores=2, busy_slowdown=Quantity(2.2, "made for a test")
    )
    plan = planned(msgspec.structs.replace(machine(4), hosts=(host,)), FOUR_STAGES)
    program = program_of(plan.schedule, plan.microbatches, 4, plan.transfers, plan.tied)
    costs = costs_of(plan.hardware, plan.stages, plan.transfers)
    uneven = {Group(1, "forward"): 2.0, Group(3, "backward"): 0.6}
    truth = with_costs(costs, {group: factor * cost_of(costs, group) for group, factor in uneven.items()})
    found = matching_costs(program, costs, collect([simulate(program, truth)] * 3))
    for group, seconds in found.items():
        assert seconds == pytest.approx(cost_of(truth, group), rel=0.03), group


def test_a_link_that_is_quicker_than_its_file_says_can_be_simulated() -> None:
    plan = planned(machine(2), TWO_STAGES)
    truth = planned(slower_link(machine(2), 0.25), TWO_STAGES)
    drift = find_drift(run_on(truth, plan))
    seen = next(o for o in drift.observations if o.group == Group(0, "activation", 1))
    assert seen.log_ratio == pytest.approx(log(0.25), rel=0.02)
    assert drift.explained_step_seconds < drift.predicted_step_seconds


def test_a_run_on_another_machine_is_refused() -> None:
    plan = planned(machine(2), TWO_STAGES)
    run = run_on(plan, plan)

    def refused(**changes: object) -> str:
        rows = tuple(msgspec.structs.replace(row, **changes) for row in run.summary.devices)
        if "device" in changes:
            rows = rows[:1]
        summary = msgspec.structs.replace(run.summary, devices=rows)
        with pytest.raises(ClusterError) as caught:
            find_drift(msgspec.structs.replace(run, summary=summary))
        return str(caught.value)

    assert "device 0 of the run was a cpu" in refused(platform="cpu")
    assert "the plan uses devices [0, 1] and the run had [0]" in refused(device=0)
    rows = tuple(msgspec.structs.replace(row, host=f"host {index}") for index, row in enumerate(run.summary.devices))
    with pytest.raises(ClusterError, match="over 1 hosts and the run was on 2"):
        find_drift(msgspec.structs.replace(run, summary=msgspec.structs.replace(run.summary, devices=rows)))


def test_a_run_without_measured_steps_or_of_another_program_is_refused() -> None:
    plan, other = planned(machine(2), TWO_STAGES), planned(machine(4), FOUR_STAGES)
    run = run_on(plan, plan)
    with pytest.raises(ClusterError, match="no measured step"):
        find_drift(msgspec.structs.replace(run, steps=()))
    with pytest.raises(ClusterError, match="which its plan does not have"):
        find_drift(msgspec.structs.replace(run, steps=run_on(other, other).steps))
