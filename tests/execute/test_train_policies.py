"""Stages that differ in their rematerialisation, and schedules that nothing here runs."""

from typing import Literal

import msgspec
import optax
import pytest

from meshwright.errors import ExecutionError
from meshwright.execute.train import build
from meshwright.plan.planfile import Plan
from tests.execute.plain import layered, planned
from tests.execute.test_train import assert_parity

MODEL = layered("mean")
SIZE = 12


def of_two_stages(first: Literal["none", "full"] | None, second: Literal["none", "full"] | None) -> Plan:
    plan = planned(MODEL, SIZE, 3, devices=2, pipeline=2, tensor=1, data=1, schedule="1f1b")
    stages = [msgspec.structs.replace(s, remat=r) for s, r in zip(plan.stages, (first, second), strict=True)]
    remat = "mixed" if first != second else first or "full"
    return msgspec.structs.replace(plan, stages=tuple(stages), remat=remat)


def test_stages_that_recompute_and_stages_that_keep_train_as_plain_jax_does() -> None:
    assert_parity(MODEL, of_two_stages("full", "none"), optax.adam(1e-2))


def test_each_stage_keeps_what_its_own_policy_says() -> None:
    """Of layers that are alike, one keeps what enters them and the other what happens in them as well."""
    programs = build(of_two_stages("full", "none"), MODEL, optax.adam(1e-2)).runtime.programs
    recomputing, keeping = (len(programs[stage].forward.out_info[1]) for stage in range(2))
    assert recomputing < keeping


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_stage_that_says_nothing_follows_the_plan(remat: Literal["none", "full"]) -> None:
    plan = msgspec.structs.replace(of_two_stages(None, None), remat=remat)
    assert [plan.recomputes(stage) for stage in range(2)] == [remat == "full"] * 2


def test_a_schedule_that_cannot_be_executed_is_refused_in_one_line() -> None:
    plan = msgspec.structs.replace(of_two_stages("none", "none"), schedule="zb-h1")
    with pytest.raises(ExecutionError, match="zb-h1 can be planned but not executed yet; plan with --schedules 1f1b"):
        build(plan, MODEL, optax.adam(1e-2))
