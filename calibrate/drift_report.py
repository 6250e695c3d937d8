"""What a drift says, for eyes and for programs."""

from dataclasses import dataclass
from math import exp, hypot
from typing import Any

from meshwright.calibrate.drift import FEW_STEPS, Drift, Observation
from meshwright.calibrate.drift_fit import Fit, Parts, file_error, quantity_of
from meshwright.calibrate.hardware import Cluster
from meshwright.execute.record import Run
from meshwright.plan.planfile import seconds_text

CERTAIN = 2.0  # standard errors
NAMED = 3  # of the largest differences, in words
UNSTEADY = 1.5  # the slowest tenth of steps over the quickest, or what steps add up to over what they take
CORE_OF = "core of "  # how a calibrated CPU's name begins
AS_PREDICTED, INSIDE, OUTSIDE, UNPREDICTED = (
    "as predicted",
    "in the file's range",
    "out of the file's range",
    "not predicted",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One group: how much it differs, and how sure that is.

    ``noise_sigmas`` counts standard errors of the run alone, ``file_sigmas`` those of run and machine file together;
    both are 0 where nothing was predicted. ``parts`` are the shares of its predicted seconds by number of the file.
    """

    observation: Observation
    ratio: float | None
    noise_sigmas: float
    file_sigmas: float
    parts: tuple[tuple[str, float], ...]

    @property
    def verdict(self) -> str:
        """What to think of it."""
        if self.ratio is None:
            return UNPREDICTED
        if abs(self.noise_sigmas) < CERTAIN:
            return AS_PREDICTED
        return INSIDE if abs(self.file_sigmas) < CERTAIN else OUTSIDE


def rows_of(drift: Drift, parts: Parts, cluster: Cluster) -> tuple[Row, ...]:
    """The observations with their significance, in their order: the largest contribution to the step first."""
    rows = []
    for seen in drift.observations:
        found = parts.get(seen.group, {})
        total = sum(found.values())
        shares = tuple((str(number), seconds / total) for number, seconds in found.items())
        if seen.log_ratio is None or not found:
            rows.append(Row(seen, None, 0.0, 0.0, shares))
            continue
        both = hypot(seen.log_error, file_error(cluster, found, seen.group.what))
        rows.append(Row(seen, exp(seen.log_ratio), seen.log_ratio / seen.log_error, seen.log_ratio / both, shares))
    return tuple(rows)


def doubts(run: Run, drift: Drift) -> tuple[str, ...]:
    """What makes a run a poor witness, in words: none of it is sure enough to refuse the run."""
    found = []
    spread = drift.step_high_seconds / drift.step_low_seconds
    if spread > UNSTEADY:
        found.append(
            f"steps took {seconds_text(drift.step_low_seconds)} to {seconds_text(drift.step_high_seconds)}: other work "
            "may have run beside them; a quieter run tells more"
        )
    apart = drift.explained_step_seconds / drift.step_seconds
    if not 1 / UNSTEADY < apart < UNSTEADY:
        found.append(
            f"as measured one by one, instructions make a step of {seconds_text(drift.explained_step_seconds)}, but "
            f"steps took {seconds_text(drift.step_seconds)}: the machine was not alike in both; run again"
        )
    if len(run.steps) < FEW_STEPS:
        found.append(f"only {len(run.steps)} of its steps have times of instructions; give execute more --steps")
    cluster = run.plan.hardware
    for row in run.summary.devices:
        name = cluster.device(row.device).name
        if name.startswith(CORE_OF) and row.kind not in name:
            found.append(f"the machine file says {name.removeprefix(CORE_OF)}, the run was on {row.kind}")
            break
    return tuple(found)


def in_words(row: Row) -> str:
    """One difference as a sentence."""
    seen = row.observation
    effect = seen.contribution_seconds
    step = f"alone makes the step {seconds_text(abs(effect))} {'longer' if effect >= 0 else 'shorter'}"
    spread = (
        f"{seconds_text(seen.measured_seconds)} ({seconds_text(seen.low_seconds)} to {seconds_text(seen.high_seconds)})"
    )
    if row.ratio is None:
        return f"{seen.group} takes {spread} where nothing was predicted, which {step}"
    sure = {
        AS_PREDICTED: "that is within the noise of the run",
        INSIDE: "that is within what the machine file leaves open",
        OUTSIDE: "that is more than the machine file leaves open",
    }[row.verdict]
    return (
        f"{seen.group} takes {row.ratio:.2f} times as long as predicted, {spread} instead of "
        f"{seconds_text(seen.predicted_seconds)}, which {step}; {sure}"
    )


def report_text(drift: Drift, rows: tuple[Row, ...]) -> str:
    """The table, the largest differences in words, and what no instruction explains."""
    head = (
        f"{'':<26}{'a step':>7}{'predicted':>11}{'measured':>11}{'10 % to 90 %':>20}{'ratio':>7}{'step':>11}  verdict"
    )
    lines = [head]
    for row in rows:
        seen = row.observation
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        spread = f"{seconds_text(seen.low_seconds)} to {seconds_text(seen.high_seconds)}"
        change = f"{'+' if seen.contribution_seconds >= 0 else '-'}{seconds_text(abs(seen.contribution_seconds))}"
        lines.append(
            f"{seen.group!s:<26}{seen.count:>7}{seconds_text(seen.predicted_seconds):>11}"
            f"{seconds_text(seen.measured_seconds):>11}{spread:>20}{ratio:>7}{change:>11}  {row.verdict}"
        )
    if drift.unseen:
        lines.append(f"not timed, since nobody waited for it: {', '.join(map(str, drift.unseen))}")
    lines.append("")
    lines += [f"{number}. {in_words(row)}" for number, row in enumerate(rows[:NAMED], 1)]
    left = drift.step_seconds - drift.explained_step_seconds
    rest = (
        f"{seconds_text(left)} of the step is in no instruction"
        if left >= 0
        else f"waiting for each instruction costs {seconds_text(-left)} that steps without waits do not have"
    )
    lines.append(
        f"step: predicted {seconds_text(drift.predicted_step_seconds)}, measured {seconds_text(drift.step_seconds)} "
        f"({seconds_text(drift.step_low_seconds)} to {seconds_text(drift.step_high_seconds)} in {drift.steps} steps); "
        f"with all instructions as measured, the simulator says {seconds_text(drift.explained_step_seconds)}: {rest}"
    )
    return "\n".join(lines)


def corrections(before: Cluster, after: Cluster, fit: Fit) -> list[dict[str, Any]]:
    """The numbers that changed: their factor in seconds, its standard error, and the file's figure before and after."""
    found = []
    for number, factor in sorted(fit.factors.items()):
        old, new = quantity_of(before, number), quantity_of(after, number)
        found.append(
            {
                "number": str(number),
                "seconds_factor": factor.value,
                "log_error": factor.log_error,
                "before": None if old is None else old.value,
                "after": None if new is None else new.value,
            }
        )
    return found


def corrections_text(found: list[dict[str, Any]]) -> str:
    """The same as lines."""
    if not found:
        return "no number of the machine file is wrong by more than the run's noise"
    lines = []
    for row in found:
        before = "1" if row["before"] is None else f"{row['before']:.4g}"
        slower = row["seconds_factor"]
        what = f"{slower:.3g} times as slow" if slower >= 1 else f"{1 / slower:.3g} times as quick"
        lines.append(f"{row['number']:<26}{before:>12} → {row['after']:<12.4g}{what}, ± {row['log_error']:.1%}")
    return "\n".join(lines)


def report_data(drift: Drift, rows: tuple[Row, ...]) -> dict[str, Any]:
    """The drift as plain JSON data."""
    return {
        "predicted_step_seconds": drift.predicted_step_seconds,
        "explained_step_seconds": drift.explained_step_seconds,
        "step_seconds_median": drift.step_seconds,
        "step_seconds_low": drift.step_low_seconds,
        "step_seconds_high": drift.step_high_seconds,
        "groups": [
            {
                "group": str(row.observation.group),
                "stage": row.observation.group.stage,
                "target": row.observation.group.target if row.observation.group.is_transfer else None,
                "what": row.observation.group.what,
                "count": row.observation.count,
                "samples": row.observation.samples,
                "predicted_seconds": row.observation.predicted_seconds,
                "measured_seconds_median": row.observation.measured_seconds,
                "measured_seconds_low": row.observation.low_seconds,
                "measured_seconds_high": row.observation.high_seconds,
                "ratio": row.ratio,
                "noise_sigmas": row.noise_sigmas,
                "file_sigmas": row.file_sigmas,
                "contribution_seconds": row.observation.contribution_seconds,
                "verdict": row.verdict,
                "parts": dict(row.parts),
            }
            for row in rows
        ],
        "unseen": [str(group) for group in drift.unseen],
        "largest": [in_words(row) for row in rows[:NAMED]],
    }
