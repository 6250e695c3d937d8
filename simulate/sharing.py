"""The event queue behind ``engine.run_tasks`` for tasks that share resources.

All tasks on a resource run at one rate, so a resource needs only one clock that counts the work each of them has
done: a task ends when that clock has advanced by its duration (processor sharing in virtual time; Parekh and
Gallager, IEEE/ACM Trans. Networking 1 (1993) 344-357). A change of demand costs one event, not one per task.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@njit(cache=True)
def _push(keys: Floats, ids: Ints, size: int, key: float, identity: int) -> int:
    """Add to a binary heap ordered by (key, identity); returns the new size."""
    child = size
    while child > 0:
        parent = (child - 1) >> 1
        if keys[parent] < key or (keys[parent] == key and ids[parent] <= identity):
            break
        keys[child], ids[child] = keys[parent], ids[parent]
        child = parent
    keys[child], ids[child] = key, identity
    return size + 1


@njit(cache=True)
def _pop(keys: Floats, ids: Ints, size: int) -> int:
    """Remove the first of a binary heap, which the caller has read; returns the new size."""
    size -= 1
    key, identity = keys[size], ids[size]
    parent = 0
    while True:
        child = 2 * parent + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (keys[other] < keys[child] or (keys[other] == keys[child] and ids[other] < ids[child])):
            child = other
        if key < keys[child] or (key == keys[child] and identity <= ids[child]):
            break
        keys[parent], ids[parent] = keys[child], ids[child]
        parent = child
    keys[parent], ids[parent] = key, identity
    return size


@njit(cache=True)
def run_shared(
    duration: Floats,
    executor: Ints,
    edge_start: Ints,
    edge_from: Ints,
    latency: Floats,
    executors: int,
    resource: Ints,
    demand: Ints,
    rates: Floats,
) -> tuple[Floats, Floats, Ints, Ints, int]:
    """Start, end, the task and the edge waited for, and a task that never started (-1: all did).

    Events are numbered: t is the start of task t, count + t its end where no resource is involved, and from 2 * count
    on, (version, resource) pairs: the next end on a resource, void if the resource's demand has changed since.
    """
    count, resources, width = len(duration), len(rates), rates.shape[1]

    # Who waits for whom: successors by dependency in reverse CSR, and by executor.
    after = np.full(count, -1, np.int64)
    last = np.full(executors, -1, np.int64)
    waiting = edge_start[1:] - edge_start[:-1]
    for task in range(count):
        if executor[task] >= 0:
            if last[executor[task]] >= 0:
                after[last[executor[task]]] = task
                waiting[task] += 1
            last[executor[task]] = task
    first_out = np.zeros(count + 1, np.int64)
    for origin in edge_from:
        first_out[origin + 1] += 1
    first_out = np.cumsum(first_out)
    filled = first_out[:-1].copy()
    out_task, out_edge = np.empty(len(edge_from), np.int64), np.empty(len(edge_from), np.int64)
    for task in range(count):
        for edge in range(edge_start[task], edge_start[task + 1]):
            slot = filled[edge_from[edge]]
            out_task[slot], out_edge[slot] = task, edge
            filled[edge_from[edge]] += 1

    # Each resource: its clock of work done, when that was read, its demand, and a heap of its tasks by clock at end.
    first_slot = np.zeros(resources + 1, np.int64)
    for task in range(count):
        if resource[task] >= 0:
            first_slot[resource[task] + 1] += 1
    first_slot = np.cumsum(first_slot)
    slot_keys, slot_ids = np.empty(first_slot[-1]), np.empty(first_slot[-1], np.int64)
    running = np.zeros(resources, np.int64)
    total_demand, version = np.zeros(resources, np.int64), np.zeros(resources, np.int64)
    clock, read_at, rate = np.zeros(resources), np.zeros(resources), np.ones(resources)

    start, end, ready = np.zeros(count), np.zeros(count), np.zeros(count)
    blame, blame_edge = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    begun = np.zeros(count, np.bool_)
    keys, ids, size = np.empty(4 * count + 1), np.empty(4 * count + 1, np.int64), 0
    for task in range(count):
        if waiting[task] == 0:
            size = _push(keys, ids, size, 0.0, task)

    while size > 0:
        now, event = keys[0], ids[0]
        size = _pop(keys, ids, size)
        ended, changed = -1, -1
        if event < count:
            task = event
            start[task], begun[task] = now, True
            which = resource[task]
            if which < 0:
                size = _push(keys, ids, size, now + duration[task], count + task)
                continue
            if running[which] == 0:
                clock[which] = 0.0
            else:
                clock[which] += (now - read_at[which]) * rate[which]
            heap = slice(first_slot[which], first_slot[which + 1])
            target = clock[which] + duration[task]
            running[which] = _push(slot_keys[heap], slot_ids[heap], running[which], target, task)
            total_demand[which] += demand[task]
            changed = which
        elif event < 2 * count:
            ended = event - count
        else:
            which = (event - 2 * count) % resources
            if (event - 2 * count) // resources != version[which]:
                continue
            heap = slice(first_slot[which], first_slot[which + 1])
            ended = slot_ids[heap][0]
            clock[which] = slot_keys[heap][0]
            running[which] = _pop(slot_keys[heap], slot_ids[heap], running[which])
            total_demand[which] -= demand[ended]
            changed = which

        if changed >= 0:
            read_at[changed] = now
            version[changed] += 1
            if running[changed] > 0:
                users = total_demand[changed]
                rate[changed] = rates[changed, users - 1] if users <= width else rates[changed, -1] * width / users
                left = max(0.0, slot_keys[first_slot[changed]] - clock[changed])
                event = 2 * count + version[changed] * resources + changed
                size = _push(keys, ids, size, now + left / rate[changed], event)

        if ended >= 0:
            end[ended] = now
            task = after[ended]
            if task >= 0:
                # An executor that is free only now is blamed before an arrival at the same instant.
                if now >= ready[task]:
                    ready[task], blame[task], blame_edge[task] = now, ended, -1
                waiting[task] -= 1
                if waiting[task] == 0:
                    size = _push(keys, ids, size, ready[task], task)
            for slot in range(first_out[ended], first_out[ended + 1]):
                task, edge = out_task[slot], out_edge[slot]
                arrival = now + latency[edge]
                tie = arrival == ready[task] and edge < blame_edge[task]
                if arrival > ready[task] or tie:
                    ready[task], blame[task], blame_edge[task] = arrival, ended, edge
                waiting[task] -= 1
                if waiting[task] == 0:
                    size = _push(keys, ids, size, ready[task], task)

    for task in range(count):
        if not begun[task]:
            return start, end, blame, blame_edge, task
    return start, end, blame, blame_edge, -1
