"""All that one GPU can tell, within a time budget: ``python -m experiments.gpu.measure --out DIR --budget 540s``.

Calibrates the device, trains models with our executor and holds step time and memory against the prediction, trains
the same models in plain JAX, and runs two MPI ranks as a pipeline on the one device. Each job is a process with a
time limit of its own; results are written after each, so that a crash or a hang costs one job. Run again with the same
``--out``, it does what is not done yet. See README.md.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.gpu.cases import NEED_MACHINE, PHASES, PREPARE, Job, jobs_of, limit_seconds
from experiments.gpu.machine import ROOT, environment, gpu_state, missing, without_paths
from experiments.gpu.report import markdown
from experiments.gpu.timing import MEMORY_FRACTION, limit_of_memory

FORMAT, VERSION = "meshwright-gpu-results", 1
RESULTS, MACHINE, TABLES, LOG = "results.json", "machine.json", "tables.md", "log.txt"
LEAST_SECONDS = 10.0  # a job that has less is not started
GRACE_SECONDS = 10.0
LOG_LINES = 40  # of a job that failed
LONGEST_REASON = 300  # characters; the log has the rest
Results = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the jobs; 0 if all of them are done, 1 if some failed, were skipped or found no time."""
    args = parse(arguments)
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    results = opened(args.out / RESULTS, args.tiny)
    command = ["python", "-m", "experiments.gpu.measure", "--phases", ",".join(args.phases)]
    command += ["--budget", f"{args.budget:g}s", *(["--tiny"] if args.tiny else [])]
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    results["runs"].append({"date": date, "command": shlex.join(command), "environment": environment()})
    jobs = jobs_of(args.phases, args.tiny)
    unmet = {phase: missing(phase) for phase in {job.phase for job in jobs}}
    for module in dict.fromkeys(name for names in unmet.values() for name in names):
        phases = ", ".join(phase for phase in args.phases if module in unmet[phase])
        say(f"missing: {module}; without it there is no {phases}")

    left = [job for job in jobs if args.again or job.phase == PREPARE or not done(results, job)]
    while any(job.phase != PREPARE for job in left):
        job = left.pop(0)
        seconds = limit_seconds(job, tuple(left), args.budget - (time.monotonic() - start))
        reason = why_not(job, unmet[job.phase], args.out / MACHINE, seconds)
        entry = {"status": "skipped", "reason": reason} if reason else attempt(job, args.out, results, seconds)
        results["jobs"][job.name] = {"date": date, **entry}
        say(f"{job.name}: {entry['status']}" + (f" ({entry['reason']})" if "reason" in entry else ""))
        write(args.out, results)
    write(args.out, results)
    return 0 if all(done(results, job) for job in jobs) else 1


def done(results: Results, job: Job) -> bool:
    return bool(results["jobs"].get(job.name, {}).get("status") == "done")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="experiments.gpu.measure", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the results; what it holds is not done again"
    )
    parser.add_argument("--phases", type=phases_of, default=PHASES, help=f"some of {','.join(PHASES)} (default: all)")
    parser.add_argument("--budget", type=seconds_of, default=540.0, help="wall time of all jobs together (540s)")
    parser.add_argument("--again", action="store_true", help="do jobs again that are done")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script itself on a CPU")
    return parser.parse_args(arguments)


def phases_of(text: str) -> tuple[str, ...]:
    """``train,mfu`` as a tuple; an ``argparse`` type."""
    names = tuple(word.strip() for word in text.split(",") if word.strip())
    unknown = [name for name in names if name not in PHASES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r}: known phases are {', '.join(PHASES)}")
    return tuple(phase for phase in PHASES if phase in names)


def seconds_of(text: str) -> float:
    """``540``, ``540s`` or ``9m`` as seconds; an ``argparse`` type."""
    factor = {"s": 1.0, "m": 60.0}.get(text[-1:])
    try:
        value = float(text if factor is None else text[:-1]) * (factor or 1.0)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no time from 1s to a day; write 540s or 9m")
    return value


def opened(file: Path, tiny: bool) -> Results:
    """The results so far, or empty ones; those of tiny models never mix with real ones."""
    if not file.exists():
        return {"format": FORMAT, "version": VERSION, "tiny": tiny, "runs": [], "jobs": {}}
    try:
        results: Results = json.loads(file.read_text("utf-8"))
        known = results["format"] == FORMAT and results["version"] == VERSION
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise SystemExit(f"{file} holds no results of this script (version {VERSION}); give another --out")
    if results["tiny"] != tiny:
        was = "tiny" if results["tiny"] else "full"
        raise SystemExit(f"{file} holds results of {was} models; give another --out, or the same --tiny as then")
    return results


def why_not(job: Job, unmet: Sequence[str], machine: Path, seconds: float) -> str:
    """Why a job cannot start, in a few words; empty if it can."""
    if unmet:
        return f"needs {', '.join(unmet)}"
    if job.phase in NEED_MACHINE and not machine.exists():
        return "needs the machine file of the phase calibrate"
    if seconds < LEAST_SECONDS:
        return f"{max(seconds, 0):.0f} s of the budget left; run again with the same --out"
    return ""


def attempt(job: Job, out: Path, results: Results, seconds: float) -> dict[str, Any]:
    """Run a job to its entry in the results: done with its result, or failed with the reason."""
    began = time.monotonic()
    say(f"{job.name}: up to {seconds:.0f} s")
    with tempfile.TemporaryDirectory(prefix="meshwright-gpu-") as folder:
        file, log = Path(folder) / "result.json", Path(folder) / "log"
        words = [sys.executable, "-m", "experiments.gpu.worker", *words_of(job, out, results), "--result", str(file)]
        env = job_environment(os.environ, results["tiny"])
        code = run_limited([*words, "--limit", f"{seconds:.1f}"], env, log, seconds)
        entry: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
        text = without_paths(log.read_text("utf-8", "replace")).replace(folder, "")
        if code == 0 and file.exists():
            entry |= {"status": "done", "gpu_after": gpu_state(), "result": json.loads(file.read_text("utf-8"))}
        else:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            reason = f"exit code {code}: {(lines or ['it said nothing'])[-1]}"[:LONGEST_REASON]
            late = f"over its limit of {seconds:.0f} s"
            entry |= {"status": "failed", "reason": late if code is None else reason}
    kept = text.splitlines()[-LOG_LINES if entry["status"] == "failed" else -3 :]
    with open(out / LOG, "a", encoding="utf-8") as stream:
        stream.write("\n".join([f"== {job.name}: {entry['status']}", *kept, ""]))
    return entry


def words_of(job: Job, out: Path, results: Results) -> list[str]:
    """What the worker of a job is told."""
    words = [job.phase, "--machine", str(out.absolute() / MACHINE)]
    if job.case is not None:
        words += ["--model", job.case.model, "--batch", str(job.case.batch)]
    if job.variant:
        words += ["--variant", job.variant]
    if job.phase == "mfu" and job.case is not None:
        ours = results["jobs"].get(f"train {job.case.model}", {}).get("result")
        words += ["--microbatches", str(ours["plan"]["microbatches"] if ours else 1)]
    return words


def job_environment(base: Mapping[str, str], tiny: bool) -> dict[str, str]:
    """The environment of a job: most of the device's memory, and no silent fall back to the CPU."""
    environment = limit_of_memory(base, MEMORY_FRACTION)
    return environment if tiny else {"JAX_PLATFORMS": "cuda,cpu", **environment}


def run_limited(command: Sequence[str], env: Mapping[str, str], log: Path, seconds: float) -> int | None:
    """Run a command, all it says into ``log``; its exit code, or None if it was ended for being late.

    Late ones get SIGTERM, so that they can end what they started, and then are killed with all of their session.
    """
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write(out: Path, results: Results) -> None:
    """The results and their tables, each in one step: whoever looks sees the old file or the whole new one."""
    texts = {RESULTS: json.dumps(results, indent=1, allow_nan=False) + "\n", TABLES: markdown(results)}
    for name, text in texts.items():
        partial = out / f".{name}.partial"
        partial.write_text(text, "utf-8")
        os.replace(partial, out / name)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
