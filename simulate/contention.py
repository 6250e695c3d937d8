"""Whether transfers ever ask more of a link than it has: only then does a plan need the engine's flows.

While every link can carry what all its transfers move at their own full rates, max-min fair rates are those full
rates, and the times found without any contention are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from meshwright.errors import ScheduleError
from meshwright.simulate.code import KIND, SEND
from meshwright.simulate.compiled import KIND_COUNT, Compiled
from meshwright.simulate.costs import TransferCost

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ROUNDING = 1e-9  # what a sum of loads may exceed a capacity by, relatively, and still be equal to it


@dataclass(frozen=True, slots=True, eq=False)
class Loads:
    """What the transfers of a program ask of links, as CSR by transfer.

    ``links`` are the numbers of the links, ``weight`` the bytes there for each byte of the transfer, and ``load`` bytes
    per second there at the rate that the transfer has alone.
    """

    first: Ints
    links: Ints
    weight: Floats
    load: Floats
    capacity: Floats


def transfer_loads(
    compiled: Compiled, transfers: Sequence[TransferCost], link_bytes_per_second: Sequence[float]
) -> Loads | None:
    """The loads of a program's transfers; None if they can never fill a link together.

    Raises:
        ScheduleError: a transfer names a link that there is not, or is faster alone than one of its links.
    """
    capacity = np.array(link_bytes_per_second, np.float64)
    if not (np.isfinite(capacity).all() and (capacity > 0).all()):
        raise ScheduleError(f"a link has {capacity.min():g} bytes/s; a finite number above 0 is needed")
    lists: list[list[tuple[int, float, float]]] = []
    at_most: dict[int, dict[tuple[int, int], float]] = {}  # link → channel → the most it loads it
    for key, cost in zip(compiled.transfers, transfers, strict=True):
        named = f"the {key.what} from stage {key.source} to stage {key.target}"
        if len(cost.weights) not in (0, len(cost.links)):
            raise ScheduleError(
                f"{named} has {len(cost.links)} links and {len(cost.weights)} weights; as many are needed"
            )
        loads = []
        for link, weight in zip(cost.links, cost.weights or (1.0,) * len(cost.links), strict=True):
            if not 0 <= link < len(capacity):
                raise ScheduleError(f"{named} goes over link {link}; there are {len(capacity)}, numbered from 0")
            load = cost.bytes * weight / cost.wire_seconds if cost.wire_seconds else 0.0
            if load > capacity[link] * (1 + 1e-6):
                raise ScheduleError(
                    f"{named} takes {cost.wire_seconds:g} s alone, which is {load:g} bytes/s on link {link} of "
                    f"{capacity[link]:g}; give it at least {cost.wire_seconds * load / capacity[link]:g} s"
                )
            channel = at_most.setdefault(link, {})
            channel[key.source, key.target] = max(load, channel.get((key.source, key.target), 0.0))
            loads.append((link, weight, load))
        lists.append(loads)
    if all(sum(channels.values()) <= capacity[link] * (1 + ROUNDING) for link, channels in at_most.items()):
        return None
    links, weights, flat = zip(*(entry for loads in lists for entry in loads), strict=True)
    return Loads(
        first=np.cumsum([0, *map(len, lists)], dtype=np.int64),
        links=np.array(links, np.int64),
        weight=np.array(weights, np.float64),
        load=np.array(flat, np.float64),
        capacity=capacity,
    )


def overfull(compiled: Compiled, loads: Loads, start: Floats, end: Floats) -> bool:
    """Whether, with these times of the tasks, some link is asked for more than it has."""
    kind = compiled.code.table[:, KIND]
    sends = np.flatnonzero((kind == SEND) & (end > start))
    transfer = compiled.slot[sends] - compiled.stages * KIND_COUNT
    count = loads.first[transfer + 1] - loads.first[transfer]
    of_send = np.repeat(sends, count)
    entry = np.repeat(loads.first[transfer] - np.cumsum(count) + count, count) + np.arange(count.sum())
    link = np.concatenate([loads.links[entry]] * 2)
    when = np.concatenate([start[of_send], end[of_send]])
    change = np.concatenate([loads.load[entry], -loads.load[entry]])
    order = np.lexsort((change, when, link))  # at one instant, what ends makes room first
    return bool(_exceeds(link[order], change[order], loads.capacity))


@njit(cache=True)
def _exceeds(link: Ints, change: Floats, capacity: Floats) -> bool:
    total, before = 0.0, -1
    for i in range(len(link)):
        if link[i] != before:
            total, before = 0.0, link[i]
        total += change[i]
        if total > capacity[link[i]] * (1 + ROUNDING):
            return True
    return False
