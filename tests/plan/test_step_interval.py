"""The range around a predicted step: which one holds for a cluster, and what its own numbers add."""

import math

import msgspec
import pytest

from meshwright.calibrate.hardware import Cluster, ProgramFit, Quantity, parse_cluster
from meshwright.calibrate.uncertainty import Interval, shipped_intervals
from meshwright.plan.predict import step_interval, usual_interval

PROGRAMS = {"forward": ProgramFit(fixed_seconds=Quantity(0.0, "a test"), slowdown=Quantity(1.1, "a test"))}
SYSTEM = Interval(low=0.9, high=1.2, rows=9, groups=9, source="a test")


def changed(cluster: Cluster, host: int, **fields: object) -> Cluster:
    """The cluster with other fields of the device of one host."""
    hosts = list(cluster.hosts)
    hosts[host] = msgspec.structs.replace(hosts[host], device=msgspec.structs.replace(hosts[host].device, **fields))
    return msgspec.structs.replace(cluster, hosts=tuple(hosts))


def test_a_shipped_machine_is_one_that_nobody_measured() -> None:
    assert usual_interval(parse_cluster("dgx-a100:2")) is shipped_intervals().elsewhere


def test_measured_programs_on_every_device_make_a_calibrated_machine() -> None:
    half = changed(parse_cluster("dgx-a100:2"), 0, programs=PROGRAMS)
    assert usual_interval(half) is shipped_intervals().elsewhere
    assert usual_interval(changed(half, 1, programs=PROGRAMS)) is shipped_intervals().calibrated


def test_the_worst_known_device_decides() -> None:
    """A matmul that may have twice the time makes steps slower by at most as much, in squares."""
    cluster = changed(parse_cluster("dgx-a100:2"), 0, matmul_efficiency=Quantity(0.8, "a test"))
    cluster = changed(cluster, 1, matmul_efficiency=Quantity(0.8, "a test", low=0.4, high=0.8))
    found = step_interval(cluster, SYSTEM)
    assert found.low == pytest.approx(0.9)
    assert math.log(found.high) == pytest.approx(math.hypot(math.log(1.2), math.log(2.0)))
    assert found.source == SYSTEM.source


def test_equal_devices_without_ranges_leave_the_interval_as_it_is() -> None:
    cluster = changed(parse_cluster("dgx-a100:1"), 0, matmul_efficiency=Quantity(0.8, "a test"))
    found = step_interval(cluster, SYSTEM)
    assert (found.low, found.high) == pytest.approx((SYSTEM.low, SYSTEM.high))
