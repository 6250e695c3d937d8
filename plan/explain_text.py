"""An explanation for a person to read."""

from collections.abc import Sequence

from meshwright.plan.explain import Explanation, differences
from meshwright.plan.explain_layers import LayerGroup
from meshwright.plan.planfile import PlannedCollective, bytes_text, seconds_text

MOST = 8  # rows of a list that may be long
_PHASES = {"forward": "each forward", "backward": "each backward", "once": "once a step"}


def explanation_text(explanation: Explanation, groups: Sequence[LayerGroup]) -> str:
    """Time, communication, memory and layers; ``groups`` are empty where the model is not known."""
    parts = [_time(explanation), _communication(explanation), _memory(explanation)]
    if groups:
        parts.append(_layers(groups))
    return "\n\n".join(parts)


def differences_text(one: Explanation, other: Explanation, names: tuple[str, str]) -> str:
    """Where two plans differ: the causes on their critical paths, then their fullest devices."""
    slower = other.step_seconds / one.step_seconds - 1
    verdict = f"{names[1]} takes {abs(slower):.1%} {'longer' if slower >= 0 else 'less'} than {names[0]}"
    width = max(len(cause) for cause, _, _ in differences(one, other))
    lines = [f"{verdict}: seconds of the critical paths, the largest difference first", ""]
    for cause, mine, theirs in [*differences(one, other), ("the whole step", one.step_seconds, other.step_seconds)]:
        sign = "+" if theirs >= mine else "-"
        lines.append(
            f"{cause:<{width}}  {_seconds(mine):>9}  {_seconds(theirs):>9}  {sign}{_seconds(abs(theirs - mine))}"
        )
    peaks = [bytes_text(max(_total(parts) for parts in each.memory)) for each in (one, other)]
    lines += ["", f"the fullest device holds {peaks[0]} and {peaks[1]}"]
    return "\n".join(lines)


def _time(e: Explanation) -> str:
    causes = dict.fromkeys((*e.device_seconds, *e.path_seconds))
    width = max(len(cause) for cause in causes)
    lines = [f"{'where the time goes':<{width}}  {'on the path':>17}  {'on devices':>17}"]
    for cause in causes:
        cells = (e.path_seconds.get(cause, 0.0), e.device_seconds.get(cause, 0.0))
        lines.append(f"{cause:<{width}}  " + "  ".join(_with_share(x, e.step_seconds) for x in cells))
    whole = (sum(e.path_seconds.values()), sum(e.device_seconds.values()))
    lines.append(f"{'the whole step':<{width}}  " + "  ".join(_with_share(x, e.step_seconds) for x in whole))
    return "\n".join(lines)


def _with_share(seconds: float, whole: float) -> str:
    return f"{_seconds(seconds):>9} {seconds / whole:>6.1%} "


def _seconds(seconds: float) -> str:
    return seconds_text(seconds) if seconds else "0"


def _communication(e: Explanation) -> str:
    lines = ["what moves inside stages"]
    rows = [(number, c) for number, stage in enumerate(e.plan.stages) for c in stage.collectives]
    lines += [f"  stage {number}: {_collective(c)}" for number, c in rows[:MOST]]
    if len(rows) > MOST:
        lines.append(f"  and {len(rows) - MOST} more kinds (--json lists all)")
    if not rows:
        lines.append("  nothing")
    lines.append("what moves between stages")
    lines += [
        f"  {m.source} → {m.target}: {m.what}, {m.times} times {bytes_text(m.bytes)} in {seconds_text(m.seconds)}"
        for m in e.moved[:MOST]
    ]
    if len(e.moved) > MOST:
        lines.append(f"  and {len(e.moved) - MOST} more (--json lists all)")
    if not e.moved:
        lines.append("  nothing")
    return "\n".join(lines)


def _collective(c: PlannedCollective) -> str:
    what = c.kind.replace("_", "-")
    times = "one" if c.count == 1 else str(c.count)
    return (
        f"{_PHASES[c.phase]}, {times} {what} of {bytes_text(c.bytes)} over {c.axes} ({c.ranks} devices) "
        f"in {seconds_text(c.seconds)}"
    )


def _memory(e: Explanation) -> str:
    lines = ["what fills a device at its fullest"]
    for number, parts in enumerate(e.memory):
        made_of = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts)
        lines.append(f"  stage {number}: {bytes_text(_total(parts))}: {made_of}")
    return "\n".join(lines)


def _total(parts: Sequence[tuple[str, float]]) -> float:
    return sum(size for _, size in parts)


def _layers(groups: Sequence[LayerGroup]) -> str:
    lines = ["how layers are split"]
    for group in groups:
        lines.append(f"  stage {group.stage}, {group.title}: {group.entry}")
        alike: dict[str, list[str]] = {}
        for name, words in group.weights:
            alike.setdefault(words, []).append(name)
        for words, names in sorted(alike.items(), key=lambda item: (item[0].startswith("whole"), item[0])):
            listed = ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if len(names) > MOST else "")
            lines.append(f"    {words}: {listed}")
    return "\n".join(lines)
