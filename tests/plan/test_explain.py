"""What a plan's time is made of: it adds up, on the path and on the devices, and names what it should."""

from dataclasses import replace
from functools import cache

import pytest

from meshwright.calibrate.hardware import parse_cluster
from meshwright.models.zoo import get_model
from meshwright.plan.explain import (
    AGAIN,
    BACKWARD,
    FORWARD,
    FORWARD_SENT,
    SUMS,
    TRANSFERS,
    WAITS,
    Explanation,
    differences,
    explain,
)
from meshwright.plan.explain_layers import layer_groups, spec_words
from meshwright.plan.explain_text import differences_text, explanation_text
from meshwright.plan.graph import Leaf, ModelGraph, Tensor
from meshwright.plan.planfile import Plan
from meshwright.plan.search import Fix, Request, search
from meshwright.plan.trace.model import trace

MODEL, BATCH = "gpt:layers=4,hidden=64,heads=4,seq=32,vocab=256", 16
GRID = Fix(data=1, tensor=4, pipeline=2, microbatches=4, schedule="1f1b", remat="none")
FIXES = {
    "pipeline and tensor": GRID,
    "data": Fix(data=8, tensor=1, pipeline=1, microbatches=2, remat="none"),
    "recomputing": replace(GRID, remat="full"),
    "gpipe": replace(GRID, schedule="gpipe"),
}


@cache
def graph_of(microbatches: int) -> ModelGraph:
    return trace(get_model(MODEL), BATCH, microbatches).graph


@cache
def planned(name: str) -> Plan:
    return search(graph_of, Request(parse_cluster("p3.16xlarge:1"), BATCH, FIXES[name]))


@cache
def explained(name: str) -> Explanation:
    return explain(planned(name))


@pytest.mark.parametrize("name", FIXES)
def test_both_columns_add_up_to_the_step(name: str) -> None:
    found = explained(name)
    assert sum(found.path_seconds.values()) == pytest.approx(found.step_seconds, rel=1e-9)
    assert sum(found.device_seconds.values()) == pytest.approx(found.step_seconds, rel=1e-9)
    assert found.step_seconds == pytest.approx(planned(name).predicted.iteration_seconds)


def test_computation_on_devices_is_what_the_stages_compute() -> None:
    plan, found = planned("pipeline and tensor"), explained("pipeline and tensor")
    for cause, field in ((FORWARD, "forward_compute_seconds"), (BACKWARD, "backward_compute_seconds")):
        work = sum(plan.microbatches * getattr(s, field) * len(s.devices) for s in plan.stages)
        assert found.device_seconds[cause] == pytest.approx(work / plan.hardware.devices)


def test_each_kind_of_parallelism_has_its_own_cost() -> None:
    grid, data = explained("pipeline and tensor"), explained("data")
    assert {FORWARD_SENT, TRANSFERS} <= set(grid.path_seconds)
    assert SUMS in data.path_seconds
    assert TRANSFERS not in data.path_seconds
    assert WAITS not in grid.path_seconds
    assert AGAIN in explained("recomputing").path_seconds
    assert AGAIN not in grid.path_seconds


@pytest.mark.parametrize("name", FIXES)
def test_collectives_add_up_to_what_the_stage_was_priced_for(name: str) -> None:
    plan = planned(name)
    for stage in plan.stages:
        seconds = {
            phase: sum(c.seconds for c in stage.collectives if c.phase == phase) for phase in ("forward", "once")
        }
        assert seconds["forward"] == pytest.approx(stage.forward_communication_seconds)
        assert seconds["once"] == pytest.approx(stage.reduce_seconds)


def test_memory_parts_add_up_to_the_peak_of_each_stage() -> None:
    for stage, parts in zip(planned("gpipe").stages, explained("gpipe").memory, strict=True):
        assert sum(size for _, size in parts) == pytest.approx(stage.peak_memory_bytes)


def test_differences_add_up_to_the_difference_of_the_steps() -> None:
    one, other = explained("pipeline and tensor"), explained("data")
    rows = differences(one, other)
    assert sum(theirs - mine for _, mine, theirs in rows) == pytest.approx(other.step_seconds - one.step_seconds)
    apart = [abs(theirs - mine) for _, mine, theirs in rows]
    assert apart == sorted(apart, reverse=True)
    assert "takes" in differences_text(one, other, ("a", "b")).splitlines()[0]


def test_every_layer_and_every_weight_is_told_once() -> None:
    plan = planned("pipeline and tensor")
    graph = graph_of(plan.microbatches)
    groups = layer_groups(plan, graph)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(graph.layers)))
    for group in groups:
        assert len(group.weights) == len(graph.layers[group.layers[0]].parameters)
    said = {words for group in groups for name, words in group.weights if "mlp.up.kernel" in name}
    assert said == {"columns over tensor"}
    text = explanation_text(explained("pipeline and tensor"), groups)
    assert "columns over tensor: layers." in text


@pytest.mark.parametrize(
    ("spec", "shape", "words"),
    [
        ("-,-", (4, 8), "whole on every device"),
        ("-,tensor", (4, 8), "columns over tensor"),
        ("data,tensor", (4, 8), "rows over data and columns over tensor"),
        ("data+tensor", (8,), "split over data+tensor"),
        ("-,tensor,-", (2, 4, 8), "dim 1 of 3 over tensor"),
        ("", (), "whole on every device"),
    ],
)
def test_specs_in_words(spec: str, shape: tuple[int, ...], words: str) -> None:
    assert spec_words(spec, Leaf("w", Tensor(shape, "float32"))) == words
