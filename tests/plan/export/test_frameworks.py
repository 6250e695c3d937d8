"""Megatron-LM's flags and MaxText's keys say the plan's grid, and name what one grid cannot hold."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod

import msgspec
import pytest

from meshwright.calibrate.hardware import parse_cluster
from meshwright.models.zoo import get_model
from meshwright.plan.export.base import Export, blocks
from meshwright.plan.export.maxtext import export_maxtext
from meshwright.plan.export.megatron import export_megatron
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan
from meshwright.plan.search import Fix, Request, search
from meshwright.plan.trace.model import trace

MODEL, BATCH = "gpt:layers=4,hidden=64,heads=4,seq=32,vocab=256", 16
GRID = Fix(data=2, tensor=2, pipeline=2, microbatches=4, schedule="1f1b", remat="none")


@cache
def graph_of(microbatches: int) -> ModelGraph:
    return trace(get_model(MODEL), BATCH, microbatches).graph


@cache
def planned(fix: Fix = GRID, cluster: str = "p3.16xlarge:1") -> Plan:
    return search(graph_of, Request(parse_cluster(cluster), BATCH, fix))


def graph(plan: Plan) -> ModelGraph:
    return graph_of(plan.microbatches)


def flags(export: Export) -> dict[str, str]:
    lines = [line.removesuffix(" \\") for line in export.text.splitlines()]
    return {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}


def keys(export: Export) -> dict[str, str]:
    return dict(line.split(": ") for line in export.text.splitlines())


def moved(plan: Plan, cut: int) -> Plan:
    """The plan of two stages with its cut elsewhere; times are kept, they are not exported."""
    one, two = plan.stages
    every = (*one.layouts, *two.layouts)
    borders = (*one.boundaries, *two.boundaries[1:])
    stages = [
        msgspec.structs.replace(s, layers=span, layouts=every[slice(*span)], boundaries=borders[span[0] : span[1] + 1])
        for s, span in ((one, (0, cut)), (two, (cut, 4)))
    ]
    return msgspec.structs.replace(plan, stages=tuple(stages))


def test_a_grid_is_said_in_full() -> None:
    plan = planned()
    said = flags(export_megatron(plan, graph(plan)))
    assert said["--tensor-model-parallel-size"] == "2"
    assert said["--pipeline-model-parallel-size"] == "2"
    assert (said["--micro-batch-size"], said["--global-batch-size"]) == ("2", "16")
    assert (said["--num-layers"], said["--seq-length"]) == ("4", "32")
    assert "--recompute-granularity" not in said
    assert "--pipeline-model-parallel-layout" not in said


def test_the_ranks_of_a_grid_fill_the_cluster() -> None:
    """MaxText wants the product of its axes to be the number of devices, inside a host and between hosts."""
    for cluster, fix in (("p3.16xlarge:1", GRID), ("p3.16xlarge:2", replace(GRID, data=4, microbatches=2))):
        plan = planned(fix, cluster)
        said = keys(export_maxtext(plan, graph(plan)))
        inside = prod(int(v) for k, v in said.items() if k.startswith("ici_"))
        between = prod(int(v) for k, v in said.items() if k.startswith("dcn_"))
        assert inside == 8
        assert inside * between == plan.devices
        assert said["dcn_tensor_parallelism"] == "1"


def test_samples_of_a_step_are_the_batch() -> None:
    """MaxText's batch is per device: times devices and steps of accumulation it is ours."""
    plan = planned(replace(GRID, pipeline=1, data=4, remat="full"))
    said = keys(export_maxtext(plan, graph(plan)))
    each, steps = float(said["per_device_batch_size"]), int(said["gradient_accumulation_steps"])
    assert each * plan.devices * steps == BATCH
    assert said["remat_policy"] == "full"
    piped = keys(export_maxtext(planned(), graph(planned())))
    assert float(piped["per_device_batch_size"]) * 8 == BATCH
    assert "gradient_accumulation_steps" not in piped


def test_recomputing_is_said() -> None:
    plan = planned(replace(GRID, remat="full"))
    said = flags(export_megatron(plan, graph(plan)))
    assert said["--recompute-granularity"] == "full"


def test_an_uneven_cut_is_a_layout_for_one_and_cannot_be_said_to_the_other() -> None:
    plan = moved(planned(), 3)
    assert blocks(plan, graph(plan)) == (3, 1)
    assert flags(export_megatron(plan, graph(plan)))["--pipeline-model-parallel-layout"] == '"Ettt|tL"'
    assert any("unequal stages: 3, 1" in said for said in export_maxtext(plan, graph(plan)).cannot)


@pytest.mark.parametrize("export", [export_megatron, export_maxtext])
def test_stages_of_unlike_meshes_are_named(export: Callable[[Plan, ModelGraph], Export]) -> None:
    plan = planned(Fix(stages=((2, 2), (1, 4)), microbatches=4, schedule="1f1b", remat="none"))
    cannot = export(plan, graph(plan)).cannot
    assert any(said.startswith("tensor parallelism that differs by stage: 2, 4") for said in cannot)
    assert any(said.startswith("data parallelism that differs by stage: 2, 1") for said in cannot)


def test_other_schedules_are_named() -> None:
    plan = planned(replace(GRID, schedule="gpipe"))
    assert "schedule gpipe: it would run 1F1B" in export_megatron(plan, graph(plan)).cannot
    assert not any("schedule" in said for said in export_megatron(planned(), graph(planned())).cannot)


def test_idle_devices_are_named() -> None:
    plan = planned(Fix(stages=((1, 2), (1, 2)), microbatches=4, schedule="1f1b", remat="none"))
    for export in (export_megatron, export_maxtext):
        assert any("4 of 8 devices left idle: start 4" in said for said in export(plan, graph(plan)).cannot)


def test_virtual_stages_are_chunks() -> None:
    plan = planned(replace(GRID, schedule="interleaved:2"))
    said = flags(export_megatron(plan, graph(plan)))
    assert said["--num-virtual-stages-per-pipeline-rank"] == "2"
    assert said["--pipeline-model-parallel-size"] == "2"
    assert keys(export_maxtext(plan, graph(plan)))["num_pipeline_repeats"] == "2"


def test_layers_laid_out_unlike_their_equals_are_named() -> None:
    plan = planned()
    odd = msgspec.structs.replace(plan.layouts[plan.stages[0].layouts[1]], operands={"0.0": "data,-"})
    last = plan.stages[1]
    stage = msgspec.structs.replace(last, layouts=("odd", *last.layouts[1:]))
    other = msgspec.structs.replace(plan, layouts={**plan.layouts, "odd": odd}, stages=(plan.stages[0], stage))
    assert any("equal layers laid out differently" in x for x in export_megatron(other, graph(plan)).cannot)
