"""All rows of a file → predictions beside measurements, source by source, and what was refused."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from experiments.validation.cases import Case, read_case
from experiments.validation.rows import Refused, Row
from experiments.validation.score import bias_percent, mape_percent, regret_percent, spearman
from meshwright.errors import MeshwrightError
from meshwright.simulate.workload.predict import predict_grid


@dataclass(frozen=True, slots=True)
class Result:
    """One row as it was predicted."""

    case: Case
    predicted_seconds: float
    peak_bytes: float


@dataclass(frozen=True)
class Source:
    """The rows of one source: those predicted, and how many were refused for each reason."""

    name: str
    results: tuple[Result, ...]
    refusals: Counter[str]

    @cached_property
    def predicted(self) -> list[float]:
        """Seconds of a step."""
        return [result.predicted_seconds for result in self.results]

    @cached_property
    def measured(self) -> list[float]:
        """Seconds of a step."""
        return [result.case.measured_seconds for result in self.results]

    @property
    def regret(self) -> tuple[float | None, int]:
        """Regret in percent, and of how many groups it is the mean."""
        return regret_percent([result.case.group for result in self.results], self.predicted, self.measured)

    @property
    def memory_mape_percent(self) -> float | None:
        """Error of the peak memory where the row has it (a framework's caches and context are not predicted)."""
        known = [(result.peak_bytes, result.case.row.positive("mem_gib")) for result in self.results]
        pairs = [(peak, held * 2**30) for peak, held in known if held is not None]
        return mape_percent(*zip(*pairs, strict=True)) if pairs else None

    @property
    def assumptions(self) -> Counter[str]:
        """What was taken for granted, and for how many rows."""
        return Counter(text for result in self.results for text in result.case.assumed)

    def to_data(self) -> dict[str, object]:
        """The numbers of ``--json``."""
        return {
            "source": self.name,
            "rows": len(self.results),
            "refused": self.refusals.total(),
            "mape_percent": mape_percent(self.predicted, self.measured),
            "bias_percent": bias_percent(self.predicted, self.measured),
            "spearman": spearman(self.predicted, self.measured),
            "regret_percent": self.regret[0],
        }


def evaluate(rows: Iterable[Row], report: Callable[[str], None]) -> tuple[Source, ...]:
    """Predict every row that can be; sources stand in the order of the file.

    ``report`` hears of the first row of each source that is refused for a reason.
    """
    results: dict[str, list[Result]] = {}
    refusals: dict[str, Counter[str]] = {}
    for row in rows:
        name = row.text("source_id") or "(no source_id)"
        results.setdefault(name, [])
        refused = refusals.setdefault(name, Counter())
        try:
            results[name].append(predict_row(row))
        except Refused as refusal:
            if refusal.detail and not refused[refusal.reason]:
                report(f"{name}: refused: {refusal}")
            refused[refusal.reason] += 1
    return tuple(Source(name, tuple(found), refusals[name]) for name, found in results.items())


def predict_row(row: Row) -> Result:
    """One row predicted.

    Raises:
        Refused: something is missing in it or cannot be expressed.
    """
    case = read_case(row)
    try:
        prediction = predict_grid(case.model, case.cluster, case.grid, case.stack)
    except MeshwrightError as error:
        raise Refused("the grid cannot be simulated", f"line {row.line}: {error}") from None
    return Result(case, prediction.iteration_seconds, prediction.peak_bytes)
