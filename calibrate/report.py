"""A calibration as one page: a table of all fits, and a picture of each with its measurements and residuals."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from meshwright.calibrate.assemble import STREAMS, Calibration
from meshwright.calibrate.fit import Residual, residual_of
from meshwright.calibrate.hardware import Quantity
from meshwright.calibrate.link_fit import curves, fit_curve
from meshwright.calibrate.timing import ATTENTION, CONVOLUTION, COPY, MATMUL, MEMORY, Timing
from meshwright.errors import ClusterError
from meshwright.simulate.compute import matmul_seconds

PAGE = "calibration.md"
MEASURED, MODEL = "#1f77b4", "#d62728"


@dataclass(frozen=True, slots=True)
class Picture:
    """One fit to draw: its measurements, the model's time for each, and in words what the model is."""

    name: str
    timings: tuple[Timing, ...]
    model_seconds: tuple[float, ...]
    unit: str  # of the timings' amounts
    how: str

    @property
    def residual(self) -> Residual:
        return residual_of(self.model_seconds, [timing.seconds for timing in self.timings])


def write_report(calibration: Calibration, folder: Path) -> Path:
    """Write the page and its pictures, and return the page's path; the folder is made where it is missing.

    Raises:
        ClusterError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = pictures(calibration)
        for picture in found:
            draw(picture).savefig(folder / file_name(picture.name), dpi=90)
        page = folder / PAGE
        page.write_text(page_text(calibration, found), "utf-8")
    except OSError as error:
        raise ClusterError(f"--report {folder}: cannot be written ({error.strerror}); choose another folder") from None
    return page


def pictures(calibration: Calibration) -> list[Picture]:
    """Every fit of the calibration with the measurements behind it."""
    device = calibration.cluster.hosts[0].device
    families: dict[str, list[Timing]] = {}
    for timing in calibration.compute.timings:
        families.setdefault(timing.family, []).append(timing)
    fits = {row.name: row.fit for row in calibration.fits if row.ranks == 1}
    found = []
    for dtype, choice in calibration.matmuls.items():
        timings = families[MATMUL + dtype]
        if choice.fit is None:
            seconds = [fits[f"{MATMUL}{dtype}"].seconds(timing.amount) for timing in timings]
        else:
            seconds = [
                matmul_seconds(device, m, n, k, dtype, batch) for batch, m, n, k in (each.shape for each in timings)
            ]
        found.append(_picture(f"{MATMUL}{dtype}", timings, seconds, "FLOP", str(choice)))
    streams = [timing for timing in calibration.compute.timings if timing.family in STREAMS]
    seconds = [fits["memory-bound"].seconds(timing.amount) for timing in streams]
    found.append(_picture("memory-bound", streams, seconds, "byte", "one line for additions, sums, chains and Adam"))
    for family, timings in sorted(families.items()):
        if family.startswith((MEMORY, ATTENTION, CONVOLUTION, COPY)) and family in fits:
            unit = "FLOP" if family.startswith((ATTENTION, CONVOLUTION)) else "byte"
            seconds = [fits[family].seconds(timing.amount) for timing in timings]
            found.append(_picture(family, timings, seconds, unit, "a start-up time and a rate"))
    return found + _link_pictures(calibration)


def _link_pictures(calibration: Calibration) -> list[Picture]:
    found = []
    for (family, ranks, stride, groups), timings in curves(
        calibration.network.timings if calibration.network else ()
    ).items():
        if len({timing.amount for timing in timings}) > 1:
            entry, _ = fit_curve(timings, "report")
            seconds = [entry.seconds(timing.amount) for timing in timings]
            name = f"{family} of {ranks} ranks" + (f" stride {stride}" if stride > 1 else "")
            name += f" x{groups}" if groups > 1 else ""
            how = f"the least of {1 + len(entry.pieces)} straight piece(s)"
            found.append(_picture(name, timings, seconds, "byte", how))
    return found


def _picture(name: str, timings: Sequence[Timing], seconds: Sequence[float], unit: str, how: str) -> Picture:
    order = sorted(range(len(timings)), key=lambda place: timings[place].amount)
    ordered = tuple(timings[place] for place in order)
    return Picture(name, ordered, tuple(float(seconds[place]) for place in order), unit, how)


def draw(picture: Picture) -> Figure:
    """Left, times over size with their spread and the model; right, how far each is from it."""
    amounts = np.array([timing.amount for timing in picture.timings])
    middle = np.array([timing.seconds for timing in picture.timings])
    spread = np.array([[t.seconds - t.low_seconds, t.high_seconds - t.seconds] for t in picture.timings]).T
    figure = Figure(figsize=(10, 3.8))
    figure.subplots_adjust(0.07, 0.14, 0.98, 0.92)  # a layout that is solved for takes as long as all the drawing
    left, right = figure.subplots(1, 2)
    left.errorbar(amounts, middle * 1e6, spread * 1e6, fmt="o", ms=4, lw=1, color=MEASURED, label="measured, spread")
    left.plot(amounts, np.array(picture.model_seconds) * 1e6, "x", color=MODEL, label="fit")
    left.set(xscale="log", yscale="log", xlabel=picture.unit, ylabel="µs", title=picture.name)
    left.legend(frameon=False)
    off = np.log2(middle / picture.model_seconds)
    right.axhline(0, color="0.6", lw=1)
    right.plot(amounts, off, "o", ms=4, color=MEASURED)
    bound = max(1.0, float(np.abs(off).max()) * 1.1)
    right.set(xscale="log", ylim=(-bound, bound), xlabel=picture.unit, ylabel="log2(measured / fit)")
    right.set_title(f"median {picture.residual.median:.0%}, p90 {picture.residual.p90:.0%}")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def page_text(calibration: Calibration, found: Sequence[Picture]) -> str:
    """The page: the device's numbers with their ranges, a row for each fit, then the pictures."""
    device = calibration.cluster.hosts[0].device
    numbers: dict[str, Quantity] = {
        "memory_bytes": device.memory_bytes,
        **{f"{dtype}_flops_per_second": rate for dtype, rate in device.flops_per_second.items()},
        "matmul_efficiency": device.matmul_efficiency,
        "memory_bytes_per_second": device.memory_bytes_per_second,
        "launch_seconds": device.launch_seconds,
        "dispatch_seconds": device.dispatch_seconds,
    }
    lines = [f"# {calibration.cluster.name}", "", f"{device.name}.", ""]
    lines += [f"- {note}" for note in calibration.cluster.notes]
    lines += ["", "| number | value | low | high |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {number.value:.4g} | {_or_dash(number.low)} | {_or_dash(number.high)} |"
        for name, number in numbers.items()
    ]
    lines += ["", "10 % and 90 % are quantiles of log(measured / fit).", ""]
    lines += ["| fit | points | median error | p90 | 10 % | 90 % | form |", "|---|---|---|---|---|---|---|"]
    for picture in found:
        left = picture.residual
        signed = f"{left.low or 0:+.2f} | {left.high or 0:+.2f}"
        lines.append(
            f"| {picture.name} | {left.points} | {left.median:.1%} | {left.p90:.1%} | {signed} | {picture.how} |"
        )
    for picture in found:
        lines += ["", f"![{picture.name}: times and residuals]({file_name(picture.name)})"]
    return "\n".join(lines) + "\n"


def file_name(name: str) -> str:
    """``matmul f32`` as ``matmul_f32.png``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".png"


def _or_dash(number: float | None) -> str:
    return "–" if number is None else f"{number:.4g}"
