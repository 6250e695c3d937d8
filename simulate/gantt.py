"""Timelines as a picture that a person likes to look at: one row a mesh, empty where nothing runs.

The colours are of Okabe and Ito's palette, which colour-blind readers can tell apart.
"""

import os
from collections import defaultdict
from collections.abc import Sequence

from matplotlib.axes import Axes
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
ROW_BACKGROUND = "#F3F4F6"
INK, PALE_INK = "#1F2933", "#7B8794"
WIDTH_INCHES = 13.0
MOST_LABELS = 4000  # numbers beyond this would be dust


def plot_timeline(timeline: Timeline, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw one timeline to a PNG (or whatever the path's ending says)."""
    plot_timelines([(title, timeline)], path)


def plot_timelines(timelines: Sequence[tuple[str, Timeline]], path: str | os.PathLike[str]) -> None:
    """Draw named timelines one above the other on one time axis, as in ``[("predicted", p), ("measured", m)]``.

    Raises:
        ScheduleError: there is nothing to draw.
    """
    longest = max((timeline.makespan_seconds for _, timeline in timelines), default=0.0)
    if longest <= 0:
        raise ScheduleError("a timeline without time cannot be drawn; give one with at least one event that lasts")
    rows = [len(timeline.mesh_devices) for _, timeline in timelines]
    row_inches = min(0.52, max(0.19, 7.0 / sum(rows)))
    heights = [count * row_inches for count in rows]
    head, foot = 0.55, 0.95  # inches for a panel's title, and for axis and legend below the last panel
    total = sum(heights) + head * len(rows) + foot
    figure = Figure(figsize=(WIDTH_INCHES, total), facecolor="white", dpi=130)
    left, right = 1.45 / WIDTH_INCHES, 1 - 0.3 / WIDTH_INCHES
    unit, per_second = _time_unit(longest)
    top = total
    for k, ((name, timeline), height) in enumerate(zip(timelines, heights, strict=True)):
        top -= head + height
        axes = figure.add_axes((left, top / total, right - left, height / total))
        inches_per_second = WIDTH_INCHES * (right - left) / (longest * 1.01)
        _draw(axes, timeline, per_second, inches_per_second, row_inches)
        axes.set_xlim(0, longest * per_second * 1.01)
        last = k == len(rows) - 1
        axes.tick_params(axis="x", labelbottom=last, length=3 if last else 0, colors=PALE_INK, labelsize=9)
        if last:
            axes.set_xlabel(unit, color=PALE_INK, fontsize=9, loc="right")
        against = timelines[0][1].makespan_seconds if k else None
        _title(axes, name, timeline, per_second, unit, against)
    _legend(figure, [timeline for _, timeline in timelines], 0.12 / total)
    figure.savefig(path)


def _time_unit(longest_seconds: float) -> tuple[str, float]:
    """Unit in which the longest time is a number of few digits, and units per second."""
    for unit, per_second in (("seconds", 1.0), ("milliseconds", 1e3), ("microseconds", 1e6)):
        if longest_seconds * per_second >= 2:
            return unit, per_second
    return "nanoseconds", 1e9


def _kind(event: Event) -> str:
    return "transfer" if isinstance(event.instruction, Send) else type(event.instruction).__name__.lower()


def _drawn(timeline: Timeline) -> list[Event]:
    """What has a shape: not waits, which are the empty places, and nothing that takes no time."""
    return [e for e in timeline.events if not isinstance(e.instruction, Receive) and e.end_seconds > e.start_seconds]


def _draw(axes: Axes, timeline: Timeline, per_second: float, inches_per_second: float, row_inches: float) -> None:
    events = _drawn(timeline)
    rows = len(timeline.mesh_devices)
    lane = any(isinstance(event.instruction, Send) for event in events)  # a thin lane for what is in flight
    low, high = (0.27, 0.93) if lane else (0.09, 0.91)
    boxes: defaultdict[str, list[list[tuple[float, float]]]] = defaultdict(list)
    labels: list[tuple[float, float, str]] = []
    points = min(9.5, row_inches * 72 * (high - low) * 0.62)
    for event in events:
        base = rows - 1 - event.mesh
        bottom, top = (base + 0.09, base + 0.2) if isinstance(event.instruction, Send) else (base + low, base + high)
        start, end = event.start_seconds * per_second, event.end_seconds * per_second
        boxes[_kind(event)].append([(start, bottom), (start, top), (end, top), (end, bottom)])
        if isinstance(event.instruction, Forward | Backward):
            text = str(event.instruction.microbatch)
            if (event.end_seconds - event.start_seconds) * inches_per_second * 72 > points * (0.62 * len(text) + 0.35):
                labels.append(((start + end) / 2, (bottom + top) / 2, text))
    for r in range(rows):
        axes.axhspan(r + low, r + high, color=ROW_BACKGROUND, linewidth=0, zorder=0)
    narrowest = min(
        (e.end_seconds - e.start_seconds for e in events if _kind(e) in ("forward", "backward")), default=0.0
    )
    seam = 0.9 if narrowest * inches_per_second > 0.05 else 0.25 if narrowest * inches_per_second > 0.02 else 0.0
    for kind, corners in boxes.items():
        width = seam if kind != "transfer" else 0.0
        axes.add_collection(PolyCollection(corners, facecolors=COLOURS[kind], edgecolors="white", linewidths=width))
    if points >= 4.5 and len(labels) <= MOST_LABELS:
        for x, y, text in labels:
            axes.text(x, y, text, ha="center", va="center_baseline", fontsize=points, color=INK, clip_on=True)
    axes.set_ylim(0, rows)
    names = [_row_name(mesh, devices) for mesh, devices in enumerate(timeline.mesh_devices)]
    middle = (low + high) / 2
    axes.set_yticks([rows - 1 - mesh + middle for mesh in range(rows)], names)
    axes.tick_params(axis="y", length=0, colors=INK, labelsize=min(9.0, row_inches * 72 * 0.6))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#CBD2D9")
    end = timeline.makespan_seconds * per_second
    axes.plot([end, end], [0, rows], color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=3)


def _row_name(mesh: int, devices: tuple[int, ...]) -> str:
    if len(devices) == 1:
        return f"device {devices[0]}"
    if devices == tuple(range(devices[0], devices[0] + len(devices))):
        return f"devices {devices[0]}–{devices[-1]}"
    return f"mesh {mesh} · {len(devices)} devices"


def _title(
    axes: Axes, name: str, timeline: Timeline, per_second: float, unit: str, against_seconds: float | None
) -> None:
    makespan = timeline.makespan_seconds
    parts = [f"{makespan * per_second:.4g} {unit}"]
    if against_seconds:
        parts.append(f"{makespan / against_seconds - 1:+.1%} against {'the first'}")
    parts.append(f"{timeline.bubble_fraction:.1%} bubble")
    facts = "   ·   ".join(parts)
    heading = axes.annotate(
        name,
        (0, 1),
        (0, 9),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=12.5,
        weight="bold",
        color=INK,
    )
    axes.annotate(
        facts,
        (1, 1),
        (0, 9),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        fontsize=10.5,
        color=INK if heading.get_text() else PALE_INK,
    )


def _legend(figure: Figure, timelines: Sequence[Timeline], y: float) -> None:
    seen = {_kind(event) for timeline in timelines for event in _drawn(timeline)}
    patches = [
        Patch(facecolor=colour, label=LEGEND.get(kind, kind)) for kind, colour in COLOURS.items() if kind in seen
    ]
    patches.append(Patch(facecolor=ROW_BACKGROUND, edgecolor="#CBD2D9", label="idle (bubble)"))
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
