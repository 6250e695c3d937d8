"""Galvatron's cost terms in closed form, and our search of its space against brute force and its own runs."""

import itertools
import time
from pathlib import Path

import pytest

from experiments.rivals import galvatron
from experiments.rivals import galvatron_costs as costs
from experiments.rivals.galvatron_costs import Plan, Profile, Strategy
from meshwright.errors import PlanError

FOLDER = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "rivals" / "galvatron"
needs_data = pytest.mark.skipif(not FOLDER.exists(), reason="Galvatron's profiles and plans are not beside us")


def _profile(layers: int = 2, overlap: float = 1.25, bandwidth: float = 100.0) -> Profile:
    """Two devices; a layer takes 2 ms a sample, 1 ms more a micro-batch, and has 800 MB of parameters."""
    size = {"model_states": {"1": 800.0, "2": 400.0}, "activation": {"1": 10.0, "2": 5.0}}
    line = {float(2**n): 2.0**n for n in range(-3, 4)}
    return Profile(
        devices=2,
        hidden=512,
        sequence_length=1024,
        layers=layers,
        layer_line_ms=(2.0, 1.0),
        embedding_line_ms=(1.0, 0.0),
        parameter_mb=800.0,
        activation_mb={"1": 100.0, "2": 50.0, "checkpoint": 10.0},
        embedding_mb={"whole": size, "first": size, "last": size},
        allreduce_mb_per_ms={"2_consec_1": bandwidth},
        p2p_mb_per_ms={2: 100.0},
        messages_ms={("allreduce", 2): line, ("all2all", 2): line},
        overlap=overlap,
    )


def test_a_layer_takes_forward_twice_that_backward_and_once_more_when_rematerialised() -> None:
    kept, again = (Strategy(1, rematerialised=flag) for flag in (False, True))
    assert costs.layer_seconds(_profile(), kept, 3, 1) == pytest.approx((0.021, 0.021))
    assert costs.layer_seconds(_profile(), again, 3, 1) == pytest.approx((0.028, 0.028))


def test_gradients_hide_under_the_backward_which_they_slow() -> None:
    """400 MB at 100 MB/ms are 4 ms: beside a backward of 6 ms they cost 4 · 1.25 + 6 − 4 = 7 ms."""
    alone, synced = costs.layer_seconds(_profile(), Strategy(2), 1, 1)
    assert (alone, synced) == pytest.approx((0.009, 0.003 + 0.007))
    _, exposed = costs.layer_seconds(_profile(bandwidth=10.0), Strategy(2), 1, 1)  # 40 ms of traffic: 7.5 and 34 left
    assert exposed == pytest.approx(0.003 + 0.0075 + 0.034)


def test_zero_3_gathers_parameters_once_more() -> None:
    alone, _ = costs.layer_seconds(_profile(), Strategy(2), 1, 1)
    gathered, _ = costs.layer_seconds(_profile(), Strategy(2, zero3=True), 1, 1)
    assert gathered - alone == pytest.approx(0.002)  # 200 MB at 100 MB/ms


def test_tensor_parallelism_pays_six_messages_of_a_layer_and_sequence_parallelism_four() -> None:
    """A sample is 1 MB and a message of it 1 ms; half a sample on each device takes 2 ms forward, 4 backward."""
    assert costs.layer_seconds(_profile(), Strategy(1, tensor=2), 1, 1)[0] == pytest.approx(0.006 + 0.006)
    assert costs.layer_seconds(_profile(), Strategy(1, sequence=2), 1, 1)[0] == pytest.approx(0.006 + 0.004)
    again = Strategy(1, tensor=2, rematerialised=True)
    assert costs.layer_seconds(_profile(), again, 1, 1)[0] == pytest.approx(0.008 + 0.009)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 2), (4, 8), (8, 64)])
def test_equal_stages_take_one_more_step_for_each_further_stage(stages: int, microbatches: int) -> None:
    steps = costs.pipeline_seconds([3.0] * stages, [0.0] * stages, microbatches)
    assert steps == pytest.approx(3.0 * (microbatches + stages - 1))


def test_states_shrink_with_zero_and_activations_with_rematerialisation() -> None:
    whole = costs.layer_mb(_profile(), Strategy(1), 2, 1, 1)
    assert whole == 4 * 800 + 2 * 100
    zero2 = costs.layer_mb(_profile(), Strategy(2), 2, 1, 1)
    assert zero2 == 2009  # 3,200 · (7/8 · 0.503 + 1/8) + 200 = 2,008.4, rounded up
    assert costs.layer_mb(_profile(), Strategy(1, rematerialised=True), 2, 1, 1) == 4 * 800 + 2 * 10


@pytest.mark.parametrize(("batch", "limit_gb"), [(2, 8), (4, 8), (4, 6), (8, 6)])
def test_no_plan_of_one_stage_is_below_the_bound_or_better_than_the_answer(batch: int, limit_gb: int) -> None:
    profile = _profile(layers=2)
    answer = galvatron.plan(profile, batch, limit_gb)
    strategies = [
        Strategy(2 // split, tensor, split // tensor, zero3, again)
        for split, tensor in ((1, 1), (2, 1), (2, 2))
        for zero3, again in itertools.product((False, True), repeat=2)
        if split == 1 or not zero3
    ]
    best = float("inf")
    for microbatches in (b for b in (1, 2, 4, 8) if batch % b == 0):
        usable = [s for s in strategies if batch // microbatches // s.data]
        for layers in itertools.product(usable, repeat=2):
            for embedding in (s for s in usable if not s.rematerialised):
                plan = Plan(batch, microbatches, (2,), layers, embedding)
                tensor = [s.tensor for s in (*layers, embedding)]
                widest = max(s.split for s in (*layers, embedding))
                buffer = costs.buffer_mb(profile, batch, microbatches, 1, widest) if max(tensor) > 1 else 0
                if (
                    costs.plan_mb(profile, plan)[0] + buffer <= costs.usable_mb(limit_gb)
                    and len({s.split for s in layers}) == 1
                ):  # where splits change, the search charges what the prediction leaves out
                    best = min(best, costs.plan_seconds(profile, plan))
    assert answer.bound_seconds <= best
    assert answer.seconds <= best * (1 + 1e-12)
    assert max(answer.memory_mb) <= costs.usable_mb(limit_gb)


def test_a_model_that_fits_nowhere_is_refused_with_its_numbers() -> None:
    with pytest.raises(PlanError, match="2 layers fits in 1 GB on 2 devices at a batch of 2"):
        galvatron.plan(_profile(), 2, 1)


CASES = [("m36_b16", 16, 36, 1.0860), ("m38_b64", 64, 38, 4.1808)]


@needs_data
@pytest.mark.parametrize(("name", "batch", "limit_gb", "published"), CASES)
def test_the_terms_give_the_prediction_that_galvatron_printed(
    name: str, batch: int, limit_gb: int, published: float
) -> None:
    profile = costs.read_profile(FOLDER)
    plan = costs.read_plan(FOLDER / f"rerun_plan_{name}.json")
    seconds = costs.plan_seconds(profile, plan)
    assert plan.batch == batch
    assert round(seconds, 4) == published
    printed = costs.read_summary(FOLDER / f"rerun_summary_{name}.json").pred_iter_s
    assert seconds == pytest.approx(printed, rel=1e-12)
    assert max(costs.plan_mb(profile, plan)) <= costs.usable_mb(limit_gb)


@needs_data
@pytest.mark.parametrize(("name", "batch", "limit_gb", "published"), CASES)
def test_our_plan_is_no_slower_and_proved_best_in_seconds(
    name: str, batch: int, limit_gb: int, published: float
) -> None:
    profile = costs.read_profile(FOLDER)
    began = time.process_time()  # of this process alone, whatever else the machine does
    answer = galvatron.plan(profile, batch, limit_gb)
    assert time.process_time() - began < 10
    printed = costs.read_summary(FOLDER / f"rerun_summary_{name}.json").pred_iter_s
    assert answer.seconds <= printed * (1 + 1e-12)
    assert round(answer.seconds, 4) <= published
    assert answer.bound_seconds == pytest.approx(answer.seconds, rel=1e-9)
    assert max(answer.memory_mb) <= costs.usable_mb(limit_gb)
