"""Microbenchmarks of one device with JAX: matmuls, memory-bound kernels, launch and dispatch overhead.

Inputs are random (zeros draw less power and some libraries treat them apart), every call is waited for, and the
sizes grow until the time is used up, so that the same code suits one CPU core and an H100.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from meshwright.calibrate.quantity import short_dtype
from meshwright.calibrate.timing import (
    DISPATCH,
    LAUNCH,
    MATMUL,
    MEMORY,
    ComputeTimings,
    Timing,
    sample,
    sample_within,
    timing,
)

CHAIN = 64  # operations in one program, long enough that their launches outweigh the one dispatch
MATMUL_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
MEMORY_BYTES = (1 << 16, 1 << 20, 1 << 23, 1 << 25, 1 << 27, 1 << 28, 1 << 30)
FLOAT32 = jnp.dtype(jnp.float32)
DTYPES = (FLOAT32, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def measure_compute(budget_seconds: float, progress: Callable[[float, str], None]) -> ComputeTimings:
    """Measure the first device of this process.

    Args:
        budget_seconds: wall time to stay within; the two smallest sizes of each family are measured even beyond it.
        progress: called with the share done (0..1) and what comes next.
    """
    start = time.perf_counter()
    device = jax.devices()[0]
    cases = list(_cases())
    each_seconds = budget_seconds / len(cases) / 2
    timings: list[Timing] = []
    last_seconds: dict[str, float] = {}
    for index, (family, size, make) in enumerate(cases):
        sizes_done = len({done.amount for done in timings if done.family == family})
        left = budget_seconds - (time.perf_counter() - start)
        # The next size is up to eight times the work: leave it out where it would eat the time of other families.
        if sizes_done >= 2 and 4 * last_seconds[family] > left:
            continue
        progress(min(1.0, max(1 - left / budget_seconds, index / len(cases))), f"{family} {size}")
        began = time.perf_counter()
        timings.append(make(each_seconds))
        last_seconds[family] = time.perf_counter() - began
    return ComputeTimings(
        device_kind=device.device_kind,
        platform=device.platform,
        devices=jax.local_device_count(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=_memory_bytes(device),
        jax_version=jax.__version__,
        settings=" ".join(f"{name}={os.environ[name]}" for name in ("XLA_FLAGS", "NPROC") if os.environ.get(name)),
        timings=tuple(timings),
    )


def random_array(shape: tuple[int, ...], dtype: jnp.dtype = FLOAT32, seed: int = 0) -> jax.Array:
    """Normal numbers on the device, drawn by NumPy: a generator compiled for each shape costs more than the test."""
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)
    array: jax.Array = jax.device_put(numbers)
    return array


def matmul_call(size: int, dtype: jnp.dtype) -> Callable[[], object]:
    """A square matmul of random matrices; calling it runs it once and waits."""
    left, right = (random_array((size, size), dtype, seed) for seed in (0, 1))
    multiply = jax.jit(jnp.matmul).lower(left, right).compile()
    return lambda: jax.block_until_ready(multiply(left, right))


def _cases() -> Iterator[tuple[str, str, Callable[[float], Timing]]]:
    """Family, size and benchmark, small before large, so that a short budget still sees every family."""
    yield DISPATCH, "per call", _time_dispatch
    yield LAUNCH, f"{CHAIN} operations", _time_launch
    for step in range(max(len(MATMUL_SIZES), len(MEMORY_BYTES))):
        for dtype in DTYPES:
            if step < len(MATMUL_SIZES):
                family, size = MATMUL + short_dtype(dtype.name), MATMUL_SIZES[step]
                yield family, f"{size}³", _matmul_timer(family, size, dtype)
        if step < len(MEMORY_BYTES):
            nbytes = MEMORY_BYTES[step]
            yield MEMORY, f"{nbytes >> 10} KiB add", _elementwise_timer(nbytes)
            yield MEMORY, f"{nbytes >> 10} KiB sum", _reduction_timer(nbytes)


def _matmul_timer(family: str, size: int, dtype: jnp.dtype) -> Callable[[float], Timing]:
    return lambda seconds: timing(family, 2.0 * size**3, sample_within(matmul_call(size, dtype), seconds))


def _elementwise_timer(nbytes: int) -> Callable[[float], Timing]:
    """``0.5 * x + y``: two arrays read, one written, ``nbytes`` in all."""

    def run(seconds: float) -> Timing:
        elements = nbytes // 12
        x, y = (random_array((elements,), seed=seed) for seed in (0, 1))
        add = jax.jit(lambda a, b: 0.5 * a + b).lower(x, y).compile()
        return timing(MEMORY, 12.0 * elements, sample_within(lambda: jax.block_until_ready(add(x, y)), seconds))

    return run


def _reduction_timer(nbytes: int) -> Callable[[float], Timing]:
    """The row sums of a matrix of ``nbytes``, as in a normalisation."""

    def run(seconds: float) -> Timing:
        columns = 512
        x = random_array((nbytes // 4 // columns, columns))
        rows = jax.jit(lambda a: jnp.sum(a * a, axis=1)).lower(x).compile()
        moved = float(x.nbytes + x.shape[0] * 4)
        return timing(MEMORY, moved, sample_within(lambda: jax.block_until_ready(rows(x)), seconds))

    return run


def _time_dispatch(seconds: float) -> Timing:
    """Host seconds of one call of a compiled program, from many calls in a row that each need the last one's result."""
    first = random_array((8,))
    step = jax.jit(lambda a: a * 0.5).lower(first).compile()

    def calls() -> object:
        x = first
        for _ in range(CHAIN):
            x = step(x)
        return jax.block_until_ready(x)

    return timing(DISPATCH, CHAIN, [total / CHAIN for total in sample_within(calls, seconds)])


def _time_launch(seconds: float) -> Timing:
    """Seconds of one more operation inside a program: 1 and ``CHAIN`` + 1 small matmuls, which XLA cannot fuse."""
    x = random_array((16, 16))

    def program(operations: int) -> Callable[[], object]:
        def chain(a: jax.Array) -> jax.Array:
            for _ in range(operations):
                a = jnp.tanh(a @ x)
            return a

        run = jax.jit(chain).lower(x).compile()
        return lambda: jax.block_until_ready(run(x))

    short, long = program(1), program(1 + CHAIN)
    base = min(sample_within(short, seconds / 4))
    # Two kernels a step (matmul and tanh). The clock can put the long program below the short one on a busy machine.
    samples = [max(total - base, 0.0) / (2 * CHAIN) for total in sample_within(long, seconds / 2)]
    return timing(LAUNCH, 2 * CHAIN, samples)


def busy_matmul_seconds(seconds: float, size: int = 256) -> list[float]:
    """Times of one matmul, repeated until ``seconds`` are over: how ranks that share cores slow each other."""
    call = matmul_call(size, FLOAT32)
    call()
    end = time.perf_counter() + seconds
    samples: list[float] = []
    while time.perf_counter() < end or len(samples) < 5:
        samples += sample(call, 1)
    return samples


def _memory_bytes(device: jax.Device) -> int:
    """What the device may use: its allocator's limit, else the memory of the machine or of its control group."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(machine, int(text)) if text.isdigit() else machine
