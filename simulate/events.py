"""The event queue behind ``engine.run_tasks`` for tasks that share something.

Three things may be shared. All tasks on a *resource*, or of one activity on one *device*, run at one rate, so they
need only one clock that counts the work each of them has done: a task ends when that clock has advanced by its
duration (processor sharing in virtual time; Parekh and Gallager, IEEE/ACM Trans. Networking 1 (1993) 344-357). A
*flow* has a rate of its own, which changes when a flow starts or ends that shares a link with it, through others.

At each instant first everything ends and becomes ready, then rates are found anew, then executors that choose by
priority choose. Events are (seconds, identity); identities of one kind count up with tasks, so ties break by number.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from meshwright.simulate.heap import pop, push, with_room
from meshwright.simulate.maxmin import fill, reach

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SETTLE = 1 << 61  # identity of "find rates anew", after all events of an instant but
CHOOSE = 1 << 62  # "this executor chooses": CHOOSE + executor
TOO_MUCH = -2
MOST_VISITS = 10_000_000_000  # of a flow, to find its rate anew: minutes


@njit(cache=True)
def run_shared(
    duration: Floats,
    executor: Ints,
    edge_start: Ints,
    edge_from: Ints,
    latency: Floats,
    executors: int,
    priority: Floats,
    clock_of: Ints,
    demand: Ints,
    rates: Floats,
    clock_device: Ints,
    clock_activity: Ints,
    interference: NDArray[np.float64],
    flow_bytes: Floats,
    flow_first: Ints,
    flow_link: Ints,
    flow_weight: Floats,
    flow_cap: Floats,
    capacity: Floats,
) -> tuple[Floats, Floats, Ints, Ints, int]:
    """Start, end, the task and the edge waited for, and a task that never started (-1: all did; ``TOO_MUCH``: nobody
    knows, as flows met so often that it was given up).

    ``clock_of`` is the clock a task runs by (-1: seconds). The first ``len(rates)`` clocks are resources, each with a
    row of rates by total demand; the rest are activities of devices: ``clock_device`` and ``clock_activity`` say which,
    and row ``mask`` of ``interference[device]`` their rates while the activities of the mask go on. ``priority`` is
    empty if all executors run their tasks in list order; ``flow_bytes`` is empty without flows, else 0 for a task
    that is none.
    """
    count, resources, clocks, width = len(duration), len(rates), len(clock_device), rates.shape[1]
    choosing, flowing = len(priority) > 0, len(flow_bytes) > 0

    # Who waits for whom: successors by dependency in reverse CSR, and by executor.
    after = np.full(count, -1, np.int64)
    last = np.full(executors, -1, np.int64)
    waiting = edge_start[1:] - edge_start[:-1]
    for task in range(count):
        if executor[task] >= 0 and not choosing:
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

    # Each clock: the work it has counted, when that was read, its rate, its demand, and a heap of its tasks by the
    # clock's reading at their ends.
    first_slot = np.zeros(clocks + 1, np.int64)
    for task in range(count):
        if clock_of[task] >= 0:
            first_slot[clock_of[task] + 1] += 1
    first_slot = np.cumsum(first_slot)
    slot_keys, slot_ids = np.empty(first_slot[-1]), np.empty(first_slot[-1], np.int64)
    running, total_demand = np.zeros(clocks, np.int64), np.zeros(clocks, np.int64)
    clock, clock_read, clock_rate = np.zeros(clocks), np.zeros(clocks), np.ones(clocks)
    version = np.zeros(clocks, np.int64)
    mask = np.zeros(len(interference), np.int64)
    changed = np.empty(max(1, clocks), np.int64)

    # Each flow: bytes left, when that was read, its rate; each link: a list of its active entries.
    flows = count if flowing else 0
    left, flow_read, rate = np.zeros(flows), np.zeros(flows), np.zeros(flows)
    flow_version, queued = np.zeros(flows, np.int64), np.full(flows, -1, np.int64)
    flow_end = np.full(flows, np.inf)
    entries, links = len(flow_link), len(capacity)
    head, next_entry, entry_before = (
        np.full(links, -1, np.int64),
        np.full(entries, -1, np.int64),
        np.full(entries, -1, np.int64),
    )
    owner = np.empty(entries, np.int64)
    for task in range(flows):
        owner[flow_first[task] : flow_first[task + 1]] = task
    flow_stamp, link_stamp, stamp = np.zeros(flows, np.int64), np.zeros(links, np.int64), 0
    some_flows, some_links, new_rate = np.empty(flows, np.int64), np.empty(links, np.int64), np.zeros(flows)
    room, load, rising = np.zeros(links), np.zeros(links), np.zeros(links, np.int64)
    touched, is_touched, touching = np.empty(links, np.int64), np.zeros(links, np.bool_), 0
    settling, visits = False, 0

    # Executors that choose: their ready tasks by priority, as one heap each in a common array.
    choices = executors if choosing else 0
    first_ready = np.zeros(choices + 1, np.int64)
    if choosing:
        for task in range(count):
            if executor[task] >= 0:
                first_ready[executor[task] + 1] += 1
        first_ready = np.cumsum(first_ready)
    ready_keys, ready_ids = np.empty(first_ready[-1]), np.empty(first_ready[-1], np.int64)
    readied, busy, asked = np.zeros(choices, np.int64), np.zeros(choices, np.bool_), np.zeros(choices, np.bool_)

    start, end, ready = np.zeros(count), np.zeros(count), np.zeros(count)
    blame, blame_edge = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    begun = np.zeros(count, np.bool_)
    keys, ids, size = np.empty(4 * count + 16), np.empty(4 * count + 16, np.int64), 0
    for task in range(count):
        if waiting[task] == 0:
            size = push(keys, ids, size, 0.0, task)

    while size > 0:
        now, event = keys[0], ids[0]
        size = pop(keys, ids, size)
        keys, ids = with_room(keys, ids, size, clocks + flows + 8)
        starts, ended, changes = -1, -1, 0

        if event >= CHOOSE:
            which = event - CHOOSE
            asked[which] = False
            if not busy[which] and readied[which] > 0:
                heap = slice(first_ready[which], first_ready[which + 1])
                starts = ready_ids[heap][0]
                readied[which] = pop(ready_keys[heap], ready_ids[heap], readied[which])
                busy[which] = True
                if now > ready[starts]:
                    blame[starts], blame_edge[starts] = last[which], -1
        elif event == SETTLE:
            settling = False
            stamp += 1
            for t in range(touching):
                seed = touched[t]
                is_touched[seed] = False
                if link_stamp[seed] == stamp:
                    continue
                found, around = reach(
                    seed, head, next_entry, owner, flow_first, flow_link, flow_stamp, link_stamp, stamp,
                    some_flows, some_links,
                )  # fmt: skip
                rounds = fill(
                    some_flows[:found], some_links[:around], flow_first, flow_link, flow_weight, flow_cap, capacity,
                    room, load, rising, new_rate,
                )  # fmt: skip
                visits += rounds * found
                soonest = np.inf
                for f in some_flows[:found]:
                    if new_rate[f] != rate[f]:
                        left[f] = max(0.0, left[f] - rate[f] * (now - flow_read[f]))
                        flow_read[f], rate[f] = now, new_rate[f]
                        flow_version[f] += 1
                        flow_end[f] = now + left[f] / rate[f]
                    soonest = min(soonest, flow_end[f])
                # Whichever flow of these ends first, rates are found anew: the other ends need not be queued.
                for f in some_flows[:found]:
                    if flow_end[f] == soonest and queued[f] != flow_version[f]:
                        queued[f] = flow_version[f]
                        identity = 2 * count + flow_version[f] * (clocks + count) + clocks + f
                        size = push(keys, ids, size, soonest, identity)
            touching = 0
            if visits > MOST_VISITS:
                return start, end, blame, blame_edge, TOO_MUCH
        elif event < count:
            task = event
            if choosing and executor[task] >= 0:
                which = executor[task]
                heap = slice(first_ready[which], first_ready[which + 1])
                readied[which] = push(ready_keys[heap], ready_ids[heap], readied[which], priority[task], task)
                if not busy[which] and not asked[which]:
                    asked[which] = True
                    size = push(keys, ids, size, now, CHOOSE + which)
            else:
                starts = task
        elif event < 2 * count:
            ended = event - count
        else:
            which = (event - 2 * count) % (clocks + count)
            of_version = (event - 2 * count) // (clocks + count)
            if which >= clocks:
                flow = which - clocks
                if of_version == flow_version[flow]:
                    ended = flow
                    flow_version[flow] += 1
                    for entry in range(flow_first[flow], flow_first[flow + 1]):
                        previous, following, link = entry_before[entry], next_entry[entry], flow_link[entry]
                        if previous >= 0:
                            next_entry[previous] = following
                        else:
                            head[link] = following
                        if following >= 0:
                            entry_before[following] = previous
                        if not is_touched[link]:
                            touched[touching], is_touched[link] = link, True
                            touching += 1
                    if not settling:
                        settling = True
                        size = push(keys, ids, size, now, SETTLE)
            elif of_version == version[which]:
                heap = slice(first_slot[which], first_slot[which + 1])
                ended = slot_ids[heap][0]
                clock[which], clock_read[which] = slot_keys[heap][0], now
                running[which] = pop(slot_keys[heap], slot_ids[heap], running[which])
                total_demand[which] -= demand[ended]
                changed[0], changes = which, 1

        if starts >= 0:
            start[starts], begun[starts] = now, True
            which = clock_of[starts]
            if flowing and flow_bytes[starts] > 0:
                left[starts], flow_read[starts], rate[starts] = flow_bytes[starts], now, 0.0
                flow_end[starts] = np.inf
                for entry in range(flow_first[starts], flow_first[starts + 1]):
                    link = flow_link[entry]
                    next_entry[entry], entry_before[entry] = head[link], -1
                    if head[link] >= 0:
                        entry_before[head[link]] = entry
                    head[link] = entry
                    if not is_touched[link]:
                        touched[touching], is_touched[link] = link, True
                        touching += 1
                if not settling:
                    settling = True
                    size = push(keys, ids, size, now, SETTLE)
            elif which < 0:
                size = push(keys, ids, size, now + duration[starts], count + starts)
            else:
                if running[which] == 0:
                    clock[which] = 0.0
                else:
                    clock[which] += (now - clock_read[which]) * clock_rate[which]
                clock_read[which] = now
                heap = slice(first_slot[which], first_slot[which + 1])
                target = clock[which] + duration[starts]
                running[which] = push(slot_keys[heap], slot_ids[heap], running[which], target, starts)
                total_demand[which] += demand[starts]
                changed[0], changes = which, 1

        if changes > 0 and changed[0] >= resources:
            # An activity that begins or ends changes the rates of all that go on beside it on its device.
            which = changed[0]
            device, bit = clock_device[which], 1 << clock_activity[which]
            before = mask[device]
            mask[device] = before | bit if running[which] > 0 else before & ~bit
            if mask[device] != before:
                base = which - clock_activity[which]
                for other in range(base, base + interference.shape[2]):
                    if other != which and running[other] > 0:
                        changed[changes] = other
                        changes += 1
        for which in changed[:changes]:
            clock[which] += (now - clock_read[which]) * clock_rate[which]
            clock_read[which] = now
            version[which] += 1
            if running[which] > 0:
                if which < resources:
                    users = total_demand[which]
                    rate_now = rates[which, users - 1] if users <= width else rates[which, -1] * width / users
                else:
                    device = clock_device[which]
                    rate_now = interference[device, mask[device], clock_activity[which]]
                clock_rate[which] = rate_now
                ahead = max(0.0, slot_keys[first_slot[which]] - clock[which])
                identity = 2 * count + version[which] * (clocks + count) + which
                size = push(keys, ids, size, now + ahead / rate_now, identity)

        if ended >= 0:
            end[ended] = now
            if choosing and executor[ended] >= 0:
                which = executor[ended]
                busy[which], last[which] = False, ended
                if readied[which] > 0 and not asked[which]:
                    asked[which] = True
                    size = push(keys, ids, size, now, CHOOSE + which)
            task = after[ended]
            if task >= 0:
                # An executor that is free only now is blamed before an arrival at the same instant.
                if now >= ready[task]:
                    ready[task], blame[task], blame_edge[task] = now, ended, -1
                waiting[task] -= 1
                if waiting[task] == 0:
                    size = push(keys, ids, size, ready[task], task)
            keys, ids = with_room(keys, ids, size, first_out[ended + 1] - first_out[ended])
            for slot in range(first_out[ended], first_out[ended + 1]):
                task, edge = out_task[slot], out_edge[slot]
                arrival = now + latency[edge]
                tie = arrival == ready[task] and edge < blame_edge[task]
                if arrival > ready[task] or tie:
                    ready[task], blame[task], blame_edge[task] = arrival, ended, edge
                waiting[task] -= 1
                if waiting[task] == 0:
                    size = push(keys, ids, size, ready[task], task)

    for task in range(count):
        if not begun[task]:
            return start, end, blame, blame_edge, task
    return start, end, blame, blame_edge, -1
