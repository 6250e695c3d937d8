"""What the search believes of each schedule: the surrogate of its makespan, and whether the executor runs it.

A stage takes F for its forward, I and W for the halves of its backward, t = F + I + W in all, and the hop after it x.
With B micro-batches every surrogate is

    T = sum_s (fill_s + x_s) + (B - 1) max_s step_s + max_s once_s

    schedule      fill_s           step_s            source of the makespan that it equals for equal stages without hops
    gpipe         t                max(t, x)         Huang et al., NeurIPS 2019, section 2.3
    1f1b          t                t + x             Narayanan et al., SC 2021, section 2.2
    eager-1f1b    t                max(t, x)         Zhuang et al., MLSys 2023, section 4: hops are hidden
    zb-h1         t - 2W           max(t', x)        Qi et al., ICLR 2024, section 2.3
    zb-h2         max(F, t - 3W)   max(t', x)        the same; its span, and the last stage's late start

where t' = t + (t - fill) / (B - 1): what waits hide of the bottleneck comes back once. For unlike stages (seconds that
differ by up to a half, 2 to 6 stages, 8 to 32 micro-batches) all are pessimistic against the event engine, in the mean
by 1 % (1f1b), 0 (gpipe), 4 % (eager-1f1b), 0.4 % (zb-h1) and 2 % (zb-h2); a hop of
a tenth of a stage adds 8 % to 1f1b's.

Stages that form a graph (graph-1f1b) fill along its longest path: ``meshwright.plan.stage_graph``. Several stages a
mesh (interleaved, looped-bfs, zb-v) have a surrogate of their own in ``meshwright.plan.virtual``. How many
micro-batches a stage holds comes from the schedule itself (``meshwright.simulate.schedules``).
"""

from dataclasses import dataclass

from meshwright.errors import PlanError
from meshwright.simulate.schedules.base import Schedule
from meshwright.simulate.schedules.table import SCHEDULES


@dataclass(frozen=True, slots=True)
class ScheduleRule:
    """How the stage search counts a schedule.

    Args:
        name: the simulator's.
        chunks: stages on each mesh.
        hops_wait: whether the steady state waits for hops, so that they add to the stage's step; else they run beside.
        hidden_halves: how many weight-gradient halves of each stage fill waits at both ends of the step.
        live_by_total: whether a stage's live micro-batches depend on all stages and not only on those after it.
    """

    name: str
    chunks: int = 1
    hops_wait: bool = True
    hidden_halves: int = 0
    live_by_total: bool = False

    @property
    def schedule(self) -> Schedule:
        """The simulator's schedule."""
        return SCHEDULES[self.name]

    @property
    def text(self) -> str:
        """The name as users write it, with the stages a mesh where there is a choice."""
        return f"{self.name}:{self.chunks}" if "chunks" in self.schedule.takes else self.name

    @property
    def splits_backward(self) -> bool:
        """Whether input- and weight-gradients run apart."""
        return self.schedule.splits_backward

    @property
    def runnable(self) -> bool:
        """Whether the executor runs it."""
        return self.name in RUNNABLE

    def live(self, to_end: int, stages: int, microbatches: int) -> int:
        """Most micro-batches that the ``to_end``-th of ``stages`` stages, counted from the last, holds at once."""
        known = self.schedule.live_microbatches
        if known is None:
            raise PlanError(f"how many micro-batches a stage of schedule {self.name} holds has no closed form")
        return known(stages - to_end, stages, microbatches)


GRAPH = ScheduleRule("graph-1f1b")  # 1f1b where stages form a graph: ``meshwright.plan.stage_graph``
RUNNABLE = ("1f1b", "gpipe", "eager-1f1b", GRAPH.name)  # what ``meshwright.execute.runtime`` interprets
SIMPLE = {
    rule.name: rule
    for rule in (
        ScheduleRule("1f1b"),
        ScheduleRule("gpipe", hops_wait=False),
        ScheduleRule("eager-1f1b", hops_wait=False),
        ScheduleRule("zb-h1", hops_wait=False, hidden_halves=2, live_by_total=True),
        ScheduleRule("zb-h2", hops_wait=False, hidden_halves=3, live_by_total=True),
    )
}
SEVERAL_A_MESH = ("interleaved", "looped-bfs", "zb-v")
ALL_SCHEDULES = (*SIMPLE, GRAPH.name, "interleaved:2", "interleaved:4", "looped-bfs:2", "looped-bfs:4", "zb-v")
_LEFT_OUT = {
    "gpipe-lifo": "takes as long as gpipe",
    "zb-1p": "is an order found for given times; zb-h1 has its memory",
    "zb-2p": "is an order found for given times; zb-h2 has its memory",
    "dualpipe": "keeps two copies of all weights",
    "dualpipe-v": "overlaps pairs that no runtime here overlaps; zb-v has its placement",
    "chimera": "keeps two copies of all weights",
}


def find_rule(text: str) -> ScheduleRule:
    """The rule of a schedule, written as its name or, where a mesh may hold several stages, ``name:stages``.

    Errors: PlanError naming what can be searched.
    """
    name, colon, count = text.partition(":")
    if name in (*SIMPLE, GRAPH.name) and not colon:
        return SIMPLE.get(name, GRAPH)
    if name in SEVERAL_A_MESH:
        schedule = SCHEDULES[name]
        if not colon:
            return ScheduleRule(name, schedule.chunks)
        if "chunks" in schedule.takes and count.isdecimal() and int(count) >= 2:
            return ScheduleRule(name, int(count))
        raise PlanError(f"schedule {text!r} cannot be planned; write {name}:2, or {name} for {schedule.chunks} a mesh")
    why = f"it {_LEFT_OUT[name]}; " if name in _LEFT_OUT else ""
    raise PlanError(f"schedule {text!r} cannot be planned: {why}use one of {', '.join(ALL_SCHEDULES)}")
