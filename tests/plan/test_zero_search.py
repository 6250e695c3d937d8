"""ZeRO in the whole search: when memory is short, and not before; what the plan says; and who refuses to run it."""

import msgspec
import pytest

from meshwright.calibrate.hardware import Cluster, parse_cluster
from meshwright.calibrate.quantity import Quantity
from meshwright.errors import PlanError
from meshwright.execute.split import split_plan
from meshwright.models.zoo import get_model
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan, parse_plan, plan_json
from meshwright.plan.request import Fix, Request
from meshwright.plan.search import search
from meshwright.plan.trace.model import trace

BATCH = 32
SMALL = "gpt:layers=4,hidden=256,heads=4,seq=64,vocab=512,tied=false"
LARGE = "gpt:layers=2,hidden=2048,heads=16,seq=64,vocab=512,tied=false"
DATA = Fix(pipeline=1, tensor=1, microbatches=4, remat="none")


def cluster(memory_bytes: float) -> Cluster:
    """Four A100s, of so much memory each."""
    known = parse_cluster("dgx-a100:1")
    (host,) = known.hosts
    device = msgspec.structs.replace(host.device, memory_bytes=Quantity(memory_bytes, "test"))
    return msgspec.structs.replace(known, hosts=(msgspec.structs.replace(host, device=device, devices=4),))


def planned(memory_bytes: float, zero: int, spec: str = SMALL) -> Plan:
    def graphs(microbatches: int) -> ModelGraph:
        return trace(get_model(spec), BATCH, microbatches).graph

    return search(graphs, Request(cluster(memory_bytes), BATCH, DATA, memory_margin=0.0, zero=zero))


def test_zero_appears_when_memory_is_short_and_not_before() -> None:
    """Messages are so small that one all-reduce is quicker than two halves of it: only memory asks for more."""
    plain = planned(80e9, 0)
    resident = plain.stages[0].static_bytes
    held = plain.predicted.peak_memory_bytes - resident
    plans = [planned(held + share * resident, 3) for share in (1.0, 0.75, 0.45)]
    assert [plan.zero for plan in plans] == [0, 1, 3]
    seconds = [plan.predicted.iteration_seconds for plan in plans]
    assert plain.predicted.iteration_seconds == seconds[0] < seconds[1] < seconds[2]
    assert plans[1].stages[0].static_bytes == pytest.approx(5 / 8 * resident, rel=0.01)  # P + P + 2P / 4 of 4P
    assert plans[2].stages[0].static_bytes == pytest.approx(resident / 4, rel=0.02)
    with pytest.raises(PlanError, match="no plan fits"):
        planned(held + 0.75 * resident, 0)


@pytest.fixture(scope="module")
def split() -> Plan:
    return planned(80e9, 1, LARGE)


def test_the_plan_file_says_where_parameters_are_kept(split: Plan) -> None:
    assert parse_plan(plan_json(split)) == split
    stored = [
        (layout.stored[p], layout.values[f"{p}:parameter"], level)
        for layout in split.layouts.values()
        for p, level in layout.zero.items()
    ]
    assert stored
    assert {level for *_, level in stored} == {1}
    assert all("data" in kept and "data" not in read for kept, read, _ in stored)
    assert any("up to ZeRO-1, which cannot be executed yet" in note for note in split.notes)


def test_without_it_the_plan_says_what_it_would_gain(split: Plan) -> None:
    """Weights so large that the update counts, of which each device does a quarter."""
    plain = planned(80e9, 0, LARGE)
    assert plain.zero == 0
    assert not any(layout.stored for layout in plain.layouts.values())
    gain = 1 - split.predicted.iteration_seconds / plain.predicted.iteration_seconds
    assert f"the same stages would take {gain:.1%} less with --zero auto, which cannot be executed yet" in plain.notes


def test_the_executor_refuses_in_a_line(split: Plan) -> None:
    with pytest.raises(PlanError, match="ZeRO-1, which cannot be executed yet; plan with --zero 0"):
        split_plan(split, trace(get_model(LARGE), BATCH, 4).graph)


def test_a_level_that_does_not_exist_is_refused() -> None:
    with pytest.raises(PlanError, match="ZeRO level 4 is unknown; use 0, 1, 2, 3 or auto"):
        Request(cluster(80e9), BATCH, zero=4)
