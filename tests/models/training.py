"""What the tests of all models share: a batch of noise and a few steps of plain gradient descent."""

from typing import Any

import jax
import jax.numpy as jnp

from meshwright.models.base import Model


def random_batch(model: Model, size: int, classes: int, seed: int = 1) -> Any:
    """A batch as the model wants it: whole numbers below ``classes``, normal numbers elsewhere."""

    def draw(number: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.key(seed + number)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.random.randint(key, leaf.shape, 0, classes, leaf.dtype)
        return jax.random.normal(key, leaf.shape, leaf.dtype)

    leaves, tree = jax.tree.flatten(model.batch_fn(size))
    return jax.tree.unflatten(tree, [draw(number, leaf) for number, leaf in enumerate(leaves)])


def losses_of_steps(model: Model, batch: Any, steps: int, rate: float) -> list[float]:
    """Loss before each of ``steps`` steps on the same batch."""

    @jax.jit
    def step(params: Any) -> tuple[jax.Array, Any]:
        loss, gradient = jax.value_and_grad(model.loss_fn)(params, batch)
        return loss, jax.tree.map(lambda p, g: p - rate * g, params, gradient)

    params, losses = model.init_fn(jax.random.key(0)), []
    for _ in range(steps):
        loss, params = step(params)
        losses.append(float(loss))
    return losses
