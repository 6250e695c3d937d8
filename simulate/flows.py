"""Collectives and transfers over a real topology: in closed form when alone, and as flows when links are shared.

A flow is one message over many links at once: it moves at one rate, and each link carries its weight times that. Alone
it runs at ``bytes_per_second``, so that latency plus bytes over rate is exactly the closed form; beside others the
engine gives it a max-min fair rate of at most that.

Inside a host a collective is that of the host's link. Across hosts the quicker counts of

- hierarchical, where each host brings as many devices: scatter and gather inside, and all devices of a host, each with
  its part, across. The parts are pipelined, so the slower of inside and across decides and latencies add up. Volumes
  for an all-reduce over k hosts of g: 2(g-1)/g of the array inside, 2(k-1)/k · 1/g of it through each device's card
  (Cho et al., BlueConnect, MLSys 2019, section 3; NCCL's tree and rings pipeline likewise);
- flat: one ring through all devices for each network card, which enters and leaves each host once (NCCL's rings).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from meshwright.calibrate.hardware import Cluster
from meshwright.calibrate.link import Link
from meshwright.errors import ClusterError
from meshwright.simulate.algorithms import ALGORITHMS, CHOSEN, Parts
from meshwright.simulate.collective import CollectiveKind, collective_parts, collective_share
from meshwright.simulate.network import Network, card_bytes_per_second, network
from meshwright.simulate.topology import SubMesh

Weights = dict[int, float]
STAGED = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")  # what can be done inside first, then across


@dataclass(frozen=True, slots=True)
class Flow:
    """One message on its way: the links it loads and, for each, the bytes there for each byte of the message."""

    links: tuple[int, ...]
    weights: tuple[float, ...]
    bytes_per_second: float
    latency_seconds: float

    def seconds(self, message_bytes: float) -> float:
        """Time of the message with nobody else on the links."""
        return self.latency_seconds + message_bytes / self.bytes_per_second if message_bytes else 0.0


def collective_time(
    cluster: Cluster,
    devices: Sequence[int],
    kind: CollectiveKind,
    message_bytes: float,
    groups_at_once: int = 1,
    dtype: str = "bf16",
) -> float:
    """Seconds of one collective of a group of devices, by the quickest algorithm over the cluster's topology.

    ``groups_at_once`` groups like this one, with other devices of the same hosts, run the same collective at once and
    share what the hosts share; ``message_bytes`` and ``dtype`` are as in ``collective_seconds``.

    Raises:
        ClusterError: the group is empty, names a device twice or one that the cluster does not have, or the kind is
            unknown.
    """
    return _group(network(cluster), devices, kind, message_bytes, groups_at_once, dtype)[0].seconds


def collective_flow(
    net: Network, devices: Sequence[int], kind: CollectiveKind, message_bytes: float, dtype: str = "bf16"
) -> Flow:
    """A collective as a flow; its rate alone is that of the algorithm which is best for this size.

    Raises:
        ClusterError: as ``collective_time``.
    """
    parts, weights = _group(net, devices, kind, message_bytes, 1, dtype)
    rate = message_bytes / parts.wire_seconds if parts.wire_seconds else float("inf")
    return Flow(tuple(weights), tuple(weights.values()), rate, parts.latency_seconds)


def collective_links(
    net: Network, devices: Sequence[int], kind: CollectiveKind, message_bytes: float = 1e9
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The links that a collective loads, and the bytes on each for each byte of the whole array."""
    flow = collective_flow(net, devices, kind, message_bytes)
    return flow.links, flow.weights


def transfer_links(
    cluster: Cluster, sub_a: SubMesh, sub_b: SubMesh, pairs: int | None = None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The links that a transfer from one submesh to another loads, and the share of its bytes on each."""
    flow = transfer_flow(network(cluster), sub_a, sub_b, pairs)
    return flow.links, flow.weights


def transfer_flow(net: Network, sub_a: SubMesh, sub_b: SubMesh, pairs: int | None = None) -> Flow:
    """A transfer that ``pairs`` pairs of devices carry together, each an equal part of the bytes.

    The pairs lie evenly spread over both submeshes; without ``pairs``, as many as the smaller one has devices.

    Raises:
        ClusterError: a submesh leaves the cluster, or there cannot be so many pairs.
    """
    most = min(sub_a.devices, sub_b.devices)
    count = most if pairs is None else pairs
    if not 1 <= count <= most:
        raise ClusterError(f"{count} pairs between {sub_a.devices} and {sub_b.devices} devices; 1..{most} are possible")
    sources = [sub_a.indices[pair * sub_a.devices // count] for pair in range(count)]
    targets = [sub_b.indices[pair * sub_b.devices // count] for pair in range(count)]
    weights: Weights = {}
    alone, latency = float("inf"), 0.0
    for source, target in zip(sources, targets, strict=True):
        _load(weights, net.route(source, target), 1 / count)
        alone = min(alone, count * net.bytes_per_second(source, target))
        latency = max(latency, net.latency_seconds(source, target))
    return Flow(tuple(weights), tuple(weights.values()), min(alone, _narrowest(net, weights)), latency)


def _group(
    net: Network, devices: Sequence[int], kind: CollectiveKind, message_bytes: float, groups_at_once: int, dtype: str
) -> tuple[Parts, Weights]:
    """The best algorithm's two parts of time, and its load of the links."""
    members = _members(net, devices)
    if groups_at_once < 1:
        raise ClusterError(f"{groups_at_once} groups at once were asked for; at least 1 is needed")
    nothing = collective_parts(kind, 0.0, len(devices), net.cluster.inter_host)  # refuses an unknown kind, too
    if len(devices) == 1 or message_bytes == 0:
        return nothing, {}
    if len(members) == 1:
        return _in_host(net, members, kind, message_bytes, groups_at_once, dtype)
    sizes = {len(group) for group in members.values()}
    options = []
    if len(sizes) == 1 and (kind in STAGED or sizes == {1}):
        options.append(_hierarchical(net, members, kind, message_bytes, groups_at_once, dtype))
    if sizes != {1}:
        options.append(_flat(net, members, kind, message_bytes, groups_at_once))
    return min(options, key=lambda option: _seconds(option[0]))


def _members(net: Network, devices: Sequence[int]) -> dict[int, list[int]]:
    """The group's devices by host, in order."""
    if not devices:
        raise ClusterError("a collective of no devices was asked for; at least 1 is needed")
    if len(set(devices)) != len(devices):
        raise ClusterError(f"the group {list(devices)} names a device twice; each takes part once")
    members: dict[int, list[int]] = {}
    for device in sorted(devices):
        members.setdefault(net.home(device), []).append(device)
    return members


def _in_host(
    net: Network, members: dict[int, list[int]], kind: CollectiveKind, message_bytes: float, groups: int, dtype: str
) -> tuple[Parts, Weights]:
    ((host, devices),) = members.items()
    link = _capped(net.cluster.hosts[host].link, len(devices) * groups)
    weights: Weights = {}
    share = collective_share(kind, len(devices), link, dtype)
    for device in devices:
        _load(weights, (*net.port(device, "out"), *net.port(device, "in")), share)
    return collective_parts(kind, message_bytes, len(devices), link, dtype), weights


def _hierarchical(
    net: Network, members: dict[int, list[int]], kind: CollectiveKind, message_bytes: float, groups: int, dtype: str
) -> tuple[Parts, Weights]:
    """Inside all hosts at once, and at the same time across them, each device with its part of the array."""
    hosts, each = len(members), len(next(iter(members.values())))
    rail_bytes_per_second = min(
        min(_rail_bytes_per_second(net, host, devices), _host_share(net, host, groups) / each)
        for host, devices in members.items()
    )
    inside_bytes = message_bytes / hosts if kind == "all_to_all" else message_bytes
    inside_links = [_capped(net.cluster.hosts[host].link, each * groups) for host in members]
    inside = max((collective_parts(kind, inside_bytes, each, link, dtype) for link in inside_links), key=_seconds)
    rail = net.cluster.inter_host.scaled(rail_bytes_per_second / net.cluster.inter_host.bytes_per_second.value)
    across = collective_parts(kind, message_bytes / each, hosts, rail)
    weights: Weights = {}
    through = collective_share(kind, hosts, rail) / each
    for link, devices in zip(inside_links, members.values(), strict=True):
        share = collective_share(kind, each, link, dtype) * inside_bytes / message_bytes
        for device in devices:
            if share:
                _load(weights, (*net.port(device, "out"), *net.port(device, "in")), share)
            _load(weights, (*net.card(device, "out"), *net.card(device, "in")), through)
    over = _over_spine(net, members, kind, through * each)
    wire = max(inside.wire_seconds, across.wire_seconds, message_bytes * groups / _narrowest(net, over))
    return Parts(inside.latency_seconds + across.latency_seconds, wire), weights | over


def _flat(
    net: Network, members: dict[int, list[int]], kind: CollectiveKind, message_bytes: float, groups: int
) -> tuple[Parts, Weights]:
    """A ring for each network card of the host with the fewest; an all-to-all sends each piece straight."""
    ranks = sum(len(devices) for devices in members.values())
    if kind == "all_to_all":
        return _straight(net, members, message_bytes, groups)
    share = ALGORITHMS[kind][CHOSEN[kind][0]].share(ranks)
    gates = {host: _one_a_rail(net, devices) for host, devices in members.items()}
    rings = 1 if kind == "permute" else min(len(devices) for devices in gates.values())
    through = min(min(rings * _ring_bytes_per_second(net, host), _host_share(net, host, groups)) for host in members)
    slowest = max(
        (
            collective_parts(kind, message_bytes, ranks, _rings_only(net.cluster.hosts[host].link, ranks * groups))
            for host in members
        ),
        key=_seconds,
    )
    laps = 2 if kind == "all_reduce" else 1
    crossings = 1 if kind == "permute" else laps * len(members)
    latency = slowest.latency_seconds + crossings * net.cluster.inter_host.latency_seconds.value
    weights: Weights = {}
    for host, devices in members.items():
        doors = gates[host][:rings]
        for device in devices:
            beside = share * (1 - (device in doors) / rings)  # what stays in the host
            if beside:
                _load(weights, (*net.port(device, "out"), *net.port(device, "in")), beside)
        for door in doors:
            _load(weights, (*net.card(door, "out"), *net.card(door, "in")), share / rings)
    over = _over_spine(net, members, kind, share)
    wire = max(slowest.wire_seconds, share * message_bytes / through, message_bytes * groups / _narrowest(net, over))
    return Parts(latency, wire), weights | over


def _straight(net: Network, members: dict[int, list[int]], message_bytes: float, groups: int) -> tuple[Parts, Weights]:
    """An all-to-all in which each pair exchanges its piece, one partner after another (Thakur et al., section 4.3)."""
    ranks = sum(len(devices) for devices in members.values())
    weights: Weights = {}
    wire = latency = 0.0
    for host, devices in members.items():
        link = _rings_only(net.cluster.hosts[host].link, len(devices) * groups)
        near, far = (len(devices) - 1) / ranks**2, (ranks - len(devices)) / ranks**2
        inside = collective_parts(
            "all_to_all", near and message_bytes * len(devices) ** 2 / ranks**2, len(devices), link
        )
        steps = (ranks - len(devices)) * net.cluster.inter_host.latency_seconds.value
        latency = max(latency, inside.latency_seconds + steps)
        each = min(_rail_bytes_per_second(net, host, devices), _host_share(net, host, groups) / len(devices))
        wire = max(wire, inside.wire_seconds, far * message_bytes / each)
        for device in devices:
            if near:
                _load(weights, (*net.port(device, "out"), *net.port(device, "in")), near)
            _load(weights, (*net.card(device, "out"), *net.card(device, "in")), far)
    over = _over_spine(net, members, "all_to_all", 0.0)
    return Parts(latency, max(wire, message_bytes * groups / _narrowest(net, over))), weights | over


def _over_spine(net: Network, members: dict[int, list[int]], kind: CollectiveKind, share: float) -> Weights:
    """Load of the links between leaves and spine: a ring crosses each once; an all-to-all sends each pair's piece."""
    of_leaf = Counter({net.leaf(host): 0 for host in members})
    for host, devices in members.items():
        of_leaf[net.leaf(host)] += len(devices)
    ranks = of_leaf.total()
    weights: Weights = {}
    if len(of_leaf) > 1:
        for leaf, inside in of_leaf.items():
            load = inside * (ranks - inside) / ranks**2 if kind == "all_to_all" else share
            for way in ("out", "in"):
                _load(weights, (net.numbers[f"leaf{leaf}.{way}"],), load)
    return weights


def _one_a_rail(net: Network, devices: list[int]) -> list[int]:
    """The first device on each network card."""
    return list({net.rail(device): device for device in reversed(devices)}.values())[::-1]


def _rail_bytes_per_second(net: Network, host: int, devices: list[int]) -> float:
    """What each of these devices sends out of its host, with all of them sending."""
    crowded = max(Counter(net.rail(device) for device in devices).values())
    return min(_ring_bytes_per_second(net, host), card_bytes_per_second(net.cluster, host) / crowded)


def _ring_bytes_per_second(net: Network, host: int) -> float:
    """What one device alone sends out of its host."""
    first = net.firsts[host]
    narrowest = min(net.links[number].bytes_per_second for number in net.card(first, "out"))
    return min(net.cluster.inter_host.bytes_per_second.value, narrowest)


def _host_share(net: Network, host: int, groups: int) -> float:
    """What all network cards of a host send together, divided among the groups that run at once."""
    return card_bytes_per_second(net.cluster, host) * net.cluster.hosts[host].nics / groups


def _capped(link: Link, senders: int) -> Link:
    """The host's link as one of so many senders at once sees it, where the host caps them all together."""
    if link.host_bytes_per_second is None:
        return link
    return link.scaled(min(1.0, link.host_bytes_per_second.value / senders / link.bytes_per_second.value))


def _rings_only(link: Link, senders: int) -> Link:
    """The link without what only the switch of one host can do."""
    rings = {kind: tuple(fit for fit in fits if fit.algorithm == "ring") for kind, fits in link.collectives.items()}
    return _capped(msgspec.structs.replace(link, collectives=rings), senders)


def _seconds(parts: Parts) -> float:
    return parts.seconds


def _load(weights: Weights, numbers: Sequence[int], bytes: float) -> None:
    for number in numbers:
        weights[number] = weights.get(number, 0.0) + bytes


def _narrowest(net: Network, weights: Weights) -> float:
    """Bytes of the message per second at which the first of these links is full."""
    return min((net.links[number].bytes_per_second / load for number, load in weights.items()), default=float("inf"))
