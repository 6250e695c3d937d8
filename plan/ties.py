"""What tied weights cost the stages that share them: gradients to the owner, the new value back, once a step.

The first layer that reads a weight owns it. If another stage reads it too, that one sends its gradient and is sent the
updated weight, both after the last backward and one after the other. Which mesh the other stage has is not known while
a stage is priced for itself; so each stage that shares a weight is charged for both ways as if the other had a mesh
like its own. That enters the surrogate as seconds once per iteration (``plan.inter``); the simulator knows both meshes.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from meshwright.calibrate.hardware import Cluster
from meshwright.plan.sharding import local_bytes
from meshwright.plan.stage_table import StageTable
from meshwright.plan.stages import StagePricer, moving_cost


def with_ties(table: StageTable, pricer: StagePricer, cluster: Cluster) -> StageTable:
    """The table with what each stage pays once per iteration for weights that it shares with others."""
    ties = tuple(tied_layers(pricer))
    if not ties:
        return table
    once = table.once_seconds.copy()
    first, last = np.indices((table.layers, table.layers + 1))
    link = cluster.inter_host if len(cluster.hosts) > 1 else cluster.hosts[0].link
    for leaf, layers in ties:
        inside = sum(((first <= layer) & (layer < last)).astype(int) for layer in layers)
        shares = (inside > 0) & (inside < len(layers))
        for kind, devices in enumerate(table.devices.tolist()):
            held = min(_bytes_on_device(pricer, kind, layer, leaf) for layer in layers)
            seconds = 2 * sum(moving_cost(held, devices, devices, link))
            once[:, :, kind] += np.where(shares, seconds, 0.0)[..., None, None]
    return replace(table, once_seconds=once)


def tied_layers(pricer: StagePricer) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(Parameter leaf, the layers that read it), for those read by several."""
    readers: dict[int, list[int]] = {}
    for layer, use in enumerate(pricer.setting.graph.layers):
        for leaf in dict.fromkeys(use.parameters):
            readers.setdefault(leaf, []).append(layer)
    return ((leaf, tuple(layers)) for leaf, layers in readers.items() if len(layers) > 1)


def _bytes_on_device(pricer: StagePricer, kind: int, layer: int, leaf: int) -> float:
    """Bytes of a weight on one device, as the layer likes it best on this kind of mesh."""
    graph = pricer.setting.graph
    use = graph.layers[layer]
    table = pricer.layer_table(use.layer_class, kind)
    entry, leave = np.unravel_index(int(np.argmin(table.objective)), table.objective.shape)
    value = table.space.graph.parameters[use.parameters.index(leaf)]
    spec = table.space.spec(value, table.choice(int(entry), int(leave)))
    tensor = graph.parameters[leaf].tensor
    return float(tensor.bytes) if spec is None else local_bytes(tensor, spec, table.space.mesh)
