"""``meshwright calibrate --from RUN``: where a run differs from its prediction, and a machine file corrected by it."""

import json
import sys
from pathlib import Path

from meshwright.calibrate.drift import Group, find_drift
from meshwright.calibrate.drift_correct import corrected_cluster, corrected_plan
from meshwright.calibrate.drift_fit import fit_factors, parts_of
from meshwright.calibrate.drift_report import corrections, corrections_text, report_data, report_text, rows_of
from meshwright.calibrate.drift_shares import kernel_shares
from meshwright.calibrate.hardware import Cluster, load_cluster, save_cluster
from meshwright.errors import ClusterError, ModelError
from meshwright.execute.record import read_run
from meshwright.plan.planfile import Plan, seconds_text
from meshwright.plan.predict import predict


def correct_from(run_folder: str, out: str, *, as_json: bool) -> int:
    """Report the drift of a run and write the corrected machine file.

    Raises:
        MeshwrightError: the run cannot be read, was on another machine, says something impossible, or ``out`` holds the
            file of another machine.
    """
    run = read_run(run_folder)
    cluster, target = run.plan.hardware, Path(out)
    refuse_to_replace_another(target, cluster)
    drift = find_drift(run)
    shares, note = shares_of(run.plan)
    if note:
        print(note, file=sys.stderr)
    parts = parts_of(run.plan, shares)
    fit = fit_factors(drift, parts, cluster)
    better = corrected_cluster(cluster, fit, f"{Path(run_folder).absolute().name}, {run.summary.date}")
    predicted_seconds = predict(corrected_plan(run.plan, parts, fit, better)).predicted.iteration_seconds
    rows, changed = rows_of(drift, parts, cluster), corrections(cluster, better, fit)
    error = predicted_seconds / drift.step_seconds - 1
    save_cluster(better, target)
    if as_json:
        data = {
            "out": str(target),
            "run": str(run_folder),
            **report_data(drift, rows),
            "corrections": changed,
            "corrected_step_seconds": predicted_seconds,
            "error_fraction_before": drift.predicted_step_seconds / drift.step_seconds - 1,
            "error_fraction_after": error,
        }
        print(json.dumps(data, allow_nan=False))
        return 0
    print(f"{report_text(drift, rows)}\n\n{corrections_text(changed)}")
    print(
        f"with the corrected file the step is predicted at {seconds_text(predicted_seconds)}, {error:+.1%} off\n"
        f"wrote {target}; plan for it with --cluster {target}"
    )
    return 0


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
