"""Timings of a made-up machine give back that machine."""

import msgspec
import pytest

from meshwright.calibrate.assemble import assemble
from meshwright.calibrate.hardware import cluster_from_data, cluster_to_data
from meshwright.calibrate.timing import (
    DISPATCH,
    LAUNCH,
    MATMUL,
    MEMORY,
    P2P,
    ComputeTimings,
    NetworkTimings,
    Timing,
    timing,
)
from meshwright.errors import ClusterError


def line(family: str, fixed: float, rate: float, ranks: int = 1) -> list[Timing]:
    timings = [timing(family, size, [fixed + size / rate] * 5, ranks) for size in (1e5, 1e7, 1e9)]
    return [msgspec.structs.replace(taken, shape=(1, 1, 1, round(taken.amount / 2))) for taken in timings]


COMPUTE = ComputeTimings(
    device_kind="cpu",
    platform="cpu",
    devices=1,
    cores=2,
    memory_bytes=16_000_000_000,
    jax_version="0.10.2",
    settings="NPROC=1",
    timings=(
        timing(DISPATCH, 64, [1e-5] * 5),
        timing(LAUNCH, 64, [2e-6] * 5),
        *line(MATMUL + "f32", 1e-5, 50e9),
        *line(MATMUL + "bf16", 1e-5, 25e9),
        *line(MEMORY + "add", 1e-5, 10e9),
    ),
)
NETWORK = NetworkTimings(
    ranks=4,
    alone_seconds=(1e-3,) * 5,
    busy_seconds=(1e-3, 1e-3, 1e-3, 1e-3, 7e-3),  # a rank that waits for its core waits in few, long calls
    timings=(
        *line(P2P, 5e-5, 3e9, 2),
        *line("all_reduce", 1e-4, 1e9, 2),
        *line("all_reduce", 3e-4, 0.5e9, 4),
        timing("all_to_all", 1e5, [1e-3] * 5, 4),
    ),
)


def test_a_cpu_host_holds_its_ranks_and_they_share_cores_and_memory() -> None:
    (host,) = assemble(COMPUTE, NETWORK, "made").cluster.hosts
    assert (host.devices, host.cores, host.share_cores) == (4, 2, True)
    assert host.device.memory_bytes.value == pytest.approx(4e9)
    assert host.slowdown(4) == pytest.approx(2.2)
    assert host.slowdown(1) == 1.0


def test_efficiency_times_peak_is_the_fitted_rate_of_every_dtype() -> None:
    device = assemble(COMPUTE, NETWORK, "made").cluster.device(0)
    assert device.peak_flops("f32") * device.matmul_efficiency.value == pytest.approx(50e9, rel=1e-3)
    assert device.peak_flops("bf16") * device.matmul_efficiency.value == pytest.approx(25e9, rel=1e-3)
    assert device.memory_bytes_per_second.value == pytest.approx(10e9, rel=1e-3)
    assert (device.dispatch_seconds.value, device.launch_seconds.value) == (1e-5, 2e-6)


def test_collectives_are_fitted_by_number_of_ranks_and_need_two_sizes() -> None:
    calibration = assemble(COMPUTE, NETWORK, "made")
    link = calibration.cluster.hosts[0].link
    four = link.fitted("all_reduce", 4)
    assert four is not None
    assert four.seconds(1e6) == pytest.approx(3e-4 + 1e6 / 0.5e9, rel=1e-3)
    assert link.fitted("all_to_all", 4) is None
    assert link.bytes_per_second.value == pytest.approx(3e9, rel=1e-3)
    assert {(row.name, row.ranks) for row in calibration.fits} >= {("all_reduce", 2), ("all_reduce", 4), ("p2p", 2)}


def test_without_links_the_shipped_one_stands_in_and_a_note_says_so() -> None:
    cluster = assemble(COMPUTE, None, "made").cluster
    assert cluster.devices == 1
    assert any("links were not measured" in note for note in cluster.notes)
    assert cluster_from_data(cluster_to_data(cluster)) == cluster


def test_a_budget_too_small_for_a_needed_family_is_said() -> None:
    without = tuple(taken for taken in COMPUTE.timings if not taken.family.startswith(MATMUL))
    with pytest.raises(ClusterError, match="larger --budget"):
        assemble(msgspec.structs.replace(COMPUTE, timings=without), None, "made")
