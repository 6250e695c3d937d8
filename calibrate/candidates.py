"""Which kernels are worth timing: a coarse design that sees every family, then where fits so far are worst."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np

from meshwright.calibrate.benchmarks import DTYPES, Case, amount, input_bytes
from meshwright.calibrate.fit import RateFit, fit_rate
from meshwright.calibrate.timing import ATTENTION, CONVOLUTION, COPY, MATMUL, MEMORY, Timing

SQUARES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
ROWS = (128, 512, 2048, 8192)  # tokens of a micro-batch
HIDDEN = (256, 768, 1024, 2048, 4096)
MEMORY_BYTES = tuple(1 << power for power in range(16, 31))
MEMORY_KINDS = ("add", "sum", "chain", "gather", "scatter", "adam")
ATTENTION_SHAPES = tuple(product((1, 4), (4, 16), (128, 512, 1024, 2048, 4096, 8192), (64, 128)))
CONVOLUTION_SHAPES = tuple(
    (images, side, channels, channels * wider, window)
    for images, (side, channels), wider, window in product(
        (2, 16, 64), ((56, 64), (28, 128), (14, 256), (7, 512)), (1, 2), (1, 3)
    )
)
COARSE_MATMULS = (
    (1, 128, 128, 128),
    (1, 512, 512, 512),
    (1, 128, 1024, 256),
    (16, 128, 128, 64),
    (1, 1024, 1024, 1024),
)
COARSE_MEMORY = (1 << 20, 1 << 24)
ACCELERATOR_MATMULS = ((1, 4096, 4096, 4096), (1, 2048, 4096, 1024))
NEEDED = (*(f"{MATMUL}{dtype}" for dtype in DTYPES), f"{MEMORY}add")  # no device can do without
NEEDED_SIZES = 2
LEAST_MISFIT = 0.03  # what a family meets well may still bend where nobody has looked
WEIGHT = {MATMUL: 1.0, ATTENTION: 0.6, CONVOLUTION: 0.4, MEMORY: 0.5, COPY: 0.3}  # matmuls are most of a step
FARTHEST = 16.0  # times the largest amount so far: the time of larger kernels is a guess
FEWEST = 4  # of a family before its fit says anything


def coarse(accelerator: bool) -> list[Case]:
    """The first design: two sizes of what no device can do without, then matmuls, then the other families in turns.

    Args:
        accelerator: a GPU, for which cuDNN's attention and larger products are in reach.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {
        MATMUL: list(COARSE_MATMULS),
        ATTENTION: [(1, 4, 128, 64), (1, 4, 512, 64)],
    }
    shapes[CONVOLUTION] = [(2, 14, 256, 256, 1), (2, 28, 128, 128, 3)]
    if accelerator:
        shapes[MATMUL] += ACCELERATOR_MATMULS
        shapes[ATTENTION] += [(4, 16, 2048, 128)]
        shapes[CONVOLUTION] += [(64, 28, 128, 256, 3)]
    columns = {}
    for family in families(accelerator):
        prefix = family.partition(" ")[0] + " "
        sizes = [(nbytes,) for nbytes in COARSE_MEMORY] if prefix in (MEMORY, COPY) else shapes[prefix]
        columns[family] = [Case(family, tuple(shape)) for shape in sizes]
    first = [columns[family][place] for place in range(NEEDED_SIZES) for family in NEEDED]
    matmuls = [columns[f"{MATMUL}{dtype}"] for dtype in DTYPES]
    others = [column for family, column in columns.items() if family not in NEEDED]
    return [*first, *_in_turns([column[NEEDED_SIZES:] for column in matmuls]), *_in_turns(others)]


def _in_turns(columns: Sequence[Sequence[Case]]) -> list[Case]:
    longest = max(map(len, columns))
    return [column[place] for place in range(longest) for column in columns if place < len(column)]


def families(accelerator: bool) -> tuple[str, ...]:
    """All families, by name."""
    attention = [f"{ATTENTION}xla{way} f32" for way in ("", " backward")]
    if accelerator:
        attention = [f"{ATTENTION}{how}{way} bf16" for how in ("xla", "cudnn") for way in ("", " backward")]
    dtype = "bf16" if accelerator else "f32"
    return (
        *(f"{MATMUL}{name}" for name in DTYPES),
        *(f"{MEMORY}{kind}" for kind in MEMORY_KINDS),
        *attention,
        *(f"{CONVOLUTION}{way}{dtype}" for way in ("", "backward ")),
        # On a CPU, host and device are one memory, and JAX may share an array where a copy was asked for.
        *(f"{COPY}{way}" for way in ("to_device", "from_device") if accelerator),
    )


def candidates(accelerator: bool) -> tuple[Case, ...]:
    """Every kernel that may be timed; several hundred."""
    squares = [(1, side, side, side) for side in SQUARES]
    wide = [(1, m, n, k) for m, n, k in product(ROWS, HIDDEN, HIDDEN) if n != k or m != n]
    wide += [(1, m, 4 * hidden, hidden) for m, hidden in product(ROWS, HIDDEN[1:])]
    odd = [(1, 1000, 1536, 384), (1, 777, 1280, 1280), (1, 3000, 640, 2560)]
    batched = [(batch, side, side, dim) for batch, side, dim in product((8, 32, 96), (128, 512, 1024), (64, 128))]
    matmuls = dict.fromkeys([*squares, *wide, *odd, *batched])
    found = []
    for family in families(accelerator):
        prefix = family.partition(" ")[0] + " "
        shapes: Sequence[tuple[int, ...]] = {
            MATMUL: tuple(matmuls),
            ATTENTION: ATTENTION_SHAPES,
            CONVOLUTION: CONVOLUTION_SHAPES,
        }.get(prefix, tuple((nbytes,) for nbytes in MEMORY_BYTES))
        found += [Case(family, tuple(shape)) for shape in shapes]
    return tuple(found)


def next_case(
    pool: Sequence[Case], known: Mapping[Case, Timing], most_seconds: float, most_bytes: float
) -> Case | None:
    """The candidate that tells most, of those that are affordable; None if there is none.

    What it tells is how far its shape lies from those that are known (in doublings, at most one counts whole), times
    how badly a line through its family meets the two nearest ones, times what the family weighs in a training step.

    Args:
        most_seconds: that one call may take, by the family's line so far.
        most_bytes: that its arrays may take.
    """
    best: tuple[float, Case] | None = None
    for family in dict.fromkeys(case.family for case in pool):
        seen = [case for case in known if case.family == family]
        if len({known[case].amount for case in seen}) < 2:
            continue
        fit = _line(tuple(known[case].amount for case in seen), tuple(known[case].seconds for case in seen))
        misfit = np.array([abs(np.log(fit.seconds(known[case].amount) / known[case].seconds)) for case in seen])
        places = np.log2(np.array([case.shape for case in seen], float))
        most = max(known[case].amount for case in seen)
        # The families grow alike: one that was looked at often must be worse than another to be looked at again.
        weight = WEIGHT[family.partition(" ")[0] + " "] / max(1.0, len(seen) / FEWEST)
        for case in pool:
            size = amount(case)
            if case.family != family or case in known or size > FARTHEST * most:
                continue
            if fit.seconds(size) > most_seconds or input_bytes(case) > most_bytes:
                continue
            apart = np.abs(places - np.log2(np.array(case.shape, float))).sum(axis=1)
            near = np.argsort(apart, kind="stable")[:2]
            doubt = weight * min(1.0, float(apart.min())) * (LEAST_MISFIT + float(misfit[near].mean()))
            if best is None or doubt > best[0] or (doubt == best[0] and prod(case.shape) < prod(best[1].shape)):
                best = doubt, case
    return best[1] if best else None


@lru_cache(maxsize=256)
def _line(amounts: tuple[float, ...], seconds: tuple[float, ...]) -> RateFit:
    """Kept, since of all families only the one that was measured last has changed."""
    return fit_rate(amounts, seconds, "so far")
