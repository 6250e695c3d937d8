"""The rows of one timeline in a picture: boxes with numbers while there is room, density where there is none."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from meshwright.simulate.boxes import COLOURS, COMPUTES, KINDS, Boxes
from meshwright.simulate.density import highest, painted
from meshwright.simulate.program import Send
from meshwright.simulate.timeline import Timeline
from meshwright.simulate.tracks import devices_label

Floats = NDArray[np.float64]
DPI = 130
ROW_BACKGROUND, FRAME = "#F0F2F4", "#CBD2D9"
INK, PALE_INK, MEMORY = "#1F2933", "#7B8794", "#9AA5B1"
MOST_LABELS = 4000  # more numbers than this would be dust
LEAST_POINTS = 5.0
LEAST_BOX_PIXELS = 2.5  # boxes narrower than this are painted as density
LEAST_BOX_ROW_PIXELS, LEAST_LANE_PIXELS, LEAST_GAP_PIXELS = 10, 12, 4
LEAST_MEMORY_PIXELS = 20  # a row with a strip of what is held
MOST_BOXES = 60_000
MOST_ROWS = 512  # more meshes than this are drawn as means of neighbours
NAME_INCHES = 0.15
PALETTE = np.array([to_rgb(colour) for _, colour in COLOURS.values()])


@dataclass(frozen=True, slots=True)
class Scale:
    """Units of the time axis in a second, its length, and the panel's size on paper."""

    per_second: float
    longest_seconds: float
    width_inches: float
    row_inches: float
    memory: bool

    @property
    def inches_per_second(self) -> float:
        return self.width_inches / self.longest_seconds

    @property
    def row_pixels(self) -> int:
        return max(1, round(self.row_inches * DPI))


@dataclass(frozen=True, slots=True)
class Bands:
    """Where things lie within a row of height 1, from its bottom: (low, high); None: no room, or nothing to show."""

    work: tuple[float, float]
    lane: tuple[float, float] | None
    memory: tuple[float, float] | None


def row_count(timeline: Timeline) -> int:
    """Rows of a timeline's panel: one a mesh, or one for several of very many."""
    meshes = len(timeline.mesh_devices)
    return -(-meshes // _fold(meshes))


def row_names(timeline: Timeline) -> list[str]:
    """What each row is called."""
    devices = timeline.mesh_devices
    fold = _fold(len(devices))
    if fold > 1:
        last = len(devices) - 1
        return [f"meshes {first}–{min(first + fold - 1, last)}" for first in range(0, len(devices), fold)]
    return [devices_label(each) or f"mesh {mesh} · {len(each)} devices" for mesh, each in enumerate(devices)]


def draw_rows(axes: Axes, timeline: Timeline, boxes: Boxes, scale: Scale) -> tuple[bool, set[int]]:
    """Draw one panel; returns whether its boxes are painted as density, and which kinds of boxes have a place."""
    rows = row_count(timeline)
    bands = _bands(boxes, scale)
    dense = _is_dense(boxes, scale, rows < len(timeline.mesh_devices))
    axes.set_xlim(0, scale.longest_seconds * scale.per_second)
    axes.set_ylim(0, rows)
    end = timeline.makespan_seconds * scale.per_second
    if dense:
        _paint(axes, timeline, boxes, bands, scale)
    else:
        _draw_boxes(axes, rows, boxes, bands, scale, end)
    if bands.memory is not None:
        _draw_memory(axes, timeline, bands.memory, scale)
    middle = (bands.work[0] + bands.work[1]) / 2 if not dense or bands.lane else 0.5
    _name_rows(axes, row_names(timeline), middle, scale)
    axes.plot([end, end], [0, rows], color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=3)
    return dense, {int(kind) for which, _ in _places(boxes, bands) for kind in np.unique(boxes.kind[which])}


def _places(boxes: Boxes, bands: Bands) -> tuple[tuple[NDArray[np.bool_], tuple[float, float]], ...]:
    """Which boxes lie in which band; without a lane transfers are left out and collectives lie among the work."""
    if bands.lane is not None:
        return (~boxes.beside, bands.work), (boxes.beside, bands.lane)
    return ((boxes.kind != KINDS.index(Send), bands.work),)


def _fold(meshes: int) -> int:
    return max(1, -(-meshes // MOST_ROWS))


def _bands(boxes: Boxes, scale: Scale) -> Bands:
    pixels = scale.row_pixels
    memory = scale.memory
    lane = bool(boxes.beside.any()) and pixels >= LEAST_LANE_PIXELS * (2 if memory else 1)
    gap = 0.07 if pixels >= LEAST_GAP_PIXELS else 0.0
    bottom = 0.40 if memory else gap
    low = bottom + (0.16 if lane else 0.0)
    return Bands((low, 1 - gap), (bottom, bottom + 0.12) if lane else None, (gap, bottom - 0.05) if memory else None)


def _is_dense(boxes: Boxes, scale: Scale, folded: bool) -> bool:
    """Whether one box in ten is narrower than a person can see, or the rows are too low, or there are too many."""
    if folded or len(boxes.mesh) > MOST_BOXES or scale.row_pixels < LEAST_BOX_ROW_PIXELS:
        return True
    seconds = boxes.seconds[~boxes.beside]
    narrow = float(np.quantile(seconds, 0.1)) if len(seconds) else 0.0
    return bool(len(seconds)) and narrow * scale.inches_per_second * DPI < LEAST_BOX_PIXELS


def _colours(boxes: Boxes) -> Floats:
    """The colour of each box, with its share of white."""
    pale = boxes.pale[:, None]
    colours: Floats = PALETTE[boxes.kind] * (1 - pale) + pale
    return colours


def _draw_boxes(axes: Axes, rows: int, boxes: Boxes, bands: Bands, scale: Scale, end: float) -> None:
    low, high = bands.work
    idle = [[(0.0, r + low), (0.0, r + high), (end, r + high), (end, r + low)] for r in range(rows)]
    axes.add_collection(PolyCollection(idle, facecolors=ROW_BACKGROUND, linewidths=0))
    start, stop = boxes.start_seconds * scale.per_second, boxes.end_seconds * scale.per_second
    colours = _colours(boxes)
    base = rows - 1 - boxes.mesh
    pixels = float(np.quantile(boxes.seconds[boxes.computes], 0.1)) if boxes.computes.any() else 0.0
    pixels *= scale.inches_per_second * DPI
    seam = 0.9 if pixels > 6.5 else 0.25 if pixels > 4 else 0.0
    for which, band in _places(boxes, bands):
        below, above = base[which] + band[0], base[which] + band[1]
        corners = np.stack(
            [
                np.stack([start[which], below], 1),
                np.stack([start[which], above], 1),
                np.stack([stop[which], above], 1),
                np.stack([stop[which], below], 1),
            ],
            axis=1,
        )
        width = seam if band is bands.work else 0.0
        axes.add_collection(
            PolyCollection(list(corners), facecolors=colours[which], edgecolors="white", linewidths=width)
        )
    _number(axes, boxes, rows - 1 + (low + high) / 2, high - low, scale)


def _paint(axes: Axes, timeline: Timeline, boxes: Boxes, bands: Bands, scale: Scale) -> None:
    """The rows as one image, pixel for pixel of the paper, with a pixel's gap between rows that are high enough."""
    rows, pixels = row_count(timeline), scale.row_pixels
    fold = _fold(len(timeline.mesh_devices))
    columns = round(scale.width_inches * DPI)
    image = np.ones((rows, pixels, columns, 3))
    columns_per_second = columns / scale.longest_seconds
    end_column = timeline.makespan_seconds * columns_per_second
    background = np.ones((rows, columns, 3))
    idle = np.clip(end_column - np.arange(columns), 0.0, 1.0)[:, None]
    background[:] = np.array(to_rgb(ROW_BACKGROUND)) * idle + (1 - idle)
    colours = _colours(boxes)
    for which, band in _places(boxes, bands):
        span = boxes.start_seconds[which] * columns_per_second, boxes.end_seconds[which] * columns_per_second
        ground = background if band is bands.work else np.ones_like(background)
        if fold > 1:  # a row of several meshes is their mean
            layers = [
                painted(
                    (rows, columns),
                    boxes.mesh[which][mine] // fold,
                    span[0][mine],
                    span[1][mine],
                    colours[which][mine],
                    ground,
                )
                for k in range(fold)
                if (mine := boxes.mesh[which] % fold == k) is not None
            ]
            strip = np.mean(layers, axis=0)
        else:
            strip = painted((rows, columns), boxes.mesh[which], *span, colours[which], ground)
        top, bottom = round((1 - band[1]) * pixels), max(1, round((1 - band[0]) * pixels))
        image[:, top:bottom] = strip[:, None]
    extent = (0.0, scale.longest_seconds * scale.per_second, 0.0, float(rows))
    whole = image.reshape(rows * pixels, columns, 3)
    axes.imshow(whole, extent=extent, aspect="auto", interpolation="nearest", origin="upper")


def _draw_memory(axes: Axes, timeline: Timeline, band: tuple[float, float], scale: Scale) -> None:
    """What each mesh holds as a grey area, the highest peak of all as full height, and a mark at that peak."""
    most = max(timeline.peak_bytes, default=0.0)
    if not most:
        return
    rows, columns = row_count(timeline), round(scale.width_inches * DPI)
    end = timeline.makespan_seconds
    edges = np.linspace(0.0, end, columns + 1) * scale.per_second
    for mesh, steps in enumerate(timeline.live_bytes):
        seconds, held = (np.array(column) for column in zip(*steps, strict=True))
        base = rows - 1 - mesh + band[0]
        height = highest(columns, seconds, held, end) / most * (band[1] - band[0])
        axes.stairs(base + height, edges, baseline=base, fill=True, color=MEMORY, linewidth=0)
    worst = int(np.argmax(timeline.peak_bytes))
    when = max(timeline.live_bytes[worst], key=lambda step: step[1])[0] * scale.per_second
    axes.plot([when], [rows - 1 - worst + band[1]], marker="v", markersize=5, color="#B3261E", zorder=4, clip_on=False)


def _number(axes: Axes, boxes: Boxes, top: float, share: float, scale: Scale) -> None:
    """Write the micro-batch into the boxes, all in the one size that nine of ten allow, or not at all."""
    chosen = np.flatnonzero(boxes.computes & ~boxes.beside)
    if not len(chosen) or len(chosen) > MOST_LABELS:
        return
    words = [str(number) for number in boxes.microbatch[chosen].tolist()]
    inches = boxes.seconds[chosen] * scale.inches_per_second
    room = 72 * inches / (0.62 * np.array([len(text) for text in words]) + 0.3)
    points = min(9.5, scale.row_inches * 72 * share * 0.62, float(np.sort(room)[len(room) // 10]))
    if points < LEAST_POINTS:
        return
    middle = (boxes.start_seconds + boxes.end_seconds)[chosen] / 2 * scale.per_second
    dark = KINDS.index(COMPUTES[2])
    for k, text in enumerate(words):
        if room[k] >= 0.9 * points:  # the allowance for a digit's width is generous
            box = chosen[k]
            ink = "white" if boxes.kind[box] == dark and boxes.pale[box] < 0.25 else INK
            height = top - boxes.mesh[box]
            axes.text(
                middle[k], height, text, ha="center", va="center_baseline", fontsize=points, color=ink, clip_on=True
            )


def _name_rows(axes: Axes, names: Sequence[str], middle: float, scale: Scale) -> None:
    """Name every row, or every second, fourth, eighth … where names would touch."""
    every = 1
    while every * scale.row_inches < NAME_INCHES and every < len(names):
        every *= 2
    shown = range(0, len(names), every)
    axes.set_yticks([len(names) - 1 - row + middle for row in shown], [names[row] for row in shown])
    axes.tick_params(axis="y", length=0, colors=INK, labelsize=min(9.0, every * scale.row_inches * 72 * 0.6))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FRAME)
