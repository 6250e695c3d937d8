"""A pipeline alone: every stage on one device."""

from meshwright.plan.baselines.base import Baseline, fixed
from meshwright.plan.planfile import Plan
from meshwright.plan.request import Request
from meshwright.plan.search import Graphs, search


def inter_only(graphs: Graphs, request: Request, plan: Plan) -> Plan:
    """As many stages as devices, cut as they are best. Source: Zheng et al., Alpa, OSDI 2022, section 8.2."""
    return search(graphs, fixed(request, data=1, tensor=1, pipeline=request.cluster.devices))


BASELINE = Baseline("inter-operator only", inter_only)
