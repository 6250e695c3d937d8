"""Sources as a table for eyes, as Markdown, and as pictures."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.validation.evaluate import Source
from experiments.validation.rows import DataError

HEADS = ("source", "rows", "refused", "MAPE %", "bias %", "Spearman", "regret %", "groups", "memory MAPE %")
HELD_OUT_HEADS = ("held out of", "rows", "of", *HEADS[3:])
BAND = 0.2  # drawn beside the line of equality


def table(sources: Sequence[Source]) -> list[tuple[str, ...]]:
    """The numbers of each source as text, under their heads."""
    return [HEADS, *((source.name, *_counts(source), *_cells(source)) for source in sources)]


def held_out_table(sources: Sequence[Source]) -> list[tuple[str, ...]]:
    """The same of the halves that no constant was fitted to."""
    chosen = [source for source in sources if source.held_out.results]
    cells = [
        (source.name, str(len(source.held_out.results)), str(len(source.results)), *_cells(source.held_out))
        for source in chosen
    ]
    return [HELD_OUT_HEADS, *cells]


def plain(sources: Sequence[Source], split: str) -> str:
    """The tables in columns, the constants that were fitted, then what was refused and what was assumed."""
    tables = [*_columns(table(sources)), "", f"{split}:", *_columns(held_out_table(sources))]
    return "\n".join([*tables, "", *_fits(sources, ""), *_notes(sources, "")])


def markdown(sources: Sequence[Source], command: str, split: str) -> str:
    """The same as a page with the pictures."""
    pictures = [f"![{source.name}]({picture_name(source)})" for source in sources if source.results]
    parts = ["# Predicted against measured", "", f"    {command}", "", *_ruled(table(sources))]
    parts += ["", f"{split}:", "", *_ruled(held_out_table(sources)), ""]
    parts += [*_fits(sources, "- "), *_notes(sources, "- ")]
    return "\n".join([*parts, "", *pictures, ""])


def _columns(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in lines
    ]


def _ruled(lines: Sequence[tuple[str, ...]]) -> list[str]:
    head, *rows = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def picture_name(source: Source) -> str:
    """A file's name that any system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", source.name).strip(".") + ".png"


def _counts(source: Source) -> tuple[str, str]:
    return str(len(source.results)), str(source.refusals.total())


def _cells(source: Source) -> tuple[str, ...]:
    scores = source.scores
    return (
        _number(scores["mape_percent"]),
        _number(scores["bias_percent"], "+.1f"),
        _number(scores["spearman"], ".3f"),
        _number(scores["regret_percent"]),
        str(source.regret[1]),
        _number(scores["memory_mape_percent"]),
    )


def _number(value: float | None, form: str = ".1f") -> str:
    return "–" if value is None else format(value, form)


def _fits(sources: Sequence[Source], bullet: str) -> Iterator[str]:
    for source in sources:
        for (system, stack), fit in source.fits.items():
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in fit.constants.items() if name in fit.ranges)
            yield f"{bullet}{system}, {stack}: {numbers} (from {fit.rows} rows, MAPE {fit.mape_percent:.1f} %)"


def _notes(sources: Sequence[Source], bullet: str) -> Iterator[str]:
    for source in sources:
        for what, counted in (("refused", source.refusals), ("assumed", source.assumptions)):
            if counted:
                reasons = "; ".join(f"{reason} ({count})" for reason, count in counted.most_common())
                yield f"{bullet}{source.name}, {what}: {reasons}"


def draw(source: Source, path: Path) -> None:
    """Predicted over measured seconds, both logarithmic, one point a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low = min(*source.measured, *source.predicted) / 1.25
    high = max(*source.measured, *source.predicted) * 1.25
    line = [low, high]
    axes.fill_between(line, [x * (1 - BAND) for x in line], [x * (1 + BAND) for x in line], color="0.92")
    axes.plot(line, line, color="0.5", linewidth=1)
    kinds = sorted({result.case.row.text("hardware") for result in source.results})
    for kind in kinds:
        chosen = [result for result in source.results if result.case.row.text("hardware") == kind]
        axes.scatter(
            [result.case.measured_seconds for result in chosen],
            [result.predicted_seconds for result in chosen],
            s=14,
            alpha=0.6,
            linewidths=0,
            label=f"{kind} ({len(chosen)})",
        )
    axes.set(xscale="log", yscale="log", xlim=line, ylim=line, aspect="equal")
    axes.set_xlabel("measured step, seconds")
    axes.set_ylabel("predicted step, seconds")
    mape = _number(source.scores["mape_percent"])
    axes.set_title(f"{source.name}: {len(source.results)} rows, MAPE {mape} %, band ±{BAND:.0%}")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def write(sources: Sequence[Source], folder: Path, command: str, split: str) -> list[Path]:
    """``validation.md`` and a picture of each source with predictions.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page = folder / "validation.md"
        page.write_text(markdown(sources, command, split), encoding="utf-8")
        pictures = [(source, folder / picture_name(source)) for source in sources if source.results]
        for source, path in pictures:
            draw(source, path)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from None
    return [page, *(path for _, path in pictures)]
