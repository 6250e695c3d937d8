"""Print the tables of docs/machines.md: every shipped machine, and the residual of every fit in their files.

python -m experiments.machine_table
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from statistics import mean

from meshwright.calibrate.hardware import Cluster, Host, Quantity, parse_cluster, shipped_machines

RESIDUAL = re.compile(r"; (?:held-out )?error (?:mean (?P<mean>[\d.]+)%|median [\d.]+%).*?points")
HELD_OUT = re.compile(r"at sizes held out ([\d.]+)%")
RANKS = re.compile(r" on \d+ ")
COLUMNS = (
    "machine, devices a host, 16-bit peak TFLOP/s, matmul, memory GB/s, in a host GB/s, network GB/s a host, USD/h"
)
SIXTEEN_BITS = ("bf16", "f16", "f32")


def machine_rows() -> Iterator[str]:
    """One row of Markdown for each machine; what was not measured, by us or others, is in italics."""
    columns = COLUMNS.split(", ")
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for name in shipped_machines():
        cluster = parse_cluster(name)
        host = cluster.hosts[0]
        device = host.device
        peak = next(device.flops_per_second[dtype].value for dtype in SIXTEEN_BITS if dtype in device.flops_per_second)
        price = host.price_per_hour
        yield (
            f"| `{name}` | {host.devices} × {device.name} | {peak / 1e12:.3g} | {_matmul(host)} "
            f"| {_marked(device.memory_bytes_per_second, 1e9)} | {_inside(host)} | {_network(cluster)} "
            f"| {f'{price.usd:.2f} ({price.date})' if price else ''} |"
        )


def residual_rows() -> Iterator[str]:
    """One row of Markdown for each fit, collectives of one table together, with the machines that hold it."""
    holders: dict[str, dict[str, None]] = defaultdict(dict)
    residuals: dict[str, dict[str, None]] = defaultdict(dict)
    for name in shipped_machines():
        if not parse_cluster(name).hosts[0].share_cores:  # what `meshwright calibrate` measured has a report of its own
            for source in _sources(parse_cluster(name)):
                found = RESIDUAL.search(source)
                if found is not None:
                    what = source[: found.start()]
                    if HELD_OUT.search(source):
                        what = RANKS.sub(" on 2 to 8 ", what)
                    holders[what][name] = None
                    residuals[what][found.group(0).removeprefix("; ")] = None
    yield "| fit | residual | in |"
    yield "|---|---|---|"
    for what, names in sorted(holders.items()):
        yield f"| {what} | {_summary(list(residuals[what]))} | {', '.join(f'`{name}`' for name in names)} |"


def _summary(residuals: list[str]) -> str:
    """The residual of a fit, or the mean and the worst of the fits of several curves."""
    held_out = [float(found.group(1)) for text in residuals if (found := HELD_OUT.search(text))]
    if len(held_out) < 2:
        return residuals[0]
    seen = [float(found.group("mean")) for text in residuals if (found := RESIDUAL.search("; " + text))]
    return (
        f"{len(held_out)} curves: error mean {mean(seen):.1f} %, at sizes held out {mean(held_out):.1f} % "
        f"(worst curve {max(held_out):.1f} %)"
    )


def _sources(cluster: Cluster) -> Iterator[str]:
    """Sources of what was fitted for a device and the links in its host, and of the share of its network."""
    device, link = cluster.hosts[0].device, cluster.hosts[0].link
    fits = [*device.matmul.values(), device.attention, device.interference]
    yield from (fit.source for fit in fits if fit is not None)
    yield from (device.matmul_efficiency.source, device.memory_bytes_per_second.source)
    if not link.bytes_per_second.source.startswith("the bus bandwidth"):  # of an all-reduce that is here already
        yield link.bytes_per_second.source
    yield from (fit.bytes_per_second.source for fits in link.collectives.values() for fit in fits)
    yield cluster.inter_host.bytes_per_second.source.partition("; times ")[2].partition(", ")[2]


def _measured(source: str) -> bool:
    return not source.startswith(("data sheet", "assumption", "nominal", "not measured"))


def _marked(quantity: Quantity, unit: float) -> str:
    text = f"{quantity.value / unit:.4g}"
    return text if _measured(quantity.source) else f"*{text}*"


def _matmul(host: Host) -> str:
    if host.device.matmul:
        return "tiles, " + ", ".join(host.device.matmul)
    return f"{_marked(host.device.matmul_efficiency, 0.01)} % of the peak"


def _inside(host: Host) -> str:
    kinds = ", ".join(host.link.collectives) or "none"
    return f"{_marked(host.link.bytes_per_second, 1e9)}; collectives: {kinds}" if host.devices > 1 else ""


def _network(cluster: Cluster) -> str:
    link = cluster.inter_host
    return _marked(link.host_bytes_per_second or link.bytes_per_second, 1e9)


def main() -> None:
    """Print both tables."""
    print("\n".join((*machine_rows(), "", *residual_rows())))


if __name__ == "__main__":
    main()
