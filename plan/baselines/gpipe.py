"""GPipe: stages of equally many layers, all micro-batches forward before any backward, everything recomputed."""

from meshwright.plan.baselines.base import Baseline, divisors, fastest, fixed
from meshwright.plan.planfile import Plan
from meshwright.plan.request import Request
from meshwright.plan.search import Graphs


def gpipe(graphs: Graphs, request: Request, plan: Plan) -> Plan:
    """The best number of equal stages, each on one device, the pipeline repeated over the rest as data parallelism.

    Source: Huang et al., GPipe, NeurIPS 2019, section 2.
    """
    devices = request.cluster.devices
    grids = [
        fixed(request, pipeline=p, data=devices // p, tensor=1, schedule="gpipe", remat="full", equal_layers=True)
        for p in divisors(devices)
        if p > 1
    ]
    return fastest(graphs, grids)


BASELINE = Baseline("GPipe, equal layers", gpipe)
