"""Runs on machines whose numbers are known: the simulator plays them, and a drift must find what is wrong."""

from collections.abc import Callable
from functools import cache

import msgspec
import numpy as np

from meshwright.calibrate.drift import Group, cost_of, with_costs
from meshwright.calibrate.hardware import Cluster, Device, Host, Link, Quantity
from meshwright.execute.record import FORMAT, VERSION, DeviceRow, Run, Summary, device_events, digest
from meshwright.models.zoo import get_model
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan
from meshwright.plan.predict import costs_of, program_of
from meshwright.plan.search import Fix, Request, search
from meshwright.plan.trace.model import trace
from meshwright.simulate.costs import PipelineCosts
from meshwright.simulate.pipeline import simulate

MODEL = "gpt:layers=4,hidden=64,heads=4,seq=32,vocab=256"
BATCH = 16
TWO_STAGES = Fix(data=1, tensor=1, pipeline=2, microbatches=4, schedule="1f1b", remat="none")
FOUR_STAGES = Fix(data=1, tensor=1, pipeline=4, microbatches=8, schedule="1f1b", remat="none")
TENSOR = Fix(data=1, tensor=2, pipeline=2, microbatches=4, schedule="1f1b", remat="none")
LONE_STAGE = Fix(data=1, tensor=2, pipeline=1, microbatches=4, schedule="1f1b", remat="none")
SEVERAL = 9  # steps
WORKS = ("forward", "backward", "reduce", "update")


@cache
def graph_of(microbatches: int) -> ModelGraph:
    return trace(get_model(MODEL), BATCH, microbatches).graph


def planned(cluster: Cluster, fix: Fix) -> Plan:
    return search(graph_of, Request(cluster, BATCH, fix))


def number(value: float, spread: float = 0.1) -> Quantity:
    return Quantity(value, "made for a test", value * (1 - spread), value * (1 + spread))


def machine(devices: int = 2) -> Cluster:
    """One host of separate devices, slow enough that nothing of this model is too small to see."""
    device = Device(
        name="test device",
        memory_bytes=number(1e9),
        flops_per_second={"f32": Quantity(1e10, "data sheet")},
        matmul_efficiency=number(0.5),
        memory_bytes_per_second=number(1e9),
        launch_seconds=number(1e-6),
        dispatch_seconds=number(20e-6),
    )
    link = Link(bytes_per_second=number(2e7), latency_seconds=number(10e-6))
    return Cluster(
        name="test machine",
        hosts=(Host(device=device, devices=devices, cores=devices, link=link),),
        inter_host=link,
    )


def with_device(cluster: Cluster, change: Callable[[Device], Device]) -> Cluster:
    hosts = tuple(msgspec.structs.replace(host, device=change(host.device)) for host in cluster.hosts)
    return msgspec.structs.replace(cluster, hosts=hosts)


def with_link(cluster: Cluster, change: Callable[[Link], Link]) -> Cluster:
    hosts = tuple(msgspec.structs.replace(host, link=change(host.link)) for host in cluster.hosts)
    return msgspec.structs.replace(cluster, hosts=hosts, inter_host=change(cluster.inter_host))


def slower_device(cluster: Cluster, factor: float) -> Cluster:
    """All rates of the devices, and what a kernel's launch takes."""
    return with_device(
        cluster,
        lambda d: msgspec.structs.replace(
            d,
            matmul_efficiency=d.matmul_efficiency.scaled(1 / factor),
            memory_bytes_per_second=d.memory_bytes_per_second.scaled(1 / factor),
            launch_seconds=d.launch_seconds.scaled(factor),
        ),
    )


def slower_matmuls(cluster: Cluster, factor: float) -> Cluster:
    return with_device(
        cluster, lambda d: msgspec.structs.replace(d, matmul_efficiency=d.matmul_efficiency.scaled(1 / factor))
    )


def slower_memory(cluster: Cluster, factor: float) -> Cluster:
    return with_device(
        cluster,
        lambda d: msgspec.structs.replace(d, memory_bytes_per_second=d.memory_bytes_per_second.scaled(1 / factor)),
    )


def slower_dispatch(cluster: Cluster, factor: float) -> Cluster:
    return with_device(
        cluster, lambda d: msgspec.structs.replace(d, dispatch_seconds=d.dispatch_seconds.scaled(factor))
    )


def slower_link(cluster: Cluster, factor: float) -> Cluster:
    return with_link(
        cluster, lambda link: msgspec.structs.replace(link, bytes_per_second=link.bytes_per_second.scaled(1 / factor))
    )


def run_on(truth: Plan, plan: Plan, noise: float = 0.0, seed: int = 0, steps: int = SEVERAL) -> Run:
    """The run of ``plan`` as it would be if things cost what ``truth``, the same plan on the true machine, says.

    ``noise`` is the standard deviation of the logarithm of each stage's and each transfer's costs from step to step.
    """
    assert [stage.layers for stage in truth.stages] == [stage.layers for stage in plan.stages]
    rng = np.random.default_rng(seed)
    program = program_of(plan.schedule, plan.microbatches, len(plan.stages), plan.transfers, plan.tied)
    costs = costs_of(truth.hardware, truth.stages, truth.transfers)
    seconds, measured = [], []
    for _ in range(steps):
        seconds.append(simulate(program, jittered(costs, rng, noise)).makespan_seconds)
        timeline = simulate(program, jittered(costs, rng, noise))
        rows = []
        for stage in plan.stages:
            rows += [each for device in stage.devices for each in device_events(timeline, device)]
        measured.append(tuple(row for row in rows if row.device in plan.stages[row.mesh].devices))
    shares = plan.hardware.hosts[0].share_cores
    devices = tuple(
        DeviceRow(device, f"host {plan.hardware.host_of(device)}", "cpu" if shares else "gpu", "test device")
        for stage in plan.stages
        for device in stage.devices
    )
    summary = Summary(
        format=FORMAT,
        version=VERSION,
        plan_digest=digest(plan),
        date="2026-11-23",
        step_seconds=tuple(seconds),
        losses=(1.0,),
        predicted_step_seconds=plan.predicted.iteration_seconds,
        peak_memory_bytes=1.0,
        devices=devices,
        versions={},
    )
    return Run(plan, tuple(measured), summary)


def jittered(costs: PipelineCosts, rng: np.random.Generator, noise: float) -> PipelineCosts:
    works = [Group(index, what) for index in range(len(costs.stages)) for what in WORKS]
    groups = [*works, *(Group(source, what, target) for source, target, what in costs.transfers)]
    return with_costs(costs, {g: cost_of(costs, g) * float(np.exp(noise * rng.standard_normal())) for g in groups})
