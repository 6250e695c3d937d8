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

SPEC = "gpt:layers={},hidden=48,heads=3,seq=24,vocab=96"  # tied embeddings: first and last stage share a weight
BATCH, STEPS = 12, 20

PLANS: dict[str, tuple[int, int, dict[str, Any]]] = {  # blocks, micro-batches, and what is fixed
    "pipeline 2 x tensor 2": (2, 3, {"pipeline": 2, "tensor": 2, "data": 1, "schedule": "1f1b"}),
    "pipeline 4": (2, 3, {"pipeline": 4, "tensor": 1, "data": 1, "schedule": "gpipe"}),
    "eager": (2, 3, {"pipeline": 4, "tensor": 1, "data": 1, "schedule": "eager-1f1b"}),
    "data 4": (1, 3, {"pipeline": 1, "tensor": 1, "data": 4}),
    "tensor 4": (1, 2, {"pipeline": 1, "tensor": 4, "data": 1}),
    "unequal meshes": (1, 2, {"stages": ((1, 1), (1, 3)), "schedule": "1f1b"}),
}

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Every plan's losses, all trained by one job of four ranks, and those of plain JAX."""
    folder = tmp_path_factory.mktemp("parity")
    (folder / "losses").mkdir()
    for name, (blocks, microbatches, fixed) in PLANS.items():
        plan = planned(model_of(SPEC.format(blocks)), BATCH, microbatches, **fixed)
        assert splits_as_fixed(plan), name
        save_plan(plan, folder / f"{name}.json")
    data = batches(model_of(SPEC.format(1)), BATCH, STEPS)
    stacked: dict[str, Any] = {name: np.stack([batch[name] for batch in data]) for name in data[0]}
    np.savez(folder / "batches.npz", **stacked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes longer than the training
        script = Path(__file__).parent / "ranks" / "train.py"
        assert launch(4, [str(script), str(folder)]) == 0
    found = {name: json.loads((folder / "losses" / f"{name}.json").read_text()) for name in PLANS}
    for blocks, microbatches in {case[:2] for case in PLANS.values()}:
        model = model_of(SPEC.format(blocks))
        plain, _ = train_plainly(model, first_parameters(model), data, microbatches, optax.adamw(3e-3))
        found[_plain_name(blocks, microbatches)] = plain
    return found


def _plain_name(blocks: int, microbatches: int) -> str:
    return f"plain, {blocks} blocks, {microbatches} micro-batches"


@pytest.mark.parametrize("name", PLANS)
def test_four_ranks_train_as_one_device_does(name: str, losses: dict[str, list[float]]) -> None:
    """To float32 rounding, which training amplifies: 1e-6 relative at the first step, 1e-4 at the twentieth."""
    allowed = np.geomspace(1e-6, 1e-4, STEPS)
    plain = losses[_plain_name(*PLANS[name][:2])]
    error = np.abs(np.array(losses[name]) / plain - 1)
    assert (error <= allowed).all(), error
    assert plain[-1] < 0.8 * plain[0], "nothing was learnt, so nothing was compared"
