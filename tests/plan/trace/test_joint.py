"""Layers differentiated one by one, chained by hand, are the gradient of the whole model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models.base import Model, PyTree
from meshwright.models.zoo import get_model
from meshwright.plan.graph import LayerGraph
from meshwright.plan.trace.model import Trace, trace
from tests.models.training import compiled
from tests.plan.chain import TINY, chained, inputs_of, traced, values_of

WIDTH = 8


def chain_model(
    block: Callable[[Any, Any], Any], weights: Callable[[], PyTree], blocks: int = 3, has_aux: bool = False
) -> Model:
    """``blocks`` blocks, each with weights of its own, under a squared error."""

    def loss(params: PyTree, batch: PyTree) -> Any:
        x = batch["x"]
        for layer in params:
            x = block(layer, x)
        error = ((x - batch["y"]) ** 2).mean()
        return (error, {"largest": jnp.abs(x).max(), "hits": (x > 0).sum()}) if has_aux else error

    def batch_of(n: int) -> PyTree:
        row = jax.ShapeDtypeStruct((n, WIDTH), jnp.float32)
        return {"x": row, "y": row}

    return Model("chain", loss, lambda key: [weights() for _ in range(blocks)], batch_of, has_aux=has_aux)


def square() -> PyTree:
    return {"w": jnp.zeros((WIDTH, WIDTH)), "v": jnp.zeros((WIDTH, WIDTH))}


def plain(p: PyTree, x: Any) -> Any:
    return x + jnp.tanh(x @ p["w"]) @ p["v"]


@jax.custom_vjp
def twice_the_slope(x: Any) -> Any:
    return jnp.sin(x)


twice_the_slope.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))


@jax.custom_jvp
def thrice_the_slope(x: Any) -> Any:
    return jnp.sin(x)


thrice_the_slope.defjvps(lambda t, ans, x: 3 * t * jnp.cos(x))


def stopped(p: PyTree, x: Any) -> Any:
    return x @ p["w"] + jax.lax.stop_gradient(x) @ p["v"] + jax.lax.stop_gradient(p["w"]).sum()


def branched(p: PyTree, x: Any) -> Any:
    left, right = jnp.split(x @ p["w"], 2, axis=1)
    return jnp.concatenate([left * right, right], axis=1) @ p["v"]


BLOCKS: dict[str, Callable[[Any, Any], Any]] = {
    "plain": plain,
    "custom_vjp": lambda p, x: twice_the_slope(x @ p["w"]) @ p["v"],
    "custom_jvp": lambda p, x: thrice_the_slope(x @ p["w"]) @ p["v"],
    "checkpoint": lambda p, x: jax.checkpoint(plain)(p, x),
    "jit": lambda p, x: jax.jit(plain)(p, x),
    "stop_gradient": stopped,
    "branched": branched,
    "bfloat16": lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32) @ p["v"],
    "relu": lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"],
    "scan": lambda p, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, length=2)[0] @ p["v"],
    "vmap": lambda p, x: jax.vmap(lambda row: row @ p["w"])(x) @ p["v"],
}


def assert_gradient(found: Trace, loss: Any, gradients: list[Any], params: PyTree, batch: PyTree) -> None:
    """Equal to ``jax.value_and_grad``, to float32 rounding; leaves without a gradient have none there."""
    model = found.model
    right, wanted = compiled(jax.value_and_grad(model.loss_fn, has_aux=model.has_aux))(params, batch)
    np.testing.assert_allclose(loss, right[0] if model.has_aux else right, rtol=1e-6)
    for leaf, mine, other in zip(found.graph.parameters, gradients, jax.tree.leaves(wanted), strict=True):
        if mine is None:
            assert not np.any(other), f"{leaf.name} has a gradient that the layers lack"
        else:
            scale = float(np.abs(other).max())
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5 * scale + 1e-12, err_msg=leaf.name)


@pytest.mark.parametrize("name", TINY)
def test_chained_layers_equal_the_gradient_of_the_zoo(name: str) -> None:
    found = traced(name)
    loss, gradients, _ = values_of(name)
    assert len(found.graph.layers) > 1
    assert_gradient(found, loss, gradients, *inputs_of(found.model))


@pytest.mark.parametrize("kind", BLOCKS)
def test_chained_layers_equal_the_gradient_whatever_the_blocks_are_made_of(kind: str) -> None:
    model = chain_model(BLOCKS[kind], square)
    found = trace(model, 4, 1)
    params, batch = inputs_of(model)
    loss, gradients, _ = compiled(lambda p, b: chained(found, p, b))(jax.tree.leaves(params), jax.tree.leaves(batch))
    assert_gradient(found, loss, gradients, params, batch)


def test_weights_used_in_several_layers_gather_all_their_gradients() -> None:
    def loss(params: PyTree, batch: PyTree) -> Any:
        x = batch["x"]
        for _ in range(3):
            x = plain(params, x)
        return ((x - batch["y"]) ** 2).mean()

    base = chain_model(plain, square)
    model = Model("tied", loss, lambda key: square(), base.batch_fn)
    found = trace(model, 4, 1)
    users = [sum(leaf in use.parameters for use in found.graph.layers) for leaf in range(2)]
    assert max(users) > 1
    params, batch = inputs_of(model)
    value, gradients, _ = compiled(lambda p, b: chained(found, p, b))(jax.tree.leaves(params), jax.tree.leaves(batch))
    assert_gradient(found, value, gradients, params, batch)


def test_auxiliary_values_come_along() -> None:
    model = chain_model(plain, square, has_aux=True)
    found = trace(model, 4, 1)
    params, batch = inputs_of(model)
    loss, gradients, values = compiled(lambda p, b: chained(found, p, b))(
        jax.tree.leaves(params), jax.tree.leaves(batch)
    )
    assert_gradient(found, loss, gradients, params, batch)
    written = {
        v: env[inner]
        for use, env in zip(found.graph.layers, values, strict=True)
        for v, inner in zip(use.exits, found.classes[use.layer_class].graph.exits, strict=True)
    }
    aux = jax.tree.unflatten(found.aux_tree, [written[v] for v in found.graph.aux])
    np.testing.assert_allclose(aux["largest"], model.loss_fn(params, batch)[1]["largest"], rtol=1e-6)
    assert aux["hits"] == model.loss_fn(params, batch)[1]["hits"]


def made_of_parameters(graph: LayerGraph) -> set[int]:
    """Forward values that depend on parameters alone and are computed without a product: casts, views, sums."""
    values = set(graph.parameters)
    for op in graph.operators:
        if op.phase == "forward" and not op.heavy and values.issuperset(op.inputs):
            values.update(op.outputs)
    return values


@pytest.mark.parametrize("spec", [*TINY.values(), "gpt:layers=2,hidden=16,heads=2,seq=8,vocab=32,dtype=bf16"])
def test_neither_weights_nor_their_casts_are_kept_for_the_backward_pass(spec: str) -> None:
    for joint in trace(get_model(spec), 4, 1).classes:
        graph = joint.graph
        assert not made_of_parameters(graph).intersection(graph.residuals)
        assert not {*graph.batch, *graph.entries}.intersection(graph.residuals)
        assert set(graph.kept_entries) <= set(graph.entries)


@pytest.mark.parametrize("name", TINY)
def test_every_value_is_written_once_and_before_it_is_read(name: str) -> None:
    for joint in traced(name).classes:
        graph = joint.graph
        known = {*graph.parameters, *graph.batch, *graph.entries}
        backward = False
        for op, eqn in zip(graph.operators, (*joint.forward, *joint.backward), strict=True):
            if op.phase == "backward" and not backward:
                backward = True
                known = {*graph.parameters, *graph.batch, *graph.kept_entries, *graph.residuals}
                known |= {v for v in graph.exit_cotangents if v >= 0}
            assert op.inputs == eqn.reads
            assert op.outputs == eqn.outputs
            assert known.issuperset(op.inputs)
            assert not known.intersection(op.outputs)
            known.update(op.outputs)
        assert known.issuperset(v for v in (*graph.gradients, *graph.entry_cotangents) if v >= 0)
