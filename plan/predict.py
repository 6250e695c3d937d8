"""A plan → the simulator's answer."""

import os
from dataclasses import dataclass
from typing import Any

import msgspec

from meshwright.calibrate.hardware import Cluster
from meshwright.calibrate.uncertainty import Interval, shipped_intervals
from meshwright.plan.planfile import Plan, PlannedStage, Predicted, Transfer, load_plan, public_json
from meshwright.simulate.build import build_program
from meshwright.simulate.compiled import Compiled
from meshwright.simulate.flows import transfer_flow
from meshwright.simulate.network import Network, network
from meshwright.simulate.pipeline import PipelineCosts, StageCosts, TransferCost, compiled_schedule, simulate
from meshwright.simulate.program import Program
from meshwright.simulate.timeline import Timeline
from meshwright.simulate.topology import SubMesh, core_sharing
from meshwright.simulate.variability import StepSamples, Variability, sample_steps


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the simulator says of a plan."""

    plan: Plan
    timeline: Timeline
    predicted: Predicted

    def to_json(self) -> dict[str, Any]:
        return {**public_json(self.plan), "predicted": msgspec.to_builtins(self.predicted)}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the timeline as a picture."""
        from meshwright.simulate.gantt import plot_timelines

        plot_timelines([("predicted", self.timeline)], path)


def program_of(
    schedule: str,
    microbatches: int,
    stages: int,
    transfers: tuple[Transfer, ...],
    tied: tuple[tuple[int, int], ...],
    meshes: int | None = None,
) -> Program:
    """The instructions of every mesh; as many meshes as stages, unless fewer hold several stages each."""
    each = _chunks(stages, meshes)
    return build_program(schedule, stages // (each or 1), microbatches, _edges(transfers), tied, chunks=each)


def _chunks(stages: int, meshes: int | None) -> int | None:
    """Stages a mesh, where there are several."""
    return None if meshes is None or meshes == stages else stages // meshes


def _edges(transfers: tuple[Transfer, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted({(t.source, t.target) for t in transfers if t.what == "activation"}))


def _compiled(
    schedule: str,
    microbatches: int,
    stages: tuple[PlannedStage, ...],
    transfers: tuple[Transfer, ...],
    tied: tuple[tuple[int, int], ...],
) -> Compiled:
    meshes = len({stage.devices for stage in stages})
    return compiled_schedule(
        schedule, meshes, microbatches, _edges(transfers), tied, chunks=_chunks(len(stages), meshes)
    )


def simulate_stages(
    cluster: Cluster,
    schedule: str,
    microbatches: int,
    stages: tuple[PlannedStage, ...],
    transfers: tuple[Transfer, ...],
    tied: tuple[tuple[int, int], ...] = (),
) -> Timeline:
    """Run the event engine on planned stages; transfers between them meet on the links of the cluster."""
    return simulate(_compiled(schedule, microbatches, stages, transfers, tied), costs_of(cluster, stages, transfers))


def costs_of(cluster: Cluster, stages: tuple[PlannedStage, ...], transfers: tuple[Transfer, ...]) -> PipelineCosts:
    """What planned stages and the transfers between them cost, as the simulator wants it."""
    net = network(cluster)
    return PipelineCosts(
        stages=tuple(_stage_costs(stage, cluster) for stage in stages),
        transfers={
            (t.source, t.target, t.what): _over_links(t, stages, net)
            for t in transfers
            if stages[t.source].devices != stages[t.target].devices  # of one mesh: nothing is sent
        },
        cores=core_sharing(cluster),
        link_bytes_per_second=tuple(link.bytes_per_second for link in net.links),
    )


def _stage_costs(stage: PlannedStage, cluster: Cluster) -> StageCosts:
    """A stage as if it had its host's cores to itself.

    Its collectives were measured with all its ranks busy, so what these lose to each other is in their seconds already;
    the simulator, which slows all that a stage does while ranks share cores, must not add it again.
    """
    host = cluster.hosts[cluster.host_of(stage.devices[0])]
    together = host.slowdown(min(len(stage.devices), host.devices))
    backward_seconds = stage.backward_seconds - (1 - 1 / together) * stage.backward_communication_seconds
    late = stage.weight_gradient_seconds
    return StageCosts(
        devices=stage.devices,
        forward_seconds=stage.forward_seconds - (1 - 1 / together) * stage.forward_communication_seconds,
        backward_seconds=backward_seconds,
        input_seconds=None if late is None else backward_seconds - late,
        weight_seconds=None if late is None else late + stage.dispatch_seconds,  # one more program to start
        reduce_seconds=stage.reduce_seconds / together,
        update_seconds=stage.update_seconds + stage.dispatch_seconds,
        static_bytes=stage.static_bytes,
        saved_bytes=stage.saved_bytes,
        transient_bytes=stage.transient_bytes,
    )


def sample_plan(plan: Plan, variability: Variability, *, samples: int, seed: int = 0) -> StepSamples:
    """Times of many steps of a plan, each with chances of its own."""
    program = _compiled(plan.schedule, plan.microbatches, plan.stages, plan.transfers, plan.tied)
    costs = costs_of(plan.hardware, plan.stages, plan.transfers)
    return sample_steps(program, costs, variability, samples=samples, seed=seed)


def _over_links(transfer: Transfer, stages: tuple[PlannedStage, ...], net: Network) -> TransferCost:
    """A transfer as a flow between the devices of its stages, never quicker than the links that it takes."""
    flow = transfer_flow(net, _submesh(stages[transfer.source]), _submesh(stages[transfer.target]))
    wire_seconds = max(transfer.wire_seconds, transfer.bytes / flow.bytes_per_second)
    return TransferCost(
        wire_seconds, transfer.latency_seconds, bytes=transfer.bytes, links=flow.links, weights=flow.weights
    )


def _submesh(stage: PlannedStage) -> SubMesh:
    return SubMesh(min(stage.devices), len(stage.devices))


def judge(
    timeline: Timeline,
    cluster: Cluster,
    samples: int,
    tokens: int,
    model_flops: float,
    dtype: str = "f32",
    interval: Interval | None = None,
) -> Predicted:
    """The numbers people ask for.

    Args:
        model_flops: of the whole iteration.
        interval: of measured over predicted seconds, before what the machine file leaves open; by default, that of the
            planner's own plans (see ``usual_interval``).
    """
    seconds = timeline.makespan_seconds
    devices = cluster.devices
    peak = max(timeline.peak_bytes)
    rate = model_flops / seconds / devices
    around = step_interval(cluster, interval or usual_interval(cluster))
    return Predicted(
        iteration_seconds=seconds,
        iteration_seconds_low=seconds * around.low,
        iteration_seconds_high=seconds * around.high,
        tokens_per_second=samples * tokens / seconds,
        model_flops_per_second_per_device=rate,
        mfu=model_flops / seconds / cluster.peak_flops(dtype),
        bubble_fraction=timeline.bubble_fraction,
        exposed_communication_seconds=timeline.exposed_communication_seconds,
        peak_memory_bytes=peak,
        fits=_fits(timeline, cluster),
    )


def _fits(timeline: Timeline, cluster: Cluster) -> bool:
    """Whether each mesh holds no more than the smallest of its devices."""
    return all(
        peak <= cluster.device(device).memory_bytes.value
        for peak, devices in zip(timeline.peak_bytes, timeline.mesh_devices, strict=True)
        for device in devices
    )


def usual_interval(cluster: Cluster) -> Interval:
    """How far a measured step is from its prediction: less far where whole programs were measured on every device."""
    known = shipped_intervals()
    return known.calibrated if all(host.device.programs for host in cluster.hosts) else known.elsewhere


def step_interval(cluster: Cluster, system: Interval) -> Interval:
    """The interval of a system, widened by the range that the efficiency of a matmul, the largest term, has.

    Of unlike devices, each may be the one that the others wait for: the widest range counts.
    """
    ranges = [system.widened(rate) for rate in {host.device.matmul_efficiency for host in cluster.hosts}]
    low, high = min(each.low for each in ranges), max(each.high for each in ranges)
    return msgspec.structs.replace(system, low=low, high=high)


def predict(plan: Plan) -> Prediction:
    """Simulate a plan again, from what the plan file holds."""
    cluster = plan.hardware
    timeline = simulate_stages(cluster, plan.schedule, plan.microbatches, plan.stages, plan.transfers, plan.tied)
    flops = plan.model_flops * plan.microbatches
    return Prediction(
        plan, timeline, judge(timeline, cluster, plan.batch, plan.tokens_per_sample, flops, plan.compute_dtype)
    )


def predict_file(path: str) -> Prediction:
    return predict(load_plan(path))
