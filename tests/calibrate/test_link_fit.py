"""Timings of a made-up link give back that link; what noise and short budgets do to it is bounded."""

import csv
import gzip
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.calibrate.device import ACTIVITIES
from meshwright.calibrate.hardware import Device, Host, Link, Quantity
from meshwright.calibrate.link_fit import (
    busy_slowdown_of,
    busy_slowdowns_of,
    fewest_pieces,
    fit_curve,
    groups_slowdown_of,
    interference_of,
    least_known,
    link_of,
    notes_of,
    pair_rate,
)
from meshwright.calibrate.timing import P2P, BusyRanks, NetworkTimings, Overlap, Timing
from meshwright.errors import ClusterError
from meshwright.simulate.collective import collective_seconds, transfer_seconds

SIZES = tuple(float(1 << power) for power in range(10, 28))
PROTOCOLS = ((4e-4, 4e9), (1e-4, 1e9), (2e-5, 1e8))  # latency and bandwidth of three protocols


def taken(family: str, size: float, seconds: float, ranks: int = 2, spread: float = 0.1, **pattern: int) -> Timing:
    return Timing(
        family=family,
        amount=size,
        seconds=seconds,
        low_seconds=seconds * (1 - spread),
        high_seconds=seconds * (1 + spread),
        repeats=10,
        ranks=ranks,
        **pattern,
    )


def line(family: str, latency: float, rate: float, ranks: int = 2) -> list[Timing]:
    return [taken(family, size, latency + size / rate, ranks) for size in SIZES]


def network(*timings: Timing, **more: object) -> NetworkTimings:
    made = NetworkTimings(ranks=4, alone_seconds=(1e-3,), busy_seconds=(2e-3,), timings=timings)
    return msgspec.structs.replace(made, **more)


def test_the_link_predicts_the_collectives_and_transfers_that_made_it() -> None:
    link, rows = link_of(
        network(*line(P2P, 5e-5, 3e9), *line("all_reduce", 2e-4, 1e9, 4), *line("permute", 1e-4, 2e9, 4)), "made"
    )
    for size in SIZES:
        assert transfer_seconds(size, link) == pytest.approx(5e-5 + size / 3e9, rel=1e-3)
        assert collective_seconds("all_reduce", size, 4, link) == pytest.approx(2e-4 + size / 1e9, rel=1e-3)
        assert collective_seconds("permute", size, 4, link) == pytest.approx(1e-4 + size / 2e9, rel=1e-3)
    assert [(row.name, row.ranks) for row in rows] == [("all_reduce", 4), (P2P, 2), ("permute", 4)]


def test_three_protocols_become_three_pieces_and_a_line_stays_one() -> None:
    curve = [min(latency + size / rate for latency, rate in PROTOCOLS) for size in SIZES]
    entry, fit = fit_curve([taken("all_reduce", *point) for point in zip(SIZES, curve, strict=True)], "made")
    assert 2 <= len(entry.lines) <= 3
    assert fit.residual.median < 0.045
    (one,) = fewest_pieces(SIZES, [1e-4 + size / 1e9 for size in SIZES]).lines
    assert one == pytest.approx((1e-4, 1e9), rel=1e-3)


def test_few_sizes_are_one_line_however_they_lie() -> None:
    assert len(fewest_pieces(SIZES[:3], [1e-5, 1e-4, 2e-4]).lines) == 1


def test_a_piece_states_its_residual_and_a_range_that_holds_it() -> None:
    curve = [min(latency + size / rate for latency, rate in PROTOCOLS) for size in SIZES]
    entry, _ = fit_curve([taken("all_reduce", *point) for point in zip(SIZES, curve, strict=True)], "made")
    for quantity in (entry.latency_seconds, entry.bytes_per_second, *(piece.latency_seconds for piece in entry.pieces)):
        assert quantity.low is not None
        assert quantity.high is not None
        assert quantity.low <= quantity.value / 1.1
        assert quantity.high >= quantity.value * 1.1  # the quartiles are 10 % apart
        assert "held out" in quantity.source


@settings(max_examples=8, deadline=None)
@given(outlier=st.integers(0, len(SIZES) - 1), factor=st.floats(2.0, 20.0))
def test_one_size_taken_while_the_machine_was_busy_moves_the_others_little(outlier: int, factor: float) -> None:
    timings = [
        taken("all_reduce", size, (1e-4 + size / 1e9) * (factor if index == outlier else 1.0))
        for index, size in enumerate(SIZES)
    ]
    fit, _ = fit_curve(timings, "made")
    errors = [abs(fit.seconds(size) / (1e-4 + size / 1e9) - 1) for size in SIZES]
    assert np.median(errors) < 0.15


def test_strided_groups_and_groups_at_once_have_rows_but_no_entry() -> None:
    link, rows = link_of(
        network(
            *line(P2P, 5e-5, 3e9),
            *(msgspec.structs.replace(timing, stride=2) for timing in line("all_gather", 1e-4, 1e9)),
            *(msgspec.structs.replace(timing, groups=2) for timing in line("all_gather", 1e-4, 1e9)),
        ),
        "made",
    )
    assert link.collectives == {}
    assert [row.name for row in rows] == ["all_gather x2", "all_gather s2", P2P]


def test_no_transfer_measured_is_said() -> None:
    with pytest.raises(ClusterError, match="larger --budget"):
        link_of(network(*line("all_reduce", 1e-4, 1e9)), "made")


def test_groups_at_once_are_compared_with_the_same_message_of_one() -> None:
    made = network(
        taken("all_reduce", 1e6, 1e-3),
        taken("all_reduce", 1e6, 1.5e-3, groups=2),
        taken("all_reduce", 1e4, 1e-4),
        taken("all_reduce", 1e4, 0.9e-4, groups=2),
        taken("all_gather", 1e6, 5e-3, groups=2),  # no counterpart
        taken("all_reduce", 1e6, 2e-3, stride=2),
        taken("all_reduce", 1e6, 4e-3, stride=2, groups=2),
    )
    (slowdown,) = groups_slowdown_of(made, "made").values()
    assert (slowdown.low, slowdown.value, slowdown.high) == pytest.approx((1.0, 1.5, 2.0))
    assert notes_of(made) == [
        "collectives of 2 groups at once took 1.50 times as long as those of one group (1.00 to 2.00)"
    ]


def busy(ranks: int, *ratios: float) -> BusyRanks:
    return BusyRanks(ranks=ranks, alone_seconds=(1e-3,) * len(ratios), busy_seconds=tuple(1e-3 * r for r in ratios))


def test_ranks_slow_each_other_by_how_many_are_busy_and_a_host_answers_so() -> None:
    made = network(sharing=(busy(2, 0.9, 1.1), busy(4, 2.0, 2.4)))
    found = busy_slowdowns_of(made, "made")
    assert [quantity.value for quantity in found] == pytest.approx([1.05, (1.05 + 2.2) / 2, 2.2])
    assert (found[-1].low, found[-1].high) == pytest.approx((2.0, 2.4))
    assert "interpolated" in found[1].source
    assert busy_slowdown_of(made, "made") == found[-1]
    host = _host(found)
    assert [host.slowdown(count) for count in (1, 2, 3, 4, 9)] == pytest.approx([1.0, 1.05, 1.625, 2.2, 2.2])
    assert [host.resized(2).slowdown(count) for count in (1, 2)] == pytest.approx([1.0, 1.05])
    assert [host.resized(8).slowdown(count) for count in (2, 4, 8)] == pytest.approx([1.05, 2.2, 4.4])


def test_a_host_wants_one_slowdown_for_each_number_of_busy_ranks() -> None:
    with pytest.raises(ClusterError, match="one for each of 2 to 4 busy devices"):
        _host((Quantity(1.5, "made"),))


def _host(slowdowns: tuple[Quantity, ...]) -> Host:
    one = Quantity(1.0, "made")
    device = Device(
        name="rank",
        memory_bytes=Quantity(1e9, "made"),
        flops_per_second={"f32": Quantity(1e9, "made")},
        matmul_efficiency=one,
        memory_bytes_per_second=Quantity(1e9, "made"),
        launch_seconds=one,
        dispatch_seconds=one,
    )
    link = Link(bytes_per_second=Quantity(1e9, "made"), latency_seconds=one)
    return Host(
        device=device,
        devices=4,
        cores=2,
        link=link,
        share_cores=True,
        busy_slowdown=slowdowns[-1],
        busy_slowdowns=slowdowns,
    )


def overlap(activity: str, compute: float, message: float, together: float) -> Overlap:
    return Overlap(
        activity=activity,
        message_bytes=1e6,
        compute_seconds=compute,
        message_seconds=message,
        together_seconds=together,
    )


@given(shorter=st.floats(0.1, 1.0), longer=st.floats(1.0, 5.0), rate=st.floats(0.05, 1.0))
def test_the_rate_of_a_pair_explains_when_its_last_ends(shorter: float, longer: float, rate: float) -> None:
    together = shorter / rate + longer - shorter
    assert pair_rate([overlap("collective", longer, shorter, together)]) == pytest.approx(rate)
    assert pair_rate([overlap("collective", shorter, longer, together)]) == pytest.approx(rate)


def test_one_after_the_other_is_half_and_nobody_gains_by_company() -> None:
    assert pair_rate([overlap("collective", 2.0, 1.0, 3.0)]) == pytest.approx(0.5)
    assert pair_rate([overlap("collective", 2.0, 1.0, 1.9)]) == 1.0


def test_interference_is_a_table_of_pairs_and_the_least_of_them() -> None:
    found = interference_of(
        network(overlaps=(overlap("collective", 2.0, 1.0, 3.0), overlap("to_host", 2.0, 1.0, 2.25))), "made"
    )
    assert found is not None
    compute, collective, to_host, from_host = (1 << ACTIVITIES.index(name) for name in ACTIVITIES)
    assert found.rates[compute] == (1.0,) * 4
    assert found.rates[compute | collective] == (0.5, 0.5, 1.0, 1.0)
    assert found.rates[compute | to_host] == (0.8, 1.0, 0.8, 1.0)
    assert found.rates[compute | from_host] == (1.0,) * 4  # not measured
    assert found.rates[compute | collective | to_host] == (0.5, 0.5, 0.8, 1.0)
    assert interference_of(network(), "made") is None


def test_the_next_size_is_in_the_widest_gap_where_the_line_fits_worst() -> None:
    even = [taken("all_reduce", size, 1e-4 + size / 1e9) for size in (2.0**10, 2.0**12, 2.0**20)]
    gap = least_known(even, [1 << power for power in (11, 16, 19)], most_seconds=1.0)
    assert gap is not None
    assert gap.message_bytes == 1 << 16
    assert gap.seconds == pytest.approx(1e-4 + 2**16 / 1e9, rel=1e-2)
    assert least_known(even, [1 << 24], most_seconds=1.0) is None  # too far beyond what is known
    assert least_known(even, [1 << 22], most_seconds=1e-3) is None  # too long
    assert least_known(even[:1], [1 << 11], most_seconds=1.0) is None


@pytest.mark.parametrize(("system", "kind"), [("a100_sxm", "all_reduce"), ("h100_sxm", "all_gather")])
def test_pieces_meet_clean_curves_of_a_library_with_protocols(system: str, kind: str) -> None:
    """NCCL's times on eight devices, as far as they are at hand (aiconfigurator's tables)."""
    path = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "collectives" / "nccl_aiconfigurator.csv.gz"
    if not path.exists():
        pytest.skip(f"the table {path.name} is not at hand")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if (row["system"], row["op_name"]) == (system, kind)]
    rows = [row for row in rows if row["nccl_dtype"] == "half" and row["num_gpus"] == "8"]
    rows = [row for row in rows if row["nccl_dir"] == rows[0]["nccl_dir"]]
    fit = fewest_pieces([float(row["bytes"]) for row in rows], [float(row["latency_us"]) * 1e-6 for row in rows])
    assert fit.error < 0.06
    assert fit.held_out < 0.1
