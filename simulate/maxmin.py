"""Max-min fair rates of flows over shared links.

A flow has one rate; each link carries the flow's weight there times that rate. Rates are raised together until a link
is full or a flow reaches its own cap; those concerned stay, the others go on rising (progressive filling: Bertsekas
and Gallager, Data Networks, 2nd ed., section 6.5.2). A cap is a link of the flow's own.

Flows and the links they load are CSR arrays: those of flow f are ``first[f]:first[f + 1]`` of ``link`` and ``weight``.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LEVEL = 1e-12  # levels that differ by less, relatively, are one level
RISES, STAYS = -1.0, -2.0  # no rates: marks of a flow that has none yet


@njit(cache=True)
def fill(
    flows: Ints,
    links: Ints,
    first: Ints,
    link: Ints,
    weight: Floats,
    cap: Floats,
    capacity: Floats,
    left: Floats,
    load: Floats,
    rising: Ints,
    rate: Floats,
) -> int:
    """Write the rates of ``flows``, which use ``links`` and no others, into ``rate``; returns the number of levels.

    ``left``, ``load`` and ``rising`` are scratch space, one entry a link: capacity not given out, weights of the flows
    still rising, and their number.
    """
    for k in links:
        left[k], load[k], rising[k] = capacity[k], 0.0, 0
    for f in flows:
        rate[f] = RISES
        for e in range(first[f], first[f + 1]):
            load[link[e]] += weight[e]
            rising[link[e]] += 1
    unsettled = len(flows)
    level, levels = 0.0, 0
    while unsettled > 0:
        levels += 1
        reached = np.inf
        for k in links:
            if rising[k] > 0:
                reached = min(reached, left[k] / load[k])
        for f in flows:
            if rate[f] == RISES:
                reached = min(reached, cap[f])
        level = max(level, reached)  # rounding may not lower it again
        edge = level * (1 + LEVEL)
        staying = 0
        for f in flows:
            if rate[f] == RISES:
                stays = cap[f] <= edge
                for e in range(first[f], first[f + 1]):
                    stays = stays or left[link[e]] <= edge * load[link[e]]
                if stays:
                    rate[f] = STAYS
                    staying += 1
        if staying == 0:  # rounding has eaten up what the rest could rise by
            for f in flows:
                if rate[f] == RISES:
                    rate[f] = STAYS
        for f in flows:
            if rate[f] == STAYS:
                rate[f] = min(level, cap[f])
                unsettled -= 1
                for e in range(first[f], first[f + 1]):
                    k = link[e]
                    left[k] = max(0.0, left[k] - weight[e] * rate[f])
                    load[k] -= weight[e]
                    rising[k] -= 1
    return levels


@njit(cache=True)
def reach(
    seed: int,
    head: Ints,
    after: Ints,
    owner: Ints,
    first: Ints,
    link: Ints,
    flow_stamp: Ints,
    link_stamp: Ints,
    stamp: int,
    flows: Ints,
    links: Ints,
) -> tuple[int, int]:
    """All active flows and links that share links, through others, with link ``seed``; returns how many of each.

    ``head[k]`` is the first entry of link k among active flows, ``after`` the next one and ``owner`` an entry's flow.
    What has this ``stamp`` was found before; ``flows`` and ``links`` receive the answer.
    """
    found_flows, found_links = 0, 1
    links[0] = seed
    link_stamp[seed] = stamp
    done = 0
    while done < found_links:
        entry = head[links[done]]
        done += 1
        while entry >= 0:
            f = owner[entry]
            if flow_stamp[f] != stamp:
                flow_stamp[f] = stamp
                flows[found_flows] = f
                found_flows += 1
                for e in range(first[f], first[f + 1]):
                    if link_stamp[link[e]] != stamp:
                        link_stamp[link[e]] = stamp
                        links[found_links] = link[e]
                        found_links += 1
            entry = after[entry]
    return found_flows, found_links
