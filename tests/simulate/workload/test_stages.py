"""A stage from its kernels: one layer against published times, and what must hold for any stage."""

from dataclasses import replace
from typing import Any

import pytest

from meshwright.calibrate.hardware import parse_cluster
from meshwright.simulate.workload.block import forward
from meshwright.simulate.workload.grid import Grid
from meshwright.simulate.workload.pieces import Local, layer_pieces
from meshwright.simulate.workload.placement import Prices
from meshwright.simulate.workload.stack import Stack, find_stack
from meshwright.simulate.workload.stages import Stage
from meshwright.simulate.workload.transformer import Transformer

GPT_22B = Transformer(layers=48, hidden=6144, heads=64, vocabulary=51200, sequence=2048, dtype="f16")
QUIET = replace(find_stack("megatron-2021"), operation_seconds=0.0)


def stage_of(
    model: Transformer = GPT_22B,
    stack: Stack = QUIET,
    *,
    layers: int = 4,
    first: bool = False,
    last: bool = False,
    hosts: int = 1,
    **grid: Any,
) -> Stage:
    laid = Grid(**{"batch": 4, "microbatch_size": 4, "tensor": 8, "fused_attention": False, **grid})
    cluster = parse_cluster(f"dgx-a100:{hosts}")
    return Stage(Local(model, laid, stack), Prices(cluster, laid, 0, model.dtype), layers, first, last)


@pytest.mark.parametrize(
    ("sequence_parallel", "recompute", "forward_ms", "backward_ms"),
    [
        (False, "none", 7.7, 11.9),
        (True, "none", 7.2, 11.8),
        (False, "full", 7.7, 19.5),
        (False, "selective", 7.7, 13.2),
        (True, "selective", 7.2, 13.1),
    ],
)
def test_one_layer_takes_what_was_measured(
    sequence_parallel: bool, recompute: str, forward_ms: float, backward_ms: float
) -> None:
    """Korthikanti et al., 2022, table 4: a layer of the 22B model on 8 A100. Nothing here was fitted to it."""
    stage = stage_of(
        stack=find_stack("megatron-2021"), layers=8, sequence_parallel=sequence_parallel, recompute=recompute
    )
    assert stage.forward.seconds / 8 * 1e3 == pytest.approx(forward_ms, rel=0.03)
    assert stage.backward.seconds / 8 * 1e3 == pytest.approx(backward_ms, rel=0.03)


def test_full_recomputation_adds_a_forward_to_the_backward() -> None:
    plain, again = stage_of(), stage_of(recompute="full")
    assert again.backward.seconds == pytest.approx(plain.backward.seconds + plain.forward.seconds)
    assert again.forward.seconds == plain.forward.seconds


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_halves_make_the_whole_backward(recompute: str) -> None:
    """With nothing overlapped and a host that costs nothing; what is recomputed counts in the first half alone."""
    stage = stage_of(recompute=recompute, first=True, last=True)
    halves = stage.input_gradient.seconds + stage.weight_gradient.seconds
    assert halves == pytest.approx(stage.backward.seconds)


def test_layers_add_up() -> None:
    one, many = stage_of(layers=1), stage_of(layers=7)
    assert many.forward.seconds == pytest.approx(7 * one.forward.seconds)
    assert stage_of(layers=0).forward.seconds == 0.0


def test_a_slow_host_binds_small_layers() -> None:
    """When every dispatch takes longer than its kernel, a forward takes as long as its dispatches and one kernel."""
    small = replace(GPT_22B, hidden=256, heads=8, sequence=128)
    slow = replace(QUIET, operation_seconds=1e-3)
    stage = stage_of(small, slow, batch=1, microbatch_size=1)
    dispatched = stage.layers * len(forward(layer_pieces(stage.local))) * 1e-3
    assert dispatched < stage.forward.seconds < dispatched + 1e-3


def test_collectives_beside_weight_gradients_cost_less() -> None:
    hidden = stage_of(stack=replace(QUIET, overlapped_tensor=True))
    assert hidden.backward.seconds < stage_of().backward.seconds
    assert hidden.backward.exposed_seconds < stage_of().backward.exposed_seconds
    assert hidden.forward.seconds == stage_of().forward.seconds


def test_gradients_summed_beside_the_backward_leave_a_rest() -> None:
    grid: dict[str, Any] = {"hosts": 4, "tensor": 8, "data": 4, "batch": 16}
    after = stage_of(**grid).reduce_seconds
    beside = stage_of(stack=replace(QUIET, overlapped_gradients=True), **grid).reduce_seconds
    assert 0 < beside < after


def test_zero_shares_out_what_it_says() -> None:
    """18 or 16 bytes a weight without ZeRO; level 1 divides the optimizer's 12 by the ranks, 2 gradients, 3 weights."""
    sizes = {}
    for zero in range(4):
        stage = stage_of(zero=zero, tensor=1, data=8, batch=32, microbatch_size=1)
        sizes[zero] = dict(stage.static_parts)
        weights = stage.weights.dense
    assert sizes[0] == pytest.approx({"parameters": 2 * weights, "gradients": 2 * weights, "optimizer": 12 * weights})
    assert sizes[1]["optimizer"] == pytest.approx(12 * weights / 8)
    assert sizes[2]["gradients"] == pytest.approx(2 * weights / 8)
    assert sizes[3]["parameters"] == pytest.approx(2 * weights / 8)
    assert sizes[3]["communication buffers"] == pytest.approx(2 * 2 * weights / 4)  # of two layers of four


def test_weights_gathered_layer_by_layer_hide_behind_large_layers() -> None:
    """ZeRO 3 costs little where a layer computes for longer than its weights travel, and much where it does not."""
    near: dict[str, Any] = {"tensor": 1, "data": 8, "microbatch_size": 4, "batch": 32}
    plain, shared = stage_of(**near), stage_of(zero=3, **near)
    assert plain.forward.seconds < shared.forward.seconds < 1.1 * plain.forward.seconds
    short = replace(GPT_22B, sequence=16)
    plain, shared = (stage_of(short, zero=zero, **near) for zero in (0, 3))
    assert shared.forward.seconds > 1.5 * plain.forward.seconds
    assert shared.forward.exposed_seconds > 0


def test_a_tied_head_on_its_own_stage_holds_a_copy() -> None:
    model = GPT_22B
    table = model.vocabulary * model.hidden / 8
    head = stage_of(last=True).weights.dense - stage_of().weights.dense
    assert head == pytest.approx(table + 2 * model.hidden / 8)
    both = stage_of(first=True, last=True).weights.dense - stage_of().weights.dense
    assert both == pytest.approx((model.embedding_parameters + 2 * model.hidden) / 8)


def test_experts_are_split_and_exchanged() -> None:
    mixed = replace(GPT_22B, hidden=1024, heads=16, experts=16, experts_per_token=2)
    grid: dict[str, Any] = {"tensor": 1, "data": 8, "batch": 8, "microbatch_size": 1}
    alone, split = stage_of(mixed, **grid), stage_of(mixed, expert=8, **grid)
    assert split.weights.routed == pytest.approx(alone.weights.routed / 8)
    assert split.weights.dense == alone.weights.dense
    assert split.forward.exposed_seconds > 0 == alone.forward.exposed_seconds
    assert split.reduce_seconds < alone.reduce_seconds  # experts that live once need no sum
