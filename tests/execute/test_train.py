"""A trainer on fake devices of one process trains as plain JAX does on one, whatever the plan."""

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
import optax
import pytest

from meshwright.errors import ExecutionError, PlanError
from meshwright.execute.train import build
from tests.execute.plain import assert_parity, batches, key, layered, model_of, planned

GPT = "gpt:layers=2,hidden=48,heads=3,seq=8,vocab=48"

SLOW = ("group norm", "untied", "two devices to one")  # long to compile, or easier than what stays
ONE_F_ONE_B: dict[str, Any] = {"schedule": "1f1b"}
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {  # model, batch, micro-batches, what is fixed
    "pipeline 2 x tensor 2": (GPT, 12, 3, {"pipeline": 2, "tensor": 2, "data": 1, **ONE_F_ONE_B}),
    "pipeline 4": (GPT, 12, 3, {"pipeline": 4, "tensor": 1, "data": 1, "schedule": "gpipe"}),
    "data 4": (GPT, 12, 3, {"pipeline": 1, "tensor": 1, "data": 4}),
    "tensor 4": (GPT, 12, 3, {"pipeline": 1, "tensor": 4, "data": 1}),
    "data 2 x tensor 2": (GPT, 12, 3, {"pipeline": 1, "tensor": 2, "data": 2}),
    "unequal meshes": (GPT, 12, 2, {"stages": ((1, 1), (1, 3)), **ONE_F_ONE_B}),
    "two devices to one": (GPT, 12, 2, {"stages": ((2, 1), (1, 1)), "schedule": "gpipe"}),
    "rematerialised": (GPT, 12, 3, {"pipeline": 2, "tensor": 1, "data": 2, "remat": "full"}),
    "untied": (GPT + ",tied=false", 12, 3, {"pipeline": 2, "tensor": 2, "data": 1}),
    "experts": (
        "moe:layers=2,hidden=16,heads=2,experts=4,seq=8,vocab=16,ffn=2,group=8",
        8,
        2,
        {"pipeline": 2, "data": 2, "tensor": 1},
    ),
    "group norm": (
        "wresnet:layers=50,channels=32,width=1,image=16,classes=16,norm=group",
        8,
        2,
        {"pipeline": 2, "data": 2, "tensor": 1},
    ),
    "two towers": (
        "two-tower:layers=1,hidden=16,heads=2,seq=8,vocab=16,features=16",
        8,
        2,
        {"pipeline": 4, "tensor": 1, "data": 1},
    ),
    "eager": (GPT, 12, 3, {"pipeline": 2, "tensor": 2, "data": 1, "schedule": "eager-1f1b"}),
    "stages that form a graph": (
        "two-tower:layers=2,hidden=16,heads=2,seq=2,vocab=16,features=16",
        8,
        4,
        {"pipeline": 4, "tensor": 1, "data": 1, "schedule": "graph-1f1b"},
    ),
    "a trunk that forks": (
        "multi-branch:branches=2,layers=1,trunk=1,after=1,hidden=16,features=4,targets=4",
        8,
        4,
        {"pipeline": 4, "tensor": 1, "data": 1, "schedule": "graph-1f1b"},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_one_process_trains_as_one_device_does(case: str) -> None:
    """SGD with momentum: its step is linear in the gradient, so that rounding is not magnified as Adam does."""
    spec, batch, microbatches, fixed = CASES[case]
    model = model_of(spec)
    assert_parity(model, planned(model, batch, microbatches, **fixed), optax.sgd(0.05, momentum=0.9))


def test_adam_with_a_schedule_and_a_whole_number_in_its_state() -> None:
    """Every stage counts the steps for itself. The large epsilon keeps Adam from making steps of rounding errors."""
    model = layered("mean")
    optimizer = optax.adamw(optax.linear_schedule(1e-2, 1e-3, 4), eps=1e-3)
    assert_parity(model, planned(model, 24, 3, pipeline=2, tensor=2, data=1), optimizer)


def test_a_model_that_computes_in_bfloat16() -> None:
    """Sums of another order round at 2^-9 in bfloat16, so losses agree to some 1e-3 and steps to some 1e-2."""
    model = model_of(GPT + ",dtype=bf16")
    plan = planned(model, 12, 3, pipeline=2, tensor=2, data=1)
    assert_parity(model, plan, optax.sgd(0.05, momentum=0.9), loss_tolerance=2e-3, weight_tolerance=5e-2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_with_aux_and_losses_that_add_up(reduction: Literal["mean", "sum"]) -> None:
    model = layered(reduction)
    assert_parity(model, planned(model, 24, 3, pipeline=2, data=2, tensor=1), optax.sgd(0.01, momentum=0.9))


def test_a_value_that_skips_stages() -> None:
    model = layered("mean", skip=True)
    plan = planned(model, 24, 3, pipeline=4, data=1, tensor=1)
    assert any(t.target > t.source + 1 for t in plan.transfers)
    assert_parity(model, plan, optax.sgd(0.1, momentum=0.9))


def test_first_parameters_are_those_of_init_fn_wherever_they_lie() -> None:
    """Exactly, by the generator that plans are tested with and by the usual one."""
    model = layered("mean")
    trainer = build(planned(model, 24, 3, pipeline=2, tensor=2, data=1), model, optax.sgd(0.01))
    assert any(not array.sharding.is_fully_replicated for array in trainer.init(key())[0].parameters.values())
    for seed in (key(), jax.random.key(2), jax.random.PRNGKey(3)):
        found = trainer.parameters(trainer.init(seed))
        jax.tree.map(np.testing.assert_array_equal, found, jax.jit(model.init_fn)(seed))


def test_clipping_by_global_norm_runs_on_one_stage_and_is_refused_on_several() -> None:
    model = layered("mean")
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    assert_parity(model, planned(model, 24, 2, pipeline=1, tensor=2, data=2), clipped)
    plan = planned(model, 24, 2, pipeline=2, tensor=2, data=1)
    with pytest.raises(PlanError, match=r"gradients that another stage owns.*pipeline=1") as refused:
        build(plan, model, clipped)
    assert "\n" not in str(refused.value)


def test_what_does_not_go_with_the_plan_is_refused_with_one_line() -> None:
    model = layered("mean")
    plan = planned(model, 24, 2, pipeline=1, tensor=1, data=4)
    with pytest.raises(PlanError, match="made for another program than model 'layered sum'"):
        build(plan, layered("sum"), optax.sgd(0.1))
    trainer = build(plan, model, optax.sgd(0.1))
    state = trainer.init(key())
    batch = batches(model, 12, 1)[0]
    with pytest.raises(ExecutionError, match=r"shape \(12, 24\); the plan is for \(24, 24\)"):
        trainer.step(state, batch)
    with pytest.raises(ExecutionError, match=r"1 leaves; the model wants 2: "):
        trainer.step(state, {"x": batch["x"]})
    with pytest.raises(ExecutionError, match=r"wants 16 devices and there are 8; start more ranks"):
        build(planned(model, 32, 2, devices=16, pipeline=1, tensor=1, data=16), model, optax.sgd(0.1))


def test_memory_is_given_up_only_where_it_can_be_used_again() -> None:
    """JAX warns of donated buffers that fit no result; partial sums are such."""
    model = layered("mean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fixed in ({"data": 4, "tensor": 1, "pipeline": 1}, {"data": 2, "tensor": 1, "pipeline": 2}):
            build(planned(model, 24, 3, **fixed), model, optax.adam(1e-3))
