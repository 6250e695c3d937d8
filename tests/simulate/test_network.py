"""Links, routes and flows of a cluster: connected, inside their capacities, and alone exactly the closed forms."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.calibrate.hardware import (
    Cluster,
    Host,
    Link,
    Quantity,
    cluster_from_data,
    cluster_to_data,
    parse_cluster,
)
from meshwright.errors import ClusterError
from meshwright.simulate.collective import CollectiveKind, collective_seconds
from meshwright.simulate.flows import (
    collective_flow,
    collective_links,
    collective_time,
    transfer_flow,
    transfer_links,
)
from meshwright.simulate.network import network
from meshwright.simulate.topology import SubMesh, axis_link, hop_link

KINDS: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute", "broadcast")


def q(value: float) -> Quantity:
    return Quantity(value, "test")


INSIDE = Link(bytes_per_second=q(1e11), latency_seconds=q(1e-6))
ACROSS = Link(bytes_per_second=q(1e10), latency_seconds=q(1e-5), host_bytes_per_second=q(4e10))
DEVICE = parse_cluster("h100").device(0)
HOST = Host(device=DEVICE, devices=4, cores=8, link=INSIDE, nics=4)


def cluster(hosts: int = 4, nics: int = 4, hosts_per_leaf: int | None = None, oversubscription: float = 1.0) -> Cluster:
    return Cluster(
        name="test",
        hosts=(msgspec.structs.replace(HOST, nics=nics),) * hosts,
        inter_host=ACROSS,
        hosts_per_leaf=hosts_per_leaf,
        oversubscription=oversubscription,
    )


CLUSTERS = [
    cluster(),
    cluster(nics=1),
    cluster(nics=2, hosts_per_leaf=2, oversubscription=4.0),
    cluster(hosts=1),
    parse_cluster("dgx-a100:1+dgx-h100:2"),
    parse_cluster("p3.16xlarge:2"),
    parse_cluster("cpu:4"),
]


@pytest.mark.parametrize("there", CLUSTERS, ids=lambda there: there.name)
def test_every_route_is_connected_and_stays_inside_where_it_can(there: Cluster) -> None:
    net = network(there)
    for source in range(there.devices):
        for target in range(there.devices):
            route = [net.links[number] for number in net.route(source, target)]
            ends = [f"device{source}", *(link.target for link in route)]
            assert [link.source for link in route] == ends[:-1]
            assert ends[-1] == f"device{target}"
            inside = there.host_of(source) == there.host_of(target)
            assert not (inside and any("nic" in link.name or "pcie" in link.name for link in route))
            if source != target:
                link = there.hosts[there.host_of(source)].link if inside else there.inter_host
                assert net.latency_seconds(source, target) == link.latency_seconds.value


def test_each_device_leaves_its_host_by_the_card_of_its_rail() -> None:
    net = network(cluster(nics=2))
    names = [[net.links[number].name for number in net.route(device, device + 4)] for device in range(4)]
    assert [route[1] for route in names] == ["host0.nic0.out", "host0.nic0.out", "host0.nic1.out", "host0.nic1.out"]
    assert [route[2] for route in names] == ["host1.nic0.in", "host1.nic0.in", "host1.nic1.in", "host1.nic1.in"]


def test_only_another_leaf_is_reached_over_the_spine_which_has_its_share() -> None:
    net = network(cluster(hosts_per_leaf=2, oversubscription=4.0))
    assert [net.links[n].name for n in net.route(0, 8)][2:4] == ["leaf0.out", "leaf1.in"]
    assert not any("leaf" in net.links[n].name for n in net.route(0, 4))
    assert net.links[net.numbers["leaf0.out"]].bytes_per_second == 2 * 4e10 / 4


def test_a_copy_to_the_host_shares_pcie_with_the_network_alone() -> None:
    net = network(cluster())
    assert set(net.host_copy(0, to_host=True)) <= set(net.route(0, 4))
    assert not set(net.host_copy(0, to_host=True)) & set(net.route(0, 1))
    assert net.host_copy(0, to_host=False) == net.route(4, 0)[-1:]


GROUPS = st.sampled_from(CLUSTERS).flatmap(
    lambda there: st.tuples(
        st.just(there),
        st.lists(st.integers(0, there.devices - 1), min_size=2, max_size=there.devices, unique=True),
    )
)


@settings(deadline=None, max_examples=200)
@given(group=GROUPS, kind=st.sampled_from(KINDS), sizes=st.tuples(st.floats(1, 1e11), st.floats(1, 1e11)))
def test_a_flow_alone_is_the_closed_form_fits_its_links_and_grows_with_bytes(
    group: tuple[Cluster, Sequence[int]], kind: CollectiveKind, sizes: tuple[float, float]
) -> None:
    there, devices = group
    less, more = sorted(sizes)
    net, flow = network(there), collective_flow(network(there), devices, kind, more)
    seconds = collective_time(there, devices, kind, more)
    assert flow.seconds(more) == pytest.approx(seconds, rel=1e-12)
    assert collective_time(there, devices, kind, less) <= seconds * (1 + 1e-12)
    for number, weight in zip(flow.links, flow.weights, strict=True):
        assert weight * flow.bytes_per_second <= net.links[number].bytes_per_second * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_inside_a_host_sees_the_hosts_link(kind: CollectiveKind) -> None:
    assert collective_time(cluster(), range(4, 8), kind, 1e8) == collective_seconds(kind, 1e8, 4, INSIDE)


def test_a_hierarchical_all_reduce_is_as_slow_as_its_slower_level_and_has_the_latency_of_both() -> None:
    """4 hosts of 4 with a card a device: 2·3/4 of the array inside, 2·3/4 of a quarter through each card."""
    inside, across = 1.5 * 1e9 / 1e11, 1.5 * 0.25e9 / 1e10
    assert collective_time(cluster(), range(16), "all_reduce", 1e9) == pytest.approx(6e-6 + 6e-5 + max(inside, across))


def test_cards_are_loaded_with_the_volumes_of_the_formula() -> None:
    net = network(cluster())
    load = {net.links[n].name: w for n, w in zip(*collective_links(net, range(16), "all_reduce"), strict=True)}
    assert {load[f"host{host}.nic{nic}.out"] for host in range(4) for nic in range(4)} == {2 * 3 / 4 / 4}
    assert {load[f"device{device}.in"] for device in range(16)} == {2 * 3 / 4}
    load = {net.links[n].name: w for n, w in zip(*collective_links(net, range(16), "all_to_all"), strict=True)}
    assert sum(w for name, w in load.items() if "nic" in name and name.endswith("out")) == pytest.approx(
        sum(1 for a in range(16) for b in range(16) if a // 4 != b // 4) / 16**2
    )


def test_groups_at_once_share_what_their_hosts_send() -> None:
    """One card of 40 GB/s a host and 10 GB/s a device: four groups fit, eight devices' worth would not."""
    one, four = (collective_time(cluster(nics=1), [0, 4, 8, 12], "all_reduce", 1e9, groups) for groups in (1, 4))
    assert one == four
    narrow = Cluster(
        name="narrow",
        hosts=cluster(nics=1).hosts,
        inter_host=msgspec.structs.replace(ACROSS, host_bytes_per_second=q(2e10)),
    )
    one, four = (collective_time(narrow, [0, 4, 8, 12], "all_reduce", 1e9, groups) for groups in (1, 4))
    assert four - 6e-5 == pytest.approx(2 * (one - 6e-5))


def test_an_oversubscribed_spine_slows_all_to_all_as_much_as_it_is_narrow() -> None:
    flat = collective_time(cluster(hosts_per_leaf=2), range(16), "all_to_all", 1e9)
    narrow = collective_time(cluster(hosts_per_leaf=2, oversubscription=8.0), range(16), "all_to_all", 1e9)
    crossing = 1e9 * 8 * 8 / 16**2  # bytes that leave each leaf
    assert narrow > flat
    assert narrow == pytest.approx(crossing / (2 * 4e10 / 8), rel=1e-2)


@pytest.mark.parametrize(
    ("sub_a", "sub_b", "pairs"),
    [(SubMesh(0, 2), SubMesh(2, 2), None), (SubMesh(0, 4), SubMesh(4, 4), None), (SubMesh(0, 8), SubMesh(8, 8), None)],
)
def test_a_transfer_alone_is_as_quick_as_its_hop(sub_a: SubMesh, sub_b: SubMesh, pairs: int | None) -> None:
    hop = hop_link(cluster(), sub_a, sub_b, pairs)
    flow = transfer_flow(network(cluster()), sub_a, sub_b, pairs)
    assert flow.bytes_per_second == pytest.approx(hop.bytes_per_second.value)
    assert flow.latency_seconds == hop.latency_seconds.value
    assert sum(transfer_links(cluster(), sub_a, sub_b, pairs)[1]) == pytest.approx(
        len(network(cluster()).route(sub_a.first_device, sub_b.first_device))
    )


def test_a_group_has_a_ring_for_each_card_that_it_uses() -> None:
    sizes = (16,)
    assert axis_link(cluster(nics=1), SubMesh(0, 16), sizes, 0).bytes_per_second.value == 1e10
    assert axis_link(cluster(nics=4), SubMesh(0, 16), sizes, 0).bytes_per_second.value == 4e10


def test_impossible_requests_end_in_one_line() -> None:
    net = network(cluster())
    with pytest.raises(ClusterError, match=r"device 16 .* has 0\.\.15"):
        net.route(0, 16)
    with pytest.raises(ClusterError, match="twice"):
        collective_time(cluster(), [1, 1], "all_reduce", 1.0)
    with pytest.raises(ClusterError, match="no devices"):
        collective_time(cluster(), [], "all_reduce", 1.0)
    with pytest.raises(ClusterError, match="groups at once"):
        collective_time(cluster(), [0, 1], "all_reduce", 1.0, 0)
    with pytest.raises(ClusterError, match=r"1\.\.4 are possible"):
        transfer_links(cluster(), SubMesh(0, 4), SubMesh(4, 4), 5)
    with pytest.raises(ClusterError, match="known are all_reduce"):
        collective_time(cluster(), range(16), "gossip", 1.0)  # type: ignore[arg-type]


def test_leaves_are_checked_saved_and_joined() -> None:
    with pytest.raises(ClusterError, match="without hosts_per_leaf"):
        cluster(oversubscription=2.0)
    with pytest.raises(ClusterError, match="at least 1"):
        cluster(hosts_per_leaf=2, oversubscription=0.5)
    with pytest.raises(ClusterError, match="hosts_per_leaf is 0"):
        cluster(hosts_per_leaf=0)
    with pytest.raises(ClusterError, match="nics is 0"):
        cluster(nics=0)
    there = cluster(hosts_per_leaf=2, oversubscription=2.0)
    assert cluster_from_data(cluster_to_data(there)) == there
