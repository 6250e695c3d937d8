"""Is what XLA compiles what the planner priced? Collectives of whole models as one stage, on eight fake CPU devices.

Run from the checkout: ``python -m experiments.compiled_collectives`` writes ``docs/compiled_collectives.md``;
``--json`` prints the rows in place of that. Nothing is executed: shapes are large enough that splitting pays.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import msgspec
import numpy as np
from jax.sharding import AxisType, Mesh

from meshwright.calibrate.hardware import Cluster, parse_cluster
from meshwright.execute.audit import Comparison, compare, deviation
from meshwright.execute.programs import build_stage
from meshwright.execute.split import split_plan
from meshwright.models.zoo import get_model
from meshwright.plan.assemble import assemble
from meshwright.plan.inter import Stage
from meshwright.plan.planfile import Plan
from meshwright.plan.priced import priced_stage
from meshwright.plan.search import Fix, Request, search
from meshwright.plan.space import Memory
from meshwright.plan.stages import MeshKind, Setting, StagePricer, logical_mesh
from meshwright.plan.trace.model import Trace, trace

CLUSTER = "p3.16xlarge:1"  # the prices; the compiler sees eight CPU devices
REPORT = Path(__file__).resolve().parents[1] / "docs" / "compiled_collectives.md"
_TIED = (
    "The table that embedding and output share is one array in the stage, but each layer is priced by itself: its "
    "gradient is summed once, not twice, and where the two layers lay it out differently one of them reshards it."
)
_COPIES = "Readers in different operators share one resharded copy, which the planner prices once for each of them."
_ORDER = (
    "Where both axes cut one dim, the order of its pieces matters: the compiler restores it by permutes, which the "
    "planner does not price, and moves both axes in one all-to-all, which the planner prices as one for each axis."
)
MODELS: tuple[tuple[str, int, int, str], ...] = (  # spec, batch, micro-batches, why it deviates where it does
    ("gpt:layers=4,hidden=1024,heads=16,vocab=8192,seq=512,tied=false", 64, 2, _COPIES),
    ("gpt:layers=4,hidden=1024,heads=16,vocab=8192,seq=512", 64, 2, _TIED),
    ("moe:layers=4,hidden=512,heads=8,vocab=4096,seq=256,experts=8,tied=false", 64, 2, _COPIES),
    ("moe:layers=4,hidden=512,heads=8,vocab=4096,seq=256,experts=8", 64, 2, f"{_TIED} {_COPIES}"),
    ("wresnet:layers=50,channels=64,width=2,image=64,classes=256,norm=group", 128, 2, _COPIES),
)
_BOX = ("data", "tensor")
PLACES: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...] = (  # title, mesh, what its axes may split
    ("data 8", (8,), ("data",)),
    ("tensor 8", (8,), ("tensor",)),
    ("data 2 × tensor 4", (2, 4), _BOX),
    ("free on (8,)", (8,), ()),
    ("free on (2, 4)", (2, 4), ()),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One model on one mesh, compared."""

    model: str
    place: str
    rows: tuple[Comparison, ...]
    deviation: float
    why: str  # empty where nothing deviates


class Subject:
    """A traced model and a plan of it, whose single stage is laid anew on one mesh after another."""

    def __init__(self, spec: str, batch: int, microbatches: int, cluster: Cluster | None = None) -> None:
        self.cluster = parse_cluster(CLUSTER) if cluster is None else cluster
        self.traced: Trace = trace(get_model(spec), batch, microbatches)
        fix = Fix(microbatches=microbatches, remat="none", data=self.cluster.devices, tensor=1, pipeline=1)
        self.plan: Plan = search(lambda _: self.traced.graph, Request(self.cluster, batch, fix))

    def compare(self, sizes: tuple[int, ...], roles: tuple[str, ...]) -> tuple[Comparison, ...]:
        """Plan the whole model as one stage on a mesh, compile it and compare."""
        graph, count = self.traced.graph, self.plan.microbatches
        kind = MeshKind(logical_mesh(self.cluster, sizes), roles)
        pricer = StagePricer(Setting(graph, count, False, Memory()), (kind,))
        table = pricer.stage_table(self.cluster)
        everything = (0, len(graph.layers), 0)
        seconds = count * table.seconds[everything] + table.once_seconds[everything]
        entry, leave = (int(x) for x in np.unravel_index(int(seconds.argmin()), seconds.shape))
        assembly = assemble(pricer, [Stage(0, len(graph.layers), 0, entry, leave, 0)], self.cluster)
        plan = msgspec.structs.replace(
            self.plan,
            stages=assembly.stages,
            layouts=assembly.layouts,
            transfers=assembly.transfers,
            tied=assembly.tied,
        )
        axes = tuple(assembly.stages[0].mesh)
        box = np.array(jax.devices()[: kind.mesh.devices]).reshape(sizes)
        mesh = Mesh(box, axes, axis_types=(AxisType.Auto,) * len(axes))
        programs = build_stage(split_plan(plan, graph)[0], self.traced, mesh, count, remat=False)
        return compare(priced_stage(pricer.cost(*everything[:2], 0, entry, leave)), programs)


def run() -> tuple[Case, ...]:
    """All models on all meshes: some minutes of compiling."""
    cases = []
    for spec, batch, microbatches, why in MODELS:
        subject = Subject(spec, batch, microbatches)
        for place, sizes, roles in PLACES:
            rows = subject.compare(sizes, roles)
            reason = f"{why} {_ORDER}" if any(row.kind == "permute" for row in rows) else why
            exact = all(row.equal for row in rows)
            cases.append(Case(spec, place, rows, deviation(rows), "" if exact else reason))
    return tuple(cases)


def report(cases: Sequence[Case]) -> str:
    """The table as Markdown."""
    lines = [
        "# Is what is compiled what was priced?",
        "",
        "Every collective that the planner charges has a kind and a number of elements (of its result, on one device).",
        "So has every collective in the program that XLA compiles. Here whole models are planned as one stage with the",
        f"prices of `{CLUSTER}`, compiled for eight fake CPU devices, and both sums compared, phase by phase.",
        "A deviation is the sum of the differences over all elements priced. `once` runs once per iteration.",
        "",
        "Reading rules: elements, not bytes (on CPU a bfloat16 all-reduce compiles to float32); a combined collective",
        "is each of its arrays; a sum over two mesh axes is one; a reduce-scatter is an all-reduce and a slice.",
        "",
        f"Written by `python -m experiments.compiled_collectives` with JAX {jax.__version__}.",
    ]
    for model in dict.fromkeys(case.model for case in cases):
        mine = [case for case in cases if case.model == model]
        lines += ["", f"## `{model}`", "", "| mesh | phase | kind | priced | compiled |", "|---|---|---|---:|---:|"]
        for case in mine:
            for row in case.rows:
                mark = "" if row.equal else " ≠"
                counts = f"{row.priced_elements:,.0f} | {row.compiled_elements:,.0f}{mark}"
                lines.append(f"| {case.place} | {row.phase} | {row.kind.replace('_', '-')} | {counts} |")
        named = ", ".join(f"{case.place}: {case.deviation:.1%}" if case.why else f"{case.place}: none" for case in mine)
        lines += ["", f"Deviation: {named}."]
        for why in dict.fromkeys(case.why for case in mine if case.why):
            places = ", ".join(case.place for case in mine if case.why == why)
            lines += ["", f"Why ({places}): {why}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="compare compiled collectives with priced ones")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object, write no file")
    asked = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    cases = run()
    if asked.json:
        print(json.dumps({"cluster": CLUSTER, "cases": [asdict(case) for case in cases]}))
    else:
        REPORT.write_text(report(cases), "utf-8")


if __name__ == "__main__":
    main()
