"""What both trainings share, ours and the plain one: device, batches, optimizer, and the peak of an MFU."""

from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import optax

from meshwright.calibrate.hardware import Cluster, load_cluster, parse_cluster, shipped_machines, short_dtype
from meshwright.models.base import Model

LEARNING_RATE = 1e-4
BATCHES = 4  # different ones, made before the clock runs
SHARE_OF_STEPS = 0.75  # of a job's time; then its results are made
HELD_BACK = ("PCIe", "NVL")  # variants whose data sheet is another


def adamw() -> Any:
    return optax.adamw(LEARNING_RATE)


def one_device(machine: Path) -> Cluster:
    """The calibrated machine with one of its devices: all that these jobs use."""
    cluster = load_cluster(machine)
    host = msgspec.structs.replace(cluster.hosts[0], devices=1, busy_slowdown=None)
    return msgspec.structs.replace(cluster, hosts=(host,))


def random_batches(model: Model, size: int, seed: int = 0) -> list[Any]:
    """Batches on the host: normal numbers, and whole ones from all over the vocabulary or the classes.

    Few tokens only would make the gradient of the embedding add up in few rows, which a GPU does slowly.
    """
    config = model.loss_fn.args[0]  # type: ignore[attr-defined]  # the zoo binds it with functools.partial
    limit = getattr(config, "vocab", None) or config.classes
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray[Any, Any]:
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(0, limit, leaf.shape).astype(leaf.dtype)
        return rng.normal(size=leaf.shape).astype(leaf.dtype)

    return [jax.tree.map(draw, model.batch_fn(size)) for _ in range(BATCHES)]


def utilization(flops: float, seconds: float, dtype: str, machine: Cluster | None) -> dict[str, Any]:
    """Model FLOP/s as a share of the device's peak: its data sheet's, else its best matmul, else unknown (None).

    The data sheet is that of a shipped machine whose device bears the name that the driver gives.
    """
    peak, source = _peak_flops(short_dtype(dtype), machine)
    share = flops / seconds / peak if peak else None
    return {"model_flops": flops, "mfu": share, "mfu_peak": {"flops_per_second": peak, "source": source}}


def _peak_flops(dtype: str, machine: Cluster | None) -> tuple[float | None, str]:
    kind = jax.local_devices()[0].device_kind
    if not any(variant in kind for variant in HELD_BACK):
        for name in shipped_machines():
            device = parse_cluster(name).hosts[0].device
            if device.name.partition("-")[0] in kind.replace("-", " ").split():
                return device.peak_flops(dtype), f"data sheet ({device.name}, {dtype}, dense)"
    if machine is None:
        return None, "unknown: no data sheet of this device is shipped"
    return machine.hosts[0].device.peak_flops(dtype), f"best matmul measured here ({dtype})"


def end_of_steps(began: float, until: float) -> float:
    """When to take no more steps, so that a job that began then is over by ``until``."""
    return began + SHARE_OF_STEPS * (until - began)
