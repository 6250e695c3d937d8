"""The halves of a backward: which operators wait, and how many FLOPs and seconds they are."""

import numpy as np
import pytest

from meshwright.plan.backward_split import flop_shares, weight_operators, weight_seconds
from meshwright.plan.space import Memory
from meshwright.plan.stages import MeshKind, Setting, StagePricer, logical_mesh
from tests.plan.planned import cpus, graph_of

HIDDEN, SEQ, VOCAB = 32, 16, 64  # of the planned GPT


def test_a_transformer_layer_has_a_weight_half_for_each_weight_matmul() -> None:
    """12 h² weights a token, for forward, input and weight half alike; attention adds twice 4 s h to the input half."""
    graph = graph_of(1)
    counts = [use.layer_class for use in graph.layers]
    layer = graph.classes[max(set(counts), key=counts.count)]
    late = weight_operators(layer)
    weights = 2 * 12 * HIDDEN**2
    scores = 2 * 2 * SEQ * HIDDEN

    def flops(wanted: bool) -> float:
        tokens = graph.microbatch_size * SEQ
        backward = [(i, op) for i, op in enumerate(layer.operators) if op.phase == "backward" and op.heavy]
        return sum(op.flops for i, op in backward if (i in late) == wanted) / tokens

    assert flops(True) == weights
    assert flops(False) == weights + 2 * scores


def test_gradients_wait_and_cotangents_do_not() -> None:
    for layer in graph_of(1).classes:
        late = weight_operators(layer)
        producer = layer.producer()
        assert all(producer[v] not in late for v in layer.entry_cotangents if v in producer)
        read_in_time = {v for i, op in enumerate(layer.operators) if i not in late for v in op.inputs}
        assert not read_in_time & {out for i in late for out in layer.operators[i].outputs}


def test_shares_of_stages_are_those_of_their_layers_together() -> None:
    graph = graph_of(1)
    forward, weight = flop_shares(graph, remat=False)
    again, weight_again = flop_shares(graph, remat=True)
    layers = len(graph.layers)
    for shares in (forward, weight, again, weight_again):
        assert shares.shape == (layers, layers + 1)
        assert (shares >= 0).all()
        assert (shares <= 1).all()
    inside = np.triu(np.ones((layers, layers + 1), bool), 1)
    assert (forward + weight <= 1 + 1e-12)[inside].all()
    assert forward[0, layers] == pytest.approx(1 / 3, abs=0.01)
    # a forward that runs twice is a smaller part of more: f / (1 + f)
    assert again[0, layers] == pytest.approx(forward[0, layers] / (1 + forward[0, layers]))


@pytest.mark.parametrize("remat", [False, True])
def test_the_seconds_of_the_weight_half_are_part_of_the_backward(remat: bool) -> None:
    cluster, graph = cpus(), graph_of(1)
    kind = MeshKind(logical_mesh(cluster, (2,)))
    pricer = StagePricer(Setting(graph, 1, remat, Memory()), (kind,))
    last = len(graph.layers)
    cost = pricer.cost(0, last, 0, 0, 0)
    late = weight_seconds(cost)
    assert 0.1 * cost.backward_compute_seconds < late < 0.7 * cost.backward_compute_seconds
    parts = [pricer.cost(0, 2, 0, cost.layouts[0], cost.layouts[2]), pricer.cost(2, last, 0, cost.layouts[2], 0)]
    assert late == pytest.approx(sum(weight_seconds(part) for part in parts))
