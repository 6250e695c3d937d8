"""What two ranks that share a device measure of it: ``python -m experiments.gpu.probe FILE`` under ``mpiexec -n 2``."""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshwright.execute.process_group import ProcessGroup, guard

SIZES_BYTES = tuple(1 << power for power in range(14, 27, 2))  # 16 KiB to 64 MiB
ROUND_TRIPS = 9
MATMUL_SECONDS = 1.5  # alone, and as long together
MATMUL_SIDES = {"cpu": 256, "gpu": 4096}  # a fraction of a millisecond or more, as kernels of training take


def ping_pong(communicator: Any, size_bytes: int) -> float:
    """Median seconds one way, from device to device through both hosts' memory."""
    mine = jax.device_put(np.random.default_rng(0).standard_normal(size_bytes // 4, np.float32))
    buffer = np.empty(size_bytes // 4, np.float32)
    other = 1 - communicator.Get_rank()

    def send() -> None:
        # A result of its own each time: an array keeps its copy on the host once that has been made.
        communicator.Send(np.asarray(jax.block_until_ready(-mine)), other)

    def receive() -> None:
        communicator.Recv(buffer, other)
        jax.block_until_ready(jax.device_put(buffer))

    turns = (send, receive) if communicator.Get_rank() == 0 else (receive, send)
    samples = []
    for _ in range(2 + ROUND_TRIPS):
        communicator.Barrier()
        start = time.perf_counter()
        for turn in turns:
            turn()
        samples.append((time.perf_counter() - start) / 2)
    return statistics.median(samples[2:])


def matmul_seconds(seconds: float) -> list[float]:
    """Times of one matmul, again and again."""
    platform = jax.local_devices()[0].platform
    side = MATMUL_SIDES.get(platform, MATMUL_SIDES["gpu"])
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    matrix = jax.device_put(np.random.default_rng(0).standard_normal((side, side), np.float32).astype(dtype))
    multiply = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    jax.block_until_ready(multiply(matrix, matrix))
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(multiply(matrix, matrix))
        samples.append(time.perf_counter() - start)
    return samples


def rest_until_all_are_here(communicator: Any) -> None:
    """A barrier that sleeps: MPI's own spins on a core that the other rank may need."""
    request = communicator.Ibarrier()
    while not request.Test():
        time.sleep(0.001)


def main(file: str) -> None:
    """Measure; rank 0 writes the file."""
    group = ProcessGroup.start(devices_per_rank=1, distributed=False)
    communicator = group.communicator
    if group.size != 2:
        raise ValueError(f"the probe is for 2 ranks and {group.size} were started")
    alone = matmul_seconds(MATMUL_SECONDS) if group.rank == 0 else []
    rest_until_all_are_here(communicator)
    together = matmul_seconds(MATMUL_SECONDS)
    rest_until_all_are_here(communicator)
    seconds = [ping_pong(communicator, size) for size in SIZES_BYTES]
    if group.rank == 0:
        found = {
            "bytes_sent": SIZES_BYTES,
            "seconds": seconds,
            "alone_seconds": alone,
            "together_seconds": together,
        }
        Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    with guard():
        main(sys.argv[1])
