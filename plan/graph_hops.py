"""What moves between the stages of a graph: values to those that read them, cotangents back."""

from dataclasses import dataclass, field

from meshwright.calibrate.hardware import Cluster
from meshwright.plan.graph import ModelGraph, Tensor
from meshwright.plan.stage_table import Stage
from meshwright.plan.stages import StagePricer, transfer_cost

_Values = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # forward, and those whose cotangent comes back


@dataclass
class GraphHops:
    """Seconds between two stages, as ``plan.stage_graph`` asks for them: for one micro-batch, there and back.

    A value goes straight from the stage that writes it to those that read it, also past stages between.
    """

    pricer: StagePricer
    cluster: Cluster
    _values: dict[tuple[int, int, int, int], _Values] = field(default_factory=dict)
    _seconds: dict[tuple[object, ...], float] = field(default_factory=dict)

    def __call__(self, left: Stage, right: Stage, end: int) -> float:
        """Seconds of moving what ``left`` writes and layers right.first_layer..end - 1 read, and cotangents back."""
        between = self._between(left.first_layer, left.last_layer, right.first_layer, end)
        hosts = [self.cluster.host_of(stage.first_device) for stage in (left, right)]
        key = (between, left.kind, left.exit, right.kind, right.entry, tuple(hosts) if hosts[0] == hosts[1] else None)
        if key not in self._seconds:
            kinds = self.pricer.kinds
            out, into = kinds[left.kind], kinds[right.kind]
            link = self.cluster.hosts[hosts[0]].link if hosts[0] == hosts[1] else self.cluster.inter_host
            there = transfer_cost(between[0], out.mesh, into.mesh, into.layouts[right.entry], link)
            back = transfer_cost(between[1], into.mesh, out.mesh, out.layouts[left.exit], link)
            self._seconds[key] = sum(there) + sum(back)
        return self._seconds[key]

    def _between(self, first: int, last: int, start: int, end: int) -> _Values:
        key = (first, last, start, end)
        if key not in self._values:
            self._values[key] = values_between(self.pricer.setting.graph, *key)
        return self._values[key]


def values_between(graph: ModelGraph, first: int, last: int, start: int, end: int) -> _Values:
    """What layers first..last-1 write and layers start..end-1 read; and of that, what has a cotangent."""
    made = {v for use in graph.layers[first:last] for v in use.exits}
    read: set[int] = set()
    returned: set[int] = set()
    for use in graph.layers[start:end]:
        cotangents = graph.classes[use.layer_class].entry_cotangents
        for value, cotangent in zip(use.entries, cotangents, strict=True):
            if value in made:
                read.add(value)
                if cotangent >= 0:
                    returned.add(value)
    forward, backward = (tuple(graph.values[v] for v in sorted(values)) for values in (read, returned))
    return forward, backward
