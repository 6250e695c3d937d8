"""The end of an iteration: what each ZeRO level reduces, updates and gathers."""

import pytest

from meshwright.calibrate.hardware import parse_cluster
from meshwright.errors import ScheduleError
from meshwright.simulate.collective import collective_seconds
from meshwright.simulate.memory import RECIPES
from meshwright.simulate.operations import Collective, OptimizerStep
from meshwright.simulate.stage import AT_ONCE, StageRunner
from meshwright.simulate.tail import Tail, seconds_named, tail_seconds

HOST = parse_cluster("dgx-a100").hosts[0]
RUNNER = StageRunner(HOST.device, {"data": HOST.link}, AT_ONCE)
MIXED = RECIPES["mixed-adam"]


@pytest.mark.parametrize(
    ("zero", "kinds", "updated"),
    [
        (0, ["all_reduce"], 10**9),
        (1, ["reduce_scatter", "all_gather"], 125_000_000),
        (2, ["reduce_scatter", "all_gather"], 125_000_000),
        (3, ["reduce_scatter"], 125_000_000),
    ],
)
def test_each_level_reduces_updates_and_gathers_its_share(zero: int, kinds: list[str], updated: int) -> None:
    parts = Tail(parameters=10**9, recipe=MIXED, ranks=8, zero=zero).operations()
    kernels = [operation.kernel for operations in parts.values() for operation in operations]
    assert [kernel.kind for kernel in kernels if isinstance(kernel, Collective)] == kinds
    (step,) = [kernel for kernel in kernels if isinstance(kernel, OptimizerStep)]
    assert step.parameters == updated
    assert step.bytes_per_parameter == 2 + 2 * (2 + 12)


def test_the_parts_take_what_their_kernels_take() -> None:
    """All-reduce of 2 GB of gradients, then 30 bytes for each of 10^9 parameters."""
    parts = dict(tail_seconds(Tail(parameters=10**9, recipe=MIXED, ranks=8), RUNNER))
    device = HOST.device
    assert parts["reduce"] == pytest.approx(collective_seconds("all_reduce", 2e9, 8, HOST.link))
    assert parts["update"] == pytest.approx(device.launch_seconds.value + 30e9 / device.memory_bytes_per_second.value)


def test_a_sum_that_the_backward_hid_leaves_its_rest() -> None:
    parts = tail_seconds(Tail(parameters=10**9, recipe=MIXED, ranks=8, synced_seconds=0.25), RUNNER)
    assert parts[0] == ("reduce", 0.25)
    assert seconds_named(parts, "reduce", "gather") == 0.25


def test_one_rank_only_updates_and_the_norm_is_a_pass_over_the_gradients() -> None:
    assert list(Tail(parameters=10, recipe=MIXED).operations()) == ["update"]
    parts = Tail(parameters=10, recipe=MIXED, ranks=2, zero=2, norm=True).operations()
    assert list(parts) == ["reduce", "norm", "update", "gather"]
    assert len(parts["norm"]) == 2


def test_impossible_tails_are_refused() -> None:
    with pytest.raises(ScheduleError, match="level 7"):
        Tail(parameters=1, recipe=MIXED, zero=7)
    with pytest.raises(ScheduleError, match="both are at least 1"):
        Tail(parameters=0, recipe=MIXED)
