"""Published training steps → the interval that a measured step lies in around its prediction, 80 of 100 times.

    python -m experiments.fit_intervals --data FILE [FILE ...] [--closed-loop FILE ...] [--refit S ...] [--write]

Of each FILE (read as ``experiments.validation`` reads it) the fit halves of seed 0, to which the shipped constants were
fitted, give the interval of each system and software stack; sources left out whole give the one for systems that
nobody measured. The table shows which part of the rows held out lies inside. ``--refit`` shows it for other seeds too,
with constants fitted anew (minutes each). ``--closed-loop`` names answers of ``experiments.closed_loop --json``, from
which the interval of calibrated machines comes; without, it is that of all systems pooled. ``--write`` puts the
intervals into their file.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path

import msgspec

from experiments.residuals import Residual, of_fit_halves, without_sources
from experiments.validation.evaluate import Source, evaluate, fitted, in_halves
from experiments.validation.questions import read_questions
from experiments.validation.rows import DataError
from meshwright.calibrate.uncertainty import FORMAT, SHIPPED, VERSION, Interval, IntervalsFile, conformal_interval
from meshwright.errors import MeshwrightError

Key = tuple[str, str]  # system and stack


@dataclass(frozen=True, slots=True)
class Covered:
    """Of the rows of one source, how many lie inside, and how wide the interval is in the mean (high over low)."""

    source: str
    rows: int
    inside: int
    width: float


def interval(residuals: Sequence[Residual], source: str, pooled: bool = False) -> Interval | None:
    """The interval of residuals whose groups are exchangeable; with ``pooled``, systems are, and weigh alike."""
    groups = [(one.system, one.stack, one.group) for one in residuals]
    pools = [(one.system, one.stack) for one in residuals] if pooled else None
    return _recorded([one.log_ratio for one in residuals], groups, pools, source)


def _recorded(
    log_ratios: Sequence[float], groups: Sequence[Hashable], pools: Sequence[Hashable] | None, source: str
) -> Interval | None:
    found = conformal_interval(log_ratios, groups, pools)
    if found is None:
        return None
    low, high = (float(f"{end:.4g}") for end in found)
    return Interval(low=low, high=high, rows=len(log_ratios), groups=len(set(groups)), source=source)


def measured_systems(residuals: Sequence[Residual], seed: int) -> tuple[dict[Key, Interval], Interval]:
    """The interval of each system and stack, and that of all of them pooled, which those with few groups get."""
    pooled = interval(residuals, f"fit halves (seed {seed}) of all systems pooled, each weighing alike", pooled=True)
    if pooled is None:
        raise DataError(
            "fewer than 4 groups of measured steps have constants; run experiments.fit_stacks --write first"
        )
    rows: defaultdict[Key, list[Residual]] = defaultdict(list)
    for one in residuals:
        rows[one.system, one.stack].append(one)
    text = "fit half (seed {}) of {}, each group predicted without it"
    own = {key: interval(mine, text.format(seed, mine[0].source)) for key, mine in rows.items()}
    return {key: found or pooled for key, found in own.items()}, pooled


def elsewhere(residuals: Sequence[Residual]) -> Interval:
    """The interval on a system that nobody measured: sources, each left out whole, are the groups."""
    text = f"{len({one.source for one in residuals})} sources, each predicted as if it were not known"
    sources = [one.source for one in residuals]
    found = _recorded([one.log_ratio for one in residuals], sources, None, text)
    if found is None:
        raise DataError(f"{len(set(sources))} sources can be predicted; at least 4 are needed for systems unmeasured")
    return found


def no_narrower(other: Interval, pooled: Interval) -> Interval:
    """No less can be open of a system that nobody measured than of those that were; ten sources tell it roughly."""
    low, high = min(other.low, pooled.low), max(other.high, pooled.high)
    return msgspec.structs.replace(other, low=low, high=high)


def calibrated(paths: Sequence[Path]) -> Interval | None:
    """The interval of plans on the machine that they were calibrated on; each plan is a group.

    Raises:
        DataError: a file is no answer of ``experiments.closed_loop --json``.
    """
    log_ratios, names = [], []
    for path in paths:
        try:
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
                log_ratios.append(log(row["measured_seconds"] / row["predicted_seconds"]))
                names.append((row["ranks"], row["name"]))
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise DataError(f"{path}: is no answer of experiments.closed_loop --json ({error!r})") from None
    text = f"closed loop: plans run on the machine that they were calibrated on, {len(paths)} times over"
    found = _recorded(log_ratios, names, None, text) if paths else None
    if paths and found is None:
        raise DataError(f"{len(set(names))} plans were run; at least 4 are needed")
    return found


def coverage(residuals: Sequence[Residual], intervals: Mapping[Key, Interval], other: Interval) -> list[Covered]:
    """Source by source, rows inside their intervals; systems without one have the other."""
    rows: defaultdict[str, list[tuple[bool, float]]] = defaultdict(list)
    for one in residuals:
        mine = intervals.get((one.system, one.stack), other)
        rows[one.source].append((mine.low <= exp(one.log_ratio) <= mine.high, mine.high / mine.low))
    return [
        Covered(name, len(found), sum(inside for inside, _ in found), sum(width for _, width in found) / len(found))
        for name, found in rows.items()
    ]


def held_out(sources: Sequence[Source]) -> list[Residual]:
    """The rows held out, as they were predicted."""
    return [
        Residual(
            source.name,
            result.case.system,
            result.case.stack.name,
            result.case.group,
            log(result.case.measured_seconds / result.predicted_seconds),
        )
        for source in sources
        for result in source.held_out.results
    ]


def elsewhere_coverage(residuals: Sequence[Residual]) -> list[Covered]:
    """Of each source, rows inside the interval that the other sources tell for systems that nobody measured."""
    found = []
    for name in dict.fromkeys(one.source for one in residuals):
        others = elsewhere([one for one in residuals if one.source != name])
        found += coverage([one for one in residuals if one.source == name], {}, others)
    return found


def table(title: str, covered: Sequence[Covered]) -> str:
    """Coverage of each source and of all rows."""
    rows, inside = sum(one.rows for one in covered), sum(one.inside for one in covered)
    mean = sum(one.width * one.rows for one in covered) / rows
    lines = [f"{title}:"]
    for one in (*covered, Covered("all", rows, inside, mean)):
        share = f"{one.inside / one.rows:6.1%}"
        lines.append(f"  {one.source:18} {one.rows:5} rows  {share} inside, high over low {one.width:.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 1: a file cannot be used, in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.fit_intervals", description="Fit the interval around a predicted step."
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="CSV of measured steps")
    parser.add_argument("--closed-loop", type=Path, nargs="*", default=[], metavar="FILE", help="answers of its --json")
    parser.add_argument(
        "--refit", type=int, nargs="*", default=[], metavar="S", help="seeds with constants of their own"
    )
    parser.add_argument("--write", action="store_true", help="put the intervals into their file")
    chosen = parser.parse_args(arguments)
    try:
        sources = [source for path in chosen.data for source in _evaluated(path)]
        systems, pooled = judged(sources, 0)
        unmeasured = without_sources(sources)
        anywhere, own = no_narrower(elsewhere(unmeasured), pooled), calibrated(chosen.closed_loop)
        print(table("Systems left out with their source", elsewhere_coverage(unmeasured)))
        for seed in chosen.refit:
            halved = [replace(source, results=in_halves(source.results, seed)) for source in sources]
            judged([fitted(source) for source in halved], seed)
    except MeshwrightError as error:
        print(error, file=sys.stderr)
        return 1
    for (system, stack), found in systems.items():
        print(line(f"{system}, {stack}", found))
    print(line("elsewhere", anywhere))
    print(line("calibrated", own or pooled))
    if chosen.write:
        write(systems, anywhere, own or pooled, SHIPPED)
        print(f"wrote {SHIPPED.name}", file=sys.stderr)
    return 0


def _evaluated(path: Path) -> list[Source]:
    found = evaluate(read_questions(path), lambda text: print(text, file=sys.stderr))
    return [source for source in found if source.results]


def judged(sources: Sequence[Source], seed: int) -> tuple[dict[Key, Interval], Interval]:
    """The intervals of systems from their fit halves; prints how they fare on the rows held out."""
    systems, pooled = measured_systems(of_fit_halves(sources), seed)
    print(table(f"Rows held out by seed {seed}", coverage(held_out(sources), systems, pooled)), flush=True)
    return systems, pooled


def line(what: str, found: Interval) -> str:
    """One line of the table of intervals."""
    return f"{what}: {found.low:.3f} to {found.high:.3f} ({found.rows} rows, {found.groups} groups; {found.source})"


def write(systems: Mapping[Key, Interval], other: Interval, own: Interval, path: Path) -> None:
    """Put all intervals into their file."""
    by_stack: defaultdict[str, dict[str, Interval]] = defaultdict(dict)
    for (system, stack), found in sorted(systems.items()):
        by_stack[stack][system] = found
    file = IntervalsFile(
        format=FORMAT, version=VERSION, systems=dict(sorted(by_stack.items())), elsewhere=other, calibrated=own
    )
    path.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
