"""A plan → the simulator's answer."""

import os
from dataclasses import dataclass
from typing import Any

import msgspec

from meshwright.calibrate.hardware import Cluster
from meshwright.plan.planfile import Plan, PlannedStage, Predicted, Transfer, load_plan, public_json
from meshwright.simulate.build import build_program
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
    schedule: str, microbatches: int, stages: int, transfers: tuple[Transfer, ...], tied: tuple[tuple[int, int], ...]
) -> Program:
    return build_program(schedule, stages, microbatches, _edges(transfers), tied)


def _edges(transfers: tuple[Transfer, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted({(t.source, t.target) for t in transfers if t.what == "activation"}))


def simulate_stages(
    cluster: Cluster,
    schedule: str,
    microbatches: int,
    stages: tuple[PlannedStage, ...],
    transfers: tuple[Transfer, ...],
    tied: tuple[tuple[int, int], ...] = (),
) -> Timeline:
    """Run the event engine on planned stages; transfers between them meet on the links of the cluster."""
    program = compiled_schedule(schedule, len(stages), microbatches, _edges(transfers), tied)
    return simulate(program, costs_of(cluster, stages, transfers))


def costs_of(cluster: Cluster, stages: tuple[PlannedStage, ...], transfers: tuple[Transfer, ...]) -> PipelineCosts:
    """What planned stages and the transfers between them cost, as the simulator wants it."""
    net = network(cluster)
    return PipelineCosts(
        stages=tuple(_stage_costs(stage, cluster) for stage in stages),
        transfers={(t.source, t.target, t.what): _over_links(t, stages, net) for t in transfers},
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
    return StageCosts(
        devices=stage.devices,
        forward_seconds=stage.forward_seconds - (1 - 1 / together) * stage.forward_communication_seconds,
        backward_seconds=stage.backward_seconds - (1 - 1 / together) * stage.backward_communication_seconds,
        reduce_seconds=stage.reduce_seconds / together,
        update_seconds=stage.update_seconds + stage.dispatch_seconds,
        static_bytes=stage.static_bytes,
        saved_bytes=stage.saved_bytes,
        transient_bytes=stage.transient_bytes,
    )


def sample_plan(plan: Plan, variability: Variability, *, samples: int, seed: int = 0) -> StepSamples:
    """Times of many steps of a plan, each with chances of its own."""
    program = compiled_schedule(plan.schedule, len(plan.stages), plan.microbatches, _edges(plan.transfers), plan.tied)
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
    timeline: Timeline, cluster: Cluster, samples: int, tokens: int, model_flops: float, dtype: str = "f32"
) -> Predicted:
    """The numbers people ask for. ``model_flops`` counts the whole iteration."""
    seconds = timeline.makespan_seconds
    devices = cluster.devices
    peak = max(timeline.peak_bytes)
    rate = model_flops / seconds / devices
    low, high = _relative_error(cluster)
    return Predicted(
        iteration_seconds=seconds,
        iteration_seconds_low=seconds * low,
        iteration_seconds_high=seconds * high,
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


def _relative_error(cluster: Cluster) -> tuple[float, float]:
    """The range that the efficiency of a matmul, the largest single term, leaves to the step time."""
    quantity = cluster.device(0).matmul_efficiency
    fast = quantity.high if quantity.high is not None else quantity.value
    slow = quantity.low if quantity.low is not None else quantity.value
    return quantity.value / fast, quantity.value / slow


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
