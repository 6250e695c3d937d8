"""One sample of a step, or all of them: a factor for each task, then the times that follow."""

from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from meshwright.simulate.code import BACKWARD, FORWARD, INPUT, UPDATE, WEIGHT
from meshwright.simulate.compiled import KIND_COUNT
from meshwright.simulate.draws import DEVICE, HOST, LINK, TASK, lognormal, normals, uniforms

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Index = NDArray[np.int32]

COMPUTES = (FORWARD, BACKWARD, INPUT, WEIGHT, UPDATE)  # what devices do by themselves; the rest is communication


class Step(NamedTuple):
    """The predicted step as arrays by task (see ``Compiled``), with seconds by slot."""

    order: Index
    before: Index
    need: Index
    need_slot: Index
    slot: Index
    mesh: Ints
    works: Bools  # all but sends and receives
    occupies: Bools  # those of them that run on their mesh's own stream
    meshes: int
    slot_seconds: Floats
    slot_latency_seconds: Floats


class Chances(NamedTuple):
    """The variability as arrays: devices, hosts and links by position; ``device`` and ``link`` are their numbers."""

    slot_jitter: Floats
    device: Ints
    device_factor: Floats
    device_host: Ints
    stage_first: Ints  # the devices of stage s are stage_device[stage_first[s]:stage_first[s + 1]]
    stage_device: Ints
    link: Ints
    link_factor: Floats
    transfer_link: Ints
    host_jitter: float
    straggler_probability: float
    straggler_factor: float
    slow_link_probability: float
    slow_link_factor: float


@njit(cache=True, parallel=True)
def sample_all(seed: np.uint64, samples: int, step: Step, chances: Chances) -> tuple[Floats, Ints, Floats]:
    """Makespan, critical mesh and seconds in which each mesh is occupied, of each sample."""
    makespan, critical = np.empty(samples), np.empty(samples, np.int64)
    occupied = np.zeros((samples, step.meshes))
    for sample in prange(samples):
        factor = factors(seed, sample, step, chances)
        start, end = times(step, factor)
        makespan[sample], critical[sample] = judge(step, start, end, factor, occupied[sample])
    return makespan, critical, occupied


@njit(cache=True)
def factors(seed: np.uint64, sample: int, step: Step, chances: Chances) -> Floats:
    """How many times as long as predicted each task of one sample takes."""
    by_slot, jitter, slot = _slot_factors(seed, sample, chances), chances.slot_jitter, step.slot
    count = len(slot)
    factor = np.empty(count)
    for first in range(0, count, 2):  # normal numbers come in pairs
        second = min(first + 1, count - 1)
        jitters = jitter[slot[first]], jitter[slot[second]]
        factor[first], factor[second] = by_slot[slot[first]], by_slot[slot[second]]
        if jitters[0] > 0 or jitters[1] > 0:
            normal = normals(seed, sample, TASK, first // 2)
            factor[first] *= lognormal(jitters[0], normal[0])
            if second > first:
                factor[second] *= lognormal(jitters[1], normal[1])
    return factor


@njit(cache=True)
def _slot_factors(seed: np.uint64, sample: int, chances: Chances) -> Floats:
    """What holds for the whole step: a stage computes at the speed of its slowest device."""
    device = chances.device_factor.copy()
    for d in range(len(device)):
        if uniforms(seed, sample, DEVICE, chances.device[d])[0] < chances.straggler_probability:
            device[d] *= chances.straggler_factor
        if chances.host_jitter > 0:
            device[d] *= lognormal(chances.host_jitter, normals(seed, sample, HOST, chances.device_host[d])[0])
    link = chances.link_factor.copy()
    for k in range(len(link)):
        if uniforms(seed, sample, LINK, chances.link[k])[0] < chances.slow_link_probability:
            link[k] *= chances.slow_link_factor

    by_slot = np.ones(len(chances.slot_jitter))
    stages = len(chances.stage_first) - 1
    for stage in range(stages):
        slowest = 0.0
        for place in range(chances.stage_first[stage], chances.stage_first[stage + 1]):
            slowest = max(slowest, device[chances.stage_device[place]])
        for kind in COMPUTES:
            by_slot[stage * KIND_COUNT + kind] = slowest
    for transfer in range(len(chances.transfer_link)):
        by_slot[stages * KIND_COUNT + transfer] = link[chances.transfer_link[transfer]]
    return by_slot


@njit(cache=True)
def times(step: Step, factor: Floats) -> tuple[Floats, Floats]:
    """Start and end of each task with nothing shared: what ``simulate`` does, every number times its factor."""
    before, need, need_slot, slot = step.before, step.need, step.need_slot, step.slot
    seconds, latency = step.slot_seconds, step.slot_latency_seconds
    start, end = np.empty(len(slot)), np.empty(len(slot))
    for task in step.order:
        free, arrival = _moments(end, before[task], need[task], need_slot[task], latency, factor)
        begin = max(free, arrival)
        start[task], end[task] = begin, begin + seconds[slot[task]] * factor[task]
    return start, end


@njit(cache=True)
def _moments(
    end: Floats, before: int, need: int, need_slot: int, latency: Floats, factor: Floats
) -> tuple[float, float]:
    """When the executor of a task is free for it, and when what it needs from another task is there."""
    free = end[before] if before >= 0 else 0.0
    arrival = 0.0
    if need >= 0:
        arrival = end[need]
        if need_slot >= 0:
            arrival += latency[need_slot] * factor[need]
    return free, arrival


@njit(cache=True)
def judge(step: Step, start: Floats, end: Floats, factor: Floats, occupied: Floats) -> tuple[float, int]:
    """Makespan and critical mesh; ``occupied`` is filled with the seconds in which each mesh is.

    The critical path goes back from the last end to whatever let each task start, its executor where both did.
    """
    before, need, need_slot, mesh = step.before, step.need, step.need_slot, step.mesh
    works, occupies, latency = step.works, step.occupies, step.slot_latency_seconds
    makespan, task = 0.0, -1
    for i in range(len(end)):
        if occupies[i]:
            occupied[mesh[i]] += end[i] - start[i]
        if end[i] > makespan:
            makespan, task = end[i], i
    on_path = np.zeros(step.meshes)
    while task >= 0:
        if works[task]:
            on_path[mesh[task]] += end[task] - start[task]
        free, arrival = _moments(end, before[task], need[task], need_slot[task], latency, factor)
        task = need[task] if arrival > free else before[task]
    critical = -1
    most = 0.0
    for candidate in range(step.meshes):
        if on_path[candidate] > most:
            critical, most = candidate, on_path[candidate]
    return makespan, critical
