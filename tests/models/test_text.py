"""Batches of text are the same on every rank, in every run, from any step."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from meshwright.errors import ModelError
from meshwright.models.text import batch_at, byte_batches, read_text, stdlib_text

ALPHABET = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)


def test_the_standard_library_gives_as_many_bytes_as_asked() -> None:
    assert len(stdlib_text(100_000)) == 100_000
    assert b"import" in stdlib_text(100_000).tobytes()
    np.testing.assert_array_equal(stdlib_text(100_000)[:500], stdlib_text(500))


def test_targets_are_the_tokens_one_byte_on() -> None:
    batch = batch_at(0, seq=5, batch=100, seed=0, text=ALPHABET)
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
    assert batch["tokens"].shape == (100, 5)
    assert set(batch["tokens"][:, 0]) == set(ALPHABET[:21])  # every window, the last included, is drawn


def test_a_run_resumes_where_it_stopped() -> None:
    whole = list(islice(byte_batches(8, 2, 3, text=ALPHABET), 6))
    rest = list(islice(byte_batches(8, 2, 3, first_step=4, text=ALPHABET), 2))
    for old, new in zip(whole[4:], rest, strict=True):
        np.testing.assert_array_equal(old["tokens"], new["tokens"])


def test_steps_and_seeds_give_other_batches() -> None:
    text = stdlib_text(10_000)
    batches = [batch_at(step, seq=16, batch=4, seed=seed, text=text)["tokens"] for step in (0, 1) for seed in (0, 1)]
    assert len({batch.tobytes() for batch in batches}) == 4


def test_a_file_is_mapped_not_read(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(ALPHABET.tobytes())
    text = read_text(tmp_path / "text.txt")
    assert isinstance(text, np.memmap)
    same = batch_at(2, seq=4, batch=2, seed=1, text=ALPHABET)
    np.testing.assert_array_equal(batch_at(2, seq=4, batch=2, seed=1, text=text)["tokens"], same["tokens"])


def test_a_text_shorter_than_a_window_says_how_long_it_may_be() -> None:
    with pytest.raises(ModelError, match="use seq=25 or less"):
        batch_at(0, seq=26, batch=1, seed=0, text=ALPHABET)
    assert batch_at(0, seq=25, batch=1, seed=0, text=ALPHABET)["tokens"].shape == (1, 25)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.txt is not a file with text"):
        read_text(tmp_path / "nowhere.txt")
