"""The GPT predicts the next token from the past alone, and learns."""

from dataclasses import replace
from functools import partial
from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models import gpt, transformer
from meshwright.models.parameters import count
from meshwright.models.zoo import get_model
from tests.models.training import compiled, drawn, losses_of_steps, random_batch

TINY = gpt.GPTConfig(layers=2, hidden=32, heads=4, seq=16, vocab=64)


def test_an_untrained_model_is_as_unsure_as_a_die_with_a_face_per_word() -> None:
    config = gpt.GPTConfig(layers=2, hidden=64, heads=4, seq=32, vocab=1000)
    model = gpt.build(config, "tiny")
    loss = compiled(model.loss_fn)(drawn(gpt.weights(config)), random_batch(model, 4, 1000))
    assert float(loss) == pytest.approx(log(1000), rel=0.02)


def test_a_token_changes_no_score_before_its_own() -> None:
    """Row 0 is a text; row 1 + t the same text with token t changed: their scores part exactly at t."""
    text = np.random.default_rng(1).integers(0, TINY.vocab - 1, TINY.seq)
    texts = np.stack([text, *(text + np.eye(TINY.seq, dtype=int))]).astype(np.int32)
    scores = np.asarray(compiled(partial(gpt.logits, TINY))(drawn(gpt.weights(TINY)), texts))
    differs = np.any(scores[1:] != scores[0], axis=-1)
    np.testing.assert_array_equal(differs, np.triu(np.ones((TINY.seq, TINY.seq), bool)))


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_falls_on_a_batch_it_sees_again(tied: bool) -> None:
    config = replace(TINY, tied=tied)
    model = gpt.build(config, "tiny")
    losses = losses_of_steps(model, drawn(gpt.weights(config)), random_batch(model, 4, 64), steps=12, rate=0.05)
    assert losses[-1] < losses[0] - 0.2
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_low_precision_agrees_with_float32_and_gradients_are_finite_float32(dtype: str) -> None:
    low, full = (gpt.build(replace(TINY, dtype=name), name) for name in (dtype, "f32"))
    params, batch = drawn(gpt.weights(TINY)), random_batch(full, 2, 64)
    loss, gradient = compiled(jax.value_and_grad(low.loss_fn))(params, batch)
    assert float(loss) == pytest.approx(float(compiled(full.loss_fn)(params, batch)), rel=5e-3)
    assert all(leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_mean_loss_of_two_halves_is_the_loss_of_the_whole() -> None:
    model = gpt.build(TINY, "tiny")
    params, batch, loss = drawn(gpt.weights(TINY)), random_batch(model, 4, 64), compiled(model.loss_fn)
    halves = [loss(params, {k: v[rows] for k, v in batch.items()}) for rows in (slice(0, 2), slice(2, 4))]
    assert float(sum(halves) / 2) == pytest.approx(float(loss(params, batch)), rel=1e-6)


@pytest.mark.parametrize(("layers", "hidden", "vocab", "seq"), [(2, 32, 64, 16), (96, 12288, 51200, 2048)])
def test_the_parameter_count_is_that_of_narayanan_and_the_last_norm(
    layers: int, hidden: int, vocab: int, seq: int
) -> None:
    """P = 12 l h^2 (1 + 13 / 12h + (V + s) / 12 l h), and 2 h for the norm before the head."""
    config = gpt.GPTConfig(layers=layers, hidden=hidden, heads=4, seq=seq, vocab=vocab)
    published = 12 * layers * hidden**2 + 13 * layers * hidden + (vocab + seq) * hidden
    assert count(gpt.weights(config)) == published + 2 * hidden


def test_a_token_number_outside_the_vocabulary_is_clipped() -> None:
    tokens = jnp.array([[0, TINY.vocab - 1], [-3, TINY.vocab + 5]])
    rows = transformer.take_rows(jnp.arange(TINY.vocab)[:, None], tokens)
    assert rows[:, :, 0].tolist() == [[0, TINY.vocab - 1], [0, TINY.vocab - 1]]


def test_tracing_the_largest_measured_model_makes_no_array() -> None:
    model = get_model("gpt-39b")
    before = len(jax.live_arrays())
    params = jax.eval_shape(model.init_fn, jax.eval_shape(lambda: jax.random.key(0)))
    jaxpr = jax.make_jaxpr(model.loss_fn)(params, model.batch_fn(8))
    assert jaxpr.out_avals[0].shape == ()
    assert len(jax.live_arrays()) == before
