"""Jobs in their order, and how they share the time."""

import pytest

from experiments.gpu.cases import MOST_CALIBRATE_SECONDS, PHASES, PREPARE, Case, Job, jobs_of, limit_seconds
from meshwright.models.zoo import get_model


def test_the_machine_file_comes_before_what_reads_it() -> None:
    phases = [job.phase for job in jobs_of(PHASES, tiny=False)]
    assert phases[:2] == [PREPARE, "calibrate"]
    assert set(phases) == {PREPARE, *PHASES}


def test_what_plans_nothing_needs_no_preparation() -> None:
    assert PREPARE not in {job.phase for job in jobs_of(("calibrate", "mfu"), tiny=False)}


def test_every_model_is_in_the_zoo_and_its_plain_form_too() -> None:
    for tiny in (False, True):
        jobs = jobs_of(PHASES, tiny)
        trained = {job.case.model for job in jobs if job.phase == "train" and job.case}
        assert all(get_model(model).name == model for model in trained)
        assert trained == {job.case.model for job in jobs if (job.phase, job.variant) == ("mfu", "xla") and job.case}


def test_names_tell_jobs_apart() -> None:
    names = [job.name for job in jobs_of(PHASES, tiny=False)]
    assert len(set(names)) == len(names)
    assert "mfu gpt-125m:dtype=bf16 cudnn" in names


def job(phase: str, weight: float) -> Job:
    return Job(phase, Case("gpt-125m", 1), weight)


def test_calibration_gets_its_fair_share_others_may_take_three_times_theirs() -> None:
    """Of 100 s, with weights 1 : 9."""
    later = (job("mfu", 9),)
    assert limit_seconds(job("calibrate", 1), later, 100) == pytest.approx(10)
    assert limit_seconds(job("train", 1), later, 100) == pytest.approx(30)
    assert limit_seconds(job("calibrate", 1), later, 1e6) == MOST_CALIBRATE_SECONDS


def test_the_last_job_may_use_all_that_is_left() -> None:
    assert limit_seconds(job("train", 1), (), 100) == 100
