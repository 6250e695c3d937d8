"""The Python face, as the README shows it: a loss of the user's own, planned, predicted, built and trained."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import meshwright as mw
from meshwright.errors import ModelError, PlanError


def loss_fn(params: Any, batch: Any) -> Any:
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] - batch["y"]) ** 2)


def problem() -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "w1": jax.random.normal(keys[0], (16, 64)) / 4,
        "b1": jnp.zeros(64),
        "w2": jax.random.normal(keys[1], (64, 4)) / 8,
    }
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(8, 16)).astype(np.float32), "y": rng.normal(size=(8, 4)).astype(np.float32)}
    return params, batch


@pytest.mark.parametrize("fix", [mw.Fix(data=4, tensor=1), mw.Fix(tensor=4, data=1), mw.Fix()])
def test_a_users_own_loss_trains_as_plain_jax_does(fix: mw.Fix, tmp_path: Path) -> None:
    params, batch = problem()
    optimizer = optax.adamw(1e-2)
    plan = mw.find_plan(loss_fn, params, batch, optimizer=optimizer, cluster=mw.cluster("cpu:4"), fix=fix)
    mw.predict(plan).plot(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 0
    trainer = mw.build(plan, loss_fn, optimizer, params, batch)
    state = trainer.init(jax.random.key(0))
    plain, moments = params, optimizer.init(params)
    for _ in range(3):
        state, metrics = trainer.step(state, batch)
        loss, gradient = jax.value_and_grad(loss_fn)(plain, batch)
        updates, moments = optimizer.update(gradient, moments, plain)
        plain = optax.apply_updates(plain, updates)
        assert metrics.loss == pytest.approx(float(loss), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(trainer.parameters(state)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_shapes_are_enough_to_plan() -> None:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), problem())
    plan = mw.find_plan(loss_fn, *shapes, cluster="cpu:2", fix=mw.Fix(microbatches=2))
    assert plan.microbatches == 2
    assert mw.predict(plan).predicted == plan.predicted


def test_limits_and_schedules_of_the_search_can_be_given() -> None:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), problem())
    asked: dict[str, Any] = {"cluster": "cpu:2", "schedules": ["gpipe"], "time_limit_seconds": 1e-6}
    plan = mw.find_plan(loss_fn, *shapes, **asked)
    assert plan.schedule == "gpipe"
    assert any("the search stopped after its 1e-06 seconds" in note for note in plan.notes)
    with pytest.raises(PlanError, match="a memory margin of 2 is no share"):
        mw.find_plan(loss_fn, *shapes, **asked, memory_margin=2.0)


def test_leaves_that_disagree_on_the_number_of_samples_are_refused() -> None:
    params, batch = problem()
    with pytest.raises(ModelError, match="dim 0"):
        mw.find_plan(loss_fn, params, {"x": batch["x"], "y": batch["y"][:4]}, cluster="cpu:2")


README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_readmes_python_runs_and_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    trains, shows = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    expected = README.partition(shows)[2].split("```")[2].lstrip("\n")
    names: dict[str, Any] = {"__name__": "readme"}
    exec(trains, names)
    assert (tmp_path / "timeline.png").stat().st_size > 0
    assert names["metrics"].step == 1
    assert "predicted:" in capsys.readouterr().out
    exec(shows, {})
    assert capsys.readouterr().out == expected
