"""The Llama sees the past alone, turns its queries by their place, shares its keys, and learns."""

from functools import partial
from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.errors import ModelError
from meshwright.models import llama
from meshwright.plan.trace.model import trace
from tests.models.training import compiled, drawn, losses_of_steps, random_batch

TINY = llama.LlamaConfig(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, seq=8, vocab=32)


def test_an_untrained_model_is_as_unsure_as_a_die_with_a_face_per_word() -> None:
    model = llama.build(TINY, "tiny")
    loss = compiled(model.loss_fn)(drawn(llama.weights(TINY)), random_batch(model, 8, 32))
    assert float(loss) == pytest.approx(log(32), rel=0.02)


def test_a_token_changes_no_score_before_its_own() -> None:
    """Row 0 is a text; row 1 + t the same text with token t changed: their scores part exactly at t."""
    text = np.random.default_rng(1).integers(0, TINY.vocab - 1, TINY.seq)
    texts = np.stack([text, *(text + np.eye(TINY.seq, dtype=int))]).astype(np.int32)
    scores = np.asarray(compiled(partial(llama.logits, TINY))(drawn(llama.weights(TINY)), texts))
    differs = np.any(scores[1:] != scores[0], axis=-1)
    np.testing.assert_array_equal(differs, np.triu(np.ones((TINY.seq, TINY.seq), bool)))


def test_turned_vectors_keep_their_length_and_meet_by_distance_alone() -> None:
    """Two fixed vectors at places s and t have a product that depends on s - t alone (RoFormer, equation 16)."""
    rng = np.random.default_rng(0)
    q, k = (np.broadcast_to(rng.normal(size=8).astype(np.float32), (1, 6, 1, 8)) for _ in range(2))
    turned_q, turned_k = llama.rotate(jnp.asarray(q)), llama.rotate(jnp.asarray(k))
    np.testing.assert_allclose(jnp.linalg.norm(turned_q, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5)
    products = np.asarray(jnp.einsum("bshd,bthd->st", turned_q, turned_k))
    for distance in range(-5, 6):
        np.testing.assert_allclose(np.diagonal(products, distance), np.diagonal(products, distance)[0], atol=1e-5)


def test_attention_is_that_of_jax_with_shared_keys() -> None:
    weights = drawn(llama.weights(TINY))["layers"][0]
    x = np.random.default_rng(3).normal(size=(2, TINY.seq, TINY.hidden)).astype(np.float32)
    query, key, value = (jnp.tensordot(x, weights[name], 1) for name in ("query", "key", "value"))
    query = llama.rotate(query).reshape(2, TINY.seq, TINY.heads, -1)  # query heads g of key head k lie together
    mixed = jax.nn.dot_product_attention(query, llama.rotate(key), value, is_causal=True)
    expected = jnp.tensordot(mixed.reshape(2, TINY.seq, -1), weights["out"].reshape(-1, TINY.hidden), 1)
    np.testing.assert_allclose(llama.attention(weights, jnp.asarray(x)), expected, atol=1e-6)


def test_the_loss_falls_on_a_batch_it_sees_again() -> None:
    model = llama.build(TINY, "tiny")
    losses = losses_of_steps(model, drawn(llama.weights(TINY)), random_batch(model, 4, 32), steps=10, rate=0.5)
    assert losses[-1] < losses[0] - 0.1


def test_its_layers_are_equal_and_every_primitive_has_a_rule() -> None:
    config = llama.LlamaConfig(layers=6, hidden=16, heads=4, kv_heads=2, ffn=24, seq=8, vocab=32)
    graph = trace(llama.build(config, "tiny"), 4, 1).graph
    assert graph.unknown == ()
    assert len(graph.classes) < len(graph.layers)


@pytest.mark.parametrize(
    ("sizes", "line"),
    [({"kv_heads": 3}, "do not share kv_heads=3"), ({"hidden": 12, "heads": 4}, "hidden/heads=3 is odd")],
)
def test_sizes_that_do_not_fit_are_named(sizes: dict[str, int], line: str) -> None:
    with pytest.raises(ModelError, match=line):
        llama.LlamaConfig(**{"heads": 4, "kv_heads": 2, **sizes})
