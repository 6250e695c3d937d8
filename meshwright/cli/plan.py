"""``meshwright plan``: find the best way to split a model's training step over a cluster."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright.calibrate.hardware import parse_cluster
from meshwright.cli.progress import progress_display
from meshwright.errors import PlanError
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan, public_json, save_plan, seconds_text, table
from meshwright.plan.request import MEMORY_MARGIN
from meshwright.plan.schedule_rules import ALL_SCHEDULES, RUNNABLE, find_rule
from meshwright.plan.search import Fix, Graphs, Request, search
from meshwright.plan.zero import AUTO, LEVELS

_COUNTS = ("microbatches", "microbatch-size", "pipeline", "data", "tensor")
_NOT_YET = ("sequence-parallel", "zero", "expert", "context")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``plan``."""
    parser.add_argument("model", metavar="MODEL", help="zoo name, spec, or package.module:function")
    parser.add_argument("--cluster", required=True, metavar="C", help="p3.16xlarge:8, cpu:4, a sum, or a cluster file")
    parser.add_argument("--batch", required=True, type=int, metavar="N", help="sequences or images per optimizer step")
    parser.add_argument("--out", "-o", metavar="PLAN", help="write the plan to this file")
    parser.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="give instead of searching: microbatches, microbatch-size, schedule, remat, pipeline, data, tensor, "
        "stages=DxT,DxT… (data x tensor of each stage); may be repeated",
    )
    parser.add_argument(
        "--schedules",
        default=",".join(RUNNABLE),
        metavar="LIST",
        help=f"schedules to search, between commas, or all: {', '.join(ALL_SCHEDULES)}; "
        f"by default those that can be executed ({', '.join(RUNNABLE)})",
    )
    parser.add_argument(
        "--memory-margin",
        type=float,
        default=MEMORY_MARGIN,
        metavar="SHARE",
        help=f"part of each device's memory that a plan leaves free (default {MEMORY_MARGIN}: what predicted peaks "
        "are off by in the mean)",
    )
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="give the best plan found when this time is over"
    )
    parser.add_argument(
        "--zero",
        choices=[*map(str, LEVELS), "auto"],
        default="0",
        help="the highest level of ZeRO that the search may choose for a parameter (default 0; auto: 3); plans with "
        "any cannot be executed yet",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also plan as others do (data parallelism alone, Megatron-LM's grid, Alpa's objective ...), judged alike",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Trace, search, save, print."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # planning traces; it never needs, or takes, an accelerator
    from meshwright.models.zoo import get_model
    from meshwright.plan.trace.model import trace

    cluster = parse_cluster(args.cluster)
    model = get_model(args.model)
    traced: list[ModelGraph] = []

    def graphs(microbatches: int) -> ModelGraph:
        traced.append(trace(model, args.batch, microbatches, like=traced[0] if traced else None).graph)
        return traced[-1]

    request = Request(
        cluster,
        args.batch,
        parse_fixes(args.fix, args.batch),
        schedules=parse_schedules(args.schedules),
        memory_margin=args.memory_margin,
        time_limit_seconds=args.time_limit,
        zero=AUTO if args.zero == "auto" else int(args.zero),
    )
    with progress_display("plan") as progress:
        plan = search(graphs, request, lambda done, total, text: progress(done / total, text))
        if args.compare:
            plan = compared(plan, graphs, request, progress)
    if args.out:
        save_plan(plan, args.out)
        if plan.fallback is not None:
            save_plan(plan.fallback, fallback_path(args.out))
    print(
        json.dumps(public_json(plan), allow_nan=False)
        if args.json
        else report(plan, args.out, 12 if args.compare else 5)
    )
    return 0


def compared(plan: Plan, graphs: Graphs, request: Request, progress: Callable[[float, str], None]) -> Plan:
    """The plan with the baselines among its rivals."""
    from meshwright.plan.baselines import BASELINES, compare

    progress(1.0, f"baselines, {len(BASELINES)} of them")
    return compare(graphs, request, plan, BASELINES)


def fallback_path(out: str) -> Path:
    """Where the fallback of a plan goes: beside it, ``plan.json`` to ``plan.fallback.json``."""
    path = Path(out)
    return path.with_name(f"{path.stem}.fallback{path.suffix}")


def parse_schedules(text: str) -> tuple[str, ...]:
    """``--schedules`` as names; "all" stands for all of them."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(dict.fromkeys(s for name in names for s in (ALL_SCHEDULES if name == "all" else (name,))))


def parse_fixes(given: Sequence[str], batch: int) -> Fix:
    """``--fix key=value`` options as a ``Fix``.

    Errors: PlanError naming the option that cannot be read.
    """
    fix = Fix()
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise PlanError(f"--fix {text} has no value; write --fix KEY=VALUE")
        match key:
            case "schedule":
                fix = replace(fix, schedule=value)
            case "remat":
                fix = replace(fix, remat=_remat(value))
            case "stages":
                fix = replace(fix, stages=tuple(_mesh(part) for part in value.split(",")))
            case _ if key in _COUNTS:
                fix = replace(fix, **_count(key, _whole(key, value), batch))
            case _ if key in _NOT_YET:
                raise PlanError(f"--fix {key} cannot be planned yet; leave it out")
            case _:
                raise PlanError(
                    f"--fix {key} is unknown; known are {', '.join((*_COUNTS, 'schedule', 'remat', 'stages'))}"
                )
    return fix


def _count(key: str, value: int, batch: int) -> dict[str, Any]:
    if key != "microbatch-size":
        return {key: value}
    if value < 1 or batch % value:
        raise PlanError(f"a batch of {batch} does not split into micro-batches of {value}; use a divisor of {batch}")
    return {"microbatches": batch // value}


def _whole(key: str, value: str) -> int:
    if not value.isdecimal():
        raise PlanError(f"--fix {key}={value}: a whole number is needed")
    return int(value)


def _remat(value: str) -> Any:
    if value == "selective":
        raise PlanError("--fix remat=selective cannot be planned yet; use none or full")
    return value


def _mesh(part: str) -> tuple[int, int]:
    data, cross, tensor = part.partition("x")
    if not (cross and data.isdecimal() and tensor.isdecimal() and int(data) >= 1 and int(tensor) >= 1):
        raise PlanError(f"--fix stages: {part!r} is no mesh; write data x tensor of each stage, as in 1x1,1x3")
    return int(data), int(tensor)


def report(plan: Plan, out: str | None, shown: int = 5) -> str:
    """The plan and its first rivals for people."""
    lines = [table(plan), "", f"searched {plan.search['candidates']:.0f} candidates in {plan.search['seconds']:.1f} s"]
    if plan.rivals:
        lines += ["runners-up:"]
        lines += [f"  {seconds_text(r.iteration_seconds):>8}  {r.name}: {r.why_not}" for r in plan.rivals[:shown]]
    if out:
        if plan.zero:
            lines += [f"wrote {out}; ZeRO-{plan.zero} cannot be executed yet"]
        elif find_rule(plan.schedule).runnable:
            lines += [f"wrote {out}; run it with: meshwright execute {out}"]
        else:
            lines += [f"wrote {out}; schedule {plan.schedule} cannot be executed yet"]
        if plan.fallback is not None and not plan.fallback.zero:
            lines += [f"should memory run out: meshwright execute {fallback_path(out)}"]
    return "\n".join(lines)
