"""The engine against drawings, closed forms and a slow simulator that knows no tricks."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.engine import Run, Tasks, make_tasks, run_tasks

IDEAL = (1.0,) * 64  # a resource so wide that nobody ever waits for it


@st.composite
def task_sets(draw: st.DrawFn, resources: int) -> Tasks:
    """Tasks whose dependencies point anywhere earlier in a hidden order, so lists are not sorted for the engine."""
    count = draw(st.integers(1, 12))
    hidden = draw(st.permutations(range(count)))
    rank = {task: i for i, task in enumerate(hidden)}
    whole = st.integers(0, 6).map(float)
    dependencies = [
        [(hidden[k], draw(whole)) for k in draw(st.sets(st.integers(0, rank[t] - 1), max_size=3))] if rank[t] else []
        for t in range(count)
    ]
    return make_tasks(
        [draw(whole) for _ in range(count)],
        [draw(st.integers(-1, 3)) for _ in range(count)],
        dependencies,
        resource=[draw(st.integers(-1, resources - 1)) for _ in range(count)] if resources else None,
        demand=[draw(st.integers(1, 3)) for _ in range(count)],
        resource_rates=[draw(st.sampled_from([(1.0,), (1.0, 1.0), (1.0, 0.7, 0.6), (0.5,)])) for _ in range(resources)],
    )


def slow(tasks: Tasks) -> tuple[list[float], list[float]] | None:
    """The same semantics by brute force: from one change to the next over all tasks; None is a deadlock."""
    count, now = tasks.count, 0.0
    start, end, left = [math.inf] * count, [math.inf] * count, list(tasks.duration_seconds)

    def ready_at(task: int) -> float:
        edges = range(tasks.edge_start[task], tasks.edge_start[task + 1])
        arrivals = [end[tasks.edge_from[e]] + tasks.edge_latency_seconds[e] for e in edges]
        mates = [t for t in range(task) if tasks.executor[t] == tasks.executor[task] >= 0]
        return max([0.0, *map(float, arrivals), *(end[t] for t in mates)])

    def rate(task: int) -> float:
        which = tasks.resource[task]
        if which < 0:
            return 1.0
        users = sum(
            tasks.demand[t]
            for t in range(count)
            if tasks.resource[t] == which and start[t] <= now and end[t] == math.inf
        )
        rates = tasks.resource_rates[which]
        return float(rates[users - 1] if users <= len(rates) else rates[-1] * len(rates) / users)

    while True:
        moved = True
        while moved:
            moved = False
            for t in range(count):
                if start[t] == math.inf and ready_at(t) <= now:
                    start[t], moved = now, True
                if start[t] <= now and end[t] == math.inf and left[t] <= 1e-12:
                    end[t], moved = now, True
        active = [t for t in range(count) if start[t] <= now and end[t] == math.inf]
        speed = {t: rate(t) for t in active}
        coming = [ready_at(t) for t in range(count) if start[t] == math.inf]
        step = min(
            [left[t] / speed[t] for t in active] + [when - now for when in coming if when < math.inf], default=None
        )
        if step is None:
            return (start, end) if max(end, default=0) < math.inf else None
        for t in active:
            left[t] -= step * speed[t]
        now += step


def close(run: Run, expected: tuple[list[float], list[float]]) -> bool:
    return bool(
        np.allclose(run.start_seconds, expected[0], rtol=1e-9, atol=1e-9)
        and np.allclose(run.end_seconds, expected[1], rtol=1e-9, atol=1e-9)
    )


@settings(max_examples=150, deadline=None)
@given(st.one_of(task_sets(0), task_sets(2)))
def test_the_engine_equals_brute_force_and_knows_a_deadlock(tasks: Tasks) -> None:
    expected = slow(tasks)
    if expected is None:
        with pytest.raises(ScheduleError, match="deadlocks"):
            run_tasks(tasks)
    else:
        assert close(run_tasks(tasks), expected)


@settings(max_examples=100, deadline=None)
@given(task_sets(0))
def test_both_paths_agree_to_the_last_digit(tasks: Tasks) -> None:
    wide = make_tasks(
        tasks.duration_seconds,
        tasks.executor,
        edges=(tasks.edge_start, tasks.edge_from, tasks.edge_latency_seconds),
        resource=np.where(np.arange(tasks.count) % 2 == 0, 0, -1),
        resource_rates=[IDEAL],
    )
    try:
        alone = run_tasks(tasks)
    except ScheduleError:
        with pytest.raises(ScheduleError):
            run_tasks(wide)
        return
    shared = run_tasks(wide)
    for name in ("start_seconds", "end_seconds", "waited_for", "waited_edge"):
        assert (getattr(alone, name) == getattr(shared, name)).all(), name


@settings(max_examples=60, deadline=None)
@given(st.one_of(task_sets(0), task_sets(2)))
def test_the_critical_path_accounts_for_the_whole_makespan(tasks: Tasks) -> None:
    try:
        run = run_tasks(tasks)
    except ScheduleError:
        return
    path = run.critical_path()
    assert run.start_seconds[path[0]] == 0 or run.waited_for[path[0]] >= 0
    total = 0.0
    for task in path:
        edge = run.waited_edge[task]
        total += tasks.edge_latency_seconds[edge] if edge >= 0 else 0.0
        total += run.end_seconds[task] - run.start_seconds[task]
    assert total == pytest.approx(run.makespan_seconds)


def test_flows_on_one_link_share_it() -> None:
    """Three flows of 1, 2 and 3 seconds: 3 s for the first, 2 more while two share, 1 more alone."""
    run = run_tasks(make_tasks([1, 2, 3], [-1] * 3, resource=[0, 0, 0], resource_rates=[(1.0,)]))
    assert run.end_seconds.tolist() == [3.0, 5.0, 6.0]


def test_four_ranks_on_two_cores_take_twice_as_long() -> None:
    run = run_tasks(make_tasks([1.0] * 4, range(4), resource=[0] * 4, resource_rates=[(1.0, 1.0)]))
    assert run.end_seconds.tolist() == [2.0] * 4


def test_a_task_of_three_devices_counts_as_three() -> None:
    run = run_tasks(make_tasks([2.0], [0], resource=[0], demand=[3], resource_rates=[(1.0, 1.0)]))
    assert run.end_seconds.tolist() == [3.0]


def test_a_task_says_what_it_waited_for() -> None:
    tasks = make_tasks([3, 1, 1], [0, 1, 1], [[], [], [(0, 0.5)]])
    run = run_tasks(tasks)
    assert run.start_seconds.tolist() == [0.0, 0.0, 3.5]
    assert (run.waited_for[2], run.waited_edge[2]) == (0, 0)
    assert run.critical_path() == [0, 2]


def test_a_circle_is_an_error_and_not_a_hang() -> None:
    for resource in (None, [0, -1]):
        with pytest.raises(ScheduleError, match="waits, through others, for itself"):
            run_tasks(make_tasks([1, 1], [0, 1], [[(1, 0)], [(0, 0)]], resource=resource, resource_rates=[(1.0,)]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"duration_seconds": [-1.0], "executor": [0]}, "duration is negative"),
        ({"duration_seconds": [math.nan], "executor": [0]}, "duration is negative or not finite"),
        ({"duration_seconds": [1.0], "executor": [0, 1]}, "different lengths"),
        ({"duration_seconds": [1.0], "executor": [-2]}, "executor is out of range"),
        ({"duration_seconds": [1.0], "executor": [0], "dependencies": [[(1, 0.0)]]}, "dependency is out of range"),
        ({"duration_seconds": [1.0], "executor": [0], "resource": [0]}, "resource is out of range"),
        ({"duration_seconds": [1.0], "executor": [0], "demand": [0]}, "demand is out of range"),
        ({"duration_seconds": [1.0], "executor": [0], "resource_rates": [(0.0,)]}, "rates"),
    ],
)
def test_impossible_tasks_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make_tasks(**arguments)  # type: ignore[arg-type]


def test_no_tasks_take_no_time() -> None:
    run = run_tasks(make_tasks([], []))
    assert run.makespan_seconds == 0
    assert run.critical_path() == []


def test_a_million_tasks_are_quick() -> None:
    """Far below what the benchmark measures, so that a busy machine does not fail it."""
    stages, rounds = 64, 1 << 14
    count = stages * rounds
    executor = np.tile(np.arange(stages), rounds)
    start = np.maximum(np.arange(count + 1) - 1, 0)
    edges = (start, np.arange(count - 1), np.zeros(count - 1))
    tasks = make_tasks(np.ones(count), executor, edges=edges)
    run_tasks(make_tasks([1.0], [0]))  # compiled
    began = time.perf_counter()
    assert run_tasks(tasks).makespan_seconds == count
    assert time.perf_counter() - began < 2.0


@pytest.mark.parametrize(
    ("duration", "executor", "message"),
    [
        ([1.0, 1.0], [0.5, 0.0], "executors are of type float64"),
        ([[1.0, 2.0], [1.0, 2.0]], [0, 0], "durations have 2 dimensions"),
        (3.0, [0], "durations have 0 dimensions"),
        ([1e308, 1e308], [0, 0], "task 1 would end after more seconds than a number can hold"),
    ],
)
def test_arrays_of_the_wrong_kind_end_in_one_line(duration: object, executor: list[float], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        run_tasks(make_tasks(duration, executor))  # type: ignore[arg-type]
