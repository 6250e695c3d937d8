"""One stage from its kernels: a host that dispatches, and a device with a stream each for compute and communication.

A device runs four streams side by side, each in order: compute, collectives, and copies to and from its host. A kernel
starts when its stream is free, when the kernels whose results it reads have ended, and not before the host has
dispatched it. While several streams are busy they slow each other, by the device's measured table. Frameworks that
run eagerly dispatch every operation; a compiled program is dispatched once and launches its kernels itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from meshwright.calibrate.hardware import Device, Link
from meshwright.errors import ScheduleError
from meshwright.simulate.collective import CollectiveKind, collective_seconds
from meshwright.simulate.compute import interference_rates, kernel_seconds
from meshwright.simulate.engine import NOBODY, make_tasks, run_tasks
from meshwright.simulate.limits import need_room
from meshwright.simulate.operations import Collective, Copy, Kernel, Operation

Floats = NDArray[np.float64]

HOST, COMPUTE, COLLECTIVES, TO_HOST, FROM_HOST = range(5)  # executors; an activity is its executor less one


@dataclass(frozen=True, slots=True)
class Dispatch:
    """What the host spends before kernels run: once for the whole program, and for each operation."""

    program_seconds: float = 0.0
    operation_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("program_seconds", "operation_seconds"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ScheduleError(f"{name} of a dispatch is {getattr(self, name)}; at least 0 is needed")


AT_ONCE = Dispatch()  # a host that costs nothing


@dataclass(frozen=True, slots=True, eq=False)
class StageRun:
    """How the operations of a stage ran.

    ``seconds`` is the whole; it is the sum of the time in which the device computed, of
    ``exposed_communication_seconds`` in which it only communicated, and of ``dispatch_bound_seconds`` in which it did
    nothing at all, for want of the host. ``compute_seconds`` and ``communication_seconds`` are the kernels' own times,
    with nothing beside them; ``start_seconds`` and ``end_seconds`` those of each operation as it ran.
    """

    seconds: float
    host_seconds: float
    compute_seconds: float
    communication_seconds: float
    exposed_communication_seconds: float
    dispatch_bound_seconds: float
    start_seconds: Floats
    end_seconds: Floats


def run_stage(
    operations: Sequence[Operation],
    device: Device,
    links: Mapping[str, Link] | None = None,
    dispatch: Dispatch | None = None,
    *,
    repeat: int = 1,
    host_link: Link | None = None,
    dtype: str = "bf16",
) -> StageRun:
    """Run the operations of a stage, ``repeat`` times over, on one of its devices.

    Args:
        links: the link that a collective along each mesh axis sees.
        dispatch: None is a compiled program's: once, the device's own ``dispatch_seconds``.
        repeat: how often the list stands one after the other, as the layers of a model do; what needs the operation
            before it needs, at the head of the list, the last one of the list before.
        host_link: what copies to and from the host go over.
        dtype: what collectives carry (switches reduce 16-bit numbers only).

    Raises:
        ScheduleError: an operation needs one that does not stand before it, or a link is missing.
    """

    def seconds_of(kernel: Kernel) -> float:
        match kernel:
            case Collective(kind=kind, message_bytes=size, ranks=ranks, axis=axis):
                if not links or axis not in links:
                    raise ScheduleError(f"a collective runs along axis {axis!r}, for which there is no link")
                return collective_seconds(kind, size, ranks, links[axis], dtype)
            case Copy(bytes=size):
                if host_link is None:
                    raise ScheduleError("an operation copies to or from the host, but no host_link is given")
                return host_link.latency_seconds.value + size / host_link.bytes_per_second.value
            case _:
                return kernel_seconds(device, kernel)

    own = Dispatch(device.dispatch_seconds.value) if dispatch is None else dispatch
    return run_operations(operations, seconds_of, own, interference_rates(device), repeat=repeat)


def run_operations(
    operations: Sequence[Operation],
    seconds_of: Callable[[Kernel], float],
    dispatch: Dispatch = AT_ONCE,
    rates: Floats | None = None,
    *,
    repeat: int = 1,
) -> StageRun:
    """``run_stage`` with any costs: seconds of each kernel alone, and rates[mask of streams][stream] side by side."""
    if repeat < 1:
        raise ScheduleError(f"a stage was to be repeated {repeat} times; at least once is needed")
    block = len(operations)
    need_room(2 * block * repeat, "operations and their dispatches")
    known: dict[Kernel, float] = {}
    for operation in operations:
        if operation.kernel not in known:
            known[operation.kernel] = seconds_of(operation.kernel)
    alone = np.tile([known[operation.kernel] for operation in operations], repeat)
    stream = np.tile([stream_of(operation.kernel) for operation in operations], repeat)
    needs = _needs(operations)
    count = block * repeat
    eager = dispatch.operation_seconds > 0
    # The tasks: the program's dispatch, then each operation's dispatch (if it has one) and its kernel.
    each = 2 if eager else 1
    kernel = 1 + each * np.arange(count) + (each - 1)
    lists: list[list[tuple[int, float]]] = [[] for _ in range(1 + each * count)]
    for i in range(count):
        lap = i - i % block
        before = [lap + k for k in needs[i % block]] if i else []
        lists[kernel[i]] = [(int(kernel[k]), 0.0) for k in before] + [(int(kernel[i]) - 1 if eager else 0, 0.0)]
    duration, executor = np.zeros(len(lists)), np.full(len(lists), HOST)
    duration[0] = dispatch.program_seconds
    duration[kernel], executor[kernel] = alone, stream
    if eager:
        duration[kernel - 1] = dispatch.operation_seconds
    shared = {}
    if rates is not None and (rates < 1).any() and len(set(stream.tolist())) > 1:
        beside = np.where(executor == HOST, NOBODY, 0)
        shared = {"device": beside, "activity": np.maximum(executor - 1, 0), "interference": rates[None]}
    run = run_tasks(make_tasks(duration, executor, lists, **shared))
    start, end = run.start_seconds[kernel], run.end_seconds[kernel]
    computes = stream == COMPUTE
    computing, busy = _union(start[computes], end[computes]), _union(start, end)
    seconds = float(end.max(initial=run.end_seconds[0]))
    return StageRun(
        seconds=seconds,
        host_seconds=float(duration[executor == HOST].sum()),
        compute_seconds=float(alone[computes].sum()),
        communication_seconds=float(alone[~computes].sum()),
        exposed_communication_seconds=max(0.0, busy - computing),
        dispatch_bound_seconds=max(0.0, seconds - busy),
        start_seconds=start,
        end_seconds=end,
    )


def stream_of(kernel: Kernel) -> int:
    """The executor that runs a kernel."""
    match kernel:
        case Collective():
            return COLLECTIVES
        case Copy(to_host=to_host):
            return TO_HOST if to_host else FROM_HOST
        case _:
            return COMPUTE


def _needs(operations: Sequence[Operation]) -> list[tuple[int, ...]]:
    """Positions that each operation needs; -1, at the head of the list, is the last one of the list before."""
    needs = []
    for i, operation in enumerate(operations):
        own = (i - 1,) if operation.needs is None else operation.needs
        if any(not (0 <= k < i or (k == i - 1 == -1)) for k in own):
            raise ScheduleError(
                f"operation {i} ({operation.name}) needs {own}; only operations before it can be needed"
            )
        needs.append(own)
    return needs


def _union(start: Floats, end: Floats) -> float:
    """Seconds in which at least one of the intervals goes on."""
    order = np.argsort(start, kind="stable")
    start, end = start[order], end[order]
    until = np.concatenate([[0.0], np.maximum.accumulate(end)[:-1]]) if len(end) else end
    return float(np.maximum(end - np.maximum(start, until), 0.0).sum())


def with_gradient_sync(
    operations: Sequence[Operation],
    made_bytes: Mapping[int, float],
    ranks: int,
    axis: str,
    *,
    bucket_bytes: float,
    kind: CollectiveKind = "all_reduce",
) -> tuple[Operation, ...]:
    """A backward that sums its gradients over ``ranks`` while it goes on, bucket by bucket.

    A bucket is closed, and its collective may start, with the operation that makes it full; the last one takes the
    rest (PyTorch DDP: Li et al., VLDB 2020, section 3.2.3; XLA combines collectives to a threshold alike).

    Args:
        made_bytes: gradient bytes that each operation (by position) makes.
        kind: ``reduce_scatter`` where each rank keeps its share only (ZeRO).
    """
    if bucket_bytes <= 0:
        raise ScheduleError(f"bucket_bytes is {bucket_bytes}; a number above 0 is needed")
    result, held = list(_explicit(operations)), 0.0
    made = sorted((position, size) for position, size in made_bytes.items() if size)
    for k, (position, size) in enumerate(made):
        held += size
        if held >= bucket_bytes or k == len(made) - 1:
            collective = Collective(kind=kind, message_bytes=held, ranks=ranks, axis=axis)
            result.append(Operation(f"{kind} gradients", collective, (position,)))
            held = 0.0
    return tuple(result)


def _explicit(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """The same operations with what they need named by position."""
    return tuple(
        operation if operation.needs is not None else replace(operation, needs=(i - 1,) if i else ())
        for i, operation in enumerate(operations)
    )
