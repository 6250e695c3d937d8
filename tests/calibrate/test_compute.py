"""The compute benchmarks run on whichever device is here, within their time."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.calibrate import compute
from meshwright.calibrate.benchmarks import Case, Program, program_of, random_array
from meshwright.calibrate.compute import measure_compute
from meshwright.calibrate.timing import ARGUMENT, DISPATCH, LAUNCH, Measured


def test_a_small_budget_still_sees_two_sizes_of_every_family() -> None:
    told: list[tuple[float, str]] = []
    start = time.perf_counter()
    found = measure_compute(2.0, lambda done, text: told.append((done, text)))
    assert time.perf_counter() - start < 30  # generous: the machine may be busy with others
    for family in ("matmul f32", "matmul bf16", "matmul f16", "memory add"):
        assert len({taken.amount for taken in found.timings if taken.family == family}) >= 2
    assert sum(taken.family in (DISPATCH, ARGUMENT, LAUNCH) for taken in found.timings) == 3
    assert all(0 <= taken.low_seconds <= taken.seconds <= taken.high_seconds for taken in found.timings)
    assert all(0 <= done <= 1 for done, _ in told)
    assert found.memory_bytes > 0


def test_inputs_are_random_and_never_zero_arrays() -> None:
    array = np.asarray(random_array((64, 64), jnp.dtype(jnp.bfloat16)), np.float32)
    assert 0.8 < array.std() < 1.2


def test_what_a_device_does_not_run_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: Case) -> Program:
        if case.family.startswith("attention") or case.shape == (1, 512, 512, 512):
            raise RuntimeError(f"no kernel for {case}\nand a long trace")
        return program_of(case)

    monkeypatch.setattr(compute, "program_of", refuse)
    kept: list[Measured] = []
    found = measure_compute(12.0, lambda done, text: None, keep=kept.append)
    assert not any(taken.family.startswith("attention") for taken in found.timings)
    assert all("no kernel for" in text and "\n" not in text for text in found.skipped)
    assert any(taken.family == "matmul f32" for taken in found.timings)
    again = measure_compute(0.1, lambda done, text: None, known=kept)
    assert {taken.family for taken in again.timings} == {taken.family for taken in found.timings}


def test_a_needed_family_that_does_not_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: Case) -> Program:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(compute, "program_of", refuse)
    with pytest.raises(RuntimeError, match="no kernel"):
        measure_compute(1.0, lambda done, text: None)
