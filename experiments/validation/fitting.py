"""Measured steps of one system and software stack → its constants, at most three.

A constant moves from what is usual elsewhere (``USUAL``) only as far as the rows ask for it: maximum a posteriori with
normal priors on logarithms and a robust loss, so that three rows do not decide three numbers.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from experiments.validation.cases import Case
from experiments.validation.score import bias_percent, mape_percent
from meshwright.simulate.workload.predict import predict_grid
from meshwright.simulate.workload.stack import FACTORS, shipped_stacks, with_constants

SCATTER = 0.05  # of a measured step around a good model, as a logarithm: what a row weighs against a prior
OUTLIER = 2.0  # rows further off than so many times the scatter count linearly
MOST_ROWS = 90  # of one system that are simulated for a fit; more of them say nothing new
ROUNDS = 5
MESSAGES = ("communication_factor", "network_factor", "mixed_factor")
EXPOSED = 5.0  # times as slow as usual
STEP = 0.04
QUANTILE = 1.2816  # of a normal distribution: 80 % lie between it and its negative


class Prior(NamedTuple):
    """What is usual: the value, and the spread of its logarithm."""

    value: float
    spread: float


USUAL = {
    "kernel_factor": Prior(1.08, 0.15),  # clocks under load: 1.0 to 1.2 over boost on data-centre GPUs
    "communication_factor": Prior(1.2, 0.4),
    "network_factor": Prior(1.2, 0.4),
    "mixed_factor": Prior(1.2, 1.0),  # rings over hosts use all network cards of each, or one of up to eight
    "operation_seconds": Prior(60e-6, 0.25),
}


@dataclass(frozen=True, slots=True)
class Fit:
    """Constants of a stack on a system, and how far the rows are that they were fitted to.

    ``ranges`` hold each constant that was fitted with 80 % (normal, on logarithms, prior and rows together); the others
    are as usual.
    """

    constants: dict[str, float]
    ranges: dict[str, tuple[float, float]]
    rows: int
    mape_percent: float
    bias_percent: float


def constants_of(cases: Sequence[Case]) -> tuple[tuple[str, ...], ...]:
    """Which three constants may be fitted; of several choices, the one that the rows like best is taken.

    Beside kernels: what is held beside tensors, where memory was measured; inside one host, the time that a host which
    dispatches eagerly takes for an operation; else how messages fare, two of the three ways that they go.
    """
    ways = MESSAGES if any(len(case.cluster.hosts) > 1 for case in cases) else MESSAGES[:1]
    if any(case.row.positive("mem_gib") for case in cases):
        return tuple(("kernel_factor", way, "overhead_bytes") for way in ways)
    if len(ways) > 1:
        return tuple(("kernel_factor", *pair) for pair in combinations(ways, 2))
    return (("kernel_factor", *ways, *(("operation_seconds",) if cases[0].stack.operation_seconds else ())),)


def usual_constants(stack: str) -> dict[str, float]:
    """Constants of a stack before any row tells otherwise."""
    factors = {name: usual.value for name, usual in USUAL.items() if name in FACTORS}
    host = shipped_stacks()[stack].operation_seconds
    return factors | {"operation_seconds": 0.0 if host is None else host.value, "overhead_bytes": 0.0}


def seconds(case: Case, constants: Mapping[str, float]) -> float:
    """The step as it is predicted with other constants."""
    stack = with_constants(case.stack, constants)
    return predict_grid(case.model, case.cluster, case.grid, stack).iteration_seconds


def fit_constants(cases: Sequence[Case]) -> Fit:
    """Constants of one system and stack from rows of it."""
    chosen = random.Random(0).sample(list(cases), MOST_ROWS) if len(cases) > MOST_ROWS else list(cases)
    _, constants, ranges = min((_fitted(chosen, names) for names in constants_of(cases)), key=lambda found: found[0])
    if any("overhead_bytes" in names for names in constants_of(cases)):
        constants["overhead_bytes"], ranges["overhead_bytes"] = _overhead_bytes(cases)
    predicted = [seconds(case, constants) for case in chosen]
    truth = [case.measured_seconds for case in chosen]
    mape, bias = mape_percent(predicted, truth), bias_percent(predicted, truth)
    return Fit(constants, ranges, len(cases), mape or 0.0, bias or 0.0)


def _fitted(
    cases: Sequence[Case], names: Sequence[str]
) -> tuple[float, dict[str, float], dict[str, tuple[float, float]]]:
    """The loss that remains, the factors and what was fitted of the names, and ranges of the latter."""
    timed = [name for name in names if name in USUAL]
    fixed = {name: value for name, value in usual_constants(cases[0].stack.name).items() if name not in timed}
    measured = np.log([case.measured_seconds for case in cases])
    usual = np.log([USUAL[name].value for name in timed])
    spreads = np.array([USUAL[name].spread for name in timed])

    def values(logs: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(timed, map(_rounded, np.exp(logs)), strict=True))

    def misfit(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        constants = fixed | dict(zip(timed, np.exp(logs).tolist(), strict=True))
        predicted = np.log([seconds(case, constants) for case in cases])
        away = (predicted - measured) / SCATTER
        robust = np.sign(away) * OUTLIER * np.sqrt(2 * (np.sqrt(1 + (away / OUTLIER) ** 2) - 1))
        return np.concatenate([robust, (logs - usual) / spreads])

    # A message hidden under computation does not move the step: look also from where none is hidden.
    slow = usual + np.where([name in MESSAGES for name in timed], np.log(EXPOSED), 0.0)
    starts = [usual, slow] if "mixed_factor" in timed else [usual]
    tries = [least_squares(misfit, start, x_scale=spreads, diff_step=STEP, max_nfev=ROUNDS) for start in starts]
    found = min(tries, key=lambda fit: fit.cost)
    away = QUANTILE * np.sqrt(np.diag(np.linalg.inv(found.jac.T @ found.jac)))
    low, high = values(found.x - away), values(found.x + away)
    ranges = {name: (low[name], high[name]) for name in timed}
    return float(found.cost), fixed | values(found.x), ranges


def _overhead_bytes(cases: Sequence[Case]) -> tuple[float, tuple[float, float]]:
    """Median of what is held beyond the prediction, never below zero; and what 80 % of the rows lie between."""
    beyond = []
    for case in cases:
        held = case.row.positive("mem_gib")
        if held is not None:
            stack = replace(case.stack, overhead_bytes=0.0)
            beyond.append(held * 2**30 - predict_grid(case.model, case.cluster, case.grid, stack).peak_bytes)
    low, median, high = np.maximum(np.quantile(beyond, (0.1, 0.5, 0.9)), 0.0)
    return _rounded(median), (_rounded(low), _rounded(high))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
