"""Fit links to measured collectives: prints the errors of every curve and, with ``--write``, updates machine files.

    python -m experiments.fit_links --data ../shared/data [--write] [--report DIR]

Curves are NCCL's of one system, kind and number of ranks. Lines: one straight line (alpha-beta) and up to three pieces,
each on all points and at sizes held out (a fit of every other size predicts the rest; both halves).

Written are A100, H100 and H200 from aiconfigurator (16-bit floats; with 8-bit integers as the ring where 16 bits use
the switch), V100 over NVLink from vTrain (16 GB) and Aceso (32 GB), A10G and L4 from Mist, GH200 and RTX cards from
what tensor parallelism adds to Sailor's layers. Of Aceso's and Mist's collectives only all-reduces are, whose sizes are
alike everywhere; of networks the share of the wire that large all-reduces reached. The rest is printed alone.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from experiments.fit_report import Picture, Series, write_report
from experiments.link_tables import (
    SYSTEMS,
    Curve,
    aiconfigurator_curves,
    alpa_curves,
    multi_host_rows,
    profile_curves,
    sailor_curves,
    transfers,
    vtrain_curves,
)
from meshwright.calibrate.collectives import PieceFit, fit_pieces, wire_share
from meshwright.calibrate.fit import fit_rate
from meshwright.calibrate.hardware import MACHINES, load_cluster, save_cluster
from meshwright.calibrate.link import CollectiveFit, Link
from meshwright.calibrate.quantity import Quantity
from meshwright.errors import ClusterError

HALF, EIGHT = "16-bit NCCL on A100, H100, H200", "8-bit NCCL on A100, H100, H200"
WORST_ERROR = 0.25  # in the mean: further off, as where two ways through a host are taken in turns, a curve is left out
ON_SWITCH = 1.15  # 16 bits this much quicker than 8 bits at the largest size: the switch adds (NVLS)
NETWORK_BYTES = 64 * 2**20  # from here on the network binds a collective across hosts
NVLINK_MACHINES = {
    "a100_sxm": ("dgx-a100", "dgx-a100-40gb", "dgx-a100-25gbe", "p4d.24xlarge", "p4de.24xlarge", "selene"),
    "h100_sxm": ("dgx-h100", "dgx-h100-100gbe", "p5.48xlarge"),
    "h200_sxm": ("dgx-h200",),
}
NETWORKS = {  # whose share of the wire which networks of RDMA cards are taken to reach
    "A100": ("dgx-a100", "dgx-a100-40gb", "p4d.24xlarge", "p4de.24xlarge", "selene"),
    "H100": ("dgx-h100", "p5.48xlarge", "dgx-h200", "gh200-ndr"),
}


class Reduced(NamedTuple):
    """A machine of whose collectives only all-reduces are measured, and by whom.

    ``direct`` says where the rate between two devices comes from: a folder of transfers, the slowest ``"ring"``, or,
    where it is empty, not from here.
    """

    machine: str
    system: str
    by: str
    direct: str = ""


LAYERS = "what tensor parallelism adds to layers on {} %s (Sailor, MIT), an upper bound"
REDUCED = (
    Reduced("p3.16xlarge", "V100", "f32 1 MiB to 1 GiB on {} V100 over NVLink (VIA-Research/vTrain)"),
    Reduced("v100-32gb", "aceso/v100", "f16 on {} V100-32GB over NVLink (Aceso's profile, MIT)", "aceso/v100"),
    Reduced("g5.48xlarge", "a10g", "f16 on {} A10G over PCIe (Mist, Apache-2.0)", "mist/profile_a10g"),
    Reduced("g6.48xlarge", "l4", "f16 on {} L4 over PCIe (Mist, Apache-2.0)", "mist/profile_l4"),
    Reduced("gh200", "GH-96", LAYERS % "GH200"),
    Reduced("rtx-2080ti", "RTX-2080", LAYERS % "RTX 2080 Ti", "ring"),
    Reduced("rtx-3090", "RTX-3090", LAYERS % "RTX 3090", "ring"),
    Reduced("titan-rtx", "Titan-RTX", LAYERS % "Titan RTX", "ring"),
)


def network_shares(data: Path) -> dict[str, Quantity]:
    """Share of the wire that all-reduces across hosts reach: A100 over 400 Gbit/s, B200 over 3.2 Tbit/s a host."""
    rows = [row for row in multi_host_rows(data) if float(row["bytes"]) >= NETWORK_BYTES]
    systems = {
        "A100": (
            "A100-80GB p4de.24xlarge",
            2,
            50e9,
            "2 p4de.24xlarge, EFA (aws-samples/awsome-distributed-training)",
        ),
        "H100": ("B200 p6", 4, 400e9, "4 p6-b200, EFA (ml-engineering by Stas Bekman, CC-BY-SA-4.0)"),
    }
    shares = {}
    for device, (hardware, hosts, wire, name) in systems.items():
        points = [
            (float(r["bytes"]), float(r["time_us"]) * 1e-6)
            for r in rows
            if r["hardware"] == hardware and r["nodes"] == str(hosts)
        ]
        size, seconds = np.array(sorted(points)).T
        shares[device] = wire_share(
            size,
            seconds,
            2 * (hosts - 1) / hosts,
            wire,
            f"share that all-reduces from 64 MiB on reached between {name}",
        )
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
        source = f"own fit, NCCL {newest} on {ranks} {SYSTEMS[system]} (aiconfigurator, Apache-2.0)"
        switch = kind == "all_reduce" and eight_bits.seconds[-1] / curve.seconds[-1] > ON_SWITCH
        found[kind].append(fit.entry(ranks, f"{source}, f16", "nvls" if switch else "ring"))
        if switch:
            found[kind].append(eight_bits_fit.entry(ranks, f"{source}, int8, which takes the ring"))
    order = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    return {kind: tuple(sorted(found[kind], key=lambda fit: fit.ranks)) for kind in order}


def _write(
    machine: str,
    collectives: dict[str, tuple[CollectiveFit, ...]],
    direct: tuple[Quantity, Quantity] | None = None,
) -> None:
    """Change the links inside a machine's hosts: their collectives and, where measured, rate and latency."""
    path = MACHINES / f"{machine}.json"
    cluster = load_cluster(path)
    hosts = []
    for host in cluster.hosts:
        link: Link = msgspec.structs.replace(host.link, collectives=collectives)
        if direct is not None:
            link = msgspec.structs.replace(link, bytes_per_second=direct[0], latency_seconds=direct[1])
        hosts.append(msgspec.structs.replace(host, link=link))
    save_cluster(msgspec.structs.replace(cluster, hosts=tuple(hosts)), path)


def _write_network(machine: str, share: Quantity) -> None:
    """Set a machine's network to the share of its wire that was measured."""
    path = MACHINES / f"{machine}.json"
    cluster = load_cluster(path)
    link = cluster.inter_host
    wire = link.sheet_bytes_per_second
    if wire is None:
        raise ClusterError(f"{path}: inter_host has no sheet_bytes_per_second, of which the network reaches a share")

    def part(nominal: float, what: str) -> Quantity:
        return Quantity(
            float(f"{nominal * share.value:.4g}"), f"{wire.source}{what}; times {share.value:g}, {share.source}"
        )

    network = msgspec.structs.replace(
        link,
        bytes_per_second=part(wire.value, ""),
        host_bytes_per_second=part(wire.value * cluster.hosts[0].nics, ", all devices of a host together"),
    )
    save_cluster(msgspec.structs.replace(cluster, inter_host=network), path)


def reduced_entries(
    machine: Reduced, curves: Sequence[Curve], fits: dict[str, PieceFit]
) -> dict[str, tuple[CollectiveFit, ...]]:
    """The all-reduces of a machine of whose collectives nothing else is measured."""
    chosen = [c for c in curves if (c.system, c.kind) == (machine.system, "all_reduce") and c.ranks in (2, 4, 8)]
    ordered = sorted((c for c in chosen if fits[c.name].error < WORST_ERROR), key=lambda curve: curve.ranks)
    source = f"own fit, {machine.by}"
    return {"all_reduce": tuple(fits[c.name].entry(c.ranks, source.format(c.ranks)) for c in ordered)}


def direct_rate(machine: Reduced, data: Path, rings: Sequence[CollectiveFit]) -> tuple[Quantity, Quantity] | None:
    """Bytes per second and latency between two devices of a host: of transfers, or of the slowest ring."""
    if not machine.direct:
        return None
    if machine.direct != "ring":
        source = "own fit of transfers of 1 MB to 1 GB between two devices, " + machine.by.partition("{} ")[2]
        fit = fit_rate(*transfers(data, machine.direct), source)
        return fit.amount_per_second, fit.fixed_seconds
    slowest = min(rings, key=lambda ring: ring.bus_bytes_per_second("all_reduce"))
    rate = slowest.bus_bytes_per_second("all_reduce")
    source = f"the bus bandwidth of the slowest all-reduce, of {slowest.ranks}: {slowest.bytes_per_second.source}"
    return Quantity(float(f"{rate:.4g}"), source), slowest.latency_seconds


def pictures(curves: Sequence[Curve], fits: dict[str, PieceFit]) -> list[Picture]:
    """One picture per system, version, kind and dtype, with a curve per number of ranks."""
    groups: dict[str, list[Curve]] = defaultdict(list)
    for curve in curves:
        groups[f"{curve.system} {curve.version} {curve.kind} {curve.dtype}"].append(curve)
    return [
        Picture(
            title,
            "bytes of the whole array",
            tuple(
                Series(f"{c.ranks} ranks", c.message_bytes, c.seconds, fits[c.name].seconds(c.message_bytes))
                for c in group
            ),
        )
        for title, group in groups.items()
    ]


def write_machines(data: Path, groups: dict[str, list[Curve]], fits: dict[str, PieceFit]) -> None:
    """Put what was fitted into the shipped machine files."""
    nccl = [curve for curve in groups[HALF] + groups[EIGHT] if curve.system in NVLINK_MACHINES]
    for system, machines in NVLINK_MACHINES.items():
        found = entries(system, nccl, [fits[curve.name] for curve in nccl])
        for machine in machines:
            _write(machine, found)
    rest = [curve for group in groups.values() for curve in group]
    for reduced in REDUCED:
        found = reduced_entries(reduced, rest, fits)
        _write(reduced.machine, found, direct_rate(reduced, data, found["all_reduce"]))
    for device, share in network_shares(data).items():
        for machine in NETWORKS[device]:
            _write_network(machine, share)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, print and, where asked, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of measured tables")
    parser.add_argument("--write", action="store_true", help="update the shipped machine files")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--report", type=Path, help="write a page with a picture per fit into this folder")
    chosen = parser.parse_args(arguments)
    curves = aiconfigurator_curves(chosen.data)
    groups = {
        HALF: [curve for curve in curves if curve.dtype == "half"],
        EIGHT: [curve for curve in curves if curve.dtype != "half"],
        "vTrain, NVLink": vtrain_curves(chosen.data),
        "Aceso and Mist": profile_curves(chosen.data),
        "Alpa, PCIe": alpa_curves(chosen.data),
        "Sailor, from layers": sailor_curves(chosen.data),
    }
    fitted: dict[str, PieceFit] = {}
    summary = {}
    for title, group in groups.items():
        rows = []
        for curve in group:
            line = fit_pieces(curve.message_bytes, curve.seconds, most=1)
            pieces = line if curve.version == "sailor" else fit_pieces(curve.message_bytes, curve.seconds)
            fitted[curve.name] = pieces
            rows.append((line.error, line.held_out, pieces.error, pieces.held_out))
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
        for device, share in shares.items():
            print(f"{device}: {share.value:.1%} of the wire; {share.source}")
    if chosen.report:
        every = [curve for group in groups.values() for curve in group]
        command = "python -m experiments.fit_links --data ../shared/data --report DIR"
        write_report(chosen.report, "Fits of links", command, pictures(every, fitted))
    if chosen.write:
        write_machines(chosen.data, groups, fitted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
