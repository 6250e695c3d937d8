"""Whole programs beside their kernels: the fit, what a machine file keeps of it, and what the planner makes of it."""

import time

import msgspec
import pytest

from meshwright.calibrate.device import PHASES
from meshwright.calibrate.hardware import (
    Cluster,
    Device,
    ProgramFit,
    Quantity,
    load_cluster,
    parse_cluster,
    save_cluster,
)
from meshwright.calibrate.programs import Step, cpu_seconds, fit_phases, pace_seconds
from meshwright.errors import ClusterError
from meshwright.models.zoo import get_model
from meshwright.plan.planfile import Plan
from meshwright.plan.search import Fix, Request, search
from meshwright.plan.trace.model import trace

DISPATCH_SECONDS = 1e-5


def fit(fixed_seconds: float, slowdown: float) -> ProgramFit:
    return ProgramFit(fixed_seconds=Quantity(fixed_seconds, "test"), slowdown=Quantity(slowdown, "test"))


def with_device(cluster: Cluster, device: Device) -> Cluster:
    return msgspec.structs.replace(cluster, hosts=(msgspec.structs.replace(cluster.hosts[0], device=device),))


def cpu(**programs: ProgramFit) -> Cluster:
    """One core of the shipped CPU machine."""
    cluster = parse_cluster("cpu:1")
    return with_device(cluster, msgspec.structs.replace(cluster.device(0), programs=programs))


def tiny_plan(cluster: Cluster) -> Plan:
    model = get_model("gpt:layers=1,hidden=32,heads=2,seq=16,vocab=64")
    fix = Fix(microbatches=2, schedule="1f1b", remat="none")
    return search(lambda count: trace(model, 4, count).graph, Request(cluster, 4, fix))


def test_a_straight_line_of_priced_seconds_is_found_again() -> None:
    def step(scale: float) -> Step:
        priced = dict.fromkeys(PHASES, 1e-3 * scale)
        measured = {phase: DISPATCH_SECONDS + 4e-4 + 1.2 * each for phase, each in priced.items()}
        return Step("gpt", priced, measured, counted_bytes=1e6, temporary_bytes=1e6 * (1 + scale))

    fits = fit_phases([step(scale) for scale in (0.1, 1.0, 10.0, 40.0)], DISPATCH_SECONDS, "measured")
    assert set(fits) == set(PHASES)
    for found in fits.values():
        assert found.fixed_seconds.value == pytest.approx(4e-4, rel=1e-3)
        assert found.slowdown.value == pytest.approx(1.2, rel=1e-3)
        assert "over 4 points" in found.slowdown.source
    temporaries = fits["backward"].temporaries
    assert temporaries is not None
    assert (temporaries.low, temporaries.value, temporaries.high) == pytest.approx((1.1, 6.5, 41.0))
    assert fits["forward"].temporaries is fits["once"].temporaries is None


def test_a_phase_that_took_no_time_has_no_fit() -> None:
    steps = [
        Step("gpt", dict.fromkeys(PHASES, x), {"forward": x, "backward": x, "once": 0.0}, 0.0, 0.0) for x in (1.0, 2.0)
    ]
    fits = fit_phases(steps, 0.0, "measured")
    assert set(fits) == {"forward", "backward"}
    assert fits["backward"].temporaries is None


def test_programs_scale_the_compute_of_a_planned_stage_and_nothing_else() -> None:
    (plain,) = tiny_plan(cpu()).stages
    fits = {"forward": fit(3e-4, 1.5), "backward": fit(7e-4, 2.0), "once": fit(1e-4, 3.0)}
    (stage,) = tiny_plan(cpu(**fits)).stages
    assert stage.forward_compute_seconds == pytest.approx(3e-4 + 1.5 * plain.forward_compute_seconds)
    assert stage.backward_compute_seconds == pytest.approx(7e-4 + 2.0 * plain.backward_compute_seconds)
    assert stage.update_seconds == pytest.approx(1e-4 + 3.0 * plain.update_seconds)
    assert stage.peak_memory_bytes == plain.peak_memory_bytes
    assert stage.dispatch_seconds == plain.dispatch_seconds


def test_temporaries_of_a_compiler_scale_what_a_stage_needs_while_it_runs_and_nothing_else() -> None:
    (plain,) = tiny_plan(cpu()).stages
    backward = msgspec.structs.replace(fit(0.0, 1.0), temporaries=Quantity(2.5, "test"))
    (stage,) = tiny_plan(cpu(backward=backward)).stages
    assert plain.transient_bytes > 0
    assert stage.transient_bytes == pytest.approx(2.5 * plain.transient_bytes)
    assert (stage.static_bytes, stage.saved_bytes) == (plain.static_bytes, plain.saved_bytes)


def test_a_machine_file_keeps_programs(tmp_path: object) -> None:
    path = f"{tmp_path}/machine.json"
    cluster = cpu(forward=fit(3e-4, 1.5))
    save_cluster(cluster, path)
    assert load_cluster(path) == cluster


def test_an_unknown_phase_is_named() -> None:
    device: Device = cpu().device(0)
    with pytest.raises(ClusterError, match=r"programs\.sideways is no phase of a step; known are forward"):
        msgspec.structs.replace(device, programs={"sideways": fit(0.0, 1.0)}).__post_init__()


def test_waiting_costs_no_cpu() -> None:
    (slept,) = cpu_seconds(lambda: time.sleep(0.05), 1)
    assert slept < 0.04


def test_the_pace_is_the_planner_s_price_where_none_was_measured() -> None:
    device = msgspec.structs.replace(cpu().device(0), pace_seconds=None)
    cluster = with_device(cpu(), device)
    rate = device.peak_flops("f32") * device.matmul_efficiency.value
    assert pace_seconds(cluster) == pytest.approx(2 * 256**3 / rate + device.launch_seconds.value)


def test_the_pace_is_the_measured_one_times_what_busy_ranks_lose() -> None:
    cluster = with_device(cpu(), msgspec.structs.replace(cpu().device(0), pace_seconds=Quantity(2e-3, "t")))
    assert pace_seconds(cluster) == 2e-3
    assert pace_seconds(cluster, 4) == 2e-3 * cluster.hosts[0].slowdown(4)
