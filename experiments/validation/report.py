"""Sources as a table for eyes, as Markdown, and as pictures."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.validation.evaluate import Source
from experiments.validation.rows import DataError
from experiments.validation.score import bias_percent, mape_percent, spearman

HEADS = ("source", "rows", "refused", "MAPE %", "bias %", "Spearman", "regret %", "groups", "memory MAPE %")
BAND = 0.2  # drawn beside the line of equality


def table(sources: Sequence[Source]) -> list[tuple[str, ...]]:
    """The numbers of each source as text, under their heads."""
    return [HEADS, *(_cells(source) for source in sources)]


def plain(sources: Sequence[Source]) -> str:
    """The table in columns, then what was refused and what was assumed."""
    lines = table(sources)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in lines
    ]
    return "\n".join([*shown, "", *_notes(sources, "")])


def markdown(sources: Sequence[Source], command: str) -> str:
    """The same as a page with the pictures."""
    head, *rows = table(sources)
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]
    pictures = [f"![{source.name}]({picture_name(source)})" for source in sources if source.results]
    parts = ["# Predicted against measured", "", f"    {command}", "", *lines, "", *_notes(sources, "- ")]
    return "\n".join([*parts, "", *pictures, ""])


def picture_name(source: Source) -> str:
    """A file's name that any system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", source.name).strip(".") + ".png"


def _cells(source: Source) -> tuple[str, ...]:
    numbers = source.to_data()
    regret, groups = source.regret
    return (
        source.name,
        str(numbers["rows"]),
        str(numbers["refused"]),
        _number(mape_percent(source.predicted, source.measured)),
        _number(bias_percent(source.predicted, source.measured), "+.1f"),
        _number(spearman(source.predicted, source.measured), ".3f"),
        _number(regret),
        str(groups),
        _number(source.memory_mape_percent),
    )


def _number(value: float | None, form: str = ".1f") -> str:
    return "–" if value is None else format(value, form)


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
    mape = _number(mape_percent(source.predicted, source.measured))
    axes.set_title(f"{source.name}: {len(source.results)} rows, MAPE {mape} %, band ±{BAND:.0%}")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def write(sources: Sequence[Source], folder: Path, command: str) -> list[Path]:
    """``validation.md`` and a picture of each source with predictions.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page = folder / "validation.md"
        page.write_text(markdown(sources, command), encoding="utf-8")
        pictures = [(source, folder / picture_name(source)) for source in sources if source.results]
        for source, path in pictures:
            draw(source, path)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from None
    return [page, *(path for _, path in pictures)]
