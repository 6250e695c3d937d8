"""Each rival's cases as rows of one table."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.rivals import aceso, aceso_costs, alpa, galvatron, galvatron_costs, piper
from meshwright.errors import ModelError

_PIPER_DEVICES = (8, 64, 512, 1024)
_GALVATRON = (("m36_b16", 16, 36), ("m38_b64", 64, 38))
_ALPA = {16: "GPT-6.7B", 8: "GPT-2.6B"}  # the models that were run on so many GPUs


@dataclass(frozen=True, slots=True)
class Row:
    """One case: predicted seconds by the rival's own terms, and how long either searched.

    ``repriced_seconds`` is our figure for the rival's own plan: what tells whether the terms are the same. For Alpa,
    ``theirs`` and ``ours`` are two predictions of one plan, and ``measured_seconds`` is what it took.
    """

    rival: str
    case: str
    theirs_seconds: float
    ours_seconds: float
    repriced_seconds: float | None = None
    measured_seconds: float | None = None
    their_search_seconds: float | None = None
    our_search_seconds: float | None = None

    def facts(self) -> dict[str, float | str | None]:
        """For ``--json``."""
        return asdict(self)


def piper_rows(data: Path) -> Iterator[Row]:
    """Time per sample of the slowest stage of BERT-32."""
    graph = piper.read_graph(data / "graphs" / "bert32a100.json")
    runs = piper.reference_runs(data / "rivals" / "piper_bert32.json")
    for devices in _PIPER_DEVICES:
        theirs, answer = runs[devices], piper.plan(graph, devices)
        repriced = max(
            piper.stage_seconds(graph, nodes, stage["t"], stage["d"], dict.fromkeys(nodes, 0))
            for stage in theirs["plan"]
            for nodes in [frozenset(map(int, stage["nodes"].split()))]
        )
        yield Row(
            "Piper",
            f"BERT-32 on {devices}",
            theirs["max_stage_TPS_s"],
            answer.bottleneck_seconds,
            repriced_seconds=repriced,
            their_search_seconds=theirs["search_s"],
            our_search_seconds=answer.search_seconds,
        )


def galvatron_rows(data: Path) -> Iterator[Row]:
    """An iteration of Llama2-7B on eight devices."""
    folder = data / "rivals" / "galvatron"
    profile = galvatron_costs.read_profile(folder)
    for name, batch, limit_gb in _GALVATRON:
        theirs = galvatron_costs.read_summary(folder / f"rerun_summary_{name}.json")
        answer = galvatron.plan(profile, batch, limit_gb)
        yield Row(
            "Galvatron",
            f"Llama2-7B, batch {batch}, {limit_gb} GB",
            theirs.pred_iter_s,
            answer.seconds,
            repriced_seconds=galvatron_costs.plan_seconds(
                profile, galvatron_costs.read_plan(folder / f"rerun_plan_{name}.json")
            ),
            their_search_seconds=theirs.search_s,
            our_search_seconds=answer.search_seconds,
        )


def aceso_rows(data: Path) -> Iterator[Row]:
    """An iteration of each model that was profiled on V100-32GB; the inner loops compile before the first is timed."""
    cases = {}
    for case, raw in aceso_costs.read_plans(data / "rivals" / "aceso_best_plans.json").items():
        try:
            cases[case] = (raw, *aceso_costs.read_case(data / "aceso" / "v100", raw))
        except ModelError:  # the small ResNet was profiled on other hardware only
            continue
    for number, (case, (raw, profile, theirs)) in enumerate(cases.items()):
        for _ in range(2 if number == 0 else 1):
            answer = aceso.plan(profile, theirs.batch, theirs.gpus, aceso_costs.limit_mb(case))
        yield Row(
            "Aceso",
            case,
            raw["plan_pred_ms"] / 1000,
            answer.seconds,
            repriced_seconds=aceso_costs.plan_seconds(profile, theirs),
            their_search_seconds=raw["overall_search_s"],
            our_search_seconds=answer.search_seconds,
        )


def alpa_rows(data: Path) -> Iterator[Row]:
    """A step on V100-32GB under each plan that Alpa chose."""
    for gpus, model in _ALPA.items():
        for run in alpa.read_runs(data / "alpa" / "v100_32gb_gpt_search_summary.csv", gpus):
            yield Row(
                "Alpa",
                f"{model} on {gpus}, B={run.microbatches}",
                run.alpa_seconds,
                alpa.our_seconds(run),
                measured_seconds=run.measured_seconds,
            )


RIVALS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "piper": piper_rows,
    "galvatron": galvatron_rows,
    "aceso": aceso_rows,
    "alpa": alpa_rows,
}


def table(rows: Sequence[Row]) -> str:
    """The rows for a person to read; seconds throughout."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.5g}"

    head = ("rival", "case", "theirs", "repriced", "ours", "measured", "their search", "our search")
    body = [
        (
            row.rival,
            row.case,
            *map(
                cell,
                (
                    row.theirs_seconds,
                    row.repriced_seconds,
                    row.ours_seconds,
                    row.measured_seconds,
                    row.their_search_seconds,
                    row.our_search_seconds,
                ),
            ),
        )
        for row in rows
    ]
    widths = [max(len(line[n]) for line in (head, *body)) for n in range(len(head))]
    return "\n".join(
        "  ".join(
            text.ljust(w) if n < 2 else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *body)
    )
