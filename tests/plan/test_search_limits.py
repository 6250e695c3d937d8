"""The outer loop's limits: memory margin and fallback, time, pruning, refinement, and schedules that cannot be run."""

from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest

from meshwright.calibrate.hardware import Cluster, parse_cluster
from meshwright.calibrate.quantity import Quantity
from meshwright.errors import PlanError
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan, parse_plan, plan_json
from meshwright.plan.predict import predict
from meshwright.plan.request import MEMORY_MARGIN, SURE_SHARE, refined_counts
from meshwright.plan.schedule_rules import RUNNABLE, SIMPLE, find_rule
from meshwright.plan.search import Fix, Request, search
from tests.plan.planned import BATCH, cpus, graph_of, planned


def timeless(plan: Plan) -> Plan:
    """Without the seconds that the search took."""
    return msgspec.structs.replace(plan, search={})


def with_memory(memory_bytes: float) -> Cluster:
    """Four ranks of so much memory each."""
    host = cpus().hosts[0]
    device = msgspec.structs.replace(host.device, memory_bytes=Quantity(memory_bytes, "test"))
    return msgspec.structs.replace(cpus(), hosts=(msgspec.structs.replace(host, device=device),))


ONE_SETTING = Fix(microbatches=4, schedule="1f1b", pipeline=2, remat="none")


def peak_bytes(plan: Plan) -> float:
    return plan.predicted.peak_memory_bytes


def test_the_margin_of_memory_is_kept_free_and_no_more() -> None:
    needed = peak_bytes(planned(fix=ONE_SETTING))
    device = needed / (1 - MEMORY_MARGIN)
    kept = search(graph_of, Request(with_memory(1.001 * device), BATCH, ONE_SETTING))
    assert peak_bytes(kept) == needed
    leaner = search(graph_of, Request(with_memory(0.999 * device), BATCH, ONE_SETTING))
    assert peak_bytes(leaner) < needed
    without = search(graph_of, Request(with_memory(1.001 * needed), BATCH, ONE_SETTING, memory_margin=0.0))
    assert peak_bytes(without) == needed
    with pytest.raises(PlanError, match="no plan fits"):
        search(graph_of, Request(with_memory(0.5 * needed), BATCH, ONE_SETTING))


def test_a_plan_that_is_lean_enough_needs_no_fallback() -> None:
    assert planned().fallback is None
    assert peak_bytes(planned()) <= SURE_SHARE * cpus().device(0).memory_bytes.value


def test_a_plan_that_fills_a_device_comes_with_one_that_surely_fits() -> None:
    fix = Fix(schedule="1f1b", pipeline=2, microbatches=4)
    needed = peak_bytes(planned(fix=fix))
    device = 1.1 * needed
    plan = search(graph_of, Request(with_memory(device), BATCH, fix))
    assert plan.fallback is not None
    assert peak_bytes(plan.fallback) <= SURE_SHARE * device < peak_bytes(plan)
    assert plan.fallback.predicted.iteration_seconds >= plan.predicted.iteration_seconds
    assert plan.fallback.schedule in RUNNABLE
    assert plan.fallback.fallback is None
    assert any("a fallback that fills" in note for note in plan.notes)
    assert parse_plan(plan_json(plan)) == plan
    assert predict(plan.fallback).predicted == plan.fallback.predicted


def test_where_nothing_is_leaner_a_note_says_so() -> None:
    fix = replace(ONE_SETTING, data=1, tensor=2)
    plan = search(graph_of, Request(with_memory(1.1 * peak_bytes(planned(fix=fix))), BATCH, fix))
    assert plan.fallback is None
    assert any("no leaner plan was found to fall back on" in note for note in plan.notes)


def test_when_the_time_is_over_the_best_so_far_is_given_and_it_says_so() -> None:
    plan = search(graph_of, Request(cpus(), BATCH, time_limit_seconds=1e-6))
    assert plan.predicted.fits
    assert plan.search["simulations"] == 1
    assert any("stopped after its 1e-06 seconds with 1 of 4 numbers" in note for note in plan.notes)
    enough = search(graph_of, Request(cpus(), BATCH, time_limit_seconds=1e6))
    assert timeless(enough) == timeless(planned())


def test_what_is_pruned_is_counted_and_would_not_have_won() -> None:
    """On one device four micro-batches are tried first; eight have more to start and cannot be faster."""
    plan = search(graph_of, Request(cpus(1), BATCH))
    assert plan.search["pruned"] == 1
    assert plan.search["microbatch_counts"] == 4
    assert not any("8 micro-batches" in rival.name for rival in plan.rivals)
    other = search(graph_of, Request(cpus(1), BATCH, Fix(microbatches=8)))
    assert other.predicted.iteration_seconds > plan.predicted.iteration_seconds


def test_counts_beside_the_best_are_tried() -> None:
    assert refined_counts(96, 24, [96, 48, 24, 12, 6, 3, 1]) == [16, 32]
    assert refined_counts(64, 8, [64, 32, 16, 8, 4, 2, 1]) == []
    assert refined_counts(36, 36, [36, 18, 9, 3, 1]) == []
    told: list[int] = []

    def graphs(count: int) -> ModelGraph:
        told.append(count)
        return graph_of(count)

    search(graphs, Request(cpus(), BATCH, Fix(pipeline=4)))
    assert set(told) <= {1, 2, 4, 8}


def test_the_progress_names_the_best_plan_yet() -> None:
    lines: list[tuple[int, int, str]] = []
    plan = search(graph_of, Request(cpus(), BATCH), lambda *line: lines.append(line))
    texts = [text for _, _, text in lines]
    assert "best" not in texts[0]
    assert all(", best " in text for text in texts[1:])
    assert texts[-1].startswith("done, best ")
    assert f"{plan.schedule}, {plan.microbatches} micro-batches" in texts[-1]
    seconds = [float(text.partition("best ")[2].partition(" s:")[0]) for text in texts[1:]]
    assert all(b <= 1.006 * a for a, b in pairwise(seconds))


def test_by_default_only_what_can_be_executed_is_planned() -> None:
    plan = planned(fix=Fix(pipeline=4))
    assert plan.schedule in RUNNABLE
    assert all(rival.name.partition(",")[0] in RUNNABLE for rival in plan.rivals)


@pytest.mark.parametrize("schedule", [*SIMPLE, "interleaved:2", "looped-bfs:2", "zb-v"])
def test_a_plan_of_every_schedule_is_simulated_again_from_its_file(schedule: str) -> None:
    """Chains of four equal meshes, or of two with two stages each."""
    chunks = find_rule(schedule).chunks
    fix = Fix(microbatches=8, schedule=schedule, pipeline=4 // chunks)
    plan = search(graph_of, Request(parse_cluster("p3.16xlarge:1"), BATCH, fix))
    assert (len(plan.stages), len(plan.meshes), plan.devices) == (4, 4 // chunks, 8)
    read = parse_plan(plan_json(plan))
    assert read == plan
    assert predict(read).predicted == plan.predicted
    refused = any(note.startswith(f"schedule {schedule} cannot be executed yet") for note in plan.notes)
    assert refused == (schedule not in RUNNABLE)


def test_stages_a_mesh_that_layers_do_not_suffice_for_are_refused_with_a_reason() -> None:
    with pytest.raises(PlanError, match="interleaved:4 finds no stages: no number of equal meshes has 4 of 4 layers"):
        search(graph_of, Request(cpus(), BATCH, Fix(schedule="interleaved:4", microbatches=8, remat="none")))
