"""What the tests of training share: tiny plans, batches that can be learnt, plain JAX as the truth."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meshwright.calibrate.hardware import Cluster, cluster_from_data, cluster_to_data, parse_cluster
from meshwright.execute.split import read_layout
from meshwright.execute.train import Trainer, build
from meshwright.models.base import Model, PyTree
from meshwright.models.zoo import get_model
from meshwright.plan.planfile import Plan, PlannedStage
from meshwright.plan.search import Fix, Request, search
from meshwright.plan.trace.model import trace
from tests.models.training import compiled

STEPS = 5  # of a comparison with plain JAX


def key(seed: int = 1) -> jax.Array:
    """A key of a generator that compiles in a third of the time of the usual one."""
    return jax.random.key(seed, impl="rbg")


@cache
def model_of(spec: str) -> Model:
    """A zoo model; one object for each spec, so that what was compiled for it is found again."""
    return get_model(spec)


def slow_devices_fast_links(devices: int) -> Cluster:
    """A cluster where all that can be split is worth splitting, however small. (On a real one tiny models are not.)"""
    data = cluster_to_data(parse_cluster(f"cpu:{devices}"))
    [host] = data["hosts"]

    def assumed(value: float) -> dict[str, Any]:
        return {"value": value, "source": "assumption of a test"}

    rates = dict.fromkeys(("f32", "bf16", "f16"), assumed(1e6))
    host["device"] |= {"flops_per_second": rates, "memory_bytes_per_second": assumed(1e6)}
    host["cores"] = devices  # nobody shares one
    host["link"] = {"bytes_per_second": assumed(1e12), "latency_seconds": assumed(1e-9)}
    return cluster_from_data(data)


def planned(model: Model, batch: int, microbatches: int, devices: int = 4, **fixed: Any) -> Plan:
    """The best plan for ``slow_devices_fast_links``, as far as it is not fixed."""
    fix = Fix(microbatches=microbatches, **{"remat": "none", **fixed})
    request = Request(slow_devices_fast_links(devices), batch, fix)
    return search(lambda count: trace(model, batch, count).graph, request)


def splits_as_fixed(plan: Plan) -> bool:
    """Whether every mesh axis of every stage splits something, so that a test of the plan tests that axis."""

    def axes(stage: PlannedStage) -> set[str]:
        layouts = [read_layout(plan.layouts[name]) for name in stage.layouts]
        return {axis for layout in layouts for spec in layout.values.values() for dim in spec for axis in dim}

    return all({axis for axis, size in stage.mesh.items() if size > 1} <= axes(stage) for stage in plan.stages)


def batches(model: Model, size: int, steps: int, classes: int = 16, seed: int = 0) -> list[PyTree]:
    """One batch for each step. Of tokens, the target follows from the token, so that there is something to learn."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray[Any, Any]:
        whole = np.issubdtype(leaf.dtype, np.integer)
        values = rng.integers(0, classes, leaf.shape) if whole else rng.normal(size=leaf.shape)
        return values.astype(leaf.dtype)

    found = []
    for _ in range(steps):
        batch = jax.tree.map(draw, model.batch_fn(size))
        if "targets" in batch:
            batch["targets"] = (5 * batch["tokens"] + 1) % classes
        found.append(batch)
    return found


def layered(reduction: Literal["mean", "sum"], skip: bool = False) -> Model:
    """A loss with aux, as users write it; with ``skip`` the last layer adds what the first gave."""

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        first = x = jnp.tanh(batch["x"] @ params[0]["w"] + params[0]["b"])
        for layer in params[1:]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        wrong = ((x + first if skip else x) - batch["y"]) ** 2
        loss = wrong.mean() if reduction == "mean" else wrong.sum()
        return loss, {"worst": wrong.max(), "loss": loss}

    def init_fn(key: jax.Array) -> Any:
        return [{"w": jax.random.normal(k, (24, 24)) / 5, "b": jnp.zeros(24)} for k in jax.random.split(key, 6)]

    def batch_fn(size: int) -> Any:
        return {name: jax.ShapeDtypeStruct((size, 24), jnp.float32) for name in "xy"}

    return Model(f"layered {reduction}", loss_fn, init_fn, batch_fn, has_aux=True, loss_reduction=reduction)


def first_parameters(model: Model, seed: int = 1) -> PyTree:
    return compiled(model.init_fn)(key(seed))


def train_plainly(
    model: Model, weights: PyTree, data: Iterable[PyTree], microbatches: int, optimizer: optax.GradientTransformation
) -> tuple[list[float], PyTree]:
    """Plain JAX on one device over the same micro-batches: the loss of each step, and the parameters after the last."""
    differentiate, update = _gradient_of(model), compiled(optimizer.update)
    state = optimizer.init(weights)
    scale = 1.0 / microbatches if model.loss_reduction == "mean" else 1.0
    losses = []
    for batch in data:
        gradient, total = None, 0.0
        for m in range(microbatches):
            part = jax.tree.map(lambda leaf, m=m: np.split(leaf, microbatches)[m], batch)
            result, more = differentiate(weights, part)
            gradient = more if gradient is None else jax.tree.map(jnp.add, gradient, more)
            total += float(result[0] if model.has_aux else result)
        gradient = jax.tree.map(lambda g: g * jnp.asarray(scale, g.dtype), gradient)
        changes, state = update(gradient, state, weights)
        weights = optax.apply_updates(weights, changes)
        losses.append(total * scale)
    return losses, weights


@cache
def _gradient_of(model: Model) -> Any:
    return cast(Any, compiled(jax.value_and_grad(model.loss_fn, has_aux=model.has_aux)))


def constant(model: Model) -> tuple[Model, Any]:
    """The model with its first parameters as constants: compiling the drawing of numbers takes longer than the rest."""
    weights = first_parameters(model)
    return replace(model, init_fn=lambda _: weights), weights


def trained(trainer: Trainer, data: list[Any]) -> tuple[list[float], Any]:
    state = trainer.init(key())
    losses = []
    for batch in data:
        state, metrics = trainer.step(state, batch)
        losses.append(metrics.loss)
    return losses, trainer.parameters(state)


def assert_parity(
    model: Model,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    loss_tolerance: float = 1e-5,
    weight_tolerance: float = 1e-4,
) -> None:
    """Losses step by step, and every parameter leaf after the last step, by the distance that it has moved."""
    assert splits_as_fixed(plan)
    model, weights = constant(model)
    data = batches(model, plan.batch, STEPS)
    expected, after = train_plainly(model, weights, data, plan.microbatches, optimizer)
    losses, found = trained(build(plan, model, optimizer), data)
    np.testing.assert_allclose(losses, expected, rtol=loss_tolerance)
    for (path, leaf), (before, truth) in zip(
        jax.tree.leaves_with_path(found),
        zip(jax.tree.leaves(weights), jax.tree.leaves(after), strict=True),
        strict=True,
    ):
        moved = np.linalg.norm(np.asarray(truth, np.float64) - np.asarray(before))
        error = np.linalg.norm(np.asarray(leaf, np.float64) - np.asarray(truth))
        assert error <= weight_tolerance * moved + 1e-7, jax.tree_util.keystr(path)
