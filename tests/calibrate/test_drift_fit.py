"""The loop closes: a run on a machine whose numbers are known tells what is wrong with the file it was planned from."""

from collections.abc import Callable
from dataclasses import replace
from math import exp, log

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.calibrate.drift import Drift, Group, Observation, cost_of, find_drift
from meshwright.calibrate.drift_correct import corrected_cluster, corrected_plan
from meshwright.calibrate.drift_fit import Fit, Number, collectives_number, file_error, fit_factors, parts_of
from meshwright.calibrate.drift_shares import kernel_shares
from meshwright.calibrate.hardware import Cluster, CollectiveFit
from meshwright.plan.planfile import Plan
from meshwright.plan.predict import costs_of, predict
from meshwright.plan.search import Fix
from tests.calibrate.simulated_runs import (
    FOUR_STAGES,
    LONE_STAGE,
    TENSOR,
    TWO_STAGES,
    graph_of,
    machine,
    number,
    planned,
    run_on,
    slower_device,
    slower_dispatch,
    slower_link,
    slower_matmuls,
    slower_memory,
    with_link,
)

NOISE = 0.04  # of each stage and transfer from step to step


def closed_loop(true: Cluster, fix: Fix, devices: int, seed: int = 0, *, shares: bool = True) -> tuple[Fit, Plan, Plan]:
    """What a run on the true machine tells of the file, and the same plan anew on the corrected and on the true one."""
    plan, truth = planned(machine(devices), fix), planned(true, fix)
    run = run_on(truth, plan, NOISE, seed)
    parts = parts_of(plan, kernel_shares(plan, graph_of(plan.microbatches)) if shares else None)
    fit = fit_factors([(find_drift(run), parts)], plan.hardware)
    better = corrected_cluster(plan.hardware, fit, "a test")
    again = planned(better, fix)
    repriced = predict(corrected_plan(plan, parts, fit, better)).predicted.iteration_seconds
    assert repriced == pytest.approx(again.predicted.iteration_seconds, rel=0.02)  # the plan itself knows as much
    return fit, again, truth


def same_step(plan: Plan, truth: Plan) -> bool:
    return plan.predicted.iteration_seconds == pytest.approx(truth.predicted.iteration_seconds, rel=NOISE / 2)


@settings(max_examples=12, deadline=None)
@given(
    link=st.sampled_from([0.4, 1.0, 2.0, 3.0]),
    device=st.sampled_from([0.7, 1.0, 1.4, 2.5]),
    seed=st.integers(0, 999),
)
def test_wrong_rates_are_found_within_a_few_percent(link: float, device: float, seed: int) -> None:
    """All at once, with 4 % of noise: the factors, and a step that is again predicted to better than the noise."""
    fit, again, truth = closed_loop(
        slower_link(slower_device(machine(4), device), link), FOUR_STAGES, 4, seed, shares=False
    )
    assert exp(fit.log_of(Number("wire", 0))) == pytest.approx(link, rel=0.05)
    assert exp(fit.log_of(Number("compute", 0))) == pytest.approx(device, rel=0.05)
    assert same_step(again, truth)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: slower_matmuls(m, 1.4), {"matmul": 1.4}),
        (lambda m: slower_memory(m, 1.5), {"memory": 1.5}),
        (lambda m: slower_memory(slower_matmuls(m, 0.8), 1.5), {"matmul": 0.8, "memory": 1.5}),
        (lambda m: slower_dispatch(m, 100.0), {"dispatch": 100.0}),
        (lambda m: m, {}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_matmuls_memory_and_dispatch_are_told_apart(
    change: Callable[[Cluster], Cluster], expected: dict[str, float], seed: int
) -> None:
    fit, again, truth = closed_loop(change(machine(4)), FOUR_STAGES, 4, seed)
    assert {n.kind for n in fit.factors} == set(expected)
    for kind, factor in expected.items():
        assert fit.factors[Number(kind, 0)].value == pytest.approx(factor, rel=0.05)
    assert same_step(again, truth)


def test_the_stated_errors_hold_what_is_true() -> None:
    """In units of its stated error, a factor is off as a normal number is: rarely by more than three."""
    off = []
    for seed in range(8):
        fit, _, _ = closed_loop(slower_link(slower_device(machine(4), 1.4), 3.0), FOUR_STAGES, 4, seed, shares=False)
        for kind, factor in (("wire", 3.0), ("compute", 1.4)):
            found = fit.factors[Number(kind, 0)]
            off.append(abs(found.log_value - log(factor)) / found.log_error)
    assert sum(each < 3 for each in off) >= 0.8 * len(off)
    assert max(off) < 6


def test_collectives_are_found_where_they_were_measured() -> None:
    """Two ranks of a stage that sum their values: their link is 2.5 times as slow in collectives, not in transfers."""

    def measured(cluster: Cluster, factor: float) -> Cluster:
        fit = CollectiveFit(ranks=2, latency_seconds=number(50e-6 * factor), bytes_per_second=number(4e7 / factor))
        return with_link(cluster, lambda link: msgspec.structs.replace(link, collectives={"all_reduce": (fit,)}))

    plan, truth = planned(measured(machine(4), 1.0), TENSOR), planned(measured(machine(4), 2.5), TENSOR)
    assert collectives_number(plan.hardware, plan.stages[0].devices) == Number("collectives", 0)
    drift = find_drift(run_on(truth, plan, NOISE))
    fit = fit_factors([(drift, parts_of(plan))], plan.hardware)
    assert fit.factors[Number("collectives", 0)].value == pytest.approx(2.5, rel=0.06)
    assert Number("wire", 0) not in fit.factors
    better = corrected_cluster(plan.hardware, fit, "a test")
    assert same_step(planned(better, TENSOR), truth)


def test_runs_tell_together_what_none_tells_alone() -> None:
    """A pipeline knows no collectives, and a lone stage of two ranks cannot tell them from its kernels."""

    def measured(cluster: Cluster, factor: float) -> Cluster:
        fit = CollectiveFit(ranks=2, latency_seconds=number(50e-6 * factor), bytes_per_second=number(4e7 / factor))
        return with_link(cluster, lambda link: msgspec.structs.replace(link, collectives={"all_reduce": (fit,)}))

    file, true = measured(machine(2), 1.0), slower_device(measured(machine(2), 3.0), 1.4)
    seen = []
    for fix in (TWO_STAGES, LONE_STAGE):
        plan = planned(file, fix)
        drift = find_drift(run_on(planned(true, fix), plan, NOISE))
        seen.append((drift, parts_of(plan, kernel_shares(plan, graph_of(plan.microbatches)))))
    fit = fit_factors(seen, file)
    assert fit.factors[Number("collectives", 0)].value == pytest.approx(3.0, rel=0.1)
    for kind in ("matmul", "memory"):
        assert fit.factors[Number(kind, 0)].value == pytest.approx(1.4, rel=0.1)
    better = corrected_cluster(file, fit, "a test")
    for fix in (TWO_STAGES, LONE_STAGE):
        assert same_step(planned(better, fix), planned(true, fix))


def test_what_rates_cannot_explain_is_a_slowdown_of_a_phase() -> None:
    """Backwards alone take twice as long: no rate of the device does that to them and not to forwards."""
    plan = planned(machine(4), FOUR_STAGES)
    stages = tuple(
        msgspec.structs.replace(stage, backward_compute_seconds=2 * stage.backward_compute_seconds)
        for stage in plan.stages
    )
    truth = msgspec.structs.replace(plan, stages=stages)
    parts = parts_of(plan)
    fit = fit_factors([(find_drift(run_on(truth, plan, NOISE)), parts)], plan.hardware)
    better = corrected_cluster(plan.hardware, fit, "a test")
    again, wanted = planned(better, FOUR_STAGES), predict(truth).predicted.iteration_seconds
    assert again.predicted.iteration_seconds == pytest.approx(wanted, rel=0.03)
    ratio = again.stages[1].backward_compute_seconds / again.stages[1].forward_compute_seconds
    assert ratio == pytest.approx(
        2 * plan.stages[1].backward_compute_seconds / plan.stages[1].forward_compute_seconds, rel=0.05
    )


def test_one_strange_group_does_not_decide() -> None:
    plan = planned(machine(4), FOUR_STAGES)
    drift = find_drift(run_on(planned(slower_device(machine(4), 1.4), FOUR_STAGES), plan))
    strange = Group(2, "forward")

    def tenfold(seen: Observation) -> Observation:
        if seen.group != strange or seen.log_ratio is None:
            return seen
        return replace(seen, found_seconds=10 * seen.found_seconds, log_ratio=seen.log_ratio + log(10))

    odd: Drift = replace(drift, observations=tuple(map(tenfold, drift.observations)))
    fit = fit_factors([(odd, parts_of(plan))], plan.hardware)
    assert exp(fit.log_of(Number("compute", 0))) == pytest.approx(1.4, rel=0.1)


@pytest.mark.parametrize(("fix", "devices"), [(TWO_STAGES, 2), (FOUR_STAGES, 4), (TENSOR, 4)])
def test_parts_add_up_to_what_the_simulator_is_told(fix: Fix, devices: int) -> None:
    plan = planned(machine(devices), fix)
    costs = costs_of(plan.hardware, plan.stages, plan.transfers)
    for shares in (None, kernel_shares(plan, graph_of(plan.microbatches))):
        for group, found in parts_of(plan, shares).items():
            assert sum(found.values()) == pytest.approx(cost_of(costs, group), abs=1e-12), group


def test_the_files_range_weighs_as_much_as_its_part() -> None:
    """A range of 10 % each way is two standard errors; half of the seconds carry half of it."""
    cluster = machine(2)
    sigma = log(1.1 / 0.9) / 4
    whole = {Number("compute", 0): 1.0}
    assert file_error(cluster, whole, "forward") == pytest.approx(sigma)
    half = {Number("compute", 0): 1.0, Number("dispatch", 0): 1.0}
    assert file_error(cluster, half, "forward") == pytest.approx(sigma / 2 * 2**0.5)
