"""From what was judged to the plan that is given: winner, runners-up with reasons, a fallback, and notes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from meshwright.plan.assemble import axes_text
from meshwright.plan.judge import Judged, compute_dtype, judge_candidate, why_not
from meshwright.plan.planfile import FORMAT, VERSION, Plan, PlannedCollective, Rival, cluster_data
from meshwright.plan.priced import Priced, priced_stage
from meshwright.plan.request import SURE_SHARE, Request
from meshwright.plan.schedule_rules import GRAPH, SIMPLE
from meshwright.plan.zero_note import zero_notes

_RIVALS = 12
_WORTH_SAYING = 0.01  # the gain from which a schedule that cannot be run yet is named


def plan_of(
    winner: Judged,
    judged: Sequence[Judged],
    fallback: Judged | None,
    request: Request,
    search: dict[str, int | float],
    notes: Sequence[str],
) -> Plan:
    """The plan with all that is said of it."""
    rivals = _rivals(winner, judged, request)
    said = (*_notes(winner, judged, request), *notes, *_fallback_notes(winner, fallback, request))
    plan = _bare(winner, request)
    lean = None if fallback is None else _bare(fallback, request)
    return msgspec.structs.replace(plan, rivals=rivals, notes=said, search=search, fallback=lean)


def _bare(judged: Judged, request: Request) -> Plan:
    """A judged candidate as a plan, without its search."""
    candidate, graph = judged.candidate, judged.candidate.graph
    remat: Any = candidate.remat
    return Plan(
        format=FORMAT,
        version=VERSION,
        model=graph.name,
        fingerprint=graph.fingerprint,
        cluster=cluster_data(request.cluster),
        batch=request.batch,
        microbatches=candidate.microbatches,
        schedule=candidate.rule.name,
        remat=remat,
        tokens_per_sample=graph.tokens_per_sample,
        parameters=graph.parameter_count,
        model_flops=graph.model_flops,
        compute_dtype=compute_dtype(graph),
        stages=tuple(
            msgspec.structs.replace(stage, peak_memory_bytes=peak, collectives=_collectives(judged, index))
            for index, (stage, peak) in enumerate(zip(judged.assembly.stages, judged.peaks, strict=True))
        ),
        layouts=judged.assembly.layouts,
        transfers=judged.assembly.transfers,
        tied=judged.assembly.tied,
        predicted=judged.predicted,
        search={},
        rivals=(),
    )


def _collectives(judged: Judged, index: int) -> tuple[PlannedCollective, ...]:
    """What a stage communicates inside its mesh: alike collectives together, the longest first."""
    names = tuple(judged.assembly.stages[index].mesh)
    alike: dict[tuple[Any, str, str, int], list[Priced]] = {}
    for priced in priced_stage(judged.candidate.pricer.cost(*judged.candidate.stages.stages[index].cell)):
        key = (priced.phase, priced.kind, axes_text(priced.axes, names), priced.ranks)
        alike.setdefault(key, []).append(priced)
    found = [
        PlannedCollective(*key, len(those), sum(p.bytes for p in those), sum(p.seconds for p in those))
        for key, those in alike.items()
    ]
    return tuple(sorted(found, key=lambda c: (-c.seconds, c.phase, c.kind, c.axes)))


def _rivals(winner: Judged, judged: Sequence[Judged], request: Request) -> tuple[Rival, ...]:
    """Those that lost, the best first: the best of each schedule and the best of all; other cuts of one plan once."""
    ranked = sorted(judged, key=lambda j: (not j.predicted.fits, j.seconds, j.name))
    of_name: dict[str, Judged] = {}
    for other in ranked:
        of_name.setdefault(other.name, other)
    of_name.pop(winner.name)
    of_schedule: dict[str, Judged] = {}
    for other in of_name.values():
        of_schedule.setdefault(other.candidate.rule.text, other)
    first = list(dict.fromkeys(j.name for j in (*of_schedule.values(), *of_name.values())))
    chosen = [of_name[name] for name in of_name if name in first[:_RIVALS]]
    return tuple(Rival(j.name, j.seconds, j.predicted.fits, why_not(j, winner, request)) for j in chosen)


def _notes(winner: Judged, judged: Sequence[Judged], request: Request) -> list[str]:
    graph = winner.candidate.graph
    notes = list(graph.notes)
    if graph.unknown:
        listed = ", ".join(f"{name} ×{times}" for name, times in graph.unknown)
        notes.append(f"no sharding rule for {listed}: these run replicated")
    used = sum({s.devices: len(s.devices) for s in winner.assembly.stages}.values())
    if used < request.cluster.devices:
        why = "as the stages are given" if request.fix.stages is not None else "it is faster so"
        notes.append(f"{request.cluster.devices - used} of {request.cluster.devices} devices stay idle: {why}")
    notes += _schedule_notes(winner, judged, request)
    notes += zero_notes(winner, request)
    return notes


def _schedule_notes(winner: Judged, judged: Sequence[Judged], request: Request) -> list[str]:
    """What a schedule that cannot be run yet would gain, or gains."""
    rule = winner.candidate.rule
    if not rule.runnable:
        said = f"schedule {rule.text} cannot be executed yet"
        runnable = [j.seconds for j in judged if j.candidate.rule.runnable and j.predicted.fits]
        if runnable:
            said += f"; the best plan found that can takes {min(runnable) / winner.seconds - 1:.1%} longer"
        return [said]
    if len(winner.assembly.stages) == 1 or winner.candidate.microbatches == 1 or rule is GRAPH:
        return []
    gains = []
    for other in SIMPLE.values():
        if other.runnable:
            continue
        instead = judge_candidate(replace(winner.candidate, rule=other), request)
        if instead.predicted.peak_memory_bytes <= request.usable_bytes:
            gains.append((1 - instead.seconds / winner.seconds, other.name))
    best, name = max(gains, default=(0.0, ""))
    if best < _WORTH_SAYING:
        return []
    return [f"the same stages would take {best:.1%} less under schedule {name}, which cannot be executed yet"]


def _fallback_notes(winner: Judged, fallback: Judged | None, request: Request) -> list[str]:
    peak = winner.predicted.peak_memory_bytes / request.device_bytes
    if fallback is not None:
        share = fallback.predicted.peak_memory_bytes / request.device_bytes
        slower = fallback.seconds / winner.seconds - 1
        sure = "" if share <= SURE_SHARE else ", the leanest found, though not lean enough to be sure"
        return [f"fills {peak:.0%} of a device; a fallback that fills {share:.0%} takes {slower:.1%} longer{sure}"]
    if peak > SURE_SHARE:
        return [f"fills {peak:.0%} of a device, and no leaner plan was found to fall back on"]
    return []
