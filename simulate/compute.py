"""Operation → seconds on one device: a roofline with a start-up time.

Source: Williams, Waterman and Patterson, Roofline, CACM 52 (2009) 65-76.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
ACTIVITIES = 4  # compute, collectives, copies to the host, copies from it
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

    Every kernel is bound by its arithmetic or by its memory traffic, which is counted once for each array that it reads
    or writes:

    - fused attention moves its operands and result, an unfused one also the scores, ``SCORE_PASSES`` times;
    - an embedding reads and writes its rows, its gradient adds into them (read, add, write);
    - softmax cross-entropy reads the logits for the maximum, the sum and the loss; its gradient reads and writes them.
    """
    flops, bytes, kind, dtype = _demand(kernel)
    return op_seconds(device, kind, flops, bytes, dtype)


def _demand(kernel: Compute) -> tuple[float, float, OpKind, str]:
    """FLOPs, bytes, kind and dtype of a kernel."""
    match kernel:
        case Matmul(m=m, n=n, k=k, dtype=dtype, batch=batch):
            return kernel.flops, dtype_bytes(dtype) * batch * (m * k + k * n + m * n), "matmul", dtype
        case Attention(dtype=dtype):
            return kernel.flops, _attention_bytes(kernel), "matmul", dtype
        case Convolution(dtype=dtype):
            pixels = kernel.batch * kernel.height * kernel.width
            weights = kernel.kernel[0] * kernel.kernel[1] * kernel.channels_in * kernel.channels_out
            moved = pixels * (kernel.channels_in + kernel.channels_out) + weights
            return kernel.flops, dtype_bytes(dtype) * moved, "conv", dtype
        case Pointwise(bytes=bytes, flops=flops):
            return flops, bytes, "memory", "f32"
        case Embedding(tokens=tokens, hidden=hidden, dtype=dtype, backward=backward):
            return 0.0, dtype_bytes(dtype) * tokens * hidden * (3 if backward else 2), "memory", dtype
        case CrossEntropy(tokens=tokens, vocabulary=vocabulary, dtype=dtype, backward=backward):
            return 0.0, dtype_bytes(dtype) * tokens * vocabulary * (2 if backward else 3), "memory", dtype
        case OptimizerStep(parameters=parameters, bytes_per_parameter=each):
            return 0.0, parameters * each, "memory", "f32"


def _attention_bytes(kernel: Attention) -> float:
    queries = kernel.batch * kernel.heads * kernel.queries * kernel.head_dim
    keys = kernel.batch * kernel.kv_heads * kernel.keys * kernel.head_dim
    operands = 2 * queries + 2 * keys  # Q and the result, K and V
    scores = 0 if kernel.fused else SCORE_PASSES * kernel.batch * kernel.heads * kernel.queries * kernel.keys
    return dtype_bytes(kernel.dtype) * (operands + scores) * (2 if kernel.backward else 1)


def interference_rates(device: Device) -> NDArray[np.float64]:
    """Rates of the four activities of a device, by the mask of those that go on: 1 where nothing was measured."""
    return np.ones((1 << ACTIVITIES, ACTIVITIES))
