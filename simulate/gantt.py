"""Timelines as a picture that a person likes to look at: one row a mesh, empty where nothing runs.

A whole backward is orange; its halves are vermilion (input) and yellow (weights). Later stages of a mesh, chunks or
replicas, are paler. Boxes too narrow to see are painted as density, so thousands of them leave the bubble as it is.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from meshwright.errors import ScheduleError
from meshwright.simulate.boxes import COLOURS, boxes_of
from meshwright.simulate.rows import (
    DPI,
    FRAME,
    INK,
    LEAST_MEMORY_PIXELS,
    MEMORY,
    PALE_INK,
    ROW_BACKGROUND,
    Scale,
    draw_rows,
    row_count,
    row_names,
)
from meshwright.simulate.timeline import Timeline

WIDTH_INCHES = 13.0
BODY_INCHES, BODY_WITH_MEMORY_INCHES = 7.0, 10.0  # of all rows, while a row is not too high or too low for that
HIGHEST_ROW, LOWEST_ROW = 0.52, 2 / DPI
HEAD, FOOT = 0.55, 0.82  # inches for a panel's title, and for axis and legend below the last panel


def plot_timeline(
    timeline: Timeline, path: str | os.PathLike[str], title: str = "", *, memory: bool = False, held: str = "bytes"
) -> None:
    """Draw one timeline to a PNG (or whatever the path's ending says); see ``plot_timelines``."""
    plot_timelines([(title, timeline)], path, memory=memory, held=held)


def plot_timelines(
    timelines: Sequence[tuple[str, Timeline]],
    path: str | os.PathLike[str],
    *,
    memory: bool = False,
    held: str = "bytes",
) -> None:
    """Draw named timelines one above the other on one time axis, as in ``[("predicted", p), ("measured", m)]``.

    Args:
        memory: also draw what the devices of each mesh hold over time, and mark the highest peak. Rows need some
            height for that: above 65 meshes only the peak's number is given.
        held: what the timelines count as memory; bare schedules count activations, one a micro-batch.

    Raises:
        ScheduleError: there is nothing to draw, or the path's ending is no kind of picture.
    """
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if (ending := Path(path).suffix.lstrip(".").lower()) not in kinds:
        raise ScheduleError(f"{path}: {ending or 'no ending'!r} is no kind of picture; use .png, .svg or .pdf")
    longest = max((timeline.makespan_seconds for _, timeline in timelines), default=0.0)
    if longest <= 0:
        raise ScheduleError("a timeline without time cannot be drawn; give one with at least one event that lasts")
    rows = [row_count(timeline) for _, timeline in timelines]
    strips = memory and sum(rows) * LEAST_MEMORY_PIXELS <= BODY_WITH_MEMORY_INCHES * DPI
    highest_row, body = (1.5 * HIGHEST_ROW, BODY_WITH_MEMORY_INCHES) if strips else (HIGHEST_ROW, BODY_INCHES)
    row_inches = round(min(highest_row, max(LOWEST_ROW, body / sum(rows))) * DPI) / DPI  # whole pixels
    total = sum(rows) * row_inches + HEAD * len(rows) + FOOT
    longest_name = max(len(name) for _, timeline in timelines for name in row_names(timeline))
    left_inches, right_inches = round((0.3 + 0.076 * longest_name) * DPI) / DPI, round(0.3 * DPI) / DPI
    width_inches = WIDTH_INCHES - left_inches - right_inches
    figure = Figure(figsize=(WIDTH_INCHES, total), facecolor="white", dpi=DPI)
    unit, short, per_second = _time_unit(longest)
    scale = Scale(per_second, longest * 1.004, width_inches, row_inches, strips)
    top, dense, seen = total, False, set[int]()
    shown = [boxes_of(timeline) for _, timeline in timelines]
    for k, ((name, timeline), boxes) in enumerate(zip(timelines, shown, strict=True)):
        height = rows[k] * row_inches
        top -= HEAD + height
        axes = figure.add_axes((left_inches / WIDTH_INCHES, top / total, width_inches / WIDTH_INCHES, height / total))
        painted, kinds_drawn = draw_rows(axes, timeline, boxes, scale)
        dense, seen = dense or painted, seen | kinds_drawn
        last = k == len(rows) - 1
        axes.tick_params(axis="x", labelbottom=last, length=3 if last else 0, colors=PALE_INK, labelsize=9)
        _head(axes, name, _facts(timeline, timelines[0] if k else None, per_second, short, held if memory else None))
    pale = any(boxes.pale.any() for boxes in shown)
    _legend(figure, seen, pale, dense, held if strips else None, 0.1 / total)
    edge = (1 - right_inches / WIDTH_INCHES, 0.23 / total)
    figure.text(*edge, f"time in {unit}", ha="right", fontsize=9, color=PALE_INK)
    figure.savefig(path)


def _time_unit(longest_seconds: float) -> tuple[str, str, float]:
    """Unit in which the longest time is a number of few digits, its symbol, and units per second."""
    for unit, short, per_second in (("seconds", "s", 1.0), ("milliseconds", "ms", 1e3), ("microseconds", "µs", 1e6)):
        if longest_seconds * per_second >= 2:
            return unit, short, per_second
    return "nanoseconds", "ns", 1e9


def _facts(
    timeline: Timeline, first: tuple[str, Timeline] | None, per_second: float, short: str, held: str | None
) -> list[str]:
    facts = [f"{timeline.makespan_seconds * per_second:.4g} {short}"]
    if first is not None and first[1].makespan_seconds:
        change = timeline.makespan_seconds / first[1].makespan_seconds - 1
        facts.append(f"{change:+.1%} against {first[0] or 'the first'}")
    facts.append(f"{timeline.bubble_fraction:.1%} bubble")
    if held and (peak := max(timeline.peak_bytes, default=0.0)):
        amount = _bytes(peak) if held == "bytes" else f"{peak:g} {held}"
        facts.append(f"peak {amount} on mesh {timeline.peak_bytes.index(peak)}")
    return facts


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g} B"


def _head(axes: Axes, name: str, facts: Sequence[str]) -> None:
    """The panel's name on the left, its numbers on the right."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (0, 9), "textcoords": "offset points", "color": INK}
    axes.annotate(name, (0, 1), fontsize=12.5, weight="bold", **place)
    axes.annotate("   ·   ".join(facts), (1, 1), ha="right", fontsize=10.5, **place)


def _legend(figure: Figure, seen: set[int], pale: bool, dense: bool, held: str | None, y: float) -> None:
    """The colours that occur, and a word on paleness, density and memory where the picture has them."""
    patches: list[Patch | Line2D] = [
        Patch(facecolor=colour, label=label)
        for number, (label, colour) in enumerate(COLOURS.values())
        if number in seen
    ]
    patches.append(Patch(facecolor=ROW_BACKGROUND, edgecolor=FRAME, label="idle (bubble)"))
    if held:
        patches.append(Patch(facecolor=MEMORY, label=f"{held} held"))
    notes = []
    if pale:
        notes.append("paler: later stages of the same devices")
    if dense:
        notes.append("colours mix where boxes are narrower than a pixel")
    patches += [Line2D([], [], linestyle="none", label=f"({note})") for note in notes]
    figure.legend(
        handles=patches,
        loc="lower left",
        bbox_to_anchor=(0.015, y),
        ncols=len(patches),
        frameon=False,
        fontsize=9 if len(patches) < 8 else 8,
        labelcolor=INK,
        handlelength=1.3,
        handleheight=1.0,
        columnspacing=1.5,
    )
