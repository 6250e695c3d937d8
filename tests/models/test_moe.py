"""The routing equals a slow reading of GShard's algorithm 1, token by token."""

from dataclasses import replace
from functools import partial
from math import log
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ModelError
from meshwright.models import moe
from tests.models.training import compiled, drawn, losses_of_steps, random_batch, value_and_gradient

TINY = moe.MoEConfig(layers=2, hidden=32, heads=4, experts=4, seq=16, vocab=64, ffn=2, group=16)
MODEL = moe.build(TINY, "tiny")
route = jax.jit(moe.route, static_argnums=(1, 2))


def slow_route(gates: Any, capacity: int) -> tuple[Any, float]:
    """GShard, algorithm 1, one token after another; the load-balancing loss as there, times e^2."""
    groups, tokens, experts = gates.shape
    combine = np.zeros((groups, tokens, experts, capacity))
    balance = 0.0
    for g in range(groups):
        load = [0] * experts
        best = [np.argsort(-gates[g, t], kind="stable")[:2] for t in range(tokens)]
        for choice in (0, 1):
            for t in range(tokens):
                expert = best[t][choice]
                if load[expert] < capacity:
                    combine[g, t, expert, load[expert]] = gates[g, t, expert] / gates[g, t, best[t]].sum()
                load[expert] += 1
        share = np.bincount([first for first, _ in best], minlength=experts) / tokens
        balance += experts * float(share @ gates[g].mean(0)) / groups
    return combine, balance


@given(
    shape_and_capacity=st.sampled_from([((1, 4, 2), 4), ((3, 8, 5), 3), ((2, 8, 3), 1)]),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.1, 2.0, 10.0]),
)
@settings(max_examples=60, deadline=None)
def test_routing_equals_the_slow_one(shape_and_capacity: tuple[tuple[int, ...], int], seed: int, spread: float) -> None:
    """A few shapes, each compiled once; gates from nearly even to nearly certain."""
    shape, capacity = shape_and_capacity
    powers = np.exp(spread * np.random.default_rng(seed).normal(size=shape))
    gates = (powers / powers.sum(2, keepdims=True)).astype(np.float32)
    combine, balance = route(gates, capacity, jnp.float32)
    expected, expected_balance = slow_route(gates, capacity)
    np.testing.assert_allclose(combine, expected, rtol=1e-5, atol=1e-7)
    assert float(balance) == pytest.approx(expected_balance, rel=1e-5)


def test_no_slot_is_given_twice_and_the_late_find_the_expert_full() -> None:
    """All six tokens want expert 0 then expert 1; each has two slots, so the first two tokens alone are served."""
    gates = jnp.tile(jnp.array([0.6, 0.3, 0.1]), (1, 6, 1))
    combine, balance = route(gates, 2, jnp.float32)
    weight_of_token = combine.sum((2, 3))[0]
    np.testing.assert_allclose(weight_of_token, [1, 1, 0, 0, 0, 0], atol=1e-6)
    assert (combine > 0).sum(1).max() == 1
    assert float(balance) == pytest.approx(3 * 0.6)


def test_even_load_costs_one() -> None:
    gates = jnp.stack([jnp.roll(jnp.array([0.7, 0.2, 0.1]), i) for i in range(3)])[None]
    assert float(route(gates, 4, jnp.float32)[1]) == pytest.approx(1.0)


@pytest.mark.parametrize(("group", "batch"), [(16, 3), (32, 4), (8, 2), (64, 2)])
def test_the_layer_equals_experts_applied_token_by_token(group: int, batch: int) -> None:
    """Groups of one sequence, of two, of half a one; and a batch smaller than a group."""
    config = moe.MoEConfig(layers=2, hidden=8, heads=2, experts=4, seq=16, vocab=16, ffn=2, group=group)
    layer = drawn(moe.weights(config)["layers"][0])
    rng = np.random.default_rng(1)
    layer["gate"] = jnp.asarray(5 * rng.normal(size=layer["gate"].shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(batch, 16, 8)), jnp.float32)
    y, _ = compiled(partial(moe.experts, config))(layer, x)

    tokens = np.asarray(x).reshape(-1, min(group, batch * 16), 8)
    gates = np.asarray(jax.nn.softmax(tokens @ layer["gate"]))
    combine, _ = slow_route(gates, 2 * tokens.shape[1] // 4)
    up, down = (np.asarray(layer["experts"][name]) for name in ("up", "down"))
    each = np.asarray(jax.nn.gelu(tokens[:, :, None, None] @ up) @ down)[:, :, :, 0]
    expected = (combine.sum(3)[..., None] * each).sum(2).reshape(x.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)


def test_it_starts_at_the_log_of_the_vocabulary_and_learns() -> None:
    losses = losses_of_steps(MODEL, drawn(moe.weights(TINY)), random_batch(MODEL, 4, 64), steps=12, rate=0.05)
    assert losses[0] == pytest.approx(log(64) + 0.01, rel=0.02)
    assert losses[-1] < losses[0] - 0.2


def test_every_weight_has_a_finite_gradient_and_the_gate_one_that_is_not_zero() -> None:
    _, gradient = value_and_gradient(MODEL)(drawn(moe.weights(TINY)), random_batch(MODEL, 4, 64))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert jnp.abs(gradient["layers"][0]["gate"]).max() > 0


def test_experts_are_in_every_other_layer() -> None:
    layers = moe.weights(moe.MoEConfig(layers=4))["layers"]
    assert ["experts" in layer for layer in layers] == [True, False, True, False]


def test_a_micro_batch_that_does_not_fill_its_groups_says_what_does() -> None:
    model = moe.build(replace(TINY, group=32), "tiny")
    params = jax.eval_shape(model.init_fn, jax.random.key(0))
    with pytest.raises(ModelError, match="use a multiple of 2 sequences, or group=16"):
        jax.eval_shape(model.loss_fn, params, model.batch_fn(3))
