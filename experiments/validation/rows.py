"""A CSV of measured training steps → rows with numbers, and why others cannot be used."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from meshwright.errors import MeshwrightError

NEEDED = ("source_id", "hardware", "gpus", "framework", "layers", "hidden", "heads", "seq", "gbs", "tp", "pp")
MEASURES = ("iter_time_s", "tokens_per_s", "tokens_per_s_gpu", "samples_per_s_gpu")
MOST = {"gpus": 10**5, "layers": 10**4, "vp": 10**3}  # of what the simulator lists one by one; more is a slip
MOST_COUNT = 10**9  # of everything else


class DataError(MeshwrightError):
    """The file cannot be read as a table of measured steps."""


class Refused(Exception):  # noqa: N818 (it is an answer, not a fault)
    """One row cannot be predicted; ``reason`` is counted, ``detail`` shown for the first of its kind."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file: text by column, read as numbers when they are asked for."""

    line: int
    cells: dict[str, str]

    def text(self, column: str) -> str:
        """The cell without surrounding blanks; empty where the column is missing."""
        return self.cells.get(column, "")

    def count(self, column: str, default: int | None = None) -> int:
        """A whole number of at least 1; ``default`` where the cell is empty.

        Raises:
            Refused: the cell is empty without a default, or holds something else.
        """
        text = self.text(column)
        if not text:
            if default is None:
                raise Refused(f"no {column}")
            return default
        number = self._number(column, text)
        most = MOST.get(column, MOST_COUNT)
        if number != int(number) or not 1 <= number <= most:
            need = f"a whole number from 1 to {most:,} is needed"
            raise Refused(f"impossible {column}", f"line {self.line} has {text!r}; {need}")
        return int(number)

    def positive(self, column: str) -> float | None:
        """A number above zero; None where the cell is empty.

        Raises:
            Refused: the cell holds something else.
        """
        text = self.text(column)
        if not text:
            return None
        number = self._number(column, text)
        if number <= 0:
            raise Refused(f"impossible {column}", f"line {self.line} has {text!r}; a number above 0 is needed")
        return number

    def _number(self, column: str, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not isfinite(number):
            raise Refused(f"impossible {column}", f"line {self.line} has {text!r}, which is no number")
        return number


def read_rows(path: Path) -> list[Row]:
    """All rows of a file.

    Raises:
        DataError: it cannot be read, is empty, or lacks a column that is needed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); give the path of a CSV file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not text in UTF-8; give the path of a CSV file") from None
    try:
        rows = list(_rows(path, text))
    except csv.Error as error:
        raise DataError(f"{path}: is not a CSV file ({error})") from None
    if not rows:
        raise DataError(f"{path}: has no rows below its header; give a file with at least one measured step")
    return rows


def _rows(path: Path, text: str) -> Iterator[Row]:
    lines = csv.reader(text.splitlines())
    header = [name.strip() for name in next(lines, [])]
    if not any(header):
        raise DataError(f"{path}: is empty; its first line names the columns {', '.join(NEEDED)} and others")
    missing = [name for name in NEEDED if name not in header]
    if missing:
        raise DataError(f"{path}: lacks the columns {', '.join(missing)}; its first line must name them")
    if not any(name in header for name in MEASURES):
        raise DataError(f"{path}: has no measured time; one of the columns {', '.join(MEASURES)} is needed")
    for line, cells in enumerate(lines, start=2):
        if any(cell.strip() for cell in cells):
            yield Row(line, {name: cell.strip() for name, cell in zip(header, cells, strict=False)})


def measured_seconds(row: Row) -> tuple[float, str]:
    """Seconds of the measured step, and the column they come from.

    Raises:
        Refused: the step did not end well, or its time cannot be told.
    """
    status = row.text("status")
    if status.lower() not in ("", "ok"):
        raise Refused(f"status {status}")
    seconds = row.positive("iter_time_s")
    if seconds is not None:
        return seconds, "iter_time_s"
    for column, devices, per_sample in (
        ("tokens_per_s", 1, True),
        ("tokens_per_s_gpu", row.count("gpus"), True),
        ("samples_per_s_gpu", row.count("gpus"), False),
    ):
        rate = row.positive(column)
        if rate is not None:
            items = batch_size(row) * (row.count("seq") if per_sample else 1)
            return items / (rate * devices), column
    raise Refused("no measured time")


def batch_size(row: Row) -> int:
    """Sequences of a step; where the file does not say, one micro-batch for each data-parallel rank."""
    if row.text("gbs"):
        return row.count("gbs")
    if row.text("mbs") and row.text("dp") and row.count("pp", 1) == 1:
        return row.count("mbs") * row.count("dp")
    raise Refused("no gbs")
