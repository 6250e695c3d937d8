"""``meshwright simulate``: predict a plan, or a bare schedule or hand-written program without any model."""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from meshwright.errors import MeshwrightError, ScheduleError
from meshwright.simulate.bare import StageTimes, bare_code, equal_costs, program_costs
from meshwright.simulate.code import Code, decode
from meshwright.simulate.compiled import Compiled
from meshwright.simulate.costs import PipelineCosts
from meshwright.simulate.metrics import metrics
from meshwright.simulate.pipeline import simulate
from meshwright.simulate.program import Program, compute_only, parse, word
from meshwright.simulate.schedules.base import Options
from meshwright.simulate.schedules.table import SCHEDULES
from meshwright.simulate.timeline import Timeline
from meshwright.simulate.variability import StepSamples, Variability, sample_steps

WRONG_USAGE = 2
PARTS = ("F", "I", "W")
PAIRS = ("sequence", "atomic")
JITTER = 0.05  # kernels measured again differ by about as much


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``simulate``."""
    parser.add_argument("plan", nargs="?", metavar="PLAN|MODEL", help="a plan file; or a transformer, and for it:")
    parser.add_argument("--cluster", metavar="C", help="MODEL: a shipped machine with a count, a sum, or a file")
    parser.add_argument("--batch", type=int, metavar="N", help="MODEL: sequences per optimizer step")
    parser.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="MODEL: the grid, as in tensor=8, pipeline=8, microbatch-size=1, schedule=interleaved:4, remat=full; of "
        "stages that are not alike: tensor=4,2,2, layers=12,10,10, remat=full,none,none",
    )
    parser.add_argument(
        "--stack",
        default="compiled",
        metavar="NAME[@SYSTEM]",
        help="MODEL: the software, and where its constants were measured (default: compiled, nowhere)",
    )
    parser.add_argument("--flops", choices=("own", "megatron"), default="own", help="MODEL: also FLOP/s by a formula")
    parser.add_argument("--ignore-memory", action="store_true", help="MODEL: answer even if it does not fit")
    parser.add_argument("--schedule", metavar="NAME", help=f"a bare schedule: one of {', '.join(SCHEDULES)}")
    parser.add_argument("--stages", type=int, metavar="S", help="number of pipeline stages, each on a device")
    parser.add_argument("--microbatches", type=int, metavar="M", help="number of micro-batches in a step")
    parser.add_argument("--program", metavar="FILE", help="a program written by hand, as --show prints; - is stdin")
    parser.add_argument(
        "--times",
        type=stage_times,
        metavar="F=1,I=1,W=1",
        help="seconds of a whole stage's forward, input gradient and weight gradient (default: 1 each)",
    )
    parser.add_argument("--hop", type=seconds, metavar="SECONDS", help="latency between stages (default: 0)")
    parser.add_argument("--chunks", type=int, metavar="V", help="interleaved, looped-bfs: virtual stages on a device")
    parser.add_argument("--pair", choices=PAIRS, help="dualpipe: run an overlapped pair in sequence or as one piece")
    parser.add_argument("--edges", type=stage_edges, metavar="0-1,0-2", help="graph-1f1b: which stage feeds which")
    parser.add_argument("--lifo", action="store_true", help="gpipe: backwards from the last micro-batch")
    parser.add_argument("--show", action="store_true", help="print the program, one line a device")
    parser.add_argument("--samples", type=int, metavar="K", help="also sample K steps with jitter")
    parser.add_argument("--jitter", type=seconds, metavar="S", help="of kernels and transfers, each (default: 0.05)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the samples (default: 0)")
    parser.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev")
    parser.add_argument("--plot", metavar="FILE", help="write the timeline as a picture (.png, .svg, .pdf)")
    parser.add_argument("--memory", action="store_true", help="draw each device's memory into the picture too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Simulate the plan, the schedule or the program that was asked for."""
    sizes = {name: getattr(args, name) for name in ("schedule", "stages", "microbatches")}
    choices = ("chunks", "pair", "edges", "lifo")
    of_model = ("cluster", "batch", "fix", "ignore_memory")
    for name in ("jitter", "seed"):
        if getattr(args, name) is not None and args.samples is None:
            return _wrong(f"--{name} is of samples; give --samples too")
    if args.memory and args.plot is None:
        return _wrong("--memory is drawn into the picture; give --plot too")
    if args.plan is not None:
        if mixed := _given(args, (*sizes, "program", "times", "hop", *choices, "show")):
            return _wrong(f"a plan or a model brings its own schedule; leave out {mixed}")
        if args.cluster is not None and args.batch is not None:
            return run_model(args)
        if mixed := _given(args, of_model):
            return _wrong(f"a model needs --cluster and --batch; {mixed} alone says too little")
        if _is_model(args.plan):
            return _wrong(f"{args.plan} is no file but a model; give --cluster and --batch too")
        return run_plan(args)
    if mixed := _given(args, of_model):
        return _wrong(f"{mixed} belong to a MODEL; give one")
    if args.program is not None:
        mixed = _given(args, (*sizes, *choices))
        return _wrong(f"a program is a schedule already; leave out {mixed}") if mixed else run_program(args)
    missing = [f"--{name}" for name, value in sizes.items() if value is None]
    if missing:
        return _wrong(f"give a PLAN or a --program, or for a bare schedule also {', '.join(missing)}")
    return run_schedule(args)


def _is_model(text: str) -> bool:
    """Whether what stands in a plan's place is the name of a model."""
    from meshwright.cli.simulate_grid import parse_transformer

    if Path(text).exists():
        return False
    try:
        parse_transformer(text)
    except MeshwrightError:
        return False
    return True


def run_plan(args: argparse.Namespace) -> int:
    """Predict a saved plan."""
    from meshwright.plan.predict import costs_of, predict_file, sample_plan

    prediction = predict_file(args.plan)
    sampled = None
    if args.samples is not None:
        sampled = sample_plan(prediction.plan, _chances(args), samples=args.samples, seed=args.seed or 0)
    plan = prediction.plan
    costs = costs_of(plan.hardware, plan.stages, plan.transfers)
    _write(args, prediction.timeline, "predicted", costs)
    if args.json:
        print(json.dumps(prediction.to_json() | _observed(prediction.timeline, costs) | _sampled_json(sampled)))
    else:
        print("\n".join([describe(prediction.timeline), *_sampled_lines(sampled)]))
    return 0


def run_model(args: argparse.Namespace) -> int:
    """Predict a transformer on a grid of devices."""
    from meshwright.cli import simulate_grid

    prediction = simulate_grid.predict(args)
    sampled = _samples(args, prediction.program, prediction.costs)
    _write(args, prediction.timeline, f"{args.plan} on {args.cluster}", prediction.costs)
    if args.json:
        observed = _observed(prediction.timeline, prediction.costs)
        print(json.dumps(simulate_grid.to_json(prediction, args) | observed | _sampled_json(sampled)))
    else:
        print("\n".join([simulate_grid.describe(prediction, args), *_sampled_lines(sampled)]))
    return 0


def run_schedule(args: argparse.Namespace) -> int:
    """Play a schedule over equal stages."""
    if args.lifo and args.schedule != "gpipe":
        raise ScheduleError(f"--lifo is a variant of gpipe, not of {args.schedule}; leave it out")
    name = "gpipe-lifo" if args.lifo else args.schedule
    options = Options(chunks=args.chunks, atomic_pairs=args.pair == "atomic", edges=args.edges)
    times, hop_seconds = args.times or StageTimes(), args.hop or 0.0
    code, share = bare_code(name, args.stages, args.microbatches, times, hop_seconds, options)
    costs = equal_costs(code, times, hop_seconds, share)
    sampled = _samples(args, code, costs)
    title = f"{name} · {args.microbatches} micro-batches"
    return _answer(args, simulate(code, costs), decode(code) if args.show else None, title, sampled)


def run_program(args: argparse.Namespace) -> int:
    """Play a program written by hand."""
    text = sys.stdin.read() if args.program == "-" else Path(args.program).read_text(encoding="utf-8")
    program = parse(text)
    if not program:
        raise ScheduleError(f"{args.program}: there is no instruction in it; write one line a mesh, as in 0F0 0B0")
    code, costs = program_costs(program, args.times or StageTimes(), args.hop or 0.0)
    return _answer(args, simulate(code, costs), program, args.program, _samples(args, code, costs))


def _answer(
    args: argparse.Namespace,
    timeline: Timeline,
    program: Program | None,
    title: str,
    sampled: StepSamples | None = None,
) -> int:
    _write(args, timeline, title, held="activations")
    rows = [" ".join(map(word, row)) for row in compute_only(program)] if program and args.show else []
    peaks = [round(peak) for peak in timeline.peak_bytes]
    if args.json:
        answer: dict[str, Any] = {
            "makespan_seconds": timeline.makespan_seconds,
            "span_seconds": timeline.span_seconds,
            "peak_activations": peaks,
            "bubble_fraction": timeline.bubble_fraction,
        }
        answer |= ({"program": rows} if args.show else {}) | _sampled_json(sampled)
        print(json.dumps(answer))
        return 0
    print(describe(timeline))
    print(f"activations  {' '.join(map(str, peaks))}  (most at once, by device)")
    if args.show:
        print("\n".join(f"device {device}: {row}" for device, row in enumerate(rows)))
    print("\n".join(_sampled_lines(sampled)), end="\n" if sampled else "")
    return 0


def _chances(args: argparse.Namespace) -> Variability:
    jitter = JITTER if args.jitter is None else args.jitter
    return Variability(kernel_jitter=jitter, transfer_jitter=jitter)


def _samples(args: argparse.Namespace, program: Code | Compiled, costs: PipelineCosts) -> StepSamples | None:
    """The samples that were asked for."""
    if args.samples is None:
        return None
    return sample_steps(program, costs, _chances(args), samples=args.samples, seed=args.seed or 0)


def _observed(timeline: Timeline, costs: PipelineCosts) -> dict[str, Any]:
    """Why the step takes as long as it does, and how busy the channels between stages are."""
    data = metrics(timeline, costs=costs).to_json()
    return {"causes": data["causes"], "channels": data["channels"]}


def _sampled_json(sampled: StepSamples | None) -> dict[str, Any]:
    if sampled is None:
        return {}
    quantiles = {f"p{round(100 * share)}_seconds": sampled.quantile(share) for share in (0.1, 0.5, 0.9, 0.99)}
    return {"samples": {"mean_seconds": sampled.mean_seconds, "std_seconds": sampled.std_seconds} | quantiles}


def _sampled_lines(sampled: StepSamples | None) -> list[str]:
    if sampled is None:
        return []
    low, middle, high = (sampled.quantile(share) for share in (0.1, 0.5, 0.9))
    return [f"samples      {low:.6g} to {high:.6g} s in 8 of 10 steps, median {middle:.6g} s"]


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


def stage_times(text: str) -> StageTimes:
    """``F=1,I=1,W=1`` → seconds of each part; those left out take 1."""
    parts = dict.fromkeys(PARTS, 1.0)
    for item in text.split(","):
        name, equals, number = item.partition("=")
        if not equals or name.strip() not in PARTS:
            raise argparse.ArgumentTypeError(f"{item!r} is not one of F=, I=, W= with seconds, as in F=1,I=1,W=1")
        parts[name.strip()] = seconds(number)
    return StageTimes(parts["F"], parts["I"], parts["W"])


def stage_edges(text: str) -> tuple[tuple[int, int], ...]:
    """``0-1,0-2`` → pairs of stages."""
    pairs = [re.fullmatch(r"\s*(\d+)-(\d+)\s*", item) for item in text.split(",")]
    if None in pairs:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of edges between stages, as in 0-1,0-2,1-3,2-3")
    return tuple((int(pair[1]), int(pair[2])) for pair in pairs if pair)


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> str:
    """Those of the options that the user gave, as a list for the eye."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False, []))


def _write(
    args: argparse.Namespace, timeline: Timeline, title: str, costs: PipelineCosts | None = None, held: str = "bytes"
) -> None:
    """Write the trace (with bytes in flight, where the costs know them) and the picture that were asked for."""
    if args.trace:
        from meshwright.simulate.trace import write_trace

        write_trace([(title, timeline)], args.trace, costs)
    if args.plot:
        from meshwright.simulate.gantt import plot_timeline

        plot_timeline(timeline, args.plot, title, memory=args.memory, held=held)


def _wrong(message: str) -> int:
    print(f"meshwright simulate: {message}", file=sys.stderr)
    return WRONG_USAGE
