"""A plan as flags of Megatron-LM, with what they cannot express.

Names as of the stored copy of its repository of 2026-08-22 (``megatron/training/arguments.py``, ``megatron/core/
model_parallel_config.py``, ``megatron/core/transformer/transformer_config.py``; fields there become flags).
"""

from collections.abc import Iterator

from meshwright.plan.export.base import Export, Grid, beyond_a_grid, blocks, grid_of
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan

_DTYPES = {"float16": "--fp16", "bfloat16": "--bf16"}
_OWN = {"1f1b": 1, "interleaved": 2}  # schedules it runs, and from how many stages a mesh


def export_megatron(plan: Plan, graph: ModelGraph) -> Export:
    """The flags of the plan's grid, one a line; the model's own (hidden size, heads, …) are the user's.

    Args:
        graph: the traced model that the plan is for; tells which parameters form a block.
    """
    grid = grid_of(plan)
    flags = [
        f"--tensor-model-parallel-size {grid.tensor}",
        f"--pipeline-model-parallel-size {grid.meshes}",
        f"--micro-batch-size {max(plan.microbatch_size // grid.data, 1)}",
        f"--global-batch-size {plan.batch}",
        f"--seq-length {plan.tokens_per_sample}",
        *_layer_flags(plan, graph, grid),
    ]
    if any(plan.recomputes(s) for s in range(len(plan.stages))):
        flags += ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"]
    if plan.compute_dtype in _DTYPES:
        flags.append(_DTYPES[plan.compute_dtype])
    cannot = (*_cannot(plan, graph, grid), *beyond_a_grid(plan, graph, grid))
    return Export(" \\\n".join(flags) + "\n", cannot)


def _layer_flags(plan: Plan, graph: ModelGraph, grid: Grid) -> Iterator[str]:
    """How many blocks, and on which stages where these differ.

    The layout names the stages in the order of the model, which is that of Megatron's chunks: stage s is chunk
    s // meshes of mesh s % meshes.
    """
    held = blocks(plan, graph)
    if held is None:
        return
    yield f"--num-layers {sum(held)}"
    if len(held) > 1 and len(set(held)) > 1:
        parts = ["t" * count for count in held]
        yield f'--pipeline-model-parallel-layout "E{"|".join(parts)}L"'
    elif grid.chunks > 1:
        yield f"--num-virtual-stages-per-pipeline-rank {grid.chunks}"


def _cannot(plan: Plan, graph: ModelGraph, grid: Grid) -> Iterator[str]:
    if blocks(plan, graph) is None:
        yield "the layers of each stage: the model's parameters do not number its blocks, or one is cut in two"
    if plan.microbatch_size % grid.data:
        yield (
            f"micro-batches of {plan.microbatch_size} over {grid.data} data-parallel ranks: each takes a whole number "
            "of samples"
        )
    if len(plan.stages) > 1 and _OWN.get(plan.schedule, grid.chunks + 1) > grid.chunks:
        runs = "interleaved 1F1B" if grid.chunks > 1 else "1F1B"
        yield f"schedule {plan.schedule}: it would run {runs}"
    if plan.schedule == "interleaved" and plan.microbatches % grid.meshes:
        yield f"interleaved 1F1B of {plan.microbatches} micro-batches on {grid.meshes} meshes: they must divide evenly"
    if plan.compute_dtype not in (*_DTYPES, "float32"):
        yield f"arithmetic in {plan.compute_dtype}"
    if grid.tensor > 1:
        yield (
            "which dim of each weight is split: it has its own way, columns then rows, and the vocabulary's rows for "
            "the embedding (compare with `meshwright explain`)"
        )
