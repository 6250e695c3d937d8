"""The derivatives written by hand equal those that JAX finds, and keep as little as they say."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models import numerics
from tests.models.training import compiled


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plain_normalize(dims: tuple[int, ...]) -> Callable[..., Any]:
    def normalize(x: Any, scale: Any, bias: Any) -> Any:
        unit = (x - x.mean(dims, keepdims=True)) / jnp.sqrt(x.var(dims, keepdims=True) + numerics.EPSILON)
        return unit * scale + bias

    return normalize


def plain_softmax(causal: bool) -> Callable[[Any], Any]:
    def softmax(x: Any) -> Any:
        seen = jnp.tril(jnp.ones(x.shape[-2:], bool)) if causal else True
        return jax.nn.softmax(jnp.where(seen, x, -jnp.inf))

    return softmax


LABELS = jnp.array([[0, 6, 3], [5, 5, 1]])
PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[jax.Array, ...]]] = {
    "layer norm": (
        lambda x, s, b: numerics.normalize(x, s, b, (2,)),
        plain_normalize((2,)),
        (3 * normal(0, 2, 5, 8) + 1, normal(1, 8), normal(2, 8)),
    ),
    "batch norm": (
        lambda x, s, b: numerics.normalize(x, s, b, (0, 1, 2)),
        plain_normalize((0, 1, 2)),
        (3 * normal(0, 3, 4, 4, 6) - 2, normal(1, 6), normal(2, 6)),
    ),
    "group norm": (
        lambda x, s, b: numerics.normalize(x, s, b, (1, 2, 4)),
        plain_normalize((1, 2, 4)),
        (normal(0, 3, 4, 4, 2, 3), normal(1, 2, 3), normal(2, 2, 3)),
    ),
    "gelu": (numerics.gelu, jax.nn.gelu, (3 * normal(0, 50),)),
    "relu": (numerics.relu, jax.nn.relu, (normal(0, 50),)),
    "softmax": (numerics.softmax, plain_softmax(False), (3 * normal(0, 2, 3, 4, 7),)),
    "causal softmax": (lambda x: numerics.softmax(x, True), plain_softmax(True), (3 * normal(0, 2, 3, 5, 5),)),
    "cross entropy": (
        lambda x: numerics.cross_entropy(x, LABELS),
        lambda x: -jnp.take_along_axis(jax.nn.log_softmax(x), LABELS[..., None], -1)[..., 0],
        (3 * normal(0, 2, 3, 7),),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_value_and_derivative_are_those_of_the_plain_formula(name: str) -> None:
    ours, plain, arguments = PAIRS[name]
    push = normal(9, *jax.eval_shape(ours, *arguments).shape)

    def value_and_pulled_back(function: Callable[..., Any]) -> Any:
        def run(push: jax.Array, *arguments: jax.Array) -> Any:
            value, pull = jax.vjp(function, *arguments)
            return value, pull(push)

        return compiled(run)(push, *arguments)

    (value, slopes), (expected, plain_slopes) = value_and_pulled_back(ours), value_and_pulled_back(plain)
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6)
    for mine, its in zip(slopes, plain_slopes, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["layer norm", "gelu", "softmax", "causal softmax", "cross entropy"])
def test_one_array_of_the_size_and_dtype_of_the_input_is_kept(name: str) -> None:
    ours, _, arguments = PAIRS[name]
    x, *rest = arguments
    x = x.astype(jnp.bfloat16)
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(ours, *a)[1], x, *rest))
    assert [leaf.dtype for leaf in kept if leaf.size == x.size] == [jnp.bfloat16]


def test_extreme_logits_stay_finite() -> None:
    logits = jnp.array([[1e30, -1e30, 0.0]])
    loss, slope = jax.value_and_grad(lambda x: numerics.cross_entropy(x, jnp.array([0])).sum())(logits)
    assert loss == 0.0
    assert jnp.isfinite(slope).all()


def test_one_hot_marks_the_label_and_nothing_for_a_label_outside() -> None:
    picture = numerics.one_hot(jnp.array([2, 0, 3]), 3, jnp.int32)
    assert picture.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
