"""The models written by hand are the zoo's: equal losses, and equal steps of training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.gpu.baselines import hand_written_loss, training_step
from meshwright.models.base import Model, PyTree
from meshwright.models.zoo import get_model
from tests.models.training import compiled, random_batch

MODELS = (
    "gpt:layers=1,hidden=32,heads=4,seq=16,vocab=64",
    "gpt:layers=1,hidden=32,heads=2,seq=16,vocab=64,tied=false",
    "moe:layers=2,hidden=16,heads=2,experts=4,seq=16,vocab=64,ffn=2,group=32",
    "wresnet:layers=14,channels=8,width=2,image=32,classes=16,norm=microbatch",
)


def noise(model: Model) -> PyTree:
    """Parameters of noise, so that no term hides behind a scale or bias that starts at 0 or 1."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init_fn, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("spec", MODELS)
def test_the_loss_is_the_zoos(spec: str) -> None:
    model = get_model(spec)
    params, batch = noise(model), random_batch(model, 4, classes=16)
    wanted = float(compiled(model.loss_fn)(params, batch))
    assert float(compiled(hand_written_loss(model))(params, batch)) == pytest.approx(wanted, rel=1e-5)


def test_micro_batches_give_the_step_of_the_whole_batch() -> None:
    """Two steps by halves of the batch move the parameters as two by the whole."""

    def loss(weights: jax.Array, batch: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(batch @ weights) - batch) ** 2)

    rng = np.random.default_rng(0)
    first, batch = rng.normal(size=(3, 3)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)
    ends = []
    for microbatches in (1, 2):
        optimizer = optax.adamw(0.1)
        weights = jnp.asarray(first)
        state = optimizer.init(weights)
        step = training_step(loss, optimizer, microbatches)
        for _ in range(2):
            weights, state, value = step(weights, state, batch)
        ends.append((np.asarray(weights), float(value)))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-4)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)


def test_a_model_without_a_hand_written_form_is_named() -> None:
    with pytest.raises(ValueError, match="two-tower-small"):
        hand_written_loss(get_model("two-tower-small"))
