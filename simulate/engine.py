"""The discrete-event engine: when each of many tasks starts and ends, and what it waited for.

Tasks are rows of arrays. A task starts once its executor has finished the tasks listed before it (executors run their
tasks strictly in list order, or choose by priority; executor -1 is no executor) and all its dependencies have ended,
each plus a latency. It then runs at rate 1, unless it shares something: a resource whose rate depends on the demand
there, a device whose concurrent activities slow each other, or links over which flows get max-min fair rates. Where
nothing is shared the answer is a longest path, found in one pass over the tasks; else it takes an event queue. Same
input, same output: ties break by the task's number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from meshwright.errors import ScheduleError
from meshwright.simulate.bottleneck import bottlenecks
from meshwright.simulate.events import MOST_VISITS, TOO_MUCH, run_shared
from meshwright.simulate.limits import need_room

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NOBODY = -1
MOST_ACTIVITIES = 8  # a table of rates has a row for each set of them


@dataclass(frozen=True, slots=True, eq=False)
class Flows:
    """Tasks that move bytes over links.

    ``bytes`` is 0 for a task that is none. A flow's rate is at most ``bytes_per_second``, its own cap; link
    ``link[e]`` (e from ``first[task]`` to ``first[task + 1]``) carries ``weight[e]`` bytes for each byte of it, and all
    flows together at most ``link_bytes_per_second``. Rates are max-min fair.
    """

    bytes: Floats
    bytes_per_second: Floats
    first: Ints
    link: Ints
    weight: Floats
    link_bytes_per_second: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Activities:
    """Tasks that slow each other on a device, as compute does under a concurrent collective.

    ``device`` is -1 for a task that has none; ``activity`` counts from 0. While the set of activities that go on on a
    device is ``mask`` (bit a: activity a), each task of activity a there runs at ``rates[device][mask][a]``.
    """

    device: Ints
    activity: Ints
    rates: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Tasks:
    """Tasks as arrays, with their dependencies as CSR: those of task i are ``edge_start[i]:edge_start[i + 1]``.

    ``resource`` is the number of the resource a task runs on (-1: none) and ``demand`` how many users of it the task
    counts as. ``resource_rates[r][k - 1]`` is the rate of each task on resource r at a total demand of k; beyond the
    table the resource's total throughput stays what it was at the table's end, so ``(1.0,)`` is a link that its flows
    share equally and ``(1.0, 1.0)`` two cores. With ``priority``, executors choose the ready task of the smallest.
    """

    duration_seconds: Floats
    executor: Ints
    edge_start: Ints
    edge_from: Ints
    edge_latency_seconds: Floats
    resource: Ints
    demand: Ints
    resource_rates: tuple[tuple[float, ...], ...]
    flows: Flows | None = None
    activities: Activities | None = None
    priority: Floats | None = None

    @property
    def count(self) -> int:
        """Number of tasks."""
        return len(self.duration_seconds)

    @property
    def share(self) -> bool:
        """Whether anything is shared or chosen, so that times are more than a longest path."""
        return bool(
            (self.resource != NOBODY).any()
            or self.flows is not None
            or self.activities is not None
            or self.priority is not None
        )


@dataclass(frozen=True, eq=False)
class Run:
    """Start and end of each task.

    What a shared thing cost a task is ``end - start - duration``.
    """

    start_seconds: Floats
    end_seconds: Floats
    tasks: Tasks = field(repr=False)
    blame: tuple[Ints, Ints] | None = field(default=None, repr=False)

    @property
    def makespan_seconds(self) -> float:
        """End of the last task; 0 without tasks."""
        return float(self.end_seconds.max(initial=0.0))

    @property
    def waited_for(self) -> Ints:
        """The task whose end let each task start (-1: it started at zero)."""
        return self._blamed[0]

    @property
    def waited_edge(self) -> Ints:
        """The dependency that each task waited for, as an index into the CSR arrays; -1: for its executor."""
        return self._blamed[1]

    @cached_property
    def _blamed(self) -> tuple[Ints, Ints]:
        if self.blame is not None:
            return self.blame
        tasks = self.tasks
        edges = (tasks.edge_start, tasks.edge_from, tasks.edge_latency_seconds)
        found: tuple[Ints, Ints] = _blame(tasks.executor, *edges, _executors(tasks), self.end_seconds)
        return found

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
    flow_bytes: ArrayLike | None = None,
    flow_links: tuple[ArrayLike, ArrayLike] | None = None,
    flow_weights: ArrayLike | None = None,
    flow_bytes_per_second: ArrayLike = np.inf,
    link_bytes_per_second: ArrayLike = (),
    device: ArrayLike | None = None,
    activity: ArrayLike | None = None,
    interference: ArrayLike | None = None,
    priority: ArrayLike | None = None,
) -> Tasks:
    """Check the arrays and make the tasks.

    Args:
        dependencies: for each task, (earlier task, latency in seconds) pairs; or give
        edges: the same as CSR arrays (start, from, latency in seconds).
        flow_bytes: bytes that each task moves, 0 for one that is no flow; a flow's duration is not used.
        flow_links: the links of each task's flow as CSR arrays (start, link).
        flow_weights: bytes on that link for each byte of the flow (default 1), one for each entry of ``flow_links``.
        flow_bytes_per_second: the most each flow moves whatever its links allow.
        link_bytes_per_second: capacity of each link.
        device: the device of each task (-1: none), and
        activity: what it does there: 0, 1, ..., as far as
        interference: rates (device, mask of activities going on, activity), each above 0 and at most 1.
        priority: with it, an executor runs next the ready task of the smallest number.

    Raises:
        ScheduleError: lengths differ, an index is out of range, a number is negative or not finite, a flow has neither
            a link nor a cap, an array has the wrong shape or type, or there are more tasks than memory.
    """
    if np.ndim(duration_seconds) != 1:
        raise ScheduleError(f"durations have {np.ndim(duration_seconds)} dimensions; give one number for each task")
    if not np.can_cast(np.asarray(executor).dtype, np.int64, "same_kind") and np.size(executor):
        raise ScheduleError(f"executors are of type {np.asarray(executor).dtype}; number them with integers from 0")
    count = len(np.asarray(duration_seconds))
    need_room(count)
    duration = np.ascontiguousarray(duration_seconds, np.float64)
    if edges is None:
        lists = dependencies if dependencies is not None else [()] * count
        flat = [pair for pairs in lists for pair in pairs]
        edges = (
            np.cumsum([0, *map(len, lists)]),
            np.array([task for task, _ in flat], np.int64),
            np.array([latency for _, latency in flat], np.float64),
        )
    start, origin = (np.ascontiguousarray(array, np.int64) for array in edges[:2])
    flows = None
    if flow_bytes is not None:
        none = (np.zeros(count + 1, np.int64), np.zeros(0, np.int64))
        first, link = (np.ascontiguousarray(array, np.int64) for array in (flow_links or none))
        flows = Flows(
            bytes=np.ascontiguousarray(flow_bytes, np.float64),
            bytes_per_second=np.ascontiguousarray(np.broadcast_to(flow_bytes_per_second, count), np.float64),
            first=first,
            link=link,
            weight=np.ones(len(link)) if flow_weights is None else np.ascontiguousarray(flow_weights, np.float64),
            link_bytes_per_second=np.ascontiguousarray(link_bytes_per_second, np.float64),
        )
    activities = None
    if device is not None:
        activities = Activities(
            np.ascontiguousarray(device, np.int64),
            np.zeros(count, np.int64) if activity is None else np.ascontiguousarray(activity, np.int64),
            np.ascontiguousarray(() if interference is None else interference, np.float64),
        )
    tasks = Tasks(
        duration_seconds=duration,
        executor=np.ascontiguousarray(executor, np.int64),
        edge_start=start,
        edge_from=origin,
        edge_latency_seconds=np.ascontiguousarray(edges[2], np.float64),
        resource=np.full(count, NOBODY) if resource is None else np.ascontiguousarray(resource, np.int64),
        demand=np.ones(count, np.int64) if demand is None else np.ascontiguousarray(demand, np.int64),
        resource_rates=tuple(tuple(rates) for rates in resource_rates),
        flows=flows,
        activities=activities,
        priority=None if priority is None else np.ascontiguousarray(priority, np.float64),
    )
    _check(tasks)
    if activities is not None:
        _check_activities(activities, tasks)
    if flows is not None:
        _check_flows(flows, count)
        alone = (flows.bytes > 0) & (np.diff(flows.first) == 0)  # no link to share: a plain task
        if alone.any():
            seconds = np.where(alone, flows.bytes / flows.bytes_per_second, duration)
            rest = replace(flows, bytes=np.where(alone, 0.0, flows.bytes))
            tasks = replace(tasks, duration_seconds=seconds, flows=rest)
    return tasks


def _check(tasks: Tasks) -> None:
    count = tasks.count
    lengths = {len(tasks.executor), len(tasks.resource), len(tasks.demand), len(tasks.edge_start) - 1}
    if tasks.priority is not None:
        lengths.add(len(tasks.priority))
    if lengths != {count} or len(tasks.edge_from) != len(tasks.edge_latency_seconds):
        raise ScheduleError(f"the arrays of {count} tasks have different lengths")
    _need_cuts("dependencies", tasks.edge_start, len(tasks.edge_from))
    _need_in_range("executor", tasks.executor, NOBODY, None)
    need_room(_executors(tasks), "executors")
    _need_in_range("resource", tasks.resource, NOBODY, len(tasks.resource_rates))
    _need_in_range("demand", tasks.demand, 1, None)
    _need_in_range("dependency", tasks.edge_from, 0, count)
    for name, seconds in (("duration", tasks.duration_seconds), ("latency", tasks.edge_latency_seconds)):
        if not (np.isfinite(seconds).all() and (seconds >= 0).all()):
            raise ScheduleError(f"a task's {name} is negative or not finite; give seconds of at least 0")
    if tasks.priority is not None and np.isnan(tasks.priority).any():
        raise ScheduleError("a task's priority is not a number; give one to every task, or to none")
    for rates in tasks.resource_rates:
        if not rates or not all(0 < rate <= 1 for rate in rates):
            raise ScheduleError(f"a resource has the rates {rates}; each is above 0 and at most 1")


def _check_flows(flows: Flows, count: int) -> None:
    if {len(flows.bytes), len(flows.first) - 1} != {count} or len(flows.weight) != len(flows.link):
        raise ScheduleError(f"the flows of {count} tasks have arrays of different lengths")
    _need_cuts("links", flows.first, len(flows.link))
    _need_in_range("link", flows.link, 0, len(flows.link_bytes_per_second))
    if not (np.isfinite(flows.bytes).all() and (flows.bytes >= 0).all()):
        raise ScheduleError("a flow's bytes are negative or not finite; give at least 0")
    for name, numbers, infinite in (
        ("a flow's cap of bytes per second", flows.bytes_per_second, True),
        ("a flow's weight on a link", flows.weight, False),
        ("a link's bytes per second", flows.link_bytes_per_second, False),
    ):
        fine = (numbers > 0) & (np.isfinite(numbers) | infinite)
        if not fine.all():
            raise ScheduleError(f"{name} is {numbers[~fine][0]:g}; a finite number above 0 is needed")
    unbound = (flows.bytes > 0) & (np.diff(flows.first) == 0) & np.isinf(flows.bytes_per_second)
    if unbound.any():
        raise ScheduleError(f"the flow of task {int(unbound.argmax())} has no link and no cap; give it one of them")


def _check_activities(activities: Activities, tasks: Tasks) -> None:
    rates = activities.rates
    if {len(activities.device), len(activities.activity)} != {tasks.count}:
        raise ScheduleError(f"the activities of {tasks.count} tasks have arrays of different lengths")
    kinds = rates.shape[-1] if rates.ndim == 3 else 0
    if not 1 <= kinds <= MOST_ACTIVITIES or rates.shape[1] != 1 << kinds:
        raise ScheduleError(
            f"interference has the shape {rates.shape}; (devices, 2^activities, activities) is needed, with at most "
            f"{MOST_ACTIVITIES} activities"
        )
    if not ((rates > 0) & (rates <= 1)).all():
        raise ScheduleError("a rate under interference is not above 0 and at most 1")
    _need_in_range("device", activities.device, NOBODY, len(rates))
    _need_in_range("activity", activities.activity, 0, kinds)
    twice = (activities.device != NOBODY) & (tasks.resource != NOBODY)
    if tasks.flows is not None:
        twice |= (activities.device != NOBODY) & (tasks.flows.bytes > 0)
    if twice.any():
        raise ScheduleError(
            f"task {int(twice.argmax())} has an activity on a device and also a resource or a flow; it has one rate"
        )


def _need_cuts(name: str, start: Ints, entries: int) -> None:
    if start[0] != 0 or start[-1] != entries or (np.diff(start) < 0).any():
        raise ScheduleError(f"the starts of the {name} do not cut {entries} entries into one run for each task")


def _need_in_range(name: str, numbers: Ints, low: int, high: int | None) -> None:
    if numbers.size and (numbers.min() < low or (high is not None and numbers.max() >= high)):
        raise ScheduleError(f"a task's {name} is out of range: {numbers.min()}..{numbers.max()}")


def run_tasks(tasks: Tasks) -> Run:
    """Simulate.

    Raises:
        ScheduleError: tasks wait for each other in a circle, of which the message names one; flows meet so often that
            it would take hours; or a task would end at no finite time.
    """
    executors = _executors(tasks)
    simpler = _with_equal_shares(tasks)
    arrays = (simpler.duration_seconds, tasks.executor, tasks.edge_start, tasks.edge_from, tasks.edge_latency_seconds)
    blame = None
    if tasks.share:
        start, end, *blamed, stuck = run_shared(*arrays, executors, *_shared(simpler))
        blame = (blamed[0], blamed[1])
    else:
        start, end = np.empty(tasks.count), np.empty(tasks.count)  # NumPy asks for huge pages, compiled code does not
        stuck = NOBODY
        if not _in_list_order(*arrays, executors, start, end):
            start, end, stuck = _depth_first(*arrays, executors)
    if stuck == TOO_MUCH:
        raise ScheduleError(
            f"flows meet on links so often that their rates were found anew {MOST_VISITS:,} times; simulate fewer at "
            "once, or join those that go the same way"
        )
    if stuck != NOBODY:
        raise ScheduleError(f"the program deadlocks: task {stuck} waits, through others, for itself")
    if not np.isfinite(end.max(initial=0.0)):
        late = int((~np.isfinite(end)).argmax())
        raise ScheduleError(f"task {late} would end after more seconds than a number can hold; use shorter tasks")
    return Run(start, end, tasks, blame)


def _executors(tasks: Tasks) -> int:
    return int(tasks.executor.max(initial=NOBODY)) + 1


def _with_equal_shares(tasks: Tasks) -> Tasks:
    """The same tasks; flows that one link alone holds back run on a resource instead."""
    flows = tasks.flows
    if flows is None:
        return tasks
    only, seconds = bottlenecks(
        flows.bytes, flows.first, flows.link, flows.weight, flows.bytes_per_second, flows.link_bytes_per_second
    )
    found = only != NOBODY
    if not found.any():
        return tasks
    links, which = np.unique(only[found], return_inverse=True)
    resource, before = tasks.resource.copy(), len(tasks.resource_rates)
    resource[found] = before + which
    rest = np.where(found, 0.0, flows.bytes)
    return replace(
        tasks,
        duration_seconds=np.where(found, seconds, tasks.duration_seconds),
        resource=resource,
        demand=np.where(found, 1, tasks.demand),
        resource_rates=tasks.resource_rates + ((1.0,),) * len(links),
        flows=replace(flows, bytes=rest) if rest.any() else None,
    )


def _shared(tasks: Tasks) -> tuple[Any, ...]:
    """What is shared, as ``run_shared`` wants it: resources are the first clocks, activities of devices the others."""
    count, resources = tasks.count, len(tasks.resource_rates)
    width = max(map(len, tasks.resource_rates), default=1)
    rates = np.array([_stretched(row, width) for row in tasks.resource_rates], np.float64).reshape(resources, width)
    clock_of, interference = tasks.resource, np.ones((0, 1, 1))
    device = activity = np.zeros(resources, np.int64)
    if tasks.activities is not None:
        mine, interference = tasks.activities, tasks.activities.rates
        devices, _, kinds = interference.shape
        clock_of = np.where(mine.device == NOBODY, clock_of, resources + mine.device * kinds + mine.activity)
        device = np.concatenate([device, np.repeat(np.arange(devices), kinds)])
        activity = np.concatenate([activity, np.tile(np.arange(kinds), devices)])
    flows = tasks.flows or Flows(
        *(np.zeros(0),) * 2, np.zeros(count + 1, np.int64), np.zeros(0, np.int64), *(np.zeros(0),) * 2
    )
    return (
        np.zeros(0) if tasks.priority is None else tasks.priority,
        clock_of,
        tasks.demand,
        rates,
        device,
        activity,
        interference,
        flows.bytes,
        flows.first,
        flows.link,
        flows.weight,
        flows.bytes_per_second,
        flows.link_bytes_per_second,
    )


def _stretched(rates: tuple[float, ...], width: int) -> list[float]:
    """A table of rates made as long as the longest, at the throughput that it ended with."""
    throughput = rates[-1] * len(rates)
    return [*rates, *(throughput / k for k in range(len(rates) + 1, width + 1))]


@njit(cache=True)
def _in_list_order(
    duration: Floats,
    executor: Ints,
    edge_start: Ints,
    edge_from: Ints,
    latency: Floats,
    executors: int,
    start: Floats,
    end: Floats,
) -> bool:
    """Write the times, nothing being shared, if every dependency stands earlier in the list; False if one does not."""
    count = len(duration)
    free = np.zeros(executors)
    for task in range(count):
        begin = free[executor[task]] if executor[task] >= 0 else 0.0
        for edge in range(edge_start[task], edge_start[task + 1]):
            if edge_from[edge] >= task:
                return False
            begin = max(begin, end[edge_from[edge]] + latency[edge])
        start[task], end[task] = begin, begin + duration[task]
        if executor[task] >= 0:
            free[executor[task]] = end[task]
    return True


@njit(cache=True)
def _depth_first(
    duration: Floats, executor: Ints, edge_start: Ints, edge_from: Ints, latency: Floats, executors: int
) -> tuple[Floats, Floats, int]:
    """The same in any order, by a walk from each task back to what it needs; also a task in a circle (-1: none)."""
    count = len(duration)
    before = _before(executor, executors)
    start, end = np.zeros(count), np.zeros(count)
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
                        start[task] = end[need]
                    need = -1
                    edge += 1
            if need < 0:
                while edge < edge_start[task + 1]:
                    origin = edge_from[edge]
                    if state[origin] != DONE:
                        need = origin
                        break
                    start[task] = max(start[task], end[origin] + latency[edge])
                    edge += 1
            next_edge[task] = edge
            if need < 0:
                end[task] = start[task] + duration[task]
                state[task] = DONE
                depth -= 1
            elif state[need] == OPEN:
                return start, end, task
            else:
                stack[depth] = need
                depth += 1
    return start, end, -1


@njit(cache=True)
def _before(executor: Ints, executors: int) -> Ints:
    """The task before each one on its executor (-1: none)."""
    before = np.full(len(executor), -1, np.int64)
    last = np.full(executors, -1, np.int64)
    for task in range(len(executor)):
        if executor[task] >= 0:
            before[task] = last[executor[task]]
            last[executor[task]] = task
    return before


@njit(cache=True)
def _blame(
    executor: Ints, edge_start: Ints, edge_from: Ints, latency: Floats, executors: int, end: Floats
) -> tuple[Ints, Ints]:
    """What let each task start: its executor or, if that was free before, the first of the latest arrivals."""
    count = len(executor)
    task_blamed, edge_blamed = _before(executor, executors), np.full(count, -1, np.int64)
    for task in range(count):
        begin = end[task_blamed[task]] if task_blamed[task] >= 0 else 0.0
        for edge in range(edge_start[task], edge_start[task + 1]):
            arrival = end[edge_from[edge]] + latency[edge]
            if arrival > begin:
                begin, task_blamed[task], edge_blamed[task] = arrival, edge_from[edge], edge
    return task_blamed, edge_blamed
