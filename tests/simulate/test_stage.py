"""A stage from its kernels: launch-bound, compute-bound, hidden and exposed communication, by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.operations import Collective, Copy, Kernel, Operation, Pointwise
from meshwright.simulate.stage import (
    AT_ONCE,
    Dispatch,
    StageRun,
    run_operations,
    with_gradient_sync,
)

EAGER = Dispatch(operation_seconds=1.0)


def compute(seconds: float, needs: tuple[int, ...] | None = None) -> Operation:
    return Operation("compute", Pointwise(bytes=seconds), needs)


def talk(seconds: float, needs: tuple[int, ...] | None = None) -> Operation:
    return Operation("talk", Collective(kind="all_reduce", message_bytes=seconds, ranks=2, axis="data"), needs)


def seconds_of(kernel: Kernel) -> float:
    """A kernel's size is its time."""
    return kernel.message_bytes if isinstance(kernel, Collective) else kernel.bytes  # type: ignore[union-attr]


def run(
    operations: list[Operation] | tuple[Operation, ...],
    dispatch: Dispatch = AT_ONCE,
    rates: list[list[float]] | None = None,
    repeat: int = 1,
) -> StageRun:
    table = None if rates is None else np.array(rates)
    return run_operations(operations, seconds_of, dispatch, table, repeat=repeat)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_tiny_kernels_take_as_long_as_their_dispatch(n: int) -> None:
    """n dispatches and the last kernel; the device has nothing to do for most of it."""
    ran = run([compute(0.25)] * n, EAGER)
    assert ran.seconds == n + 0.25
    assert ran.host_seconds == n
    assert ran.dispatch_bound_seconds == pytest.approx(n - 0.25 * (n - 1))


def test_long_kernels_hide_their_dispatch() -> None:
    """But for the first one: the host runs ahead."""
    ran = run([compute(3.0)] * 10, EAGER)
    assert ran.seconds == 1 + 30
    assert ran.dispatch_bound_seconds == 1


def test_a_compiled_program_is_dispatched_once() -> None:
    assert run([compute(0.25)] * 8, Dispatch(program_seconds=1.0)).seconds == 3


def test_a_collective_that_nothing_waits_for_is_hidden() -> None:
    ran = run([compute(2.0), talk(1.5), compute(2.0, needs=(0,))])
    assert (ran.seconds, ran.exposed_communication_seconds) == (4, 0)


def test_a_collective_in_the_chain_is_exposed() -> None:
    ran = run([compute(2.0), talk(1.5), compute(2.0)])
    assert (ran.seconds, ran.exposed_communication_seconds) == (5.5, 1.5)


def test_a_longer_collective_is_exposed_by_what_it_lasts_longer() -> None:
    ran = run([compute(2.0), talk(3.0), compute(2.0, needs=(0,)), compute(1.0, needs=(1, 2))])
    assert (ran.seconds, ran.exposed_communication_seconds) == (6, 1)


def test_concurrent_streams_slow_each_other() -> None:
    """Compute of 3 s at half speed beside a collective of 1 s: 1 s brings 0.5 s of it, the rest follows alone."""
    rates = [[1.0] * 4 for _ in range(16)]
    rates[0b11] = [0.5, 1.0, 1.0, 1.0]
    ran = run([compute(1.0), talk(1.0), compute(3.0, needs=(0,))], rates=rates)
    assert ran.seconds == pytest.approx(1 + 1 + 2.5)


def test_copies_to_and_from_the_host_have_streams_of_their_own() -> None:
    copies = [Operation("copy", Copy(bytes=2.0, to_host=way), ()) for way in (True, False, True)]
    assert run([*copies, compute(3.0, needs=())]).seconds == 4


def test_layers_repeat_each_after_the_one_before() -> None:
    layer = [compute(1.0), talk(2.0), compute(3.0)]
    assert run(layer, repeat=5).seconds == run(layer * 5).seconds == 30
    assert run([compute(1.0), talk(2.0, needs=(0,)), compute(1.0, needs=(0,))], repeat=3).seconds == 7


def test_the_parts_of_a_stage_add_up() -> None:
    ran = run([compute(2.0), talk(3.0), compute(0.1, needs=(0,)), compute(1.0)], EAGER)
    computing = ran.seconds - ran.exposed_communication_seconds - ran.dispatch_bound_seconds
    assert computing == pytest.approx(ran.compute_seconds)


@st.composite
def stages(draw: st.DrawFn) -> list[Operation]:
    made: list[Operation] = []
    for i in range(draw(st.integers(1, 10))):
        kind = draw(st.sampled_from([compute, talk]))
        needs = draw(st.none() | st.sets(st.integers(0, i - 1), max_size=2).map(tuple)) if i else None
        made.append(kind(draw(st.sampled_from([0.0, 0.5, 1.0, 2.5])), needs))
    return made


@given(stages(), st.sampled_from([0.0, 0.3, 2.0]))
@settings(max_examples=150, deadline=None)
def test_a_stage_takes_at_least_its_busiest_stream_and_at_most_everything_in_turn(
    operations: list[Operation], each: float
) -> None:
    ran = run(operations, Dispatch(operation_seconds=each))
    parts = (ran.host_seconds, ran.compute_seconds, ran.communication_seconds)
    assert ran.seconds >= max(parts) - 1e-9
    assert ran.seconds <= sum(parts) + 1e-9


@given(stages(), st.sampled_from([0.0, 0.3]))
@settings(max_examples=60, deadline=None)
def test_slower_streams_never_make_a_stage_quicker(operations: list[Operation], each: float) -> None:
    rates = [[0.7] * 4 for _ in range(16)]
    free, slowed = (run(operations, Dispatch(operation_seconds=each), table) for table in (None, rates))
    assert slowed.seconds >= free.seconds - 1e-9


def test_gradients_are_summed_bucket_by_bucket_while_the_backward_goes_on() -> None:
    """Four layers of 2 s make 1 byte each; buckets of 2: ready at 4 s and 8 s, 2 s each: 2 s remain exposed."""
    synced = with_gradient_sync([compute(2.0)] * 4, dict.fromkeys(range(4), 1.0), 8, "data", bucket_bytes=2.0)
    ran = run(synced)
    assert [operation.needs for operation in synced[4:]] == [(1,), (3,)]
    assert (ran.seconds, ran.exposed_communication_seconds) == (10, 2)


@given(st.integers(1, 12), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([1.0, 2.0, 5.0, 99.0]))
@settings(max_examples=60, deadline=None)
def test_the_exposed_rest_of_a_bucketed_sync_is_the_formula(layers: int, layer: float, bucket: float) -> None:
    """max over buckets k of (when k is full + the times of k and all after it), less the backward."""
    ran = run(
        with_gradient_sync([compute(layer)] * layers, dict.fromkeys(range(layers), 1.0), 2, "d", bucket_bytes=bucket)
    )
    sizes, full, held = [], [], 0.0
    for i in range(layers):
        held += 1
        if held >= bucket or i == layers - 1:
            sizes.append(held)
            full.append((i + 1) * layer)
            held = 0.0
    expected = max(ready + sum(sizes[k:]) for k, ready in enumerate(full))
    assert ran.seconds == pytest.approx(expected)


@pytest.mark.parametrize("needs", [(1,), (2,), (-1,)])
def test_only_what_stands_before_can_be_needed(needs: tuple[int, ...]) -> None:
    with pytest.raises(ScheduleError, match=r"operation 1 \(compute\) needs"):
        run([compute(1.0), compute(1.0, needs=needs), compute(1.0)])
