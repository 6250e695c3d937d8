"""Operation → seconds on one device: a roofline with a start-up time."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.calibrate.hardware import Device
from meshwright.errors import ClusterError

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
