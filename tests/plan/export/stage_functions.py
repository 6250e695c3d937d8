"""Stage functions of a plan from the traced model, and plain JAX beside the exported file, in a process of its own."""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from meshwright.models.zoo import get_model
from meshwright.plan.planfile import load_plan
from meshwright.plan.trace.equations import Literal, apply
from meshwright.plan.trace.model import Trace, trace

Function = Callable[[dict[str, Any], Any, dict[int, Any]], Any]


def stage_functions(traced: Trace, layers: list[tuple[int, int]], loss_stage: int) -> list[Function]:
    """One function a stage: what is sent is a table of the model's values, by number."""
    graph = traced.graph
    stage_of = {layer: s for s, span in enumerate(layers) for layer in range(*span)}
    readers: dict[int, set[int]] = {}
    for layer, use in enumerate(graph.layers):
        for value in use.entries:
            readers.setdefault(value, set()).add(stage_of[layer])

    def function(s: int) -> Function:
        def run(params: dict[str, Any], batch: Any, received: dict[int, Any]) -> Any:
            values = {int(number): x for sent in received.values() for number, x in sent.items()}
            made: list[int] = []
            samples = jax.tree.leaves(batch)
            for layer in range(*layers[s]):
                use = graph.layers[layer]
                inner = graph.classes[use.layer_class]
                known = {
                    n: params[graph.parameters[x].name] for x, n in zip(use.parameters, inner.parameters, strict=True)
                }
                known |= {n: samples[x] for x, n in zip(use.batch, inner.batch, strict=True)}
                known |= {n: values[v] for v, n in zip(use.entries, inner.entries, strict=True)}
                for eqn in traced.classes[use.layer_class].forward:
                    given = [x.value if isinstance(x, Literal) else known[x] for x in eqn.inputs]
                    known.update(zip(eqn.outputs, apply(eqn, given), strict=True))
                values.update({v: known[n] for v, n in zip(use.exits, inner.exits, strict=True)})
                made += use.exits
            if s == loss_stage:
                return values[graph.loss]
            targets = sorted({t for v in made for t in readers.get(v, ()) if t != s})
            return {t: {str(v): values[v] for v in made if t in readers.get(v, ())} for t in targets}

        return run

    return [function(s) for s in range(len(layers))]


def example(shapes: Any, seed: int) -> Any:
    """Small random numbers in these shapes; quicker than the model's own, which compile a program a shape."""
    rng = np.random.default_rng(seed)

    def leaf(shape: Any) -> Any:
        if np.issubdtype(shape.dtype, np.integer):
            return rng.integers(0, 8, shape.shape).astype(shape.dtype)
        return (0.1 * rng.normal(size=shape.shape)).astype(shape.dtype)

    return jax.tree.map(leaf, shapes)


def main(plan_path: str, file: str) -> None:
    """Print the loss of plain JAX and of the exported file, and the largest relative difference of a gradient."""
    plan = load_plan(plan_path)
    spec = importlib.util.spec_from_file_location("exported", file)
    assert spec is not None
    assert spec.loader is not None
    exported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(exported)
    model = get_model(plan.model)
    params = example(jax.eval_shape(model.init_fn, jax.random.key(0)), 0)
    batch = example(model.batch_fn(plan.batch), 1)
    pieces = list(exported.microbatches(batch))
    one = jax.jit(jax.value_and_grad(model.loss_fn))
    plain = [one(params, piece) for piece in pieces]
    loss = sum(float(x) for x, _ in plain) / len(plain)
    wanted = jax.tree.map(lambda *leaves: sum(map(np.asarray, leaves)) / len(leaves), *(g for _, g in plain))
    if len(plan.stages) == 1:
        got, gradients = exported.value_and_grad(model.loss_fn, params, batch)
    else:
        spans = [tuple(row["layers"]) for row in exported.STAGES]
        functions = stage_functions(trace(model, plan.batch, plan.microbatches), spans, exported.LOSS_STAGE)
        got, gradients = exported.pipeline_value_and_grad(functions, params, batch)
    apart = max(
        float(np.max(np.abs(np.asarray(g) - w)) / (np.max(np.abs(w)) + 1e-30))
        for g, w in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True)
    )
    print(loss, float(got), apart)


if __name__ == "__main__":
    main(*sys.argv[1:])
