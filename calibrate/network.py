"""Microbenchmarks of links under MPI: host-staged point-to-point, and the collectives that XLA itself runs.

Every rank holds one CPU device. Collectives are compiled by XLA and run over gloo, as the executor's are. Ranks that
do not take part sleep instead of polling, so that they leave the shared cores to those that do.
"""

import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from mpi4py import MPI

from meshwright.calibrate.compute import busy_matmul_seconds, random_array
from meshwright.calibrate.timing import P2P, NetworkTimings, Timing, repeats_within, sample, timing

LINE_SIZES_BYTES = (1 << 16, 1 << 22)  # two sizes make a line: every kind gets these first
MORE_SIZES_BYTES = (1 << 19, 1 << 13, 1 << 24)
NAP_SECONDS = 0.001


def start_jax(comm: MPI.Comm) -> None:
    """Join the ranks into one JAX runtime; rank 0 finds a free port and tells the others."""
    address = None
    if comm.rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
    jax.distributed.initialize(
        coordinator_address=comm.bcast(address), num_processes=comm.size, process_id=comm.rank, local_device_ids=[0]
    )
    jax.devices()  # the first look at the devices waits for every process, so all of them look now


def measure_network(
    comm: MPI.Comm, budget_seconds: float, progress: Callable[[float, str], None]
) -> NetworkTimings | None:
    """Measure the links among all ranks; the result is on rank 0, None elsewhere.

    ``start_jax`` comes first. Within ``budget_seconds`` as many sizes as there is time for are measured, two of each
    kind in any case.
    """
    start = time.perf_counter()
    probe_seconds = min(1.0, budget_seconds / 20)
    progress(0.0, "one matmul alone")
    alone = busy_matmul_seconds(probe_seconds) if comm.rank == 0 else []
    wait_for_all(comm)
    progress(0.05, f"one matmul on {comm.size} ranks at once")
    busy = busy_matmul_seconds(probe_seconds)
    wait_for_all(comm)

    groups = {size: comm.Split(0 if comm.rank < size else MPI.UNDEFINED, comm.rank) for size in group_sizes(comm.size)}
    cases = list(_cases(comm.size))
    each_seconds = budget_seconds / len(cases) / 4
    timings: list[Timing] = []
    for index, (family, ranks, nbytes) in enumerate(cases):
        spent = time.perf_counter() - start
        if not _agree(comm, spent < budget_seconds or index < len(LINE_SIZES_BYTES)):
            break
        done = min(1.0, max(spent / budget_seconds, index / len(cases)))
        progress(done, f"{family} {nbytes >> 10} KiB, {ranks} ranks")
        if comm.rank < ranks:
            measure = _ping_pong if family == P2P else partial(_collective, kind=family)
            samples = measure(groups[ranks], nbytes=nbytes, seconds=each_seconds)
            timings.append(timing(family, float(nbytes), samples, ranks))
        wait_for_all(comm)
    if comm.rank != 0:
        return None
    return NetworkTimings(ranks=comm.size, alone_seconds=tuple(alone), busy_seconds=tuple(busy), timings=tuple(timings))


def wait_for_all(comm: MPI.Comm) -> None:
    """A barrier that sleeps: MPI's own spins, and would take a core from the rank that is being measured."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(NAP_SECONDS)


def group_sizes(ranks: int) -> list[int]:
    """Sizes of the groups to measure: powers of two and all ranks."""
    return sorted({size for size in (2, 4, 8, 16, 32, 64) if size <= ranks} | {ranks})


def _cases(ranks: int) -> Iterator[tuple[str, int, int]]:
    """Kind, ranks and bytes: what matters most first, since a short budget ends the list early."""
    families = [(P2P, 2), *((kind, size) for kind in COLLECTIVES for size in reversed(group_sizes(ranks)))]
    yield from ((family, size, nbytes) for family, size in families for nbytes in LINE_SIZES_BYTES)
    yield from ((family, size, nbytes) for nbytes in MORE_SIZES_BYTES for family, size in families)


def _agree(comm: MPI.Comm, go_on: bool) -> bool:
    """Rank 0's decision, so that no rank measures alone."""
    flag = np.array([go_on])
    request = comm.Ibcast(flag)
    while not request.Test():
        time.sleep(NAP_SECONDS)
    return bool(flag[0])


def _ping_pong(pair: MPI.Comm, nbytes: int, seconds: float) -> list[float]:
    """One way of a transfer from device to device through the host, as the executor moves activations."""
    array = random_array((nbytes // 4,))
    buffer = np.empty(nbytes // 4, np.float32)
    other = 1 - pair.rank

    def send() -> None:
        pair.Send(np.asarray(array), other)

    def receive() -> None:
        pair.Recv(buffer, other)
        jax.block_until_ready(jax.device_put(buffer))

    def round_trip() -> None:
        for turn in (send, receive) if pair.rank == 0 else (receive, send):
            turn()

    return [total / 2 for total in _sample_together(pair, round_trip, seconds)]


def _collective(group: MPI.Comm, nbytes: int, seconds: float, kind: str) -> list[float]:
    """Times of one collective, compiled by XLA over the devices of a group of processes."""
    devices = sorted(jax.devices(), key=lambda device: device.process_index)[: group.size]
    mesh = Mesh(np.array(devices), ("ranks",), axis_types=(AxisType.Auto,))
    body, local_share = COLLECTIVES[kind]
    split = PartitionSpec("ranks")
    # Sizes are rounded up so that every rank holds the same number of elements, itself a multiple of the ranks.
    elements = -(-nbytes // 4 // group.size**2) * group.size**2
    local_elements = elements if local_share == "whole" else elements // group.size
    local = random_array((1, local_elements))
    array = jax.make_array_from_single_device_arrays((group.size, local_elements), NamedSharding(mesh, split), [local])
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))
    program = run.lower(array).compile()
    return _sample_together(group, lambda: jax.block_until_ready(program(array)), seconds)


def _sample_together(group: MPI.Comm, call: Callable[[], object], seconds: float) -> list[float]:
    """The same number of calls on every rank of a group: rank 0 times a trial and decides."""
    call()
    repeats = group.bcast(repeats_within(min(sample(call, 2)), seconds))
    return sample(call, repeats)


def _all_to_all(x: Any) -> Any:
    return jax.lax.all_to_all(x.reshape(jax.lax.axis_size("ranks"), -1), "ranks", 0, 0, tiled=True).reshape(1, -1)


def _permute(x: Any) -> Any:
    size = jax.lax.axis_size("ranks")
    return jax.lax.ppermute(x, "ranks", [(rank, (rank + 1) % size) for rank in range(size)])


# What each rank holds before: the whole array of ``message_bytes``, or its share of it.
COLLECTIVES: dict[str, tuple[Callable[[Any], Any], Literal["whole", "share"]]] = {
    "all_reduce": (lambda x: jax.lax.psum(x, "ranks"), "whole"),
    "all_gather": (lambda x: jax.lax.all_gather(x, "ranks", axis=1, tiled=True), "share"),
    "reduce_scatter": (lambda x: jax.lax.psum_scatter(x, "ranks", scatter_dimension=1, tiled=True), "whole"),
    "all_to_all": (_all_to_all, "share"),
    "permute": (_permute, "whole"),
}
