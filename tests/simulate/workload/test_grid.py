"""Grids: what divides what, and the line that says so."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import MeshwrightError, PlanError
from meshwright.simulate.workload.grid import Grid, check_grid, spread_layers, stage_layers
from meshwright.simulate.workload.transformer import Transformer

MODEL = Transformer(layers=24, hidden=1024, heads=16, vocabulary=51200, sequence=2048)


def test_axes_multiply_to_devices_and_the_batch_is_shared_out() -> None:
    grid = Grid(batch=96, microbatch_size=2, tensor=4, pipeline=3, data=8, context=2, chunks=2)
    assert grid.devices == 4 * 3 * 8 * 2
    assert grid.mesh_devices == 64
    assert grid.replicas == 16
    assert grid.microbatches == 6
    assert grid.stages == 6


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 100, "data": 32}, "Use a batch of 96 or 128"),
        ({"batch": 8, "microbatch_size": 3, "data": 4}, "Use a batch of 12"),
        ({"batch": 0}, "batch of a grid is 0"),
        ({"batch": 8, "tensor": 2.0}, "tensor of a grid is 2.0"),
        ({"batch": 8, "zero": 4}, "zero is 4"),
        ({"batch": 8, "recompute": "some"}, "recompute 'some' is unknown"),
        ({"batch": 8, "schedule": "2f2b"}, "schedule '2f2b' is unknown"),
        ({"batch": 8, "data": 4, "expert": 3}, "expert is 3"),
        ({"batch": 8, "pipeline": 2, "layers_per_stage": (24,)}, "names 1 stages; the grid has 2"),
    ],
)
def test_impossible_grids_are_one_line(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(MeshwrightError, match=message) as error:
        Grid(**sizes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ({"batch": 8, "tensor": 8}, 16, "needs 8 devices; there are 16"),
        ({"batch": 8, "tensor": 3}, 3, "heads 16 do not split over 3"),
        ({"batch": 8, "context": 3}, 3, "sequence of 2048 does not split over 3"),
        ({"batch": 8, "pipeline": 7}, 7, "24 layers do not split over 7 stages. Use 21 or 28"),
        ({"batch": 8, "pipeline": 2, "layers_per_stage": (10, 10)}, 2, "do not add up to the model's 24"),
        ({"batch": 8, "data": 2, "expert": 2}, 2, "1 experts do not split over 2"),
    ],
)
def test_models_that_do_not_fit_a_grid_are_one_line(sizes: dict[str, Any], devices: int, message: str) -> None:
    with pytest.raises(PlanError, match=message) as error:
        check_grid(MODEL, Grid(**sizes), devices)
    assert "\n" not in str(error.value)


def test_embedding_and_head_may_stand_for_a_layer_each() -> None:
    """As in the zero-bubble paper: 30 layers on 8 stages, one fewer on the first and the last."""
    model = Transformer(layers=30, hidden=4096, heads=32, vocabulary=51200, sequence=1024)
    assert stage_layers(model, Grid(batch=8, pipeline=8)) == (3, 4, 4, 4, 4, 4, 4, 3)
    assert stage_layers(MODEL, Grid(batch=8, pipeline=4)) == (6, 6, 6, 6)


@given(layers=st.integers(1, 300), stages=st.integers(1, 80))
def test_spread_layers_differ_by_one_at_most(layers: int, stages: int) -> None:
    counts = spread_layers(layers, stages)
    assert sum(counts) == layers
    assert len(counts) == stages
    assert max(counts) - min(counts) <= 1
    if stages > 2:
        assert counts[0] <= max(counts[1:-1])
        assert counts[-1] <= max(counts[1:-1])
