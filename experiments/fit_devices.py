"""Fit devices to measured kernels: prints held-out errors and, with ``--write``, updates machine files.

    python -m experiments.fit_devices --data ../shared/data [--write] [--report DIR]

Matmuls and fused attention of A100, H100 and H200 are aiconfigurator's (Apache-2.0, bf16, launched from CUDA graphs).
Those of A10G, L4 and V100-32GB, with their streams of memory, are Mist's and Aceso's (Apache-2.0, MIT; f16 operators of
GPT layers, launched one by one). RTX cards have whole layers in float32 (Sailor, MIT). Streams side by side are Mist's,
on V100, A10G and L4; nothing of the kind is known here for A100 and H100: they have no interference.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from experiments.device_tables import (
    read_attention,
    read_layers,
    read_matmuls,
    read_overlap,
    read_profile,
    read_streams,
)
from experiments.fit_report import Picture, Series, write_report
from meshwright.calibrate.device import Device
from meshwright.calibrate.fit import RateFit, fit_rate, residual_of
from meshwright.calibrate.hardware import MACHINES, load_cluster, save_cluster
from meshwright.calibrate.kernels import (
    Error,
    attention_seconds,
    fit_attention,
    fit_interference,
    fit_matmul,
    halves,
    relative_error,
    side_by_side,
)
from meshwright.calibrate.quantity import Quantity
from meshwright.simulate.compute import tiled_seconds

AICONFIGURATOR = "own fit of aiconfigurator's table (Apache-2.0)"
FA2_BACKWARD = 63 / 73  # of the forward's rate, as Dao, FlashAttention-2, 2023, states both at their best on A100
BACKWARD_SOURCE = "backward at 63/73 of the forward's rate (Dao, FlashAttention-2, 2023, abstract; A100)"
A100_80 = ("dgx-a100", "dgx-a100-25gbe", "p4de.24xlarge", "selene")
A100_40 = ("dgx-a100-40gb", "p4d.24xlarge")
H100 = ("dgx-h100", "dgx-h100-100gbe", "h100", "p5.48xlarge")


class Table(NamedTuple):
    """A device of aiconfigurator's tables, the machines that have its die, and its multiprocessors (data sheet)."""

    name: str
    machines: tuple[str, ...]
    compute_units: int


class Operators(NamedTuple):
    """A device of Mist's or Aceso's profiles of GPT layers, and its runs of several streams at once."""

    folder: str
    machine: str
    source: str
    overlap: str


TABLES = (
    Table("a100", A100_80 + A100_40, 108),
    Table("h100", (*H100, "gh200", "gh200-ndr"), 132),
    Table("h200", ("dgx-h200",), 132),
)
OPERATORS = (
    Operators("mist/profile_a10g", "g5.48xlarge", "A10G (Mist, Apache-2.0)", "a10g"),
    Operators("mist/profile_l4", "g6.48xlarge", "L4 (Mist, Apache-2.0)", "l4"),
    Operators("aceso/v100", "v100-32gb", "V100-32GB (Aceso's profile, MIT)", "v100-sxm2-32gb"),
)
LAYERS = {"RTX-2080": "rtx-2080ti", "Titan-RTX": "titan-rtx", "RTX-3090": "rtx-3090"}
WORST_MEAN_ERROR = 0.25  # at points held out: a fit that is further off says too little to be shipped
STREAMS = ("gelu", "layernorm", "softmax")


class Results:
    """What the fits have found: a row of errors and a picture for each, and what machine files take from them."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Error]] = []
        self.pictures: list[Picture] = []
        self.changes: dict[str, dict[str, Any]] = defaultdict(dict)

    def add(self, title: str, measured: np.ndarray, model: np.ndarray, x: tuple[str, np.ndarray] | None = None) -> None:
        """A fit's errors and its picture, over ``x`` (its name and values) or as model over measured."""
        self.rows.append((title, relative_error(model, measured)))
        name, values = x or ("measured ms", None)
        self.pictures.append(Picture(title, name, (Series("points judged", values, measured, model),)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, print and, where asked, write."""
    parser = argparse.ArgumentParser(description="Fit devices to measured kernels.")
    parser.add_argument("--data", type=Path, required=True, help="the folder of measured tables")
    parser.add_argument("--write", action="store_true", help="update calibrate/machines/*.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--report", type=Path, help="write a page with a picture per fit into this folder")
    args = parser.parse_args(arguments)
    results = Results()
    for table in TABLES:
        fit_table(args.data, table, results)
    fit_streams(args.data, results)
    for operators in OPERATORS:
        fit_operators(args.data, operators, results)
    for system, machine in LAYERS.items():
        fit_layers(args.data, system, machine, results)
    if args.write:
        for machine, fields in results.changes.items():
            write(machine, fields)
    if args.report:
        command = "python -m experiments.fit_devices --data ../shared/data --report DIR"
        write_report(args.report, "Fits of devices", command, results.pictures)
    if args.json:
        print(json.dumps([{"fit": name} | {f: getattr(e, f) for f in Error.__slots__} for name, e in results.rows]))
        return
    print(f"{'errors':56} {'mean':>7} {'median':>7} {'p90':>7} {'bias':>7} {'points':>7}")
    for name, e in results.rows:
        print(f"{name:56} {e.mean:7.1%} {e.median:7.1%} {e.p90:7.1%} {e.bias:+7.1%} {e.points:7}")


def fit_table(data: Path, table: Table, results: Results) -> None:
    """Matmuls and fused attention of a device of aiconfigurator's tables."""
    device = load_cluster(MACHINES / f"{table.machines[0]}.json").device(0)
    peak = device.peak_flops("bf16")
    matmuls = read_matmuls(data, table.name)
    matmul, _ = fit_matmul(matmuls, table.compute_units, peak, f"{AICONFIGURATOR}, {device.name}, bf16")
    held = matmuls.at(matmuls.training & ~halves(matmuls.n, matmuls.k))
    model = tiled_seconds(matmul, held.m, held.n, held.k, np.ones(len(held.m)), peak, 2)
    results.add(f"{device.name}: bf16 matmul, training shapes held out", held.seconds, model)
    forwards, memory = read_attention(data, table.name), device.memory_bytes_per_second.value
    source = f"{AICONFIGURATOR}, {device.name}, causal forwards of head size 128; {BACKWARD_SOURCE}"
    attention, passes, _ = fit_attention(forwards, peak, memory, source, round(FA2_BACKWARD, 4))
    other = forwards.at(np.arange(len(forwards.keys)) % 2 == 1)
    model = attention_seconds(attention, other, peak, memory, passes)
    results.add(f"{device.name}: fused attention forward, held out", other.seconds, model)
    for machine in table.machines:
        results.changes[machine] |= {"matmul": {"bf16": matmul}, "attention": attention}


def fit_streams(data: Path, results: Results) -> None:
    """Memory-bound operators on A100, timed by the host: shown, since half of the times are its dispatch."""
    for op in STREAMS:
        moved, seconds = read_streams(data, op)
        fit = fit_rate(moved, seconds, "own fit")
        results.add(f"A100-SXM4-80GB: {op}, host-timed", seconds, _line(fit, moved), ("bytes", moved))


def fit_operators(data: Path, operators: Operators, results: Results) -> None:
    """Matmul efficiency, memory bandwidth and interference of a device that GPT layers were profiled on."""
    device = load_cluster(MACHINES / f"{operators.machine}.json").device(0)
    profile, peak = read_profile(data, operators.folder), device.peak_flops("f16")
    matmuls = profile.matmuls
    flops = 2 * matmuls.m * matmuls.n * matmuls.k
    rate = fit_rate(flops, matmuls.seconds, f"own fit of f16 matmuls of GPT layers on {operators.source}")
    results.add(f"{device.name}: f16 matmuls of GPT layers", matmuls.seconds, _line(rate, flops), ("FLOPs", flops))
    moved = fit_rate(
        profile.stream_bytes,
        profile.stream_seconds,
        f"own fit of layer norm, GELU and softmax of GPT layers on {operators.source}",
    )
    model = _line(moved, profile.stream_bytes)
    results.add(f"{device.name}: memory-bound", profile.stream_seconds, model, ("bytes", profile.stream_bytes))
    source = f"own fit of Mist's runs on {device.name} (Apache-2.0)"
    alone, together = read_overlap(data, operators.overlap)
    interference, error = fit_interference(alone, together, source)
    other = np.arange(len(together)) % 2 == 1
    model = side_by_side(np.array(interference.rates), alone[other])
    results.add(f"{device.name}: streams side by side, held out", together[other], model)
    efficiency = _rounded(rate.amount_per_second.scaled(1 / peak))
    over = f"{efficiency.source}; over the data-sheet peak of {peak / 1e12:g} TFLOP/s"
    results.changes[operators.machine] |= {
        "matmul_efficiency": Quantity(efficiency.value, over, efficiency.low, min(1.0, efficiency.high or 1.0)),
        "memory_bytes_per_second": _rounded(moved.amount_per_second),
    }
    if error.mean < WORST_MEAN_ERROR:
        results.changes[operators.machine] |= {"interference": interference}
    if operators.machine == "v100-32gb":  # the die of p3.16xlarge's, which was not measured so
        results.changes["p3.16xlarge"] |= {"interference": interference}


def fit_layers(data: Path, system: str, machine: str, results: Results) -> None:
    """The share of the float32 peak that the matmuls of a layer reach, when its memory traffic is taken off."""
    device = load_cluster(MACHINES / f"{machine}.json").device(0)
    layers, peak = read_layers(data, system), device.peak_flops("f32")
    moved_seconds = layers.bytes / device.memory_bytes_per_second.value
    shares = layers.flops / (layers.seconds - moved_seconds) / peak
    share = float(np.median(shares))
    model = layers.flops / (share * peak) + moved_seconds
    results.add(f"{device.name}: f32 layers of OPT-350M", layers.seconds, model, ("FLOPs", layers.flops))
    text = (
        f"own fit of whole f32 layers of OPT-350M less their memory traffic on {device.name} (Sailor, MIT); "
        f"{residual_of(model, layers.seconds)}; over the data-sheet peak of {peak / 1e12:g} TFLOP/s"
    )
    low, high = (float(f"{end:.4g}") for end in (shares.min(), min(1.0, shares.max())))
    value = float(f"{share:.4g}")
    results.changes[machine] |= {"matmul_efficiency": Quantity(value, text, min(low, value), max(high, value))}


def _line(fit: RateFit, amounts: np.ndarray) -> np.ndarray:
    return np.asarray(fit.fixed_seconds.value + amounts / fit.amount_per_second.value)


def _rounded(quantity: Quantity) -> Quantity:
    """To four digits."""
    value, low, high = (
        None if number is None else float(f"{number:.4g}") for number in (quantity.value, quantity.low, quantity.high)
    )
    return Quantity(value or 0.0, quantity.source, low, high)


def write(machine: str, fields: dict[str, Any]) -> None:
    """Put fitted fields into every device of a machine file."""
    path = MACHINES / f"{machine}.json"
    cluster = load_cluster(path)
    hosts = []
    for host in cluster.hosts:
        device: Device = msgspec.structs.replace(host.device, **fields)
        hosts.append(msgspec.structs.replace(host, device=device))
    save_cluster(msgspec.structs.replace(cluster, hosts=tuple(hosts)), path)


if __name__ == "__main__":
    main()
