"""Four ranks under mpiexec train as plain JAX does on one device, step by step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

from meshwright.execute.launch import launch
from meshwright.plan.planfile import save_plan
from tests.execute.plain import batches, first_parameters, model_of, planned, splits_as_fixed, train_plainly

SPEC = "gpt:layers=2,hidden=48,heads=3,seq=24,vocab=96"  # tied embeddings: first and last stage share a weight
BATCH, STEPS = 12, 20

PLANS: dict[str, tuple[int, dict[str, Any]]] = {  # micro-batches, and what is fixed
    "pipeline 2 x tensor 2": (3, {"pipeline": 2, "tensor": 2, "data": 1, "schedule": "1f1b"}),
    "pipeline 4": (3, {"pipeline": 4, "tensor": 1, "data": 1, "schedule": "gpipe"}),
    "data 4": (3, {"pipeline": 1, "tensor": 1, "data": 4}),
    "tensor 4": (2, {"pipeline": 1, "tensor": 4, "data": 1}),
    "unequal meshes": (2, {"stages": ((1, 1), (1, 3)), "schedule": "1f1b"}),
}

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Every plan's losses, all trained by one job of four ranks, and those of plain JAX."""
    folder = tmp_path_factory.mktemp("parity")
    (folder / "losses").mkdir()
    model = model_of(SPEC)
    for name, (microbatches, fixed) in PLANS.items():
        plan = planned(model, BATCH, microbatches, **fixed)
        assert splits_as_fixed(plan), name
        save_plan(plan, folder / f"{name}.json")
    data = batches(model, BATCH, STEPS)
    stacked: dict[str, Any] = {name: np.stack([batch[name] for batch in data]) for name in data[0]}
    np.savez(folder / "batches.npz", **stacked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes longer than the training
        script = Path(__file__).parent / "ranks" / "train.py"
        assert launch(4, [str(script), str(folder)]) == 0
    found = {name: json.loads((folder / "losses" / f"{name}.json").read_text()) for name in PLANS}
    for microbatches in {count for count, _ in PLANS.values()}:
        weights = first_parameters(model)
        found[f"plain {microbatches}"], _ = train_plainly(model, weights, data, microbatches, optax.adamw(3e-3))
    return found


@pytest.mark.parametrize("name", PLANS)
def test_four_ranks_train_as_one_device_does(name: str, losses: dict[str, list[float]]) -> None:
    """To float32 rounding, which training amplifies: 1e-6 relative at the first step, 1e-4 at the twentieth."""
    allowed = np.geomspace(1e-6, 1e-4, STEPS)
    plain = losses[f"plain {PLANS[name][0]}"]
    error = np.abs(np.array(losses[name]) / plain - 1)
    assert (error <= allowed).all(), error
    assert plain[-1] < 0.8 * plain[0], "nothing was learnt, so nothing was compared"
