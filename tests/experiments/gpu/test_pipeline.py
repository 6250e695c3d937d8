"""What two ranks measure of each other becomes a machine: closed forms."""

import pytest

from experiments.gpu.pipeline import Probe, host_staged_link, shared_device
from meshwright.calibrate.hardware import parse_cluster

SIZES = (1 << 14, 1 << 18, 1 << 22, 1 << 26)


def probe(fixed_seconds: float, bytes_per_second: float, together: tuple[float, ...] = (2.0, 3.0, 4.0)) -> Probe:
    return Probe(SIZES, tuple(fixed_seconds + n / bytes_per_second for n in SIZES), (1.0, 1.0), together)


def test_a_straight_line_is_found_exactly() -> None:
    link = host_staged_link(probe(50e-6, 8e9), "measured")
    assert link.latency_seconds.value == pytest.approx(50e-6)
    assert link.bytes_per_second.value == pytest.approx(8e9)
    assert "worst 0%" in link.latency_seconds.source


def test_times_that_shrink_with_size_still_make_a_link() -> None:
    """Noise may be such; a rate is never negative."""
    noise = Probe((1 << 14, 1 << 16), (2e-3, 1e-3), (1.0,), (1.0,))
    assert host_staged_link(noise, "measured").bytes_per_second.value > 0


def test_ranks_that_share_a_gpu_share_its_memory_and_slow_each_other() -> None:
    gpu = parse_cluster("h100:1")
    host = shared_device(gpu, probe(50e-6, 8e9), "measured").hosts[0]
    assert (host.devices, host.cores, host.share_cores) == (2, 1, True)
    assert 0.4 < host.device.memory_bytes.value / gpu.hosts[0].device.memory_bytes.value < 0.5
    assert host.slowdown(1) == 1
    assert host.slowdown(2) == pytest.approx(3)  # the mean, not the median, of 2, 3 and 4 over 1


def test_ranks_of_a_cpu_keep_its_cores() -> None:
    cpu = parse_cluster("cpu:1")
    host = shared_device(cpu, probe(1e-3, 1e9, together=(0.5,)), "measured").hosts[0]
    assert (host.devices, host.cores) == (2, cpu.hosts[0].cores)
    assert host.slowdown(2) == 1  # faster together is noise
