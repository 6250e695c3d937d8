"""Scans over stacked layers: when they become layers, when not, and that the program stays the same."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meshwright.models.base import Model, PyTree
from meshwright.plan.trace.model import Trace, trace
from meshwright.plan.trace.parts import Part, join_parts
from tests.models.training import compiled
from tests.plan.chain import chained

WIDTH, DEPTH, SAMPLES = 8, 4, 4


def weights(key: Any) -> PyTree:
    shape = (DEPTH, WIDTH, WIDTH)
    first, second, last = (jax.random.normal(k, shape) / 3 for k in jax.random.split(key, 3))
    return {"first": first, "second": second, "last": last[0]}


def rows(size: int) -> Any:
    return jax.ShapeDtypeStruct((size, WIDTH), jnp.float32)


def traced(loss: Callable[[Any, Any], Any]) -> Trace:
    return trace(Model("scanned", loss, weights, rows), SAMPLES, 1)


def step(x: Any, w: Any) -> tuple[Any, None]:
    return jnp.tanh(x @ w), None


def plain(p: PyTree, x: Any) -> Any:
    return jnp.mean(lax.scan(step, x, p["first"])[0] @ p["last"])


def both_ways(p: PyTree, x: Any) -> Any:
    """Two scans, the second backwards over products of two stacks, and both with results of each trip."""

    def second(x: Any, pair: Any) -> tuple[Any, Any]:
        w, carried = pair
        return jnp.tanh(x @ w + carried), x.sum()

    x, carried = lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, p["first"])
    x, sums = lax.scan(second, x, (p["second"].astype(jnp.bfloat16).astype(jnp.float32), carried), reverse=True)
    return jnp.mean(x @ p["last"]) + jnp.mean(sums**2 * jnp.arange(DEPTH))


def mixed_up(p: PyTree, x: Any) -> Any:
    """Stacks that lie with their layers last, as some frameworks keep them."""
    stack = jnp.moveaxis(p["first"].transpose(1, 2, 0), 2, 0)
    return jnp.mean(lax.scan(jax.checkpoint(step), x, stack)[0] @ p["last"])


def assert_gradient(found: Trace) -> None:
    params = weights(jax.random.key(0))
    batch = jax.random.normal(jax.random.key(1), (SAMPLES, WIDTH))
    leaves = jax.tree.leaves(params)
    loss, gradients, _ = compiled(lambda p, b: chained(found, p, b))([part.of(leaves) for part in found.parts], [batch])
    value, wanted = compiled(jax.value_and_grad(found.model.loss_fn))(params, batch)
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    used = {part.leaf for part, gradient in zip(found.parts, gradients, strict=True) if gradient is not None}
    own = join_parts(found.parts, [np.zeros(1) if g is None else np.asarray(g) for g in gradients])
    for leaf in used:
        np.testing.assert_allclose(own[leaf], jax.tree.leaves(wanted)[leaf], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("loss", "stacks"), [(plain, 1), (both_ways, 2), (mixed_up, 1)])
def test_the_trips_together_are_the_scan(loss: Callable[[Any, Any], Any], stacks: int) -> None:
    found = traced(loss)
    assert sum(part.row is not None for part in found.parts) == stacks * DEPTH
    assert all(op.primitive != "scan" for c in found.graph.classes for op in c.operators)
    assert found.graph.notes == ()
    assert_gradient(found)


def test_every_layer_reads_its_own_row_alone() -> None:
    graph = traced(plain).graph
    names = [leaf.name for leaf in graph.parameters]
    assert names == [*(f"first[{i}]" for i in range(DEPTH)), "last", "second"]
    read = [{names[leaf] for leaf in use.parameters} for use in graph.layers]
    assert read[:DEPTH] == [{f"first[{i}]"} for i in range(DEPTH)]


def decayed(p: PyTree, x: Any) -> Any:
    return plain(p, x) + jnp.sum(p["first"] ** 2)


def shared(p: PyTree, x: Any) -> Any:
    return jnp.mean(lax.scan(step, x, p["first"] + p["second"])[0] @ p["last"])


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (decayed, r"a scan of 4 trips is one operator and stays on one stage: first is also read outside it; .*alone"),
        (shared, r"a scan of 4 trips .*: what it scans is computed before it"),
    ],
)
def test_a_scan_whose_stack_cannot_be_taken_apart_stays_one_operator_and_says_so(
    loss: Callable[[Any, Any], Any], line: str
) -> None:
    found = traced(loss)
    (note,) = found.graph.notes
    assert re.match(line, note)
    assert found.parts == tuple(Part(leaf) for leaf in range(3))
    assert_gradient(found)


def test_a_loop_over_time_steps_is_no_stack_of_layers() -> None:
    """A recurrent net scans its inputs, and here a small table of positions, and keeps its weights."""

    def loss(p: PyTree, x: Any) -> Any:
        positions = p["first"][:SAMPLES, 0]
        return jnp.mean(lax.scan(lambda h, row: (jnp.tanh(h @ p["last"] + sum(row)), None), x[0], (x, positions))[0])

    found = traced(loss)
    assert found.graph.notes == ()
    assert all(part.row is None for part in found.parts)


def test_a_scan_that_does_little_of_the_work_stays_one_operator() -> None:
    def loss(p: PyTree, x: Any) -> Any:
        y = x
        for _ in range(80):
            y = jnp.tanh(y @ p["last"])
        return jnp.mean(lax.scan(step, y, p["first"])[0])

    found = traced(loss)
    assert all(part.row is None for part in found.parts)
    assert found.graph.notes == ()


def test_parts_and_leaves_are_the_same_arrays() -> None:
    leaves = [np.arange(24.0).reshape(2, 3, 4), np.ones(5)]
    parts = [*(Part(0, row, 1) for row in range(3)), Part(1)]
    arrays = [part.of(leaves) for part in parts]
    assert [a.shape for a in arrays] == [(2, 4)] * 3 + [(5,)]
    for joined, leaf in zip(join_parts(parts, arrays), leaves, strict=True):
        np.testing.assert_array_equal(joined, leaf)
