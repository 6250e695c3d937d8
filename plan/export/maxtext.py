"""A plan as a MaxText configuration, with what it cannot express.

Names as of the stored copy of its ``src/MaxText/configs/base.yml`` (commit 003b4169, 2025). Axes named ``ici_`` are
those inside a slice, here a host; axes named ``dcn_`` those between slices.
"""

from collections.abc import Iterator
from math import gcd

from meshwright.plan.export.base import Export, Grid, beyond_a_grid, blocks, grid_of
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan


def export_maxtext(plan: Plan, graph: ModelGraph) -> Export:
    """The keys of the plan's grid as YAML; the model's own (``base_emb_dim``, heads, …) are the user's.

    Args:
        graph: the traced model that the plan is for; tells which parameters form a block.
    """
    grid = grid_of(plan)
    keys: dict[str, str] = {}
    for where, sizes in zip(("dcn", "ici"), _by_network(plan, grid), strict=True):
        keys |= {f"{where}_{name}_parallelism": str(size) for name, size in sizes.items()}
    keys |= _pipeline_keys(plan, graph, grid) if grid.meshes > 1 else _accumulation_keys(plan)
    keys["max_target_length"] = str(plan.tokens_per_sample)
    keys["remat_policy"] = "full" if any(plan.recomputes(s) for s in range(len(plan.stages))) else "none"
    keys["dtype"] = plan.compute_dtype
    cannot = (*_cannot(plan, graph, grid), *beyond_a_grid(plan, graph, grid))
    return Export("".join(f"{key}: {value}\n" for key, value in keys.items()), cannot)


def _by_network(plan: Plan, grid: Grid) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes between hosts and inside one: tensor inside first, then data, then stages, as plans number devices."""
    room = min(plan.hardware.devices_per_host, plan.devices)
    inside: dict[str, int] = {}
    between: dict[str, int] = {}
    for name, size in (("tensor", grid.tensor), ("data", grid.data), ("pipeline", grid.meshes)):
        inside[name] = gcd(size, room)
        between[name] = size // inside[name]
        room //= inside[name]
    return between, inside


def _accumulation_keys(plan: Plan) -> dict[str, str]:
    """One stage: micro-batches are steps of accumulation."""
    return {
        "per_device_batch_size": f"{plan.microbatch_size / plan.devices:g}",
        "gradient_accumulation_steps": str(plan.microbatches),
    }


def _pipeline_keys(plan: Plan, graph: ModelGraph, grid: Grid) -> dict[str, str]:
    keys = {
        "per_device_batch_size": f"{plan.batch / plan.devices:g}",
        "num_pipeline_microbatches": str(plan.microbatches),
    }
    held = blocks(plan, graph)
    if held is not None:
        keys |= {
            "base_num_decoder_layers": str(sum(held)),
            "num_layers_per_pipeline_stage": str(sum(held) // len(held)),
            "num_pipeline_repeats": str(grid.chunks),
        }
    return keys


def _cannot(plan: Plan, graph: ModelGraph, grid: Grid) -> Iterator[str]:
    held = blocks(plan, graph)
    if grid.meshes > 1:
        yield (
            f"schedule {plan.schedule}: its pipeline is one SPMD program, all forwards and then all backwards, in "
            "which every stage does the same work at each turn"
        )
        if held is None:
            yield "the layers of each stage: the model's parameters do not number its blocks, or one is cut in two"
        elif len(set(held)) > 1:
            yield f"unequal stages: {', '.join(map(str, held))} layers (here the mean everywhere)"
        if plan.microbatches % grid.meshes:
            yield f"{plan.microbatches} micro-batches: a multiple of the {grid.meshes} stages is needed"
        yield "where embedding and loss run: outside the pipeline, on all stages"
    sizes = grid.tensor * grid.data * grid.meshes
    between, inside = _by_network(plan, grid)
    per_host = min(plan.hardware.devices_per_host, plan.devices)
    used = inside["tensor"] * inside["data"] * inside["pipeline"]
    if used != per_host and sizes == plan.devices:
        yield f"axes that straddle hosts: {per_host} devices of a host are not a product of parts of the axes ({used})"
    if between["tensor"] > 1:
        yield f"tensor parallelism between hosts by {between['tensor']}: its authors advise against it"
    if grid.tensor > 1:
        yield (
            "which dim of each weight is split: its logical axis rules decide (heads, mlp and vocab over tensor; "
            "compare with `meshwright explain`)"
        )
