"""The outer loop: what is tried, what wins, what is fixed and what is refused."""

from itertools import pairwise

import msgspec
import pytest

from meshwright.calibrate.hardware import Cluster, Link
from meshwright.calibrate.quantity import Quantity
from meshwright.errors import PlanError
from meshwright.plan.planfile import Plan
from meshwright.plan.search import Fix, Request, microbatch_counts, search
from tests.plan.planned import BATCH, cpus, graph_of, planned


@pytest.mark.parametrize("batch", [1, 2, 7, 12, 96, 1000, 1024])
def test_numbers_of_microbatches_divide_and_shrink_by_about_two(batch: int) -> None:
    counts = microbatch_counts(batch, None)
    assert counts[0] == batch
    assert counts[-1] == 1
    assert all(batch % count == 0 for count in counts)
    assert all(a >= 1.9 * b or b == 1 for a, b in pairwise(counts))
    if batch == 1024:
        assert counts == [2**k for k in range(10, -1, -1)]


def test_a_fixed_number_is_the_only_one() -> None:
    assert microbatch_counts(12, 4) == [4]
    with pytest.raises(PlanError, match="12 does not split into 5 micro-batches; use 4 or 6"):
        microbatch_counts(12, 5)
    with pytest.raises(PlanError, match="at least 1"):
        microbatch_counts(0, None)


def test_nothing_that_was_simulated_and_fits_is_clearly_faster() -> None:
    plan = planned()
    assert plan.predicted.fits
    assert all(r.iteration_seconds * 1.005 >= plan.predicted.iteration_seconds for r in plan.rivals if r.fits)
    assert plan.search["simulations"] >= len(plan.rivals) + 1


def test_the_same_request_gives_the_same_plan() -> None:
    def timeless(plan: Plan) -> Plan:
        return msgspec.structs.replace(plan, search={})

    again = search(graph_of, Request(cpus(), BATCH))
    assert timeless(again) == timeless(planned())


def meshes(plan: Plan) -> list[int]:
    return [len(stage.devices) for stage in plan.stages]


@pytest.mark.parametrize(
    ("fix", "devices"),
    [
        (Fix(pipeline=4), [1, 1, 1, 1]),
        (Fix(pipeline=2, data=1, tensor=2), [2, 2]),
        (Fix(pipeline=2, data=2), [2, 2]),
        (Fix(data=4), [4]),
        (Fix(tensor=4), [4]),
        (Fix(data=2, tensor=2), [4]),
        (Fix(stages=((1, 1), (1, 2))), [1, 2]),
        (Fix(stages=((2, 1), (1, 1), (1, 1))), [2, 1, 1]),
    ],
)
def test_meshes_that_are_fixed_are_kept(fix: Fix, devices: list[int]) -> None:
    plan = planned(fix=fix)
    assert meshes(plan) == devices
    for stage in plan.stages:
        for axis, size in (("data", fix.data), ("tensor", fix.tensor)):
            if size is not None:
                assert stage.mesh.get(axis, 1) == size


def test_an_axis_that_is_fixed_splits_its_part_even_where_links_are_slow() -> None:
    """On CPU ranks copying would be quicker; who fixes an axis wants it used all the same."""
    tensor = planned(fix=Fix(tensor=4, data=1, microbatches=1))
    weights = [text for layout in tensor.layouts.values() for key, text in layout.values.items() if "parameter" in key]
    assert sum("tensor" in text for text in weights) >= 4
    data = planned(fix=Fix(data=4, tensor=1, microbatches=1))
    assert {boundary for stage in data.stages for boundary in stage.boundaries} == {"data"}
    assert any(layout.partial for layout in data.layouts.values())


def test_schedule_remat_and_microbatches_that_are_fixed_are_kept() -> None:
    plan = planned(fix=Fix(microbatches=4, schedule="gpipe", remat="full", pipeline=2))
    assert (plan.microbatches, plan.schedule, plan.remat, len(plan.stages)) == (4, "gpipe", "full", 2)
    assert all("gpipe, 4 micro-batches, remat full" in rival.name for rival in plan.rivals)


def test_devices_in_order_and_layers_in_full() -> None:
    for fix in (Fix(), Fix(stages=((2, 1), (1, 1)))):
        plan = planned(fix=fix)
        devices = [d for stage in plan.stages for d in stage.devices]
        assert devices == sorted(devices)
        assert plan.stages[0].layers[0] == 0
        assert plan.stages[-1].layers[1] == len(graph_of(1).layers)


def slow_links(bytes_per_second: float) -> Cluster:
    """Four CPU ranks whose links are that slow."""
    link = Link(bytes_per_second=Quantity(bytes_per_second, "test"), latency_seconds=Quantity(1e-6, "test"))
    return msgspec.structs.replace(
        cpus(), hosts=(msgspec.structs.replace(cpus().hosts[0], link=link),), inter_host=link
    )


def test_a_slow_network_is_avoided_if_the_search_looks_at_it() -> None:
    """Over links of a kilobyte a second nothing is worth sending; blind to transfers, the DP still makes stages."""
    cluster, fix = slow_links(1e3), Fix(schedule="1f1b", microbatches=4)
    seeing = search(graph_of, Request(cluster, BATCH, fix))
    blind = search(graph_of, Request(cluster, BATCH, fix, cross_mesh=False))
    assert len(seeing.stages) == 1 < len(blind.stages)
    assert seeing.transfers == ()
    assert seeing.stages[0].forward_communication_seconds == seeing.stages[0].reduce_seconds == 0
    assert seeing.predicted.iteration_seconds < 0.01 * blind.predicted.iteration_seconds


def small_memory(memory_bytes: float) -> Cluster:
    host = cpus().hosts[0]
    device = msgspec.structs.replace(host.device, memory_bytes=Quantity(memory_bytes, "test"))
    return msgspec.structs.replace(cpus(), hosts=(msgspec.structs.replace(host, device=device),))


def test_where_memory_is_short_the_plan_keeps_to_it() -> None:
    roomy = planned(fix=Fix(microbatches=1))
    limit = 0.8 * roomy.predicted.peak_memory_bytes
    lean = search(graph_of, Request(small_memory(limit), BATCH, Fix(schedule="1f1b")))
    assert lean.predicted.fits
    assert lean.predicted.peak_memory_bytes <= limit


def test_a_model_that_is_too_large_is_refused_with_one_line() -> None:
    weights = graph_of(1).training_bytes(optimizer_bytes=8)
    with pytest.raises(PlanError) as caught:
        search(graph_of, Request(small_memory(1.01 * weights / 4), BATCH, Fix(schedule="1f1b", microbatches=1)))
    assert "no plan fits" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_and_optimizer_that_no_split_can_hold_are_refused_before_anything_is_tried() -> None:
    told: list[str] = []
    with pytest.raises(PlanError, match=r"use more than \d+ such devices"):
        search(graph_of, Request(small_memory(1e4), BATCH), lambda done, total, text: told.append(text))
    assert len(told) == 1


@pytest.mark.parametrize(
    ("fix", "line"),
    [
        (Fix(stages=((2, 2), (1, 1))), "the given stages want 5 devices; the cluster has 4"),
        (Fix(stages=((1, 1),) * 4, microbatches=3), "8 does not split into 3 micro-batches"),
        (Fix(pipeline=3), "3 equal stages do not divide the cluster's 4 devices"),
        (Fix(data=3), "multiply to 3, which does not divide the cluster's 4 devices"),
        (Fix(pipeline=2, data=1, tensor=1), "fixed sizes use 2 of the cluster's 4 devices; they must multiply to 4"),
    ],
)
def test_what_does_not_go_together_is_refused_with_one_line(fix: Fix, line: str) -> None:
    with pytest.raises(PlanError, match=line) as caught:
        search(graph_of, Request(cpus(), BATCH, fix))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"pipeline": 0}, {"schedule": "zigzag"}, {"remat": "some"}, {"microbatches": -1}])
def test_a_fix_that_makes_no_sense_is_refused_at_birth(bad: dict[str, object]) -> None:
    with pytest.raises(PlanError):
        Fix(**bad)  # type: ignore[arg-type]
