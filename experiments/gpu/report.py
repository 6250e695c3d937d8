"""Tables of the results, made from ``results.json``: ``python -m experiments.gpu.report`` writes them into docs/gpu.md.

Results that are committed lie in ``results/DATE-DEVICE/``. Without any, the page says that nothing was measured.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "experiments" / "gpu" / "results"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN = "<!-- made by python -m experiments.gpu.report: do not edit -->"
END = "<!-- end of what is made -->"
NOTHING = "No GPU has been at hand so far: there are no results, and nothing is claimed about GPUs."
VARIANTS = {"xla": "plain JAX", "cudnn": "plain JAX, cuDNN attention", "zoo": "the zoo's loss under `jit`"}
Results = Mapping[str, Any]


def markdown(results: Results) -> str:
    """One machine's tables; parts that were not measured are named with the reason."""
    parts = [_head(results), _calibration(results), _training(results), _plain(results), _pipeline(results)]
    return "\n\n".join(part for part in (*parts, _not_done(results)) if part) + "\n"


def page_part(folders: Iterable[Path]) -> str:
    """What stands between the two marks of the page: every committed result, the newest first."""
    parts = []
    for folder in sorted(folders, reverse=True):
        results = json.loads((folder / "results.json").read_text("utf-8"))
        parts.append(f"### {folder.name}\n\n{markdown(results)}")
    return "\n".join(parts) if parts else NOTHING + "\n"


def renewed(page: str, part: str) -> str:
    """The page with its made part replaced. Errors: ValueError if the marks are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page lacks the marks {BEGIN!r} and {END!r}, between which the tables go")
    return f"{before}{begin}\n\n{part}\n{end}{after}"


def committed(folder: Path = COMMITTED) -> list[Path]:
    """The folders of results that are committed."""
    return [path.parent for path in folder.glob("*/results.json")]


def main() -> int:
    """Renew the page."""
    PAGE.write_text(renewed(PAGE.read_text("utf-8"), page_part(committed())), "utf-8")
    return 0


# --- the parts ------------------------------------------------------------------------------------------------------


def _head(results: Results) -> str:
    run = results["runs"][-1]
    machine = run["environment"]
    gpus = [", ".join(f"{key} {value}" for key, value in gpu.items()) for gpu in machine["gpu"]]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        *(["**Tiny models, made to try the script: these figures mean nothing.**", ""] if results["tiny"] else []),
        f"Device: {'; '.join(gpus) or 'no GPU'}; {machine['cores']} cores.",
        f"Software: Python {machine['python']}, {versions}; commit {machine['commit'] or 'unknown'}.",
        *(f"Command, {run['date']}: `{run['command']}`" for run in results["runs"]),
    ]
    return "\n".join(lines)


def _calibration(results: Results) -> str:
    found = _result(results, "calibrate")
    if found is None:
        return ""
    rows = [
        [name, _number(q["value"]), f"{_number(q['low'])} to {_number(q['high'])}" if q["low"] is not None else ""]
        for name, q in found["quantities"].items()
    ]
    return "Calibrated device, " + found["device"] + ":\n\n" + _table(["quantity", "value", "range"], rows)


def _training(results: Results) -> str:
    rows = []
    for model, found in _of_phase(results, "train"):
        predicted, measured = found["predicted"], found["measured"]
        rows.append(
            [
                f"{model}, batch {found['plan']['batch']}",
                f"{found['plan']['microbatches']}, {found['plan']['remat']}",
                _milliseconds(predicted["iteration_seconds"]),
                _measured(measured),
                _error(predicted["iteration_seconds"], measured["median_seconds"]),
                _gigabytes(predicted["peak_memory_bytes"]),
                _gigabytes(found["executor_peak_bytes"]),
                _error(predicted["peak_memory_bytes"], found["executor_peak_bytes"]),
                _gigabytes(found["allocator"]["after_steps"].get("peak_bytes_in_use")),
            ]
        )
    head = ["trained by us", "micro-batches, remat", "predicted ms", "measured ms (quartiles)", "error"]
    head += ["predicted GB", "measured GB", "error", "allocator's peak GB"]
    note = (
        "\n\nMeasured memory is the executor's live arrays plus XLA's temporaries; the allocator's peak is of the "
        "whole process, what XLA tried while compiling included."
    )
    return _table(head, rows) + note if rows else ""


def _plain(results: Results) -> str:
    rows = []
    ours_of = dict(_of_phase(results, "train"))
    for name, found in _of_phase(results, "mfu"):
        ours = ours_of.get(name.rpartition(" ")[0])
        ratio = ours["measured"]["median_seconds"] / found["measured"]["median_seconds"] if ours else None
        rows.append(
            [
                f"{name.rpartition(' ')[0]}, batch {found['batch']}",
                VARIANTS[found["variant"]],
                _measured(found["measured"]),
                _percent(found["mfu"]),
                _percent(ours["mfu"]) if ours else "",
                f"{ratio:.2f}" if ratio else "",
            ]
        )
    if not rows:
        return ""
    sources = {found["mfu_peak"]["source"]: found["mfu_peak"] for _, found in _of_phase(results, "mfu")}
    peaks = "; ".join(f"{(peak['flops_per_second'] or 0) / 1e12:.4g} TFLOP/s, {name}" for name, peak in sources.items())
    head = ["model", "beside us", "ms (quartiles)", "its MFU", "our MFU", "our time / its time"]
    return _table(head, rows) + f"\n\nMFU counts model FLOPs, recomputation left out, over {peaks}."


def _pipeline(results: Results) -> str:
    rows = []
    for model, found in _of_phase(results, "pipeline"):
        predicted, measured = found["predicted"], found["measured"]
        rows.append(
            [
                f"{model}, batch {found['plan']['batch']}",
                f"{found['plan']['microbatches']}, {found['plan']['schedule']}",
                _milliseconds(predicted["iteration_seconds"]),
                _measured(measured),
                _error(predicted["iteration_seconds"], measured["median_seconds"]),
                _gigabytes(predicted["peak_memory_bytes"]),
                _gigabytes(found["executor_peak_bytes"]),
                f"{found['link_bytes_per_second'] / 1e9:.3g} GB/s, {found['link_latency_seconds'] * 1e6:.3g} µs",
                f"{found['busy_slowdown']:.2f}",
            ]
        )
    head = ["two ranks on one device", "micro-batches, schedule", "predicted ms", "measured ms (quartiles)", "error"]
    head += ["predicted GB", "measured GB", "link, host-staged", "slowdown of a rank beside the other"]
    return _table(head, rows) if rows else ""


def _not_done(results: Results) -> str:
    open_jobs = [(name, job) for name, job in results["jobs"].items() if job["status"] != "done"]
    lines = [f"- {name}: {job['status']}, {job['reason']}" for name, job in open_jobs]
    return "Not measured:\n\n" + "\n".join(lines) if lines else ""


def _result(results: Results, name: str) -> Any:
    job = results["jobs"].get(name, {})
    return job["result"] if job.get("status") == "done" else None


def _of_phase(results: Results, phase: str) -> list[tuple[str, Any]]:
    """(The job's name without its phase, its result) of each job that is done."""
    names = [name for name in results["jobs"] if name.startswith(phase + " ")]
    return [(name.removeprefix(phase + " "), found) for name in names if (found := _result(results, name)) is not None]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _measured(spread: Mapping[str, float]) -> str:
    low, high = _milliseconds(spread["low_seconds"]), _milliseconds(spread["high_seconds"])
    return f"{_milliseconds(spread['median_seconds'])} ({low} to {high})"


def _error(predicted: float, measured: float) -> str:
    return f"{predicted / measured - 1:+.1%}"


def _gigabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.4g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
