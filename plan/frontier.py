"""Time–memory frontiers: the sums of one option per layer that no other sum beats in every criterion.

A layer may run in several ways (rematerialised or not, its states sharded or not, tensor-parallel or not); each way
is a row of costs. Over a stage the rows add up, and only the sums that are not dominated can be part of an optimum,
whatever the memory limit and whatever the weights of the criteria: the frontier is exact, unlike a Lagrange price.
Source: the dynamic program of dominance for knapsacks (Nemhauser and Ullmann, Management Science 15, 1969).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshwright.errors import PlanError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def undominated(costs: FloatArray) -> IntArray:
    """(rows, criteria) → the rows that no other row matches or betters in every criterion.

    They come in rising order of the first criterion, then the second and so on.
    Of equal rows the first stays. Two criteria cost a sort; more cost a comparison of every pair.
    """
    order = np.lexsort(costs.T[::-1])
    rising = costs[order]
    if costs.shape[1] <= 2:
        least = np.minimum.accumulate(rising[:, -1])
        keep = np.ones(len(order), dtype=bool)
        keep[1:] = rising[1:, -1] < least[:-1]
        if costs.shape[1] == 1:
            keep[1:] = False
        return np.asarray(order[keep], dtype=np.int64)
    matched = np.ones((len(order), len(order)), dtype=bool)  # [a, b]: b is no worse than a in any criterion
    for column in rising.T:
        matched &= column[:, None] >= column[None, :]
    beaten = np.tril(matched, -1).any(axis=1)  # only a row before it can beat a row
    return np.asarray(order[~beaten], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Frontier:
    """The undominated sums of one option per layer: ``costs[r]`` is reached by the options ``picks[r]``."""

    costs: FloatArray  # (rows, criteria)
    picks: IntArray  # (rows, layers)

    @staticmethod
    def empty(criteria: int) -> "Frontier":
        """No layer yet: the one sum is zero."""
        return Frontier(np.zeros((1, criteria)), np.zeros((1, 0), dtype=np.int64))

    def add(self, options: FloatArray) -> "Frontier":
        """The frontier with one more layer, which runs in one of ``options``."""
        costs = (self.costs[:, None, :] + options[None, :, :]).reshape(-1, options.shape[1])
        kept = undominated(costs)
        before, option = np.divmod(kept, len(options))
        return Frontier(costs[kept], np.column_stack((self.picks[before], option)))


def chain_frontier(
    seconds: FloatArray,
    nbytes: FloatArray,
    hop_seconds: FloatArray,
    limit_bytes: float,
) -> Frontier:
    """Frontier of (seconds, bytes) of a chain of layers where a change of option between neighbours costs time.

    Args:
        seconds, nbytes: (layers, options) of each layer under each option; one of +inf seconds is not available.
        hop_seconds: (options, options) from the option of a layer (row) to that of the next (column).
        limit_bytes: sums beyond it are left out.

    Raises:
        PlanError: no choice fits; the message says how much the least one needs.
    """
    layers, options = seconds.shape
    groups = _alike(hop_seconds)
    states: dict[int, Frontier] = {}
    for layer in range(layers):
        arriving = {group: _arrivals(states, group, hop_seconds, options if layer else 0) for group in set(groups)}
        states = {}
        for group, (costs, picks) in arriving.items():
            mine = np.flatnonzero((groups == group) & np.isfinite(seconds[layer]))
            step = np.stack((seconds[layer, mine], nbytes[layer, mine]), axis=1)
            total = (costs[:, None, :] + step[None, :, :]).reshape(-1, 2)
            inside = np.flatnonzero(total[:, 1] <= limit_bytes)
            if len(inside) == 0:
                continue
            kept = inside[undominated(total[inside])]
            before, option = np.divmod(kept, len(mine))
            states[group] = Frontier(total[kept], np.column_stack((picks[before], mine[option])))
        if not states:
            least = float(np.where(np.isfinite(seconds), nbytes, np.inf).min(axis=1).sum())
            raise PlanError(
                f"no choice of options for {layers} layers fits in {limit_bytes / 1e9:.2f} GB: the leanest needs "
                f"{least / 1e9:.2f} GB. Allow options that shard or rematerialise more, or use more devices."
            )
    costs = np.concatenate([state.costs for state in states.values()])
    picks = np.concatenate([state.picks for state in states.values()])
    kept = undominated(costs)
    return Frontier(costs[kept], picks[kept])


def _alike(hop_seconds: FloatArray) -> IntArray:
    """Number of the first option that every other option sees in the same way: such options share their labels."""
    numbers: dict[bytes, int] = {}
    both = np.concatenate((hop_seconds, hop_seconds.T), axis=1)
    return np.array([numbers.setdefault(row.tobytes(), n) for n, row in enumerate(both)], dtype=np.int64)


def _arrivals(
    states: dict[int, Frontier], group: int, hop_seconds: FloatArray, options: int
) -> tuple[FloatArray, IntArray]:
    """Undominated costs and picks with which a layer can be entered in an option of ``group``."""
    if options == 0:
        start = Frontier.empty(2)
        return start.costs, start.picks
    costs = np.concatenate(
        [state.costs + np.array((hop_seconds[source, group], 0.0)) for source, state in states.items()]
    )
    picks = np.concatenate([state.picks for state in states.values()])
    kept = undominated(costs)
    return costs[kept], picks[kept]
