"""What ranks do together while the clock runs: collectives, transfers through the host, either of them beside compute.

Every rank holds one CPU device. Collectives are compiled by XLA and run over gloo, as the executor's are; transfers
take the executor's own transport. Each function is called by all ranks that take part, and returns its samples on all.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from mpi4py import MPI

from meshwright.calibrate.timing import Overlap, repeats_within, sample
from meshwright.execute.transport.mpi import MpiTransport

BLOCK_ELEMENTS = 1 << 20  # random numbers that larger arrays repeat: drawing 512 MiB takes seconds
AXES = ("groups", "ranks")
MATMUL_SIZE, MATMULS = 256, 8  # beside a message: some 3 ms of compute on one core
NAP_SECONDS = 0.001
FLOAT32 = np.dtype(np.float32)
ITEM_BYTES = FLOAT32.itemsize


class Pattern(NamedTuple):
    """Which ranks talk: ``groups`` groups at once of ``ranks`` ranks each, the ranks of a group ``stride`` apart."""

    ranks: int
    stride: int = 1
    groups: int = 1

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each group. Strided groups interleave, as those along the first axis of a 2-D mesh do."""
        block = self.ranks * self.stride
        starts = [index // self.stride * block + index % self.stride for index in range(self.groups)]
        return tuple(tuple(range(start, start + block, self.stride)) for start in starts)

    def fits(self, ranks: int) -> bool:
        """Whether so many ranks hold the pattern."""
        return max(group[-1] for group in self.members) < ranks


def collective_program(kind: str, pattern: Pattern, message_bytes: int) -> tuple[Callable[[], object], int]:
    """One collective as a compiled call that waits, and the bytes that it really moves (see ``CollectiveFit``).

    Sizes are rounded up so that every rank holds the same number of elements, itself a multiple of the ranks.
    """
    run, array, nbytes = _compiled(kind, pattern, message_bytes)
    return lambda: jax.block_until_ready(run(array)), nbytes


def time_together(group: MPI.Intracomm, call: Callable[[], object], seconds: float) -> list[float]:
    """Times of as many calls as fit ``seconds``; each counts until the last rank is done."""
    return time_in_turn(group, [call], seconds)[0]


def time_in_turn(group: MPI.Intracomm, calls: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Times of several calls, one after the other and again, so that what is compared saw the same moments.

    The first rank times a trial and decides how often. Ranks are not lined up before a call: on shared cores a barrier
    costs more than what is measured.
    """
    for call in calls:
        call()
    trial_seconds = sum(sample(call, 1)[0] for call in calls)
    repeats = np.array([repeats_within(trial_seconds, seconds)])
    sleep_until(group.Ibcast(repeats))
    mine = np.array([[sample(call, 1)[0] for call in calls] for _ in range(int(repeats[0]))])
    slowest = np.empty_like(mine)
    sleep_until(group.Iallreduce(mine, slowest, MPI.MAX))
    found: list[list[float]] = slowest.T.tolist()
    return found


def sleep_until(request: MPI.Request) -> None:
    """Wait without polling: MPI's own waits spin, and would take a core from a rank that is being measured."""
    while not request.Test():
        time.sleep(NAP_SECONDS)


def time_transfer(pair: MPI.Intracomm, message_bytes: int, seconds: float) -> list[float]:
    """One way of a transfer from device to device through the host, on the executor's path: half a round trip."""
    array = jax.device_put(_numbers(message_bytes // ITEM_BYTES))
    transport, other = MpiTransport(pair), 1 - pair.rank

    def send() -> None:
        transport.send(0, np.asarray(array), other)

    def receive() -> None:
        receipt = transport.post_receive(0, array.shape, FLOAT32, other)
        jax.block_until_ready(jax.device_put(transport.wait(receipt)))

    def round_trip() -> None:
        for turn in (send, receive) if pair.rank == 0 else (receive, send):
            turn()
        transport.finish()

    return [total / 2 for total in time_together(pair, round_trip, seconds)]


def time_beside_collective(group: MPI.Intracomm, message_bytes: int, seconds: float) -> Overlap:
    """A chain of matmuls and an all-reduce that does not depend on it, in one program."""
    pattern = Pattern(group.size)
    reduce, array, nbytes = _compiled("all_reduce", pattern, message_bytes)
    matrix = jax.device_put(_numbers(MATMUL_SIZE**2).reshape(1, MATMUL_SIZE, MATMUL_SIZE))
    spec = PartitionSpec(AXES)
    sharding = NamedSharding(_mesh(pattern), spec)
    matrices = jax.make_array_from_single_device_arrays((group.size, *matrix.shape[1:]), sharding, [matrix])

    def both(x: Any, a: Any) -> Any:
        return jax.lax.psum(x, "ranks"), _chain(a)

    compute = jax.jit(_chain).lower(matrix).compile()
    together = jax.jit(
        jax.shard_map(both, mesh=_mesh(pattern), in_specs=(spec, spec), out_specs=(spec, spec), check_vma=False)
    )
    together_program = together.lower(array, matrices).compile()
    calls: list[Callable[[], object]] = [
        lambda: jax.block_until_ready(compute(matrix)),
        lambda: jax.block_until_ready(reduce(array)),
        lambda: jax.block_until_ready(together_program(array, matrices)),
    ]
    return _overlap("collective", nbytes, *map(_quiet, time_in_turn(group, calls, seconds)))


def time_beside_transfer(pair: MPI.Intracomm, message_bytes: int, seconds: float) -> tuple[Overlap, Overlap]:
    """A chain of matmuls beside sending (on the first rank) and beside receiving (on the second), both as executed."""
    array = jax.device_put(_numbers(message_bytes // ITEM_BYTES))
    matrix = jax.device_put(_numbers(MATMUL_SIZE**2).reshape(1, MATMUL_SIZE, MATMUL_SIZE))
    compute = jax.jit(_chain).lower(matrix).compile()
    transport, other = MpiTransport(pair), 1 - pair.rank

    def message(busy: int | None) -> None:
        """Move the array; the rank ``busy`` computes meanwhile. An empty answer ends the call on both ranks."""
        running = compute(matrix) if pair.rank == busy else None
        if pair.rank == 0:
            transport.send(0, np.asarray(array), other)
        else:
            receipt = transport.post_receive(0, array.shape, FLOAT32, other)
            jax.block_until_ready(jax.device_put(transport.wait(receipt)))
        transport.finish()
        jax.block_until_ready(running)
        _answer(transport, pair.rank, other)

    calls: list[Callable[[], object]] = [
        lambda: jax.block_until_ready(compute(matrix) if pair.rank == 0 else None),
        partial(message, None),
        partial(message, 0),
        partial(message, 1),
    ]
    alone, moved, *beside = map(_quiet, time_in_turn(pair, calls, seconds))
    sending, receiving = (
        _overlap(activity, int(array.nbytes), alone, moved, together)
        for activity, together in zip(("to_host", "from_host"), beside, strict=True)
    )
    return sending, receiving


def _quiet(samples: Sequence[float]) -> float:
    """The lower quartile: differences of these are taken, in which what other work adds does not cancel."""
    return float(np.quantile(samples, 0.25))


def _overlap(activity: str, nbytes: int, compute: float, message: float, together: float) -> Overlap:
    return Overlap(
        activity=activity,
        message_bytes=float(nbytes),
        compute_seconds=compute,
        message_seconds=message,
        together_seconds=together,
    )


def _answer(transport: MpiTransport, rank: int, other: int) -> None:
    token = np.zeros(1, np.uint8)
    if rank == 1:
        transport.send(1, token, other)
    else:
        transport.wait(transport.post_receive(1, token.shape, token.dtype, other))
    transport.finish()


def _chain(a: Any) -> Any:
    for _ in range(MATMULS):
        a = jnp.tanh(a @ a)
    return a


def _mesh(pattern: Pattern) -> Mesh:
    """The devices of the pattern's ranks, a row a group; ids of devices are not dense, ranks of processes are."""
    device_of = {device.process_index: device for device in jax.devices()}
    rows = [[device_of[rank] for rank in group] for group in pattern.members]
    return Mesh(np.array(rows), AXES, axis_types=(AxisType.Auto,) * 2)


def _compiled(kind: str, pattern: Pattern, message_bytes: int) -> tuple[Callable[[Any], Any], jax.Array, int]:
    ranks = pattern.ranks
    elements = -(-message_bytes // ITEM_BYTES // ranks**2) * ranks**2
    local_elements = elements if COLLECTIVES[kind][1] == "whole" else elements // ranks
    shape = (pattern.groups * ranks, local_elements)
    sharding = NamedSharding(_mesh(pattern), PartitionSpec(AXES))
    local = jax.device_put(_numbers(local_elements).reshape(1, -1))
    array = jax.make_array_from_single_device_arrays(shape, sharding, [local])
    return _program(kind, sharding, shape), array, elements * ITEM_BYTES


@cache  # compiled once for both rounds; arrays are not kept
def _program(kind: str, sharding: NamedSharding, shape: tuple[int, int]) -> Callable[[Any], Any]:
    spec = sharding.spec
    run = jax.shard_map(COLLECTIVES[kind][0], mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(run).lower(jax.ShapeDtypeStruct(shape, FLOAT32, sharding=sharding)).compile()


def _numbers(elements: int) -> np.ndarray:
    block = np.random.default_rng(0).standard_normal(min(elements, BLOCK_ELEMENTS), np.float32)
    return np.resize(block, elements)


def _all_to_all(x: Any) -> Any:
    return jax.lax.all_to_all(x.reshape(jax.lax.axis_size("ranks"), -1), "ranks", 0, 0, tiled=True).reshape(1, -1)


def _permute(x: Any) -> Any:
    size = jax.lax.axis_size("ranks")
    return jax.lax.ppermute(x, "ranks", [(rank, (rank + 1) % size) for rank in range(size)])


def _broadcast(x: Any) -> Any:
    """XLA's partitioner has no broadcast: it adds zeros to the one array, and so does this."""
    return jax.lax.psum(jnp.where(jax.lax.axis_index("ranks") == 0, x, 0), "ranks")


# What each rank holds before: the whole array of ``message_bytes``, or its share of it.
COLLECTIVES: dict[str, tuple[Callable[[Any], Any], Literal["whole", "share"]]] = {
    "all_reduce": (lambda x: jax.lax.psum(x, "ranks"), "whole"),
    "all_gather": (lambda x: jax.lax.all_gather(x, "ranks", axis=1, tiled=True), "share"),
    "reduce_scatter": (lambda x: jax.lax.psum_scatter(x, "ranks", scatter_dimension=1, tiled=True), "whole"),
    "all_to_all": (_all_to_all, "share"),
    "permute": (_permute, "share"),
    "broadcast": (_broadcast, "whole"),
}
