"""Baselines: each is what its name says, none is ahead of the search, and all stand beside the plan."""

from functools import cache

import pytest

from meshwright.calibrate.hardware import parse_cluster
from meshwright.errors import PlanError
from meshwright.models.zoo import get_model
from meshwright.plan.baselines import BASELINES, compare
from meshwright.plan.baselines.base import fixed
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan
from meshwright.plan.search import Fix, Request, search
from meshwright.plan.trace.model import trace

MODEL, BATCH = "gpt:layers=8,hidden=256,heads=8,seq=128,vocab=1024", 16
REQUEST = Request(parse_cluster("p3.16xlarge:1"), BATCH)
SLACK = 1.01  # of the best that is known: what the search may be behind


@cache
def graph_of(microbatches: int) -> ModelGraph:
    return trace(get_model(MODEL), BATCH, microbatches).graph


@cache
def ours() -> Plan:
    return search(graph_of, REQUEST)


@cache
def theirs(name: str) -> Plan:
    (baseline,) = (b for b in BASELINES if b.name == name)
    return baseline.scheme(graph_of, REQUEST, ours())


@pytest.mark.parametrize("name", [b.name for b in BASELINES])
def test_no_baseline_is_ahead_of_the_search(name: str) -> None:
    assert ours().predicted.iteration_seconds <= SLACK * theirs(name).predicted.iteration_seconds


def test_each_is_what_its_name_says() -> None:
    assert [s.mesh for s in theirs("data parallel").stages] == [{"data": 8, "tensor": 1}]
    assert len(theirs("intra-operator only").stages) == 1
    assert [len(s.devices) for s in theirs("inter-operator only").stages] == [1] * 8
    gpipe = theirs("GPipe, equal layers")
    assert (gpipe.schedule, gpipe.remat) == ("gpipe", "full")
    megatron = theirs("Megatron-LM's grid")
    assert len({tuple(s.mesh.values()) for s in megatron.stages}) == 1
    for plan in (gpipe, megatron):
        sizes = [s.layers[1] - s.layers[0] for s in plan.stages]
        assert max(sizes) - min(sizes) <= 1
    assert theirs("Alpa's objective").microbatches == ours().microbatches
    assert sum(len(s.devices) for s in theirs("Alpa's objective").stages) == 8


def test_all_stand_beside_the_plan_with_how_much_slower_they_are() -> None:
    compared = compare(graph_of, REQUEST, ours(), BASELINES)
    names = [rival.name.partition(" (")[0] for rival in compared.rivals[: len(BASELINES)]]
    assert sorted(names) == sorted(b.name for b in BASELINES)
    seconds = [rival.iteration_seconds for rival in compared.rivals[: len(BASELINES)]]
    assert seconds == sorted(seconds)
    assert compared.stages == ours().stages


def test_what_has_no_plan_is_said() -> None:
    """Nine layers make no stage for each of sixteen devices."""
    larger = Request(parse_cluster("p3.16xlarge:2"), BATCH)
    (inter,) = (b for b in BASELINES if b.name == "inter-operator only")
    compared = compare(graph_of, larger, ours(), [inter])
    assert compared.rivals == ours().rivals
    assert compared.notes[-1].startswith("inter-operator only has no plan: ")


def test_what_the_user_fixed_stays() -> None:
    request = Request(REQUEST.cluster, BATCH, Fix(microbatches=4))
    assert fixed(request, pipeline=1).fix == Fix(microbatches=4, pipeline=1)
    with pytest.raises(PlanError, match="pipeline is fixed to 2, and this is about pipeline 1"):
        fixed(Request(REQUEST.cluster, BATCH, Fix(pipeline=2)), pipeline=1)
