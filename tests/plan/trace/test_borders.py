"""Borders between branches: synthetic lists of equations, and a real model with two towers."""

import numpy as np

from meshwright.models.zoo import get_model
from meshwright.plan.branches import Chain, Fork, decompose, layer_edges
from meshwright.plan.trace.borders import branch_borders
from meshwright.plan.trace.model import trace


def test_a_chain_has_no_border() -> None:
    assert branch_borders([0, 0, 1, 2, 3], np.ones(5)) == []


def test_towers_begin_where_nothing_before_is_read() -> None:
    """0-1-2 and 3-4-5 are joined by 6; a third tower would begin at its own first equation."""
    assert branch_borders([0, 0, 1, 3, 3, 4, 2], np.ones(7)) == [3]
    assert branch_borders([0, 0, 2, 2, 4, 4, 1, 6], np.ones(8)) == [2, 4]


def test_labels_and_other_small_inputs_are_no_branch() -> None:
    flops = np.array([10.0, 10.0, 0.0, 10.0])
    assert branch_borders([0, 0, 2, 1], flops) == []


def test_a_model_with_two_towers_is_cut_between_them() -> None:
    model = get_model("two-tower:layers=3,hidden=64,heads=2,seq=2,vocab=64,features=64")
    graph = trace(model, 8, 2).graph
    (fork, *joined) = decompose(len(graph.layers), layer_edges(graph)).parts
    assert isinstance(fork, Fork)
    assert [type(branch) for branch in fork.branches] == [Chain, Chain]
    assert joined == [len(graph.layers) - 1]
