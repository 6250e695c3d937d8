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
    model = get_model(MODELS[0])
    batch, optimizer = random_batch(model, 4, classes=16), optax.sgd(0.5)
    ends = []
    for microbatches in (1, 2):
        params = noise(model)
        state = optimizer.init(params)
        step = training_step(hand_written_loss(model), optimizer, microbatches)
        for _ in range(2):
            params, state, loss = step(params, state, batch)
        ends.append((jax.tree.leaves(params), float(loss)))
    for whole, parts in zip(ends[0][0], ends[1][0], strict=True):
        np.testing.assert_allclose(whole, parts, atol=2e-6)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)


def test_a_model_without_a_hand_written_form_is_named() -> None:
    with pytest.raises(ValueError, match="two-tower-small"):
        hand_written_loss(get_model("two-tower-small"))
