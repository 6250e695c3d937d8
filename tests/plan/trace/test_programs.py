"""Programs as users write them: libraries, loops, branches, checkpoints, random numbers. All trace; costs are known."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from jax import lax

from meshwright.models.base import Model, PyTree
from meshwright.plan.graph import UNSPLIT, ModelGraph, Tensor
from meshwright.plan.rules import operator_flops, operator_kind, rule_of
from meshwright.plan.trace.model import trace

WIDTH, DEPTH, SAMPLES = 16, 4, 8
PRODUCT = 2.0 * SAMPLES * WIDTH * WIDTH


def weights(key: Any) -> PyTree:
    return {"each": [jnp.zeros((WIDTH, WIDTH))] * DEPTH, "stacked": jnp.zeros((DEPTH, WIDTH, WIDTH))}


def rows(size: int) -> Any:
    return jax.ShapeDtypeStruct((size, WIDTH), jnp.float32)


def graph_of(
    loss: Callable[[Any, Any], Any], init: Callable[[Any], PyTree] = weights, batch: Callable[[int], Any] = rows
) -> ModelGraph:
    return trace(Model("program", loss, init, batch), SAMPLES, 1).graph


def through_layers(layer: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda params, x: jnp.mean(reduce(lambda y, w: layer(w, y), params["each"], x) ** 2)


def body(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w)


LINEN = linen.Sequential([linen.Dense(32), linen.LayerNorm(), linen.relu, linen.Dense(WIDTH), linen.silu])


class Perceptron(nnx.Module):
    """Two linear layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.second = nnx.Linear(WIDTH, 32, rngs=rngs), nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.gelu(self.first(x)))


def test_modules_of_flax_and_equinox_trace_with_a_rule_for_everything() -> None:
    definition, _ = nnx.split(Perceptron(nnx.Rngs(0)))
    equinox = eqx.nn.MLP(WIDTH, 4, 32, 2, key=jax.random.key(0))
    _, static = eqx.partition(equinox, eqx.is_array)
    programs: list[tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]] = [
        (LINEN.apply, lambda key: LINEN.init(key, jnp.zeros((2, WIDTH)))),
        (lambda p, x: nnx.merge(definition, p)(x), lambda key: nnx.split(Perceptron(nnx.Rngs(key)))[1]),
        (
            lambda p, x: jax.vmap(eqx.combine(p, static))(x),
            lambda key: eqx.partition(eqx.nn.MLP(WIDTH, 4, 32, 2, key=key), eqx.is_array)[0],
        ),
    ]
    for apply, init in programs:
        graph = graph_of(lambda p, x, apply=apply: jnp.mean(apply(p, x) ** 2), init)
        assert graph.unknown == ()
        assert len(graph.layers) == 2


@pytest.mark.parametrize(
    "wrap", [jax.checkpoint, lambda f: lambda w, x: lax.cond(x.sum() > 0, f, lambda _, y: y, w, x)]
)
def test_wrapped_layers_are_found_as_layers(wrap: Callable[[Any], Any]) -> None:
    """What a checkpoint or a branch holds counts, so the layers are cut as those of the bare program."""
    bare, wrapped = graph_of(through_layers(body)), graph_of(through_layers(wrap(body)))
    assert len(wrapped.layers) == len(bare.layers) == DEPTH
    assert wrapped.unknown == ()


def test_a_scan_costs_its_body_times_its_trips() -> None:
    """Forward one product a trip, backward two; a scan over stacked layers is those layers, and knows more."""
    loop = graph_of(lambda p, x: jnp.mean(lax.scan(lambda c, _: (body(p["each"][0], c), None), x, length=DEPTH)[0]))
    assert loop.model_flops == 3 * DEPTH * PRODUCT
    graph = graph_of(lambda p, x: jnp.mean(lax.scan(lambda c, w: (body(w, c), None), x, p["stacked"])[0]))
    assert graph.model_flops == (3 * DEPTH - 1) * PRODUCT  # the batch itself has no gradient
    assert loop.unknown == ()
    assert graph.unknown == ()


def test_a_while_loop_costs_one_trip_and_says_so() -> None:
    def loss(params: PyTree, x: Any) -> Any:
        fixed = lax.while_loop(lambda c: c.sum() < 3, lambda c: c @ c.T @ c, lax.stop_gradient(x))
        return jnp.mean((x @ params["each"][0]) * fixed)

    graph = graph_of(loss)
    assert graph.notes == ("1 while loops count as one trip each: nobody knows how many they make",)
    assert graph_of(through_layers(body)).notes == ()


def of_equation(function: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The last equation of a function, with its operands and results."""
    eqn = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).eqns[-1]
    ins, outs = ([Tensor(v.aval.shape, str(v.aval.dtype)) for v in side] for side in (eqn.invars, eqn.outvars))
    return eqn, ins, outs


def test_a_branch_costs_the_dearest_of_its_branches() -> None:
    eqn, ins, outs = of_equation(
        lambda x, w: lax.switch(1, [lambda: x @ w, lambda: x @ w @ w, lambda: x]), (SAMPLES, WIDTH), (WIDTH, WIDTH)
    )
    assert eqn.primitive.name == "cond"
    assert operator_kind("cond", eqn.params) == "matmul"
    assert operator_flops("cond", eqn.params, ins, outs) == 2 * PRODUCT


def test_a_loop_splits_where_every_equation_of_its_body_does() -> None:
    """Rows are free, the contracted width is whole, and so are the trips."""
    eqn, ins, outs = of_equation(
        lambda x, w: lax.scan(lambda c, m: (jnp.tanh(c @ m), c), x, w), (SAMPLES, WIDTH), (DEPTH, WIDTH, WIDTH)
    )
    rule = rule_of("scan", eqn.params, ins, outs)
    assert rule.operands == ((0, UNSPLIT), (UNSPLIT, UNSPLIT, UNSPLIT))
    assert rule.results == ((0, UNSPLIT), (UNSPLIT, 0, UNSPLIT))
    assert rule.sizes == (SAMPLES,)


def test_two_dims_of_one_array_are_never_split_together() -> None:
    """x and its transpose, added in turn: rows and columns become one factor, which nobody can split."""
    eqn, ins, outs = of_equation(lambda x: lax.fori_loop(0, 3, lambda _, c: c + c.T, x), (WIDTH, WIDTH))
    rule = rule_of(eqn.primitive.name, eqn.params, ins, outs)
    assert {factor for dims in (*rule.operands, *rule.results) for factor in dims} == {UNSPLIT}


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_random_keys_may_come_with_the_batch(key: Any) -> None:
    def loss(params: PyTree, batch: PyTree) -> Any:
        kept = [jax.random.bernoulli(batch["key"], 0.9, (SAMPLES, WIDTH)) for _ in params["each"]]
        return jnp.mean(
            reduce(lambda y, pair: pair[0] * (y @ pair[1]), zip(kept, params["each"], strict=True), batch["x"])
        )

    graph = graph_of(loss, batch=lambda n: {"x": rows(n), "key": jax.ShapeDtypeStruct(key.shape, key.dtype)})
    assert graph.unknown == ()
    assert graph.model_flops == (3 * DEPTH - 1) * PRODUCT  # the batch itself has no gradient


def test_what_is_left_whole_is_reported_and_complex_numbers_carry_gradients() -> None:
    graph = graph_of(lambda p, x: jnp.mean(jnp.fft.irfft(jnp.fft.rfft(x @ p["each"][0]) * 2) @ p["each"][1]))
    assert dict(graph.unknown) == {"fft": 4}
    assert all(gradient >= 0 for c in graph.classes for gradient in c.gradients)
