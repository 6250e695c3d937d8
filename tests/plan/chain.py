"""A traced model run by hand: its layers chained forward, then backward, as the executor will do it on many devices."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshwright.models.base import Model, PyTree
from meshwright.models.zoo import get_model
from meshwright.plan.trace.equations import evaluate
from meshwright.plan.trace.model import Trace, trace
from tests.models.training import compiled, random_batch

# One of each family, small enough to compile in a second or two; every size that can be halved is even.
TINY = {
    "gpt": "gpt:layers=4,hidden=16,heads=2,seq=8,vocab=32",
    "moe": "moe:layers=2,hidden=16,heads=2,experts=4,seq=8,group=8,vocab=32,ffn=2,tied=false",
    "llama": "llama:layers=2,hidden=16,heads=4,kv_heads=2,ffn=24,seq=8,vocab=32",
    "wresnet": "wresnet:layers=50,channels=4,width=2,image=32,classes=8",
    "two-tower": "two-tower:layers=1,hidden=16,heads=2,seq=8,vocab=32,features=12",
}
BATCH = 4


@cache
def traced(name: str, microbatches: int = 1) -> Trace:
    """One trace of a tiny model, shared by all tests."""
    model = get_model(TINY[name])
    return trace(model, BATCH * microbatches, microbatches)


def inputs_of(model: Model, size: int = BATCH, classes: int = 8) -> tuple[PyTree, PyTree]:
    """Parameters and a batch of noise."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init_fn, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)
    return params, random_batch(model, size, classes)


def chained(
    found: Trace, parameters: Sequence[Any], batch: Sequence[Any]
) -> tuple[Any, list[Any], list[dict[int, Any]]]:
    """(loss, gradients or None per parameter leaf, all values of each layer).

    The backward pass of a layer sees only what its graph says is kept: parameters, batch, kept entries and residuals.
    """
    graph = found.graph
    crossing: dict[int, Any] = {}
    values: list[dict[int, Any]] = []
    for use in graph.layers:
        joint = found.classes[use.layer_class]
        g = joint.graph
        env = dict(zip(g.parameters, (parameters[i] for i in use.parameters), strict=True))
        env |= zip(g.batch, (batch[i] for i in use.batch), strict=True)
        env |= zip(g.entries, (crossing[v] for v in use.entries), strict=True)
        evaluate(joint.forward, env)
        crossing |= zip(use.exits, (env[v] for v in g.exits), strict=True)
        values.append(env)
    cotangents: dict[int, Any] = {graph.loss: jnp.ones(())}
    gradients: list[Any] = [None] * len(parameters)
    for index, use in reversed(list(enumerate(graph.layers))):
        joint = found.classes[use.layer_class]
        g = joint.graph
        kept = {*g.parameters, *g.batch, *g.kept_entries, *g.residuals}
        env = {v: x for v, x in values[index].items() if v in kept}
        env |= {inner: cotangents[v] for v, inner in zip(use.exits, g.exit_cotangents, strict=True) if inner >= 0}
        evaluate(joint.backward, env)
        values[index] |= env
        for v, inner in zip(use.entries, g.entry_cotangents, strict=True):
            if inner >= 0:
                cotangents[v] = cotangents.get(v, 0) + env[inner]
        for leaf, inner in zip(use.parameters, g.gradients, strict=True):
            if inner >= 0:
                gradients[leaf] = env[inner] if gradients[leaf] is None else gradients[leaf] + env[inner]
    return crossing[graph.loss], gradients, values


@cache
def values_of(name: str) -> tuple[Any, list[Any], list[dict[int, Any]]]:
    """The chained run of a tiny model on noise, made once for all tests."""
    found = traced(name)
    params, batch = inputs_of(found.model)
    run = compiled(lambda p, b: chained(found, p, b))
    result: tuple[Any, list[Any], list[dict[int, Any]]] = jax.device_get(
        run(jax.tree.leaves(params), jax.tree.leaves(batch))
    )
    return result
