"""All rows of a file → predictions beside measurements, source by source, and what was refused."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from experiments.validation.cases import Case
from experiments.validation.fitting import Fit, fit_constants, usual_constants
from experiments.validation.halves import FIT, HELD_OUT, halves
from experiments.validation.questions import Question
from experiments.validation.rows import Refused
from experiments.validation.score import bias_percent, mape_percent, regret_percent, spearman
from meshwright.errors import MeshwrightError
from meshwright.simulate.workload.predict import predict_grid
from meshwright.simulate.workload.stack import with_constants


@dataclass(frozen=True, slots=True)
class Result:
    """One row as it was predicted, and the half of its source that it is in."""

    case: Case
    predicted_seconds: float
    peak_bytes: float
    half: str = HELD_OUT


@dataclass(frozen=True)
class Source:
    """The rows of one source: those predicted, and how many were refused for each reason.

    ``fits`` are the constants of each system and stack, where they were fitted to the fit half of these rows.
    """

    name: str
    results: tuple[Result, ...]
    refusals: Counter[str]
    fits: Mapping[tuple[str, str], Fit] = field(default_factory=lambda: MappingProxyType({}))

    @cached_property
    def held_out(self) -> "Source":
        """The half alone that no constant was fitted to."""
        return replace(self, results=tuple(result for result in self.results if result.half == HELD_OUT))

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
            **self.scores,
            "held_out": {"rows": len(self.held_out.results), **self.held_out.scores},
        }

    @cached_property
    def scores(self) -> dict[str, float | None]:
        """How far predictions are from measurements; None where nothing can be said."""
        return {
            "mape_percent": mape_percent(self.predicted, self.measured),
            "bias_percent": bias_percent(self.predicted, self.measured),
            "spearman": spearman(self.predicted, self.measured),
            "regret_percent": self.regret[0],
            "memory_mape_percent": self.memory_mape_percent,
        }


def evaluate(
    questions: Iterable[Question], report: Callable[[str], None], *, seed: int = 0, fit: bool = False
) -> tuple[Source, ...]:
    """Predict every step that can be; sources stand in the order of the file.

    ``seed`` splits each source into halves. Constants are the shipped ones (fitted to the halves of seed 0) or, with
    ``fit``, found anew on the fit half. ``report`` hears of the first row of each source that is refused for a reason.
    """
    results: dict[str, list[Result]] = {}
    refusals: dict[str, Counter[str]] = {}
    for name, read in questions:
        results.setdefault(name, [])
        refused = refusals.setdefault(name, Counter())
        try:
            results[name].append(predict_case(read()))
        except Refused as refusal:
            if refusal.detail and not refused[refusal.reason]:
                report(f"{name}: refused: {refusal}")
            refused[refusal.reason] += 1
    sources = tuple(Source(name, in_halves(found, seed), refusals[name]) for name, found in results.items())
    return tuple(fitted(source) for source in sources) if fit else sources


def in_halves(results: Sequence[Result], seed: int) -> tuple[Result, ...]:
    """The rows of a source, each told which half it is in."""
    sides = halves([result.case.group for result in results], seed)
    return tuple(replace(result, half=side) for result, side in zip(results, sides, strict=True))


def fitted(source: Source) -> Source:
    """Predicted anew, each system and stack with the constants that its rows in the fit half ask for."""
    rows: defaultdict[tuple[str, str], list[Case]] = defaultdict(list)
    for result in source.results:
        if result.half == FIT:
            rows[result.case.system, result.case.stack.name].append(result.case)
    fits = {key: fit_constants(cases) for key, cases in rows.items()}
    again = []
    for result in source.results:
        case = result.case
        found = fits.get((case.system, case.stack.name))
        constants = usual_constants(case.stack.name) if found is None else found.constants
        again.append(
            replace(predict_case(replace(case, stack=with_constants(case.stack, constants))), half=result.half)
        )
    return replace(source, results=tuple(again), fits=fits)


def predict_case(case: Case) -> Result:
    """A case predicted.

    Raises:
        Refused: its grid cannot be simulated.
    """
    try:
        prediction = predict_grid(case.model, case.cluster, case.grid, case.stack)
    except MeshwrightError as error:
        raise Refused("the grid cannot be simulated", f"line {case.row.line}: {error}") from None
    return Result(case, prediction.iteration_seconds, prediction.peak_bytes)
