"""Each layer's sharding in words: how its values enter, and how each of its weights is split."""

from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.plan.graph import Leaf, ModelGraph
from meshwright.plan.planfile import Layout, Plan

ROWS_AND_COLUMNS = ("rows", "columns")


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one stage that do the same in the same layout: their numbers, and what is said of them."""

    stage: int
    layers: tuple[int, ...]
    entry: str  # how values enter, and leave
    weights: tuple[tuple[str, str], ...]  # a parameter with its shape, and how it is split

    @property
    def title(self) -> str:
        """Which layers, in words."""
        first, last = self.layers[0], self.layers[-1]
        if first == last:
            return f"layer {first}"
        alike = "" if len(self.layers) == last - first + 1 else f", {len(self.layers)} of them"
        return f"layers {first} to {last}{alike}"


def layer_groups(plan: Plan, graph: ModelGraph) -> tuple[LayerGroup, ...]:
    """What each stage's layers do, alike ones together.

    Args:
        graph: the traced model that the plan is for, at its number of micro-batches.
    """
    found: list[LayerGroup] = []
    for number, stage in enumerate(plan.stages):
        alike: dict[tuple[int, str, str, str], list[int]] = {}
        for place, layer in enumerate(range(*stage.layers)):
            layer_class = graph.layers[layer].layer_class
            key = (layer_class, stage.layouts[place], stage.boundaries[place], stage.boundaries[place + 1])
            alike.setdefault(key, []).append(layer)
        for (_, name, before, after), layers in alike.items():
            weights = tuple(_weights(graph, layers[0], plan.layouts[name], tuple(stage.mesh)))
            found.append(LayerGroup(number, tuple(layers), _boundary_words(before, after), weights))
    return tuple(found)


def _boundary_words(before: str, after: str) -> str:
    into = "whole on every device" if before == "-" else f"split by samples over {before}"
    if before == after:
        return f"values enter and leave {into}"
    out = "whole on every device" if after == "-" else f"split by samples over {after}"
    return f"values enter {into} and leave {out}"


def _weights(graph: ModelGraph, layer: int, layout: Layout, axes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    use = graph.layers[layer]
    specs = {int(key.partition(":")[0]): spec for key, spec in layout.values.items() if key.endswith(":parameter")}
    for leaf, value in zip(use.parameters, graph.classes[use.layer_class].parameters, strict=True):
        if value in specs:
            parameter = graph.parameters[leaf]
            shape = "×".join(str(size) for size in parameter.tensor.shape) or "scalar"
            yield f"{parameter.name} ({shape})", spec_words(specs[value], parameter)


def spec_words(spec: str, leaf: Leaf) -> str:
    """A spec in words: "-,tensor" of a matrix is "columns over tensor"."""
    words = spec.split(",") if spec else []
    rank = len(leaf.tensor.shape)
    split = [f"{_dim_name(dim, rank)} over {axes}" for dim, axes in enumerate(words) if axes != "-"]
    return " and ".join(split) or "whole on every device"


def _dim_name(dim: int, rank: int) -> str:
    if rank == 1:
        return "split"
    return ROWS_AND_COLUMNS[dim] if rank == 2 else f"dim {dim} of {rank}"
