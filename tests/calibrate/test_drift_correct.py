"""The corrected file: what each number becomes, what its source says, and what is impossible."""

from math import log
from pathlib import Path

import msgspec
import pytest

from meshwright.calibrate.device import AttentionFit, MatmulFit
from meshwright.calibrate.drift_correct import corrected_cluster
from meshwright.calibrate.drift_fit import BETWEEN_HOSTS, Factor, Fit, Number
from meshwright.calibrate.hardware import Cluster, CollectiveFit, Piece, Quantity, load_cluster, save_cluster
from meshwright.errors import ClusterError
from tests.calibrate.simulated_runs import machine, number, with_device, with_link

WHY = "run 7, 2026-11-23"


def corrected(cluster: Cluster, *, error: float = 0.01, host: int = 0, **factors: float) -> Cluster:
    fit = Fit({Number(kind, host): Factor(log(factor), error) for kind, factor in factors.items()})
    return corrected_cluster(cluster, fit, WHY)


def test_a_slower_device_has_lower_rates_and_longer_launches() -> None:
    before = machine().hosts[0].device
    after = corrected(machine(), compute=1.4).hosts[0].device
    assert after.matmul_efficiency.value == pytest.approx(before.matmul_efficiency.value / 1.4)
    assert after.memory_bytes_per_second.value == pytest.approx(before.memory_bytes_per_second.value / 1.4)
    assert after.launch_seconds.value == pytest.approx(before.launch_seconds.value * 1.4)
    assert after.dispatch_seconds == before.dispatch_seconds


def test_each_source_says_what_it_was_and_the_range_is_the_runs_own() -> None:
    after = corrected(machine(), dispatch=3.0, error=0.05).hosts[0].device.dispatch_seconds
    assert after.source == f"corrected by 3 from {WHY}; before: 2e-05, made for a test"
    assert after.low is not None
    assert after.high is not None
    assert log(after.high / after.low) == pytest.approx(4 * 0.05)


def test_a_slower_link_loses_bandwidth_and_latency_apart() -> None:
    before = machine().hosts[0].link
    wire = corrected(machine(), wire=3.0).hosts[0].link
    assert (wire.bytes_per_second.value, wire.latency_seconds) == (
        pytest.approx(before.bytes_per_second.value / 3),
        before.latency_seconds,
    )
    latency = corrected(machine(), latency=5.0).hosts[0].link
    assert (latency.bytes_per_second, latency.latency_seconds.value) == (
        before.bytes_per_second,
        pytest.approx(before.latency_seconds.value * 5),
    )
    between = corrected(machine(), host=BETWEEN_HOSTS, wire=2.0)
    assert between.hosts[0].link == before
    assert between.inter_host.bytes_per_second.value == pytest.approx(before.bytes_per_second.value / 2)


def test_all_pieces_of_a_collective_are_slower_by_the_same() -> None:
    piece = Piece(latency_seconds=number(1e-5), bytes_per_second=number(1e6))
    fit = CollectiveFit(ranks=2, latency_seconds=number(5e-5), bytes_per_second=number(4e7), pieces=(piece,))
    cluster = with_link(machine(), lambda link: msgspec.structs.replace(link, collectives={"all_reduce": (fit,)}))
    (after,) = corrected(cluster, collectives=2.5).hosts[0].link.collectives["all_reduce"]
    for size in (10.0, 1e4, 1e8):
        assert after.seconds(size) == pytest.approx(2.5 * fit.seconds(size))


def test_a_phase_that_nobody_measured_gets_its_slowdown() -> None:
    programs = corrected(machine(), backward=1.6).hosts[0].device.programs
    assert set(programs) == {"backward"}
    assert programs["backward"].slowdown.value == pytest.approx(1.6)
    assert programs["backward"].fixed_seconds.value == 0.0


def test_the_file_is_written_and_read_back(tmp_path: Path) -> None:
    after = corrected(machine(), compute=1.4, wire=3.0, dispatch=2.0, forward=1.1)
    save_cluster(after, tmp_path / "machine.json")
    assert load_cluster(tmp_path / "machine.json") == after


def test_no_factor_changes_nothing() -> None:
    assert corrected(machine()) == machine()


def test_matmuls_above_a_data_sheets_peak_are_impossible() -> None:
    with pytest.raises(ClusterError, match=r"would make the machine impossible .*125% of the peak"):
        corrected(machine(), matmul=0.4)


def test_matmuls_above_a_measured_peak_raise_the_peak() -> None:
    """The peak was the best that anybody had seen; the run has seen better."""
    fit = MatmulFit(
        source="fitted",
        compute_units=1,
        efficiency={"64x64": 0.5},
        overhead_k=0.0,
        last_wave=1.0,
        memory_bytes_per_second=1e9,
        launch_seconds=0.0,
        sharpness=1.0,
    )
    attention = AttentionFit(source="fitted", efficiency=0.4, half_length=0.0, launch_seconds=0.0)
    cluster = with_device(
        machine(),
        lambda d: msgspec.structs.replace(
            d,
            flops_per_second={"f32": Quantity(1e10, "measured, best rate of any matmul")},
            matmul={"f32": fit},
            attention=attention,
        ),
    )
    before, after = cluster.hosts[0].device, corrected(cluster, matmul=0.4).hosts[0].device
    assert after.matmul_efficiency.value == 1.0
    assert "raised by 1.25 from run 7" in after.flops_per_second["f32"].source

    def rates(device: object, share: float) -> float:
        return share * device.peak_flops("f32")  # type: ignore[attr-defined, no-any-return]

    assert rates(after, 1.0) == pytest.approx(rates(before, 0.5) / 0.4)
    assert after.attention is not None
    assert rates(after, after.attention.efficiency) == pytest.approx(rates(before, 0.4) / 0.4)
    assert rates(after, after.matmul["f32"].efficiency["64x64"]) == pytest.approx(rates(before, 0.5) / 0.4)


def test_memory_and_links_above_their_data_sheets_are_impossible() -> None:
    memory = with_device(
        machine(), lambda d: msgspec.structs.replace(d, sheet_memory_bytes_per_second=Quantity(1.1e9, "data sheet"))
    )
    corrected(memory, memory=0.8)  # 1.25e9: within a fifth of the sheet
    with pytest.raises(ClusterError, match=r"impossible \(memory_bytes_per_second.value is .* of the data sheet"):
        corrected(memory, memory=0.5)
    link = with_link(
        machine(), lambda one: msgspec.structs.replace(one, sheet_bytes_per_second=Quantity(2.2e7, "data sheet"))
    )
    with pytest.raises(ClusterError, match=r"impossible \(bytes_per_second.value is .* of the data sheet"):
        corrected(link, wire=0.3)
