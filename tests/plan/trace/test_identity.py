"""Equal custom derivatives are recognised, different ones never taken for equal."""

from collections.abc import Callable
from functools import partial
from time import process_time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models.base import Model, PyTree
from meshwright.models.zoo import get_model
from meshwright.plan.trace import model as trace_model
from meshwright.plan.trace.identity import function_text
from meshwright.plan.trace.model import trace
from tests.plan.chain import chained


def slope(factor: float) -> Callable[[Any], Any]:
    """The identity, whose derivative claims to be ``factor``: nothing but a closure tells two of them apart."""

    @jax.custom_vjp
    def same(x: Any) -> Any:
        return x * 1.0

    same.defvjp(lambda x: (x * 1.0, None), lambda _, g: (g * factor,))
    return same


def model_of(functions: list[Callable[[Any], Any]], wrap: Callable[[Any], Any]) -> Model:
    """A product and one of the functions for each layer."""

    def loss(params: PyTree, batch: Any) -> Any:
        x = batch
        for kernel, function in zip(params, functions, strict=True):
            x = wrap(lambda w, y, f=function: f(y @ w))(kernel, x)
        return jnp.sum(x)

    kernels = [jax.ShapeDtypeStruct((8, 8), jnp.float32) for _ in functions]
    return Model(
        name="slopes",
        loss_fn=loss,
        init_fn=lambda key: [jnp.zeros(k.shape, k.dtype) for k in kernels],
        batch_fn=lambda size: jax.ShapeDtypeStruct((size, 8), jnp.float32),
    )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("factors", [(2.0, 2.0, 3.0, 2.0), (2.0, 2.0, 2.0, 2.0)])
def test_gradients_are_those_of_jax_whichever_layers_share_a_class(factors: tuple[float, ...], wrap: Any) -> None:
    model = model_of([slope(f) for f in factors], wrap)
    found = trace(model, 4, 1, cutter=one_product_a_layer)
    rng = np.random.default_rng(0)
    params = [rng.normal(size=(8, 8)).astype(np.float32) for _ in factors]
    batch = rng.normal(size=(4, 8)).astype(np.float32)
    _, gradients, _ = chained(found, params, [batch])
    for mine, right in zip(gradients, jax.grad(model.loss_fn)(params, batch), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-4)


def one_product_a_layer(flops: Any, cut_bytes: Any, signatures: Any) -> list[tuple[int, int]]:
    """Every product begins a layer."""
    starts = [i for i, f in enumerate(flops) if f > 0]
    starts[0] = 0
    return list(zip(starts, [*starts[1:], len(flops)], strict=True))


def test_functions_are_the_same_by_code_and_closure() -> None:
    def make(number: Any) -> Callable[[float], Any]:
        return lambda x: x * number

    assert function_text(make(2)) == function_text(make(2)) is not None
    assert function_text(make(2)) != function_text(make(3))
    assert function_text(make(2)) != function_text(make(2.0))
    assert function_text(partial(make(2), 1)) != function_text(partial(make(2), 3))
    assert function_text(make(np.ones(3))) is None  # an array: contents may be large or not yet known
    assert function_text(print) is None


def test_the_largest_gpt_is_differentiated_layer_class_by_layer_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-175B with its gradient: three classes, three derivatives, no array, under five seconds."""
    joins = []
    join = trace_model.join
    monkeypatch.setattr(trace_model, "join", lambda *args: joins.append(1) or join(*args))
    arrays, start = len(jax.live_arrays()), process_time()
    found = trace(get_model("gpt-175b"), 2, 2)
    assert process_time() - start < 5.0
    assert len(jax.live_arrays()) - arrays <= 1  # the key that shapes the parameters
    assert len(found.graph.layers) > 90
    assert len(joins) == len(found.classes) == 3
