"""From timings to a cluster: fit each family, keep the residuals, state the source of every number."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from meshwright.calibrate.device_fit import MatmulChoice, fit_attention, fit_matmuls
from meshwright.calibrate.fit import FittedFamily, RateFit, fit_timings
from meshwright.calibrate.hardware import AttentionFit, Cluster, Device, Host, Link, Quantity, parse_cluster
from meshwright.calibrate.link_fit import (
    busy_slowdown_of,
    busy_slowdowns_of,
    interference_of,
    link_of,
    notes_of,
)
from meshwright.calibrate.timing import (
    ARGUMENT,
    ATTENTION,
    CONVOLUTION,
    COPY,
    DISPATCH,
    LAUNCH,
    MATMUL,
    MEMORY,
    ComputeTimings,
    NetworkTimings,
    Timing,
)
from meshwright.errors import ClusterError
from meshwright.simulate.compute import dtype_bytes

STREAMS = tuple(f"{MEMORY}{kind}" for kind in ("add", "sum", "chain", "adam"))  # what memory's speed is fitted to


@dataclass(frozen=True, slots=True)
class Calibration:
    """A measured cluster with the fits that made it, and what was fitted."""

    cluster: Cluster
    fits: tuple[FittedFamily, ...]
    compute: ComputeTimings
    network: NetworkTimings | None
    matmuls: dict[str, MatmulChoice]  # the form that won for each dtype


def assemble(compute: ComputeTimings, network: NetworkTimings | None, measured: str) -> Calibration:
    """The cluster that one machine's timings mean: one host; on a CPU, its devices are the ranks that were measured.

    Args:
        network: None where no link was measured; the link is then the shipped ``cpu`` machine's, and a note says so.
        measured: how and when, for the source of each number (``measured 2026-11-30, jax 0.10.2``).

    Raises:
        ClusterError: a family of timings that a device needs is missing.
    """
    matmuls = {
        family.removeprefix(MATMUL): fit_timings(timings, f"{measured}, fit of {family}")
        for family, timings in _families(compute.timings).items()
        if family.startswith(MATMUL) and _sizes(timings) > 1
    }
    if "f32" not in matmuls:
        raise ClusterError("no f32 matmul was measured; give calibrate a larger --budget")
    streams = [timing for timing in compute.timings if timing.family in STREAMS]
    if _sizes(streams) < 2:
        raise ClusterError("too little of the memory's speed was measured; give calibrate a larger --budget")
    memory = fit_timings(streams, f"{measured}, fit of additions, row sums, fused chains and Adam's update")
    ranks = network.ranks if network else 1
    on_cpu = compute.platform == "cpu"
    devices = ranks if on_cpu else compute.devices
    host_memory = Quantity(float(compute.memory_bytes), f"{measured}, as the machine reports")
    device, chosen = _device(compute, matmuls, memory, host_memory.scaled(1 / devices if on_cpu else 1.0), measured)
    notes = [f"measured with {compute.settings or 'no settings'}; jax {compute.jax_version}; {compute.cores} cores"]
    notes += [*compute.skipped, *_host_notes(compute.timings)]
    rows = [FittedFamily(f"{MATMUL}{dtype}", 1, fit, "FLOP/s") for dtype, fit in matmuls.items()]
    rows.append(FittedFamily("memory-bound", 1, memory, "B/s"))
    others = {
        family: fit_timings(timings, f"{measured}, fit of {family}")
        for family, timings in _families(compute.timings).items()
        if family.startswith((MEMORY, ATTENTION, CONVOLUTION, COPY)) and _sizes(timings) > 1
    }
    rows += [
        FittedFamily(family.strip(), 1, fit, "FLOP/s" if family.startswith((ATTENTION, CONVOLUTION)) else "B/s")
        for family, fit in others.items()
    ]
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
        pcie=None if on_cpu else _pcie(compute.timings, measured),
    )
    name = "calibrated " + ("cpu" if on_cpu else compute.device_kind)
    cluster = Cluster(name=name, hosts=(host,), inter_host=shipped.inter_host, notes=tuple(notes))
    return Calibration(cluster, tuple(rows), compute, network, chosen)


def _device(
    compute: ComputeTimings, matmuls: dict[str, RateFit], memory: RateFit, memory_bytes: Quantity, measured: str
) -> tuple[Device, dict[str, MatmulChoice]]:
    """``matmul_efficiency`` times the peak is the fitted rate of every dtype; no peak is below a rate seen.

    So the efficiency is the least ratio, of any dtype, of the fitted rate to the best one.
    """
    best = {
        dtype: max(timing.amount / timing.seconds for timing in _of(compute.timings, MATMUL + dtype))
        for dtype in matmuls
    }
    rates = {dtype: fit.amount_per_second for dtype, fit in matmuls.items()}
    ratios = {dtype: min(1.0, rate.value / best[dtype]) for dtype, rate in rates.items()}
    worst = min(ratios, key=ratios.__getitem__)
    low, high = rates[worst].low or rates[worst].value, rates[worst].high or rates[worst].value
    efficiency = Quantity(
        ratios[worst],
        f"{rates[worst].source}; over the best rate of any {worst} matmul",
        min(ratios[worst], low / best[worst]),
        max(ratios[worst], min(1.0, high / best[worst])),
    )
    flops = {}
    for dtype, rate in rates.items():
        peak = rate.scaled(1 / efficiency.value)
        flops[dtype] = Quantity(peak.value, f"{peak.source}; over matmul_efficiency", peak.low, peak.high)
    on_cpu = compute.platform == "cpu"
    chosen = {
        dtype: fit_matmuls(
            _of(compute.timings, MATMUL + dtype),
            flops[dtype].value,
            dtype_bytes(dtype),
            compute.compute_units,
            f"{measured}, {MATMUL}{dtype}",
        )
        for dtype in matmuls
    }
    device = Device(
        name=f"core of {_cpu_name()}" if on_cpu else compute.device_kind,
        memory_bytes=memory_bytes,
        flops_per_second=flops,
        matmul_efficiency=efficiency,
        memory_bytes_per_second=memory.amount_per_second,
        launch_seconds=_one(compute.timings, LAUNCH, f"{measured}, one more operation in a program"),
        dispatch_seconds=_one(compute.timings, DISPATCH, f"{measured}, calls of a tiny compiled program in a row"),
        matmul={dtype: choice.fit for dtype, choice in chosen.items() if choice.fit is not None},
        attention=_attention(compute, flops, measured),
        pace_seconds=_pace(compute, measured),
    )
    return device, chosen


def _pace(compute: ComputeTimings, measured: str) -> Quantity | None:
    """The mean of the fixed matmul, with the 10 % and 90 % quantiles of how the pace went; None where none ran."""
    if not compute.paces_seconds:
        return None
    mean = float(np.mean(compute.paces_seconds))
    low, high = (float(quantile) for quantile in np.quantile(compute.paces_seconds, [0.1, 0.9]))
    source = f"{measured}, a matmul of 256 cubed in f32 before and after {len(compute.paces_seconds)} timings"
    return Quantity(mean, source, min(low, mean), max(high, mean))


def _attention(compute: ComputeTimings, flops: dict[str, Quantity], measured: str) -> AttentionFit | None:
    """cuDNN's where it was measured, else XLA's; None where there is too little of either."""
    families = _families(compute.timings)
    for implementation in ("cudnn", "xla"):
        for dtype in ("bf16", "f32"):
            family = f"{ATTENTION}{implementation} {dtype}"
            if family in families and dtype in flops:
                backward = families.get(f"{ATTENTION}{implementation} backward {dtype}", [])
                source = f"{measured}, {implementation}'s causal attention in {dtype}"
                found = fit_attention(families[family], backward, flops[dtype].value, source)
                if found is not None:
                    return found[0]
    return None


def _pcie(timings: Sequence[Timing], measured: str) -> Link | None:
    """The way between one device and the host's memory: the slower direction; None where none was measured."""
    fits = [
        fit_timings(found, f"{measured}, {family}")
        for family, found in _families(timings).items()
        if family.startswith(COPY) and _sizes(found) > 1
    ]
    if not fits:
        return None
    slow = min(fits, key=lambda fit: fit.amount_per_second.value)
    return Link(bytes_per_second=slow.amount_per_second, latency_seconds=slow.fixed_seconds)


def _host_notes(timings: Sequence[Timing]) -> list[str]:
    """What no field of a device holds."""
    return [
        f"one more argument of a call: {timing.seconds * 1e6:.2f} µs "
        f"({timing.low_seconds * 1e6:.2f} to {timing.high_seconds * 1e6:.2f})"
        for timing in _of(timings, ARGUMENT)
    ]


def _families(timings: Sequence[Timing]) -> dict[str, list[Timing]]:
    found: dict[str, list[Timing]] = {}
    for timing in timings:
        found.setdefault(timing.family, []).append(timing)
    return dict(sorted(found.items()))


def _sizes(timings: Sequence[Timing]) -> int:
    return len({timing.amount for timing in timings})


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
