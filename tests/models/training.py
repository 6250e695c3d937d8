"""What the tests of all models share: parameters and batches of noise, and a few steps of plain gradient descent.

Noise comes from NumPy and programs are compiled without optimisation: these models are tiny, compiling them is not.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshwright.models.base import Model, PyTree
from meshwright.models.parameters import Weight

compiled: Callable[..., Any] = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def drawn(weights: PyTree, seed: int = 0) -> PyTree:
    """Parameters that start as ``weights`` say, by another generator than ``initialize`` (which test_zoo looks at)."""
    rng = np.random.default_rng(seed)

    def draw(weight: Weight) -> jax.Array:
        return jnp.asarray(weight.mean + weight.std * rng.normal(size=weight.shape), jnp.float32)

    return jax.tree.map(draw, weights)


def random_batch(model: Model, size: int, classes: int, seed: int = 1) -> PyTree:
    """A batch as the model wants it: whole numbers below ``classes``, normal numbers elsewhere."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        whole = jnp.issubdtype(leaf.dtype, jnp.integer)
        return jnp.asarray(rng.integers(0, classes, leaf.shape) if whole else rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, model.batch_fn(size))


@cache
def value_and_gradient(model: Model) -> Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]:
    """The compiled loss and gradient of a model, made once for all tests that ask."""
    return compiled(jax.value_and_grad(model.loss_fn))  # type: ignore[no-any-return]


def losses_of_steps(model: Model, params: PyTree, batch: PyTree, steps: int, rate: float) -> list[float]:
    """Loss before each of ``steps`` steps on the same batch."""
    losses = []
    for _ in range(steps):
        loss, gradient = value_and_gradient(model)(params, batch)
        params = jax.tree.map(lambda p, g: np.asarray(p) - rate * np.asarray(g), params, gradient)
        losses.append(float(loss))
    return losses
