"""What a baseline is, and how a plan is held against all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import msgspec

from meshwright.errors import ModelError, PlanError
from meshwright.plan.planfile import Plan, Rival
from meshwright.plan.request import Fix, Request
from meshwright.plan.search import Graphs, search

Scheme = Callable[[Graphs, Request, Plan], Plan]
"""(traced graphs by number of micro-batches, what our plan was asked for, our plan) -> what it would do instead."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """One way that others plan: its name and the function that gives its plan, or raises why it has none."""

    name: str
    scheme: Scheme


def compare(graphs: Graphs, request: Request, plan: Plan, baselines: Sequence[Baseline]) -> Plan:
    """The plan with every baseline among its rivals, first; notes say which have no plan, and why."""
    traced = cache(graphs)
    found, missing = [], []
    for baseline in baselines:
        try:
            other = baseline.scheme(traced, request, plan)
        except (PlanError, ModelError) as error:
            missing.append(f"{baseline.name} has no plan: {error}")
            continue
        slower = other.predicted.iteration_seconds / plan.predicted.iteration_seconds - 1
        found.append(
            Rival(
                f"{baseline.name} ({in_short(other)})",
                other.predicted.iteration_seconds,
                other.predicted.fits,
                f"{slower:.1%} slower" if slower > 0 else f"{-slower:.1%} faster" if slower < 0 else "as fast",
            )
        )
    found.sort(key=lambda rival: rival.iteration_seconds)
    return msgspec.structs.replace(plan, rivals=(*found, *plan.rivals), notes=(*plan.notes, *missing))


def in_short(plan: Plan) -> str:
    """Its meshes, schedule and micro-batches."""
    meshes = ["x".join(str(size) for size in stage.mesh.values()) for stage in plan.stages]
    alike = f"{len(meshes)} stages of {meshes[0]}" if len(set(meshes)) == 1 else "stages " + "|".join(meshes)
    return f"{alike}, {plan.schedule}, {plan.microbatches} micro-batches, remat {plan.remat}"


def fixed(request: Request, **changes: object) -> Request:
    """The request with more of it fixed; what the user fixed stays.

    Errors: PlanError if the user fixed something else.
    """
    for name, value in changes.items():
        mine = getattr(request.fix, name)
        if mine not in (None, False, value):
            raise PlanError(f"{name} is fixed to {mine}, and this is about {name} {value}")
    fix: Fix = replace(request.fix, **changes)  # type: ignore[arg-type]
    return replace(request, fix=fix)


def fastest(graphs: Graphs, requests: Sequence[Request]) -> Plan:
    """The fastest plan of several requests.

    Errors: PlanError, the last reason, if none has one.
    """
    best: Plan | None = None
    reason: PlanError | ModelError = PlanError("no size of its grid divides the cluster's devices")
    for request in requests:
        try:
            plan = search(graphs, request)
        except (PlanError, ModelError) as error:
            reason = error
            continue
        if best is None or plan.predicted.iteration_seconds < best.predicted.iteration_seconds:
            best = plan
    if best is None:
        raise reason
    return best


def divisors(number: int, most: int | None = None) -> list[int]:
    """The divisors of a number, up to ``most``."""
    return [d for d in range(1, min(number, most or number) + 1) if number % d == 0]
