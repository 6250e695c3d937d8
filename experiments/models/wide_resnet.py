"""Wide-ResNet for images, as in Alpa's suite: bottleneck blocks whose 3x3 convolution is ``width`` times wider.

Sources: He et al., CVPR 2016 (bottlenecks, depths); Zagoruyko and Komodakis, BMVC 2016 (width); Zheng et al., OSDI
2022, section 8.1 (sizes). Arrays are (samples, rows, columns, channels), kernels (rows, columns, in, out).

``norm`` says over what the statistics of a normalisation are taken, and so whether a batch may be cut:
- ``batch``: the whole batch (Ioffe and Szegedy 2015). A micro-batch has other statistics, so it may not be cut.
- ``microbatch``: the micro-batch, what Alpa's suite does when it accumulates gradients, also known as ghost batch
  norm (Hoffer et al., NeurIPS 2017). It may be cut, and the number of micro-batches is then part of the model.
- ``group``: 32 groups of channels of one sample (Wu and He, ECCV 2018). It may be cut freely.
No running statistics are kept: they serve inference only.
"""

from dataclasses import dataclass
from functools import partial
from math import sqrt

import jax
import jax.numpy as jnp
from jax import Array, lax

from meshwright.errors import ModelError
from meshwright.models import transformer as tf
from meshwright.models.base import Model, PyTree
from meshwright.models.gpt import check_sizes
from meshwright.models.numerics import cast, cross_entropy, normalize, relu, times
from meshwright.models.parameters import Weight, initialize

# Bottleneck blocks in each of the four stages; a net of d layers has (d - 2) / 3 blocks.
BLOCKS = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
NORMS = ("batch", "microbatch", "group")
GROUPS = 32  # of channels, in group norm; the default of Wu and He
_DIMS = ("NHWC", "HWIO", "NHWC")


@dataclass(frozen=True, slots=True)
class WideResNetConfig:
    """Sizes of the net: ``channels`` in the stem, ``width`` of the 3x3 convolutions over them."""

    layers: int = 50
    channels: int = 64
    width: int = 2
    image: int = 224  # rows and columns
    classes: int = 1024
    norm: str = "batch"
    dtype: str = "f32"

    def __post_init__(self) -> None:
        check_sizes(self, "channels", "width", "image", "classes")
        if self.layers not in BLOCKS:
            raise ModelError(f"layers={self.layers} is not a known depth; use one of {', '.join(map(str, BLOCKS))}")
        if self.norm not in NORMS:
            raise ModelError(f"norm={self.norm} is not known; use one of {', '.join(NORMS)}")
        if self.norm == "group" and self.channels % GROUPS:
            raise ModelError(
                f"channels={self.channels} does not split into {GROUPS} groups; use norm=batch or "
                f"channels={-(-self.channels // GROUPS) * GROUPS}"
            )


def weights(config: WideResNetConfig) -> PyTree:
    """Every parameter's shape and start; the last norm of a block starts at 0, so a block starts as the identity."""
    entering = config.channels
    stages: list[list[PyTree]] = []
    for stage, blocks in enumerate(BLOCKS[config.layers]):
        inner = config.channels * 2**stage
        stages.append([])
        for _ in range(blocks):
            block = {
                "in": _conv(1, entering, inner),
                "middle": _conv(3, inner, inner * config.width),
                "out": _conv(1, inner * config.width, 4 * inner, scale=0.0),
            }
            stages[-1].append(block if entering == 4 * inner else {**block, "skip": _conv(1, entering, 4 * inner)})
            entering = 4 * inner
    head = {"kernel": Weight((entering, config.classes), 1 / sqrt(entering)), "bias": Weight((config.classes,))}
    return {"stem": _conv(7, 3, config.channels), "stages": stages, "head": head}


def _conv(size: int, entering: int, leaving: int, scale: float = 1.0) -> PyTree:
    """A convolution and its norm, started after He et al., ICCV 2015, section 2.2."""
    return {
        "kernel": Weight((size, size, entering, leaving), sqrt(2 / (size * size * entering))),
        "scale": Weight((leaving,), mean=scale),
        "bias": Weight((leaving,)),
    }


def convolve(norm: str, part: PyTree, x: Array, stride: int = 1) -> Array:
    """Convolution then norm; padded so that stride 1 keeps rows and columns."""
    size = part["kernel"].shape[0]
    y = lax.conv_general_dilated(
        x,
        cast(part["kernel"], x.dtype),
        window_strides=(stride, stride),
        padding=[(size // 2, size // 2)] * 2,
        dimension_numbers=_DIMS,
    )
    if norm != "group":
        return normalize(y, part["scale"], part["bias"], (0, 1, 2))
    grouped = (*y.shape[:3], GROUPS, y.shape[3] // GROUPS)
    scale, bias = (lax.reshape(part[name], grouped[3:]) for name in ("scale", "bias"))
    return lax.reshape(normalize(lax.reshape(y, grouped), scale, bias, (1, 2, 4)), y.shape)


def logits(config: WideResNetConfig, params: PyTree, images: Array) -> Array:
    """Scores of the classes, (samples, classes), in the compute dtype."""
    conv = partial(convolve, config.norm)
    x = relu(conv(params["stem"], cast(images, tf.DTYPES[config.dtype]), 2))
    x = lax.reduce_window(x, x.dtype.type(-jnp.inf), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for stage, blocks in enumerate(params["stages"]):
        for index, block in enumerate(blocks):
            stride = 2 if stage and not index else 1
            y = relu(conv(block["in"], x))
            y = relu(conv(block["middle"], y, stride))
            y = conv(block["out"], y)
            x = relu(lax.add(y, conv(block["skip"], x, stride) if "skip" in block else x))
    pooled = times(lax.reduce_sum(x, (1, 2)), 1.0 / (x.shape[1] * x.shape[2]))
    return tf.dense(params["head"], pooled, (1,))


def loss(config: WideResNetConfig, params: PyTree, batch: PyTree) -> Array:
    """Mean cross entropy of the labels, in nats."""
    return tf.mean(cross_entropy(logits(config, params, batch["images"]), batch["labels"]))


def image_batch(image: int, batch_size: int) -> PyTree:
    """What a batch of images looks like."""
    return {
        "images": jax.ShapeDtypeStruct((batch_size, image, image, 3), jnp.float32),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }


def build(config: WideResNetConfig, name: str) -> Model:
    return Model(
        name=name,
        loss_fn=partial(loss, config),
        init_fn=partial(initialize, weights(config)),
        batch_fn=partial(image_batch, config.image),
        microbatchable=config.norm != "batch",
    )
