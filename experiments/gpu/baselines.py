"""The zoo's models once more, in plain JAX as one writes it by hand, to hold our executor against.

Weights, batch, precision and mathematics are the zoo's (a test compares the losses); everything else is as a good
engineer would have it: ``jax.nn`` and einsums, derivatives by JAX, one ``jit`` of ``value_and_grad`` and AdamW, old
parameters and state donated. Shapes: b samples, s tokens, h hidden, n heads, d size of a head, f feed-forward,
g groups, t tokens of a group, e experts, c slots.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from meshwright.models.base import Model
from meshwright.models.gpt import GPTConfig
from meshwright.models.moe import MoEConfig, capacity
from meshwright.models.transformer import DTYPES
from meshwright.models.wide_resnet import WideResNetConfig

PyTree = Any
Attention = Literal["xla", "cudnn"]
Loss = Callable[[PyTree, PyTree], Array]
EPSILON = 1e-5


def hand_written_loss(model: Model, attention: Attention = "xla") -> Loss:
    """``loss(params, batch)`` of a zoo model, for the parameters that its ``init_fn`` makes.

    Args:
        attention: how ``jax.nn.dot_product_attention`` is to be computed; ``cudnn`` is fused, on GPUs, in 16 bits.
    """
    config = model.loss_fn.args[0]  # type: ignore[attr-defined]  # the zoo binds it with functools.partial
    match config:
        case GPTConfig():
            return partial(gpt_loss, config, attention)
        case MoEConfig():
            return partial(moe_loss, config, attention)
        case WideResNetConfig():
            return partial(wide_resnet_loss, config)
    raise ValueError(f"model {model.name!r} has no hand-written form; use a GPT, MoE or Wide-ResNet")


def training_step(loss: Loss, optimizer: Any, microbatches: int = 1) -> Any:
    """Compiled ``step(params, state, batch) -> (params, state, loss)``; the gradient is the micro-batches' mean."""

    def gradient(params: PyTree, batch: PyTree) -> tuple[Array, PyTree]:
        if microbatches == 1:
            return jax.value_and_grad(loss)(params, batch)
        parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)

        def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = lax.scan(add, zero, parts)
        mean: tuple[Array, PyTree] = jax.tree.map(lambda x: x / microbatches, total)
        return mean

    def step(params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, Array]:
        value, gradients = gradient(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


# --- language models ------------------------------------------------------------------------------------------------


def layer_norm(weights: PyTree, x: Array) -> Array:
    wide = x.astype(jnp.float32)
    mean, variance = wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True)
    return ((wide - mean) * lax.rsqrt(variance + EPSILON) * weights["scale"] + weights["bias"]).astype(x.dtype)


def attention_block(weights: PyTree, x: Array, implementation: Attention) -> Array:
    qkv, out = (jax.tree.map(lambda w: w.astype(x.dtype), weights[name]) for name in ("qkv", "out"))
    q, k, v = jnp.einsum("bsh,hcnd->cbsnd", x, qkv["kernel"]) + qkv["bias"][:, None, None]
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    return jnp.einsum("bsnd,ndh->bsh", mixed, out["kernel"]) + out["bias"]


def feed_forward(weights: PyTree, x: Array) -> Array:
    up, down = (jax.tree.map(lambda w: w.astype(x.dtype), weights[name]) for name in ("up", "down"))
    return jax.nn.gelu(x @ up["kernel"] + up["bias"]) @ down["kernel"] + down["bias"]


def embedded(params: PyTree, tokens: Array, dtype: Any) -> Array:
    rows = params["embedding"]["tokens"][tokens] + params["embedding"]["positions"]
    return rows.astype(dtype)


def next_token_loss(params: PyTree, x: Array, targets: Array) -> Array:
    table = params.get("head", params["embedding"]["tokens"]).astype(x.dtype)
    logits = (layer_norm(params["final_norm"], x) @ table.T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def gpt_loss(config: GPTConfig, attention: Attention, params: PyTree, batch: PyTree) -> Array:
    """Mean negative log likelihood of the next token, in nats."""
    x = embedded(params, batch["tokens"], DTYPES[config.dtype])
    for layer in params["layers"]:
        x = x + attention_block(layer["attention"], layer_norm(layer["norm1"], x), attention)
        x = x + feed_forward(layer["mlp"], layer_norm(layer["norm2"], x))
    return next_token_loss(params, x, batch["targets"])


def experts_block(config: MoEConfig, layer: PyTree, x: Array) -> tuple[Array, Array]:
    """Top-2 experts with capacity, by einsums, and the load-balancing loss. Source: GShard, algorithm 1."""
    tokens = x.reshape(-1, min(config.group, x.shape[0] * x.shape[1]), x.shape[2])
    slots = capacity(config, tokens.shape[1])
    gates = jax.nn.softmax(tokens.astype(jnp.float32) @ layer["gate"])
    first = jax.nn.one_hot(gates.argmax(-1), config.experts)
    second = jax.nn.one_hot((gates * (1 - first)).argmax(-1), config.experts)
    share = (gates * (first + second)).sum(-1, keepdims=True)
    balance = (first.mean(1) * gates.mean(1)).mean() * config.experts**2

    taken = first.sum(1, keepdims=True)
    combine = jnp.zeros((*gates.shape, slots), x.dtype)
    for choice, before in ((first, 0.0), (second, taken)):
        place = choice.cumsum(1) - choice + before
        kept = choice * (place < slots)
        slot = jax.nn.one_hot((place * kept).sum(-1).astype(jnp.int32), slots, dtype=x.dtype)
        combine = combine + jnp.einsum("gte,gtc->gtec", (kept * gates / share).astype(x.dtype), slot)
    up, down = (layer["experts"][name].astype(x.dtype) for name in ("up", "down"))
    inside = jnp.einsum("gtec,gth->egch", (combine > 0).astype(x.dtype), tokens)
    inside = jax.nn.gelu(jnp.einsum("egch,ehf->egcf", inside, up))
    inside = jnp.einsum("egcf,efh->egch", inside, down)
    return jnp.einsum("gtec,egch->gth", combine, inside).reshape(x.shape), balance


def moe_loss(config: MoEConfig, attention: Attention, params: PyTree, batch: PyTree) -> Array:
    """Mean negative log likelihood of the next token, in nats, and the load-balancing loss at its weight."""
    x = embedded(params, batch["tokens"], DTYPES[config.dtype])
    balances = []
    for layer in params["layers"]:
        x = x + attention_block(layer["attention"], layer_norm(layer["norm1"], x), attention)
        inner = layer_norm(layer["norm2"], x)
        if "experts" in layer:
            y, balance = experts_block(config, layer, inner)
            balances.append(balance)
        else:
            y = feed_forward(layer["mlp"], inner)
        x = x + y
    return next_token_loss(params, x, batch["targets"]) + config.balance * jnp.stack(balances).mean()


# --- images ---------------------------------------------------------------------------------------------------------


def convolution(part: PyTree, x: Array, stride: int = 1) -> Array:
    """A convolution and its normalisation over samples, rows and columns."""
    half = part["kernel"].shape[0] // 2
    y = lax.conv_general_dilated(
        x,
        part["kernel"].astype(x.dtype),
        window_strides=(stride, stride),
        padding=[(half, half)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    wide = y.astype(jnp.float32)
    mean, variance = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    return ((wide - mean) * lax.rsqrt(variance + EPSILON) * part["scale"] + part["bias"]).astype(x.dtype)


def wide_resnet_loss(config: WideResNetConfig, params: PyTree, batch: PyTree) -> Array:
    """Mean cross entropy of the labels, in nats; a norm takes its statistics over the samples that are given."""
    if config.norm == "group":
        raise ValueError("norm=group has no hand-written form; use norm=microbatch")
    x = jax.nn.relu(convolution(params["stem"], batch["images"].astype(DTYPES[config.dtype]), 2))
    x = lax.reduce_window(x, x.dtype.type(-jnp.inf), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for stage, blocks in enumerate(params["stages"]):
        for index, block in enumerate(blocks):
            stride = 2 if stage and not index else 1
            y = jax.nn.relu(convolution(block["in"], x))
            y = jax.nn.relu(convolution(block["middle"], y, stride))
            y = convolution(block["out"], y)
            x = jax.nn.relu(y + (convolution(block["skip"], x, stride) if "skip" in block else x))
    head = jax.tree.map(lambda w: w.astype(x.dtype), params["head"])
    logits = (x.mean((1, 2)) @ head["kernel"] + head["bias"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()
