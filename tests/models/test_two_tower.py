"""Two towers that share nothing but their product."""

import jax
import jax.numpy as jnp
import numpy as np

from meshwright.models.zoo import get_model
from tests.models.training import losses_of_steps, random_batch

TINY = "two-tower:layers=2,hidden=32,heads=4,seq=8,vocab=16,features=12"


def test_it_learns() -> None:
    model = get_model(TINY)
    losses = losses_of_steps(model, random_batch(model, 8, 16), steps=10, rate=0.3)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0]


def test_each_tower_sees_its_own_input_only() -> None:
    """With the text tower silenced (its last norm at 0), the rating is 0 whatever the features are."""
    model = get_model(TINY)
    params, batch = model.init_fn(jax.random.key(0)), random_batch(model, 4, 16)
    params["text"]["final_norm"]["scale"] = jnp.zeros(32)
    assert float(model.loss_fn(params, batch)) == float(jnp.mean(batch["ratings"] ** 2))


def test_attention_reads_the_text_in_both_directions() -> None:
    """A change of the last token is seen through the first: mean over tokens alone would not tell order apart."""
    model = get_model(TINY)
    params, batch = model.init_fn(jax.random.key(0)), random_batch(model, 4, 16)
    reversed_text = {**batch, "tokens": batch["tokens"][:, ::-1]}
    assert float(model.loss_fn(params, batch)) != float(model.loss_fn(params, reversed_text))
