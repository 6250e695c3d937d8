"""Random numbers by address: the published vectors of the generator, and moments of what is made from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.draws import DEVICE, TASK, Sampled, check_samples, lognormal, normals, philox, uniforms

VECTORS = [  # counter, key, answer: the known answers that accompany Salmon et al. 2011
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), VECTORS)
def test_the_generator_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    words = [np.uint64(int(word, 16)) for word in f"{counter} {key}".split()]
    assert " ".join(f"{int(word):08x}" for word in philox(*words)) == answer


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 2**32 - 1))
def test_uniform_numbers_are_inside_the_open_interval_and_depend_on_every_part_of_the_address(
    seed: int, sample: int, index: int
) -> None:
    here = uniforms(np.uint64(seed), sample, TASK, index)
    assert all(0 < number < 1 for number in here)
    assert here == uniforms(np.uint64(seed), sample, TASK, index)
    others = [
        uniforms(np.uint64(seed ^ 2**63), sample, TASK, index),
        uniforms(np.uint64(seed), sample + 2**33, TASK, index),
        uniforms(np.uint64(seed), sample, DEVICE, index),
        uniforms(np.uint64(seed), sample, TASK, index ^ 1),
    ]
    assert len({here, *others}) == 5


def test_normal_numbers_have_the_moments_of_a_normal_and_no_correlation() -> None:
    count = 40_000
    pairs = np.array([normals(np.uint64(1), k % 200, TASK, k // 200) for k in range(count)])
    error = 1 / np.sqrt(count)
    assert np.abs(pairs.mean(axis=0)).max() < 4 * error
    assert np.abs((pairs**2).mean(axis=0) - 1).max() < 4 * np.sqrt(2) * error
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 4 * error
    assert abs((pairs[1:, 0] * pairs[:-1, 0]).mean()) < 4 * error


def test_jitter_has_mean_one_and_none_is_exactly_one() -> None:
    numbers = [normals(np.uint64(2), k, TASK, 0)[0] for k in range(20_000)]
    factors = np.array([lognormal(0.4, number) for number in numbers])
    assert abs(factors.mean() - 1) < 4 * factors.std() / np.sqrt(len(factors))
    assert {lognormal(0.0, number) for number in numbers[:100]} == {1.0}


def test_samples_know_their_mean_spread_and_quantiles() -> None:
    sampled = Sampled(seconds=np.arange(11.0)[::-1])
    assert (sampled.mean_seconds, sampled.low_seconds, sampled.high_seconds) == (5, 1, 9)
    assert sampled.quantile(0.25) == 2.5
    assert sampled.std_seconds == pytest.approx(np.sqrt(11))
    assert sampled.standard_error_seconds == pytest.approx(1)
    assert Sampled(seconds=np.ones(1)).standard_error_seconds == 0
    with pytest.raises(ScheduleError, match=r"quantile is 1\.5"):
        sampled.quantile(1.5)


@pytest.mark.parametrize(("samples", "seed", "words"), [(0, 0, "0 samples"), (10**8, 0, "10000000"), (1, -1, "seed")])
def test_absurd_numbers_of_samples_and_seeds_are_refused(samples: int, seed: int, words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        check_samples(samples, seed)
