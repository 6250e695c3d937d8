"""Clusters as plain frozen data: devices, links and hosts, and their text form.

Units stand in the names. Every number is a ``Quantity``: a value, where it comes from and, where it was measured, its
range. An object that exists is valid. A machine file is JSON; ``machines/`` holds those that are shipped.
"""

import difflib
import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from meshwright.calibrate.device import AttentionFit, Device, Interference, MatmulFit, ProgramFit
from meshwright.calibrate.link import COLLECTIVE_KINDS, CollectiveFit, Link, Piece
from meshwright.calibrate.quantity import Price, Quantity, Record, short_dtype
from meshwright.calibrate.schema import convert, read_json
from meshwright.errors import ClusterError

FORMAT = "meshwright-cluster"
VERSION = 1  # of what is written
OLDEST = 1  # that is read
MOST_DEVICES = 2**18  # each has its links in the simulator; the largest training runs have had a tenth of that
MACHINES = Path(__file__).parent / "machines"

__all__ = [
    "COLLECTIVE_KINDS",
    "AttentionFit",
    "Cluster",
    "CollectiveFit",
    "Device",
    "Host",
    "Interference",
    "Link",
    "MatmulFit",
    "Piece",
    "Price",
    "ProgramFit",
    "Quantity",
    "cluster_from_data",
    "cluster_to_data",
    "load_cluster",
    "parse_cluster",
    "save_cluster",
    "shipped_machines",
    "short_dtype",
]


class Host(Record, frozen=True, kw_only=True):
    """One machine: equal devices, the link between them, and the cores that feed them.

    On a CPU machine ``share_cores`` is true: its devices are ranks that take turns on the cores. ``busy_slowdown`` is
    then the measured time of a matmul with all ``devices`` busy, over its time alone (1 for separate devices);
    ``busy_slowdowns`` the same with 2, 3, ... ``devices`` busy, where each was measured.

    ``nics`` network cards carry what the devices send to other hosts, each its part of the network's
    ``host_bytes_per_second``; ``pcie`` is the way between one device and the host's memory. ``price_per_hour`` is what
    renting the whole host costs, where a price is known.
    """

    device: Device
    devices: int
    cores: int
    link: Link
    share_cores: bool = False
    busy_slowdown: Quantity | None = None
    busy_slowdowns: tuple[Quantity, ...] = ()
    nics: int = 1
    pcie: Link | None = None
    price_per_hour: Price | None = None

    def __post_init__(self) -> None:
        for name, count in (("devices", self.devices), ("cores", self.cores), ("nics", self.nics)):
            if count < 1:
                raise ClusterError(f"{name} is {count}; at least 1 is needed")
        if self.busy_slowdown is not None and not (self.share_cores and self.busy_slowdown.value >= 1):
            raise ClusterError(
                f"busy_slowdown.value is {self.busy_slowdown.value:g} with share_cores {self.share_cores}; "
                "a number of at least 1 is needed, and only where devices share cores"
            )
        if self.busy_slowdowns and not (
            self.busy_slowdown is not None
            and len(self.busy_slowdowns) == self.devices - 1
            and all(quantity.value >= 1 for quantity in self.busy_slowdowns)
        ):
            values = ", ".join(f"{quantity.value:g}" for quantity in self.busy_slowdowns)
            raise ClusterError(
                f"busy_slowdowns are {values}; beside busy_slowdown, numbers of at least 1 are needed, "
                f"one for each of 2 to {self.devices} busy devices"
            )

    def slowdown(self, busy_devices: int) -> float:
        """How many times slower each of ``busy_devices`` devices computes than one alone.

        Where only all devices were measured, linear in between; without a measurement, cores are shared out fairly.
        """
        if not self.share_cores or busy_devices <= 1:
            return 1.0
        if self.busy_slowdowns:
            return self.busy_slowdowns[min(busy_devices, self.devices) - 2].value
        if self.busy_slowdown is None or self.devices == 1:
            return max(1.0, busy_devices / self.cores)
        return 1.0 + (self.busy_slowdown.value - 1.0) * (busy_devices - 1) / (self.devices - 1)

    def resized(self, devices: int) -> "Host":
        """This CPU host with another number of ranks, which divide the same memory and the same cores."""
        if not self.share_cores:
            raise ClusterError("a host of separate devices has a fixed number of them; give a number of hosts")
        if devices < 1:
            raise ClusterError(f"{devices} devices were asked for; at least 1 is needed")
        memory = self.device.memory_bytes.scaled(self.devices / devices)
        busy = self.busy_slowdown
        if busy is not None and devices != self.devices:
            # Measured for another number of ranks: keep the overhead over fair sharing, which is what was learnt.
            overhead = busy.value / max(1.0, self.devices / self.cores)
            value = max(1.0, overhead * max(1.0, devices / self.cores)) if devices > 1 else 1.0
            busy = Quantity(value, f"scaled from {self.devices} to {devices} ranks: {busy.source}")
        by_count = self.busy_slowdowns[: devices - 1]
        if by_count:
            more = (self._beyond(count) for count in range(self.devices + 1, devices + 1))
            by_count = (*by_count, *more)
            busy = by_count[-1]
        device = msgspec.structs.replace(self.device, memory_bytes=memory)
        return msgspec.structs.replace(
            self, device=device, devices=devices, busy_slowdown=busy, busy_slowdowns=by_count
        )

    def _beyond(self, busy_devices: int) -> Quantity:
        """The slowdown of more busy devices than were measured: it grows as the cores' shares shrink."""
        largest = self.busy_slowdowns[-1]
        factor = max(1.0, busy_devices / self.cores) / max(1.0, self.devices / self.cores)
        scaled = largest.scaled(factor)
        source = f"scaled from {self.devices} to {busy_devices} ranks: {largest.source}"
        return Quantity(scaled.value, source, scaled.low, scaled.high)


class Cluster(Record, frozen=True, kw_only=True, dict=True):
    """Hosts and the network between them. Devices are numbered host by host, in order.

    Every ``hosts_per_leaf`` hosts share a leaf switch (without it, all hosts one), whose way to other leaves has
    1 / ``oversubscription`` of the capacity of its hosts.
    """

    name: str
    hosts: tuple[Host, ...]
    inter_host: Link
    notes: tuple[str, ...] = ()
    hosts_per_leaf: int | None = None
    oversubscription: float = 1.0

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ClusterError("hosts is empty; a cluster has at least one host")
        if self.hosts_per_leaf is not None and self.hosts_per_leaf < 1:
            raise ClusterError(f"hosts_per_leaf is {self.hosts_per_leaf}; at least 1 is needed")
        if not 1.0 <= self.oversubscription < float("inf"):
            raise ClusterError(
                f"oversubscription is {self.oversubscription:g}; a finite ratio of at least 1 is needed, "
                "2 for leaves with half the capacity upwards"
            )
        if self.oversubscription > 1 and self.hosts_per_leaf is None:
            raise ClusterError(
                f"oversubscription is {self.oversubscription:g} without hosts_per_leaf; say how many hosts share a leaf"
            )

    @property
    def devices(self) -> int:
        """Number of devices of all hosts together."""
        return sum(host.devices for host in self.hosts)

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of all devices together at their peaks for a dtype."""
        return sum(host.devices * host.device.peak_flops(dtype) for host in self.hosts)

    @property
    def usd_per_hour(self) -> float | None:
        """What all hosts together cost an hour; none where the price of one is not known."""
        prices = [host.price_per_hour.usd for host in self.hosts if host.price_per_hour is not None]
        return sum(prices) if len(prices) == len(self.hosts) else None

    @property
    def devices_per_host(self) -> int:
        """Devices on every host; where hosts differ, the smallest number, which a box of devices finds everywhere."""
        return min(host.devices for host in self.hosts)

    @property
    def homogeneous(self) -> bool:
        """Whether all hosts are equal."""
        return all(host == self.hosts[0] for host in self.hosts)

    def host_of(self, device_index: int) -> int:
        """Index of the host that holds a device."""
        if 0 <= device_index < self._ends[-1]:
            return bisect_right(self._ends, device_index)
        raise ClusterError(f"device {device_index} is not in cluster {self.name!r}, which has 0..{self.devices - 1}")

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """The device after the last one of each host."""
        return tuple(accumulate(host.devices for host in self.hosts))

    def device(self, device_index: int) -> Device:
        """The device with this index."""
        return self.hosts[self.host_of(device_index)].device

    def link(self, device_indices: Sequence[int]) -> Link:
        """The slowest link that a group of devices needs: inside one host, or between hosts."""
        owners = {self.host_of(index) for index in device_indices}
        return self.hosts[owners.pop()].link if len(owners) == 1 else self.inter_host


class HostGroup(Host, frozen=True, kw_only=True):
    """``count`` equal hosts, as one entry of a machine file."""

    count: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise ClusterError(f"count is {self.count}; at least 1 is needed")
        if self.count * self.devices > MOST_DEVICES:
            raise ClusterError(
                f"count {self.count} of hosts with {self.devices} devices is more than {MOST_DEVICES:,} devices; "
                "no plan is made for so many"
            )


class ClusterFile(Record, frozen=True, kw_only=True):
    """The text form of a cluster: the same data with equal neighbouring hosts written once."""

    format: str
    version: int
    name: str
    hosts: tuple[HostGroup, ...]
    inter_host: Link
    notes: tuple[str, ...] = ()
    hosts_per_leaf: int | None = None
    oversubscription: float = 1.0


def cluster_to_data(cluster: Cluster) -> dict[str, Any]:
    """The cluster as plain JSON data, the inverse of ``cluster_from_data``."""
    groups: list[tuple[Host, int]] = []
    for host in cluster.hosts:
        if groups and groups[-1][0] == host:
            groups[-1] = (host, groups[-1][1] + 1)
        else:
            groups.append((host, 1))
    data: dict[str, Any] = {"format": FORMAT, "version": VERSION, **msgspec.to_builtins(cluster)}
    data["hosts"] = [{"count": count, **msgspec.to_builtins(host)} for host, count in groups]
    return data


def cluster_from_data(data: object, where: str = "cluster") -> Cluster:
    """Check plain JSON data and make the cluster; ``where`` (a file's name) begins each error's line."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ClusterError(f'{where}: format is not "{FORMAT}"; a machine file begins with it')
    _need_version(data.get("version"), where)
    try:
        file = convert(data, ClusterFile)
        hosts = tuple(_one_host(group) for group in file.hosts for _ in range(group.count))
        return Cluster(
            name=file.name,
            hosts=hosts,
            inter_host=file.inter_host,
            notes=file.notes,
            hosts_per_leaf=file.hosts_per_leaf,
            oversubscription=file.oversubscription,
        )
    except ClusterError as error:
        raise ClusterError(f"{where}: {error}") from None


def _need_version(version: object, where: str) -> None:
    if type(version) is not int:
        raise ClusterError(f"{where}: version is {version!r}; a whole number is needed, now {VERSION}")
    if version < OLDEST:
        wrong, remedy = f"older than {OLDEST}, the first", "run `meshwright calibrate` to make a new file"
    elif version > VERSION:
        wrong, remedy = f"newer than {VERSION}, the last", "update Meshwright, or calibrate anew with this one"
    else:
        return
    raise ClusterError(f"{where}: version is {version}, {wrong} that this Meshwright reads; {remedy}")


def load_cluster(path: str | os.PathLike[str]) -> Cluster:
    """Read a machine file; what is wrong in it is one line that names the place.

    Raises:
        ClusterError: the file cannot be read, is not JSON, or holds something impossible.
    """
    return cluster_from_data(read_json(path), os.fspath(path))


def save_cluster(cluster: Cluster, path: str | os.PathLike[str]) -> None:
    """Write a machine file in one step: whoever looks sees the old file or the whole new one."""
    target = Path(path)
    text = json.dumps(cluster_to_data(cluster), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise ClusterError(f"{target}: cannot be written ({error.strerror}); choose another place") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def shipped_machines() -> tuple[str, ...]:
    """Names of the machines that come with Meshwright."""
    return tuple(sorted(path.stem for path in MACHINES.glob("*.json")))


def parse_cluster(spec: str) -> Cluster:
    """The cluster that a text means: ``dgx-a100:16``, ``cpu:4``, ``dgx-a100:2+dgx-h100:2`` or ``machine.json:4``.

    The count is a number of hosts; for a machine whose devices share cores (``cpu``) it is the number of devices of
    its one host. Without a count, a shipped machine or file is taken as it is. The parts of a sum are joined by the
    slowest of their networks.

    Raises:
        ClusterError: the name is unknown, the count is no positive whole number, or a file is damaged.
    """
    parts = [_parse_part(part.strip()) for part in spec.split("+")]
    if len(parts) == 1:
        return parts[0]
    return Cluster(
        name=spec,
        hosts=tuple(host for part in parts for host in part.hosts),
        inter_host=_slowest([part.inter_host for part in parts]),
        notes=tuple(note for part in parts for note in part.notes),
        hosts_per_leaf=min((part.hosts_per_leaf for part in parts if part.hosts_per_leaf), default=None),
        oversubscription=max(part.oversubscription for part in parts),
    )


def _parse_part(part: str) -> Cluster:
    name, colon, count_text = part.rpartition(":")
    if not colon or ("." in count_text and not name):
        name, count_text = part, ""
    if name in shipped_machines():
        cluster = load_cluster(MACHINES / f"{name}.json")
    elif name.endswith(".json") or os.sep in name:
        cluster = load_cluster(name)
    else:
        known = ", ".join(shipped_machines())
        close = difflib.get_close_matches(name, shipped_machines(), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ClusterError(f"cluster {part!r} is unknown; {hint}shipped are {known}; or give the path of a .json file")
    if not colon:
        return cluster
    if not (count_text.isascii() and count_text.isdigit() and int(count_text) >= 1):
        raise ClusterError(f"cluster {part!r} has the count {count_text!r}; use a whole number, as in {name}:2")
    return _with_count(cluster, int(count_text), part)


def _with_count(cluster: Cluster, count: int, name: str) -> Cluster:
    host = cluster.hosts[0]
    if not cluster.homogeneous:
        raise ClusterError(f"cluster {name!r} has unequal hosts, which cannot be counted; leave out ':{count}'")
    if count * (1 if host.share_cores else host.devices) > MOST_DEVICES:
        raise ClusterError(f"cluster {name!r} has more than {MOST_DEVICES:,} devices; no plan is made for so many")
    hosts = (host.resized(count),) if host.share_cores else (host,) * count
    return msgspec.structs.replace(cluster, name=name, hosts=hosts)


def _slowest(links: Sequence[Link]) -> Link:
    """The link that a transfer between the parts of a sum is bound by: lowest bandwidth, highest latency."""
    caps = [link.host_bytes_per_second for link in links if link.host_bytes_per_second is not None]
    return Link(
        bytes_per_second=min((link.bytes_per_second for link in links), key=lambda quantity: quantity.value),
        latency_seconds=max((link.latency_seconds for link in links), key=lambda quantity: quantity.value),
        host_bytes_per_second=min(caps, key=lambda quantity: quantity.value) if caps else None,
    )


def _one_host(group: HostGroup) -> Host:
    return Host(**{name: getattr(group, name) for name in Host.__struct_fields__})
