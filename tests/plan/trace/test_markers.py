"""Layers that the model marks itself, and marks that change nothing else."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from meshwright.models.base import Model
from meshwright.plan.trace.markers import mark_layer
from meshwright.plan.trace.model import trace

WIDTHS = (8, 16, 8, 16, 8, 4)


def init(key: jax.Array) -> list[jax.Array]:
    return [jax.random.normal(key, shape) for shape in pairwise(WIDTHS)]


def model_with_marks_after(marked: set[int]) -> Model:
    def loss(params: list[jax.Array], batch: jax.Array) -> jax.Array:
        x = batch
        for index, weight in enumerate(params):
            x = jnp.tanh(x @ weight)
            if index in marked:
                x = mark_layer(x)
        return jnp.mean(x**2)

    return Model("marked", loss, init, lambda n: jax.ShapeDtypeStruct((n, WIDTHS[0]), jnp.float32))


def test_the_layers_end_at_the_marks() -> None:
    graph = trace(model_with_marks_after({0, 3}), 8, 2).graph
    assert [len(use.parameters) for use in graph.layers] == [1, 3, 1]
    assert not graph.unknown, "a mark is split like any elementwise operator"


def test_marks_change_neither_loss_nor_gradient() -> None:
    plain, marked = model_with_marks_after(set()), model_with_marks_after({1, 2})
    params = init(jax.random.key(0))
    batch = jax.random.normal(jax.random.key(1), (4, WIDTHS[0]))
    for run in (jax.value_and_grad, lambda loss: jax.jit(jax.value_and_grad(loss))):
        value, gradients = run(marked.loss_fn)(params, batch)
        wanted, wanted_gradients = run(plain.loss_fn)(params, batch)
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradients, wanted_gradients)


def test_trees_are_marked_leaf_by_leaf_under_vmap_too() -> None:
    tree = {"x": jnp.arange(6.0).reshape(2, 3), "y": jnp.ones(2)}
    marked = jax.vmap(mark_layer)(tree)
    jax.tree.map(np.testing.assert_array_equal, marked, tree)
