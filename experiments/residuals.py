"""Honest residuals of measured steps: each row is predicted by constants that nothing like it has been fitted to.

Rows that constants were fitted to lie nearer than others will. So the constants are solved again without each group of
rows (one Gauss-Newton step from the fit, its priors and weights kept), and the group is simulated with those. For
systems that nobody measured, all rows of a source are simulated with what its neighbours' constants let one expect.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from experiments.validation.cases import Case
from experiments.validation.evaluate import Source
from experiments.validation.fitting import OUTLIER, SCATTER, STEP, USUAL, seconds
from experiments.validation.halves import FIT
from meshwright.simulate.workload.stack import FACTORS, shipped_stacks

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Residual:
    """A row: logarithm of measured over predicted seconds, where it is from and what it is alike to."""

    source: str
    system: str
    stack: str
    group: Hashable
    log_ratio: float


def residual(source: str, case: Case, constants: Mapping[str, float]) -> Residual:
    """A case as it is predicted with constants."""
    ratio = log(case.measured_seconds / seconds(case, constants))
    return Residual(source, case.system, case.stack.name, case.group, ratio)


def shipped_constants(stack: str, system: str) -> tuple[dict[str, float], tuple[str, ...]] | None:
    """The constants of a stack on a system as they are shipped, and which of them move a step and were fitted."""
    known = shipped_stacks()[stack].systems.get(system)
    if known is None:
        return None
    fitted = tuple(name for name in USUAL if getattr(known, name) is not None and getattr(known, name).low is not None)
    return known.values(), fitted


def expected_constants(stack: str, without_source: str) -> dict[str, float]:
    """What is taken on a system that nobody measured, as if one source were not known (see ``find_stack``)."""
    shipped = shipped_stacks()[stack]
    others = [known.values() for system, known in shipped.systems.items() if _source(system) != without_source]
    host = shipped.operation_seconds
    found = {"operation_seconds": 0.0 if host is None else host.value, "overhead_bytes": 0.0}
    for name in FACTORS:
        values = [constants[name] for constants in others if name in constants]
        found[name] = exp(fmean(map(log, values))) if values else 1.0
    return found


def _source(system: str) -> str:
    return system.partition(":")[0]


def without_sources(sources: Sequence[Source]) -> list[Residual]:
    """All rows, each predicted as if its source were not known."""
    found = []
    for source in sources:
        constants = {
            stack: expected_constants(stack, source.name)
            for stack in {result.case.stack.name for result in source.results}
        }
        found += [residual(source.name, result.case, constants[result.case.stack.name]) for result in source.results]
    return found


def of_fit_halves(sources: Sequence[Source]) -> list[Residual]:
    """Rows of the fit halves, each group predicted by constants that were solved without it.

    Constants are those of ``sources`` where they were fitted, else the shipped ones; systems without are left out.
    """
    found = []
    for source in sources:
        cases: defaultdict[tuple[str, str], list[Case]] = defaultdict(list)
        for result in source.results:
            if result.half == FIT:
                cases[result.case.system, result.case.stack.name].append(result.case)
        for (system, stack), rows in cases.items():
            fit = source.fits.get((system, stack))
            if fit is not None:
                found += without_groups(
                    source.name, rows, fit.constants, [name for name in USUAL if name in fit.ranges]
                )
            elif (known := shipped_constants(stack, system)) is not None:
                found += without_groups(source.name, rows, *known)
    return found


def without_groups(
    source: str, cases: Sequence[Case], constants: Mapping[str, float], fitted: Sequence[str]
) -> list[Residual]:
    """Cases of one system and stack, each group predicted by constants that were solved without it."""
    measured = np.log([case.measured_seconds for case in cases])
    predicted = _log_seconds(cases, constants)
    slopes = np.stack(
        [(_log_seconds(cases, {**constants, name: constants[name] * exp(STEP)}) - predicted) / STEP for name in fitted],
        axis=1,
    )
    from_usual = np.log([constants[name] / USUAL[name].value for name in fitted])
    spreads = np.array([USUAL[name].spread for name in fitted])
    members: dict[Hashable, list[int]] = {}
    for index, case in enumerate(cases):
        members.setdefault(case.group, []).append(index)
    found = []
    for rows in members.values():
        moved = constants_without(rows, measured - predicted, slopes, from_usual, spreads)
        changed = {name: constants[name] * exp(step) for name, step in zip(fitted, moved.tolist(), strict=True)}
        found += [residual(source, cases[index], {**constants, **changed}) for index in rows]
    return found


def _log_seconds(cases: Sequence[Case], constants: Mapping[str, float]) -> Floats:
    return np.log([seconds(case, constants) for case in cases])


def constants_without(rows: Sequence[int], away: Floats, slopes: Floats, from_usual: Floats, spreads: Floats) -> Floats:
    """How far the logarithms of the constants move when some rows are taken from their fit.

    Args:
        rows: those taken away.
        away: logarithm of measured over predicted seconds of each row, with all rows fitted.
        slopes: of the logarithm of each row's prediction, to the logarithm of each constant.
        from_usual: the logarithms of the constants less those of their priors.
        spreads: of the priors.
    """
    weights = 1.0 / (SCATTER**2 * np.sqrt(1.0 + (away / (OUTLIER * SCATTER)) ** 2))
    kept = np.ones(len(away))
    kept[list(rows)] = 0.0

    def solved(used: Floats) -> Floats:
        pull = slopes.T @ (used * away) - from_usual / spreads**2
        stiffness = slopes.T @ (used[:, None] * slopes) + np.diag(spreads**-2.0)
        return np.asarray(np.linalg.solve(stiffness, pull), np.float64)

    return solved(weights * kept) - solved(weights)
