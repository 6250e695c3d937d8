"""Cluster → numbered directed links, and the route between any two devices.

    device ⇄ switch ⇄ device            inside a host (NVLink or NVSwitch), through its bus where that has a cap
    device ⇄ root ⇄ leaf ⇄ spine        between hosts: PCIe, the card of the device's rail, the fabric

A rail is a network card; the devices of a host share its cards evenly, neighbours the same card. Leaves hang on a
spine only where the cluster says how many hosts a leaf has; each then has its hosts' capacity over ``oversubscription``
to and from the spine (Al-Fares et al., SIGCOMM 2008, section 2.1.3).
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from meshwright.calibrate.hardware import Cluster
from meshwright.simulate.collective import port_bytes_per_second


@dataclass(frozen=True, slots=True)
class NetworkLink:
    """One direction of one cable, from one node to another."""

    name: str
    source: str
    target: str
    bytes_per_second: float
    latency_seconds: float


@dataclass(frozen=True)
class Network:
    """The links of a cluster, numbered by their place in ``links``."""

    cluster: Cluster
    links: tuple[NetworkLink, ...]
    numbers: dict[str, int] = field(repr=False, compare=False)

    @cached_property
    def homes(self) -> tuple[int, ...]:
        """The host of each device."""
        return tuple(index for index, host in enumerate(self.cluster.hosts) for _ in range(host.devices))

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The first device of each host."""
        return tuple(accumulate((host.devices for host in self.cluster.hosts[:-1]), initial=0))

    def home(self, device: int) -> int:
        """The host of one device.

        Raises:
            ClusterError: the cluster has no such device.
        """
        if not 0 <= device < len(self.homes):
            return self.cluster.host_of(device)  # which says what is wrong
        return self.homes[device]

    def rail(self, device: int) -> int:
        """The network card of its host that a device uses."""
        host = self.cluster.hosts[self.home(device)]
        return (device - self.firsts[self.homes[device]]) * host.nics // host.devices

    def leaf(self, host: int) -> int:
        """The leaf switch that a host hangs on."""
        return host // self.cluster.hosts_per_leaf if self.cluster.hosts_per_leaf else 0

    def port(self, device: int, way: str) -> list[int]:
        """A device's link to (``out``) or from (``in``) the switch of its host; out, also the capped bus."""
        host = self.homes[device]
        bus = self.numbers.get(f"host{host}.bus") if way == "out" else None
        return [self.numbers[f"device{device}.{way}"]] + ([] if bus is None else [bus])

    def card(self, device: int, way: str) -> list[int]:
        """A device's links to (``out``) or from (``in``) the network outside its host."""
        host, rail = self.home(device), self.rail(device)
        return [self.numbers[f"device{device}.pcie.{way}"], self.numbers[f"host{host}.nic{rail}.{way}"]]

    def host_copy(self, device: int, to_host: bool) -> tuple[int, ...]:
        """The links of a copy between a device and its host's memory."""
        self.home(device)
        return (self.numbers[f"device{device}.pcie.{'out' if to_host else 'in'}"],)

    def spine(self, host: int, way: str) -> list[int]:
        """The link of a host's leaf to (``out``) or from (``in``) the spine; none where there is one leaf."""
        number = self.numbers.get(f"leaf{self.leaf(host)}.{way}")
        return [] if number is None else [number]

    def route(self, source: int, target: int) -> tuple[int, ...]:
        """The links from one device to another, in order; none from a device to itself.

        Raises:
            ClusterError: the cluster has no such device.
        """
        here, there = self.home(source), self.home(target)
        if source == target:
            return ()
        if here == there:
            return (*self.port(source, "out"), *self.port(target, "in"))
        climbs = self.leaf(here) != self.leaf(there)
        over = [*self.spine(here, "out"), *self.spine(there, "in")] if climbs else []
        return (*self.card(source, "out"), *over, *reversed(self.card(target, "in")))

    def latency_seconds(self, source: int, target: int) -> float:
        """Seconds until the first byte arrives."""
        return sum(self.links[number].latency_seconds for number in self.route(source, target))

    def bytes_per_second(self, source: int, target: int) -> float:
        """What one device sends to one other with nobody else in the network; nothing bounds a copy onto itself."""
        if source == target:
            return float("inf")
        inside = self.home(source) == self.home(target)
        link = self.cluster.hosts[self.home(source)].link if inside else self.cluster.inter_host
        narrowest = min(self.links[number].bytes_per_second for number in self.route(source, target))
        return min(link.bytes_per_second.value, narrowest)


def card_bytes_per_second(cluster: Cluster, host: int) -> float:
    """Capacity of one network card of a host, each way: its share of the host's cap, or enough for its devices."""
    link = cluster.inter_host
    if link.host_bytes_per_second is not None:
        return link.host_bytes_per_second.value / cluster.hosts[host].nics
    return link.bytes_per_second.value * cluster.hosts[host].devices / cluster.hosts[host].nics


def pcie_bytes_per_second(cluster: Cluster, host: int) -> float:
    """Capacity of a device's PCIe, each way; where the host does not say, as much as a device sends to others."""
    pcie = cluster.hosts[host].pcie
    return pcie.bytes_per_second.value if pcie else cluster.inter_host.bytes_per_second.value


def network(cluster: Cluster) -> Network:
    """All links of a cluster: two ways for each device port, network card and leaf.

    Latencies are those of the cluster's links, half at each end, so that a route's sum is the measured whole.
    """
    links = [*_inside(cluster), *_between(cluster)] if len(cluster.hosts) > 1 else _inside(cluster)
    return Network(cluster, tuple(links), {link.name: number for number, link in enumerate(links)})


def _inside(cluster: Cluster) -> list[NetworkLink]:
    links, device = [], 0
    for index, host in enumerate(cluster.hosts):
        rate, half = port_bytes_per_second(host.link), host.link.latency_seconds.value / 2
        switch = f"host{index}.switch"
        for _ in range(host.devices):
            links.append(NetworkLink(f"device{device}.out", f"device{device}", switch, rate, half))
            links.append(NetworkLink(f"device{device}.in", switch, f"device{device}", rate, half))
            root, bus = f"host{index}.root", pcie_bytes_per_second(cluster, index)
            links.append(NetworkLink(f"device{device}.pcie.out", f"device{device}", root, bus, 0.0))
            links.append(NetworkLink(f"device{device}.pcie.in", root, f"device{device}", bus, 0.0))
            device += 1
        if host.link.host_bytes_per_second is not None:
            cap = host.link.host_bytes_per_second.value
            links.append(NetworkLink(f"host{index}.bus", switch, switch, cap, 0.0))
    return links


def _between(cluster: Cluster) -> list[NetworkLink]:
    links, half = [], cluster.inter_host.latency_seconds.value / 2
    leaf_bytes_per_second: dict[int, float] = {}
    for index, host in enumerate(cluster.hosts):
        root, leaf = f"host{index}.root", index // cluster.hosts_per_leaf if cluster.hosts_per_leaf else 0
        card = card_bytes_per_second(cluster, index)
        for nic in range(host.nics):
            links.append(NetworkLink(f"host{index}.nic{nic}.out", root, f"leaf{leaf}", card, half))
            links.append(NetworkLink(f"host{index}.nic{nic}.in", f"leaf{leaf}", root, card, half))
        leaf_bytes_per_second[leaf] = leaf_bytes_per_second.get(leaf, 0.0) + card * host.nics
    if len(leaf_bytes_per_second) > 1:
        for leaf, capacity in leaf_bytes_per_second.items():
            up = capacity / cluster.oversubscription
            links.append(NetworkLink(f"leaf{leaf}.out", f"leaf{leaf}", "spine", up, 0.0))
            links.append(NetworkLink(f"leaf{leaf}.in", "spine", f"leaf{leaf}", up, 0.0))
    return links
