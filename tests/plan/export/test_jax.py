"""The exported file runs by itself: its loss and gradients are those of plain JAX, on as many devices as planned."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshwright.calibrate.hardware import parse_cluster
from meshwright.errors import PlanError
from meshwright.models.zoo import get_model
from meshwright.plan.export.base import Export
from meshwright.plan.export.jax import export_jax, partition_spec
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Layout, Plan, save_plan
from meshwright.plan.predict import program_of
from meshwright.plan.search import Fix, Request, search
from meshwright.plan.trace.model import trace
from meshwright.simulate.program import Backward, Forward

ROOT = Path(__file__).resolve().parents[3]
GPT = "gpt:layers=4,hidden=32,heads=4,seq=16,vocab=64"
SMALL = "gpt:layers=2,hidden=16,heads=4,seq=8,vocab=32"
STACK = "tests.plan.export.stacked:model"
MOE = "moe:layers=2,hidden=32,heads=4,seq=16,vocab=64,experts=4"
BATCH = 16


@cache
def planned(case: str) -> tuple[Plan, ModelGraph, Export]:
    model, fix = CASES[case]

    def graph(microbatches: int) -> ModelGraph:
        return trace(get_model(model), BATCH, microbatches).graph

    zero = 3 if "ZeRO" in case else 0
    plan = search(graph, Request(parse_cluster("p3.16xlarge:1"), BATCH, fix, zero=zero))
    if zero:
        plan = kept_finer(plan)
    stacked = {"layers.up": 0, "layers.down": 1} if model == STACK else {}
    return plan, graph(plan.microbatches), export_jax(plan, graph(plan.microbatches), stacked=stacked)


def kept_finer(plan: Plan) -> Plan:
    """The plan with every matrix that lies whole on all devices kept in rows instead, as ZeRO-3 keeps it."""

    def finer(layout: Layout) -> Layout:
        kept = {
            key.partition(":")[0]: "data,-"
            for key, spec in layout.values.items()
            if key.endswith("parameter") and spec == "-,-"
        }
        return msgspec.structs.replace(layout, stored=kept, zero=dict.fromkeys(kept, 3))

    return msgspec.structs.replace(plan, layouts={name: finer(layout) for name, layout in plan.layouts.items()})


def run_exported(plan: Plan, export: Export, folder: Path) -> tuple[float, float, float]:
    """Losses of plain JAX and of the file, and the largest relative difference of a gradient; 8 CPU devices."""
    save_plan(plan, folder / "plan.json")
    (folder / "exported.py").write_text(export.text, encoding="utf-8")
    flags = "--xla_force_host_platform_device_count=8"
    ended = subprocess.run(
        [sys.executable, "-m", "tests.plan.export.stage_functions", folder / "plan.json", folder / "exported.py"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    plain, exported, apart = map(float, ended.stdout.split())
    return plain, exported, apart


CASES = {
    "one stage": (SMALL, Fix(pipeline=1, data=2, tensor=4, microbatches=2, remat="none")),
    "two stages": (SMALL, Fix(pipeline=2, data=2, tensor=2, microbatches=4, schedule="1f1b", remat="none")),
    "gpipe, recomputing": (GPT, Fix(pipeline=4, data=2, tensor=1, microbatches=4, schedule="gpipe", remat="full")),
    "several stages a mesh": (GPT, Fix(data=2, tensor=2, pipeline=2, microbatches=4, schedule="interleaved:2")),
    "split backwards": (GPT, Fix(data=2, tensor=2, pipeline=2, microbatches=4, schedule="zb-h1")),
    "experts": (MOE, Fix(pipeline=1, data=4, tensor=2, microbatches=2)),
    "a stack, one stage": (STACK, Fix(pipeline=1, data=4, tensor=2, microbatches=2)),
    "a stack, two stages": (STACK, Fix(pipeline=2, data=2, tensor=2, microbatches=2, schedule="1f1b")),
    "parameters split by ZeRO": (SMALL, Fix(pipeline=1, data=8, tensor=1, microbatches=2)),
}
QUICK = ("one stage", "two stages")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_loss_and_gradients_are_those_of_plain_jax(case: str, tmp_path: Path) -> None:
    plan, _, export = planned(case)
    plain, exported, apart = run_exported(plan, export, tmp_path)
    assert exported == pytest.approx(plain, rel=1e-5)
    assert apart < 1e-4


def test_a_spec_is_written_as_jax_has_it() -> None:
    assert partition_spec("-,tensor") == 'P(None, "tensor")'
    assert partition_spec("data+tensor,-") == 'P(("data", "tensor"), None)'
    assert partition_spec("") == "P()"


@pytest.mark.parametrize("case", CASES)
def test_the_file_compiles_and_says_what_it_leaves_out(case: str) -> None:
    plan, _, export = planned(case)
    compile(export.text, "exported.py", "exec")
    doc = ast.get_docstring(ast.parse(export.text))
    assert doc is not None
    assert all(" ".join(said.split()) in " ".join(doc.split()) for said in export.cannot)
    assert any("cut the model" in said for said in export.cannot) == (len(plan.stages) > 1)
    assert any("split backwards" in said for said in export.cannot) == (plan.schedule == "zb-h1")
    assert any("recompute" in said for said in export.cannot) == (plan.remat == "full")


@pytest.mark.parametrize("case", [case for case in CASES if "stage" in case or "gpipe" in case])
def test_each_mesh_runs_the_rows_of_the_simulated_program(case: str) -> None:
    """``order`` of the file, cut by meshes, is the program's forwards and backwards."""
    plan, _, export = planned(case)
    names: dict[str, Any] = {"__name__": "exported"}
    exec(export.text, names)
    steps = list(names["order"]())
    program = program_of(
        plan.schedule, plan.microbatches, len(plan.stages), plan.transfers, plan.tied, len(plan.meshes)
    )
    for row in program:
        stages = {x.stage for x in row}
        wanted = [(type(x).__name__[0], x.stage, x.microbatch) for x in row if isinstance(x, Forward | Backward)]
        assert [step for step in steps if step[1] in stages] == wanted


def test_a_plan_for_another_program_is_refused() -> None:
    plan, *_ = planned("one stage")
    other = trace(get_model(SMALL), 2 * BATCH, 2).graph
    with pytest.raises(PlanError, match="another program"):
        export_jax(plan, other)
