"""What the exports share: a text with what it cannot say, and the questions that all of them ask of a plan."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan


@dataclass(frozen=True, slots=True)
class Export:
    """A plan in the words of another framework, and the parts of it that these words cannot express."""

    text: str
    cannot: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """The tensor × data × pipeline grid that most stages of a plan are part of, as a framework of one grid has it."""

    tensor: int
    data: int
    meshes: int
    chunks: int  # stages on each mesh


def grid_of(plan: Plan) -> Grid:
    """The sizes that most devices see."""
    tensor, data = (_usual(plan, name) for name in ("tensor", "data"))
    return Grid(tensor, data, len(plan.meshes), len(plan.stages) // len(plan.meshes))


def _usual(plan: Plan, name: str) -> int:
    seen: Counter[int] = Counter()
    for stage in plan.stages:
        seen[stage.mesh.get(name, 1)] += len(stage.devices)
    return max(seen, key=lambda size: (seen[size], size))


def blocks(plan: Plan, graph: ModelGraph) -> tuple[int, ...] | None:
    """How many blocks of the model each stage holds: parameters numbered alike (``layers.3.…``) are one block.

    None where the model numbers no parameters, or where a block is cut in two.
    """
    found: list[set[str]] = []
    for stage in plan.stages:
        leaves = {leaf for layer in range(*stage.layers) for leaf in graph.layers[layer].parameters}
        found.append({block for leaf in leaves if (block := _block(graph.parameters[leaf].name))})
    every = [block for held in found for block in held]
    if not every or len(set(every)) < len(every):
        return None
    return tuple(map(len, found))


def _block(name: str) -> str:
    """The path of a parameter up to its first number; empty where there is none."""
    words = name.split(".")
    at = next((i for i, word in enumerate(words) if word.isdecimal()), -1)
    return ".".join(words[: at + 1])


def beyond_a_grid(plan: Plan, graph: ModelGraph, grid: Grid) -> Iterator[str]:
    """What a plan may have that no framework of one grid has."""
    for name, size in (("tensor", grid.tensor), ("data", grid.data)):
        sizes = [stage.mesh.get(name, 1) for stage in plan.stages]
        if set(sizes) != {size}:
            yield f"{name} parallelism that differs by stage: {', '.join(map(str, sizes))} (here {size} everywhere)"
    third = [stage.mesh["third"] for stage in plan.stages if stage.mesh.get("third", 1) > 1]
    if third:
        yield f"a third mesh axis of {third[0]}"
    idle = plan.hardware.devices - plan.devices
    if idle:
        yield f"{idle} of {plan.hardware.devices} devices left idle: start {plan.devices} processes"
    if any(t.what == "activation" and t.target != t.source + 1 for t in plan.transfers):
        yield "values that skip a stage, and stages side by side: stages form a line"
    if plan.remat == "mixed":
        again = [str(s) for s in range(len(plan.stages)) if plan.recomputes(s)]
        yield f"rematerialisation in some stages ({', '.join(again)}) and not in others"
    apart = unlike_layers(plan, graph)
    if apart:
        yield f"equal layers laid out differently: {apart}"
    whole, over_data = weights_by_axis(plan, graph)
    if whole and grid.tensor > 1:
        yield f"matrices kept whole on every device of a tensor axis: {_some(whole)}"
    if over_data:
        yield f"weights split over the data axis: {_some(over_data)}"


def unlike_layers(plan: Plan, graph: ModelGraph) -> str:
    """Layers of one class and mesh whose layouts differ, in words; empty where there are none."""
    first: dict[tuple[int, tuple[int, ...]], tuple[int, str]] = {}
    for stage in plan.stages:
        for layer, name in zip(range(*stage.layers), stage.layouts, strict=True):
            key = (graph.layers[layer].layer_class, tuple(stage.mesh.values()))
            before, known = first.setdefault(key, (layer, name))
            if plan.layouts[known] != plan.layouts[name]:
                return f"layer {layer} is not as layer {before}"
    return ""


def weights_by_axis(plan: Plan, graph: ModelGraph) -> tuple[list[str], list[str]]:
    """Matrices that no tensor axis splits though the stage has one, and parameters that a data axis splits."""
    whole: dict[str, None] = {}
    over_data: dict[str, None] = {}
    for stage in plan.stages:
        for layer, layout in zip(range(*stage.layers), stage.layouts, strict=True):
            use = graph.layers[layer]
            specs = {int(key.partition(":")[0]): spec for key, spec in plan.layouts[layout].values.items()}
            for leaf, number in zip(use.parameters, graph.classes[use.layer_class].parameters, strict=True):
                axes = set(specs.get(number, "").replace("+", ",").split(","))
                parameter = graph.parameters[leaf]
                if len(parameter.tensor.shape) > 1 and stage.mesh.get("tensor", 1) > 1 and "tensor" not in axes:
                    whole[parameter.name] = None
                if "data" in axes:
                    over_data[parameter.name] = None
    return list(whole), list(over_data)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
