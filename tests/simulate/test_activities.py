"""Activities that slow each other on a device, and executors that choose by priority."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.engine import Tasks, make_tasks, run_tasks

COMPUTE, COLLECTIVE = 0, 1
ALONE = [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.5, 0.8]]  # by mask of what goes on: compute at half beside a collective


def together(duration: list[float], activity: list[int], device: list[int] | None = None) -> Tasks:
    count = len(duration)
    return make_tasks(duration, [-1] * count, device=device or [0] * count, activity=activity, interference=[ALONE] * 2)


def test_a_collective_beside_a_matmul_slows_both() -> None:
    """4 s of compute and 2 s of a collective: the collective at 0.8 until 2.5 s, compute has 2.75 s left then."""
    assert run_tasks(together([4.0, 2.0], [COMPUTE, COLLECTIVE])).end_seconds.tolist() == pytest.approx([5.25, 2.5])


def test_two_of_one_kind_do_not_slow_each_other_nor_does_another_device() -> None:
    tasks = together([4.0, 3.0, 2.0], [COMPUTE, COMPUTE, COLLECTIVE], [0, 0, 1])
    assert run_tasks(tasks).end_seconds.tolist() == [4.0, 3.0, 2.0]


def test_what_the_device_was_freed_of_no_longer_slows() -> None:
    """Two collectives of 0.8 s one after another take 1 s each beside compute of 3 s, which then goes on alone."""
    tasks = make_tasks(
        [3.0, 0.8, 0.8],
        [0, 1, 1],
        device=[0] * 3,
        activity=[COMPUTE, COLLECTIVE, COLLECTIVE],
        interference=[ALONE],
    )
    assert run_tasks(tasks).end_seconds.tolist() == pytest.approx([4.0, 1.0, 2.0])


@given(st.lists(st.tuples(st.floats(0.1, 5), st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_each_is_slowed_by_no_more_than_the_worst_rate(drawn: list[tuple[float, int, int]]) -> None:
    duration, activity, device = (list(column) for column in zip(*drawn, strict=True))
    ends = run_tasks(together(duration, activity, device)).end_seconds
    worst = np.where(np.array(activity) == COMPUTE, 0.5, 0.8)
    assert (ends >= np.array(duration) * (1 - 1e-12)).all()
    assert (ends <= np.array(duration) / worst * (1 + 1e-12)).all()


def test_a_task_has_one_rate() -> None:
    with pytest.raises(ScheduleError, match="task 0 has an activity on a device and also a resource"):
        make_tasks([1.0], [-1], device=[0], activity=[0], interference=[ALONE], resource=[0], resource_rates=[(1.0,)])


@pytest.mark.parametrize(
    ("device", "activity", "table", "message"),
    [
        ([1], [0], [ALONE], "device is out of range"),
        ([0], [2], [ALONE], "activity is out of range"),
        ([0], [0], [[[1.0, 1.0]] * 3], "shape"),
        ([0], [0], [[[0.0, 1.0]] * 4], "above 0 and at most 1"),
        ([0], [0], [[[1.0, 1.5]] * 4], "above 0 and at most 1"),
    ],
)
def test_impossible_activities_are_refused(
    device: list[int], activity: list[int], table: list[list[list[float]]], message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        make_tasks([1.0], [-1], device=device, activity=activity, interference=table)


def greedy_pipeline(stages: int, microbatches: int) -> Tasks:
    """Forwards and backwards on one executor a stage; a backward goes first, a forward only while few are live."""
    number = {}
    for s in range(stages):
        for m in range(microbatches):
            number["F", s, m], number["B", s, m] = len(number), len(number) + 1
    needs: list[list[tuple[int, float]]] = []
    for kind, s, m in number:
        if kind == "F":
            needs.append([(number["F", s - 1, m], 0.0)] if s else [])
            if m >= stages - s:  # room for one more activation
                needs[-1].append((number["B", s, m - (stages - s)], 0.0))
        else:
            needs.append([(number["F", s, m], 0.0)])
            if s < stages - 1:
                needs[-1].append((number["B", s + 1, m], 0.0))
    return make_tasks(
        [1.0 if kind == "F" else 2.0 for kind, _, _ in number],
        [s for _, s, _ in number],
        needs,
        priority=[m - (1000 if kind == "B" else 0) for kind, _, m in number],
    )


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 4), (4, 8), (4, 2), (5, 13)])
def test_backward_first_with_few_activations_is_1f1b(stages: int, microbatches: int) -> None:
    """The greedy rule takes (M + S - 1)(F + B), as the lists of 1F1B do."""
    assert run_tasks(greedy_pipeline(stages, microbatches)).makespan_seconds == (microbatches + stages - 1) * 3


def test_an_executor_chooses_among_all_that_are_ready_at_once() -> None:
    """Three tasks are ready at 0; they run by priority, and one that comes later waits for what runs."""
    tasks = make_tasks(
        [2.0, 2.0, 2.0, 1.0, 3.0],
        [0, 0, 0, 1, 0],
        [[], [], [], [], [(3, 0.0)]],
        priority=[3.0, 1.0, 2.0, 0.0, 0.0],
    )
    run = run_tasks(tasks)
    assert run.start_seconds.tolist() == [7.0, 0.0, 5.0, 0.0, 2.0]
    assert run.waited_for.tolist() == [2, -1, 4, -1, 1]


def test_equal_priorities_run_in_order_of_their_numbers() -> None:
    assert run_tasks(make_tasks([1.0] * 4, [0] * 4, priority=[1.0] * 4)).start_seconds.tolist() == [0, 1, 2, 3]


def test_a_circle_is_found_where_executors_choose_too() -> None:
    with pytest.raises(ScheduleError, match="waits, through others, for itself"):
        run_tasks(make_tasks([1.0, 1.0], [0, 0], [[(1, 0.0)], [(0, 0.0)]], priority=[0.0, 1.0]))


def test_more_tasks_than_memory_are_refused_before_they_are_made() -> None:
    with pytest.raises(ScheduleError, match=r"1,000,000,000,000 tasks need about 400,000 GB"):
        make_tasks(np.broadcast_to(1.0, 10**12), 0)
