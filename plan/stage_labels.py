"""Numba kernels of the stage DP: lower bounds of prefixes, then Pareto labels of suffixes (``meshwright.plan.inter``).

A *label* is one way to run layers i..L-1. It has four values that a prefix can still change the weight of: the sum of
what stages add, the largest step, the hop before its first stage and the largest once-per-iteration time. Labels of
the same state (layer, device offset, kind, layout) compete; a label that loses in everything is dropped. What keeps
the fronts short is that every label is first lifted to the lower bound of all prefixes that can precede it (no prefix
can undo it, so no total changes) and dropped when even the best prefix cannot bring it under a known total.

Units: seconds everywhere; all arrays are C-contiguous float64 or int64.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

SUM, LARGEST, HOP, ONCE = 0, 1, 2, 3  # columns of a label's values
DEPTH, STAGES, IDLE, SHAPE, LAST, KIND, ENTRY, EXIT, NEXT = 0, 1, 2, 3, 4, 5, 6, 7, 8  # columns of its facts
NEVER = np.iinfo(np.int64).max  # a live count that no pipeline reaches
_SHAPE_STEP = 6364136223846793005  # Knuth's 64-bit multiplier: shapes are told apart by a rolling hash


@njit(cache=True)
def prefix_bounds(
    fill: FloatArray,
    seconds: FloatArray,
    once: FloatArray,
    max_depth: IntArray,
    hops: FloatArray,
    devices: IntArray,
    fits_at: BoolArray,
    per_host: int,
    joint: bool,
    upper: float,
) -> tuple[FloatArray, FloatArray]:
    """Least (sum, largest, once) of the stages before a cut, each minimised alone.

    Args:
        fill, seconds, once: (L, L+1, K, A, A), what a stage adds to the sum, what its step takes, and what it takes
            once an iteration; fill is +inf where a stage is impossible.
        max_depth: same shape, the most stages from this one to the end with which it fits in memory.
        hops: (L+1, 2, M, A, M, A). A stage of kind k runs on mesh k % M, and only its mesh matters to its neighbours.
        devices, fits_at: (M,) and (M, D): how many devices a mesh has, and whether it may start at a device.
        joint: whether a hop adds to the step of the stage before it (1F1B) or runs beside it (GPipe).
        upper: sums above it are of no use.

    Returns:
        ``closed`` (L+1, D+1, K, A, 3): a stage of this kind and exit layout ends here, its hop not yet paid.
        ``opened`` (L+1, D+1, K, A, 3): a stage of this kind and entry layout starts here, the hop paid.
        +inf where no prefix leads.
    """
    layers, kinds, layouts = fill.shape[0], hops.shape[2], fill.shape[3]
    ways = fill.shape[2] // kinds
    total = fits_at.shape[1]
    closed = np.full((layers + 1, total + 1, kinds, layouts, 3), np.inf)
    opened = np.full((layers + 1, total + 1, kinds, layouts, 3), np.inf)
    opened[0, 0] = 0.0
    for i in range(layers):
        for d in range(total):
            if i > 0:
                crosses = 1 if d % per_host == 0 else 0
                for k in range(kinds):
                    for b in range(layouts):
                        before = closed[i, d, k, b]
                        if before[0] == np.inf:
                            continue
                        for right in range(kinds):
                            if not fits_at[right, d]:
                                continue
                            for a in range(layouts):
                                hop = hops[i, crosses, k, b, right, a]
                                after = opened[i, d, right, a]
                                if before[0] + hop < after[0]:
                                    after[0] = before[0] + hop
                                after[1] = min(after[1], max(before[1], hop))
                                after[2] = min(after[2], before[2]) if hop < np.inf else after[2]
            for k in range(kinds):
                if not fits_at[k, d]:
                    continue
                end = d + devices[k]
                for a in range(layouts):
                    before = opened[i, d, k, a]
                    if before[0] == np.inf:
                        continue
                    for kind in range(k, ways * kinds, kinds):
                        for j in range(i + 1, layers + 1):
                            for b in range(layouts):
                                time = fill[i, j, kind, a, b]
                                # A stage that is not the last is at least two deep.
                                if before[0] + time > upper or (j < layers and max_depth[i, j, kind, a, b] < 2):
                                    continue
                                after = closed[j, end, k, b]
                                after[0] = min(after[0], before[0] + time)
                                after[1] = min(after[1], max(before[1], seconds[i, j, kind, a, b]))
                                after[2] = min(after[2], max(before[2], once[i, j, kind, a, b]))
    return closed, opened


@njit(cache=True)
def _precedes(facts: IntArray, at: int, other_facts: IntArray, other: int, pool: IntArray) -> bool:
    """Whether one suffix is lexicographically before another (by last layer, kind, entry, exit of each stage)."""
    for column in range(LAST, NEXT):
        if facts[at, column] != other_facts[other, column]:
            return bool(facts[at, column] < other_facts[other, column])
    at, other = facts[at, NEXT], other_facts[other, NEXT]
    while at != other:
        for column in range(LAST, NEXT):
            if pool[at, column] != pool[other, column]:
                return bool(pool[at, column] < pool[other, column])
        at, other = pool[at, NEXT], pool[other, NEXT]
    return False


@njit(cache=True)
def _beats(values: FloatArray, facts: IntArray, at: int, other: int, pool: IntArray) -> bool:
    """Whether any prefix does better with label ``at`` than with ``other`` in (total, idle, stages, order)."""
    for column in range(4):
        if values[at, column] > values[other, column]:
            return False
    if facts[at, DEPTH] > facts[other, DEPTH]:
        return False
    if values[at, SUM] < values[other, SUM]:
        return True
    if facts[at, IDLE] != facts[other, IDLE]:
        return bool(facts[at, IDLE] < facts[other, IDLE])
    if facts[at, STAGES] != facts[other, STAGES]:
        return bool(facts[at, STAGES] < facts[other, STAGES])
    return bool(_precedes(facts, at, facts, other, pool))


@njit(cache=True)
def _is_beaten(
    values: FloatArray, facts: IntArray, start: int, end: int, at: int, keep: int, shapes: IntArray, pool: IntArray
) -> bool:
    """Whether a label of the same shape, or ``keep`` labels of different shapes, beat label ``at``."""
    found = 0
    for other in range(start, end):
        if other == at or not _beats(values, facts, other, at, pool):
            continue
        shape = facts[other, SHAPE]
        if keep == 1 or shape == facts[at, SHAPE]:
            return True
        known = False
        for seen in range(found):
            known = known or shapes[seen] == shape
        if not known:
            shapes[found] = shape
            found += 1
            if found == keep:
                return True
    return False


@njit(cache=True)
def _settle(
    values: FloatArray,
    facts: IntArray,
    bounds: FloatArray,
    start: int,
    end: int,
    keep: int,
    width: int,
    shapes: IntArray,
    pool: IntArray,
) -> int:
    """Let the label written at ``end`` join the front start..end-1, and return the front's new end."""
    if _is_beaten(values, facts, start, end, end, keep, shapes, pool):
        return end
    size = end + 1
    at = start
    while at < size - 1:
        if _beats(values, facts, size - 1, at, pool) and _is_beaten(values, facts, start, size, at, keep, shapes, pool):
            _move(values, facts, bounds, size - 2, at)
            _move(values, facts, bounds, size - 1, size - 2)
            size -= 1
        else:
            at += 1
    if size - start > width:
        worst = start
        for other in range(start + 1, size):
            if bounds[other] > bounds[worst]:
                worst = other
        _move(values, facts, bounds, size - 1, worst)
        size -= 1
    return size


@njit(cache=True)
def _move(values: FloatArray, facts: IntArray, bounds: FloatArray, source: int, target: int) -> None:
    values[target] = values[source]
    facts[target] = facts[source]
    bounds[target] = bounds[source]


@njit(cache=True)
def _grown(values: FloatArray, facts: IntArray, bounds: FloatArray) -> tuple[FloatArray, IntArray, FloatArray]:
    rows = values.shape[0]
    more_values = np.empty((2 * rows, values.shape[1]))
    more_facts = np.empty((2 * rows, facts.shape[1]), np.int64)
    more_bounds = np.empty(2 * rows)
    more_values[:rows] = values
    more_facts[:rows] = facts
    more_bounds[:rows] = bounds
    return more_values, more_facts, more_bounds


@njit(cache=True)
def _lift(values: FloatArray, bounds: FloatArray, at: int, prefix: FloatArray, weight: float) -> float:
    """Raise a label to what every prefix costs at least; returns the least total that it can reach."""
    values[at, LARGEST] = max(values[at, LARGEST], prefix[1]) if weight > 0 else 0.0
    values[at, ONCE] = max(values[at, ONCE], prefix[2])
    bounds[at] = values[at, SUM] + prefix[0] + weight * values[at, LARGEST] + values[at, ONCE]
    return float(bounds[at])


@njit(cache=True)
def search_labels(
    fill: FloatArray,
    seconds: FloatArray,
    once: FloatArray,
    max_depth: IntArray,
    hops: FloatArray,
    devices: IntArray,
    fits_at: BoolArray,
    per_host: int,
    joint: bool,
    all_devices: bool,
    weight: float,
    max_stages: int,
    closed: FloatArray,
    opened: FloatArray,
    slack: IntArray,
    upper: float,
    keep: int,
    width: int,
) -> tuple[IntArray, FloatArray, IntArray]:
    """Backward DP over (first layer, first device, kind, entry layout).

    Args (beyond those of ``prefix_bounds``):
        all_devices: whether a plan must reach the last device.
        weight: how often the largest step counts beyond the sum (micro-batches - 1).
        closed, opened: bounds from ``prefix_bounds``.
        slack: (L+1,) the number of stages is of no concern to memory while depth + layers before <= slack.
        upper: labels that cannot end at or below it are dropped.
        keep: how many labels of different shape (cuts and kinds) must beat a label before it is dropped.
        width: most labels that a state may hold; fewer than all makes the search a heuristic.

    Returns:
        Facts and totals of whole plans; and the pool of facts that ``NEXT`` points into (-1 ends a plan).
    """
    layers, kinds, layouts = fill.shape[0], hops.shape[2], fill.shape[3]
    ways = fill.shape[2] // kinds
    total = fits_at.shape[1]
    shapes = np.empty(max(keep, 1), np.int64)
    # Labels after a hop live on (the pool); labels of stages that start at the layer in hand are scratch.
    values, facts, bounds = np.empty((1024, 4)), np.empty((1024, 9), np.int64), np.empty(1024)
    tail = 0
    begin = np.zeros((layers + 1, total + 1, kinds, layouts), np.int64)
    stop = np.zeros((layers + 1, total + 1, kinds, layouts), np.int64)
    new_values, new_facts, new_bounds = np.empty((1024, 4)), np.empty((1024, 9), np.int64), np.empty(1024)
    new_tail = 0
    new_begin = np.zeros((kinds, layouts), np.int64)
    new_stop = np.zeros((kinds, layouts), np.int64)
    for i in range(layers - 1, -1, -1):
        for d in range(total):
            new_tail = 0
            for k in range(kinds):
                for a in range(layouts):
                    start = new_tail
                    new_begin[k, a], new_stop[k, a] = start, start
                    prefix = opened[i, d, k, a]
                    if not fits_at[k, d] or prefix[0] == np.inf:
                        continue
                    ends_at = d + devices[k]
                    for cell in range((i + 1) * ways, (layers + 1) * ways):
                        j, kind = cell // ways, k + cell % ways * kinds
                        if j == layers and all_devices and ends_at != total:
                            continue
                        for b in range(layouts):
                            time, step = fill[i, j, kind, a, b], seconds[i, j, kind, a, b]
                            if prefix[0] + time > upper or time == np.inf:
                                continue
                            first, last = begin[j, ends_at, k, b], stop[j, ends_at, k, b]
                            for label in range(first, last if j < layers else first + 1):
                                deep = facts[label, STAGES] + 1 if j < layers else 1
                                if deep > max_depth[i, j, kind, a, b]:
                                    continue
                                if deep + (i > 0) > max_stages:
                                    continue
                                if new_tail == new_values.shape[0]:
                                    new_values, new_facts, new_bounds = _grown(new_values, new_facts, new_bounds)
                                value, fact = new_values[new_tail], new_facts[new_tail]
                                if j < layers:
                                    value[SUM] = time + values[label, SUM]
                                    value[LARGEST] = max(values[label, LARGEST], step + values[label, HOP])
                                    value[ONCE] = max(values[label, ONCE], once[i, j, kind, a, b])
                                    fact[IDLE], fact[NEXT] = facts[label, IDLE], label
                                    shape = facts[label, SHAPE]
                                else:
                                    value[SUM], value[LARGEST], value[ONCE] = time, step, once[i, j, kind, a, b]
                                    fact[IDLE], fact[NEXT] = total - ends_at, -1
                                    shape = 0
                                value[HOP] = 0.0
                                if _lift(new_values, new_bounds, new_tail, prefix, weight) > upper:
                                    continue
                                fact[STAGES] = deep
                                fact[DEPTH] = 0 if deep + i <= slack[i] else deep
                                fact[SHAPE] = (shape + j * kinds * ways + kind + 1) * _SHAPE_STEP
                                fact[LAST], fact[KIND], fact[ENTRY], fact[EXIT] = j, kind, a, b
                                new_tail = _settle(
                                    new_values, new_facts, new_bounds, start, new_tail, keep, width, shapes, facts
                                )
                    new_stop[k, a] = new_tail
            if i == 0:
                break  # the first stage starts at the first device
            crosses = 1 if d % per_host == 0 else 0
            for k in range(kinds):
                for b in range(layouts):
                    start = tail
                    begin[i, d, k, b], stop[i, d, k, b] = start, start
                    prefix = closed[i, d, k, b]
                    if prefix[0] == np.inf or new_tail == 0:
                        continue
                    for right in range(kinds):
                        for a in range(layouts):
                            hop = hops[i, crosses, k, b, right, a]
                            if prefix[0] + hop > upper or hop == np.inf:
                                continue
                            for label in range(new_begin[right, a], new_stop[right, a]):
                                if tail == values.shape[0]:
                                    values, facts, bounds = _grown(values, facts, bounds)
                                value = values[tail]
                                value[:] = new_values[label]
                                value[SUM] += hop
                                if joint and weight > 0:
                                    value[HOP] = hop
                                else:
                                    value[LARGEST] = max(value[LARGEST], hop)
                                if _lift(values, bounds, tail, prefix, weight) > upper:
                                    continue
                                facts[tail] = new_facts[label]
                                tail = _settle(values, facts, bounds, start, tail, keep, width, shapes, facts)
                    stop[i, d, k, b] = tail
    return new_facts[:new_tail], new_bounds[:new_tail], facts[:tail]


@njit(cache=True)
def least_peak_bytes(peaks: FloatArray, devices: IntArray, fits_at: BoolArray, all_devices: bool) -> float:
    """Least possible peak of the fullest device over all plans, whatever their time and layouts.

    Args:
        peaks: (S, L, L+1, K) least peak of a stage with 1..S stages from it to the end; +inf = impossible.
    """
    depth, layers, kinds = peaks.shape[0], peaks.shape[1], peaks.shape[3]
    total = fits_at.shape[1]
    rest = np.full((layers + 1, total + 1), np.inf)
    if all_devices:
        rest[layers, total] = 0.0
    else:
        rest[layers] = 0.0
    best = np.inf
    for s in range(depth):
        here = np.full((layers + 1, total + 1), np.inf)
        for i in range(layers):
            for k in range(kinds):
                for j in range(i + 1, layers + 1):
                    peak = peaks[s, i, j, k]
                    if peak == np.inf:
                        continue
                    for d in range(total):
                        if fits_at[k, d]:
                            here[i, d] = min(here[i, d], max(peak, rest[j, d + devices[k]]))
        best = min(best, here[0, 0])
        rest = here
    return float(best)
