"""Sharded operators alone: one stage on one mesh of all devices."""

from meshwright.plan.baselines.base import Baseline, fixed
from meshwright.plan.planfile import Plan
from meshwright.plan.request import Request
from meshwright.plan.search import Graphs, search


def intra_only(graphs: Graphs, request: Request, plan: Plan) -> Plan:
    """Every operator sharded as it is best, no pipeline. Source: Zheng et al., Alpa, OSDI 2022, section 8.2."""
    return search(graphs, fixed(request, pipeline=1))


BASELINE = Baseline("intra-operator only", intra_only)
