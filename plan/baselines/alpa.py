"""Alpa's objective: stages without the traffic between them, all devices used, the number of micro-batches given."""

from dataclasses import replace

from meshwright.plan.baselines.base import Baseline, fixed
from meshwright.plan.planfile import Plan
from meshwright.plan.request import Request
from meshwright.plan.search import Graphs, search


def alpa(graphs: Graphs, request: Request, plan: Plan) -> Plan:
    """The stages that Alpa's equation 2 prefers, under 1F1B, judged with all traffic.

    It is given our plan's number of micro-batches and rematerialisation, which its users have to find by themselves.
    Source: Zheng et al., Alpa, OSDI 2022, section 5.
    """
    remat = "none" if plan.remat == "none" else "full"
    given = fixed(request, schedule="1f1b", microbatches=plan.microbatches, remat=remat)
    return search(graphs, replace(given, cross_mesh=False))


BASELINE = Baseline("Alpa's objective", alpa)
