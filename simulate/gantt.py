"""Timelines as a picture that a person likes to look at: one row a mesh, empty where nothing runs.

The colours are of Okabe and Ito's palette, which colour-blind readers can tell apart.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from meshwright.errors import ScheduleError
from meshwright.simulate.program import Backward, Forward, Receive, Send
from meshwright.simulate.timeline import Event, Timeline

COLOURS = {
    "forward": "#56B4E9",
    "backward": "#E69F00",
    "transfer": "#CC79A7",
    "reduce": "#009E73",
    "update": "#5D6D7E",
}
LEGEND = {"transfer": "transfer in flight", "reduce": "reduce gradients"}
ROW_BACKGROUND, FRAME = "#F0F2F4", "#CBD2D9"
INK, PALE_INK = "#1F2933", "#7B8794"
WIDTH_INCHES = 13.0
MOST_LABELS = 4000  # more numbers than this would be dust
LEAST_POINTS = 5.0


def plot_timeline(timeline: Timeline, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw one timeline to a PNG (or whatever the path's ending says)."""
    plot_timelines([(title, timeline)], path)


def plot_timelines(timelines: Sequence[tuple[str, Timeline]], path: str | os.PathLike[str]) -> None:
    """Draw named timelines one above the other on one time axis, as in ``[("predicted", p), ("measured", m)]``.

    Raises:
        ScheduleError: there is nothing to draw, or the path's ending is no kind of picture.
    """
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if (ending := Path(path).suffix.lstrip(".").lower()) not in kinds:
        raise ScheduleError(f"{path}: {ending or 'no ending'!r} is no kind of picture; use .png, .svg or .pdf")
    longest = max((timeline.makespan_seconds for _, timeline in timelines), default=0.0)
    if longest <= 0:
        raise ScheduleError("a timeline without time cannot be drawn; give one with at least one event that lasts")
    rows = [len(timeline.mesh_devices) for _, timeline in timelines]
    row_inches = min(0.52, max(0.19, 7.0 / sum(rows)))
    heights = [count * row_inches for count in rows]
    head, foot = 0.55, 0.82  # inches for a panel's title, and for axis and legend below the last panel
    total = sum(heights) + head * len(rows) + foot
    longest_name = max(len(_row_name(m, d)) for _, t in timelines for m, d in enumerate(t.mesh_devices))
    left_inches, right_inches = 0.3 + 0.076 * longest_name, 0.3
    width_inches = WIDTH_INCHES - left_inches - right_inches
    figure = Figure(figsize=(WIDTH_INCHES, total), facecolor="white", dpi=130)
    unit, short, per_second = _time_unit(longest)
    scale = _Scale(per_second, width_inches / (longest * 1.004), row_inches)
    top = total
    for k, ((name, timeline), height) in enumerate(zip(timelines, heights, strict=True)):
        top -= head + height
        box = (left_inches / WIDTH_INCHES, top / total, width_inches / WIDTH_INCHES, height / total)
        axes = figure.add_axes(box)
        _draw(axes, timeline, scale)
        axes.set_xlim(0, longest * per_second * 1.004)
        last = k == len(rows) - 1
        axes.tick_params(axis="x", labelbottom=last, length=3 if last else 0, colors=PALE_INK, labelsize=9)
        facts = [f"{timeline.makespan_seconds * per_second:.4g} {short}"]
        if k:
            first_name, first = timelines[0]
            change = timeline.makespan_seconds / first.makespan_seconds - 1 if first.makespan_seconds else 0.0
            facts.append(f"{change:+.1%} against {first_name or 'the first'}")
        _head(axes, name, [*facts, f"{timeline.bubble_fraction:.1%} bubble"])
    _legend(figure, [timeline for _, timeline in timelines], 0.1 / total)
    edge = (1 - right_inches / WIDTH_INCHES, 0.23 / total)
    figure.text(*edge, f"time in {unit}", ha="right", fontsize=9, color=PALE_INK)
    figure.savefig(path)


@dataclass(frozen=True, slots=True)
class _Scale:
    """Units of the time axis in a second, and inches on paper."""

    per_second: float
    inches_per_second: float
    row_inches: float


def _time_unit(longest_seconds: float) -> tuple[str, str, float]:
    """Unit in which the longest time is a number of few digits, its symbol, and units per second."""
    for unit, short, per_second in (("seconds", "s", 1.0), ("milliseconds", "ms", 1e3), ("microseconds", "µs", 1e6)):
        if longest_seconds * per_second >= 2:
            return unit, short, per_second
    return "nanoseconds", "ns", 1e9


def _kind(event: Event) -> str:
    return "transfer" if isinstance(event.instruction, Send) else type(event.instruction).__name__.lower()


def _drawn(timeline: Timeline) -> list[Event]:
    """What has a shape: not waits, which are the empty places, and nothing that takes no time."""
    return [e for e in timeline.events if not isinstance(e.instruction, Receive) and e.end_seconds > e.start_seconds]


def _draw(axes: Axes, timeline: Timeline, scale: _Scale) -> None:
    events = _drawn(timeline)
    rows = len(timeline.mesh_devices)
    lane = any(isinstance(event.instruction, Send) for event in events)  # a thin lane for what is in flight
    low, high = (0.27, 0.93) if lane else (0.09, 0.91)
    end = timeline.makespan_seconds * scale.per_second
    idle = [[(0.0, r + low), (0.0, r + high), (end, r + high), (end, r + low)] for r in range(rows)]
    axes.add_collection(PolyCollection(idle, facecolors=ROW_BACKGROUND, linewidths=0))
    boxes: defaultdict[str, list[list[tuple[float, float]]]] = defaultdict(list)
    for event in events:
        base = rows - 1 - event.mesh
        below, above = (0.09, 0.2) if isinstance(event.instruction, Send) else (low, high)
        start, stop = event.start_seconds * scale.per_second, event.end_seconds * scale.per_second
        boxes[_kind(event)].append(
            [(start, base + below), (start, base + above), (stop, base + above), (stop, base + below)]
        )
    computed = [event for event in events if isinstance(event.instruction, Forward | Backward)]
    narrowest = min((_inches(event, scale) for event in computed), default=0.0)
    seam = 0.9 if narrowest > 0.05 else 0.25 if narrowest > 0.02 else 0.0
    for kind, corners in boxes.items():
        width = seam if kind != "transfer" else 0.0
        axes.add_collection(PolyCollection(corners, facecolors=COLOURS[kind], edgecolors="white", linewidths=width))
    for kind in ("forward", "backward"):
        _number(axes, [e for e in computed if _kind(e) == kind], rows - 1 + (low + high) / 2, high - low, scale)
    axes.set_ylim(0, rows)
    names = [_row_name(mesh, devices) for mesh, devices in enumerate(timeline.mesh_devices)]
    axes.set_yticks([rows - 1 - mesh + (low + high) / 2 for mesh in range(rows)], names)
    axes.tick_params(axis="y", length=0, colors=INK, labelsize=min(9.0, scale.row_inches * 72 * 0.6))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FRAME)
    axes.plot([end, end], [0, rows], color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=3)


def _number(axes: Axes, events: Sequence[Event], top: float, share: float, scale: _Scale) -> None:
    """Write the micro-batch into the boxes, all in the one size that nine of ten allow, or not at all."""
    words = [(e, str(e.instruction.microbatch)) for e in events if isinstance(e.instruction, Forward | Backward)]
    room = [72 * _inches(event, scale) / (0.62 * len(text) + 0.3) for event, text in words]
    if not words or len(words) > MOST_LABELS:
        return
    points = min(9.5, scale.row_inches * 72 * share * 0.62, sorted(room)[len(room) // 10])
    if points < LEAST_POINTS:
        return
    for (event, text), widest in zip(words, room, strict=True):
        if widest >= 0.9 * points:  # the allowance for a digit's width is generous
            x = (event.start_seconds + event.end_seconds) / 2 * scale.per_second
            y = top - event.mesh
            axes.text(x, y, text, ha="center", va="center_baseline", fontsize=points, color=INK)


def _inches(event: Event, scale: _Scale) -> float:
    return (event.end_seconds - event.start_seconds) * scale.inches_per_second


def _row_name(mesh: int, devices: tuple[int, ...]) -> str:
    if len(devices) == 1:
        return f"device {devices[0]}"
    if devices == tuple(range(devices[0], devices[0] + len(devices))):
        return f"devices {devices[0]}–{devices[-1]}"
    return f"mesh {mesh} · {len(devices)} devices"


def _head(axes: Axes, name: str, facts: Sequence[str]) -> None:
    """The panel's name on the left, its numbers on the right."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (0, 9), "textcoords": "offset points", "color": INK}
    axes.annotate(name, (0, 1), fontsize=12.5, weight="bold", **place)
    axes.annotate("   ·   ".join(facts), (1, 1), ha="right", fontsize=10.5, **place)


def _legend(figure: Figure, timelines: Sequence[Timeline], y: float) -> None:
    seen = {_kind(event) for timeline in timelines for event in _drawn(timeline)}
    patches = [
        Patch(facecolor=colour, label=LEGEND.get(kind, kind)) for kind, colour in COLOURS.items() if kind in seen
    ]
    patches.append(Patch(facecolor=ROW_BACKGROUND, edgecolor=FRAME, label="idle (bubble)"))
    figure.legend(
        handles=patches,
        loc="lower center",
        bbox_to_anchor=(0.5, y),
        ncols=len(patches),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=1.3,
        handleheight=1.0,
        columnspacing=2.2,
    )
