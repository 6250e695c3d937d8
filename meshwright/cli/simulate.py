"""``meshwright simulate``: predict a plan, or a bare schedule without any model."""

import argparse
import json
import math
import sys
from typing import Any

from meshwright.errors import ScheduleError
from meshwright.simulate.build import build_program
from meshwright.simulate.pipeline import PipelineCosts, StageCosts, TransferCost, simulate
from meshwright.simulate.program import Program, Send, compute_only, word
from meshwright.simulate.schedules.table import SCHEDULES
from meshwright.simulate.timeline import Timeline

WRONG_USAGE = 2
PARTS = ("F", "I", "W")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``simulate``."""
    parser.add_argument("plan", nargs="?", metavar="PLAN", help="a plan file; or give a bare schedule:")
    parser.add_argument("--schedule", metavar="NAME", help=f"one of {', '.join(SCHEDULES)}")
    parser.add_argument("--lifo", action="store_true", help="gpipe: backwards from the last micro-batch")
    parser.add_argument("--stages", type=int, metavar="S", help="number of pipeline stages")
    parser.add_argument("--microbatches", type=int, metavar="M", help="number of micro-batches in a step")
    parser.add_argument(
        "--times",
        type=stage_seconds,
        metavar="F=1,I=1,W=1",
        help="seconds of a stage's forward, input gradient and weight gradient (default: 1 each)",
    )
    parser.add_argument("--hop", type=seconds, metavar="SECONDS", help="latency between stages (default: 0)")
    parser.add_argument("--show", action="store_true", help="print the program, one line a device")
    parser.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev")
    parser.add_argument("--plot", metavar="FILE", help="write the timeline as a picture (.png, .svg, .pdf)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Simulate the plan or the schedule that was asked for."""
    bare = {name: getattr(args, name) for name in ("schedule", "stages", "microbatches")}
    if args.plan is not None:
        mixed = [f"--{name}" for name in (*bare, "times", "hop", "lifo", "show") if getattr(args, name)]
        return _wrong(f"a plan brings its own schedule; leave out {', '.join(mixed)}") if mixed else run_plan(args)
    missing = [f"--{name}" for name, value in bare.items() if value is None]
    if missing:
        return _wrong(f"give a PLAN, or for a bare schedule also {', '.join(missing)}")
    return run_schedule(args)


def run_plan(args: argparse.Namespace) -> int:
    """Predict a saved plan."""
    from meshwright.plan.predict import predict_file

    prediction = predict_file(args.plan)
    _write(args, prediction.timeline, "predicted")
    print(json.dumps(prediction.to_json()) if args.json else describe(prediction.timeline))
    return 0


def run_schedule(args: argparse.Namespace) -> int:
    """Play a schedule over equal stages."""
    if args.lifo and args.schedule != "gpipe":
        raise ScheduleError(f"--lifo is a variant of gpipe, not of {args.schedule}; leave it out")
    name = "gpipe-lifo" if args.lifo else args.schedule
    times = args.times or dict.fromkeys(PARTS, 1.0)
    program = build_program(name, args.stages, args.microbatches)
    timeline = simulate(program, _equal_stages(program, times, args.hop or 0.0))
    _write(args, timeline, f"{name} · {args.stages} stages · {args.microbatches} micro-batches")
    rows = [" ".join(map(word, row)) for row in compute_only(program)]
    if args.json:
        answer: dict[str, Any] = {
            "makespan_seconds": timeline.makespan_seconds,
            "span_seconds": timeline.span_seconds,
            "peak_activations": [round(peak) for peak in timeline.peak_bytes],
            "bubble_fraction": timeline.bubble_fraction,
        }
        print(json.dumps(answer | {"program": rows} if args.show else answer))
        return 0
    print(describe(timeline))
    print(f"activations  {' '.join(f'{peak:.0f}' for peak in timeline.peak_bytes)}  (most at once, by device)")
    if args.show:
        print("\n".join(f"device {device}: {row}" for device, row in enumerate(rows)))
    return 0


def describe(timeline: Timeline) -> str:
    """The timeline's numbers for a person: where its time goes, and its memory where bytes are known."""
    causes = timeline.critical_seconds
    lines = [
        f"step time    {timeline.makespan_seconds:.6g} s",
        f"bubble       {timeline.bubble_fraction:.1%} of all device time",
        "critical     " + ", ".join(f"{cause} {spent:.4g} s" for cause, spent in causes.items()),
    ]
    peak = max(timeline.peak_bytes, default=0.0)
    if peak >= 1e6:
        lines.append(f"peak memory  {peak / 1e9:.3g} GB on the fullest device")
    return "\n".join(lines)


def seconds(text: str) -> float:
    """A finite number of seconds, at least 0."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is negative or not finite; seconds are at least 0")
    return number


def stage_seconds(text: str) -> dict[str, float]:
    """``F=1,I=1,W=1`` → seconds of each part; those left out take 1."""
    times = dict.fromkeys(PARTS, 1.0)
    for item in text.split(","):
        name, equals, number = item.partition("=")
        if not equals or name.strip() not in PARTS:
            raise argparse.ArgumentTypeError(f"{item!r} is not one of F=, I=, W= with seconds, as in F=1,I=1,W=1")
        times[name.strip()] = seconds(number)
    return times


def _equal_stages(program: Program, times: dict[str, float], hop_seconds: float) -> PipelineCosts:
    """One device a stage; a live micro-batch weighs one byte, so that peak bytes count activations."""
    stages = tuple(
        StageCosts(
            devices=(stage,),
            forward_seconds=times["F"],
            backward_seconds=times["I"] + times["W"],
            saved_bytes=1,
        )
        for stage in range(len(program))
    )
    hop = TransferCost(0.0, hop_seconds)
    sends = (step for row in program for step in row if isinstance(step, Send))
    return PipelineCosts(stages, {(send.stage, send.target, send.what): hop for send in sends})


def _write(args: argparse.Namespace, timeline: Timeline, title: str) -> None:
    """Write the trace and the picture that were asked for."""
    if args.trace:
        from meshwright.simulate.trace import write_trace

        write_trace([(title, timeline)], args.trace)
    if args.plot:
        from meshwright.simulate.gantt import plot_timeline

        plot_timeline(timeline, args.plot, title)


def _wrong(message: str) -> int:
    print(f"meshwright simulate: {message}", file=sys.stderr)
    return WRONG_USAGE
