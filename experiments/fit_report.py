"""A page with a picture per fit: the model beside what was measured, and how the errors spread."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np

from meshwright.calibrate.fit import residual_of

mpl.use("Agg")
from matplotlib import pyplot as plt

MOST_DRAWN = 3000  # points of a picture; more hide one another


class Series(NamedTuple):
    """Measured and modelled times of one curve or table; ``x`` is None where no one number stands for a point."""

    name: str
    x: np.ndarray | None
    measured_seconds: np.ndarray
    model_seconds: np.ndarray


class Picture(NamedTuple):
    """One picture: series that belong together, and what their common x axis is."""

    title: str
    x_name: str
    series: tuple[Series, ...]


def write_report(folder: Path, title: str, command: str, pictures: Sequence[Picture]) -> None:
    """Write ``index.md`` and a PNG per picture into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", f"Made by `{command}`. Errors are |model / measured - 1|.", ""]
    for picture in pictures:
        file = "".join(letter if letter.isalnum() else "_" for letter in picture.title.lower()) + ".png"
        _draw(picture, folder / file)
        lines += [f"## {picture.title}", "", "| curve | mean | error |", "|---|---|---|"]
        for one in picture.series:
            mean = float(np.mean(np.abs(one.model_seconds / one.measured_seconds - 1)))
            lines.append(f"| {one.name} | {mean:.1%} | {residual_of(one.model_seconds, one.measured_seconds)} |")
        lines += ["", f"![{picture.title}]({file})", ""]
    (folder / "index.md").write_text("\n".join(lines), encoding="utf-8")


def _draw(picture: Picture, path: Path) -> None:
    """Left: times over x (or model over measured); right: the histogram of log2(model / measured)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2))
    edges = np.linspace(-0.5, 0.5, 51)
    for number, one in enumerate(picture.series):
        colour = f"C{number % 10}"
        step = max(1, len(one.measured_seconds) // MOST_DRAWN)
        measured, model = one.measured_seconds[::step] * 1e3, one.model_seconds[::step] * 1e3
        if one.x is None:
            left.plot(measured, model, ".", ms=2, color=colour, label=one.name)
        else:
            order = np.argsort(one.x[::step], kind="stable")
            left.plot(one.x[::step][order], measured[order], ".", ms=5, color=colour)
            left.plot(one.x[::step][order], model[order], "-", lw=1, color=colour, label=one.name)
        ratio = np.clip(np.log2(one.model_seconds / one.measured_seconds), edges[0], edges[-1])
        right.hist(ratio, edges, histtype="step", color=colour)
    if picture.series[0].x is None:
        ends = [min(left.get_xlim()[0], left.get_ylim()[0]), max(left.get_xlim()[1], left.get_ylim()[1])]
        ends[0] = max(ends[0], min(float(one.measured_seconds.min()) for one in picture.series) * 1e3 / 2)
        left.plot(ends, ends, "-", lw=0.5, color="black")
    left.set(xscale="log", yscale="log", xlabel=picture.x_name, ylabel="ms", title=picture.title)
    left.legend(fontsize=7)
    right.axvline(0, lw=0.5, color="black")
    right.set(xlabel="log2(model / measured), ends gathered", ylabel="points")
    figure.savefig(path, dpi=80)
    plt.close(figure)
