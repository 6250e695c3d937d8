"""Lower bounds of the step time: what the outer loop need not look at."""

import numpy as np

from meshwright.plan.inter import StageTable


def least_seconds(table: StageTable, microbatches: int) -> float:
    """No plan of this table takes less, whatever its stages, schedule and transfers.

    A stage on n devices keeps each of them busy for B t + u seconds, so a step of T seconds on D devices has
    D T >= sum of n (B t + u) over its stages; the right side is least over all chains of stages, layouts left free
    where they meet. Where the table was priced without a price on memory, t + u / B is the least for any price.
    """
    busy = microbatches * table.seconds + table.once_seconds
    work = np.where(np.isfinite(table.seconds), busy, np.inf).min(axis=(3, 4)) * table.devices
    least = work.min(axis=2)  # (first, last)
    best = np.full(table.layers + 1, np.inf)
    best[0] = 0.0
    for last in range(1, table.layers + 1):
        best[last] = (best[:last] + least[:last, last]).min()
    return float(best[-1] / table.total_devices)
