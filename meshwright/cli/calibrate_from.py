"""``meshwright calibrate --from RUN``: where a run differs from its prediction, and a machine file corrected by it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meshwright.calibrate.drift import Drift, Group, find_drift
from meshwright.calibrate.drift_correct import corrected_cluster, corrected_plan
from meshwright.calibrate.drift_fit import Parts, fit_factors, parts_of
from meshwright.calibrate.drift_report import (
    corrections,
    corrections_text,
    doubts,
    report_data,
    report_text,
    rows_of,
)
from meshwright.calibrate.drift_shares import kernel_shares
from meshwright.calibrate.hardware import Cluster, load_cluster, save_cluster
from meshwright.errors import ClusterError, ModelError
from meshwright.execute.record import Run, read_run
from meshwright.plan.planfile import Plan, seconds_text
from meshwright.plan.predict import predict


@dataclass(frozen=True, slots=True)
class Seen:
    """One run with its drift, and what its plan's costs are made of."""

    folder: str
    run: Run
    drift: Drift
    parts: Parts

    @staticmethod
    def read(folder: str) -> "Seen":
        """Read a run and hold it against its prediction."""
        run = read_run(folder)
        shares, note = shares_of(run.plan)
        if note:
            print(f"{folder}: {note}", file=sys.stderr)
        drift = find_drift(run)
        for doubt in doubts(run, drift):
            print(f"{folder}: note: {doubt}", file=sys.stderr)
        return Seen(folder, run, drift, parts_of(run.plan, shares))


def correct_from(folders: Sequence[str], out: str, *, as_json: bool) -> int:
    """Report the drift of one or several runs and write the machine file that they correct together.

    Raises:
        MeshwrightError: a run cannot be read, was on another machine than its plan is for or than the first one's, says
            something impossible, or ``out`` holds the file of another machine.
    """
    seen = [Seen.read(folder) for folder in folders]
    cluster, target = seen[0].run.plan.hardware, Path(out)
    refuse_unlike(seen)
    refuse_to_replace_another(target, cluster)
    fit = fit_factors([(one.drift, one.parts) for one in seen], cluster)
    names = ", ".join(Path(folder).absolute().name for folder in folders)
    better = corrected_cluster(cluster, fit, f"{names}, {max(one.run.summary.date for one in seen)}")
    changed = corrections(cluster, better, fit)
    predicted = [
        predict(corrected_plan(one.run.plan, one.parts, fit, better)).predicted.iteration_seconds for one in seen
    ]
    save_cluster(better, target)
    if as_json:
        told = {
            "out": str(target),
            "runs": [
                {
                    "run": one.folder,
                    **report_data(one.drift, rows_of(one.drift, one.parts, cluster)),
                    "notes": doubts(one.run, one.drift),
                    "corrected_step_seconds": seconds,
                    "error_fraction_before": one.drift.predicted_step_seconds / one.drift.step_seconds - 1,
                    "error_fraction_after": seconds / one.drift.step_seconds - 1,
                }
                for one, seconds in zip(seen, predicted, strict=True)
            ],
            "corrections": changed,
            "kept": [
                {"number": str(number), "seconds_factor": factor.value, "log_error": factor.log_error}
                for number, factor in sorted(fit.kept.items())
            ],
        }
        print(json.dumps(told, allow_nan=False))
        return 0
    for one in seen:
        title = f"{one.folder}\n\n" if len(seen) > 1 else ""
        print(f"{title}{report_text(one.drift, rows_of(one.drift, one.parts, cluster))}\n")
    print(corrections_text(changed))
    for one, seconds in zip(seen, predicted, strict=True):
        print(
            f"{one.folder}: with the corrected file the step is predicted at {seconds_text(seconds)}, "
            f"{seconds / one.drift.step_seconds - 1:+.1%} off"
        )
    print(f"wrote {target}; plan for it with --cluster {target}")
    return 0


def refuse_unlike(seen: Sequence[Seen]) -> None:
    """Raise ``ClusterError`` unless all runs were planned for one and the same machine file."""
    for place, other in enumerate(seen):
        if any(other.run.summary == earlier.run.summary for earlier in seen[:place]):
            raise ClusterError(f"{other.folder} is a run that was given already; each counts once")
    for other in seen[1:]:
        if other.run.plan.cluster != seen[0].run.plan.cluster:
            raise ClusterError(
                f"{seen[0].folder} was planned for {seen[0].run.plan.hardware.name!r} and {other.folder} for "
                f"{other.run.plan.hardware.name!r}, or for other numbers of it; runs correct one machine file together"
            )


def shares_of(plan: Plan) -> tuple[dict[Group, dict[str, float]] | None, str]:
    """What the plan's kernels are made of, and a note where that cannot be told: then their rates change as one."""
    from meshwright.models.zoo import get_model
    from meshwright.plan.trace.model import trace

    try:
        graph = trace(get_model(plan.model), plan.batch, plan.microbatches).graph
    except ModelError as error:
        return None, f"note: rates of matmuls and of memory are corrected as one, since the model is unknown ({error})"
    shares = kernel_shares(plan, graph) if graph.fingerprint == plan.fingerprint else None
    if shares is None:
        return None, "note: rates of matmuls and of memory are corrected as one, since the plan is not priced as it was"
    return shares, ""


def refuse_to_replace_another(target: Path, cluster: Cluster) -> None:
    """Raise ``ClusterError`` if the file to write holds another machine, or its folder is missing."""
    if not target.absolute().parent.is_dir():
        raise ClusterError(f"--out {target}: the folder {target.parent} does not exist; make it or choose another")
    if not target.exists():
        return
    there = load_cluster(target)
    theirs, ours = (sorted({host.device.name for host in c.hosts}) for c in (there, cluster))
    if theirs != ours:
        raise ClusterError(
            f"--out {target} holds {there.name!r} ({', '.join(theirs)}), but the run was on {cluster.name!r} "
            f"({', '.join(ours)}); give another --out"
        )
