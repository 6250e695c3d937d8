"""Where the groups of a grid's axes stand in a cluster, and what their collectives cost there."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.calibrate.hardware import Cluster, Device, Host
from meshwright.simulate.compute import interference_rates, kernel_seconds
from meshwright.simulate.flows import collective_time
from meshwright.simulate.operations import Collective, Copy, Kernel
from meshwright.simulate.topology import SubMesh
from meshwright.simulate.workload.grid import Grid
from meshwright.simulate.workload.stack import AS_MEASURED, Stack


def mesh_at(grid: Grid, mesh: int) -> SubMesh:
    """The devices of one mesh of the pipeline: neighbours, as the pipeline's axis is the slowest."""
    inner = grid.context * grid.data
    return SubMesh(sum(grid.tensors[:mesh]) * inner, grid.tensors[mesh] * inner)


def nearer(cluster: Cluster, one: SubMesh, other: SubMesh) -> tuple[SubMesh, SubMesh]:
    """Two meshes between which a hop costs the same, at the beginning of the cluster and as close as may be.

    Hosts are equal, so only the meshes' places within them count, and whether they share one.
    """
    if not cluster.homogeneous:
        return one, other
    if one.first_device > other.first_device:
        other, one = nearer(cluster, other, one)
        return one, other
    each = cluster.devices_per_host
    first = SubMesh(one.first_device % each, one.devices)
    beyond = -(-(first.first_device + first.devices) // each) * each  # the first host that it does not touch
    there = other.first_device - (one.first_device - first.first_device)
    return first, SubMesh(beyond + there % each if there >= beyond else there, other.devices)


def groups(grid: Grid, first_device: int) -> dict[str, range]:
    """The group of each axis that the first device of a mesh is in.

    ``replicas`` hold the same dense weights, ``expert replicas`` the same experts.
    """
    inner = grid.tensor * grid.context
    spans = {
        "tensor": (1, grid.tensor),
        "context": (grid.tensor, grid.context),
        "data": (inner, grid.data),
        "replicas": (grid.tensor, grid.replicas),
        "expert": (grid.tensor, grid.expert),
        "expert replicas": (grid.tensor * grid.expert, grid.replicas // grid.expert),
    }
    return {axis: range(first_device, first_device + stride * size, stride) for axis, (stride, size) in spans.items()}


@dataclass
class Prices:
    """Seconds of kernels and collectives on one mesh of a grid; each distinct one is worked out once.

    The stack's factors say how much longer both take in a training step than alone. On a mesh of unlike devices they
    are those of ``priced_device`` (the first one, where None) and of its tensor-parallel group.
    """

    cluster: Cluster
    grid: Grid
    first_device: int
    dtype: str
    stack: Stack = AS_MEASURED
    priced_device: int | None = None
    known: dict[Kernel, float] = field(default_factory=dict)

    @cached_property
    def device(self) -> Device:
        """The device whose kernels are priced."""
        return self.cluster.device(self._priced)

    @property
    def _priced(self) -> int:
        return self.first_device if self.priced_device is None else self.priced_device

    @cached_property
    def rates(self) -> NDArray[np.float64]:
        """How streams slow each other on it."""
        return interference_rates(self.device)

    def seconds(self, kernel: Kernel) -> float:
        """Seconds of one kernel alone."""
        if kernel not in self.known:
            self.known[kernel] = self._seconds(kernel)
        return self.known[kernel]

    def _seconds(self, kernel: Kernel) -> float:
        match kernel:
            case Collective(kind=kind, message_bytes=size, axis=axis):
                if not size:
                    return 0.0
                start = self._priced if axis == "tensor" else self.first_device
                group = groups(self.grid, start)[axis]
                cluster, devices = hosts_of(self.cluster, group)
                at_once = groups_at_once(cluster, devices, self.grid.mesh_devices)
                alone = collective_time(cluster, devices, kind, size, at_once, self.dtype)
                return alone * message_factor(self.stack, cluster, devices)
            case Copy(bytes=size):
                host = self.cluster.hosts[self.cluster.host_of(self._priced)]
                link = host.pcie or self.cluster.inter_host
                return link.latency_seconds.value + size / link.bytes_per_second.value
            case _:
                return self.stack.kernel_factor * kernel_seconds(self.device, kernel)


def unlike_devices(cluster: Cluster, grid: Grid, first_device: int) -> list[int]:
    """The first device of each tensor-parallel group of a mesh whose host is like none before: one where all are."""
    if cluster.homogeneous:
        return [first_device]
    hosts: list[Host] = []
    found = []
    for device in range(first_device, first_device + grid.mesh_devices, grid.tensor):
        host = cluster.hosts[cluster.host_of(device)]
        if host not in hosts:
            hosts.append(host)
            found.append(device)
    return found


def message_factor(stack: Stack, cluster: Cluster, devices: Sequence[int]) -> float:
    """How much longer messages among devices take in a training step: inside one host, over the network, or both."""
    hosts = {cluster.host_of(device) for device in devices} if len(cluster.hosts) > 1 else {0}
    if len(hosts) == 1:
        return stack.communication_factor
    return stack.mixed_factor if len(hosts) < len(devices) else stack.network_factor


def hosts_of(cluster: Cluster, group: range) -> tuple[Cluster, tuple[int, ...]]:
    """The cluster without the hosts that a group does not touch, and the group's devices there.

    A network with leaves stays whole: which hosts share one matters.
    """
    if cluster.hosts_per_leaf is not None:
        return cluster, tuple(group)
    firsts, first = [], 0
    for host in cluster.hosts:
        firsts.append(first)
        first += host.devices
    kept, devices, before = [], [], 0
    for host, first in zip(cluster.hosts, firsts, strict=True):
        inside = group[_at(group, first) : _at(group, first + host.devices)]
        if inside:
            devices += [before + device - first for device in inside]
            kept.append(host)
            before += host.devices
    return msgspec.structs.replace(cluster, hosts=tuple(kept)), tuple(devices)


def groups_at_once(cluster: Cluster, devices: tuple[int, ...], mesh_devices: int) -> int:
    """Groups of the same axis that run the same collective on the hosts of this one: all of the mesh that fit there."""
    members = Counter(cluster.host_of(device) for device in devices)
    return max(1, min(cluster.devices_per_host, mesh_devices) // max(members.values()))


def _at(group: range, device: int) -> int:
    """Members of a group before a device."""
    return min(len(group), max(0, -(-(device - group.start) // group.step)))
