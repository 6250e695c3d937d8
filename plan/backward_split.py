"""Which part of a backward pass is the weight-gradients: what a schedule that splits backwards may put off.

A backward operator belongs to the weight half if its result reaches no cotangent that leaves the layer towards earlier
ones; all others must run before the stage before can go on. Source of the halves: Qi et al., Zero Bubble Pipeline
Parallelism, ICLR 2024 (arXiv:2401.10241), section 2.
"""

from collections.abc import Sequence

import numpy as np

from meshwright.plan.fusion import traffic
from meshwright.plan.graph import LayerGraph, ModelGraph
from meshwright.plan.sharding import local_bytes
from meshwright.plan.space import BC, FloatArray, Space
from meshwright.plan.stages import StageCost
from meshwright.simulate.compute import op_seconds


def weight_operators(graph: LayerGraph) -> frozenset[int]:
    """The backward operators whose results reach only gradients of parameters."""
    producer = graph.producer()
    needed = [value for value in graph.entry_cotangents if value >= 0]
    urgent: set[int] = set()
    while needed:
        maker = producer.get(needed.pop())
        if maker is not None and maker not in urgent:
            urgent.add(maker)
            needed.extend(graph.operators[maker].inputs)
    return frozenset(i for i, op in enumerate(graph.operators) if op.phase == "backward" and i not in urgent)


def flop_shares(graph: ModelGraph, remat: bool) -> tuple[FloatArray, FloatArray]:
    """(L, L+1) parts of the FLOPs of layers i..j-1 that are the forward and the weight-gradients.

    A recomputed forward counts to the input half, as it does in time. Layers without matmuls count as three equal
    parts.
    """
    of_class = []
    for layer in graph.classes:
        late = weight_operators(layer)
        heavy = [(i, op) for i, op in enumerate(layer.operators) if op.heavy]
        forward = sum(op.flops for _, op in heavy if op.phase == "forward")
        weight = sum(op.flops for i, op in heavy if i in late)
        total = sum(op.flops for _, op in heavy) + (forward if remat else 0.0)
        of_class.append((forward, weight, total))
    sums = np.concatenate([np.zeros((1, 3)), np.cumsum([of_class[use.layer_class] for use in graph.layers], axis=0)])
    inside = np.maximum(sums[None, :] - sums[: len(graph.layers), None], 0.0)  # (first, last, what)
    some = inside[..., 2] > 0
    whole = np.where(some, inside[..., 2], 1.0)
    return np.where(some, inside[..., 0] / whole, 1 / 3), np.where(some, inside[..., 1] / whole, 1 / 3)


def weight_seconds(cost: StageCost) -> float:
    """Seconds of a stage's backward computation that are weight-gradients."""
    total = 0.0
    for table, choice, entry, leave in zip(cost.tables, cost.choices, cost.layouts[:-1], cost.layouts[1:], strict=True):
        total += _weight_share(table.space, choice) * float(table.costs[BC, entry, leave])
    return min(total, cost.backward_compute_seconds)


def _weight_share(space: Space, choice: Sequence[int]) -> float:
    """Part of a layer's backward computation, in seconds by the device's cost model, that is weight-gradients."""
    graph, mesh = space.graph, space.mesh
    late = weight_operators(graph)
    weight = whole = 0.0
    for index, (op, moved) in enumerate(zip(graph.operators, traffic(graph), strict=True)):
        node = space.node_of_operator[index]
        if op.phase != "backward" or node < 0:
            continue
        split = space.splits[index][choice[node]]
        specs = dict(zip((*op.inputs, *op.outputs), (*split.operands, *split.results), strict=True))
        touched = sum(local_bytes(graph.tensors[v], specs[v], mesh) for v in (*moved.reads, *moved.writes))
        if not (op.heavy or moved.launches or touched):
            continue
        dtype = graph.tensors[(*op.inputs, *op.outputs)[0]].dtype
        flops = op.flops / split.shards if op.heavy else 0.0
        seconds = op_seconds(mesh.device, op.kind, flops, touched, dtype, moved.launches)
        whole += seconds
        weight += seconds if index in late else 0.0
    return weight / whole if whole else 0.0
