"""Candidates at one number of micro-batches: stages priced under a policy and a price of memory, then cut by the DP."""

from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Literal

import numpy as np

from meshwright.calibrate.hardware import Cluster
from meshwright.errors import PlanError
from meshwright.plan.branches import decompose, layer_edges
from meshwright.plan.graph import ModelGraph
from meshwright.plan.graph_hops import GraphHops
from meshwright.plan.inter import Stage, StagePlan, StageTable, best_stages, peak_bytes, surrogate_seconds
from meshwright.plan.judge import compute_dtype
from meshwright.plan.planfile import bytes_text
from meshwright.plan.policies import ManyWays, joined, with_shares
from meshwright.plan.request import Request, requested_kinds
from meshwright.plan.schedule_rules import GRAPH, ScheduleRule
from meshwright.plan.stage_graph import best_stage_graph
from meshwright.plan.stages import Setting, SpaceCache, StagePricer, without_wasted_devices
from meshwright.plan.ties import with_ties
from meshwright.plan.virtual import virtual_stages

Policy = Literal["none", "full"]
Way = tuple[Policy, float]  # a policy of rematerialisation, and a price of memory

MOST_LAYERS_OF_A_GRAPH = 12  # with 24, the search for stages that form a graph takes minutes
_ROUNDING = 1e-6  # relative, of a bound that may be reached
MEMORY_PRICES = (0.0, 0.3, 3.0)  # of the seconds of a step, for filling a device's memory once


@dataclass
class Priced:
    """The stage tables of one number of micro-batches, made when they are asked for."""

    graph: ModelGraph
    microbatches: int
    request: Request
    spaces: SpaceCache = field(default_factory=SpaceCache)
    known: dict[Way, tuple[StagePricer, StageTable]] = field(default_factory=dict)

    @property
    def slowdown(self) -> float:
        """How much longer a device computes while all of its host do."""
        host = self.request.cluster.hosts[0]
        return host.slowdown(host.devices)

    @property
    def branches(self) -> bool:
        """Whether layers of the model may run side by side, and are few enough to be searched for that."""
        few = len(self.graph.layers) <= MOST_LAYERS_OF_A_GRAPH
        return few and decompose(len(self.graph.layers), layer_edges(self.graph)).branches

    @property
    def ilp_solves(self) -> int:
        """ILPs solved so far."""
        return sum(pricer.ilp_solves for pricer, _ in self.known.values())

    def at(self, *ways: Way) -> tuple[StagePricer, StageTable]:
        """The stages under a policy, at a price of memory in seconds of a step for filling a device once.

        Of several such ways the stage DP may choose, stage by stage.
        """
        for way in ways:
            if way not in self.known:
                self.known[way] = self._one(*way)
        if len(ways) == 1:
            return self.known[ways[0]]
        pricers, tables = zip(*(self.known[way] for way in ways), strict=True)
        return ManyWays.of(*pricers), joined(tables, self.microbatches)

    def _one(self, policy: Policy, price: float) -> tuple[StagePricer, StageTable]:
        request = self.request
        kinds = requested_kinds(request.cluster, request.fix, price * _seconds_per_byte(self.graph, request.cluster))
        setting = Setting(self.graph, self.microbatches, policy == "full", request.memory, self.slowdown, request.zero)
        pricer = StagePricer(setting, kinds, request.use_ilp, self.spaces, cache=request.cache)
        table = with_ties(pricer.stage_table(request.cluster), pricer, request.cluster)
        table = replace(with_shares(table, pricer), memory_bytes=request.usable_bytes)
        if request.fix.equal_layers:
            table = _only_equal_layers(table, request.fix.pipeline or 1)
        return pricer, table if request.fix.meshes else without_wasted_devices(table)


def stage_plans(
    pricer: StagePricer, table: StageTable, request: Request, microbatches: int, rule: ScheduleRule, keep: int
) -> list[StagePlan]:
    """The best stages for a schedule, best first, by the pricer's table.

    Errors: PlanError if none fits.
    """
    if request.fix.stages is not None:
        if rule.chunks > 1:
            raise PlanError(f"schedule {rule.text} has several stages a mesh; it cannot be planned with given stages")
        return [_given_stages(table, len(request.fix.stages), microbatches, rule)]
    if rule is GRAPH:
        return _graph_plans(pricer, table, request, microbatches)
    if rule.chunks > 1:
        return virtual_stages(table, microbatches, rule, keep, request.cross_mesh)
    all_devices = request.fix.meshes or not request.cross_mesh
    return best_stages(table, microbatches, rule.name, keep, None, request.cross_mesh, all_devices)


def memory_is_no_matter(
    pricer: StagePricer, table: StageTable, best: StagePlan, request: Request, microbatches: int, rule: ScheduleRule
) -> bool:
    """Whether unlimited memory would give no better stages: then rematerialisation, which only costs time, is out."""
    unlimited = replace(table, memory_bytes=float("inf"))
    freed = stage_plans(pricer, unlimited, request, microbatches, rule, keep=1)
    return freed[0].surrogate_seconds >= best.surrogate_seconds * (1 - 1e-6)


def _only_equal_layers(table: StageTable, stages: int) -> StageTable:
    """The table with only the stages of a cut into equally many layers each, or one less for the last.

    Errors: PlanError if there are fewer layers than stages.
    """
    if stages > table.layers:
        raise PlanError(f"{stages} stages were asked of a model of {table.layers} layers; use at most {table.layers}")
    cuts = [-(-table.layers * s // stages) for s in range(stages + 1)]
    seconds = np.full_like(table.seconds, np.inf)
    for first, last in pairwise(cuts):
        seconds[first, last] = table.seconds[first, last]
    return replace(table, seconds=seconds)


def _graph_plans(pricer: StagePricer, table: StageTable, request: Request, microbatches: int) -> list[StagePlan]:
    """The best stages that form a graph."""
    graph = pricer.setting.graph
    if len(graph.layers) > MOST_LAYERS_OF_A_GRAPH:
        raise PlanError(
            f"stages that form a graph are searched for up to {MOST_LAYERS_OF_A_GRAPH} layers; the model has "
            f"{len(graph.layers)}: leave schedule graph-1f1b out"
        )
    chain = decompose(len(graph.layers), layer_edges(graph))
    hops = GraphHops(pricer, request.cluster) if request.cross_mesh else lambda left, right, end: 0.0
    line = best_stages(table, microbatches, "1f1b", 1, None, request.cross_mesh, all_devices=request.fix.meshes)
    found = best_stage_graph(table, chain, microbatches, hops, (1 + _ROUNDING) * line[0].surrogate_seconds)
    if found is None or (request.fix.meshes and found.stages[0].first_device > 0):
        raise PlanError("no stages that form a graph are better than those of a line")
    return [StagePlan(found.stages, found.surrogate_seconds, found.peak_bytes)]


def _given_stages(table: StageTable, stages: int, microbatches: int, rule: ScheduleRule) -> StagePlan:
    """The best cut for a given row of meshes: kind s is stage s. Few stages, few cuts: all are tried.

    With several ways in the table, kinds s, s + ``stages``, s + 2 ``stages`` ... are stage s: the quickest that fits.
    """
    layers, width = table.layers, table.seconds.shape[3]
    if stages > layers:
        raise PlanError(f"{stages} stages were asked of a model of {layers} layers; use at most {layers}")
    best: StagePlan | None = None
    ways = len(table.devices) // stages
    for inner in combinations(range(1, layers), stages - 1):
        cuts = (0, *inner, layers)
        chosen = []
        device = 0
        for s in range(stages):
            live = rule.live(stages - s, stages, microbatches)
            options = []
            for kind in range(s, ways * stages, stages):
                block = table.seconds[cuts[s], cuts[s + 1], kind]
                entry, leave = np.unravel_index(int(block.argmin()), (width, width))
                stage = Stage(cuts[s], cuts[s + 1], kind, int(entry), int(leave), device)
                held = table.static_bytes[stage.cell] + live * table.saved_bytes[stage.cell]
                fits = held + table.transient_bytes[stage.cell] <= table.memory_bytes
                options.append((not fits, float(block.min()), stage))
            *_, stage = min(options)
            chosen.append(stage)
            device += int(table.devices[s])
        if not all(np.isfinite(table.seconds[stage.cell]) for stage in chosen):
            continue
        peaks = peak_bytes(table, chosen, microbatches, rule.name)
        seconds = surrogate_seconds(table, chosen, microbatches, rule.name)
        if max(peaks) <= table.memory_bytes and (best is None or seconds < best.surrogate_seconds):
            best = StagePlan(tuple(chosen), seconds, peaks)
    if best is None:
        raise PlanError(f"the given stages do not fit in {bytes_text(table.memory_bytes)} a device with any cut")
    return best


def _seconds_per_byte(graph: ModelGraph, cluster: Cluster) -> float:
    """The price of memory at which filling a device costs as much as computing one micro-batch on the whole cluster."""
    device = cluster.device(0)
    seconds = graph.model_flops / (device.peak_flops(compute_dtype(graph)) * cluster.devices)
    return seconds / device.memory_bytes.value
