"""Operation → seconds on one device: a roofline with a start-up time.

Source: Williams, Waterman and Patterson, Roofline, CACM 52 (2009) 65-76.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.calibrate.device import ACTIVITIES, MatmulFit
from meshwright.calibrate.hardware import Device, short_dtype
from meshwright.errors import ClusterError
from meshwright.simulate.operations import (
    Attention,
    Compute,
    Convolution,
    CrossEntropy,
    Embedding,
    Matmul,
    OptimizerStep,
    Pointwise,
)

Floats = NDArray[np.float64]
OpKind = Literal["matmul", "conv", "memory"]


def op_seconds(device: Device, kind: OpKind, flops: float, bytes: float, dtype: str, launches: int = 1) -> float:
    """Time of one operation: launches, then its arithmetic or its memory traffic, whichever is slower.

    Args:
        kind: ``matmul`` and ``conv`` reach ``matmul_efficiency`` of the dtype's peak; ``memory`` is everything else,
            whose arithmetic runs at the plain f32 rate.
        flops: floating-point operations on this device.
        bytes: read and written memory together on this device.
        launches: kernels started; 0 for one that is fused into another.
    Range and error: that of the device's own numbers; calibration prints them.
    Source: Williams, Waterman and Patterson, Roofline, CACM 52 (2009) 65-76.
    """
    return float(op_seconds_array(device, kind, flops, bytes, dtype, launches))


def op_seconds_array(
    device: Device, kind: OpKind, flops: ArrayLike, bytes: ArrayLike, dtype: str, launches: ArrayLike = 1
) -> NDArray[np.float64]:
    """``op_seconds`` of many operations of one kind and dtype at once; the arrays are broadcast."""
    match kind:
        case "matmul" | "conv":
            flops_per_second = device.peak_flops(dtype) * device.matmul_efficiency.value
        case "memory":
            flops_per_second = device.peak_flops("f32")
        case _:
            raise ClusterError(f"operations of kind {kind!r} have no cost; known are matmul, conv and memory")
    arithmetic = np.asarray(flops, np.float64) / flops_per_second
    traffic = np.asarray(bytes, np.float64) / device.memory_bytes_per_second.value
    return np.asarray(launches) * device.launch_seconds.value + np.maximum(arithmetic, traffic)


DTYPE_BYTES = {"f64": 8, "f32": 4, "tf32": 4, "bf16": 2, "f16": 2, "s8": 1, "f8": 1}
BLOCK = 256  # matmuls that are priced at a time: with all tiles they fit into a cache
SCORE_PASSES = 4  # of an unfused softmax: scores written, read, probabilities written, read


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element.

    Raises:
        ClusterError: the dtype is unknown.
    """
    if short_dtype(dtype) not in DTYPE_BYTES:
        raise ClusterError(f"dtype {dtype!r} has no known size; known are {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[short_dtype(dtype)]


def kernel_seconds(device: Device, kernel: Compute) -> float:
    """Time of one kernel on the device itself; what the host spends to dispatch it is not in it.

    Matrix products, and convolutions as such (implicit GEMM: Chetlur et al., cuDNN, 2014, section 3), go by the
    device's fit of tiles and waves, fused attention by its own; without a fit, and for all that is bound by memory, by
    the roofline. Memory traffic is counted once for each array that is read or written:

    - unfused attention is two batched products (four in the backward) and ``SCORE_PASSES`` over the scores each way;
    - an embedding reads and writes its rows, its gradient adds into them (read, add, write);
    - softmax cross-entropy reads the logits for the maximum, the sum and the loss; its gradient reads and writes them.

    Range and error: those of the fits, which their sources state.
    """
    match kernel:
        case Matmul(m=m, n=n, k=k, dtype=dtype, batch=batch):
            return matmul_seconds(device, m, n, k, dtype, batch)
        case Convolution(kernel=(height, width), channels_in=channels, channels_out=out, dtype=dtype):
            pixels = kernel.batch * kernel.height * kernel.width
            return matmul_seconds(device, pixels, out, height * width * channels, dtype)
        case Attention(fused=True):
            return _fused_attention_seconds(device, kernel)
        case Attention(dtype=dtype, batch=batch, heads=heads, queries=queries, keys=keys, head_dim=dim):
            ways = 2 if kernel.backward else 1
            scores = matmul_seconds(device, queries, keys, dim, dtype, batch * heads)
            values = matmul_seconds(device, queries, dim, keys, dtype, batch * heads)
            moved = dtype_bytes(dtype) * SCORE_PASSES * batch * heads * queries * keys
            return ways * (scores + values + op_seconds(device, "memory", 0.0, moved, dtype))
        case Pointwise(bytes=moved, flops=flops):
            return op_seconds(device, "memory", flops, moved, "f32")
        case Embedding(tokens=tokens, hidden=hidden, dtype=dtype, backward=backward):
            moved = dtype_bytes(dtype) * tokens * hidden * (3 if backward else 2)
            return op_seconds(device, "memory", 0.0, moved, dtype)
        case CrossEntropy(tokens=tokens, vocabulary=vocabulary, dtype=dtype, backward=backward):
            moved = dtype_bytes(dtype) * tokens * vocabulary * (2 if backward else 3)
            return op_seconds(device, "memory", 0.0, moved, dtype)
        case OptimizerStep(parameters=parameters, bytes_per_parameter=each):
            return op_seconds(device, "memory", 0.0, parameters * each, "f32")


def matmul_seconds(device: Device, m: int, n: int, k: int, dtype: str, batch: int = 1) -> float:
    """Time of ``batch`` products of an m × k with a k × n matrix."""
    fit = device.matmul_fit(dtype)
    if fit is None:
        moved = dtype_bytes(dtype) * batch * (m * k + k * n + m * n)
        return op_seconds(device, "matmul", 2.0 * batch * m * n * k, moved, dtype)
    rows, columns, inner, times = (np.array([float(size)]) for size in (m, n, k, batch))
    peak = device.peak_flops(dtype)
    return float(tiled_seconds(fit, rows, columns, inner, times, peak, dtype_bytes(dtype))[0])


def tiled_seconds(
    fit: MatmulFit, m: Floats, n: Floats, k: Floats, batch: Floats, peak_flops_per_second: float, element_bytes: int
) -> Floats:
    """Times of many matmuls by tiles and waves: the best tile for each, beside its memory traffic.

    A matrix is cut into tiles, which the compute units take in waves, each as long as one tile's inner loop; a last
    wave that is not full is quicker, but not in proportion. Few tiles fill the units if each is cut along its inner
    loop, for the price of adding the parts. Source: NVIDIA, Matrix Multiplication Background User's Guide, 2023,
    sections on tile and wave quantization and on split-K; the fitted form is ours.
    """
    blocks = [slice(start, start + BLOCK) for start in range(0, len(m), BLOCK)]
    arithmetic = np.concatenate(
        [_tile_seconds(fit, m[block], n[block], k[block], batch[block], peak_flops_per_second) for block in blocks]
    )
    arithmetic = arithmetic * (1 + fit.throttle * arithmetic / (arithmetic + fit.throttle_seconds))
    memory = element_bytes * batch * (m * k + k * n + m * n) / fit.memory_bytes_per_second
    both: Floats = (arithmetic**fit.sharpness + memory**fit.sharpness) ** (1 / fit.sharpness)
    return fit.launch_seconds + both


def _tile_seconds(
    fit: MatmulFit, m: Floats, n: Floats, k: Floats, batch: Floats, peak_flops_per_second: float
) -> Floats:
    """Arithmetic by the best tile and number of parts of its inner loop, for each matmul."""
    ways = [(*tile, parts) for tile in fit.tiles for parts in fit.splits]
    rows, columns, efficiency, parts = np.array(ways, dtype=float).T[:, :, None]
    waves = batch * np.ceil(m / rows) * np.ceil(n / columns) * parts / fit.compute_units
    full = np.floor(waves)
    rest = waves - full
    waves = full + np.where(rest > 1e-9, fit.last_wave + (1 - fit.last_wave) * rest, 0.0)
    unit_flops_per_second = peak_flops_per_second * efficiency / fit.compute_units
    loops = waves * 2 * rows * columns * (k / parts + fit.overhead_k) / unit_flops_per_second
    added_bytes = np.where(parts > 1, fit.split_bytes * parts, 0.0) * batch * m * n
    least: Floats = (loops + added_bytes / fit.memory_bytes_per_second).min(axis=0)
    return least


def _fused_attention_seconds(device: Device, kernel: Attention) -> float:
    if device.attention is None:
        return op_seconds(device, "matmul", kernel.flops, _attention_bytes(kernel), kernel.dtype)
    fit = device.attention
    rate = device.peak_flops(kernel.dtype) * fit.efficiency * kernel.keys / (kernel.keys + fit.half_length)
    moved = _attention_bytes(kernel) / device.memory_bytes_per_second.value
    return fit.launch_seconds + max(kernel.flops / (rate * (fit.backward_share if kernel.backward else 1.0)), moved)


def _attention_bytes(kernel: Attention) -> float:
    """Queries, keys, values and results, in the backward also their gradients."""
    queries = kernel.batch * kernel.heads * kernel.queries * kernel.head_dim
    keys = kernel.batch * kernel.kv_heads * kernel.keys * kernel.head_dim
    return dtype_bytes(kernel.dtype) * 2.0 * (queries + keys) * (2 if kernel.backward else 1)


def interference_rates(device: Device) -> Floats:
    """Rates of the activities of a device, by the mask of those that go on: all 1 where nothing was measured."""
    if device.interference is None:
        return np.ones((1 << len(ACTIVITIES), len(ACTIVITIES)))
    return np.array(device.interference.rates)
