"""A transformer, a cluster, a grid and a software stack → the timeline of one training step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from meshwright.calibrate.hardware import Cluster
from meshwright.errors import PlanError
from meshwright.simulate.build import weave
from meshwright.simulate.code import INPUT, KIND, STAGE
from meshwright.simulate.collective import transfer_seconds
from meshwright.simulate.compiled import Compiled, compile_program
from meshwright.simulate.costs import PipelineCosts, TransferCost
from meshwright.simulate.operations import Collective
from meshwright.simulate.pipeline import compiled_schedule, simulate
from meshwright.simulate.program import Payload
from meshwright.simulate.schedules.base import Options, Times
from meshwright.simulate.schedules.table import find_schedule
from meshwright.simulate.timeline import Parts, Timeline
from meshwright.simulate.topology import SubMesh, hop_link
from meshwright.simulate.workload.grid import RECOMPUTES, Grid, Recompute, check_grid, stage_layers
from meshwright.simulate.workload.parts import Part, border_bytes, part_at
from meshwright.simulate.workload.pieces import Local
from meshwright.simulate.workload.placement import Prices, mesh_at, message_factor, nearer, unlike_devices
from meshwright.simulate.workload.stack import Stack
from meshwright.simulate.workload.stages import Stage
from meshwright.simulate.workload.transformer import Transformer

SCALAR_BYTES = 4.0  # a sum of squares


@dataclass(frozen=True)
class GridPrediction:
    """A step as it is predicted; memory is that of the fullest mesh, on each of its devices."""

    model: Transformer
    grid: Grid
    cluster: Cluster
    program: Compiled
    costs: PipelineCosts
    timeline: Timeline
    collective_seconds: float  # of one mesh and step, in which its devices do nothing but communicate inside stages

    @property
    def iteration_seconds(self) -> float:
        """The whole step."""
        return self.timeline.makespan_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.grid.batch * self.model.sequence / self.iteration_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the devices could do at their peak in the step's time (attention counted whole)."""
        return self.model.step_flops(self.grid.batch) / self._possible_flops

    @property
    def hfu(self) -> float:
        """As ``mfu`` with what is computed again (Korthikanti et al., 2022, appendix A)."""
        layers = dict.fromkeys(RECOMPUTES, 0)
        for count, policy in zip(stage_layers(self.model, self.grid), self.grid.recomputes, strict=True):
            layers[policy] += count
        head = 2.0 * self.model.hidden * self.model.vocabulary * self.grid.batch * self.model.sequence
        full = self.model.forward_flops(self.grid.batch) - head
        core = 4.0 * self.grid.batch * self.model.layers * self.model.sequence**2 * self.model.query_dim
        again = (layers["full"] * full + layers["selective"] * core) / self.model.layers
        return (self.model.step_flops(self.grid.batch) + again) / self._possible_flops

    @property
    def exposed_communication_seconds(self) -> float:
        """Seconds of the step in which communication is all that goes on: inside stages, between them, at the end."""
        return self.collective_seconds + self.timeline.exposed_communication_seconds

    @property
    def peak_bytes(self) -> float:
        """The most that any device holds."""
        return max(self.timeline.peak_bytes)

    @cached_property
    def peak_parts(self) -> Parts:
        """What that is made of."""
        peaks = self.timeline.peak_bytes
        return self.timeline.peak_parts[peaks.index(max(peaks))]

    @property
    def _possible_flops(self) -> float:
        return self.iteration_seconds * self.cluster.peak_flops(self.model.matmuls_in)


def predict_grid(model: Transformer, cluster: Cluster, grid: Grid, stack: Stack) -> GridPrediction:
    """One training step, in two levels: kinds of stages from their kernels, the pipeline from these.

    Raises:
        PlanError: the model does not divide over the grid, or the grid over the cluster.
        ScheduleError: the schedule has no rule for these sizes.
    """
    check_grid(model, grid, cluster.devices)
    local = Local(model, grid, stack)
    if "times" in find_schedule(grid.schedule).takes:  # searched for what its stages take, one on each mesh
        homes = tuple(range(grid.pipeline))
        stages = _stages(local, cluster, homes)
        program = _program(model, grid, stack, _times(stages, _transfers(local, cluster, stages, homes)))
    else:
        program = _program(model, grid, stack)
        homes = _homes(program)
        stages = _stages(local, cluster, homes)
    split = bool((program.code.table[:, KIND] == INPUT).any())
    if split and grid.zero == 3:
        raise PlanError(f"schedule {grid.schedule} splits backwards, which gathers no weights; use zero 2 at most")
    costs = PipelineCosts(
        stages=tuple(
            stage.costs(mesh_at(grid, home).indices, split=split) for stage, home in zip(stages, homes, strict=True)
        ),
        transfers=_transfers(local, cluster, stages, homes),
    )
    inside = np.zeros(grid.pipeline)
    for stage, home in zip(stages, homes, strict=True):
        inside[home] += stage.forward.exposed_seconds + stage.backward.exposed_seconds
    seconds = float(inside.max()) * grid.microbatches
    return GridPrediction(model, grid, cluster, program, costs, simulate(program, costs), seconds)


def _times(stages: tuple[Stage, ...], transfers: Mapping[tuple[int, int, Payload], TransferCost]) -> Times:
    """What a schedule is searched for; a hop is the longest between two stages."""
    between = [cost for (_, _, what), cost in transfers.items() if what in ("activation", "cotangent")]
    return Times(
        tuple(stage.forward.seconds for stage in stages),
        tuple(stage.input_gradient.seconds for stage in stages),
        tuple(stage.weight_gradient.seconds for stage in stages),
        hop_seconds=max((cost.wire_seconds + cost.latency_seconds for cost in between), default=0.0),
        kept_share=max(stage.weight_saved_bytes / stage.saved_bytes for stage in stages),
        saved_bytes=tuple(stage.saved_bytes for stage in stages),
    )


def _program(model: Transformer, grid: Grid, stack: Stack, times: Times | None = None) -> Compiled:
    plan = find_schedule(grid.schedule)
    if plan.replicas > 1:
        raise PlanError(f"schedule {plan.name} keeps {plan.replicas} copies of all weights; take one without copies")
    if "chunks" not in plan.takes and grid.chunks != plan.chunks:
        raise PlanError(f"schedule {plan.name} puts {plan.chunks} stages on a mesh; set chunks to {plan.chunks}")
    tied = ((0, grid.stages - 1),) if model.tied and grid.stages > 1 else ()
    if times is not None:
        order = plan.make(grid.pipeline, grid.microbatches, Options(times=times))
        code = weave(order, order.edges, tied, norm=stack.clipped, gather=grid.zero in (1, 2))
        return compile_program(code)
    return compiled_schedule(
        grid.schedule,
        grid.pipeline,
        grid.microbatches,
        tied=tied,
        chunks=grid.chunks if "chunks" in plan.takes else None,
        norm=stack.clipped,
        gather=grid.zero in (1, 2),
    )


def _homes(program: Compiled) -> tuple[int, ...]:
    """The mesh of each stage."""
    code = program.code
    homes = np.zeros(int(code.table[:, STAGE].max()) + 1, np.int64)
    homes[code.table[:, STAGE]] = code.mesh
    return tuple(homes.tolist())


def _stages(local: Local, cluster: Cluster, homes: tuple[int, ...]) -> tuple[Stage, ...]:
    """All stages; those that are alike (in layers, recomputation, ends, tensor axis and place within hosts) are one.

    Of a mesh over unlike hosts, the slowest counts: the others wait for it.
    """
    kinds: dict[tuple[float, bool, bool, int, int, Recompute, Part | None], Stage] = {}
    prices: dict[tuple[int, int], tuple[Prices, ...]] = {}
    stages = []
    for number, (layers, home) in enumerate(zip(stage_layers(local.model, local.grid), homes, strict=True)):
        first_device = mesh_at(local.grid, home).first_device
        place = first_device % cluster.devices_per_host if cluster.homogeneous else first_device
        own = local.grid.seen_from(number, home)
        where = (place, own.tensor)
        if where not in prices:
            prices[where] = tuple(
                Prices(cluster, own, first_device, local.model.dtype, local.stack, priced_device=device)
                for device in unlike_devices(cluster, own, first_device)
            )
        here = replace(local, grid=own)
        part = part_at(here, number)
        held = part.layers if part else layers
        key = (held, number == 0, number == local.grid.stages - 1, *where, own.recompute, part)
        if key not in kinds:
            alike = [Stage(here, each, *key[:3], part) for each in prices[where]]
            kinds[key] = max(alike, key=lambda stage: stage.forward.seconds + stage.backward.seconds)
        stages.append(kinds[key])
    return tuple(stages)


def _transfers(
    local: Local, cluster: Cluster, stages: tuple[Stage, ...], homes: tuple[int, ...]
) -> Mapping[tuple[int, int, Payload], TransferCost]:
    """Each device receives its part, from the one in its place on the other mesh where both are of a size."""
    model, grid = local.model, local.grid
    held = float(local.tokens * model.hidden * model.dtype_bytes)
    spread = local.stack.spread_transfers or grid.sequence_parallel
    table = model.vocabulary * model.hidden
    found: dict[tuple[int, int, Payload], TransferCost] = {}
    known: dict[tuple[SubMesh, SubMesh, float], TransferCost] = {}

    def cost(source: int, target: int, bytes: float) -> TransferCost:
        """Of so many bytes to each device of one mesh from those of another."""
        key = (*nearer(cluster, mesh_at(grid, homes[source]), mesh_at(grid, homes[target])), bytes)
        if key not in known:
            link = hop_link(cluster, key[0], key[1])
            latency = link.latency_seconds.value
            whole = bytes * key[1].devices
            wire = transfer_seconds(whole, link) - latency
            ends = (key[0].first_device, key[1].first_device)
            wire *= message_factor(local.stack, cluster, ends)
            known[key] = TransferCost(wire, latency, bytes=whole)
        return known[key]

    def gather_seconds(stage: int) -> float:
        """Time in which the parts of an activation are put together again."""
        ranks = grid.tensors[homes[stage]]
        if not spread or grid.sequence_parallel or ranks == 1:
            return 0.0
        gather = Collective(kind="all_gather", message_bytes=held, ranks=ranks, axis="tensor")
        # of equal meshes the first one's price stands for all
        return stages[0 if grid.tensor_per_mesh is None else stage].prices.seconds(gather)

    for stage in range(grid.stages - 1):
        for source, target, what in ((stage, stage + 1, "activation"), (stage + 1, stage, "cotangent")):
            if homes[source] != homes[target]:
                own = replace(local, grid=grid.seen_from(target, homes[target]))
                needed = border_bytes(own, stage + 1)
                received = needed / grid.tensors[homes[target]] if spread else needed
                hop = cost(source, target, received)
                later = hop._replace(
                    latency_seconds=hop.latency_seconds + gather_seconds(target), buffer_bytes=received
                )
                found[source, target, what] = later  # type: ignore[index]
    last = grid.stages - 1
    if model.tied and last:
        found[last, 0, "gradient"] = cost(last, 0, table / grid.tensors[homes[0]] * local.stack.sent_gradient_bytes)
        found[0, last, "parameter"] = cost(0, last, table / grid.tensors[homes[last]] * model.dtype_bytes)
    firsts = [homes.index(mesh) for mesh in range(grid.pipeline)]
    for other in firsts[1:]:
        found[other, 0, "square"] = cost(other, 0, SCALAR_BYTES)
        found[0, other, "norm"] = cost(0, other, SCALAR_BYTES)
    return found
