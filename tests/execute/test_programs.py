"""The compiled programs of a stage: what they keep, what they leave unsummed, and what they give."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest

from meshwright.execute.hlo import compiled_collectives
from meshwright.execute.programs import sharding
from meshwright.execute.train import Trainer, build
from tests.execute.plain import batches, key, model_of, planned

SPEC = "gpt:layers=2,hidden=40,heads=2,seq=8,vocab=56"


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def trainer_of(**fixed: Any) -> Trainer:
    model = model_of(SPEC)
    return build(planned(model, 8, 2, **fixed), model, optax.sgd(0.1))


@pytest.fixture(scope="module")
def spread() -> Trainer:
    return trainer_of(pipeline=1, tensor=1, data=4)


def forward(trainer: Trainer) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """The first micro-batch through stage 0."""
    split, runtime = trainer.splits[0], trainer.runtime
    weights = trainer.init(key())[0].parameters
    leaves = jax.tree.leaves(batches(trainer.model, 4, 1)[0])
    samples = [
        jax.device_put(leaves[leaf], sharding(runtime.meshes[0], split.batch_specs[leaf])) for leaf in split.batch
    ]
    found = runtime.programs[0].forward([weights[leaf] for leaf in split.parameters], samples, [])
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_weights_are_never_kept_from_forward_to_backward(remat: str) -> None:
    """No kept array has the shape of a weight matrix; with rematerialisation only layer entries are kept."""
    trainer = trainer_of(devices=1, remat=remat)
    graph = trainer.runtime.graph
    matrices = {leaf.tensor.shape for leaf in graph.parameters if len(leaf.tensor.shape) > 1}
    _, kept, outputs = forward(trainer)
    assert outputs[0].shape == ()
    assert kept
    assert not {array.shape for array in kept} & (matrices | {shape[::-1] for shape in matrices})
    if remat == "full":
        entries = {value for use in graph.layers for value in use.entries}
        assert sorted(a.shape for a in kept) == sorted(graph.values[v].shape for v in entries)


def test_gradients_stay_partial_until_the_end_of_the_iteration(spread: Trainer) -> None:
    """Over data 4 no micro-batch's backward communicates; the reduction sums each parameter once."""
    programs = spread.runtime.programs[0]
    assert compiled_collectives(programs.backward.as_text()) == ()
    sums = compiled_collectives(programs.reduce.as_text())
    assert {c.kind for c in sums} == {"all_reduce"}
    assert sum(c.elements for c in sums) >= spread.plan.parameters
    # the table that is tied to the output has two accumulators, added before the sum or after
    assert sum(c.elements for c in sums) <= spread.plan.parameters + 56 * 40


def test_accumulators_begin_at_zero_one_part_on_each_device(spread: Trainer) -> None:
    split, zeros = spread.splits[0], spread.runtime.programs[0].zeros()
    for gradient, array in zip(split.gradients, zeros, strict=True):
        shape = spread.runtime.graph.parameters[gradient.leaf].tensor.shape
        assert gradient.partial == ("data",)
        assert array.shape == (4, *shape)
        assert {shard.data.shape for shard in array.addressable_shards} == {(1, *shape)}
        assert not np.asarray(array).any()


def test_a_tensor_split_stage_holds_its_part_of_the_weights() -> None:
    trainer = trainer_of(pipeline=1, tensor=4, data=1)
    split = trainer.splits[0]
    weights = trainer.init(key())[0].parameters
    held = sum(array.addressable_shards[0].data.size for array in weights.values())
    assert held < 0.5 * trainer.plan.parameters
    for leaf, array in weights.items():
        assert array.sharding.is_equivalent_to(
            sharding(trainer.runtime.meshes[0], split.parameter_specs[leaf]), array.ndim
        )
