"""Where groups stand: Megatron's order of ranks, hosts that a group touches, hops that cost the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.calibrate.hardware import parse_cluster
from meshwright.simulate.flows import collective_time
from meshwright.simulate.operations import Collective
from meshwright.simulate.topology import SubMesh, hop_link
from meshwright.simulate.workload.grid import Grid
from meshwright.simulate.workload.placement import Prices, groups, groups_at_once, hosts_of, mesh_at, nearer


def test_ranks_stand_tensor_first_and_pipeline_last() -> None:
    """Of 2 tensor × 2 context × 4 data × 2 pipeline the second mesh begins at 16; its first device leads all groups."""
    grid = Grid(batch=4, tensor=2, context=2, data=4, pipeline=2, expert=4)
    assert list(mesh_at(grid, 1).indices) == list(range(16, 32))
    found = {axis: list(group) for axis, group in groups(grid, 16).items()}
    assert found == {
        "tensor": [16, 17],
        "context": [16, 18],
        "data": [16, 20, 24, 28],
        "replicas": [16, 18, 20, 22, 24, 26, 28, 30],
        "expert": [16, 18, 20, 22],
        "expert replicas": [16, 24],
    }


@given(
    start=st.integers(0, 40), step=st.integers(1, 17), count=st.integers(1, 8), kind=st.sampled_from(["dgx-a100:24"])
)
def test_hosts_that_a_group_does_not_touch_may_be_left_out(start: int, step: int, count: int, kind: str) -> None:
    cluster = parse_cluster(kind)
    group = range(start, start + step * count, step)
    small, devices = hosts_of(cluster, group)
    assert len(devices) == count
    assert [device % 8 for device in devices] == [device % 8 for device in group]
    assert len(small.hosts) == len({device // 8 for device in group})
    at_once = groups_at_once(small, devices, 192)
    for size in (1e3, 1e8):
        whole = collective_time(cluster, group, "all_reduce", size, at_once)
        assert collective_time(small, devices, "all_reduce", size, at_once) == pytest.approx(whole)


def test_groups_that_run_at_once_share_a_host() -> None:
    cluster = parse_cluster("dgx-a100:4")
    assert groups_at_once(cluster, (0, 1), 32) == 4  # pairs inside a host
    assert groups_at_once(cluster, (0, 8, 16, 24), 32) == 8  # one device of each
    assert groups_at_once(cluster, (0, 4, 8, 12), 16) == 4
    assert groups_at_once(cluster, (0, 1), 2) == 1


@given(
    devices=st.integers(1, 24),
    source=st.integers(0, 11),
    hop=st.integers(-11, 11).filter(bool),
)
def test_a_hop_costs_the_same_where_it_is_nearer(devices: int, source: int, hop: int) -> None:
    target = source + hop
    if not 0 <= target < 12:
        return
    cluster = parse_cluster("dgx-a100:36")
    one, other = SubMesh(source * devices, devices), SubMesh(target * devices, devices)
    near = nearer(cluster, one, other)
    for mesh, moved in zip((one, other), near, strict=True):
        assert moved.devices == mesh.devices
        assert moved.first_device % 8 == mesh.first_device % 8
        assert moved.first_device <= mesh.first_device
    assert hop_link(cluster, *near) == hop_link(cluster, one, other)


def test_each_kernel_is_priced_once() -> None:
    grid = Grid(batch=2, tensor=2, data=2)
    prices = Prices(parse_cluster("dgx-a100"), grid, 0, "bf16")
    kernel = Collective(kind="all_reduce", message_bytes=1e6, ranks=2, axis="tensor")
    seconds = prices.seconds(kernel)
    prices.known[kernel] = 2 * seconds
    assert prices.seconds(kernel) == 2 * seconds
    assert prices.seconds(Collective(kind="all_reduce", message_bytes=0.0, ranks=2, axis="tensor")) == 0.0
