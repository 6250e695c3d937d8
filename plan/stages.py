"""Every possible stage priced: layers i..j-1 on a kind of submesh, for each entry and exit layout.

A stage is a chain of layers that meet at boundary layouts, so its table is the min-plus product of its layers' tables
(``meshwright.plan.intra``), and equal layers share one table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from meshwright.calibrate.hardware import Cluster, Link
from meshwright.plan.cache import LayerCache, LayerFigures
from meshwright.plan.graph import ModelGraph, Tensor
from meshwright.plan.inter import StageTable
from meshwright.plan.intra import LayerTable, Weights, solve_layer
from meshwright.plan.sharding import Axes, LogicalMesh, boundary_layouts, boundary_spec, shards
from meshwright.plan.space import (
    BC,
    BM,
    FC,
    FM,
    OC,
    OM,
    SAVED,
    STATIC,
    FloatArray,
    IntArray,
    Memory,
    Space,
    build_space,
)
from meshwright.simulate.topology import SubMesh, axis_link


@dataclass(frozen=True)
class MeshKind:
    """A kind of submesh a stage may run on: a logical mesh, what its axes may split, and the price put on memory."""

    mesh: LogicalMesh
    roles: tuple[str, ...] = ()  # per axis "data", "tensor" or "any"; empty: any
    seconds_per_byte: float = 0.0

    @cached_property
    def layouts(self) -> tuple[Axes, ...]:
        """Boundary layouts that the roles allow."""
        fixed = [a for a, role in enumerate(self.roles) if role == "data" and self.mesh.sizes[a] > 1]
        barred = {a for a, role in enumerate(self.roles) if role == "tensor"}
        every = boundary_layouts(self.mesh)
        return tuple(x for x in every if set(fixed) <= set(x) and not barred & set(x))


@dataclass(frozen=True)
class Setting:
    """What an outer-loop candidate fixes before stages are priced."""

    graph: ModelGraph
    microbatches: int
    remat: bool
    memory: Memory
    compute_slowdown: float = 1.0
    zero: int = 0  # the highest level of ZeRO that is offered


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage in full: seconds of one micro-batch, bytes of one device."""

    forward_compute_seconds: float
    forward_communication_seconds: float
    backward_compute_seconds: float
    backward_communication_seconds: float
    once_compute_seconds: float
    once_communication_seconds: float
    static_bytes: float
    saved_bytes: float
    transient_bytes: float
    layouts: tuple[int, ...]  # boundary layout before each layer and after the last: one more than layers
    choices: tuple[tuple[int, ...], ...]  # per layer: strategy of each node
    tables: tuple[LayerTable, ...]


Place = tuple[int, tuple[int, ...], tuple[str, ...], int]  # layer class, mesh sizes, roles of the axes, ZeRO


@dataclass(slots=True)
class SpaceCache:
    """What pricers of one graph on one cluster share.

    Strategy spaces and hops know no remat and no price; tables of layers are kept for each set of weights.
    """

    spaces: dict[Place, Space] = field(default_factory=dict)
    tables: dict[tuple[Place, Weights, bool], LayerTable] = field(default_factory=dict)  # True: by the ILP
    hops: dict[tuple[object, ...], FloatArray] = field(default_factory=dict)  # by meshes, and what crosses


@dataclass
class StagePricer:
    """Prices stages of one ``Setting`` on a list of mesh kinds."""

    setting: Setting
    kinds: tuple[MeshKind, ...]
    use_ilp: bool = False
    spaces: SpaceCache = field(default_factory=SpaceCache)
    figures: dict[int, list[LayerFigures]] = field(default_factory=dict)  # by layer class: on each kind
    chains: dict[int, list["_Chain"]] = field(default_factory=dict)  # by kind: those of ``_ranges``
    ilp_solves: int = 0
    cache: LayerCache | None = None  # layers solved by earlier searches

    def layer_table(self, layer_class: int, kind: int) -> LayerTable:
        """The best shardings of a layer; solved once for all pricers of the graph."""
        mesh_kind = self.kinds[kind]
        place = (layer_class, mesh_kind.mesh.sizes, mesh_kind.roles, self.setting.zero)
        key = (place, self._weights(mesh_kind), self.use_ilp)
        tables, spaces = self.spaces.tables, self.spaces.spaces
        if key not in tables:
            if place not in spaces:
                graph, memory = self.setting.graph.classes[layer_class], self.setting.memory
                offered = (mesh_kind.mesh, memory, mesh_kind.layouts, mesh_kind.roles, self.setting.zero)
                spaces[place] = build_space(graph, *offered)
            tables[key] = solve_layer(spaces[place], key[1], self.use_ilp)
            self.ilp_solves += tables[key].ilp_solves
        return tables[key]

    def _weights(self, kind: MeshKind) -> Weights:
        s = self.setting
        live = min(s.microbatches, 4)
        return Weights(s.microbatches, s.remat, s.compute_slowdown, live, kind.seconds_per_byte)

    def stage_table(self, cluster: Cluster, max_layers: Sequence[int] | None = None) -> StageTable:
        """The input of the stage DP: all (i, j) on all kinds."""
        graph, kinds = self.setting.graph, self.kinds
        count, width = len(graph.layers), max(len(k.layouts) for k in kinds)
        shape = (count, count + 1, len(kinds), width, width)
        seconds = np.full(shape, np.inf)
        once, static, saved, transient = (np.zeros(shape) for _ in range(4))
        number = self._ranges.number
        stages = number >= 0
        for k, kind in enumerate(kinds):
            a = len(kind.layouts)
            chains = self._chains(k)
            costs = np.stack([chain.costs for chain in chains], axis=1)  # (component, chain, entry, exit)
            chain_seconds, chain_once = self._seconds(costs, kind.mesh)
            for array, of_chain in (
                (seconds, chain_seconds),
                (once, chain_once),
                (static, costs[STATIC]),
                (saved, np.stack([chain.saved for chain in chains])),
                (transient, np.stack([chain.transient for chain in chains])),
            ):
                array[stages, k, :a, :a] = of_chain[number[stages]]
        return StageTable(
            seconds=seconds,
            once_seconds=once,
            static_bytes=static,
            saved_bytes=saved,
            transient_bytes=transient,
            hop_seconds=self._hops(cluster, width),
            devices=np.array([k.mesh.devices for k in kinds], dtype=np.int64),
            memory_bytes=min(host.device.memory_bytes.value for host in cluster.hosts),
            devices_per_host=cluster.devices_per_host,
            total_devices=cluster.devices,
        )

    @cached_property
    def _ranges(self) -> "_Ranges":
        return _Ranges.of([use.layer_class for use in self.setting.graph.layers])

    def _figures(self, layer_class: int) -> list[LayerFigures]:
        """The figures of a layer on each kind."""

        def solve() -> list[LayerFigures]:
            return [LayerFigures.of(self.layer_table(layer_class, kind)) for kind in range(len(self.kinds))]

        if layer_class not in self.figures:
            graph, memory = self.setting.graph.classes[layer_class], self.setting.memory
            parts = (graph, memory, *((k, self._weights(k)) for k in self.kinds), self.use_ilp, self.setting.zero)
            self.figures[layer_class] = solve() if self.cache is None else self.cache.get(parts, solve)
        return self.figures[layer_class]

    def _chains(self, kind: int) -> list["_Chain"]:
        """The chains of all layer ranges on a kind."""
        if kind not in self.chains:
            found: list[_Chain] = []
            layer_of: dict[int, _Chain] = {}
            temporaries = self.kinds[kind].mesh.device.program_temporaries("backward")
            for shorter, layer_class in self._ranges.steps:
                if layer_class not in layer_of:
                    figures = self._figures(layer_class)[kind]
                    layer_of[layer_class] = _Chain.of(figures, temporaries, self.setting.remat)
                layer = layer_of[layer_class]
                found.append(layer if shorter < 0 else found[shorter].then(layer))
            self.chains[kind] = found
        return self.chains[kind]

    def _seconds(self, costs: FloatArray, mesh: LogicalMesh) -> tuple[FloatArray, FloatArray]:
        slow = self.setting.compute_slowdown
        forward = slow * costs[FC] + costs[FM]
        backward = slow * costs[BC] + costs[BM] + (forward if self.setting.remat else 0.0)
        device = mesh.device
        calls = 2 * device.dispatch_seconds.value + slow * sum(map(device.program_seconds, ("forward", "backward")))
        once = slow * (costs[OC] + device.program_seconds("once")) + costs[OM]
        return forward + backward + calls, once

    def cost(self, first: int, last: int, kind: int, entry: int, leave: int) -> StageCost:
        """One stage in full, with the layouts inside it and the strategies of its layers."""
        chain = self._chains(kind)[self._ranges.number[first, last]]
        layouts = chain.backtrack(entry, leave)
        tables = tuple(self.layer_table(self.setting.graph.layers[x].layer_class, kind) for x in range(first, last))
        costs = chain.costs[:, entry, leave]
        again = (costs[FC], costs[FM]) if self.setting.remat else (0.0, 0.0)
        device = self.kinds[kind].mesh.device
        return StageCost(
            forward_compute_seconds=float(costs[FC]) + device.program_seconds("forward"),
            forward_communication_seconds=float(costs[FM]),
            backward_compute_seconds=float(costs[BC] + again[0]) + device.program_seconds("backward"),
            backward_communication_seconds=float(costs[BM] + again[1]),
            once_compute_seconds=float(costs[OC]) + device.program_seconds("once"),
            once_communication_seconds=float(costs[OM]),
            static_bytes=float(costs[STATIC]),
            saved_bytes=float(chain.saved[entry, leave]),
            transient_bytes=float(chain.transient[entry, leave]),
            layouts=layouts,
            choices=tuple(t.choice(a, b) for t, a, b in zip(tables, layouts[:-1], layouts[1:], strict=True)),
            tables=tables,
        )

    def crossing(self, cut: int) -> tuple[list[Tensor], list[Tensor]]:
        """Values that cross a cut forward, and those whose cotangent crosses it backward."""
        graph = self.setting.graph
        made = {v for use in graph.layers[:cut] for v in use.exits}
        forward, backward = [], []
        for value in sorted({v for use in graph.layers[cut:] for v in use.entries} & made):
            forward.append(graph.values[value])
            readers = [
                graph.classes[use.layer_class].entry_cotangents[use.entries.index(value)]
                for use in graph.layers[cut:]
                if value in use.entries
            ]
            if any(r >= 0 for r in readers):
                backward.append(graph.values[value])
        return forward, backward

    def _hops(self, cluster: Cluster, width: int) -> FloatArray:
        kinds, count = self.kinds, len(self.setting.graph.layers)
        hops = np.zeros((count + 1, 2, len(kinds), width, len(kinds), width))
        inside = cluster.hosts[0].link
        known, places = self.spaces.hops, tuple((kind.mesh.sizes, kind.roles) for kind in kinds)
        for cut in range(1, count):
            forward, backward = self.crossing(cut)
            key = (places, tuple(forward), tuple(backward))
            if key not in known:
                block = np.zeros(hops.shape[1:])
                for m, left in enumerate(kinds):
                    for n, right in enumerate(kinds):
                        for a, out in enumerate(left.layouts):
                            for b, into in enumerate(right.layouts):
                                for crosses, link in enumerate((inside, cluster.inter_host)):
                                    there = transfer_cost(forward, left.mesh, right.mesh, into, link)
                                    back = transfer_cost(backward, right.mesh, left.mesh, out, link)
                                    block[crosses, m, a, n, b] = sum(there) + sum(back)
                known[key] = block
            hops[cut] = known[key]
        return hops


def transfer_cost(
    tensors: Sequence[Tensor], source: LogicalMesh, target: LogicalMesh, layout: Axes, link: Link
) -> tuple[float, float]:
    """(seconds on the wire, latency) of moving values from one mesh to another, where they arrive in ``layout``.

    Every target device is sent its own part; the senders share the work. The slowest of sender, receiver and, between
    hosts, the host's network card decides.
    """
    if not tensors:
        return 0.0, 0.0
    per_target = sum(t.bytes / shards(boundary_spec(t, layout, target.size(layout)), target) for t in tensors)
    return moving_cost(per_target, source.devices, target.devices, link)


def moving_cost(bytes_per_target: float, sources: int, targets: int, link: Link) -> tuple[float, float]:
    """(seconds on the wire, latency) of sending so many bytes to each of the targets, the sources sharing the work."""
    total = bytes_per_target * targets
    busiest = max(bytes_per_target, total / sources)
    seconds = busiest / link.bytes_per_second.value
    if link.host_bytes_per_second is not None:
        seconds = max(seconds, total / link.host_bytes_per_second.value)
    return seconds, link.latency_seconds.value


@dataclass(frozen=True, slots=True, eq=False)
class _Ranges:
    """The ranges of layers i..j-1 of a model, those of equal layers in equal order as one.

    number: (L, L+1) of each range, -1 where there is none; steps: for each number, the number of the range without its
    last layer (-1: it has one layer), and the class of that layer.
    """

    number: IntArray
    steps: tuple[tuple[int, int], ...]

    @staticmethod
    def of(classes: Sequence[int]) -> "_Ranges":
        number = np.full((len(classes), len(classes) + 1), -1)
        known: dict[tuple[int, int], int] = {}
        for first in range(len(classes)):
            shorter = -1
            for last in range(first, len(classes)):
                shorter = known.setdefault((shorter, classes[last]), len(known))
                number[first, last + 1] = shorter
        return _Ranges(number, tuple(known))


@dataclass(frozen=True, slots=True, eq=False)
class _Chain:
    """Layers joined one by one; ``costs``, ``saved`` and ``transient`` are those of the best inner layouts."""

    objective: FloatArray
    costs: FloatArray
    saved: FloatArray
    transient: FloatArray
    joints: tuple[IntArray, ...] = ()  # per inner cut, the best layout there for each (entry, exit) up to that layer

    @staticmethod
    def of(layer: LayerFigures, temporaries: float, remat: bool) -> "_Chain":
        entry_bytes = layer.entry_bytes[:, None] + np.zeros_like(layer.objective)
        saved = entry_bytes if remat else layer.costs[SAVED]
        transient = temporaries * layer.transient_bytes + (layer.costs[SAVED] if remat else 0.0)
        return _Chain(layer.objective, layer.costs, saved, transient)

    def then(self, layer: "_Chain") -> "_Chain":
        """The min-plus product: this chain, then one more layer."""
        total = self.objective[:, :, None] + layer.objective[None, :, :]  # (entry, between, exit)
        best = total.argmin(axis=1)
        rows = np.arange(best.shape[0])[:, None]
        columns = np.arange(best.shape[1])[None, :]
        return _Chain(
            objective=total[rows, best, columns],
            costs=self.costs[:, rows, best] + layer.costs[:, best, columns],
            saved=self.saved[rows, best] + layer.saved[best, columns],
            transient=np.maximum(self.transient[rows, best], layer.transient[best, columns]),
            joints=(*self.joints, best),
        )

    def backtrack(self, entry: int, leave: int) -> tuple[int, ...]:
        layouts = [leave]
        for best in reversed(self.joints):
            layouts.append(int(best[entry, layouts[-1]]))
        return (entry, *layouts[::-1])


def without_wasted_devices(table: StageTable) -> StageTable:
    """The table without stages that some smaller submesh runs as fast and with as little memory: copies that wait."""
    seconds = table.seconds.min(axis=(3, 4))  # (first, last, kind)
    live = np.where(np.isfinite(table.seconds), table.static_bytes + table.saved_bytes, np.inf).min(axis=(3, 4))
    kept = table.seconds.copy()
    for kind, devices in enumerate(table.devices):
        smaller = table.devices < devices
        if smaller.any():
            as_good = (seconds[..., smaller] <= seconds[..., [kind]]) & (live[..., smaller] <= live[..., [kind]])
            kept[:, :, kind][as_good.any(axis=-1)] = np.inf
    return replace(table, seconds=kept)


def mesh_kinds(cluster: Cluster) -> tuple[MeshKind, ...]:
    """All submeshes worth trying: parts of a host and whole hosts, each as a line and as every two-dimensional box.

    Inside a host all links are alike, so (2, 4) and (4, 2) are the same box.
    """
    per_host, hosts = cluster.devices_per_host, cluster.devices // cluster.devices_per_host
    counts = [n for n in range(1, per_host + 1) if n == per_host or (n & (n - 1) == 0) or per_host <= 4]
    counts += [per_host * h for h in range(2, hosts + 1) if h == hosts or (h & (h - 1) == 0)]
    shapes: list[tuple[int, ...]] = []
    for n in counts:
        shapes.append((n,))
        if n <= per_host:
            shapes += [(a, n // a) for a in range(2, n) if n % a == 0 and a <= n // a]
        else:
            shapes += [(n // t, t) for t in range(2, per_host + 1) if per_host % t == 0]
    return tuple(MeshKind(logical_mesh(cluster, shape)) for shape in dict.fromkeys(shapes))


def logical_mesh(cluster: Cluster, sizes: tuple[int, ...], first_device: int = 0) -> LogicalMesh:
    """A box of neighbouring devices from ``first_device`` on, with the links that its axes run over."""
    submesh = SubMesh(first_device, int(np.prod(sizes)))
    links = tuple(axis_link(cluster, submesh, sizes, axis) for axis in range(len(sizes)))
    return LogicalMesh(sizes, links, cluster.device(first_device))
