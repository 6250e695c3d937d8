"""Data parallelism alone: every device holds the whole model, gradients are summed once a step."""

from meshwright.plan.baselines.base import Baseline, fixed
from meshwright.plan.planfile import Plan
from meshwright.plan.request import Request
from meshwright.plan.search import Graphs, search


def data_parallel(graphs: Graphs, request: Request, plan: Plan) -> Plan:
    """The best number of micro-batches (accumulated gradients) and rematerialisation for one mesh of data alone.

    Source: Li et al., PyTorch Distributed, VLDB 2020.
    """
    return search(graphs, fixed(request, data=request.cluster.devices, tensor=1, pipeline=1))


BASELINE = Baseline("data parallel", data_parallel)
