"""A plan as one Python file of meshes and ``PartitionSpec``s that runs with JAX alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import fill

from meshwright.errors import PlanError
from meshwright.plan.export.base import Export
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Layout, Plan, seconds_text
from meshwright.plan.predict import program_of
from meshwright.simulate.program import Backward, BackwardInput, Forward

_BODY = Path(__file__).with_name("jax_body.py")
_BEGIN, _END = "# --- tables\n", "# --- end of tables\n"
_WIDTH = 118


def export_jax(
    plan: Plan, graph: ModelGraph, *, loss_is_mean: bool = True, stacked: Mapping[str, int] | None = None
) -> Export:
    """The plan as a Python file.

    Args:
        graph: the traced model that the plan is for, at its number of micro-batches; names the parameters.
        loss_is_mean: whether losses of micro-batches combine by their mean; else by their sum.
        stacked: leaves of the user's parameters that stack layers, of which the graph has the rows: name and dim.
    Errors: PlanError if the graph is another one.
    """
    if graph.fingerprint != plan.fingerprint:
        raise PlanError(
            f"the plan was made for another program than model {graph.name!r} gives here; plan again with this model"
        )
    cannot = tuple(_cannot(plan))
    body = _BODY.read_text(encoding="utf-8")
    imports = body.partition('"""\n\n')[2].partition(_BEGIN)[0]
    rest = body.partition(_END)[2]
    tables = "\n".join(_tables(plan, graph, loss_is_mean, stacked or {}))
    return Export(f"{_docstring(plan, cannot)}\n{imports}{tables}\n{rest}", cannot)


def _docstring(plan: Plan, cannot: tuple[str, ...]) -> str:
    use = (
        "    loss, gradients = value_and_grad(loss_fn, params, batch)"
        if len(plan.stages) == 1
        else "    loss, gradients = pipeline_value_and_grad(stage_functions, params, batch)"
    )
    head = (
        f"{plan.model} on {plan.cluster.get('name', '?')}: a plan of Meshwright as plain JAX. Batch {plan.batch} as "
        f"{plan.microbatches} micro-batches, schedule {plan.schedule}, rematerialisation {plan.remat}; predicted for "
        f"Meshwright's own executor: {seconds_text(plan.predicted.iteration_seconds)} a step."
    )
    does = (
        "It places parameters and micro-batches as planned (`parameter_shardings`, `own_parameters`, `place_batch`), "
        "lays out what passes between stages, runs forwards and backwards in the plan's order from one process that "
        "sees all devices, sums gradients over micro-batches, and gives them back laid out like the parameters:"
    )
    lines = ['"""' + fill(head, _WIDTH - 3), "", fill(does, _WIDTH), "", use, "", "It does not:", ""]
    lines += [fill(said, _WIDTH, initial_indent="- ", subsequent_indent="  ") for said in cannot]
    return "\n".join([*lines, '"""', ""])


def _cannot(plan: Plan) -> Iterator[str]:
    pinned = sum(len(plan.layouts[name].values) for stage in plan.stages for name in stage.layouts)
    yield (
        f"pin values inside layers: the plan lays out {pinned} of them, here the compiler follows parameters and what "
        "enters (call `pin(x, layer)` in the model to hold it to the plan between layers)"
    )
    if any(layout.partial for layout in plan.layouts.values()) and plan.microbatches > 1:
        yield "keep gradients as partial sums until the end of the step: they are summed once a micro-batch"
    if any(level < 3 for layout in plan.layouts.values() for level in layout.zero.values()) and plan.microbatches > 1:
        yield "scatter gradients once a step where ZeRO-1 would: each micro-batch's are scattered at once, as by ZeRO-2"
    yield "update parameters: give the gradients to an optimizer, whose state then lies as they do"
    if len(plan.stages) > 1:
        yield "cut the model: write one function a stage, for the layers in `STAGES`"
        yield "run on several processes: all devices of all stages belong to one"
    if any(plan.recomputes(s) for s in range(len(plan.stages))):
        what = (
            "recompute: wrap each layer of the model in `jax.checkpoint`, as the plan does"
            if len(plan.stages) == 1
            else "recompute layer by layer: a stage that recomputes does so as a whole, and holds all of its layers' "
            "activations for a moment (wrap its layers in `jax.checkpoint`)"
        )
        yield what
    if any(isinstance(step, BackwardInput) for row in _program(plan) for step in row):
        yield f"split backwards as schedule {plan.schedule} does: weight-gradients run with the input-gradients"


def _program(plan: Plan) -> tuple[tuple[object, ...], ...]:
    count, meshes = len(plan.stages), len(plan.meshes)
    return program_of(plan.schedule, plan.microbatches, count, plan.transfers, plan.tied, meshes)


def _tables(plan: Plan, graph: ModelGraph, loss_is_mean: bool, stacked: Mapping[str, int]) -> Iterator[str]:
    stage_of = {layer: s for s, stage in enumerate(plan.stages) for layer in range(*stage.layers)}
    yield f"BATCH, MICROBATCHES = {plan.batch}, {plan.microbatches}"
    yield f"LOSS_IS_MEAN = {loss_is_mean}"
    yield f"LOSS_STAGE = {stage_of[graph.owner_of_value()[graph.loss]]}"
    yield "STAGES: list[dict[str, Any]] = ["
    for s, stage in enumerate(plan.stages):
        sources = sorted({t.source for t in plan.transfers if t.what == "activation" and t.target == s})
        yield (
            f'    {{"devices": {_devices(stage.devices)}, "mesh": {_dict(stage.mesh)}, "layers": {stage.layers}, '
            f'"recompute": {plan.recomputes(s)}, "from": {sources}}},'
        )
    yield "]"
    rows = [_words(row) for row in _program(plan)]
    ahead = [_ahead(row) for row in rows]
    if len(plan.meshes) == len(plan.stages) and all(
        row == _steady(s, n, plan.microbatches) for s, (row, n) in enumerate(zip(rows, ahead, strict=True))
    ):
        yield "# Forwards of each stage before its first pair of a forward and a backward."
        yield f"WARMUP: list[int] | None = {ahead}"
        yield "ROWS: list[str] = []"
    else:
        yield "# What each mesh runs: F or B, stage.micro-batch."
        yield "WARMUP: list[int] | None = None"
        yield "ROWS: list[str] = ["
        yield from (f'    "{" ".join(row)}",' for row in rows)
        yield "]"
    yield "# The mesh axes that split dim 0 of what enters each layer of a stage, and of what leaves the last."
    yield "ENTERS: list[list[tuple[str, ...]]] = ["
    for stage in plan.stages:
        yield f"    [{', '.join(_tuple(text) for text in stage.boundaries)}],"
    yield "]"
    yield "# Leaves that stack layers, and the dim along which they do."
    yield f"STACKED: dict[str, int] = {_dict(stacked)}"
    yield "# leaf: {stage: spec}"
    yield from _spec_table("PARAMETERS", _parameters(plan, graph))
    yield "# Where gradient and optimizer state are split more finely than the parameter is."
    yield from _spec_table("KEPT", _parameters(plan, graph, kept=True))
    yield from _spec_table("BATCH_LEAVES", _batch(plan, graph))


def _spec_table(name: str, table: Mapping[str, Mapping[int, str]]) -> Iterator[str]:
    yield f"{name}: dict[str, dict[int, P]] = {{"
    for leaf, of_stage in table.items():
        yield f'    "{leaf}": {{{", ".join(f"{s}: {partition_spec(spec)}" for s, spec in of_stage.items())}}},'
    yield "}"


def _parameters(plan: Plan, graph: ModelGraph, *, kept: bool = False) -> dict[str, dict[int, str]]:
    """For each parameter: how each stage that reads it keeps it, as its first layer does.

    Args:
        kept: of gradient and optimizer state, where these are split further.
    """
    found: dict[str, dict[int, str]] = {leaf.name: {} for leaf in graph.parameters}
    for s, layer, layout in _layers(plan):
        values = {int(key.partition(":")[0]): spec for key, spec in layout.values.items()}
        use = graph.layers[layer]
        for leaf, number in zip(use.parameters, graph.classes[use.layer_class].parameters, strict=True):
            finer, level = layout.stored.get(str(number)), layout.zero.get(str(number), 0)
            of_stage = found[graph.parameters[leaf].name]
            if kept and finer is not None:
                of_stage.setdefault(s, finer)
            elif not kept:
                of_stage.setdefault(s, finer if finer is not None and level >= 3 else values.get(number, ""))
    return {name: specs for name, specs in found.items() if specs}


def _batch(plan: Plan, graph: ModelGraph) -> dict[str, dict[int, str]]:
    """For each leaf of the batch: how each stage that reads it has it."""
    found: dict[str, dict[int, str]] = {leaf.name: {} for leaf in graph.batch}
    for s, layer, layout in _layers(plan):
        values = {int(key.partition(":")[0]): spec for key, spec in layout.values.items()}
        use = graph.layers[layer]
        for leaf, number in zip(use.batch, graph.classes[use.layer_class].batch, strict=True):
            found[graph.batch[leaf].name].setdefault(s, values.get(number, ""))
    return {name: specs for name, specs in found.items() if specs}


def _layers(plan: Plan) -> Iterator[tuple[int, int, Layout]]:
    """Stage, layer and layout of each layer."""
    for s, stage in enumerate(plan.stages):
        for layer, name in zip(range(*stage.layers), stage.layouts, strict=True):
            yield s, layer, plan.layouts[name]


def partition_spec(text: str) -> str:
    """A spec of a plan as JAX code: "-,tensor" is ``P(None, "tensor")``."""
    words = text.split(",") if text else []
    dims = ["None" if word == "-" else _tuple(word) if "+" in word else f'"{word}"' for word in words]
    return f"P({', '.join(dims)})"


def _tuple(text: str) -> str:
    """Mesh axes joined by "+" as a tuple in code."""
    axes = [] if text == "-" else text.split("+")
    return "(" + "".join(f'"{a}", ' for a in axes).rstrip(" " if len(axes) == 1 else ", ") + ")"


def _dict(sizes: Mapping[str, int]) -> str:
    return "{" + ", ".join(f'"{name}": {size}' for name, size in sizes.items()) + "}"


def _devices(devices: tuple[int, ...]) -> str:
    """Neighbours as a range."""
    first, last = devices[0], devices[-1]
    if len(devices) > 4 and devices == tuple(range(first, last + 1)):
        return f"list(range({first}, {last + 1}))"
    return str(list(devices))


def _words(row: tuple[object, ...]) -> list[str]:
    """Forwards and backwards of a mesh; a split backward counts where its first half runs."""
    kinds = {Forward: "F", Backward: "B", BackwardInput: "B"}
    return [
        f"{kinds[type(x)]}{x.stage}.{x.microbatch}" for x in row if isinstance(x, Forward | Backward | BackwardInput)
    ]


def _ahead(row: list[str]) -> int:
    """Forwards before the first pair of a forward and a backward."""
    first = next((i for i, word in enumerate(row) if word[0] == "B"), len(row))
    left = any(word[0] == "F" for word in row[first:])
    return first - 1 if left or first == 1 else first


def _steady(s: int, ahead: int, microbatches: int) -> list[str]:
    """The row that ``WARMUP`` stands for."""
    turns = [w for m in range(microbatches - ahead) for w in (f"F{s}.{m + ahead}", f"B{s}.{m}")]
    last = [f"B{s}.{m}" for m in range(microbatches - ahead, microbatches)]
    return [f"F{s}.{m}" for m in range(ahead)] + turns + last
