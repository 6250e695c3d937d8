"""A model becomes a chain of layers on abstract values only; what cannot is refused with one line."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from meshwright.errors import ModelError
from meshwright.models.base import Model
from meshwright.models.zoo import get_model
from meshwright.plan.trace.model import trace
from tests.plan.chain import TINY, traced


def small(loss: Any, name: str = "small", has_aux: bool = False, microbatchable: bool = True) -> Model:
    """One weight matrix and one batch leaf."""
    return Model(
        name,
        loss,
        lambda key: {"w": jnp.ones((4, 4))},
        lambda n: {"x": jax.ShapeDtypeStruct((n, 4), jnp.float32)},
        has_aux=has_aux,
        microbatchable=microbatchable,
    )


def squares(p: Any, b: Any) -> Any:
    return ((b["x"] @ p["w"]) ** 2).mean()


def test_equal_blocks_share_one_class() -> None:
    graph = trace(get_model("gpt:layers=6,hidden=16,heads=2,seq=8,vocab=32"), 4, 1).graph
    owners = [use.layer_class for use in graph.layers]
    assert len(owners) == 6
    assert len(set(owners[1:-1])) == 1
    assert len(graph.classes) == 3


def test_a_layer_that_differs_in_one_number_has_a_class_of_its_own() -> None:
    def loss(p: Any, b: Any) -> Any:
        x = b["x"]
        for scale in (1.0, 1.0, 1.0, 2.0, 1.0):
            x = jnp.tanh(x @ p["w"]) * scale
        return (x**2).mean()

    graph = trace(small(loss), 4, 1).graph
    owners = [use.layer_class for use in graph.layers]
    assert len(owners) > len(graph.classes) > 1


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_and_batch_leaf_is_read_and_every_entry_was_written_before(name: str) -> None:
    graph = traced(name).graph
    written: set[int] = set()
    for use in graph.layers:
        assert written.issuperset(use.entries)
        written.update(use.exits)
    assert graph.loss in written
    assert {i for use in graph.layers for i in use.parameters} == set(range(len(graph.parameters)))
    assert {i for use in graph.layers for i in use.batch} == set(range(len(graph.batch)))


@pytest.mark.parametrize("name", TINY)
def test_the_zoo_has_a_rule_for_all_it_does(name: str) -> None:
    assert traced(name).graph.unknown == ()


def test_flops_of_a_gpt_are_those_that_are_published() -> None:
    """72·b·s·L·h²·(1 + s/6h) for the blocks, 6·b·s·h·V for the logits, without rematerialisation.

    Source: Narayanan et al., SC 2021, section 5.1 and appendix (there with the forward pass run twice).
    """
    layers, h, s, vocab, b = 3, 32, 16, 64, 4
    graph = trace(get_model(f"gpt:layers={layers},hidden={h},heads=4,seq={s},vocab={vocab}"), b, 1).graph
    published = 72 * b * s * layers * h**2 * (1 + s / (6 * h)) + 6 * b * s * h * vocab
    assert graph.model_flops == pytest.approx(published, rel=1e-12)


def test_the_microbatch_scales_activations_and_not_parameters() -> None:
    one, four = traced("gpt", 1).graph, trace(get_model(TINY["gpt"]), 16, 1).graph
    assert four.microbatch_size == 4 * one.microbatch_size
    assert four.model_flops == 4 * one.model_flops
    assert four.parameters == one.parameters


def test_fingerprints_tell_programs_apart_and_agree_between_traces() -> None:
    again = trace(get_model(TINY["gpt"]), 4, 1).graph.fingerprint
    assert again == traced("gpt").graph.fingerprint
    wider = trace(get_model("gpt:layers=4,hidden=32,heads=2,seq=8,vocab=32"), 4, 1).graph.fingerprint
    assert wider != again


def test_a_trace_that_is_told_which_layers_are_equal_gives_the_same_graph() -> None:
    model = get_model(TINY["moe"])
    known = trace(model, 8, 1).graph
    assert trace(model, 8, 2, like=known).graph == trace(model, 8, 2).graph


@pytest.mark.timeout(120)
def test_thirty_nine_billion_parameters_are_traced_without_an_array() -> None:
    before = {id(array) for array in jax.live_arrays()}
    graph = trace(get_model("gpt-39b"), 8, 8).graph
    new = [array for array in jax.live_arrays() if id(array) not in before]
    assert graph.parameter_count > 39e9
    assert sum(array.nbytes for array in new) < 1000


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (lambda p, b: (p["w"] ** 2).mean(), "the loss does not depend on the batch"),
        (lambda p, b: (b["x"] ** 2).mean(), "the loss of model 'small' does not depend on its parameters"),
        (lambda p, b: jax.lax.stop_gradient(squares(p, b)), "does not depend on its parameters"),
        (lambda p, b: b["x"] @ p["w"], "the loss of model 'small' is not one number"),
        (lambda p, b: (squares(p, b), 1.0), "set has_aux=True"),
        (lambda p, b: (b["x"] @ p["w"]).argmax(), "does not depend on its parameters"),
        (lambda p, b: b["x"] @ p["nothing"], "cannot be traced: 'nothing'"),
        (lambda p, b: squares(p, b) if b["x"][0, 0] > 0 else 0.0, "cannot be traced"),
    ],
)
def test_a_loss_that_cannot_be_planned_is_refused_with_one_line(loss: Any, line: str) -> None:
    with pytest.raises(ModelError) as caught:
        trace(small(loss), 4, 1)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("batch", "microbatches", "line"), [(10, 4, "use 2"), (7, 3, "use 1"), (0, 1, "batch of 0")])
def test_a_batch_that_does_not_split_names_a_number_that_does(batch: int, microbatches: int, line: str) -> None:
    with pytest.raises(ModelError, match=line) as caught:
        trace(small(squares), batch, microbatches)
    assert "\n" not in str(caught.value)


def test_a_model_that_mixes_its_samples_may_not_be_microbatched() -> None:
    with pytest.raises(ModelError, match="use 1 micro-batch"):
        trace(small(squares, microbatchable=False), 4, 2)
    assert trace(small(squares, microbatchable=False), 4, 1).graph.microbatch_size == 4
