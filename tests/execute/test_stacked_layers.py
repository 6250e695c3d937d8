"""A model whose layers are stacked and scanned trains on several stages as it does on one device."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from jax import lax

from meshwright.errors import PlanError
from meshwright.execute.train import build
from meshwright.models.base import Model
from meshwright.plan.trace.model import trace
from tests.execute.plain import assert_parity, key, planned

WIDTH, DEPTH = 16, 6


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def block(weights: Any, x: Any) -> Any:
    return x + jnp.tanh(x @ weights["up"] + weights["bias"]) @ weights["down"]


def stacked(wrap: Callable[[Any], Any] = lambda body: body, reverse: bool = False) -> Model:
    """Residual blocks under one scan; one stack counts its layers in dim 1, and each trip gives a penalty too."""

    def loss_fn(params: Any, batch: Any) -> Any:
        layers = {**params["layers"], "down": params["layers"]["down"].transpose(1, 0, 2)}
        body = wrap(lambda x, weights: (block(weights, x), jnp.mean(x**2)))
        x, penalties = lax.scan(body, batch["x"] @ params["entry"], layers, reverse=reverse)
        return jnp.mean((x @ params["exit"] - batch["y"]) ** 2) + 1e-2 * penalties.sum()

    def init_fn(seed: Any) -> Any:
        keys = jax.random.split(seed, 4)
        up, down = (DEPTH, WIDTH, 2 * WIDTH), (2 * WIDTH, DEPTH, WIDTH)
        layers = {"up": jax.random.normal(keys[0], up) / 5, "down": jax.random.normal(keys[1], down) / 5}
        entry, leave = (jax.random.normal(k, (WIDTH, WIDTH)) / 5 for k in keys[2:])
        return {"entry": entry, "exit": leave, "layers": {**layers, "bias": jnp.zeros((DEPTH, 2 * WIDTH))}}

    def batch_fn(size: int) -> Any:
        return {name: jax.ShapeDtypeStruct((size, WIDTH), jnp.float32) for name in "xy"}

    return Model("stacked", loss_fn, init_fn, batch_fn)


class Block(linen.Module):
    """A residual layer of a Flax module, in the form that ``nn.scan`` takes."""

    @linen.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return x + linen.Dense(WIDTH)(linen.silu(linen.Dense(2 * WIDTH)(x))), None


def of_flax(depth: int = DEPTH) -> Model:
    layers = linen.scan(linen.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)()

    def loss_fn(params: Any, batch: Any) -> Any:
        return jnp.mean((layers.apply(params, batch["x"], None)[0] - batch["y"]) ** 2)

    def init_fn(seed: Any) -> Any:
        return layers.init(seed, jnp.zeros((2, WIDTH)), None)

    return Model("flax", loss_fn, init_fn, stacked().batch_fn)


CASES: dict[str, tuple[Callable[[], Model], dict[str, Any]]] = {
    "pipeline 2 x tensor 2": (stacked, {"pipeline": 2, "tensor": 2, "data": 1}),
    "checkpointed, backwards": (
        lambda: stacked(jax.checkpoint, reverse=True),
        {"pipeline": 2, "tensor": 1, "data": 2},
    ),
    "flax, a stage for each device": (of_flax, {"pipeline": 4, "tensor": 1, "data": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_stages_of_a_scan_train_as_the_scan_does(case: str) -> None:
    """Weights are decayed by the rank of the user's arrays: a stacked bias has two dims, its row one."""
    make, fixed = CASES[case]
    model = make()
    plan = planned(model, 24, 3, **fixed)
    decay = optax.add_decayed_weights(0.1, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree))
    assert_parity(model, plan, optax.chain(decay, optax.sgd(0.05, momentum=0.9)))


def test_the_moments_of_adam_lie_with_their_layers() -> None:
    model = stacked()
    assert_parity(model, planned(model, 24, 2, pipeline=2, tensor=1, data=2), optax.adamw(1e-2, eps=1e-3))


def test_first_parameters_are_the_rows_of_what_init_fn_gives() -> None:
    model = stacked()
    trainer = build(planned(model, 24, 3, pipeline=2, tensor=2, data=1), model, optax.sgd(0.01))
    state = trainer.init(key())
    rows = [a for s in state.values() for a in s.parameters.values()]
    assert len(rows) == 3 * DEPTH + 2
    jax.tree.map(np.testing.assert_array_equal, trainer.parameters(state), jax.jit(model.init_fn)(key()))


def test_an_optimizer_that_looks_at_whole_stacks_wants_them_on_one_stage() -> None:
    """Clipping each array by its norm couples the layers of a stack: right on one stage, refused on two."""
    model = stacked()
    clipped = optax.chain(optax.clip_by_block_rms(1e-3), optax.sgd(1.0))
    assert_parity(model, planned(model, 24, 2, pipeline=1, tensor=2, data=2), clipped)
    with pytest.raises(PlanError, match=r"update of layers\.\w+, .*pipeline=1"):
        build(planned(model, 24, 2, pipeline=2, tensor=2, data=1), model, clipped)


def test_a_scan_becomes_equal_layers_that_cost_what_it_cost() -> None:
    graph = trace(stacked(), 24, 3).graph
    owners = [use.layer_class for use in graph.layers]
    assert len(set(owners[1:-1])) == 1
    assert len(owners) == DEPTH + 2
    products = DEPTH * 2 * 2 * WIDTH * 2 * WIDTH + 2 * 2 * WIDTH * WIDTH
    assert graph.model_flops == 8 * (3 * products - 2 * WIDTH * WIDTH)  # the batch has no gradient
    assert graph.notes == ()
