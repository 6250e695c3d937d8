"""From timings to a cluster: fit each family, keep the residuals, state the source of every number."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from meshwright.calibrate.fit import FittedFamily, RateFit, fit_timings
from meshwright.calibrate.hardware import Cluster, Device, Host, Quantity, parse_cluster
from meshwright.calibrate.link_fit import (
    busy_slowdown_of,
    busy_slowdowns_of,
    interference_of,
    link_of,
    notes_of,
)
from meshwright.calibrate.timing import DISPATCH, LAUNCH, MATMUL, MEMORY, ComputeTimings, NetworkTimings, Timing
from meshwright.errors import ClusterError


@dataclass(frozen=True, slots=True)
class Calibration:
    """A measured cluster with the fits that made it."""

    cluster: Cluster
    fits: tuple[FittedFamily, ...]


def assemble(compute: ComputeTimings, network: NetworkTimings | None, measured: str) -> Calibration:
    """The cluster that one machine's timings mean: one host; on a CPU, its devices are the ranks that were measured.

    Args:
        network: None where no link was measured; the link is then the shipped ``cpu`` machine's, and a note says so.
        measured: how and when, for the source of each number (``measured 2026-11-30, jax 0.10.2``).

    Raises:
        ClusterError: a family of timings that a device needs is missing.
    """
    matmuls = {
        family.removeprefix(MATMUL): fit_timings(_of(compute.timings, family), f"{measured}, fit of {family}")
        for family in sorted({timing.family for timing in compute.timings})
        if family.startswith(MATMUL)
    }
    if "f32" not in matmuls:
        raise ClusterError("no f32 matmul was measured; give calibrate a larger --budget")
    memory = fit_timings(_of(compute.timings, MEMORY), f"{measured}, fit of additions and row sums")
    ranks = network.ranks if network else 1
    on_cpu = compute.platform == "cpu"
    devices = ranks if on_cpu else compute.devices
    host_memory = Quantity(float(compute.memory_bytes), f"{measured}, as the machine reports")
    device = _device(compute, matmuls, memory, host_memory.scaled(1 / devices if on_cpu else 1.0), measured)
    notes = [f"measured with {compute.settings or 'no settings'}; jax {compute.jax_version}; {compute.cores} cores"]
    rows = [FittedFamily(f"{MATMUL}{dtype}", 1, fit, "FLOP/s") for dtype, fit in matmuls.items()]
    rows.append(FittedFamily("memory-bound", 1, memory, "B/s"))
    shipped = parse_cluster("cpu")
    link = shipped.hosts[0].link
    if network is None:
        notes.append("links were not measured: those of the shipped machine 'cpu' stand in")
    else:
        link, link_rows = link_of(network, measured)
        rows += link_rows
        notes += notes_of(network)
        device = msgspec.structs.replace(device, interference=interference_of(network, measured))
    host = Host(
        device=device,
        devices=devices,
        cores=compute.cores,
        link=link,
        share_cores=on_cpu,
        busy_slowdown=busy_slowdown_of(network, measured) if network and on_cpu else None,
        busy_slowdowns=busy_slowdowns_of(network, measured) if network and on_cpu else (),
    )
    name = "calibrated " + ("cpu" if on_cpu else compute.device_kind)
    cluster = Cluster(name=name, hosts=(host,), inter_host=shipped.inter_host, notes=tuple(notes))
    return Calibration(cluster, tuple(rows))


def _device(
    compute: ComputeTimings, matmuls: dict[str, RateFit], memory: RateFit, memory_bytes: Quantity, measured: str
) -> Device:
    """Peaks are the best rate seen with f32; efficiency times peak gives back the fitted rate of every dtype."""
    rate = matmuls["f32"].amount_per_second
    best = max(timing.amount / timing.seconds for timing in _of(compute.timings, f"{MATMUL}f32"))
    peak = max(best, rate.value)
    efficiency = Quantity(
        rate.value / peak,
        f"{rate.source}; over the best rate of any size",
        min(1.0, (rate.low or rate.value) / peak),
        max(rate.value / peak, min(1.0, (rate.high or rate.value) / peak)),
    )
    flops = {"f32": Quantity(peak, f"{measured}, best rate of any f32 matmul")}
    for dtype, fit in matmuls.items():
        if dtype != "f32":
            scaled = fit.amount_per_second.scaled(1 / efficiency.value)
            flops[dtype] = Quantity(scaled.value, f"{scaled.source}; over matmul_efficiency", scaled.low, scaled.high)
    on_cpu = compute.platform == "cpu"
    return Device(
        name=f"core of {_cpu_name()}" if on_cpu else compute.device_kind,
        memory_bytes=memory_bytes,
        flops_per_second=flops,
        matmul_efficiency=efficiency,
        memory_bytes_per_second=memory.amount_per_second,
        launch_seconds=_one(compute.timings, LAUNCH, f"{measured}, one more operation in a program"),
        dispatch_seconds=_one(compute.timings, DISPATCH, f"{measured}, calls of a tiny compiled program in a row"),
    )


def _of(timings: Sequence[Timing], family: str) -> list[Timing]:
    return [timing for timing in timings if timing.family == family]


def _one(timings: Sequence[Timing], family: str, source: str) -> Quantity:
    (timing,) = _of(timings, family)
    return Quantity(timing.seconds, source, timing.low_seconds, timing.high_seconds)


def _cpu_name() -> str:
    """The processor's name as Linux tells it, else the machine's kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else os.uname().machine
