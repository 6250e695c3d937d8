"""A problem that exists is valid; the cost of an assignment is what one adds up by hand."""

from typing import Any

import numpy as np
import pytest

from meshwright.errors import PlanError
from meshwright.plan.assignment import Problem

TWO = (np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0]))
EDGE = np.array([[10.0, 20.0, 30.0], [40.0, np.inf, 60.0]])
TWO_BYTES = (np.array([1.0, 2.0]), np.array([4.0, 8.0, 16.0]))


def test_seconds_are_nodes_plus_edges_and_bytes_are_nodes() -> None:
    problem = Problem(TWO, {(0, 1): EDGE}, TWO_BYTES, memory_limit_bytes=9.0)
    assert problem.nodes == 2
    assert problem.seconds((0, 2)) == 1 + 5 + 30
    assert problem.seconds((1, 1)) == np.inf
    assert problem.bytes((1, 1)) == 10


def test_without_bytes_an_assignment_holds_none() -> None:
    assert Problem(TWO).bytes((0, 0)) == 0
    assert Problem(()).seconds(()) == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"node_seconds": (np.array([]),)}, "node 0 has costs of shape"),
        ({"node_seconds": (np.zeros((2, 2)),)}, "node 0 has costs of shape"),
        ({"node_seconds": (np.array([np.nan]),)}, "node 0 has a cost that is no number"),
        ({"node_seconds": (np.array([-np.inf]),)}, "node 0 has a cost that is no number"),
        ({"edge_seconds": {(1, 0): EDGE.T}}, "does not run between two of 2 nodes in order"),
        ({"edge_seconds": {(0, 0): np.zeros((2, 2))}}, "does not run between two of 2 nodes in order"),
        ({"edge_seconds": {(1, 2): EDGE.T}}, "does not run between two of 2 nodes in order"),
        ({"edge_seconds": {(0, 1): EDGE.T}}, "has shape .* its nodes have .* strategies"),
        ({"edge_seconds": {(0, 1): EDGE * np.nan}}, "edge .* has a cost that is no number"),
        ({"node_bytes": TWO_BYTES[:1]}, "differ in shape"),
        ({"node_bytes": TWO_BYTES[::-1]}, "differ in shape"),
        ({"node_bytes": (np.array([1.0, -2.0]), TWO_BYTES[1])}, "finite and at least 0"),
        ({"node_bytes": (np.array([1.0, np.inf]), TWO_BYTES[1])}, "finite and at least 0"),
        ({"memory_limit_bytes": 5.0}, "memory limit of 5.0 needs node bytes"),
        ({"node_bytes": TWO_BYTES, "memory_limit_bytes": -1.0}, "at least 0"),
        ({"node_bytes": TWO_BYTES, "memory_limit_bytes": np.nan}, "at least 0"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused_at_birth(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Problem(**{"node_seconds": TWO, **fields})
