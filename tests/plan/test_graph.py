"""The graph of a model: what its counts promise."""

from dataclasses import replace

import jax
import pytest

from meshwright.models.zoo import get_model
from meshwright.plan.graph import Leaf, Tensor
from meshwright.plan.trace.model import trace
from tests.plan.planned import graph_of


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_training_keeps_weights_gradients_and_moments_of_every_parameter(dtype: str) -> None:
    model = get_model(f"gpt:layers=2,hidden=32,heads=2,seq=16,vocab=256,dtype={dtype}")
    leaves = jax.tree.leaves(jax.eval_shape(model.init_fn, jax.random.key(0)))
    wanted = sum(leaf.size * (2 * leaf.dtype.itemsize + 8) for leaf in leaves)
    assert trace(model, 4, 1).graph.training_bytes(optimizer_bytes=8) == wanted


def test_a_parameter_that_no_layer_trains_is_kept_once() -> None:
    graph = graph_of(1)
    table = Leaf("table", Tensor((10, 10), "int32"))
    larger = replace(graph, parameters=(*graph.parameters, table))
    assert larger.training_bytes(8) == graph.training_bytes(8) + 400
