"""The cluster that a row ran on: the shipped machine of its GPUs, or the nearest, with the row's own hosts and network.

What a machine file says of compute and memory bandwidth stays; hosts are cut to the row's GPUs a host, and the network
between them gets the row's bit rate, of which the machine's measured share is reached.
"""

import re
from typing import NamedTuple

import msgspec

from experiments.validation.rows import Refused, Row
from meshwright.calibrate.hardware import Cluster, Link, Quantity, parse_cluster


class Machine(NamedTuple):
    """A shipped machine that stands for some hardware, with the nominal rate of one of its network cards.

    ``nearest`` says what differs, if anything does.
    """

    pattern: str
    name: str
    card_bits_per_second: float
    nearest: str = ""


MACHINES = (
    Machine(r"(DGX-)?A100\b.*", "dgx-a100", 200e9),
    Machine(r"H100-96GB.*", "dgx-h100", 400e9, "H100 of 96 GB and 500 W as one of 80 GB and 700 W"),
    Machine(r"(DGX-)?H100\b.*", "dgx-h100", 400e9),
    Machine(r"(DGX-)?H200\b.*", "dgx-h200", 400e9),
    Machine(r"GH(200)?(-.*)?", "gh200", 200e9),
    Machine(r"V100\b.*", "p3.16xlarge", 25e9),
    Machine(r"RTX-2080", "rtx-2080ti", 10e9),
    Machine(r"RTX-3090", "rtx-3090", 1e9),
    Machine(r"Titan-RTX", "titan-rtx", 10e9),
)
NETWORK = re.compile(r"(?:(\d+)\s*x\s*)?[A-Za-z-]*\s*(\d{2,4})\s*(?:Gb\S*)?.*?(?:/|per )\s*(node|gpu)", re.IGNORECASE)


def cluster_of(row: Row) -> tuple[Cluster, tuple[str, ...]]:
    """The cluster of a row, and what was assumed about it.

    Raises:
        Refused: no machine is shipped that is like it, or its GPUs do not fill its hosts.
    """
    hardware, gpus = row.text("hardware"), row.count("gpus")
    if "+" in hardware:
        return _mixed(row, hardware.split("+"), gpus)
    machine = _machine(hardware)
    shipped = parse_cluster(machine.name)
    host = shipped.hosts[0]
    each = min(gpus, row.count("gpus_per_node", host.devices))
    if gpus % each:
        raise Refused("gpus do not fill the hosts", f"line {row.line}: {gpus} on hosts of {each}")
    memory = row.positive("gpu_mem_gb")
    device = host.device
    if memory is not None:
        device = msgspec.structs.replace(device, memory_bytes=Quantity(memory * 1e9, "the row"))
    assumed: tuple[str, ...] = (machine.nearest,) if machine.nearest else ()
    network, cards = shipped.inter_host, host.nics
    if gpus > each:
        network, cards, said = _network(row, shipped, machine, each)
        assumed += () if said else ("network of the machine file",)
    one = msgspec.structs.replace(host, device=device, devices=each, nics=min(cards, each))
    return msgspec.structs.replace(shipped, hosts=(one,) * (gpus // each), inter_host=network), assumed


def _machine(hardware: str) -> Machine:
    known = next((known for known in MACHINES if re.fullmatch(known.pattern, hardware, re.IGNORECASE)), None)
    if known is None:
        raise Refused(f"no machine for {hardware or 'unnamed hardware'}")
    return known


def _mixed(row: Row, kinds: list[str], gpus: int) -> tuple[Cluster, tuple[str, ...]]:
    """Hosts of several kinds, in the order that the row names them; the first kinds have one more if need be."""
    shipped = [parse_cluster(_machine(kind).name) for kind in kinds]
    each = row.count("gpus_per_node", shipped[0].hosts[0].devices)
    hosts = gpus // each
    if gpus % each or hosts < len(kinds) or any(cluster.hosts[0].devices != each for cluster in shipped):
        raise Refused("gpus do not fill the hosts", f"line {row.line}: {gpus} on hosts of {each} of {len(kinds)} kinds")
    counts = [(hosts + len(kinds) - 1 - place) // len(kinds) for place in range(len(kinds))]
    text = "+".join(f"{_machine(kind).name}:{count}" for kind, count in zip(kinds, counts, strict=True))
    return parse_cluster(text), (f"hosts as {text}", "network of the machine file")


def _network(row: Row, shipped: Cluster, machine: Machine, devices: int) -> tuple[Link, int, bool]:
    """The network between hosts, the cards of each, and whether the row says what it is.

    Where it does not, a host with fewer GPUs than the machine's has as many fewer cards.
    """
    nics, link = shipped.hosts[0].nics, shipped.inter_host
    found = NETWORK.search(row.text("interconnect").rpartition("+")[2])
    if found is None:
        cards = max(1, round(nics * devices / shipped.hosts[0].devices))
        return _scaled(link, 1.0, cards / nics), cards, False
    count, rate, where = found.groups()
    each_gpu = where.lower() == "gpu"
    cards = int(count) if count else devices if each_gpu else nics
    bits = float(rate) * 1e9 / (1 if count or each_gpu else cards)  # of one card
    factor = bits / machine.card_bits_per_second
    return _scaled(link, factor, factor * cards / nics), cards, True


def _scaled(link: Link, card_factor: float, host_factor: float) -> Link:
    """The network with what one card carries, and the cap of a host, times factors."""
    cap = link.host_bytes_per_second
    return msgspec.structs.replace(
        link.scaled(card_factor), host_bytes_per_second=None if cap is None else cap.scaled(host_factor)
    )
