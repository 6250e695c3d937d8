"""The GPT predicts the next token from the past alone, and learns."""

from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models import gpt
from meshwright.models.parameters import count
from meshwright.models.zoo import get_model
from tests.models.training import losses_of_steps, random_batch

TINY = gpt.GPTConfig(layers=2, hidden=32, heads=4, seq=16, vocab=64)


def test_an_untrained_model_is_as_unsure_as_a_die_with_a_face_per_word() -> None:
    model = gpt.build(gpt.GPTConfig(layers=2, hidden=64, heads=4, seq=32, vocab=1000), "tiny")
    loss = model.loss_fn(model.init_fn(jax.random.key(0)), random_batch(model, 4, 1000))
    assert float(loss) == pytest.approx(log(1000), rel=0.02)


@pytest.mark.parametrize("changed", [0, 7, 15])
def test_a_token_changes_no_score_before_its_own(changed: int) -> None:
    params = gpt.build(TINY, "tiny").init_fn(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, TINY.seq), 0, TINY.vocab)
    before = gpt.logits(TINY, params, tokens)
    after = gpt.logits(TINY, params, tokens.at[0, changed].add(1) % TINY.vocab)
    differs = np.any(np.asarray(before != after)[0], axis=-1)
    assert not differs[:changed].any()
    assert differs[changed:].all()


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_falls_on_a_batch_it_sees_again(tied: bool) -> None:
    model = get_model(f"gpt:layers=2,hidden=32,heads=4,seq=16,vocab=64,tied={str(tied).lower()}")
    losses = losses_of_steps(model, random_batch(model, 4, 64), steps=8, rate=0.5)
    assert losses[-1] < losses[0] - 0.2
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_low_precision_agrees_with_float32_and_gradients_are_finite_float32(dtype: str) -> None:
    spec = "gpt:layers=2,hidden=32,heads=4,seq=16,vocab=64,dtype="
    low, full = get_model(spec + dtype), get_model(spec + "f32")
    params, batch = full.init_fn(jax.random.key(0)), random_batch(full, 2, 64)
    loss, gradient = jax.value_and_grad(low.loss_fn)(params, batch)
    assert float(loss) == pytest.approx(float(full.loss_fn(params, batch)), rel=5e-3)
    assert all(leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_mean_loss_of_two_halves_is_the_loss_of_the_whole() -> None:
    model = gpt.build(TINY, "tiny")
    params, batch = model.init_fn(jax.random.key(0)), random_batch(model, 4, 64)
    halves = [model.loss_fn(params, {k: v[rows] for k, v in batch.items()}) for rows in (slice(0, 2), slice(2, 4))]
    assert float(sum(halves) / 2) == pytest.approx(float(model.loss_fn(params, batch)), rel=1e-6)


@pytest.mark.parametrize(("layers", "hidden", "vocab", "seq"), [(2, 32, 64, 16), (96, 12288, 51200, 2048)])
def test_the_parameter_count_is_that_of_narayanan_and_the_last_norm(
    layers: int, hidden: int, vocab: int, seq: int
) -> None:
    """P = 12 l h^2 (1 + 13 / 12h + (V + s) / 12 l h), and 2 h for the norm before the head."""
    config = gpt.GPTConfig(layers=layers, hidden=hidden, heads=4, seq=seq, vocab=vocab)
    published = 12 * layers * hidden**2 + 13 * layers * hidden + (vocab + seq) * hidden
    assert count(gpt.weights(config)) == published + 2 * hidden


def test_a_token_number_outside_the_vocabulary_is_clipped() -> None:
    params = gpt.build(TINY, "tiny").init_fn(jax.random.key(0))
    last, beyond = (jnp.full((1, TINY.seq), token) for token in (TINY.vocab - 1, TINY.vocab + 5))
    np.testing.assert_array_equal(gpt.logits(TINY, params, last), gpt.logits(TINY, params, beyond))


def test_tracing_the_largest_measured_model_makes_no_array() -> None:
    model = get_model("gpt-39b")
    before = len(jax.live_arrays())
    params = jax.eval_shape(model.init_fn, jax.eval_shape(lambda: jax.random.key(0)))
    jaxpr = jax.make_jaxpr(model.loss_fn)(params, model.batch_fn(8))
    assert jaxpr.out_avals[0].shape == ()
    assert len(jax.live_arrays()) == before
