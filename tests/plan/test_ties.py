"""Tied weights across stages: charged where they are shared, nowhere else, and as the plan then moves them."""

from functools import cache

import numpy as np
import pytest

from meshwright.calibrate.hardware import Cluster, parse_cluster
from meshwright.models.zoo import get_model
from meshwright.plan.graph import ModelGraph
from meshwright.plan.request import requested_kinds
from meshwright.plan.search import Fix, Request, search
from meshwright.plan.space import Memory
from meshwright.plan.stages import Setting, StagePricer
from meshwright.plan.ties import tied_layers, with_ties
from meshwright.plan.trace.model import trace

TIED = "gpt:layers=4,hidden=64,heads=4,seq=32,vocab=256"
BATCH, MICROBATCHES = 16, 4


@cache
def graph_of(model: str) -> ModelGraph:
    return trace(get_model(model), BATCH, MICROBATCHES).graph


def pricer_of(model: str, cluster: Cluster) -> StagePricer:
    kinds = requested_kinds(cluster, Fix(data=1, tensor=1, pipeline=cluster.devices), 0.0)
    return StagePricer(Setting(graph_of(model), MICROBATCHES, False, Memory()), kinds)


def extra_seconds(model: str, cluster: Cluster) -> np.ndarray:
    pricer = pricer_of(model, cluster)
    table = pricer.stage_table(cluster)
    return (with_ties(table, pricer, cluster).once_seconds - table.once_seconds)[:, :, 0, 0, 0]


def test_stages_that_share_the_embedding_pay_for_gradient_and_weight() -> None:
    """One device each: the embedding's bytes once there and once back, over the link between hosts."""
    cluster = parse_cluster("p3.16xlarge:2")
    layers = len(graph_of(TIED).layers)
    ((leaf, readers),) = tied_layers(pricer_of(TIED, cluster))
    assert readers == (0, layers - 1)
    link = cluster.inter_host
    rate = min(q.value for q in (link.bytes_per_second, link.host_bytes_per_second) if q is not None)
    expected = 2 * (graph_of(TIED).parameters[leaf].tensor.bytes / rate + link.latency_seconds.value)
    extra = extra_seconds(TIED, cluster)
    assert extra[0, 1] == pytest.approx(expected)
    assert extra[layers - 2, layers] == pytest.approx(expected)


def test_a_stage_with_all_readers_or_none_pays_nothing() -> None:
    extra = extra_seconds(TIED, parse_cluster("p3.16xlarge:1"))
    layers = len(graph_of(TIED).layers)
    assert extra[0, layers] == 0
    assert extra[1, layers - 1] == 0


def test_a_model_without_tied_weights_keeps_its_table() -> None:
    cluster = parse_cluster("p3.16xlarge:1")
    pricer = pricer_of(TIED + ",tied=false", cluster)
    table = pricer.stage_table(cluster)
    assert with_ties(table, pricer, cluster) is table


def test_a_split_embedding_moves_each_device_s_part_alone() -> None:
    """Two stages of four devices: what each is sent is what it holds, by the spec that its own layers have."""
    fix = Fix(data=1, tensor=4, pipeline=2, microbatches=MICROBATCHES, schedule="1f1b", remat="none")
    plan = search(lambda _: graph_of(TIED), Request(parse_cluster("p3.16xlarge:1"), BATCH, fix))
    graph, link = graph_of(TIED), plan.hardware.hosts[0].link
    ((leaf, (first, last)),) = tied_layers(pricer_of(TIED, plan.hardware))
    sent = {t.what: t for t in plan.transfers if t.what in ("gradient", "parameter")}
    for what, stage, layer in (("gradient", plan.stages[0], first), ("parameter", plan.stages[1], last)):
        use = graph.layers[layer]
        value = graph.classes[use.layer_class].parameters[use.parameters.index(leaf)]
        spec = plan.layouts[stage.layouts[layer - stage.layers[0]]].values[f"{value}:parameter"]
        part = graph.parameters[leaf].tensor.bytes / (4 if "tensor" in spec else 1)
        assert sent[what].wire_seconds == pytest.approx(part / link.bytes_per_second.value)


def test_the_search_counts_what_ties_cost() -> None:
    """With a large vocabulary on a slow network, stages that share the embedding must be worth its two ways."""
    model = "gpt:layers=4,hidden=64,heads=4,seq=32,vocab=65536"
    cluster = parse_cluster("p3.16xlarge:2")
    graph = trace(get_model(model), BATCH, MICROBATCHES).graph
    plan = search(lambda _: graph, Request(cluster, BATCH, Fix(microbatches=MICROBATCHES)))
    forced = search(lambda _: graph, Request(cluster, BATCH, Fix(microbatches=MICROBATCHES, pipeline=2)))
    assert plan.predicted.iteration_seconds <= forced.predicted.iteration_seconds
