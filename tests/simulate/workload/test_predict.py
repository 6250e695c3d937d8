"""Whole steps on ideal clusters, where closed forms say how long they take; counts of kernels and collectives."""

from dataclasses import replace
from math import inf
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.calibrate.hardware import Cluster, Device, Host, Link, Quantity
from meshwright.errors import MeshwrightError, PlanError
from meshwright.simulate.workload.grid import Grid
from meshwright.simulate.workload.predict import GridPrediction, predict_grid
from meshwright.simulate.workload.stack import Stack, find_stack, shipped_stacks
from meshwright.simulate.workload.transformer import Transformer

PEAK, EFFICIENCY = 100e12, 0.5
FREE = 1e30  # bytes a second: traffic takes no time
PLAIN = Stack(name="plain", source="a stack that costs nothing", program_seconds=0.0, clipped=False)
MODEL = Transformer(layers=8, hidden=512, heads=8, vocabulary=1024, sequence=256)


def quantity(value: float) -> Quantity:
    return Quantity(value, "made up")


def cluster(devices: int, *, link: float = FREE, latency: float = 0.0, memory: float = FREE) -> Cluster:
    """One host whose devices do matrix products and nothing else takes time, unless asked for."""
    device = Device(
        name="ideal",
        memory_bytes=quantity(1e15),
        flops_per_second={"f32": quantity(PEAK), "bf16": quantity(PEAK)},
        matmul_efficiency=quantity(EFFICIENCY),
        memory_bytes_per_second=quantity(memory),
        launch_seconds=quantity(0.0),
        dispatch_seconds=quantity(0.0),
    )
    wire = Link(bytes_per_second=quantity(link), latency_seconds=quantity(latency))
    return Cluster(name="ideal", hosts=(Host(device=device, devices=devices, cores=8, link=wire),), inter_host=wire)


def step(model: Transformer = MODEL, stack: Stack = PLAIN, at: Cluster | None = None, **sizes: Any) -> GridPrediction:
    grid = Grid(**{"batch": 16, "fused_attention": False, **sizes})
    return predict_grid(model, cluster(grid.devices) if at is None else at, grid, stack)


def head_flops(model: Transformer, batch: int) -> float:
    return 2.0 * batch * model.sequence * model.hidden * model.vocabulary


def test_one_ideal_device_takes_its_arithmetic() -> None:
    found = step()
    assert found.iteration_seconds == pytest.approx(MODEL.step_flops(16) / (PEAK * EFFICIENCY))
    assert found.mfu == pytest.approx(EFFICIENCY)
    assert found.hfu == pytest.approx(EFFICIENCY)
    assert found.tokens_per_second == pytest.approx(16 * 256 / found.iteration_seconds)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_is_in_hfu_but_not_in_mfu(recompute: str) -> None:
    found = step(recompute=recompute)
    scores = 4.0 * 16 * MODEL.layers * MODEL.sequence**2 * MODEL.hidden
    again = MODEL.forward_flops(16) - head_flops(MODEL, 16) if recompute == "full" else scores
    assert found.iteration_seconds == pytest.approx((MODEL.step_flops(16) + again) / (PEAK * EFFICIENCY))
    assert found.hfu == pytest.approx(EFFICIENCY)
    assert found.mfu < found.hfu


@given(
    tensor=st.sampled_from([1, 2, 4]),
    data=st.sampled_from([1, 2, 4]),
    context=st.sampled_from([1, 2]),
    zero=st.integers(0, 3),
    sequence_parallel=st.booleans(),
    microbatch=st.sampled_from([1, 2]),
)
@settings(max_examples=25, deadline=None)
def test_over_free_links_every_axis_divides_the_arithmetic(
    tensor: int, data: int, context: int, zero: int, sequence_parallel: bool, microbatch: int
) -> None:
    found = step(
        tensor=tensor,
        data=data,
        context=context,
        zero=zero,
        sequence_parallel=sequence_parallel,
        microbatch_size=microbatch,
    )
    ideal = MODEL.step_flops(16) / (PEAK * EFFICIENCY * tensor * data * context)
    assert found.iteration_seconds == pytest.approx(ideal, rel=1e-6)


@pytest.mark.parametrize(("pipeline", "microbatches"), [(2, 2), (4, 8), (8, 16)])
def test_equal_stages_under_1f1b_leave_the_known_bubble(pipeline: int, microbatches: int) -> None:
    """(m + p - 1) pairs of forward and backward; a vocabulary of one word leaves the head next to no work."""
    model = replace(MODEL, vocabulary=1, tied=False)
    found = step(model, pipeline=pipeline, batch=microbatches)
    pair = model.step_flops(1) / (PEAK * EFFICIENCY * pipeline)
    assert found.iteration_seconds == pytest.approx((microbatches + pipeline - 1) * pair, rel=1e-3)


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("interleaved", 2), ("zb-h1", 1)])
def test_other_schedules_have_their_own_bubbles(schedule: str, chunks: int) -> None:
    """Bubbles of p - 1 times F + B; half of it with two chunks; F + I - W (Qi et al., 2024, section 2.3)."""
    model = replace(MODEL, vocabulary=1, tied=False)
    found = step(model, pipeline=4, batch=8, schedule=schedule, chunks=chunks)
    unit = model.forward_flops(1) / (PEAK * EFFICIENCY * 4)  # a stage's forward
    scores = 4 * model.layers * model.sequence**2 * model.hidden  # they have no weights, so W is less than F
    weight = 1 - scores / model.forward_flops(1)
    bubble = {"gpipe": 3.0, "interleaved": 1.5, "zb-h1": 1 + (2 - weight) - weight}[schedule]
    assert found.iteration_seconds == pytest.approx((8 * 3 + 3 * bubble) * unit, rel=2e-3)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallelism_sums_four_times_a_layer(sequence_parallel: bool) -> None:
    """Shoeybi et al., 2019, figure 4: two all-reduces forward, two backward; gather and scatter count as one together.

    Every message takes one latency a hop: 2 (t - 1) hops of a ring all-reduce, t - 1 of a gather or scatter.
    """
    latency, tensor = 1e-3, 4
    model = replace(MODEL, layers=4)
    more = replace(MODEL, layers=8)
    at = cluster(tensor, latency=latency)
    seconds = [
        step(one, at=at, tensor=tensor, batch=1, sequence_parallel=sequence_parallel).iteration_seconds
        - one.step_flops(1) / (PEAK * EFFICIENCY * tensor)
        for one in (model, more)
    ]
    hops = 2 * (tensor - 1)
    # With sequence parallelism the inputs of both pairs of matrices are gathered again for the weight gradients, which
    # hides what the input-gradients take, next to nothing here.
    again = 2 * (tensor - 1) if sequence_parallel else 0
    assert (seconds[1] - seconds[0]) / 4 == pytest.approx((4 * hops + again) * latency, rel=1e-3)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_memory_of_weights_follows_zero(zero: int) -> None:
    """Rajbhandari et al., 2020, figure 1, with f32 gradients: 2 + 4 + 12 bytes a weight, shared out level by level."""
    ranks = 4
    found = step(data=ranks, zero=zero, batch=16)
    parts = dict(found.peak_parts)
    weights = MODEL.parameters
    assert parts["parameters"] == pytest.approx(weights * 2 / (ranks if zero >= 3 else 1))
    assert parts["gradients"] == pytest.approx(weights * 4 / (ranks if zero >= 2 else 1))
    assert parts["optimizer"] == pytest.approx(weights * 12 / (ranks if zero >= 1 else 1))
    assert sum(parts.values()) == pytest.approx(found.peak_bytes)


def test_utilisation_of_a_mixed_cluster_counts_every_peak() -> None:
    """Half the devices with a third of the peak: what all could do is two thirds of what the quick ones could."""
    quick = cluster(2)
    device = quick.hosts[0].device
    slow = msgspec.structs.replace(
        device, flops_per_second={name: rate.scaled(1 / 3) for name, rate in device.flops_per_second.items()}
    )
    hosts = (quick.hosts[0], msgspec.structs.replace(quick.hosts[0], device=slow))
    both = [msgspec.structs.replace(quick, hosts=order) for order in (hosts, hosts[::-1])]
    for mixed in both:
        found = step(at=mixed, tensor=2, pipeline=2, microbatch_size=2)
        assert found.mfu == pytest.approx(MODEL.step_flops(16) / found.iteration_seconds / (4 * PEAK * 2 / 3))


def test_replicas_on_unlike_hosts_wait_for_the_slowest_wherever_it_stands() -> None:
    """Data parallelism over two hosts, one of a third of the peak: each step is the slow host's."""
    quick = cluster(2)
    device = quick.hosts[0].device
    third = {name: rate.scaled(1 / 3) for name, rate in device.flops_per_second.items()}
    slow = msgspec.structs.replace(quick.hosts[0], device=msgspec.structs.replace(device, flops_per_second=third))
    alone = step(at=msgspec.structs.replace(quick, hosts=(slow,)), tensor=2, batch=8).iteration_seconds
    for hosts in ((quick.hosts[0], slow), (slow, quick.hosts[0])):
        found = step(at=msgspec.structs.replace(quick, hosts=hosts), tensor=2, data=2)
        assert found.iteration_seconds == pytest.approx(alone)


def test_a_tensor_parallel_group_is_priced_on_its_own_host_s_link() -> None:
    near, far = cluster(2, link=1e9), cluster(2, link=1e8)
    mixed = msgspec.structs.replace(near, hosts=(near.hosts[0], far.hosts[0]))
    found = step(at=mixed, tensor=2, data=2)
    slow, quick = (step(at=at, tensor=2, batch=8) for at in (far, near))
    assert found.collective_seconds == pytest.approx(slow.collective_seconds)
    assert slow.collective_seconds > 5 * quick.collective_seconds


@pytest.mark.parametrize("schedule", ["zb-1p", "zb-2p"])
def test_searched_schedules_are_searched_for_the_times_of_the_stages(schedule: str) -> None:
    """No slower than 1F1B of the same grid, and within its own limit of memory."""
    found, fixed = (step(schedule=name, pipeline=4, microbatch_size=2) for name in (schedule, "1f1b"))
    assert found.timeline.span_seconds <= fixed.timeline.span_seconds * (1 + 1e-9)
    held = [cost.saved_bytes for cost in found.costs.stages]
    limit = 4 * (2 if schedule == "zb-2p" else 1) * sorted(held)[1]
    live = [
        peak - cost.static_bytes - cost.transient_bytes
        for peak, cost in zip(found.timeline.peak_bytes, found.costs.stages, strict=True)
    ]
    assert max(live[1:-1]) <= limit * (1 + 1e-9)


def test_a_slow_host_is_what_a_small_model_waits_for() -> None:
    eager = replace(PLAIN, operation_seconds=1e-3)
    found = step(stack=eager, batch=2)
    assert found.iteration_seconds > 100 * step(batch=2).iteration_seconds
    assert step(stack=replace(PLAIN, operation_seconds=2e-3), batch=2).iteration_seconds == pytest.approx(
        2 * found.iteration_seconds, rel=0.05
    )


@given(link=st.floats(1e9, 1e12), factor=st.floats(1.0, 100.0), name=st.sampled_from(sorted(shipped_stacks())))
@settings(max_examples=20, deadline=None)
def test_a_quicker_link_never_slows_a_step(link: float, factor: float, name: str) -> None:
    sizes: dict[str, Any] = {"tensor": 2, "data": 2, "pipeline": 2, "zero": 1}
    slow, quick = (
        step(stack=find_stack(name), at=cluster(8, link=rate, latency=1e-6), **sizes) for rate in (link, link * factor)
    )
    assert quick.iteration_seconds <= slow.iteration_seconds * (1 + 1e-9)
    assert 0 <= slow.exposed_communication_seconds < inf


def test_overlap_hides_the_sum_of_gradients() -> None:
    at = cluster(4, link=1e11)
    shown = step(at=at, data=4, batch=64, microbatch_size=16)
    hidden = step(stack=replace(PLAIN, overlapped_gradients=True), at=at, data=4, batch=64, microbatch_size=16)
    free = step(data=4, batch=64, microbatch_size=16)
    assert free.iteration_seconds < hidden.iteration_seconds < shown.iteration_seconds


def test_experts_over_devices_hold_their_share_and_exchange_tokens() -> None:
    mixed = replace(MODEL, experts=8, experts_per_token=2)
    whole, shared = (step(mixed, data=4, expert=expert, batch=16) for expert in (1, 4))
    routed = mixed.layers * mixed.routed_parameters
    saved = dict(whole.peak_parts)["parameters"] - dict(shared.peak_parts)["parameters"]
    assert saved == pytest.approx(2 * routed * 3 / 4)
    slow = cluster(4, link=1e9)
    exchanged = step(mixed, at=slow, data=4, expert=4, batch=16).exposed_communication_seconds
    assert exchanged > 0


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(PlanError, match="needs 4 devices; there are 8"):
        step(at=cluster(8), tensor=4)
    with pytest.raises(PlanError, match="splits backwards"):
        step(pipeline=2, data=2, zero=3, schedule="zb-h1")
    with pytest.raises(MeshwrightError, match="software stack 'torch' is unknown"):
        find_stack("torch")


def test_the_same_question_has_the_same_answer() -> None:
    sizes: dict[str, Any] = {"tensor": 2, "pipeline": 2, "data": 2}
    at = cluster(8, link=1e10)
    assert step(at=at, **sizes).iteration_seconds == step(at=msgspec.structs.replace(at), **sizes).iteration_seconds


def test_more_layers_than_memory_are_one_line() -> None:
    with pytest.raises(MeshwrightError, match="operations and their dispatches need about"):
        step(replace(MODEL, layers=10**10))


def test_a_policy_for_each_stage_is_that_of_equal_stages_where_all_agree() -> None:
    grid = Grid(batch=8, pipeline=2, recompute="full")
    named = replace(grid, recompute="none", recompute_per_stage=("full", "full"))
    assert predict_grid(MODEL, cluster(2), grid, PLAIN).costs == predict_grid(MODEL, cluster(2), named, PLAIN).costs


def test_only_the_stage_that_recomputes_has_the_longer_backward_and_holds_less() -> None:
    grid = Grid(batch=8, pipeline=2)
    mixed = predict_grid(MODEL, cluster(2), replace(grid, recompute_per_stage=("none", "full")), PLAIN)
    plain = predict_grid(MODEL, cluster(2), grid, PLAIN)
    full = predict_grid(MODEL, cluster(2), replace(grid, recompute="full"), PLAIN)
    assert mixed.costs.stages == (plain.costs.stages[0], full.costs.stages[1])
    assert mixed.costs.stages[1].backward_seconds > plain.costs.stages[1].backward_seconds
    assert mixed.hfu * mixed.iteration_seconds == pytest.approx(
        (plain.hfu * plain.iteration_seconds + full.hfu * full.iteration_seconds) / 2
    )


def test_policies_that_are_not_one_for_each_stage_are_told() -> None:
    with pytest.raises(PlanError, match="recompute_per_stage names 1 stages; the grid has 2"):
        Grid(batch=8, pipeline=2, recompute_per_stage=("none",))


def test_a_tensor_axis_for_each_mesh_is_that_of_equal_meshes_where_all_agree() -> None:
    grid = Grid(batch=8, pipeline=2, tensor=2, data=2)
    named = replace(grid, tensor=1, tensor_per_mesh=(2, 2))
    wired = cluster(8, link=1e9, latency=1e-5)
    assert predict_grid(MODEL, wired, grid, PLAIN).costs == predict_grid(MODEL, wired, named, PLAIN).costs


def test_a_mesh_of_twice_the_devices_takes_half_the_time_and_stands_behind_the_first() -> None:
    mixed = predict_grid(MODEL, cluster(3), Grid(batch=8, pipeline=2, tensor_per_mesh=(1, 2)), PLAIN)
    equal = predict_grid(MODEL, cluster(2), Grid(batch=8, pipeline=2), PLAIN)
    first, last = mixed.costs.stages
    assert (first.devices, last.devices) == ((0,), (1, 2))
    assert first.forward_seconds == equal.costs.stages[0].forward_seconds
    assert last.forward_seconds == pytest.approx(equal.costs.stages[1].forward_seconds / 2)


@pytest.mark.parametrize(("spread", "copies"), [(False, 2), (True, 1)])
def test_a_larger_mesh_receives_an_activation_once_where_it_is_spread_and_once_a_device_where_not(
    spread: bool, copies: int
) -> None:
    grid = Grid(batch=8, pipeline=2, tensor_per_mesh=(1, 2))
    step = predict_grid(MODEL, cluster(3), grid, replace(PLAIN, spread_transfers=spread))
    activation = MODEL.sequence * MODEL.hidden * MODEL.dtype_bytes
    assert step.costs.transfers[0, 1, "activation"].bytes == copies * activation
    assert step.costs.transfers[1, 0, "cotangent"].bytes == activation


def test_sizes_of_meshes_that_do_not_fit_are_told() -> None:
    with pytest.raises(PlanError, match="tensor_per_mesh names 1 meshes; the grid has 2"):
        Grid(batch=8, pipeline=2, tensor_per_mesh=(1,))
    with pytest.raises(PlanError, match="heads 8 do not split over 3 tensor-parallel devices"):
        predict_grid(MODEL, cluster(4), Grid(batch=8, pipeline=2, tensor_per_mesh=(1, 3)), PLAIN)
