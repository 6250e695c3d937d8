"""What kernels are made of, by pricing a plan again."""

import msgspec
import pytest

from meshwright.calibrate.drift import Group
from meshwright.calibrate.drift_shares import kernel_shares
from tests.calibrate.simulated_runs import (
    FOUR_STAGES,
    TENSOR,
    graph_of,
    machine,
    planned,
    slower_matmuls,
    slower_memory,
)


@pytest.mark.parametrize("fix", [FOUR_STAGES, TENSOR])
def test_shares_add_up_and_an_update_only_moves_memory(fix: object) -> None:
    plan = planned(machine(4), fix)  # type: ignore[arg-type]
    shares = kernel_shares(plan, graph_of(plan.microbatches))
    assert shares is not None
    assert set(shares) == {
        Group(s, what) for s in range(len(plan.stages)) for what in ("forward", "backward", "update")
    }
    for group, found in shares.items():
        assert sum(found.values()) == pytest.approx(1.0)
        assert (set(found) == {"memory"}) == (group.what == "update")


def test_shares_foretell_what_a_slower_number_does() -> None:
    """Where no kernel changes sides on the roofline, seconds are linear in what a number costs."""
    plan = planned(machine(4), FOUR_STAGES)
    shares = kernel_shares(plan, graph_of(plan.microbatches))
    assert shares is not None
    for name, change in (("matmul", slower_matmuls), ("memory", slower_memory)):
        slower = planned(change(machine(4), 1.02), FOUR_STAGES)
        for index, (before, after) in enumerate(zip(plan.stages, slower.stages, strict=True)):
            grown = after.forward_compute_seconds / before.forward_compute_seconds - 1
            assert grown == pytest.approx(0.02 * shares[Group(index, "forward")][name], rel=0.02)


def test_a_plan_that_is_not_priced_as_it_was_has_no_shares() -> None:
    plan = planned(machine(4), FOUR_STAGES)
    by_hand = msgspec.structs.replace(plan.stages[0], forward_compute_seconds=1.0)
    changed = msgspec.structs.replace(plan, stages=(by_hand, *plan.stages[1:]))
    assert kernel_shares(changed, graph_of(plan.microbatches)) is None
