"""Aceso's cost terms in closed form, and our search of its space against brute force and its own plans."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from experiments.rivals import aceso
from experiments.rivals import aceso_costs as costs
from experiments.rivals.aceso_costs import Plan, Profile, Stage
from meshwright.errors import ModelError, PlanError

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "aceso").exists(), reason="Aceso's profiles and plans are not beside us")


def _profile(layers: int = 2) -> Profile:
    """An embedding of 1 ms and layers of a normalisation (1 ms, 10 MB) and a matrix product (2 ms, 30 MB), forward.

    Backward takes twice that; two devices halve it with replicas, and with tensor parallelism all but 0.5 ms.
    """
    ops = ("encoder-embedding", *("enc-1st-layernorm", "enc-MLP-GEMM-1") * layers)
    forward = np.array([1000.0, *(1000.0, 2000.0) * layers])
    activations = np.array([5.0, *(10.0, 30.0) * layers])
    table = np.full((8, len(ops), 2, 4, 2), np.inf)
    for (m, samples), (w, width) in itertools.product(enumerate((1, 2)), enumerate((1, 2))):
        share = samples / 2 / width
        extra = 500.0 if width > 1 else 0.0
        rows = (forward * share + extra, 2 * forward * share + extra, np.full(len(ops), 4.0), np.full(len(ops), 2.0))
        sizes = (np.full(len(ops), 6.0 / width), activations * share, np.zeros(len(ops)), np.zeros(len(ops)))
        table[:, :, m, w, 0] = np.stack((*rows, *sizes))
    return Profile("gpt", ops, (1, 2), table, {(2, 4): 100.0}, (0.001,) * 11, (0.01,) * 11)


def _stage(gpus: int, ops: int, again: tuple[int, ...] = (), width: int = 1) -> Stage:
    recomputed = tuple(n in again for n in range(ops))
    return Stage(gpus, (width,) * ops, (gpus // width,) * ops, (0,) * ops, recomputed)


def test_a_stage_takes_its_operators_again_where_recomputed_and_its_messages() -> None:
    """5 ms forward for two samples, 10 ms backward; 4 MB in and 2 MB out at 0.01 MB/µs, or ten times slower outside."""
    stage = _stage(1, 3)
    inside = costs.stage_seconds(_profile(), 0, stage, 2, 0, host=4)
    assert inside == pytest.approx(0.004 + 0.008 + 0.0004 + 0.0002)
    outside = costs.stage_seconds(_profile(), 0, stage, 2, 3, host=4)  # device 3 is the last of its host
    assert outside - inside == pytest.approx(0.002 - 0.0002)
    again = costs.stage_seconds(_profile(), 0, _stage(1, 3, again=(1, 2)), 2, 0, host=4)
    assert again - inside == pytest.approx(0.003)


def test_a_change_of_layout_gathers_on_one_way_and_splits_for_nothing_on_the_other() -> None:
    assert costs.relayout_us(_profile(), (1, 2), (2, 1), 4.0) == 100.0
    assert costs.relayout_us(_profile(), (2, 1), (1, 2), 4.6) == 100.0  # 5 MB were not measured, 4 MB were
    assert costs.relayout_us(_profile(), (2, 1), (2, 1), 99.0) == 0.0
    assert costs.relayout_us(_profile(), (2, 1), (1, 2), 99.0) == costs.FORBIDDEN_US


def test_memory_holds_each_micro_batch_behind_but_what_is_recomputed_only_once() -> None:
    """Operators 1 and 2: 10 + 30 MB and 4 MB in for each micro-batch; 12 MB of weights, eight times and in reserve."""
    fixed = 12 * 8 + 12
    assert costs.stage_mb(_profile(), 1, _stage(1, 2), 2, 0) == fixed + 44
    assert costs.stage_mb(_profile(), 1, _stage(1, 2), 2, 2) == fixed + 3 * 44
    assert costs.stage_mb(_profile(), 1, _stage(1, 2, again=(0, 1)), 2, 2) == fixed + 3 * 34 + 10
    across = _stage(1, 3, again=(0, 1, 2))  # 2, 1 and 2 again: what enters the second layer is kept
    assert costs.stage_mb(_profile(), 2, across, 2, 1) == 18 * 8 + 18 + 2 * (4 + 30 + 10 + 30 - 10) + 30


def test_an_iteration_is_all_stages_once_and_the_slowest_for_each_further_micro_batch() -> None:
    plan = Plan(8, 2, (_stage(1, 1), _stage(1, 4)))
    slow = costs.stage_seconds(_profile(), 1, plan.stages[1], 2, 1, host=2)
    fast = costs.stage_seconds(_profile(), 0, plan.stages[0], 2, 0, host=2)
    assert costs.plan_seconds(_profile(), plan) == pytest.approx(4 * slow + fast)


def _plans(profile: Profile, batch: int) -> list[Plan]:
    """Every plan of two devices, but for operators that may not be recomputed and are not worth it."""
    ops = len(profile.ops)
    found = []
    for microbatch in (1, 2):
        shapes = [(2, width) for width in (1, 2) if microbatch % (2 // width) == 0]
        one = [[(ops, *shape)] for shape in shapes]
        two = [[(cut, 1, 1), (ops - cut, 1, 1)] for cut in range(1, ops)]
        for shape in (*one, *two):
            for flags in itertools.product((False, True), repeat=ops - 1):
                again, stages, first = (False, *flags), [], 0
                for count, gpus, width in shape:
                    marked = tuple(n for n in range(count) if again[first + n])
                    stages.append(_stage(gpus, count, marked, width))
                    first += count
                found.append(Plan(batch, microbatch, tuple(stages)))
    return found


@pytest.mark.parametrize("limit_mb", [1000.0, 330.0, 320.0, 300.0, 290.0])
def test_the_search_finds_the_best_of_all_plans_of_a_small_model(limit_mb: float) -> None:
    profile = _profile()
    seconds = [
        costs.plan_seconds(profile, plan)
        for plan in _plans(profile, batch=8)
        if max(costs.plan_mb(profile, plan)) <= limit_mb
    ]
    answer = aceso.plan(profile, batch=8, gpus=2, limit_mb=limit_mb)
    assert answer.memory_mb <= limit_mb
    assert answer.seconds == pytest.approx(min(seconds), rel=1e-9)


def test_one_device_takes_a_smaller_micro_batch_where_a_larger_does_not_fit() -> None:
    """30 MB of weights nine times; two samples hold 89 MB with their input, one 46.5 MB."""
    roomy, tight = (aceso.plan(_profile(), batch=8, gpus=1, limit_mb=limit) for limit in (359.0, 348.0))
    assert (roomy.plan.microbatch, roomy.memory_mb) == (2, 359.0)
    assert (tight.plan.microbatch, tight.memory_mb) == (1, 316.5)
    assert tight.seconds > roomy.seconds


def test_a_model_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(PlanError, match=r"5 operators fit in 0\.1 GB on 2 devices"):
        aceso.plan(_profile(), batch=8, gpus=2, limit_mb=100.0)


REPRICED = {  # relative difference to Aceso's own figure: collectives are the mean of its files for several models
    "large_gpt_1_3B": 1e-7,
    "large_gpt_2_6B": 1e-7,
    "large_gpt_6_7B": 1e-7,
    "large_gpt_13B": 1e-7,
    "large_resnet_2B": 1e-7,
    "large_resnet_4B": 5e-5,
    "large_resnet_6_8B": 5e-5,
    "large_resnet_13B": 1e-7,
}


@needs_data
@pytest.mark.parametrize("case", REPRICED)
def test_the_terms_give_the_prediction_that_aceso_printed(case: str) -> None:
    raw = costs.read_plans(DATA / "rivals" / "aceso_best_plans.json")[case]
    profile, theirs = costs.read_case(DATA / "aceso" / "v100", raw)
    assert costs.plan_seconds(profile, theirs) * 1000 == pytest.approx(raw["plan_pred_ms"], rel=REPRICED[case])
    assert max(costs.plan_mb(profile, theirs)) <= costs.limit_mb(case)


@needs_data
@pytest.mark.parametrize(
    "case",
    [
        *(case for case in REPRICED if case != "large_resnet_13B"),
        "small_gpt_1_3B",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("large_resnet_13B", "small_t5_770M")),
    ],
)
def test_our_plan_is_no_slower_and_fits(case: str) -> None:
    raw = costs.read_plans(DATA / "rivals" / "aceso_best_plans.json")[case]
    profile, theirs = costs.read_case(DATA / "aceso" / "v100", raw)
    answer = aceso.plan(profile, theirs.batch, theirs.gpus, costs.limit_mb(case))
    assert answer.seconds <= costs.plan_seconds(profile, theirs)
    assert max(costs.plan_mb(profile, answer.plan)) <= costs.limit_mb(case)
    assert sum(len(stage.width) for stage in answer.plan.stages) == len(profile.ops)
    assert answer.plan.gpus == theirs.gpus


@needs_data
def test_a_model_without_profile_is_named() -> None:
    raw = costs.read_plans(DATA / "rivals" / "aceso_best_plans.json")["small_resnet_1B"]
    with pytest.raises(ModelError, match="no profile of resnet 1B"):
        costs.read_case(DATA / "aceso" / "v100", raw)
