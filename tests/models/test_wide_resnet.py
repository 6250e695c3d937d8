"""Wide-ResNet: shapes, and what each norm means for a batch that is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models import wide_resnet
from meshwright.models.wide_resnet import WideResNetConfig
from meshwright.models.zoo import get_model
from tests.models.training import losses_of_steps, random_batch


@pytest.mark.parametrize(("layers", "blocks"), [(50, 16), (101, 33)])
def test_depth_counts_three_convolutions_a_block_the_stem_and_the_head(layers: int, blocks: int) -> None:
    stages = wide_resnet.weights(WideResNetConfig(layers=layers))["stages"]
    assert sum(map(len, stages)) == blocks == (layers - 2) // 3


def test_width_widens_the_middle_convolution_alone() -> None:
    block = wide_resnet.weights(WideResNetConfig(channels=64, width=4))["stages"][0][0]
    assert {name: part["kernel"].shape for name, part in block.items()} == {
        "in": (1, 1, 64, 64),
        "middle": (3, 3, 64, 256),
        "out": (1, 1, 256, 256),
        "skip": (1, 1, 64, 256),
    }


@pytest.mark.parametrize("norm", wide_resnet.NORMS)
def test_images_become_one_score_a_class(norm: str) -> None:
    config = WideResNetConfig(layers=50, channels=32, norm=norm)
    params = jax.eval_shape(wide_resnet.build(config, "x").init_fn, jax.random.key(0))
    images = jax.ShapeDtypeStruct((6, 224, 224, 3), jnp.float32)
    scores = jax.eval_shape(lambda p, x: wide_resnet.logits(config, p, x), params, images)
    assert scores.shape == (6, 1024)


def test_a_block_starts_as_the_identity_on_what_relu_lets_through() -> None:
    """Scale 0 on the last norm: blocks without a skip convolution add nothing, so depth does not matter at first."""
    shallow, deep = (WideResNetConfig(layers=n, channels=4, image=32, classes=8) for n in (14, 26))
    params = wide_resnet.build(shallow, "shallow").init_fn(jax.random.key(0))
    extra = wide_resnet.build(deep, "deep").init_fn(jax.random.key(1))
    longer = {**params, "stages": [[a[0], b[1]] for a, b in zip(params["stages"], extra["stages"], strict=True)]}
    images = jax.random.normal(jax.random.key(2), (2, 32, 32, 3))
    expected = wide_resnet.logits(shallow, params, images)
    np.testing.assert_allclose(wide_resnet.logits(deep, longer, images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", wide_resnet.NORMS)
def test_only_group_norm_gives_halves_whose_mean_is_the_whole(norm: str) -> None:
    model = get_model(f"wresnet:layers=14,channels=32,width=1,image=32,classes=8,norm={norm}")
    params, batch = model.init_fn(jax.random.key(0)), random_batch(model, 4, 8)
    loss = jax.jit(model.loss_fn)
    halves = [loss(params, {k: v[rows] for k, v in batch.items()}) for rows in (slice(0, 2), slice(2, 4))]
    whole = float(loss(params, batch))
    assert (abs(float(sum(halves)) / 2 - whole) < 1e-5 * whole) == (norm == "group")
    assert model.microbatchable == (norm != "batch")


def test_it_learns() -> None:
    model = get_model("wresnet:layers=14,channels=8,width=2,image=32,classes=8")
    losses = losses_of_steps(model, random_batch(model, 4, 8), steps=6, rate=0.1)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.2
