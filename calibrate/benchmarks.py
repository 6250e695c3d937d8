"""Kernels to time on one device with JAX: each family's program, its arithmetic and its traffic by shape.

Shapes are tuples of whole numbers: matmul (batch, m, n, k); attention (batch, heads, sequence, head size);
convolution (images, side of the result, channels in, channels out, side of the window); memory-bound kernels and
copies (bytes that are moved,). Inputs are random (zeros draw less power, and some libraries treat them apart).
"""

from collections.abc import Callable
from math import prod
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meshwright.calibrate.timing import ATTENTION, CONVOLUTION, COPY, MATMUL, MEMORY
from meshwright.simulate.operations import Attention

POOL = 1_000_003  # random numbers that are repeated to fill an array: a prime, so that rows differ
SMALL_BYTES = 1 << 20  # up to which a program holds several products, so that their dispatch is shared
COPIES = 4
COLUMNS = 512  # of matrices whose rows are summed, gathered and scattered
FLOAT32 = jnp.dtype(jnp.float32)
DTYPES = {"f32": FLOAT32, "bf16": jnp.dtype(jnp.bfloat16), "f16": jnp.dtype(jnp.float16)}
_POOL = np.random.default_rng(0).standard_normal(POOL, np.float32)


class Case(NamedTuple):
    """One kernel at one shape."""

    family: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        if self.family.startswith((MEMORY, COPY)):
            return f"{self.family} {self.shape[0] >> 10} KiB"
        return f"{self.family} {'×'.join(map(str, self.shape))}"


class Program(NamedTuple):
    """A compiled program with its inputs: ``start`` returns at once, and one call runs ``copies`` of the kernel."""

    start: Callable[[], object]
    copies: int


def dtype_of(family: str) -> str:
    """The short dtype that a family is named after; f32 for those that move memory."""
    last = family.rsplit(" ", 1)[-1]
    return last if last in DTYPES else "f32"


def amount(case: Case) -> float:
    """FLOPs of a matmul, an attention or a convolution; bytes of everything else."""
    family, shape = case
    if family.startswith(MATMUL):
        return 2.0 * prod(shape)
    if family.startswith(ATTENTION):
        forward = attention_of(case, backward=False).flops
        return forward + attention_of(case, backward=True).flops if "backward" in family else forward
    if family.startswith(CONVOLUTION):
        images, side, channels_in, channels_out, window = shape
        forward = 2.0 * images * side**2 * channels_in * channels_out * window**2
        return 3 * forward if "backward" in family else forward
    return float(shape[0])


def attention_of(case: Case, backward: bool) -> Attention:
    """The simulator's name for the attention of a case: causal and fused."""
    batch, heads, sequence, dim = case.shape
    return Attention(
        batch=batch, heads=heads, kv_heads=heads, queries=sequence, keys=sequence, head_dim=dim,
        dtype=dtype_of(case.family), backward=backward,
    )  # fmt: skip


def input_bytes(case: Case) -> float:
    """About what the arrays of one copy take."""
    family, shape = case
    each = DTYPES[dtype_of(family)].itemsize
    if family.startswith(MATMUL):
        batch, m, n, k = shape
        return float(each * batch * (m * k + k * n + m * n))
    if family.startswith(ATTENTION):
        batch, heads, sequence, dim = shape
        scores = 0 if "cudnn" in family else batch * heads * sequence**2
        return float(each * (4 * batch * heads * sequence * dim + 2 * scores) * (2 if "backward" in family else 1))
    if family.startswith(CONVOLUTION):
        images, side, channels_in, channels_out, window = shape
        return float(each * 3 * (images * side**2 * (channels_in + channels_out) + window**2 * channels_in))
    return float(2 * shape[0])


def random_array(shape: tuple[int, ...], dtype: jnp.dtype = FLOAT32, seed: int = 0) -> jax.Array:
    """Normal numbers on the device, drawn by NumPy: a generator compiled for each shape costs more than the test."""
    numbers = np.resize(np.roll(_POOL, 7919 * seed), shape).astype(dtype)
    array: jax.Array = jax.device_put(numbers)
    return array


def matmul_call(size: int, dtype: jnp.dtype) -> Callable[[], object]:
    """A square matmul of random matrices; calling it runs it once and waits."""
    left, right = (random_array((size, size), dtype, seed) for seed in (0, 1))
    multiply = jax.jit(jnp.matmul).lower(left, right).compile()
    return lambda: jax.block_until_ready(multiply(left, right))


def program_of(case: Case) -> Program:
    """Compile the kernel of a case for the first device.

    Raises:
        Exception: what JAX raises where the device does not run it (cuDNN's attention on a CPU).
    """
    for prefix, make in _MAKERS.items():
        if case.family.startswith(prefix):
            return make(case)
    raise KeyError(case.family)


def _compiled(function: Callable[..., object], *inputs: jax.Array, copies: int = 1) -> Program:
    run = jax.jit(function).lower(*inputs).compile()
    return Program(lambda: run(*inputs), copies)


def _matmul(case: Case) -> Program:
    """Small products come several to a program, each of its own matrices: XLA merges those that share one."""
    batch, m, n, k = case.shape
    dtype = DTYPES[dtype_of(case.family)]
    copies = COPIES if input_bytes(case) <= SMALL_BYTES else 1
    lead = (batch,) if batch > 1 else ()
    lefts = [random_array((*lead, m, k), dtype, 2 * copy) for copy in range(copies)]
    rights = [random_array((*lead, k, n), dtype, 2 * copy + 1) for copy in range(copies)]

    def multiply(*arrays: jax.Array) -> list[jax.Array]:
        return [jnp.matmul(left, right) for left, right in zip(arrays[:copies], arrays[copies:], strict=True)]

    return _compiled(multiply, *lefts, *rights, copies=copies)


def _attention(case: Case) -> Program:
    """``attention IMPLEMENTATION [backward] DTYPE``; a backward runs its forward too, and is counted so."""
    implementation: Literal["cudnn", "xla"] = "cudnn" if case.family.split()[1] == "cudnn" else "xla"
    batch, heads, sequence, dim = case.shape
    dtype = DTYPES[dtype_of(case.family)]
    q, k, v, g = (random_array((batch, sequence, heads, dim), dtype, seed) for seed in range(4))

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, object]:
        value, transpose = jax.vjp(forward, q, k, v)
        return value, transpose(g)

    return _compiled(both, q, k, v, g) if "backward" in case.family else _compiled(forward, q, k, v)


def _convolution(case: Case) -> Program:
    """``convolution [backward] DTYPE``, same padding, channels last; a backward runs its forward too."""
    images, side, channels_in, channels_out, window = case.shape
    dtype = DTYPES[dtype_of(case.family)]
    image = random_array((images, side, side, channels_in), dtype)
    weights = random_array((window, window, channels_in, channels_out), dtype, 1)
    cotangent = random_array((images, side, side, channels_out), dtype, 2)

    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def both(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, object]:
        value, transpose = jax.vjp(forward, x, w)
        return value, transpose(g)

    backward = "backward" in case.family
    return _compiled(both, image, weights, cotangent) if backward else _compiled(forward, image, weights)


def _memory(case: Case) -> Program:
    """Kernels that are bound by memory; each moves about the bytes of its shape, read and written together."""
    kind, nbytes = case.family.removeprefix(MEMORY), case.shape[0]
    rows = max(1, nbytes // (8 * COLUMNS))
    match kind:
        case "add":
            x, y = (random_array((nbytes // 12,), FLOAT32, seed) for seed in (0, 1))
            return _compiled(lambda a, b: 0.5 * a + b, x, y)
        case "sum":
            return _compiled(lambda a: jnp.sum(a * a, axis=1), random_array((2 * rows, COLUMNS)))
        case "chain":  # bias, activation, scaled residual: two arrays read, one written by one fused kernel
            x, y = (random_array((nbytes // 12,), FLOAT32, seed) for seed in (0, 1))
            return _compiled(lambda a, b: jax.nn.relu(a * 1.5 + 0.25) * 0.5 + b * 0.75, x, y)
        case "gather":
            return _compiled(lambda table, at: table[at], random_array((rows, COLUMNS)), _indices(rows))
        case "scatter":  # reads the table and the rows, writes the table
            few = max(1, nbytes // (12 * COLUMNS))
            table, update = (random_array((few, COLUMNS), FLOAT32, seed) for seed in (0, 1))
            return _compiled(lambda t, at, u: t.at[at].add(u), table, _indices(few), update)
        case "adam":  # weight, gradient and two moments read; all but the gradient written
            w, g, m, v = (random_array((nbytes // 28,), FLOAT32, seed) for seed in range(4))
            return _compiled(_adam, w, g, m, v * v)
    raise KeyError(case.family)


def _adam(w: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Source: Kingma and Ba, ICLR 2015, algorithm 1, without the correction of its start."""
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g * g
    return w - 1e-3 * m / (jnp.sqrt(v) + 1e-8), m, v


def _indices(rows: int) -> jax.Array:
    array: jax.Array = jax.device_put(np.random.default_rng(0).integers(0, rows, rows, np.int32))
    return array


def _copy(case: Case) -> Program:
    """Between the host's memory and the device's; an array that was read once is kept on the host, so each is new."""
    elements = case.shape[0] // 4
    if case.family.endswith("to_device"):
        numbers = np.resize(_POOL, elements)
        return Program(lambda: jax.device_put(numbers, may_alias=False), 1)
    array = random_array((elements,))
    return Program(lambda: np.array(array + 0.0), 1)


_MAKERS: dict[str, Callable[[Case], Program]] = {
    MATMUL: _matmul,
    ATTENTION: _attention,
    CONVOLUTION: _convolution,
    MEMORY: _memory,
    COPY: _copy,
}
