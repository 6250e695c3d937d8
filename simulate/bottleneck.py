"""Flows that one link alone holds back: they share it equally, and need no progressive filling.

Links that flows join, directly or through others, are one group. If all flows of a group cross one link with the same
weight, and neither their caps nor any other link could hold back even the one that has that link for itself, then
whichever of them are active, max-min gives each the same rate: no other link ever carries more than the heaviest flow
would put there alone. So the link is a resource shared equally, simulated in virtual time at log n for each start or
end (Parekh and Gallager, IEEE/ACM Trans. Networking 1 (1993) 344-357), where filling costs n.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@njit(cache=True)
def bottlenecks(
    flow_bytes: Floats, first: Ints, link: Ints, weight: Floats, cap: Floats, capacity: Floats
) -> tuple[Ints, Floats]:
    """For each task the one link that ever holds its flow back (-1: none, or several), and its seconds there alone."""
    count, links = len(flow_bytes), len(capacity)
    parent = np.arange(links)
    heaviest, crossing = np.zeros(links), np.zeros(links, np.int64)
    for f in range(count):
        if flow_bytes[f] > 0:
            for e in range(first[f], first[f + 1]):
                heaviest[link[e]] = max(heaviest[link[e]], weight[e])
                crossing[link[e]] += 1
                one, other = _root(parent, link[first[f]]), _root(parent, link[e])
                parent[max(one, other)] = min(one, other)

    # The tightest link of each group; where several are as tight, the one that most flows cross.
    tightest = np.full(links, -1, np.int64)
    for k in range(links):
        if crossing[k] > 0:
            group = _root(parent, k)
            best = tightest[group]
            if best < 0:
                tightest[group] = k
            else:
                alone, least = capacity[k] / heaviest[k], capacity[best] / heaviest[best]
                if alone < least or (alone == least and crossing[k] > crossing[best]):
                    tightest[group] = k

    alike = np.ones(links, np.bool_)  # by group
    seen = np.full(links, -1, np.int64)
    for f in range(count):
        if flow_bytes[f] > 0:
            group = _root(parent, link[first[f]])
            best = tightest[group]
            fits = cap[f] >= capacity[best] / heaviest[best]
            for e in range(first[f], first[f + 1]):
                fits = fits and seen[link[e]] != f  # a link named twice carries both weights
                seen[link[e]] = f
                fits = fits and (link[e] != best or weight[e] == heaviest[best])
            alike[group] = alike[group] and fits and seen[best] == f

    only, seconds = np.full(count, -1, np.int64), np.zeros(count)
    for f in range(count):
        if flow_bytes[f] > 0:
            group = _root(parent, link[first[f]])
            if alike[group]:
                only[f] = tightest[group]
                seconds[f] = flow_bytes[f] * heaviest[only[f]] / capacity[only[f]]
    return only, seconds


@njit(cache=True)
def _root(parent: Ints, k: int) -> int:
    while parent[k] != k:
        parent[k] = parent[parent[k]]
        k = parent[k]
    return k
