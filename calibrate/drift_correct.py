"""A machine file corrected by the factors that a run told, and the plan of that run priced by it."""

from collections.abc import Callable
from math import exp

import msgspec

from meshwright.calibrate.device import Device, MatmulFit, ProgramFit
from meshwright.calibrate.drift import Group
from meshwright.calibrate.drift_fit import (
    BETWEEN_HOSTS,
    KERNELS,
    PHASE_OF,
    Factor,
    Fit,
    Number,
    Parts,
    collectives_number,
    link_host,
)
from meshwright.calibrate.hardware import Cluster, Host, Quantity
from meshwright.calibrate.link import CollectiveFit, Link
from meshwright.errors import ClusterError
from meshwright.plan.planfile import Plan, PlannedStage, Transfer, cluster_data

RANGE = 2.0  # standard errors each way, as the fits state it
RATES = {"matmul": ("matmul", "compute"), "memory": ("memory", "compute"), "launch": ("launch", "compute")}


def corrected_cluster(cluster: Cluster, fit: Fit, why: str) -> Cluster:
    """The cluster with every number changed that the fit changes; each says so in its source.

    Args:
        why: run and date, as in ``run 7, 2026-11-23``.

    Raises:
        ClusterError: a corrected number would be physically impossible.
    """
    hosts = tuple(_host(cluster, host, fit, why) for host in cluster.hosts)
    inter_host = _link(cluster.inter_host, BETWEEN_HOSTS, fit, why)
    try:
        return msgspec.structs.replace(cluster, hosts=hosts, inter_host=inter_host)
    except ClusterError as error:
        raise _impossible(error) from None


def _host(cluster: Cluster, host: Host, fit: Fit, why: str) -> Host:
    same_device = next(index for index, other in enumerate(cluster.hosts) if other.device == host.device)
    same_link = next(index for index, other in enumerate(cluster.hosts) if other.link == host.link)
    device = _device(host.device, same_device, fit, why)
    return msgspec.structs.replace(host, device=device, link=_link(host.link, same_link, fit, why))


def _impossible(error: ClusterError) -> ClusterError:
    return ClusterError(
        f"the run would make the machine impossible ({error}); check that nothing but this run decided its times "
        "(its clock, the data sheet's figure), or calibrate anew"
    )


def _times(quantity: Quantity, factor: Factor, why: str, *, rate: bool = False) -> Quantity:
    """A time multiplied by a factor, or a rate divided by it, with the run's own range."""
    log_value = -factor.log_value if rate else factor.log_value
    value, spread = quantity.value * exp(log_value), exp(RANGE * factor.log_error)
    source = f"corrected by {exp(log_value):.4g} from {why}; before: {quantity.value:.4g}, {quantity.source}"
    return Quantity(value, source, value / spread, value * spread)


def _device(device: Device, host: int, fit: Fit, why: str) -> Device:
    """One device; a factor above 1 is that of something slower than its file says."""

    def factor(*kinds: str) -> Factor | None:
        return next((fit.factors[n] for kind in kinds if (n := Number(kind, host)) in fit.factors), None)

    try:
        new = device
        if matmul := factor(*RATES["matmul"]):
            new = _slower_matmuls(new, matmul, why)
        if memory := factor(*RATES["memory"]):
            new = msgspec.structs.replace(
                new,
                memory_bytes_per_second=_times(new.memory_bytes_per_second, memory, why, rate=True),
                matmul=_each(new.matmul, lambda m: _less(m, "memory_bytes_per_second", memory)),
            )
        if launch := factor(*RATES["launch"]):
            new = msgspec.structs.replace(
                new,
                launch_seconds=_times(new.launch_seconds, launch, why),
                matmul=_each(
                    new.matmul, lambda m: msgspec.structs.replace(m, launch_seconds=m.launch_seconds * launch.value)
                ),
            )
        programs = dict(new.programs)
        if dispatch := factor("dispatch"):
            new = msgspec.structs.replace(new, dispatch_seconds=_times(new.dispatch_seconds, dispatch, why))
            for phase, program in programs.items():
                fixed = _times(program.fixed_seconds, dispatch, why)
                programs[phase] = msgspec.structs.replace(program, fixed_seconds=fixed)
        for phase in PHASE_OF.values():
            if slowdown := factor(phase):
                program = programs.get(phase, _plain(phase))
                programs[phase] = msgspec.structs.replace(program, slowdown=_times(program.slowdown, slowdown, why))
        return msgspec.structs.replace(new, programs=programs)
    except ClusterError as error:
        raise _impossible(error) from None


def _plain(phase: str) -> ProgramFit:
    """Programs of which nothing was measured: their kernels and nothing more."""
    nothing = f"{phase} programs were not measured"
    return ProgramFit(fixed_seconds=Quantity(0.0, nothing), slowdown=Quantity(1.0, nothing))


def _slower_matmuls(device: Device, factor: Factor, why: str) -> Device:
    """Matmuls and attention at another rate. Where that is above a peak that was measured, not read, the peak rises."""
    efficiency = device.matmul_efficiency.value / factor.value
    peaks = device.flops_per_second
    measured = all("measured" in peak.source for peak in peaks.values())
    raised = max(1.0, efficiency) if measured else 1.0
    if efficiency > 1.0 and not measured:
        raise ClusterError(
            f"matmuls would reach {efficiency:.0%} of the peak of {device.name!r}, which is a data sheet's figure"
        )
    if raised > 1.0:
        peaks = {
            dtype: Quantity(peak.value * raised, f"raised by {raised:.4g} from {why}; before: {peak.source}")
            for dtype, peak in peaks.items()
        }
    found = _times(device.matmul_efficiency, factor, why, rate=True)
    share = min(1.0, found.value / raised)
    low = share if found.low is None else min(share, found.low / raised)
    high = share if found.high is None else max(share, min(1.0, found.high / raised))

    def each_tile(fit: MatmulFit) -> MatmulFit:
        tiles = {tile: reached / factor.value / raised for tile, reached in fit.efficiency.items()}
        return msgspec.structs.replace(fit, efficiency=tiles, source=f"{fit.source}; tiles corrected from {why}")

    attention = device.attention
    if attention is not None:
        rate = attention.efficiency / factor.value / raised
        attention = msgspec.structs.replace(
            attention, efficiency=rate, source=f"{attention.source}; efficiency corrected from {why}"
        )
    return msgspec.structs.replace(
        device,
        flops_per_second=peaks,
        matmul_efficiency=Quantity(share, found.source, low, high),
        matmul=_each(device.matmul, each_tile),
        attention=attention,
    )


def _each(fits: dict[str, MatmulFit], change: Callable[[MatmulFit], MatmulFit]) -> dict[str, MatmulFit]:
    return {dtype: change(fit) for dtype, fit in fits.items()}


def _less(fit: MatmulFit, name: str, factor: Factor) -> MatmulFit:
    return msgspec.structs.replace(fit, **{name: getattr(fit, name) / factor.value})


def _link(link: Link, host: int, fit: Fit, why: str) -> Link:
    """One link: its plain transfers by bandwidth and latency, its collectives as a whole."""
    wire, latency, together = (fit.factors.get(Number(kind, host)) for kind in ("wire", "latency", "collectives"))
    try:
        new = link
        if wire:
            cap = link.host_bytes_per_second
            new = msgspec.structs.replace(
                new,
                bytes_per_second=_times(link.bytes_per_second, wire, why, rate=True),
                host_bytes_per_second=None if cap is None else _times(cap, wire, why, rate=True),
            )
        if latency:
            new = msgspec.structs.replace(new, latency_seconds=_times(link.latency_seconds, latency, why))
        if together:
            new = msgspec.structs.replace(
                new,
                collectives={
                    kind: tuple(_collective(each, together, why) for each in fits)
                    for kind, fits in link.collectives.items()
                },
            )
        return new
    except ClusterError as error:
        raise _impossible(error) from None


def _collective(fit: CollectiveFit, factor: Factor, why: str) -> CollectiveFit:
    return msgspec.structs.replace(
        fit,
        latency_seconds=_times(fit.latency_seconds, factor, why),
        bytes_per_second=_times(fit.bytes_per_second, factor, why, rate=True),
        pieces=tuple(
            msgspec.structs.replace(
                piece,
                latency_seconds=_times(piece.latency_seconds, factor, why),
                bytes_per_second=_times(piece.bytes_per_second, factor, why, rate=True),
            )
            for piece in fit.pieces
        ),
    )


def corrected_plan(plan: Plan, parts: Parts, fit: Fit, cluster: Cluster) -> Plan:
    """The same plan, cut and sharded as it is, with what its parts cost on the corrected cluster."""
    stages = tuple(_stage(plan, index, parts, fit) for index in range(len(plan.stages)))
    transfers = tuple(_transfer(plan, transfer, fit) for transfer in plan.transfers)
    return msgspec.structs.replace(plan, cluster=cluster_data(cluster), stages=stages, transfers=transfers)


def _stage(plan: Plan, index: int, parts: Parts, fit: Fit) -> PlannedStage:
    stage = plan.stages[index]
    sums = collectives_number(plan.hardware, stage.devices)
    together = exp(fit.log_of(sums))

    def kernels_and_fixed(what: str) -> float:
        found = parts[Group(index, what)]
        return sum(
            seconds * exp(fit.log_of(number) + _slowdown(fit, number, what))
            for number, seconds in found.items()
            if number != sums
        )

    host = next((n.host for n in parts[Group(index, "forward")] if n.kind == "dispatch"), 0)
    dispatch_seconds = stage.dispatch_seconds * exp(fit.log_of(Number("dispatch", host)))
    return msgspec.structs.replace(
        stage,
        dispatch_seconds=dispatch_seconds,
        forward_compute_seconds=max(0.0, kernels_and_fixed("forward") - dispatch_seconds),
        forward_communication_seconds=stage.forward_communication_seconds * together,
        backward_compute_seconds=max(0.0, kernels_and_fixed("backward") - dispatch_seconds),
        backward_communication_seconds=stage.backward_communication_seconds * together,
        reduce_seconds=stage.reduce_seconds * together,
        update_seconds=max(0.0, kernels_and_fixed("update") - dispatch_seconds),
    )


def _slowdown(fit: Fit, number: Number, what: str) -> float:
    return fit.log_of(Number(PHASE_OF[what], number.host)) if number.kind in KERNELS else 0.0


def _transfer(plan: Plan, transfer: Transfer, fit: Fit) -> Transfer:
    devices = (*plan.stages[transfer.source].devices, *plan.stages[transfer.target].devices)
    link = link_host(plan.hardware, devices)
    return msgspec.structs.replace(
        transfer,
        wire_seconds=transfer.wire_seconds * exp(fit.log_of(Number("wire", link))),
        latency_seconds=transfer.latency_seconds * exp(fit.log_of(Number("latency", link))),
    )
