"""Plans of unlike stages: borders between layers, policies, tensor axes."""

from pathlib import Path
from typing import Any

import pytest

from experiments.validation.mist import layer_operators, plan_case, read_plans
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
    assert case.grid.operators_per_stage == ((False,) * 4 + (True,) * 2 + (False,) * 7, (True,) * 13)
    assert case.grid.tensor_per_mesh == (1, 2)
    assert (case.cluster.devices, case.measured_seconds) == (3, 1.5)


def test_embedding_and_logits_are_not_operators_of_a_layer() -> None:
    assert layer_operators([[1, *(0,) * 15], [0] * 10 + [1, 1]], layers=2) == ((False,) * 15, (False,) * 10 + (True,))


def test_too_few_operators_are_refused() -> None:
    with pytest.raises(Refused, match="-1 more or fewer"):
        layer_operators([[0] * 13], layers=1)


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
