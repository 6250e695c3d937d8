"""What is measured between ranks, in which order; and, slow, that real ranks measure it."""

import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from meshwright.calibrate.link_fit import link_of
from meshwright.calibrate.timing import P2P, NetworkTimings

pytest.importorskip("mpi4py.MPI", reason="MPI is not installed", exc_type=ImportError)

from meshwright.calibrate.hardware import COLLECTIVE_KINDS
from meshwright.calibrate.network import (
    COARSE_SIZES_BYTES,
    Case,
    busy_counts,
    coarse_cases,
    families_of,
    group_sizes,
    merged,
)
from meshwright.calibrate.traffic import COLLECTIVES, Pattern


def test_an_axis_has_any_divisor_of_the_ranks_as_its_size() -> None:
    assert group_sizes(2) == [2]
    assert group_sizes(4) == [2, 4]
    assert group_sizes(12) == [2, 3, 4, 6, 12]
    assert group_sizes(5) == [5]


def test_groups_of_both_axes_of_a_mesh() -> None:
    assert Pattern(2, 1, 2).members == ((0, 1), (2, 3))
    assert Pattern(2, 2, 2).members == ((0, 2), (1, 3))
    assert Pattern(2, 2).members == ((0, 2),)
    assert Pattern(2, 2, 4).members == ((0, 2), (1, 3), (4, 6), (5, 7))


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8, 12])
def test_every_case_stays_within_the_ranks_and_comes_once(ranks: int) -> None:
    cases = coarse_cases(ranks)
    assert len(set(cases)) == len(cases)
    for case in cases:
        members = [rank for group in case.pattern.members for rank in group]
        assert len(set(members)) == len(members) == case.pattern.ranks * case.pattern.groups
        assert max(members) < ranks
        assert 0 in members  # rank 0 keeps the results


def test_every_kind_and_axis_has_two_sizes_before_any_has_three() -> None:
    families = families_of(4)
    assert {kind for kind, _ in families} == {P2P, *COLLECTIVE_KINDS} == {P2P, *COLLECTIVES}
    first = coarse_cases(4)[: 2 * len(families)]
    assert [(case.family, case.pattern) for case in first[::2]] == families
    assert {case.message_bytes for case in first} == set(COARSE_SIZES_BYTES[:2])


def test_the_other_axis_and_all_groups_at_once_are_measured_beside_one_group() -> None:
    patterns = {case.pattern for case in coarse_cases(4) if case.family == "all_reduce"}
    assert patterns == {Pattern(2), Pattern(4), Pattern(2, 2), Pattern(2, 1, 2), Pattern(2, 2, 2)}


def test_busy_ranks_are_counted_from_one_to_all() -> None:
    assert busy_counts(4) == [1, 2, 3, 4]
    assert len(busy_counts(64)) == 8
    assert {1, 64} <= set(busy_counts(64))


def test_the_mean_of_rounds_is_the_value_and_the_range_holds_both() -> None:
    case = Case("all_reduce", Pattern(2), 1024)
    timing = merged(case, [(1024.0, [1.0, 2.0, 3.0]), (1024.0, [4.0, 5.0, 6.0, 7.0])])
    assert timing.seconds == (2.0 + 5.5) / 2
    assert (timing.low_seconds, timing.high_seconds) == (1.5, pytest.approx(6.25))
    assert timing.repeats == 7


@pytest.mark.slow
def test_four_ranks_measure_every_kind_and_their_link_predicts_it() -> None:
    from meshwright.calibrate.session import RUN_AS_ROOT, find_mpiexec, worker_environment

    code = (
        "import sys, jax, msgspec; from mpi4py import MPI\n"
        "from meshwright.calibrate.network import measure_network, start_jax\n"
        "start_jax(MPI.COMM_WORLD)\n"
        "found = measure_network(MPI.COMM_WORLD, 25.0, lambda done, text: None)\n"
        "if found: print('RESULT' + msgspec.json.encode(found).decode())\n"
        "jax.distributed.shutdown()"
    )
    command = [find_mpiexec(), "--oversubscribe", "-n", "4", sys.executable, "-c", code]
    environment = {**worker_environment(os.environ), **RUN_AS_ROOT, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=240)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    network = msgspec.json.decode(line.removeprefix("RESULT"), type=NetworkTimings)
    link, rows = link_of(network, "measured")
    assert set(link.collectives) == set(COLLECTIVE_KINDS)
    assert all({fit.ranks for fit in fits} == {2, 4} for fits in link.collectives.values())
    assert np.median([row.fit.residual.median for row in rows]) < 1.0  # a busy machine doubles times, no more
