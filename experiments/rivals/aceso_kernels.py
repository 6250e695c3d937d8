"""Compiled inner loops of our search of Aceso's space (``experiments.rivals.aceso``).

Arrays of one stage size: ``costs`` is (quantities, configurations, operators), in the order of the constants below, a
configuration being a (width, replicas) of the stage's devices; ``relayout`` is (from, to, operators) µs to change
between them before an operator. Times in µs, sizes in MB.
"""

import numpy as np
from numba import njit

from meshwright.plan.frontier import BoolArray, FloatArray, IntArray

FORWARD, BOTH, HELD, SPARED, WEIGHTS, RESERVE_FORWARD, RESERVE_BACKWARD, INPUT = range(8)
_DEAREST_US_PER_MB = 1e7  # a price of memory at which all that can be recomputed is
_CHEAPEST_US_PER_MB = 1e-6  # and one at which nothing is
_CLOSE = 1.05  # two prices within this ratio are as good as one


@njit(cache=True)
def measure(
    costs: FloatArray,
    relayout: FloatArray,
    ends: BoolArray,
    factor: float,
    first: int,
    last: int,
    live: int,
    config: IntArray,
    again: IntArray,
) -> tuple[float, float, float]:
    """(µs, MB, MB that add up) of a stage of operators ``first`` to ``last`` with ``live`` micro-batches, as chosen.

    The terms are those of ``aceso_costs.stage_seconds`` and ``stage_mb``, messages between stages aside. What adds up
    leaves out the largest recomputed run and the reserve.
    """
    time = weights = kept = run = largest = reserve_forward = reserve_backward = 0.0
    for n in range(first, last):
        c = config[n]
        time += costs[BOTH, c, n]
        weights += costs[WEIGHTS, c, n]
        kept += costs[HELD, c, n]
        if again[n]:
            time += costs[FORWARD, c, n]
        if n > first:
            time += relayout[config[n - 1], c, n]
        if n < last - 1:
            reserve_forward = max(reserve_forward, costs[RESERVE_FORWARD, c, n])
            reserve_backward = max(reserve_backward, costs[RESERVE_BACKWARD, c, n])
        if again[n] and n < last - 1 and again[n + 1]:
            kept -= costs[SPARED, c, n]
            run += costs[HELD, c, n]
            largest = max(largest, run)
            if ends[n]:
                run = 0.0
        else:
            run = 0.0
    kept += costs[INPUT, config[first], first]
    added = weights * factor + kept * live
    return time, added + largest + max(reserve_forward + reserve_backward, weights), added


@njit(cache=True)
def cheapest(
    costs: FloatArray,
    relayout: FloatArray,
    factor: float,
    first: int,
    last: int,
    live: int,
    price: float,
    allowed: BoolArray,
    config: IntArray,
    again: IntArray,
    parents: IntArray,
) -> None:
    """Fill in the choices of least time plus ``price`` times memory, by a chain over (configuration, recomputed)."""
    usable = np.flatnonzero(allowed)
    states = 2 * costs.shape[1]
    before, after = np.full(states, np.inf), np.full(states, np.inf)
    for n in range(first, last):
        for c in usable:
            own = costs[BOTH, c, n] + price * (factor * costs[WEIGHTS, c, n] + live * costs[HELD, c, n])
            for r in range(2):
                least, parent = (0.0, 0) if n == first else (np.inf, 0)
                if n > first:
                    for p in usable:
                        change = relayout[p, c, n]
                        if before[2 * p] + change < least:
                            least, parent = before[2 * p] + change, 2 * p
                        again_before = before[2 * p + 1] + change
                        if r:
                            again_before -= price * live * costs[SPARED, p, n - 1]
                        if again_before < least:
                            least, parent = again_before, 2 * p + 1
                after[2 * c + r] = least + own + r * costs[FORWARD, c, n]
                parents[n, 2 * c + r] = parent
        before, after = after, before
    state = int(np.argmin(before))
    for n in range(last - 1, first - 1, -1):
        config[n], again[n] = state // 2, state % 2
        state = parents[n, state]


@njit(cache=True)
def priced_stage(
    costs: FloatArray,
    relayout: FloatArray,
    ends: BoolArray,
    factor: float,
    limit: float,
    most: float,
    first: int,
    last: int,
    live: int,
    allowed: BoolArray,
    config: IntArray,
    again: IntArray,
    scratch: IntArray,
    parents: IntArray,
    hint: FloatArray,
) -> float:
    """Fill in good choices of a stage that fit in ``limit``; its µs, +inf where none were found.

    Where the stage is sure to take more than ``most``, minus a lower bound on its µs instead.

    A price of memory is sought, from that of the last stage (``hint``), at which the choices just fit. Between the last
    two prices, the operators before a point follow one and those after it the other: hardly any memory stays unused.
    """
    cheapest(costs, relayout, factor, first, last, live, 0.0, allowed, config, again, parents)
    time, size, _ = measure(costs, relayout, ends, factor, first, last, live, config, again)
    if time > most:
        return -time
    if size <= limit:
        return time
    low_config, low_again, high_config, high_again = scratch[0], scratch[1], scratch[2], scratch[3]
    low_config[first:last], low_again[first:last] = config[first:last], again[first:last]
    low, high, price = 0.0, np.inf, hint[0]
    while high == np.inf or low == 0.0:
        cheapest(costs, relayout, factor, first, last, live, price, allowed, config, again, parents)
        time, size, added = measure(costs, relayout, ends, factor, first, last, live, config, again)
        if time + price * (added - limit) > most:  # Lagrange's bound on all choices that fit
            return -(time + price * (added - limit))
        if size <= limit:
            high, price = price, price / 8
            high_config[first:last], high_again[first:last] = config[first:last], again[first:last]
            if price < _CHEAPEST_US_PER_MB:
                break
        else:
            low, price = price, price * 8
            low_config[first:last], low_again[first:last] = config[first:last], again[first:last]
            if price > _DEAREST_US_PER_MB:
                return np.inf
    while low > 0 and high > low * _CLOSE:
        middle = np.sqrt(low * high)
        cheapest(costs, relayout, factor, first, last, live, middle, allowed, config, again, parents)
        if measure(costs, relayout, ends, factor, first, last, live, config, again)[1] <= limit:
            high = middle
            high_config[first:last], high_again[first:last] = config[first:last], again[first:last]
        else:
            low = middle
            low_config[first:last], low_again[first:last] = config[first:last], again[first:last]
    hint[0] = high
    best = np.inf
    best_cut, best_side = last, 0
    for side in range(2):
        lower, upper = first, last  # operators on the high side: too few, enough
        while upper - lower > 1:
            cut = (lower + upper) // 2
            _mix(scratch, config, again, first, last, cut, side)
            if measure(costs, relayout, ends, factor, first, last, live, config, again)[1] <= limit:
                upper = cut
            else:
                lower = cut
        _mix(scratch, config, again, first, last, upper, side)
        time = measure(costs, relayout, ends, factor, first, last, live, config, again)[0]
        if time < best:
            best, best_cut, best_side = time, upper, side
    _mix(scratch, config, again, first, last, best_cut, best_side)
    return best


@njit(cache=True)
def _mix(
    scratch: IntArray,
    config: IntArray,
    again: IntArray,
    first: int,
    last: int,
    cut: int,
    side: int,
) -> None:
    """Fill in the leaner choices for ``cut - first`` operators at the start (or end), the faster ones elsewhere."""
    count = cut - first
    for n in range(first, last):
        high = n - first < count if side == 0 else last - 1 - n < count
        config[n] = scratch[2 if high else 0, n]
        again[n] = scratch[3 if high else 1, n]


@njit(cache=True)
def chain(
    bottleneck: float,
    gpus: int,
    host: int,
    sizes: IntArray,
    costs: FloatArray,
    relayout: FloatArray,
    groups: BoolArray,
    ends: BoolArray,
    factor: float,
    limit: float,
    least: FloatArray,
    work: FloatArray,
    enter: FloatArray,
    leave: FloatArray,
    twin: IntArray,
    alike: IntArray,
    memo: FloatArray,
    entry: IntArray,
    exit_: IntArray,
) -> tuple[FloatArray, IntArray, IntArray]:
    """The pipeline of least sum of stages under a bottleneck: (sum, cut after each stage, index of each stage's size).

    From the model's end: ``total[k, n, i]`` is the least sum of k stages on n devices that run the operators from i on.
    ``memo`` keeps the µs of stages by (size, stages behind, first, last), or minus a lower bound, 0 where unknown;
    ``entry`` and ``exit_`` keep their first and last configuration. The ``alike[i]`` operators from i on equal those
    from ``twin[i]`` on.
    """
    deepest, operators = memo.shape[1], least.shape[1] - 1
    total = np.full((deepest + 1, gpus + 1, operators + 1), np.inf)
    after = np.zeros((deepest + 1, gpus + 1, operators + 1), dtype=np.int32)
    size = np.zeros((deepest + 1, gpus + 1, operators + 1), dtype=np.int8)
    total[0, 0, operators] = 0.0
    config, again = np.zeros(operators, dtype=np.int64), np.zeros(operators, dtype=np.int64)
    scratch = np.zeros((4, operators), dtype=np.int64)
    parents = np.zeros((operators, 2 * costs.shape[2]), dtype=np.int64)
    hint = np.ones(1)
    for k in range(deepest):
        for n in range(gpus):
            for last in range(1, operators + 1):
                if total[k, n, last] == np.inf:
                    continue
                for s in range(len(sizes)):
                    left = gpus - n - sizes[s]
                    if left < 0:
                        continue
                    enters = 1 if left % host == 0 and left > 0 else 0
                    leaves = 1 if (left + sizes[s]) % host == 0 else 0
                    for first in range(last - 1, -1, -1):
                        if least[s, last] - least[s, first] > bottleneck:
                            break
                        if (left == 0) != (first == 0) or work[first] > bottleneck * left:
                            continue
                        shift = first - twin[first] if last - first <= alike[first] else 0
                        start, stop = first - shift, last - shift
                        if -bottleneck <= memo[s, k, start, stop] <= 0.0:
                            memo[s, k, start, stop] = stage(
                                costs[s], relayout[s], groups[s], ends, factor, limit, bottleneck, start, stop, k + 1,
                                config, again, scratch, parents, hint,
                            )  # fmt: skip
                            entry[s, k, start, stop], exit_[s, k, start, stop] = config[start], config[stop - 1]
                        if memo[s, k, start, stop] < 0.0:
                            continue
                        a, b = entry[s, k, start, stop], exit_[s, k, start, stop]
                        time = memo[s, k, start, stop] + enter[enters, s, a, first] + leave[leaves, s, a, b, last - 1]
                        if time <= bottleneck and total[k, n, last] + time < total[k + 1, n + sizes[s], first]:
                            total[k + 1, n + sizes[s], first] = total[k, n, last] + time
                            after[k + 1, n + sizes[s], first], size[k + 1, n + sizes[s], first] = last, s
    return total, after, size


@njit(cache=True)
def stage(
    costs: FloatArray,
    relayout: FloatArray,
    groups: BoolArray,
    ends: BoolArray,
    factor: float,
    limit: float,
    most: float,
    first: int,
    last: int,
    live: int,
    config: IntArray,
    again: IntArray,
    scratch: IntArray,
    parents: IntArray,
    hint: FloatArray,
) -> float:
    """``priced_stage`` over the groups of configurations that may be mixed; leaves the best choices in place."""
    best = bound = np.inf
    best_config, best_again = config[first:last].copy(), again[first:last].copy()
    for g in range(len(groups)):
        time = priced_stage(
            costs,
            relayout,
            ends,
            factor,
            limit,
            most,
            first,
            last,
            live,
            groups[g],
            config,
            again,
            scratch,
            parents,
            hint,
        )
        if time < 0:
            bound = min(bound, -time)
        elif time < best:
            best = time
            best_config[:], best_again[:] = config[first:last], again[first:last]
    config[first:last], again[first:last] = best_config, best_again
    return best if best <= bound else -bound
