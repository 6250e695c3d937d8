"""A model that stacks its layers and scans over them; one stack counts them in dim 1."""

from typing import Any

import jax
import jax.numpy as jnp

from meshwright.models.base import Model

WIDTH, DEPTH = 16, 4


def model() -> Model:
    """Residual blocks between two matrices."""

    def loss_fn(params: Any, batch: Any) -> Any:
        def block(x: Any, weights: Any) -> Any:
            up, down = weights
            return x + jnp.tanh(x @ up) @ down, None

        layers = params["layers"]["up"], params["layers"]["down"].transpose(1, 0, 2)
        x, _ = jax.lax.scan(block, batch["x"] @ params["entry"], layers)
        return jnp.mean((x @ params["exit"] - batch["y"]) ** 2)

    def init_fn(key: Any) -> Any:
        shapes = {"up": (DEPTH, WIDTH, 2 * WIDTH), "down": (2 * WIDTH, DEPTH, WIDTH)}
        layers = {name: jax.random.normal(key, shape) / 5 for name, shape in shapes.items()}
        return {"entry": jnp.eye(WIDTH), "exit": jnp.eye(WIDTH), "layers": layers}

    def batch_fn(size: int) -> Any:
        return {name: jax.ShapeDtypeStruct((size, WIDTH), jnp.float32) for name in "xy"}

    return Model("tests.plan.export.stacked:model", loss_fn, init_fn, batch_fn)
