"""Operations, collectives and links: closed forms, measured entries and shared network cards."""

from collections.abc import Sequence

import numpy as np
import pytest

from meshwright.calibrate.hardware import Cluster, CollectiveFit, Device, Host, Link, Quantity, parse_cluster
from meshwright.errors import ClusterError
from meshwright.simulate.collective import CollectiveKind, collective_seconds, transfer_seconds
from meshwright.simulate.compute import op_seconds, op_seconds_array
from meshwright.simulate.topology import CoreSharing, SubMesh, axis_groups, axis_link, core_sharing, hop_link


def q(value: float) -> Quantity:
    return Quantity(value, "test")


DEVICE = Device(
    name="d",
    memory_bytes=q(1e9),
    flops_per_second={"f32": q(1e12), "bf16": q(4e12)},
    matmul_efficiency=q(0.5),
    memory_bytes_per_second=q(1e10),
    launch_seconds=q(1e-6),
    dispatch_seconds=q(0),
)
FAST = Link(bytes_per_second=q(1e11), latency_seconds=q(1e-6))
NETWORK = Link(bytes_per_second=q(1e9), latency_seconds=q(1e-5), host_bytes_per_second=q(2e9))
CLUSTER = Cluster(name="test", hosts=(Host(device=DEVICE, devices=4, cores=8, link=FAST),) * 4, inter_host=NETWORK)


def test_an_operation_takes_the_slower_of_arithmetic_and_memory() -> None:
    assert op_seconds(DEVICE, "matmul", 2e12, 1, "bf16") == pytest.approx(1 + 1e-6)
    assert op_seconds(DEVICE, "matmul", 2e12, 1, "f32", launches=0) == pytest.approx(4)
    assert op_seconds(DEVICE, "conv", 1, 1e10, "bf16") == pytest.approx(1 + 1e-6)
    assert op_seconds(DEVICE, "memory", 1e9, 1e10, "bf16", launches=3) == pytest.approx(1 + 3e-6)


def test_many_operations_at_once_are_the_same() -> None:
    flops, bytes = np.array([1e9, 1e12]), np.array([1e9, 1e6])
    expected = [op_seconds(DEVICE, "matmul", f, b, "f32") for f, b in zip(flops, bytes, strict=True)]
    assert op_seconds_array(DEVICE, "matmul", flops, bytes, "f32").tolist() == expected


def test_an_unknown_kind_of_operation_is_refused() -> None:
    with pytest.raises(ClusterError, match="matmul, conv and memory"):
        op_seconds(DEVICE, "sort", 1, 1, "f32")  # type: ignore[arg-type]


def by_steps(kind: str, message: float, ranks: int) -> float:
    """A ring played step by step: every rank sends one piece a step, and the step ends with the slowest."""
    piece = message / ranks / (ranks if kind == "all_to_all" else 1)
    rounds = {"all_reduce": 2 * (ranks - 1), "permute": 1}.get(kind, ranks - 1)
    return sum(1e-6 + piece / 1e11 for _ in range(rounds))


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_an_unmeasured_collective_is_a_ring(kind: CollectiveKind, ranks: int) -> None:
    assert collective_seconds(kind, 1e6, ranks, FAST) == pytest.approx(by_steps(kind, 1e6, ranks))


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    halves = collective_seconds("reduce_scatter", 1e7, 4, FAST) + collective_seconds("all_gather", 1e7, 4, FAST)
    assert collective_seconds("all_reduce", 1e7, 4, FAST) == pytest.approx(halves)


def test_one_rank_and_nothing_to_send_are_free() -> None:
    assert collective_seconds("all_reduce", 1e9, 1, FAST) == 0
    assert collective_seconds("all_gather", 0, 8, FAST) == 0
    assert transfer_seconds(0, FAST) == 0


def measured(**fits: Sequence[CollectiveFit]) -> Link:
    return Link(bytes_per_second=q(1e11), latency_seconds=q(1e-6), collectives={k: tuple(v) for k, v in fits.items()})


def test_a_measured_collective_is_its_fit() -> None:
    link = measured(all_reduce=[CollectiveFit(ranks=4, latency_seconds=q(3e-5), bytes_per_second=q(5e9))])
    assert collective_seconds("all_reduce", 1e9, 4, link) == pytest.approx(0.2 + 3e-5)


def test_other_sizes_and_kinds_follow_the_nearest_fit_through_the_ring() -> None:
    """An 8-rank fit made from a ring of hops of 2 us and 5e10 bytes/s gives that ring back everywhere."""
    ring = Link(bytes_per_second=q(5e10), latency_seconds=q(2e-6))
    fit = CollectiveFit(ranks=8, latency_seconds=q(14 * 2e-6), bytes_per_second=q(5e10 * 8 / 14))
    far = CollectiveFit(ranks=64, latency_seconds=q(1), bytes_per_second=q(1))
    link = measured(all_reduce=[far, fit])
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        for ranks in (2, 4, 16):
            expected = collective_seconds(kind, 1e8, ranks, ring)
            assert collective_seconds(kind, 1e8, ranks, link) == pytest.approx(expected)
    assert collective_seconds("permute", 1e8, 4, link) == pytest.approx(1e-6 + 2.5e7 / 1e11)


def test_an_unknown_collective_is_refused() -> None:
    with pytest.raises(ClusterError, match="known are all_reduce"):
        collective_seconds("gossip", 1, 2, FAST)  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match="at least 1"):
        collective_seconds("all_reduce", 1, 0, FAST)


def test_axis_groups_are_row_major() -> None:
    submesh = SubMesh(4, 8)
    grid = np.arange(4, 12).reshape(2, 2, 2)
    for axis in range(3):
        rows = np.moveaxis(grid, axis, -1).reshape(-1, 2).tolist()
        assert sorted(map(list, axis_groups(submesh, (2, 2, 2), axis))) == sorted(rows)


def test_groups_inside_a_host_use_its_link() -> None:
    assert axis_link(CLUSTER, SubMesh(0, 16), (4, 4), axis=1) == FAST
    assert axis_link(CLUSTER, SubMesh(2, 2), (2,), axis=0) == FAST


@pytest.mark.parametrize(("sizes", "gigabytes"), [((4, 4), 0.5), ((16, 1), 1.0), ((8, 2), 1.0)])
def test_groups_that_cross_hosts_share_each_network_card(sizes: tuple[int, int], gigabytes: float) -> None:
    """2 GB/s a card and at most 1 GB/s a flow: four groups get half a GB/s each, two or one get the most."""
    assert axis_link(CLUSTER, SubMesh(0, 16), sizes, axis=0).bytes_per_second.value == pytest.approx(gigabytes * 1e9)


def test_what_was_measured_on_a_shared_link_is_slowed_too() -> None:
    fit = CollectiveFit(ranks=4, latency_seconds=q(0), bytes_per_second=q(1e9))
    network = Link(
        bytes_per_second=q(1e9), latency_seconds=q(0), host_bytes_per_second=q(1e9), collectives={"all_reduce": (fit,)}
    )
    cluster = Cluster(name="test", hosts=CLUSTER.hosts, inter_host=network)
    assert collective_seconds("all_reduce", 1e9, 4, axis_link(cluster, SubMesh(0, 16), (4, 4), 0)) == pytest.approx(4)


def test_a_hop_between_hosts_fills_the_network_cards() -> None:
    assert hop_link(CLUSTER, SubMesh(0, 2), SubMesh(2, 2)).bytes_per_second.value == 2e11
    assert hop_link(CLUSTER, SubMesh(0, 4), SubMesh(4, 4)).bytes_per_second.value == 2e9
    assert hop_link(CLUSTER, SubMesh(0, 8), SubMesh(8, 8)).bytes_per_second.value == 4e9
    assert hop_link(CLUSTER, SubMesh(0, 4), SubMesh(4, 4), pairs=1).bytes_per_second.value == 1e9


def test_a_submesh_outside_the_cluster_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"devices 12\.\.19 .* has 16"):
        axis_link(CLUSTER, SubMesh(12, 8), (8,), 0)
    with pytest.raises(ClusterError, match="does not fit 8 devices"):
        axis_link(CLUSTER, SubMesh(0, 8), (4,), 0)
    with pytest.raises(ClusterError, match=r"1\.\.4 are possible"):
        hop_link(CLUSTER, SubMesh(0, 4), SubMesh(4, 8), pairs=5)
    with pytest.raises(ClusterError, match="at least 1"):
        SubMesh(0, 0)


def test_only_hosts_whose_devices_are_ranks_share_cores() -> None:
    assert core_sharing(CLUSTER) == ()
    shared = core_sharing(parse_cluster("cpu:4"))
    assert shared == (CoreSharing(range(4), (1.0, 1.0, 1.5, 2.0)),)
    assert shared[0].rates == (1.0, 1.0, 1 / 1.5, 0.5)
