"""Plans of one tiny GPT, made once for all tests that ask."""

from functools import cache

from meshwright.calibrate.hardware import Cluster, parse_cluster
from meshwright.models.zoo import get_model
from meshwright.plan.graph import ModelGraph
from meshwright.plan.planfile import Plan
from meshwright.plan.search import Fix, Request, search
from meshwright.plan.trace.model import trace

BATCH = 8
SPEC = "gpt:layers=4,hidden=32,heads=4,seq=16,vocab=64"


@cache
def graph_of(microbatches: int) -> ModelGraph:
    return trace(get_model(SPEC), BATCH, microbatches).graph


FREE = Fix()


@cache
def planned(fix: Fix = FREE) -> Plan:
    return search(graph_of, Request(cpus(), BATCH, fix))


def cpus(count: int = 4) -> Cluster:
    return parse_cluster(f"cpu:{count}")
