"""What a plan says of ZeRO: that it uses it and cannot be executed yet, or what it would gain by it."""

from dataclasses import replace

from meshwright.plan.inter import StagePlan
from meshwright.plan.judge import Candidate, Judged, judge_candidate
from meshwright.plan.planfile import bytes_text
from meshwright.plan.policies import ManyWays
from meshwright.plan.request import Request
from meshwright.plan.stages import StagePricer
from meshwright.plan.zero import AUTO

_WORTH_SAYING = 0.01  # of the step, or of a device's memory


def zero_notes(winner: Judged, request: Request) -> list[str]:
    """A note on ZeRO, if there is something to say."""
    level = highest_level(winner)
    if level:
        return [f"keeps parameters at up to ZeRO-{level}, which cannot be executed yet; --zero 0 plans without"]
    if request.zero or not winner.candidate.rule.runnable:
        return []
    instead = judge_candidate(offered_zero(winner.candidate), request)
    gain = 1 - instead.seconds / winner.seconds
    spared = winner.predicted.peak_memory_bytes - instead.predicted.peak_memory_bytes
    if gain < _WORTH_SAYING and (gain < 0 or spared < _WORTH_SAYING * request.device_bytes):
        return []
    found = [f"take {gain:.1%} less"] if gain >= _WORTH_SAYING else []
    found += [f"hold {bytes_text(spared)} less a device"] if spared >= _WORTH_SAYING * request.device_bytes else []
    return [f"the same stages would {' and '.join(found)} with --zero auto, which cannot be executed yet"]


def highest_level(judged: Judged) -> int:
    """The highest level of ZeRO in the stages' layouts."""
    return max((level for layout in judged.assembly.layouts.values() for level in layout.zero.values()), default=0)


def offered_zero(candidate: Candidate) -> Candidate:
    """The same stages on the same meshes, each parameter kept at the best level."""
    used = sorted({stage.kind for stage in candidate.stages.stages})
    stages = tuple(replace(stage, kind=used.index(stage.kind)) for stage in candidate.stages.stages)
    plan = StagePlan(stages, candidate.stages.surrogate_seconds, candidate.stages.peak_bytes)
    return replace(candidate, pricer=_on_kinds(candidate.pricer, used), stages=plan)


def _on_kinds(pricer: StagePricer, used: list[int]) -> StagePricer:
    """A pricer with ZeRO for some of the kinds of another, each of them its own way if that has several."""
    if isinstance(pricer, ManyWays):
        places = [divmod(kind, len(pricer.ways[0].kinds)) for kind in used]
        return ManyWays.of(*(_on_kinds(pricer.ways[way], [mesh]) for way, mesh in places))
    setting = replace(pricer.setting, zero=AUTO)
    return StagePricer(setting, tuple(pricer.kinds[kind] for kind in used), pricer.use_ilp, pricer.spaces)
