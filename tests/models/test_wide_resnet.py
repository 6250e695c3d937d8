"""Wide-ResNet: shapes, and what each norm means for a batch that is cut."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models import wide_resnet
from meshwright.models.wide_resnet import WideResNetConfig
from tests.models.training import compiled, drawn, losses_of_steps, random_batch


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
    longer = drawn(wide_resnet.weights(deep))
    shorter = {**longer, "stages": [blocks[:1] for blocks in longer["stages"]]}
    images = np.random.default_rng(2).normal(size=(2, 32, 32, 3)).astype(np.float32)
    expected = compiled(partial(wide_resnet.logits, shallow))(shorter, images)
    scores = compiled(partial(wide_resnet.logits, deep))(longer, images)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["microbatch", "group"])
def test_only_group_norm_gives_halves_whose_mean_is_the_whole(norm: str) -> None:
    config = WideResNetConfig(layers=14, channels=32, width=1, image=32, classes=8, norm=norm)
    model = wide_resnet.build(config, norm)
    params, batch, loss = drawn(wide_resnet.weights(config)), random_batch(model, 4, 8), compiled(model.loss_fn)
    halves = [loss(params, {k: v[rows] for k, v in batch.items()}) for rows in (slice(0, 2), slice(2, 4))]
    whole = float(loss(params, batch))
    assert (abs(float(sum(halves)) / 2 - whole) < 1e-5 * whole) == (norm == "group")


def test_batch_norm_alone_forbids_to_cut_the_batch() -> None:
    models = {norm: wide_resnet.build(WideResNetConfig(norm=norm, channels=32), norm) for norm in wide_resnet.NORMS}
    assert [norm for norm, model in models.items() if not model.microbatchable] == ["batch"]


def test_it_learns() -> None:
    config = WideResNetConfig(layers=14, channels=8, width=2, image=32, classes=8)
    model = wide_resnet.build(config, "tiny")
    params, batch = drawn(wide_resnet.weights(config)), random_batch(model, 4, 8)
    losses = losses_of_steps(model, params, batch, steps=6, rate=0.1)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.2
