"""Predictions beside measurements → errors, ranks and regret."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata


def mape_percent(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Mean absolute error, relative to what was measured; None of nothing."""
    return float(np.mean(np.abs(_relative(predicted, measured)))) * 100 if len(measured) else None


def bias_percent(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Mean signed error, above zero where the prediction is too slow; None of nothing."""
    return float(np.mean(_relative(predicted, measured))) * 100 if len(measured) else None


def spearman(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Correlation of ranks; None where there are fewer than two, or all of one side are equal."""
    if len(measured) < 2:
        return None
    ranks = rankdata(predicted), rankdata(measured)
    if any(np.ptp(side) == 0 for side in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def regret_percent(
    groups: Sequence[Hashable], predicted: Sequence[float], measured: Sequence[float]
) -> tuple[float | None, int]:
    """How much slower the plan predicted best is than the one measured best, in the mean of all groups with a choice.

    Of plans predicted equal, the first counts. Also the number of such groups; None without any.
    """
    plans: defaultdict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for group, guess, truth in zip(groups, predicted, measured, strict=True):
        plans[group].append((guess, truth))
    regrets = [
        min(choice, key=lambda plan: plan[0])[1] / min(truth for _, truth in choice) - 1
        for choice in plans.values()
        if len(choice) > 1
    ]
    return (float(np.mean(regrets)) * 100 if regrets else None), len(regrets)


def _relative(predicted: Sequence[float], measured: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray(predicted, np.float64) / np.asarray(measured, np.float64) - 1.0
