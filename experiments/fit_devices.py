"""Fit devices to measured kernels: prints held-out errors and, with ``--write``, updates machine files.

    python -m experiments.fit_devices --data ../shared/data [--write]

Matmuls and fused attention of A100, H100 and H200 are aiconfigurator's (Apache-2.0, bf16, launched from CUDA graphs);
streams side by side are Mist's (Apache-2.0), measured on a V100 of 32 GB, the die of p3.16xlarge's. Nothing of the kind
is known here for A100 and H100: they have no interference.
"""

import argparse
import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from meshwright.calibrate.device import ACTIVITIES, Device
from meshwright.calibrate.hardware import MACHINES, load_cluster, save_cluster
from meshwright.calibrate.kernels import Error, Matmuls, fit_attention, fit_interference, fit_matmul

AICONFIGURATOR = "own fit of aiconfigurator's table (Apache-2.0)"
FA2_BACKWARD = 63 / 73  # of the forward's rate, as Dao, FlashAttention-2, 2023, states both at their best on A100
BACKWARD_SOURCE = "backward at 63/73 of the forward's rate (Dao, FlashAttention-2, 2023, abstract; A100)"
LEAST_ATTENTION = 2**18  # queries × heads from which a forward fills the device


class Table(NamedTuple):
    """A device of the tables, the machines that have it, and its streaming multiprocessors by its data sheet."""

    name: str
    machines: tuple[str, ...]
    compute_units: int


TABLES = (
    Table("a100", ("dgx-a100",), 108),
    Table("h100", ("dgx-h100", "h100"), 132),
    Table("h200", ("dgx-h200",), 132),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fit devices to measured kernels.")
    parser.add_argument("--data", type=Path, required=True, help="the folder of measured tables")
    parser.add_argument("--write", action="store_true", help="update calibrate/machines/*.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    rows: list[tuple[str, Error]] = []
    changes: dict[str, dict[str, Any]] = defaultdict(dict)
    for table in TABLES:
        device = load_cluster(MACHINES / f"{table.machines[0]}.json").device(0)
        peak = device.peak_flops("bf16")
        matmul, error = fit_matmul(
            read_matmuls(args.data, table.name), table.compute_units, peak, f"{AICONFIGURATOR}, {device.name}, bf16"
        )
        rows.append((f"{device.name}: bf16 matmul, shapes of training", error))
        attention, error = fit_attention(
            *read_attention(args.data, table.name),
            peak,
            f"{AICONFIGURATOR}, {device.name}, causal forwards of head size 128; {BACKWARD_SOURCE}",
            round(FA2_BACKWARD, 4),
        )
        rows.append((f"{device.name}: fused attention, forward", error))
        for machine in table.machines:
            changes[machine] |= {"matmul": {"bf16": matmul}, "attention": attention}
    interference, error = fit_interference(
        *read_overlap(args.data, "v100-sxm2-32gb"), "own fit of Mist's runs on 8 to 32 V100-SXM2-32GB (Apache-2.0)"
    )
    rows.append(("V100: streams side by side", error))
    changes["p3.16xlarge"] |= {"interference": interference}
    if args.write:
        for machine, fields in changes.items():
            write(machine, fields)
    if args.json:
        print(json.dumps([{"fit": name} | {f: getattr(e, f) for f in Error.__slots__} for name, e in rows]))
        return
    print(f"{'held-out errors':44} {'mean':>7} {'median':>7} {'p90':>7} {'bias':>7} {'points':>7}")
    for name, e in rows:
        print(f"{name:44} {e.mean:7.1%} {e.median:7.1%} {e.p90:7.1%} {e.bias:+7.1%} {e.points:7}")


def read_matmuls(data: Path, name: str) -> Matmuls:
    """The matmuls of a device."""
    table = read(data / "kernels" / f"gemm_{name}_sxm_bf16.csv.gz")
    m, n, k, milliseconds = (
        np.array([float(row[column]) for row in table]) for column in ("m", "n", "k", "latency_ms")
    )
    return Matmuls(m, n, k, milliseconds / 1e3)


def read_attention(data: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, FLOPs and seconds of causal fused forwards that fill the device, with heads of 128."""
    table = [
        row
        for row in read(data / "kernels" / f"attention_fwd_{name}_sxm.csv.gz")
        if row["head_dim"] == "128"
        and row["kernel_source"] in ("flash_attention", "fa3")
        and int(row["batch_size"]) * int(row["isl"]) * int(row["num_heads"]) >= LEAST_ATTENTION
    ]
    keys = np.array([float(row["isl"]) for row in table])
    seconds = np.array([float(row["latency_ms"]) for row in table]) / 1e3
    return keys, np.array([float(row["causal_tflops"]) for row in table]) * 1e12 * seconds, seconds


def read_overlap(data: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """What matmuls, collectives and copies take alone, and together, for each run of several at once.

    What one takes alone is the median of its runs with nothing beside it, in the same setting and of the same size.
    """
    table = read(data / "overlap" / f"overlap_interference_{name}.csv.gz")
    columns = ("n", "g2g_MB", "g2c_MB", "c2g_MB")  # in the order of ACTIVITIES
    alone: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for row in table:
        sizes = [float(row[column]) for column in columns]
        if sum(size > 0 for size in sizes) == 1:
            which = next(i for i, size in enumerate(sizes) if size > 0)
            alone[row["file"], which, sizes[which]].append(float(row["latency_ms"]) / 1e3)
    found, together = [], []
    for row in table:
        sizes = [float(row[column]) for column in columns]
        keys = [(row["file"], i, size) for i, size in enumerate(sizes) if size > 0]
        if len(keys) > 1 and all(key in alone for key in keys):
            seconds = np.zeros(len(ACTIVITIES))
            for _, which, size in keys:
                seconds[which] = np.median(alone[row["file"], which, size])
            found.append(seconds)
            together.append(float(row["latency_ms"]) / 1e3)
    return np.array(found), np.array(together)


def read(path: Path) -> list[dict[str, str]]:
    """A table; lines of remarks begin with #."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return list(csv.DictReader(line for line in lines if not line.startswith("#")))


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
