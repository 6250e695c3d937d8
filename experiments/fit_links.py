"""Fit links to measured collectives: prints the errors of every curve and, with ``--write``, updates machine files.

    python -m experiments.fit_links --data ../shared/data [--write]

Curves are NCCL's of one system, kind and number of ranks. Lines: one straight line (alpha-beta) and up to three pieces,
each on all points and at sizes held out (a fit of every other size predicts the rest; both halves).

Only what fits a shipped machine is written: A100, H100 and H200 from aiconfigurator (16-bit floats; with 8-bit integers
as the ring where 16 bits use the switch), V100 over NVLink from vTrain. Measurements of other machines (Aceso's, whose
gathers include copies; Mist's; Alpa's V100 over PCIe) are printed alone.
"""

import argparse
import csv
import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from meshwright.calibrate.collectives import PieceFit, fit_pieces, spread, wire_share
from meshwright.calibrate.hardware import MACHINES, load_cluster, save_cluster
from meshwright.calibrate.link import CollectiveFit, Link
from meshwright.calibrate.quantity import Quantity

KINDS = {"alltoall": "all_to_all"}
NAMES = {"a100_sxm": "A100", "h100_sxm": "H100", "h200_sxm": "H200"}
ON_SWITCH = 1.15  # 16 bits this much quicker than 8 bits at the largest size: the switch adds (NVLS)
FAILED_SECONDS = 100.0  # Aceso and Mist write 10^6 seconds where memory did not suffice
NETWORK_BYTES = 64 * 2**20  # from here on the network binds a collective across hosts
MACHINE_OF = {"a100_sxm": "dgx-a100", "h100_sxm": "dgx-h100", "h200_sxm": "dgx-h200"}


class Wiring(NamedTuple):
    """What data sheets say of a host's cables."""

    nics: int
    nic_bytes_per_second: float
    network: str
    pcie_bytes_per_second: float
    pcie: str


GEN3, GEN4, GEN5 = (
    (rate, f"data sheet, PCIe {name} x16, one way") for name, rate in (("3", 15.75e9), ("4", 31.5e9), ("5", 63e9))
)
NDR = "data sheet, 8 adapters of 400 Gbit/s, one a GPU"
WIRING = {
    "dgx-a100": Wiring(8, 25e9, "data sheet, 8 adapters of 200 Gbit/s, one a GPU", *GEN4),
    "dgx-h100": Wiring(8, 50e9, NDR, *GEN5),
    "dgx-h200": Wiring(8, 50e9, NDR, *GEN5),
    "p3.16xlarge": Wiring(1, 3.125e9, "data sheet, 25 Gbit/s network of the instance", *GEN3),
}
PCIE_LATENCY_SECONDS = 1e-5


class Curve(NamedTuple):
    """Times of one kind of collective over sizes of the whole array."""

    system: str
    version: str
    kind: str
    dtype: str
    ranks: int
    message_bytes: np.ndarray
    seconds: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.system} {self.version} {self.kind} {self.dtype} ×{self.ranks}"


def aiconfigurator_curves(data: Path) -> list[Curve]:
    """NCCL tables of A100, H100 and H200. An all-to-all's size there is one rank's, here the whole array's."""
    found: dict[tuple[str, str, str, str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in _table(data / "collectives" / "nccl_aiconfigurator.csv.gz"):
        if row["system"] in NAMES:
            kind, ranks = KINDS.get(row["op_name"], row["op_name"]), int(row["num_gpus"])
            size = float(row["bytes"]) * (ranks if kind == "all_to_all" else 1)
            key = (row["system"], row["nccl_dir"], kind, row["nccl_dtype"], ranks)
            found[key].append((size, float(row["latency_us"]) * 1e-6))
    return [_curve(key, points) for key, points in sorted(found.items())]


def vtrain_curves(data: Path) -> list[Curve]:
    """All-reduces of 1 MiB to 1 GiB in steps of 1 MiB: large sizes, which gradients have, weigh most.

    On 8 V100 the time drops at 14 MiB, where NCCL leaves the tree for the ring; no least of lines does, so the small
    sizes give way.
    """
    found: dict[tuple[str, str, str, str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in _table(data / "collectives" / "nccl_other.csv.gz"):
        if row["hardware"] in ("A100", "V100"):
            key = (row["hardware"], "vTrain", row["op"], "f32", int(row["gpus"]))
            found[key].append((float(row["bytes"]), float(row["time_us"]) * 1e-6))
    return [_curve(key, points) for key, points in sorted(found.items())]


def profile_curves(data: Path) -> list[Curve]:
    """Aceso's and Mist's profiles, whose sizes are those that their programs pass."""
    curves = []
    for folder in ("aceso/v100", "mist/profile_v100-sxm2-32gb-seq2048", "mist/profile_a100-sxm4-40gb"):
        found: dict[tuple[str, str, str, str, int], list[tuple[float, float]]] = defaultdict(list)
        for row in _table(data / folder / "collectives.csv"):
            size, seconds = float(row["data_MB"]) * 2**20, float(row["time_ms_mean"]) * 1e-3
            if size > 0 and seconds < FAILED_SECONDS:
                key = (folder.removeprefix("mist/profile_"), "", row["collective"], "f16", int(row["num_gpus"]))
                found[key].append((size, seconds))
        curves += [_curve(key, _thinned(points)) for key, points in sorted(found.items())]
    return curves


def alpa_curves(data: Path) -> list[Curve]:
    """Alpa's profile of V100s over PCIe; its sizes count elements."""
    found: dict[tuple[str, str, str, str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in _table(data / "alpa" / "prof_database.csv"):
        one_group = {"((0, 1),)": 2, "((0, 1, 2, 3),)": 4}
        group, _, dtype = row["key"][1:-1].rpartition(", ")
        if row["table"].endswith("_cost_dict") and group in one_group and int(row["size"]) > 0:
            kind, dtype = row["table"].removesuffix("_cost_dict"), dtype.strip("'")
            size = int(row["size"]) * (2 if dtype == "f16" else 4)
            found["v100-pcie", "alpa", kind, dtype, one_group[group]].append((size, float(row["time_s"])))
    return [_curve(key, points) for key, points in sorted(found.items())]


def network_shares(data: Path) -> dict[str, Quantity]:
    """Share of the wire that all-reduces across hosts reach: A100 over 400 Gbit/s, B200 over 3.2 Tbit/s a host."""
    rows = [
        row
        for row in _table(data / "collectives" / "nccl_other.csv.gz")
        if row["bytes"] and float(row["bytes"]) >= NETWORK_BYTES
    ]
    systems = {
        "dgx-a100": (
            "A100-80GB p4de.24xlarge",
            2,
            50e9,
            "2 p4de.24xlarge, EFA (aws-samples/awsome-distributed-training)",
        ),
        "dgx-h100": ("B200 p6", 4, 400e9, "4 p6-b200, EFA (ml-engineering by Stas Bekman, CC-BY-SA-4.0)"),
    }
    shares = {}
    for machine, (hardware, hosts, wire, name) in systems.items():
        points = [
            (float(r["bytes"]), float(r["time_us"]) * 1e-6)
            for r in rows
            if r["hardware"] == hardware and r["nodes"] == str(hosts)
        ]
        size, seconds = np.array(sorted(points)).T
        shares[machine] = wire_share(
            size,
            seconds,
            2 * (hosts - 1) / hosts,
            wire,
            f"share that all-reduces from 64 MiB on reached between {name}",
        )
    shares["dgx-h200"] = shares["dgx-h100"]
    return shares


def entries(system: str, curves: Sequence[Curve], fits: Sequence[PieceFit]) -> dict[str, tuple[CollectiveFit, ...]]:
    """What a machine file holds of one system: the newest version's 16-bit curves, and a ring beside each switch."""
    newest = max(curve.version for curve in curves if curve.system == system)
    here = {
        (curve.kind, curve.dtype, curve.ranks): (curve, fit)
        for curve, fit in zip(curves, fits, strict=True)
        if (curve.system, curve.version) == (system, newest)
    }
    found: dict[str, list[CollectiveFit]] = defaultdict(list)
    for (kind, dtype, ranks), (curve, fit) in here.items():
        if dtype != "half":
            continue
        eight_bits, eight_bits_fit = here[kind, "int8", ranks]
        source = f"own fit, NCCL {newest} on {ranks} {NAMES[system]} (aiconfigurator, Apache-2.0)"
        switch = kind == "all_reduce" and eight_bits.seconds[-1] / curve.seconds[-1] > ON_SWITCH
        found[kind].append(fit.entry(ranks, f"{source}, f16", "nvls" if switch else "ring"))
        if switch:
            found[kind].append(eight_bits_fit.entry(ranks, f"{source}, int8, which takes the ring"))
    order = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    return {kind: tuple(sorted(found[kind], key=lambda fit: fit.ranks)) for kind in order}


def _table(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
        yield from csv.DictReader(line for line in stream if not line.startswith("#"))


def _curve(key: tuple[str, str, str, str, int], points: list[tuple[float, float]]) -> Curve:
    size, seconds = np.array(sorted(points)).T
    return Curve(*key, size, seconds)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [points[index] for index in spread([size for size, _ in points])]


def _write(machine: str, collectives: dict[str, tuple[CollectiveFit, ...]], share: Quantity | None) -> None:
    """Change a machine file's links and nothing else; what it says of devices is read again right before."""
    path = MACHINES / f"{machine}.json"
    if not path.exists():
        print(f"{machine}: no such machine file; left out", file=sys.stderr)
        return
    cluster, wiring = load_cluster(path), WIRING[machine]
    pcie = Link(
        bytes_per_second=Quantity(wiring.pcie_bytes_per_second, wiring.pcie),
        latency_seconds=Quantity(PCIE_LATENCY_SECONDS, "assumption, about one copy command; not measured"),
    )
    hosts = tuple(
        msgspec.structs.replace(
            host, link=msgspec.structs.replace(host.link, collectives=collectives), nics=wiring.nics, pcie=pcie
        )
        for host in cluster.hosts
    )
    network = cluster.inter_host if share is None else _reached(cluster.inter_host, wiring, share)
    save_cluster(msgspec.structs.replace(cluster, hosts=hosts, inter_host=network), path)


def _reached(link: Link, wiring: Wiring, share: Quantity) -> Link:
    """The network at the share of its wire that was measured."""

    def part(nominal: float, what: str) -> Quantity:
        return Quantity(
            float(f"{nominal * share.value:.4g}"), f"{wiring.network}{what}; times {share.value:g}, {share.source}"
        )

    return msgspec.structs.replace(
        link,
        bytes_per_second=part(wiring.nic_bytes_per_second, ""),
        host_bytes_per_second=part(wiring.nic_bytes_per_second * wiring.nics, ", all devices of a host together"),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, print and, where asked, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of measured tables")
    parser.add_argument("--write", action="store_true", help="update the shipped machine files")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    chosen = parser.parse_args(arguments)
    curves = aiconfigurator_curves(chosen.data)
    groups = {
        "16-bit NCCL on A100, H100, H200": [curve for curve in curves if curve.dtype == "half"],
        "8-bit NCCL on A100, H100, H200": [curve for curve in curves if curve.dtype != "half"],
        "vTrain, NVLink": vtrain_curves(chosen.data),
        "Aceso and Mist": profile_curves(chosen.data),
        "Alpa, PCIe": alpa_curves(chosen.data),
    }
    fitted: dict[str, PieceFit] = {}
    summary = {}
    for title, group in groups.items():
        rows = []
        for curve in group:
            line = fit_pieces(curve.message_bytes, curve.seconds, most=1)
            fitted[curve.name] = fit_pieces(curve.message_bytes, curve.seconds)
            rows.append((line.error, line.held_out, fitted[curve.name].error, fitted[curve.name].held_out))
            if not chosen.json:
                print(f"{curve.name:64s}" + "".join(f"{value:8.1%}" for value in rows[-1]))
        means, medians = np.nanmean(rows, axis=0), np.nanmedian(rows, axis=0)
        names = ("line", "line_held_out", "pieces", "pieces_held_out")
        summary[title] = {"curves": len(group), **dict(zip(names, means.tolist(), strict=True))}
        if not chosen.json:
            print(f"{title}, {len(group)} curves: mean" + "".join(f"{value:8.1%}" for value in means))
            print(f"{'median':>{len(title) + 16}}" + "".join(f"{value:8.1%}" for value in medians) + "\n")
    shares = network_shares(chosen.data)
    if chosen.json:
        print(json.dumps({"groups": summary, "wire_share": {name: share.value for name, share in shares.items()}}))
    else:
        for machine, share in shares.items():
            print(f"{machine}: {share.value:.1%} of the wire; {share.source}")
    if chosen.write:
        for system, machine in MACHINE_OF.items():
            fits = [fitted[curve.name] for curve in curves]
            _write(machine, entries(system, curves, fits), shares[machine])
        v100 = [curve for curve in groups["vTrain, NVLink"] if curve.system == "V100" and curve.ranks in (2, 4, 8)]
        source = "own fit, f32 1 MiB to 1 GiB on {} V100 over NVLink (VIA-Research/vTrain)"
        reduced = tuple(fitted[curve.name].entry(curve.ranks, source.format(curve.ranks)) for curve in v100)
        _write("p3.16xlarge", {"all_reduce": reduced}, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
