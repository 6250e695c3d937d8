"""Where a model branches: its layers as chains and branches that run side by side.

Layer u precedes layer v if v reads, over any number of layers between, what u wrote. Two layers of which neither
precedes the other may run at once. A model is cut in *series* where all layers before precede all layers after, and
into *branches* where no layer of one precedes a layer of the other, and so on inside each: the series-parallel
decomposition of a partial order (Valdes, Tarjan and Lawler, SIAM J. Comput. 11 (1982), section 2). What is neither is
kept as a chain, in the model's own order: correct, if not as wide as it could be.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.plan.graph import ModelGraph

Edge = tuple[int, int]  # layer that writes, layer that reads


@dataclass(frozen=True, slots=True)
class Chain:
    """Parts that run one after the other: layers, by number, and forks."""

    parts: "tuple[int | Fork, ...]"

    @property
    def layers(self) -> tuple[int, int]:
        """The first layer and the one after the last: a chain covers all between."""
        return span(self.parts[0])[0], span(self.parts[-1])[1]

    @property
    def branches(self) -> bool:
        """Whether anything in it may run side by side."""
        return any(isinstance(part, Fork) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Fork:
    """Chains that may run side by side, in the order of their layers."""

    branches: tuple[Chain, ...]


def span(part: int | Fork) -> tuple[int, int]:
    """First layer of a part of a chain, and the one after its last."""
    if isinstance(part, int):
        return part, part + 1
    return part.branches[0].layers[0], part.branches[-1].layers[1]


def layer_edges(graph: ModelGraph) -> tuple[Edge, ...]:
    """Which layer reads what which other layer wrote."""
    owner = graph.owner_of_value()
    return tuple(sorted({(owner[v], layer) for layer, use in enumerate(graph.layers) for v in use.entries}))


def decompose(layers: int, edges: Sequence[Edge]) -> Chain:
    """The chains and forks of layers 0..layers-1.

    Branches are recognised where each has consecutive numbers, as a model has that is traced branch by branch.

    Args:
        edges: from earlier to later layers.
    """
    before = [0] * layers  # bit u of before[v]: u precedes v
    for v in range(layers):
        for source, target in edges:
            if target == v:
                before[v] |= before[source] | 1 << source
    return _chain(0, layers, before)


def _chain(first: int, last: int, before: Sequence[int]) -> Chain:
    parts: list[int | Fork] = []
    start = first
    for cut in range(first + 1, last + 1):
        if cut == last or _all_precede(start, cut, last, before):
            parts += _parts(start, cut, before)
            start = cut
    return Chain(tuple(parts))


def _all_precede(start: int, cut: int, last: int, before: Sequence[int]) -> bool:
    """Whether every layer from ``start`` to the cut precedes every one after it."""
    early = (1 << cut) - (1 << start)
    return all(before[v] & early == early for v in range(cut, last))


def _parts(first: int, last: int, before: Sequence[int]) -> list[int | Fork]:
    """What lies between two cuts in series: one layer, a fork, or a chain if it is neither."""
    components = _components(first, last, before)
    consecutive = all(group[-1] - group[0] + 1 == len(group) for group in components)
    if last - first == 1 or len(components) == 1 or not consecutive:
        return list(range(first, last))
    return [Fork(tuple(_chain(group[0], group[-1] + 1, before) for group in components))]


def _components(first: int, last: int, before: Sequence[int]) -> list[list[int]]:
    """Layers that hang together, each group in rising order, groups by their first layer."""
    groups: list[list[int]] = []
    for v in range(first, last):
        mine = [group for group in groups if any(before[v] >> u & 1 for u in group)]
        joined = sorted({v, *(u for group in mine for u in group)})
        groups = [group for group in groups if group not in mine] + [joined]
    return sorted(groups)
