"""Megatron-LM's grid: tensor × pipeline × data parallelism, the same in every stage, equally many layers each."""

from meshwright.plan.baselines.base import Baseline, divisors, fastest, fixed
from meshwright.plan.planfile import Plan
from meshwright.plan.request import Request
from meshwright.plan.search import Graphs


def megatron(graphs: Graphs, request: Request, plan: Plan) -> Plan:
    """The best of all grids whose tensor parallelism stays inside a host, under 1F1B.

    Its sequence parallelism, several stages a mesh and selective rematerialisation are not among the choices: the
    traced route does not price them. ``meshwright simulate MODEL --fix`` does, by the formulas of its grid.
    Source: Narayanan et al., SC 2021, section 3.
    """
    devices = request.cluster.devices
    grids = [
        fixed(request, tensor=t, pipeline=p, data=devices // t // p, schedule="1f1b", equal_layers=True)
        for t in divisors(request.cluster.devices_per_host)
        for p in divisors(devices // t)
        if devices % t == 0
    ]
    return fastest(graphs, grids)


BASELINE = Baseline("Megatron-LM's grid", megatron)
