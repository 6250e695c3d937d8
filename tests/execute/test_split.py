"""A plan applied to its model: what one stage sends, another receives; every leaf has one owner."""

from dataclasses import replace

import msgspec
import pytest

from meshwright.errors import PlanError
from meshwright.execute.split import named, named_boundary, owners, split_plan
from meshwright.plan.graph import ModelGraph, Tensor
from meshwright.plan.planfile import Plan
from meshwright.plan.trace.model import trace
from tests.execute.plain import layered, model_of, planned

GPT = "gpt:layers=2,hidden=48,heads=3,seq=8,vocab=48"
MODELS = {
    "tied": model_of(GPT),
    "untied": model_of(GPT + ",tied=false"),
    "two towers": model_of("two-tower:layers=1,hidden=16,heads=2,seq=8,vocab=16,features=16"),
    "skip": layered("mean", skip=True),
}


@pytest.fixture(scope="module", params=MODELS)
def pipeline(request: pytest.FixtureRequest) -> tuple[str, Plan, ModelGraph]:
    model = MODELS[request.param]
    plan = planned(model, 8, 2, pipeline=4, tensor=1, data=1)
    return request.param, plan, trace(model, 8, 2).graph


def test_each_received_value_is_sent_once_from_the_stage_that_made_it(pipeline: tuple[str, Plan, ModelGraph]) -> None:
    """Values that skip stages go straight from their maker to their readers."""
    name, plan, graph = pipeline
    splits = split_plan(plan, graph)
    makers = {value: split.index for split in splits for value in split.produced}
    wanted = {(makers[v], split.index, v) for split in splits for v in split.received}
    sent = [(t.source, t.target, v) for t in plan.transfers if t.what == "activation" for v in t.values]
    assert sorted(sent) == sorted(wanted)
    assert all(source < target for source, target, _ in wanted)
    assert all(v in splits[source].sent for source, _, v in wanted)
    assert any(target > source + 1 for source, target, _ in wanted) == (name == "skip")


def test_each_cotangent_goes_back_the_way_its_value_came(pipeline: tuple[str, Plan, ModelGraph]) -> None:
    _, plan, graph = pipeline
    splits = split_plan(plan, graph)
    awaited = {(reader, split.index, value) for split in splits for value, reader in split.cotangents_in}
    makers = {value: split.index for split in splits for value in split.produced}
    returned = {(split.index, makers[value], value) for split in splits for value in split.cotangents_out}
    sent = {(t.source, t.target, v) for t in plan.transfers if t.what == "cotangent" for v in t.values}
    assert awaited == returned == sent


def test_the_first_reader_owns_a_leaf_and_only_tied_leaves_have_two(pipeline: tuple[str, Plan, ModelGraph]) -> None:
    name, plan, graph = pipeline
    splits = split_plan(plan, graph)
    owner = owners(splits)
    assert sorted(owner) == list(range(len(graph.parameters)))
    shared = [leaf for leaf in owner if sum(leaf in split.parameters for split in splits) > 1]
    assert [graph.parameters[leaf].tensor.shape for leaf in shared] == ([(48, 48)] if name == "tied" else [])
    assert all(owner[leaf] == min(s.index for s in splits if leaf in s.parameters) for leaf in owner)
    assert [split.has_loss for split in splits] == [False, False, False, True]


def test_the_plan_of_another_program_is_refused_with_one_line(pipeline: tuple[str, Plan, ModelGraph]) -> None:
    _, plan, graph = pipeline
    with pytest.raises(PlanError, match=f"fingerprint {plan.fingerprint}, now 0123.* plan again") as refused:
        split_plan(plan, replace(graph, fingerprint="0123"))
    assert "\n" not in str(refused.value)
    other = msgspec.structs.replace(plan, fingerprint="other")
    with pytest.raises(PlanError, match=r"fingerprint other"):
        split_plan(other, graph)


def test_a_spec_is_read_as_names_of_mesh_axes() -> None:
    assert named("data,-,tensor") == (("data",), (), ("tensor",))


def test_a_boundary_splits_only_values_that_it_divides() -> None:
    mesh = {"data": 2, "tensor": 3}
    assert named_boundary(Tensor((4, 6), "float32"), "data", mesh) == (("data",), ())
    assert named_boundary(Tensor((), "float32"), "data", mesh) == ()
    assert named_boundary(Tensor((4, 6), "float32"), "-", mesh) == ((), ())
