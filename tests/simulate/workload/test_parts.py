"""Stages that begin or end inside a layer."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.calibrate.hardware import parse_cluster
from meshwright.errors import PlanError
from meshwright.simulate.workload.grid import Grid, whole_layers
from meshwright.simulate.workload.parts import border_bytes, operators, part_at
from meshwright.simulate.workload.pieces import Local, layer_pieces
from meshwright.simulate.workload.placement import Prices
from meshwright.simulate.workload.predict import GridPrediction, predict_grid
from meshwright.simulate.workload.stack import AS_MEASURED
from meshwright.simulate.workload.stages import Stage
from meshwright.simulate.workload.transformer import Transformer

MODEL = Transformer(layers=4, hidden=512, heads=8, vocabulary=1024, sequence=256, dtype="f16")
CLUSTER = parse_cluster("dgx-a100:1")
GRID = Grid(batch=4, pipeline=8, fused_attention=False)
EACH = 13  # operators of an unfused layer


def cut(*counts: int, again: bool = False) -> tuple[tuple[bool, ...], ...]:
    """Stages of so many operators, all or none of them recomputed."""
    return tuple((again,) * count for count in counts)


def predict(**changes: object) -> GridPrediction:
    return predict_grid(MODEL, CLUSTER, replace(GRID, **changes), AS_MEASURED)  # type: ignore[arg-type]


@pytest.mark.parametrize("tensor", [1, 2])
def test_an_unfused_layer_has_aceso_s_thirteen_operators(tensor: int) -> None:
    layer = operators(layer_pieces(Local(MODEL, replace(GRID, tensor=tensor), AS_MEASURED)))
    assert [group[-1 if group[0].name == "sum cotangents" else 0].name for group in layer] == [
        *("attention norm", "qkv", "scores", "softmax", "attention dropout", "weighing", "projection"),
        *("attention residual", "mlp norm", "mlp up", "activation", "mlp down", "mlp residual"),
    ]


@pytest.mark.parametrize("again", [False, True])
def test_operators_of_whole_layers_cost_what_layers_cost(again: bool) -> None:
    """Two layers on each of two meshes, or 26 operators."""
    policy = "full" if again else "none"
    grid = {"pipeline": 2, "tensor": 4}
    whole = predict(recompute_per_stage=(policy, policy), **grid)
    cuts = predict(operators_per_stage=cut(2 * EACH, 2 * EACH, again=again), **grid)
    assert cuts.iteration_seconds == pytest.approx(whole.iteration_seconds, rel=1e-9)
    assert cuts.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-9)


def stage(counts: tuple[int, ...], number: int, flags: tuple[bool, ...] | None = None) -> Stage:
    """One of two stages of the model's 52 operators."""
    plan = cut(*counts)
    if flags is not None:
        plan = tuple(flags if place == number else own for place, own in enumerate(plan))
    local = Local(MODEL, replace(GRID, pipeline=2, operators_per_stage=plan), AS_MEASURED)
    part = part_at(local, number)
    assert part is not None
    return Stage(local, Prices(CLUSTER, local.grid, 0, "f16"), part.layers, False, False, part)


@given(border=st.integers(0, 4 * EACH))
@settings(max_examples=20, deadline=None)
def test_what_one_stage_loses_the_other_gains(border: int) -> None:
    """Up to the dispatch of a stage's program."""
    counts = (border, 4 * EACH - border)
    halves = [stage(counts, number) for number in range(2)]
    whole = stage((4 * EACH, 0), 0)
    dispatch = CLUSTER.device(0).dispatch_seconds.value
    assert sum(each.layers for each in halves) == pytest.approx(4.0)
    assert sum(each.weights.dense for each in halves) == pytest.approx(whole.weights.dense)
    assert sum(each.forward.seconds for each in halves) == pytest.approx(whole.forward.seconds + dispatch)
    assert sum(each.backward.seconds for each in halves) == pytest.approx(whole.backward.seconds + dispatch)


def test_each_operator_that_is_recomputed_adds_its_forward_and_frees_memory() -> None:
    counts = (2 * EACH, 2 * EACH)
    none = stage(counts, 0)
    before, kept = none.backward.seconds, none.saved_bytes
    for number in range(1, EACH + 1):
        now = stage(counts, 0, tuple(place % EACH < number for place in range(2 * EACH)))
        assert now.backward.seconds >= before
        assert now.saved_bytes <= kept
        before, kept = now.backward.seconds, now.saved_bytes
    forward_seconds = none.forward.seconds - CLUSTER.device(0).dispatch_seconds.value
    assert before == pytest.approx(none.backward.seconds + forward_seconds)


def test_a_border_inside_attention_sends_its_scores() -> None:
    """Between layers b s h elements go on; before the softmax also heads of s² scores, and the values."""
    hidden = 2.0 * 256 * 512
    for first, more in ((0, 0.0), (1, hidden), (2, 3 * hidden), (3, 2.0 * 8 * 256**2 + hidden), (11, 4 * hidden)):
        plan = cut(EACH + first, 3 * EACH - first)
        local = Local(MODEL, replace(GRID, pipeline=2, operators_per_stage=plan), AS_MEASURED)
        assert border_bytes(local, 1) == hidden + more


def test_operators_that_are_not_the_model_s_are_told() -> None:
    with pytest.raises(PlanError, match="names 51 operators; 4 layers of 13 each have 52"):
        predict(pipeline=2, tensor=4, operators_per_stage=cut(26, 25))
    with pytest.raises(PlanError, match="names 1 stages; the grid has 2"):
        predict(pipeline=2, tensor=4, operators_per_stage=cut(52))
    with pytest.raises(PlanError, match="leave out"):
        predict(pipeline=2, tensor=4, operators_per_stage=cut(26, 26), layers_per_stage=(2, 2))
    with pytest.raises(PlanError, match="zero 2 at most"):
        predict(pipeline=2, tensor=4, operators_per_stage=cut(26, 26), zero=3)


def test_borders_are_shown_at_the_nearest_place_between_layers() -> None:
    assert whole_layers((EACH + 6, 7 + EACH), layers=3) == (1, 2)
    assert whole_layers((EACH + 7, 6 + EACH), layers=3) == (2, 1)
