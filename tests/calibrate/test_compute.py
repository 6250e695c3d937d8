"""The compute benchmarks run on whichever device is here, within their time."""

import time

import jax.numpy as jnp
import numpy as np

from meshwright.calibrate.compute import measure_compute, random_array
from meshwright.calibrate.timing import ARGUMENT, DISPATCH, LAUNCH


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
