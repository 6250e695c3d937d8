"""How steps are timed: warm first, then until the time is over, median and quartiles kept."""

import statistics
import time
from collections.abc import Callable, Mapping

WARM_UP_STEPS = 3
MEMORY_FRACTION = 0.92  # of the device, for a job that has it to itself; JAX's own default is 0.75
FEWEST_STEPS, MOST_STEPS = 5, 30


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles of step times, as they stand in the results."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median_seconds": middle, "low_seconds": low, "high_seconds": high, "steps": len(samples)}


def timed_steps(step: Callable[[], float], until: float) -> list[float]:
    """Seconds of each step, after warm ones, until the clock (``time.monotonic``) says ``until``.

    Args:
        step: runs one step to its end and returns what it took; the fewest steps are run even past ``until``.
    """
    for _ in range(WARM_UP_STEPS):
        step()
    samples: list[float] = []
    while len(samples) < FEWEST_STEPS or (len(samples) < MOST_STEPS and time.monotonic() < until):
        samples.append(step())
    return samples


def memory_in_use() -> dict[str, int]:
    """What the allocator of the first device says of itself; nothing on a CPU, which has none.

    ``peak_bytes_in_use`` is of the process so far: what XLA tried while it tuned its kernels is in it.
    """
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return {name: int(stats[name]) for name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit") if name in stats}


def limit_of_memory(environment: Mapping[str, str], fraction: float) -> dict[str, str]:
    """The environment with the share of the device's memory that JAX takes at its start.

    JAX refuses the variable's old name beside its new one (jaxlib 0.11, ``xla_client.py``), so the new one is left out.
    """
    kept = {name: value for name, value in environment.items() if name != "XLA_CLIENT_MEM_FRACTION"}
    return {**kept, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:g}"}
