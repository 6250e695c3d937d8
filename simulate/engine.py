"""The discrete-event engine: when each of many tasks starts and ends, and what it waited for.

Tasks are rows of arrays. A task starts once its executor has finished the tasks listed before it (executors run their
tasks strictly in list order; executor -1 is no executor) and all its dependencies have ended, each plus a latency. A
task on a shared resource runs at the rate that the resource's present demand allows; every other task runs at rate 1.
Without resources the answer is a longest path, found in one pass over the tasks; with them it takes an event queue.
Same input, same output: ties break by the task's number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from meshwright.errors import ScheduleError
from meshwright.simulate.sharing import run_shared

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NOBODY = -1


@dataclass(frozen=True, slots=True, eq=False)
class Tasks:
    """Tasks as arrays, with their dependencies as CSR: those of task i are ``edge_start[i]:edge_start[i + 1]``.

    ``resource`` is the number of the resource a task runs on (-1: none) and ``demand`` how many users of it the task
    counts as. ``resource_rates[r][k - 1]`` is the rate of each task on resource r at a total demand of k; beyond the
    table the resource's total throughput stays what it was at the table's end, so ``(1.0,)`` is a link that its flows
    share equally and ``(1.0, 1.0)`` two cores.
    """

    duration_seconds: Floats
    executor: Ints
    edge_start: Ints
    edge_from: Ints
    edge_latency_seconds: Floats
    resource: Ints
    demand: Ints
    resource_rates: tuple[tuple[float, ...], ...]

    @property
    def count(self) -> int:
        """Number of tasks."""
        return len(self.duration_seconds)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Start and end of each task, and the task whose end let it start (-1: it started at zero).

    ``waited_edge`` is the dependency that it waited for, as an index into the CSR arrays; -1 where it waited for its
    executor. What a resource cost a task is ``end - start - duration``.
    """

    start_seconds: Floats
    end_seconds: Floats
    waited_for: Ints
    waited_edge: Ints

    @property
    def makespan_seconds(self) -> float:
        """End of the last task; 0 without tasks."""
        return float(self.end_seconds.max(initial=0.0))

    def critical_path(self) -> list[int]:
        """The chain of tasks, first to last, each of which started when the one before let it, up to the last end."""
        path: list[int] = []
        task = int(self.end_seconds.argmax()) if len(self.end_seconds) else NOBODY
        while task != NOBODY:
            path.append(task)
            task = int(self.waited_for[task])
        return path[::-1]


def make_tasks(
    duration_seconds: ArrayLike,
    executor: ArrayLike,
    dependencies: Sequence[Sequence[tuple[int, float]]] | None = None,
    *,
    edges: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    resource: ArrayLike | None = None,
    demand: ArrayLike | None = None,
    resource_rates: Sequence[Sequence[float]] = (),
) -> Tasks:
    """Check the arrays and make the tasks.

    Args:
        dependencies: for each task, (earlier task, latency in seconds) pairs; or give
        edges: the same as CSR arrays (start, from, latency in seconds).

    Raises:
        ScheduleError: lengths differ, an index is out of range, or a number is negative or not finite.
    """
    duration = np.ascontiguousarray(duration_seconds, np.float64)
    count = len(duration)
    if edges is None:
        lists = dependencies if dependencies is not None else [()] * count
        flat = [pair for pairs in lists for pair in pairs]
        edges = (
            np.cumsum([0, *map(len, lists)]),
            np.array([task for task, _ in flat], np.int64),
            np.array([latency for _, latency in flat], np.float64),
        )
    start, origin = (np.ascontiguousarray(array, np.int64) for array in edges[:2])
    tasks = Tasks(
        duration_seconds=duration,
        executor=np.ascontiguousarray(executor, np.int64),
        edge_start=start,
        edge_from=origin,
        edge_latency_seconds=np.ascontiguousarray(edges[2], np.float64),
        resource=np.full(count, NOBODY) if resource is None else np.ascontiguousarray(resource, np.int64),
        demand=np.ones(count, np.int64) if demand is None else np.ascontiguousarray(demand, np.int64),
        resource_rates=tuple(tuple(rates) for rates in resource_rates),
    )
    _check(tasks)
    return tasks


def _check(tasks: Tasks) -> None:
    count = tasks.count
    lengths = {len(tasks.executor), len(tasks.resource), len(tasks.demand), len(tasks.edge_start) - 1}
    if lengths != {count} or len(tasks.edge_from) != len(tasks.edge_latency_seconds):
        raise ScheduleError(f"the arrays of {count} tasks have different lengths")
    if (
        tasks.edge_start[0] != 0
        or tasks.edge_start[-1] != len(tasks.edge_from)
        or (np.diff(tasks.edge_start) < 0).any()
    ):
        raise ScheduleError("edge_start does not cut the dependencies into one run for each task")
    for name, numbers, low, high in (
        ("executor", tasks.executor, NOBODY, None),
        ("resource", tasks.resource, NOBODY, len(tasks.resource_rates)),
        ("demand", tasks.demand, 1, None),
        ("dependency", tasks.edge_from, 0, count),
    ):
        if numbers.size and (numbers.min() < low or (high is not None and numbers.max() >= high)):
            raise ScheduleError(f"a task's {name} is out of range: {numbers.min()}..{numbers.max()}")
    for name, seconds in (("duration", tasks.duration_seconds), ("latency", tasks.edge_latency_seconds)):
        if not (np.isfinite(seconds).all() and (seconds >= 0).all()):
            raise ScheduleError(f"a task's {name} is negative or not finite; give seconds of at least 0")
    for rates in tasks.resource_rates:
        if not rates or not all(0 < rate <= 1 for rate in rates):
            raise ScheduleError(f"a resource has the rates {rates}; each is above 0 and at most 1")


def run_tasks(tasks: Tasks) -> Run:
    """Simulate.

    Raises:
        ScheduleError: tasks wait for each other in a circle; the message names one of them.
    """
    executors = int(tasks.executor.max(initial=NOBODY)) + 1
    arrays = (tasks.duration_seconds, tasks.executor, tasks.edge_start, tasks.edge_from, tasks.edge_latency_seconds)
    if (tasks.resource == NOBODY).all():
        start, end, blame, edge, stuck = _run_alone(*arrays, executors)
    else:
        width = max(map(len, tasks.resource_rates))
        rates = np.array([_stretched(row, width) for row in tasks.resource_rates])
        start, end, blame, edge, stuck = run_shared(*arrays, executors, tasks.resource, tasks.demand, rates)
    if stuck != NOBODY:
        raise ScheduleError(f"the program deadlocks: task {stuck} waits, through others, for itself")
    return Run(start, end, blame, edge)


def _stretched(rates: tuple[float, ...], width: int) -> list[float]:
    """A table of rates made as long as the longest, at the throughput that it ended with."""
    throughput = rates[-1] * len(rates)
    return [*rates, *(throughput / k for k in range(len(rates) + 1, width + 1))]


@njit(cache=True)
def _run_alone(
    duration: Floats, executor: Ints, edge_start: Ints, edge_from: Ints, latency: Floats, executors: int
) -> tuple[Floats, Floats, Ints, Ints, int]:
    """Times without resources: a depth-first walk from each task back to what it needs, in task order."""
    count = len(duration)
    before = np.full(count, -1, np.int64)  # the task before this one on its executor
    last = np.full(executors, -1, np.int64)
    for task in range(count):
        if executor[task] >= 0:
            before[task] = last[executor[task]]
            last[executor[task]] = task
    start, end = np.zeros(count), np.zeros(count)
    blame, blame_edge = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    OPEN, DONE = np.uint8(1), np.uint8(2)  # on the stack; timed
    state = np.zeros(count, np.uint8)
    next_edge = edge_start[:-1] - 1  # one below its first edge: the executor has not been asked yet
    stack = np.empty(count, np.int64)
    for root in range(count):
        if state[root] == DONE:
            continue
        stack[0] = root
        depth = 1
        while depth > 0:
            task = stack[depth - 1]
            state[task] = OPEN
            edge = next_edge[task]
            need = -1
            if edge < edge_start[task]:
                need = before[task]
                if need < 0 or state[need] == DONE:
                    if need >= 0:
                        start[task], blame[task] = end[need], need
                    need = -1
                    edge += 1
            if need < 0:
                while edge < edge_start[task + 1]:
                    origin = edge_from[edge]
                    if state[origin] != DONE:
                        need = origin
                        break
                    arrival = end[origin] + latency[edge]
                    if arrival > start[task]:
                        start[task], blame[task], blame_edge[task] = arrival, origin, edge
                    edge += 1
            next_edge[task] = edge
            if need < 0:
                end[task] = start[task] + duration[task]
                state[task] = DONE
                depth -= 1
            elif state[need] == OPEN:
                return start, end, blame, blame_edge, task
            else:
                stack[depth] = need
                depth += 1
    return start, end, blame, blame_edge, -1
