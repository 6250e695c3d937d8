"""The table that holds a link against measured messages."""

import pytest

from experiments.link_check import rows_of, table
from meshwright.calibrate.link_fit import link_of
from meshwright.calibrate.timing import P2P, NetworkTimings, Timing


def taken(family: str, size: float, seconds: float, ranks: int, groups: int = 1) -> Timing:
    return Timing(
        family=family,
        amount=size,
        seconds=seconds,
        low_seconds=0.9 * seconds,
        high_seconds=1.1 * seconds,
        repeats=9,
        ranks=ranks,
        groups=groups,
    )


def network(scale: float = 1.0) -> NetworkTimings:
    """A link of 10 µs and 1 GB/s whose ring all-reduce among 4 ranks is the closed form times ``scale``."""
    sizes = [2.0**power for power in range(10, 26, 3)]
    transfers = [taken(P2P, size, 1e-5 + size / 1e9, 2) for size in sizes]
    reduces = [taken("all_reduce", size, scale * 6 * (1e-5 + size / 4e9), 4) for size in sizes]
    at_once = taken("all_reduce", sizes[0], 1.0, 4, groups=2)
    return NetworkTimings(ranks=4, alone_seconds=(1.0,), busy_seconds=(1.0,), timings=(*transfers, *reduces, at_once))


def test_a_link_fitted_to_a_ring_agrees_with_it_by_fit_and_by_closed_form() -> None:
    made = network()
    reduce, transfer = rows_of(made, link_of(made, "made")[0])
    assert (reduce.family, reduce.ranks, reduce.sizes) == ("all_reduce", 4, 6)
    assert (transfer.family, transfer.ranks) == (P2P, 2)
    for row in (reduce, transfer):
        assert row.fit_error_largest < 0.01
        assert row.inside == 1.0
    assert transfer.closed_form_error_median < 0.01


def test_another_link_is_off_by_what_it_is_off() -> None:
    slower = network(scale=2.0)
    reduce, _ = rows_of(slower, link_of(network(), "made")[0])
    assert reduce.fit_error_median == pytest.approx(0.5, abs=0.01)
    assert reduce.inside == 0.0


def test_the_table_is_markdown_with_a_line_a_curve() -> None:
    made = network()
    head, rule, *lines = table(rows_of(made, link_of(made, "made")[0])).splitlines()
    assert head.count("|") == rule.count("|") == 10
    assert [line.split(" | ")[0] for line in lines] == ["| all_reduce", "| p2p"]
    assert "| 1 KiB | 32.00 MiB |" in lines[0]
