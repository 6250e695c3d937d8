"""Two towers that share nothing but their product."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models import two_tower
from tests.models.training import compiled, drawn, losses_of_steps, random_batch

TINY = two_tower.TwoTowerConfig(layers=2, hidden=32, heads=4, seq=8, vocab=16, features=12)
MODEL = two_tower.build(TINY, "tiny")


def test_it_learns() -> None:
    losses = losses_of_steps(MODEL, drawn(two_tower.weights(TINY)), random_batch(MODEL, 8, 16), steps=10, rate=0.3)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0]


def test_the_towers_meet_in_a_product_alone() -> None:
    """With either tower silenced (its last norm at 0) every rating is 0, whatever the other one reads."""
    params, batch = drawn(two_tower.weights(TINY)), random_batch(MODEL, 4, 16)
    ratings = compiled(partial(two_tower.ratings, TINY))
    assert jnp.abs(ratings(params, batch)).min() > 0
    for tower in ("text", "features"):
        silent = {**params[tower], "final_norm": {"scale": jnp.zeros(32), "bias": jnp.zeros(32)}}
        np.testing.assert_array_equal(ratings({**params, tower: silent}, batch), 0)


def test_the_text_is_read_in_both_directions() -> None:
    """Without positions, attention that saw the past alone would tell a text from its reverse; ours does not."""
    params, batch = drawn(two_tower.weights(TINY)), random_batch(MODEL, 4, 16)
    params["text"]["embedding"]["positions"] = jnp.zeros((TINY.seq, TINY.hidden))
    loss = compiled(MODEL.loss_fn)
    backwards = {**batch, "tokens": batch["tokens"][:, ::-1]}
    assert float(loss(params, backwards)) == pytest.approx(float(loss(params, batch)), rel=1e-6)
