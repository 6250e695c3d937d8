"""The collectives that a layer's assignment is charged for, one by one: what the compiled program is held against."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from meshwright.plan.graph import Tensor
from meshwright.plan.sharding import AXIS_NAMES, Axes, Collective, all_reduce, reshard, spec_text
from meshwright.plan.space import BM, FM, OM, Space
from meshwright.plan.stages import StageCost
from meshwright.plan.zero_space import storage_charges
from meshwright.simulate.collective import CollectiveKind

When = Literal["forward", "backward", "once"]
_WHEN: dict[int, When] = {FM: "forward", BM: "backward", OM: "once"}


@dataclass(frozen=True, slots=True)
class Priced:
    """One collective of the cost model: ``elements`` and ``bytes`` of its result on one of its ``ranks`` devices.

    phase: once per micro-batch in the forward or backward half, or once per iteration.
    """

    kind: CollectiveKind
    elements: float
    bytes: float
    axes: Axes
    ranks: int
    phase: When
    seconds: float
    why: str


def priced_collectives(space: Space, choice: Sequence[int]) -> tuple[Priced, ...]:
    """All that ``space.costs(choice)`` charges as communication; the seconds of a phase add up to that component."""
    graph, mesh = space.graph, space.mesh
    found: list[Priced] = []

    def add(collectives: Sequence[Collective], tensor: Tensor, component: int, why: str) -> None:
        item_bytes = tensor.bytes / max(tensor.elements, 1)
        for c in collectives:
            over = f"{why}, over {'+'.join(AXIS_NAMES[a] for a in c.axes)}"
            ranks, size = mesh.size(c.axes), c.elements * item_bytes
            found.append(Priced(c.kind, c.elements, size, c.axes, ranks, _WHEN[component], c.seconds, over))

    waiting = space.summed_by
    for index, op in enumerate(graph.operators):
        node = space.node_of_operator[index]
        if node < 0 or waiting.get(index) in space.stored:  # such a sum depends on how the parameter is kept
            continue
        split = space.splits[index][choice[node]]
        component = OM if index in waiting else FM if op.phase == "forward" else BM
        for value, spec in zip(op.outputs, split.results, strict=True):
            sums = all_reduce(graph.tensors[value], spec, split.contracted, mesh)
            add(sums, graph.tensors[value], component, f"sum of value {value} ({op.primitive})")
    for change in space.changes:
        before = change.home.specs[choice[change.home.node]]
        after = change.wanted[choice[change.node]]
        why = f"value {change.value} from {spec_text(before)} to {spec_text(after)}"
        tensor = graph.tensors[change.value]
        add(reshard(tensor, before, after, mesh), tensor, change.component, why)
    for storage, (component, tensor, collectives) in storage_charges(space, choice):
        way = storage.options[choice[storage.node]]
        why = f"parameter {storage.parameter} at ZeRO-{way.level}, kept in {spec_text(way.kept)}"
        add(collectives, tensor, component, why)
    return tuple(found)


def priced_stage(cost: StageCost) -> tuple[Priced, ...]:
    """The collectives of one stage: those of its layers in order."""
    pairs = zip(cost.tables, cost.choices, strict=True)
    return tuple(priced for table, choice in pairs for priced in priced_collectives(table.space, choice))
