"""Alpa's logged searches: read, ordered, and predicted by the stock planner and simulator."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.rivals import alpa
from experiments.rivals.alpa import Run

LOG = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "alpa" / "v100_32gb_gpt_search_summary.csv"
needs_data = pytest.mark.skipif(not LOG.exists(), reason="Alpa's search log is not beside us")

_SMALL = Run(2, 256, 4, 32, 1, ((1, 1), (1, 1)), 1.0, 1.0)


def test_a_log_is_read_by_its_number_of_gpus(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        "gpus,hidden,layers,global_batch,num_micro_batches,logical_meshes,predicted_iter_s,measured_iter_s\n"
        '8,64,2,16,4,"[(4, 1), (2, 2)]",1.5,2.5\n'
        '8,64,2,16,4,"[(8, 1)]",9,9\n'
        '16,64,2,16,4,"[(16, 1)]",9,9\n'
    )
    assert alpa.read_runs(path, 8) == [Run(8, 64, 2, 16, 4, ((4, 1), (2, 2)), 1.5, 2.5)]


def test_runs_are_ordered_by_the_seconds_given() -> None:
    runs = [replace(_SMALL, microbatches=count) for count in (1, 2, 4)]
    assert alpa.order(runs, [3.0, 1.0, 2.0]) == [2, 4, 1]


def test_two_stages_are_faster_with_four_micro_batches_than_with_one() -> None:
    """One micro-batch keeps one of two stages idle; four keep each idle for a fifth of the time."""
    one, four = (alpa.our_seconds(replace(_SMALL, microbatches=count, batch=2048)) for count in (1, 4))
    assert 1.2 < one / four < 1.6 + 0.1  # 2 · 4 / 5 where nothing else counts


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "expected"), [(16, [64, 32, 128, 256]), (8, [64, 128, 256])])
def test_runs_are_predicted_in_the_order_in_which_they_were_measured(gpus: int, expected: list[int]) -> None:
    """Alpa put 128 micro-batches first for GPT-6.7B on 16 GPUs, and lost 1.56×."""
    runs = alpa.read_runs(LOG, gpus)
    measured = alpa.order(runs, [run.measured_seconds for run in runs])
    assert measured == expected
    assert alpa.order(runs, [alpa.our_seconds(run) for run in runs]) == measured
