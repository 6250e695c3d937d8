"""Piper's cost terms on a graph of three nodes, and its BERT-32 on up to 1,024 devices."""

import itertools
import time
from pathlib import Path

import pytest

from experiments.rivals import piper
from meshwright.errors import PlanError

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "rivals" / "piper_bert32.json").exists(), reason="the layer graphs and rivals' plans are not beside us"
)


def _way(name: str, seconds: float, live: float, before: dict[int, float], after: dict[int, float]) -> piper.Way:
    return piper.Way(name, seconds, 8.0, live, 10.0, before, after)


def _diamond() -> piper.Graph:
    """0 feeds 1 and 2, 1 feeds 2; each node takes 1 s and holds 6 B a micro-batch, or 1.5 s and 2 B."""

    def node(n: int, before: dict[int, float], after: dict[int, float]) -> piper.Node:
        ways = (_way("fast", 1.0, 6.0, before, after), _way("lean", 1.5, 2.0, before, after))
        return piper.Node(n, f"node {n}", {1: ways})

    return piper.Graph(
        max_memory_per_device=100.0,
        bandwidth=100.0,
        mbs_in_batch=4,
        nodes=(node(0, {}, {1: 0.0, 2: 0.0}), node(1, {0: 0.0}, {2: 0.0}), node(2, {0: 5.0, 1: 0.0}, {})),
        edges=(piper.Edge(0, 1, 10.0), piper.Edge(0, 2, 20.0), piper.Edge(1, 2, 30.0)),
    )


def test_a_stage_pays_for_its_work_the_edges_it_cuts_and_its_gradients() -> None:
    """Node 2 on two replicas: 1 s / 2, 2 · (20 + 5 + 30) B / 2 / 100 B/s and 4 · ½ · 8 B / 4 / 100 B/s."""
    alone = piper.stage_seconds(_diamond(), frozenset({2}), 1, 2, {2: 0})
    assert alone == pytest.approx(0.5 + 0.55 + 0.04)
    whole = piper.stage_seconds(_diamond(), frozenset({0, 1, 2}), 1, 1, {0: 0, 1: 1, 2: 0})
    assert whole == pytest.approx(3.5)
    assert piper.stage_bytes(_diamond(), frozenset({0, 1}), 1, 3, {0: 0, 1: 1}) == 3 * (6 + 2) + 20


@pytest.mark.parametrize("memory_bytes", [100.0, 32.0, 26.0, 12.0])
def test_the_plan_of_a_branching_graph_is_the_best_of_all(memory_bytes: float) -> None:
    graph = piper.Graph(memory_bytes, 100.0, 4, _diamond().nodes, _diamond().edges)
    best = float("inf")
    for cuts in itertools.product((0, 1), repeat=2):  # the graph has one order, so its stages are spans
        spans: list[list[int]] = [[0]]
        for n, cut in enumerate(cuts, start=1):
            spans = [*spans, [n]] if cut else [*spans[:-1], [*spans[-1], n]]
        for replicas in itertools.product((1, 2, 4), repeat=len(spans)):
            if sum(replicas) > 4:
                continue
            for ways in itertools.product((0, 1), repeat=3):
                chosen = dict(enumerate(ways))
                worst = 0.0
                for stage, nodes in enumerate(map(frozenset, spans)):
                    d = replicas[stage]
                    in_flight = -(-sum(replicas[stage:]) // d)
                    if piper.stage_bytes(graph, nodes, 1, in_flight, chosen) > memory_bytes:
                        worst = float("inf")
                    worst = max(worst, piper.stage_seconds(graph, nodes, 1, d, chosen))
                best = min(best, worst)
    if best == float("inf"):
        with pytest.raises(PlanError, match="no pipeline on 4 devices"):
            piper.plan(graph, 4)
    else:
        assert piper.plan(graph, 4).bottleneck_seconds == pytest.approx(best, rel=1e-12)


@needs_data
def test_the_terms_give_the_times_that_piper_printed_for_its_own_plans() -> None:
    """All 31 stages of its four plans, to the six digits that it printed."""
    graph = piper.read_graph(DATA / "graphs" / "bert32a100.json")
    stages = 0
    for run in piper.reference_runs(DATA / "rivals" / "piper_bert32.json").values():
        for stage in run["plan"]:
            nodes = frozenset(map(int, stage["nodes"].split()))
            fastest = dict.fromkeys(nodes, 0)
            seconds = piper.stage_seconds(graph, nodes, stage["t"], stage["d"], fastest)
            assert seconds == pytest.approx(stage["tps"], rel=5e-6)
            stages += 1
    assert stages == 31


@needs_data
@pytest.mark.parametrize("devices", [8, 64, 512, 1024])
def test_bert_32_is_no_slower_than_in_pipers_plan_and_a_thousand_devices_take_seconds(devices: int) -> None:
    graph = piper.read_graph(DATA / "graphs" / "bert32a100.json")
    theirs = piper.reference_runs(DATA / "rivals" / "piper_bert32.json")[devices]
    began = time.process_time()  # of this process alone, whatever else the machine does
    answer = piper.plan(graph, devices)
    assert time.process_time() - began < 5
    assert answer.bottleneck_seconds <= theirs["max_stage_TPS_s"] * (1 + 5e-6)  # printed with six digits
    assert answer.devices <= devices
    assert sorted(n for stage in answer.stages for n in stage.nodes) == sorted(node.id for node in graph.nodes)
