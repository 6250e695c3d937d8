"""Cluster → the links that a group of devices sees, and the cores that its devices share."""

from collections import Counter
from dataclasses import dataclass
from math import prod

from meshwright.calibrate.hardware import Cluster, Link
from meshwright.errors import ClusterError


@dataclass(frozen=True, slots=True)
class SubMesh:
    """``devices`` neighbouring devices of a cluster, from ``first_device`` on."""

    first_device: int
    devices: int

    def __post_init__(self) -> None:
        if self.first_device < 0 or self.devices < 1:
            raise ClusterError(
                f"a submesh of {self.devices} devices from device {self.first_device} on; at least 1, from 0 on"
            )

    @property
    def indices(self) -> range:
        """The devices' indices in the cluster."""
        return range(self.first_device, self.first_device + self.devices)


@dataclass(frozen=True, slots=True)
class CoreSharing:
    """Devices that take turns on one host's cores; ``slowdown[k - 1]`` is how much slower k busy ones run."""

    devices: range
    slowdown: tuple[float, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Rate of each device by the number of busy ones, as the engine wants it."""
        return tuple(1 / factor for factor in self.slowdown)


def core_sharing(cluster: Cluster) -> tuple[CoreSharing, ...]:
    """One entry for each host whose devices share its cores."""
    shared, first = [], 0
    for host in cluster.hosts:
        if host.share_cores:
            slowdown = tuple(host.slowdown(busy) for busy in range(1, host.devices + 1))
            shared.append(CoreSharing(range(first, first + host.devices), slowdown))
        first += host.devices
    return tuple(shared)


def axis_groups(submesh: SubMesh, axis_sizes: tuple[int, ...], axis: int) -> list[range]:
    """The groups of devices along one axis of a row-major logical mesh, last axis fastest."""
    if prod(axis_sizes) != submesh.devices or not 0 <= axis < len(axis_sizes):
        raise ClusterError(f"axis {axis} of a mesh of {axis_sizes} does not fit {submesh.devices} devices")
    stride, size = prod(axis_sizes[axis + 1 :]), axis_sizes[axis]
    starts = (block + offset for block in range(0, submesh.devices, stride * size) for offset in range(stride))
    return [range(first, first + stride * size, stride) for first in (submesh.first_device + s for s in starts)]


def axis_link(cluster: Cluster, submesh: SubMesh, axis_sizes: tuple[int, ...], axis: int) -> Link:
    """The link that a collective along one mesh axis sees while all groups of that axis run it at once.

    Groups that stay inside a host use the host's link (of the slowest host, where hosts differ); otherwise the
    network, with a host's cap divided among the groups that send through it: a group has one ring for each network
    card that its devices use, and each ring leaves a host once (NCCL's channels). What was measured on a link changes
    in the same proportion.
    """
    groups = axis_groups(submesh, axis_sizes, axis)
    _inside(cluster, submesh)
    homes = [{cluster.host_of(device) for device in group} for group in groups]
    if all(len(home) == 1 for home in homes):
        senders = Counter(cluster.host_of(device) for device in submesh.indices)
        links = [_shared(cluster.hosts[host].link, count) for host, count in sorted(senders.items())]
        return min(links, key=lambda link: link.bytes_per_second.value)
    crossing = [(group, home) for group, home in zip(groups, homes, strict=True) if len(home) > 1]
    through = Counter(host for _, home in crossing for host in home)
    rings = min(_rings(cluster, group) for group, _ in crossing)
    return _through_hosts(cluster, rings, max(through.values()))


def hop_link(cluster: Cluster, sub_a: SubMesh, sub_b: SubMesh, pairs: int | None = None) -> Link:
    """The link of a transfer from one submesh to another that ``pairs`` pairs of devices carry together.

    Its bandwidth is that of all pairs at once, so ``transfer_seconds`` wants the bytes of the whole array, each sent
    once. Without ``pairs``, as many as the smaller submesh has devices. Inside one host it is the host's link; between
    hosts the network, of which no host sends or receives more than its cap.
    """
    _inside(cluster, sub_a)
    _inside(cluster, sub_b)
    most = min(sub_a.devices, sub_b.devices)
    flows = most if pairs is None else pairs
    if not 1 <= flows <= most:
        raise ClusterError(f"{flows} pairs between {sub_a.devices} and {sub_b.devices} devices; 1..{most} are possible")
    owners_a, owners_b = _owners(cluster, sub_a), _owners(cluster, sub_b)
    inside = set(owners_a) == set(owners_b) and len(set(owners_a)) == 1
    link = cluster.hosts[owners_a[0]].link if inside else cluster.inter_host
    bytes_per_second = flows * link.bytes_per_second.value
    if link.host_bytes_per_second is not None:
        hosts = min(len(set(owners_a)), len(set(owners_b)), flows)
        bytes_per_second = min(bytes_per_second, hosts * link.host_bytes_per_second.value)
    return link.scaled(bytes_per_second / link.bytes_per_second.value)


def _owners(cluster: Cluster, submesh: SubMesh) -> list[int]:
    """The host of each device of a submesh, in one pass over the hosts."""
    owners: list[int] = []
    first = 0
    for index, host in enumerate(cluster.hosts):
        here = range(max(first, submesh.indices.start), min(first + host.devices, submesh.indices.stop))
        owners += [index] * len(here)
        first += host.devices
    return owners


def _inside(cluster: Cluster, submesh: SubMesh) -> None:
    if submesh.indices[-1] >= cluster.devices:
        raise ClusterError(
            f"devices {submesh.first_device}..{submesh.indices[-1]} were asked of cluster {cluster.name!r}, "
            f"which has {cluster.devices}"
        )


def _rings(cluster: Cluster, group: range) -> int:
    """Network cards that the devices of a group use on the host where they use the fewest."""
    first_of = {}
    first = 0
    for index, host in enumerate(cluster.hosts):
        first_of[index] = first
        first += host.devices
    cards: dict[int, set[int]] = {}
    for device in group:
        index = cluster.host_of(device)
        host = cluster.hosts[index]
        cards.setdefault(index, set()).add((device - first_of[index]) * host.nics // host.devices)
    return min(len(used) for used in cards.values())


def _through_hosts(cluster: Cluster, rings: int, groups: int) -> Link:
    """The network as one of ``groups`` groups with so many rings sees it; never quicker than the host's own link."""
    link = cluster.inter_host
    rate = rings * link.bytes_per_second.value
    if link.host_bytes_per_second is not None:
        rate = min(rate, link.host_bytes_per_second.value / groups)
    if rings > 1:
        rate = min(rate, *(host.link.bytes_per_second.value for host in cluster.hosts))
    return link.scaled(rate / link.bytes_per_second.value)


def _shared(link: Link, flows: int) -> Link:
    """The link as one of ``flows`` equal flows out of a host sees it."""
    if link.host_bytes_per_second is None:
        return link
    return link.scaled(min(1.0, link.host_bytes_per_second.value / flows / link.bytes_per_second.value))
