"""Plans of unlike stages: borders between layers, policies, tensor axes."""

from pathlib import Path
from typing import Any

import pytest

from experiments.validation.mist import nearest_policy, plan_case, read_plans, whole_layers
from experiments.validation.rows import DataError, Refused

PLANS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "mist" / "measured_plans_full.json"


def plan(**changes: Any) -> dict[str, Any]:
    """Two layers on two stages of one and two L4s."""
    config = {
        "num_ops_in_each_stage": [14, 15],
        "model_parallel_size_of_each_op__rle": [[[1, 14]], [[2, 15]]],
        "data_parallel_size_of_each_op__rle": [[[1, 14]], [[1, 15]]],
        "recompute_ops__rle": [[[0, 5], [1, 2], [0, 7]], [[1, 15]]],
    }
    told = {"gpu": "l4", "config": "made up", "num_layers": 2, "hidden_size": 256, "num_attention_heads": 4}
    told |= {"seq_length": 128, "global_batch_size": 8, "micro_batch_size": 1, "num_stages": 2, "num_gpus_total": 3}
    return told | {"measured_iter_ms": 1500.0, "config_json_rle": config | changes}


def test_a_plan_becomes_a_grid_of_unlike_stages() -> None:
    case = plan_case(plan())
    assert case.grid.layers_per_stage == (1, 1)
    assert case.grid.tensor_per_mesh == (1, 2)
    assert case.grid.recompute_per_stage == ("selective", "full")
    assert (case.cluster.devices, case.measured_seconds) == (3, 1.5)


def test_borders_go_to_the_nearest_place_between_layers() -> None:
    assert whole_layers([1 + 13 + 6, 7 + 13], layers=3) == (1, 2)
    assert whole_layers([1 + 13 + 7, 6 + 13 + 2], layers=3) == (2, 1)


def test_half_of_the_operators_is_not_yet_full_recomputation() -> None:
    assert [nearest_policy(flags) for flags in ([0, 0], [1, 0], [1, 1, 0])] == ["none", "selective", "full"]


def test_operators_of_a_stage_that_are_split_differently_are_refused() -> None:
    with pytest.raises(Refused, match="split differently"):
        plan_case(plan(model_parallel_size_of_each_op__rle=[[[1, 7], [2, 7]], [[2, 15]]]))


def test_a_file_without_plans_is_told(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="list of plans"):
        read_plans(path)


@pytest.mark.skipif(not PLANS.exists(), reason="the measured plans are not beside the checkout")
def test_every_measured_plan_can_be_expressed() -> None:
    cases = [plan_case(plan) for plan in read_plans(PLANS)]
    assert len(cases) == 15
    assert all(case.grid.devices == case.cluster.devices for case in cases)
