"""A GShard mixture-of-experts language model: the feed-forward of every other layer is a set of experts.

Source: Lepikhin et al., "GShard" (ICLR 2021), section 2.2 and algorithm 1 (top-2 gating with capacity, einsum
dispatch), without its random skip of the second expert, so that a step needs no random numbers. Sizes as in Alpa's
suite: feed-forward 8 x hidden, capacity 2 x group / experts, experts without bias.

Shapes: g groups, t tokens of a group, e experts, c capacity (slots an expert has for one group), h hidden.
Tokens are routed inside their group only; a token that finds its expert full passes by on the residual.
"""

from dataclasses import dataclass
from functools import partial
from math import sqrt

import jax.numpy as jnp
from jax import Array, lax

from meshwright.errors import ModelError
from meshwright.models import transformer as tf
from meshwright.models.base import Model, PyTree
from meshwright.models.gpt import check_heads, check_sizes, embedding_weights, head, token_batch
from meshwright.models.numerics import cast, cross_entropy, gelu, one_hot, plus, softmax, spread, times
from meshwright.models.parameters import Weight, initialize


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Sizes of the model; layers 0, 2, 4, ... have experts."""

    layers: int = 8
    hidden: int = 768
    heads: int = 16
    experts: int = 8
    seq: int = 1024
    vocab: int = 32000
    ffn: int = 8  # width of every feed-forward over hidden
    group: int = 1024  # tokens that share the experts' slots; a whole part or a multiple of seq
    balance: float = 0.01  # weight of the load-balancing loss
    tied: bool = True
    dtype: str = "f32"

    def __post_init__(self) -> None:
        check_sizes(self, "layers", "hidden", "heads", "experts", "seq", "vocab", "ffn", "group")
        check_heads(self.hidden, self.heads)
        if self.experts < 2:
            raise ModelError(f"experts={self.experts}: top-2 gating needs at least 2")
        if self.balance < 0:
            raise ModelError(f"balance={self.balance} would reward unequal load; use 0 or more")
        if self.group % self.seq and self.seq % self.group:
            raise ModelError(
                f"group={self.group} neither divides seq={self.seq} nor is a multiple of it; use group={self.seq}"
            )
        if 2 * self.group < self.experts:
            raise ModelError(
                f"group={self.group} leaves no slot for each of {self.experts} experts; use at least "
                f"group={-(-self.experts // 2)}"
            )


def weights(config: MoEConfig) -> PyTree:
    """Every parameter's shape and start."""
    hidden = config.hidden

    def layer(index: int) -> PyTree:
        tree = {
            "norm1": tf.norm_weights(hidden),
            "attention": tf.attention_weights(hidden, config.heads, config.layers),
            "norm2": tf.norm_weights(hidden),
        }
        if index % 2:
            return {**tree, "mlp": tf.mlp_weights(hidden, config.ffn, config.layers)}
        up, down = (config.experts, hidden, config.ffn * hidden), (config.experts, config.ffn * hidden, hidden)
        experts = {"up": Weight(up, tf.STD), "down": Weight(down, tf.STD / sqrt(2 * config.layers))}
        return {**tree, "gate": Weight((hidden, config.experts), tf.STD), "experts": experts}

    tree = {
        "embedding": embedding_weights(config.vocab, config.seq, hidden),
        "layers": [layer(index) for index in range(config.layers)],
        "final_norm": tf.norm_weights(hidden),
    }
    return tree if config.tied else {**tree, "head": Weight((config.vocab, hidden), tf.STD)}


def route(gates: Array, capacity: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Combine weights (g, t, e, c) in ``dtype`` and the load-balancing loss, from gate probabilities (g, t, e) float32.

    The two best experts of a token share its weight in proportion to their gates. First choices of the whole group
    take slots before second choices do, both in token order; past ``capacity`` a choice weighs 0.
    The loss is e times the sum over experts of (share of first choices) x (mean gate), meaned over groups: 1 if even.
    Source: GShard, algorithm 1.
    """
    experts, tokens = gates.shape[2], gates.shape[1]
    first = one_hot(lax.argmax(gates, 2, jnp.int32), experts, gates.dtype)
    without_first = lax.mul(gates, plus(lax.neg(first), 1.0))
    second = one_hot(lax.argmax(without_first, 2, jnp.int32), experts, gates.dtype)
    first_gate = lax.reduce_sum(lax.mul(gates, first), (2,))
    second_gate = lax.reduce_sum(lax.mul(gates, second), (2,))
    both = lax.add(first_gate, second_gate)  # at least 2 / e, so never 0

    share = times(lax.reduce_sum(first, (1,)), 1.0 / tokens)
    density = times(lax.reduce_sum(gates, (1,)), 1.0 / tokens)
    balance = times(tf.mean(lax.mul(share, density)), float(experts**2))

    place = lax.sub(lax.cumsum(first, 1), first)
    first_part = _slots(first, place, lax.div(first_gate, both), capacity, dtype)
    taken = spread(lax.reduce_sum(first, (1,)), first, (0, 2))
    place = lax.add(lax.sub(lax.cumsum(second, 1), second), taken)
    second_part = _slots(second, place, lax.div(second_gate, both), capacity, dtype)
    return lax.add(first_part, second_part), balance


def _slots(choice: Array, place: Array, gate: Array, capacity: int, dtype: jnp.dtype) -> Array:
    """Gate (g, t) laid at the expert (``choice``, one-hot) and the slot (its ``place`` there), if there is one."""
    kept = lax.mul(choice, lax.convert_element_type(lax.lt(place, place.dtype.type(capacity)), choice.dtype))
    slot = lax.convert_element_type(lax.reduce_sum(lax.mul(place, kept), (2,)), jnp.int32)
    weight = cast(lax.mul(kept, spread(gate, kept, (0, 1))), dtype)
    return lax.dot_general(weight, one_hot(slot, capacity, dtype), (((), ()), ((0, 1), (0, 1))))


def capacity(config: MoEConfig, tokens: int) -> int:
    """Slots an expert has for a group of ``tokens``: room for every choice if all experts were chosen equally."""
    return max(1, 2 * tokens // config.experts)


def experts(config: MoEConfig, layer: PyTree, x: Array) -> tuple[Array, Array]:
    """The feed-forward by experts, (b, s, h) to (b, s, h), and its load-balancing loss; without the residual."""
    groups = _groups(config, x.shape)
    tokens = lax.reshape(x, groups) if groups != x.shape else x
    gate = lax.dot_general(cast(tokens, jnp.float32), layer["gate"], (((2,), (0,)), ((), ())))
    combine, balance = route(softmax(gate), capacity(config, groups[1]), x.dtype)
    dispatch = lax.convert_element_type(lax.gt(combine, combine.dtype.type(0)), x.dtype)
    up, down = cast(layer["experts"]["up"], x.dtype), cast(layer["experts"]["down"], x.dtype)

    inside = lax.dot_general(dispatch, tokens, (((1,), (1,)), ((0,), (0,))))  # (g, e, c, h)
    inside = gelu(lax.dot_general(inside, up, (((3,), (1,)), ((1,), (0,)))))  # (e, g, c, f)
    inside = lax.dot_general(inside, down, (((3,), (1,)), ((0,), (0,))))  # (e, g, c, h)
    y = lax.dot_general(combine, inside, (((2, 3), (0, 2)), ((0,), (1,))))  # (g, t, h)
    return (lax.reshape(y, x.shape) if groups != x.shape else y), balance


def _groups(config: MoEConfig, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(g, t, h) for x of shape (b, s, h); a batch smaller than one group is one smaller group."""
    batch, seq, hidden = shape
    size = min(config.group, batch * seq)
    if batch * seq % size:
        raise ModelError(
            f"a (micro-)batch of {batch} sequences of {seq} tokens does not fill groups of {config.group}; "
            f"use a multiple of {config.group // seq} sequences, or group={seq}"
        )
    return batch * seq // size, size, hidden


def logits(config: MoEConfig, params: PyTree, tokens: Array) -> tuple[Array, Array]:
    """Scores of the next token, (b, s) to (b, s, v), and the mean load-balancing loss of the layers with experts."""
    x = tf.embed(params["embedding"], tokens, tf.DTYPES[config.dtype])
    balance = []
    for layer in params["layers"]:
        x = lax.add(x, tf.attention(layer["attention"], tf.layer_norm(layer["norm1"], x)))
        inner = tf.layer_norm(layer["norm2"], x)
        if "experts" in layer:
            y, loss_of_layer = experts(config, layer, inner)
            balance.append(loss_of_layer)
        else:
            y = tf.mlp(layer["mlp"], inner)
        x = lax.add(x, y)
    total = balance[0]
    for one in balance[1:]:
        total = lax.add(total, one)
    return head(params, x), times(total, 1.0 / len(balance))


def loss(config: MoEConfig, params: PyTree, batch: PyTree) -> Array:
    """Mean negative log likelihood of a token, in nats, plus ``balance`` times the load-balancing loss."""
    scores, balance = logits(config, params, batch["tokens"])
    return lax.add(tf.mean(cross_entropy(scores, batch["targets"])), times(balance, config.balance))


def build(config: MoEConfig, name: str) -> Model:
    return Model(
        name=name,
        loss_fn=partial(loss, config),
        init_fn=partial(initialize, weights(config)),
        batch_fn=partial(token_batch, config.seq),
        tokens_per_sample=config.seq,
    )
