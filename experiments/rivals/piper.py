"""Piper's problem: a graph of layers, each with (tensor width × rematerialised or not) ways to run, cut into stages.

Cost terms (Tarnawski et al., NeurIPS 2021, section 4, and the fields of the graph file): a stage of nodes S with d
data-parallel replicas of tensor width t takes per sample

    compute    Σ timePerSample / d
    traffic    2 Σ (communicationCost + syncTimeFw or syncTimeBw) / d / bandwidth   over the edges that leave or enter S
    gradients  4 (d - 1) / d · Σ parameterSize / mbsInBatch / bandwidth

and holds ``Σ memoryUsageA · ceil(s / d) + memoryUsageB`` bytes on a device, s being the sum of the replicas from this
stage on. The bottleneck is the largest time per sample; d divides mbsInBatch, and s is at most mbsInBatch.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from meshwright.errors import PlanError
from meshwright.plan.frontier import FloatArray, Frontier
from meshwright.plan.replicated import Piece, least_bottleneck

_MOST_CUTS = 5_000  # a branching graph with more is out of reach of a search over pairs of cuts


class Way(msgspec.Struct, frozen=True, rename="camel"):
    """One way to run a node on a number of devices; seconds and bytes per sample."""

    id: str
    time_per_sample: float
    parameter_size: float
    memory_usage_a: float = msgspec.field(name="memoryUsageA")
    memory_usage_b: float = msgspec.field(name="memoryUsageB")
    sync_time_fw: dict[int, float]
    sync_time_bw: dict[int, float]


class Node(msgspec.Struct, frozen=True):
    """A layer and its ways, by tensor width."""

    id: int
    name: str
    ways: dict[int, tuple[Way, ...]] = msgspec.field(name="TMPCs")


class Edge(msgspec.Struct, frozen=True, rename="camel"):
    """Bytes per sample that one layer hands to another."""

    source_id: int
    dest_id: int
    communication_cost: float


class Graph(msgspec.Struct, frozen=True, rename="camel"):
    """Piper's input file: the layers, and the cluster they are planned for."""

    max_memory_per_device: float
    bandwidth: float
    mbs_in_batch: int
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True, slots=True)
class PiperStage:
    """Node ids, data-parallel replicas, tensor width and time per sample of a stage."""

    nodes: tuple[int, ...]
    replicas: int
    width: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PiperAnswer:
    """The stages, first to last, and the seconds that the search took, reading and preparing included."""

    stages: tuple[PiperStage, ...]
    search_seconds: float

    @property
    def bottleneck_seconds(self) -> float:
        """Time per sample of the slowest stage."""
        return max(stage.seconds for stage in self.stages)

    @property
    def devices(self) -> int:
        """Devices that are used."""
        return sum(stage.replicas * stage.width for stage in self.stages)


def read_graph(path: Path) -> Graph:
    """Read a graph file in Piper's form."""
    return msgspec.json.decode(path.read_bytes(), type=Graph)


def stage_seconds(graph: Graph, nodes: frozenset[int], width: int, replicas: int, chosen: Mapping[int, int]) -> float:
    """Time per sample of a stage by the terms in this module's docstring, ``chosen`` being the way of each node."""
    ways = {node.id: node.ways[width][chosen[node.id]] for node in graph.nodes if node.id in nodes}
    traffic = crossing_bytes(graph, nodes, ways)
    parameters = sum(way.parameter_size for way in ways.values())
    gradients = 4 * (replicas - 1) / replicas * parameters / graph.mbs_in_batch
    compute = sum(way.time_per_sample for way in ways.values())
    return compute / replicas + (traffic / replicas + gradients) / graph.bandwidth


def crossing_bytes(graph: Graph, nodes: frozenset[int], ways: Mapping[int, Way]) -> float:
    """Bytes per sample over the edges between a stage and the rest, both directions of training counted."""
    total = 0.0
    for edge in graph.edges:
        if edge.dest_id in nodes and edge.source_id not in nodes:
            total += 2 * (edge.communication_cost + ways[edge.dest_id].sync_time_fw[edge.source_id])
        if edge.source_id in nodes and edge.dest_id not in nodes:
            total += 2 * (edge.communication_cost + ways[edge.source_id].sync_time_bw[edge.dest_id])
    return total


def stage_bytes(graph: Graph, nodes: frozenset[int], width: int, in_flight: int, chosen: Mapping[int, int]) -> float:
    """Bytes on each device of a stage that holds ``in_flight`` micro-batches."""
    ways = [node.ways[width][chosen[node.id]] for node in graph.nodes if node.id in nodes]
    return sum(way.memory_usage_a * in_flight + way.memory_usage_b for way in ways)


def plan(graph: Graph, devices: int) -> PiperAnswer:
    """The stages of least bottleneck on ``devices`` devices; exact under the terms in this module's docstring."""
    began = time.perf_counter()
    cuts = _cuts(graph)
    pieces, inside = [], []
    widths = sorted({width for node in graph.nodes for width in node.ways if width <= devices})
    for upper, after in enumerate(cuts):
        for width in widths:
            for lower, nodes, frontier in _pieces_above(graph, cuts, upper, after, width):
                pieces.append(Piece(lower, upper, width, frontier))
                inside.append(nodes)
    divisors = [d for d in range(1, min(graph.mbs_in_batch, devices) + 1) if graph.mbs_in_batch % d == 0]
    most = min(graph.mbs_in_batch, devices)
    stages = least_bottleneck(pieces, devices, divisors, graph.max_memory_per_device, most)
    answer = tuple(
        PiperStage(tuple(sorted(inside[s.piece])), s.replicas, pieces[s.piece].width, s.seconds) for s in stages
    )
    return PiperAnswer(answer, time.perf_counter() - began)


def _cuts(graph: Graph) -> list[frozenset[int]]:
    """Every set of nodes that holds all successors of its members, by size: what may lie after a cut."""
    followers: dict[int, set[int]] = {node.id: set() for node in graph.nodes}
    for edge in graph.edges:
        followers[edge.source_id].add(edge.dest_id)
    found = {frozenset[int]()}
    newest = list(found)
    while newest:
        grown = {after | {n} for after in newest for n in followers if n not in after and followers[n] <= after}
        newest = sorted(grown - found, key=sorted)
        found |= grown
        if len(found) > _MOST_CUTS:
            raise PlanError(f"the graph can be cut in more than {_MOST_CUTS} ways; merge layers of its branches first")
    return sorted(found, key=lambda after: (len(after), sorted(after)))


def _pieces_above(
    graph: Graph, cuts: list[frozenset[int]], upper: int, after: frozenset[int], width: int
) -> list[tuple[int, frozenset[int], FloatArray]]:
    """Pieces between a cut and every lower one, largest lower cut first, so that each adds one node to a known one."""
    pieces = []
    frontiers = {after: Frontier.empty(4)}
    nodes = {node.id: node for node in graph.nodes}
    for lower in range(upper - 1, -1, -1):
        if not cuts[lower] < after:
            continue
        larger = (cuts[lower] | {n} for n in after - cuts[lower])
        known = next((cut for cut in larger if cut in frontiers), None)
        if known is None:  # a node in between cannot run on so many devices
            continue
        (new,) = known - cuts[lower]
        if width not in nodes[new].ways:
            continue
        frontiers[cuts[lower]] = frontiers[known].add(_options(graph, nodes[new].ways[width]))
        inside = after - cuts[lower]
        ways = {n: nodes[n].ways[width][0] for n in inside}
        costs = frontiers[cuts[lower]].costs.copy()
        costs[:, 0] += crossing_bytes(graph, inside, ways) / graph.bandwidth
        pieces.append((lower, inside, costs))
    return pieces


def _options(graph: Graph, ways: tuple[Way, ...]) -> FloatArray:
    """Work and gradient seconds, bytes per micro-batch in flight and fixed bytes of each way."""
    if any((way.sync_time_fw, way.sync_time_bw) != (ways[0].sync_time_fw, ways[0].sync_time_bw) for way in ways):
        raise PlanError("the ways of one node differ in the bytes that they hand on; the search takes them as equal")
    per_byte = 4 / graph.mbs_in_batch / graph.bandwidth
    return np.array(
        [[w.time_per_sample, w.parameter_size * per_byte, w.memory_usage_a, w.memory_usage_b] for w in ways]
    )


def reference_runs(path: Path) -> dict[int, dict[str, Any]]:
    """Piper's own re-run by number of devices: ``search_s``, ``max_stage_TPS_s`` and ``plan``."""
    return {run["k"]: run for run in msgspec.json.decode(path.read_bytes())["runs"]}
