"""Pieces → the operations of a forward, of a whole backward and of its halves; layers whose weights are shared out."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from meshwright.simulate.operations import Collective, Kernel, Operation
from meshwright.simulate.workload.grid import Recompute
from meshwright.simulate.workload.pieces import Piece

Operations = tuple[Operation, ...]


def forward(pieces: Sequence[Piece]) -> Operations:
    """All forward kernels, one after the other."""
    return _chain((piece.name, kernel) for piece in pieces for kernel in piece.forward)


def recomputed(pieces: Sequence[Piece], recompute: Recompute) -> Operations:
    """What a backward runs again of the forward. Source: Korthikanti et al., 2022, sections 3 and 5."""
    return forward([piece for piece in pieces if recompute == "full" or (recompute == "selective" and piece.core)])


def backward(pieces: Sequence[Piece], *, overlapped: bool) -> Operations:
    """Input- and weight-gradients, last piece first.

    With ``overlapped``, what waits for a collective is only what reads its result: weight gradients run beside it.
    Without, one operation follows the other, but for inputs that are gathered again for a weight gradient: they always
    come while the input-gradient is computed (Korthikanti et al., 2022, section 4.2.2).
    """
    found: list[Operation] = []
    cotangent: tuple[int, ...] | None = None  # the operation that makes what the next input-gradient reads
    for piece in reversed(pieces):
        given = cotangent if overlapped or not found else (len(found) - 1,)
        for kernel in piece.input_gradient:
            found.append(Operation(piece.name, kernel, cotangent if overlapped else None))
            cotangent = (len(found) - 1,)
        for place, kernel in enumerate(piece.weight_gradient):
            beside = place == 0 and (overlapped or isinstance(kernel, Collective))
            found.append(Operation(piece.name, kernel, given if beside else None))
    return tuple(found)


def input_gradient(pieces: Sequence[Piece]) -> Operations:
    """The half of a backward that earlier stages wait for."""
    return _chain((piece.name, kernel) for piece in reversed(pieces) for kernel in piece.input_gradient)


def weight_gradient(pieces: Sequence[Piece]) -> Operations:
    """The other half."""
    return _chain((piece.name, kernel) for piece in reversed(pieces) for kernel in piece.weight_gradient)


def joined(first: Operations, second: Operations) -> Operations:
    """One list after the other."""
    return (*first, *shifted(second, len(first)))


def shifted(operations: Operations, by: int) -> Operations:
    """The same operations further down a list; those that need the one right before them still do."""
    if not by:
        return operations
    return tuple(
        operation if operation.needs is None else replace(operation, needs=tuple(need + by for need in operation.needs))
        for operation in operations
    )


def layered(
    layer: Operations,
    layers: int,
    *,
    gathers: Sequence[Collective] = (),
    scatters: Sequence[Collective] = (),
    prefetch: int = 1,
) -> Operations:
    """Layers one after the other, each with collectives on its weights.

    ``gathers`` bring the weights of a layer before it starts, up to ``prefetch`` layers ahead (Zhao et al., PyTorch
    FSDP, VLDB 2023, section 3.3); ``scatters`` sum its gradients once it has ended. All share one stream, in order.
    """
    found: list[Operation] = []
    ends: list[int] = []
    arrivals: list[tuple[int, ...]] = []
    for lap in range(layers):
        while len(arrivals) < min(layers, lap + 1 + prefetch):
            freed = len(arrivals) - prefetch - 1  # the layer whose memory this one's weights take
            after = (ends[freed],) if freed >= 0 else ()
            start = len(found)
            found += [Operation("gather weights", gather, after) for gather in gathers]
            arrivals.append(tuple(range(start, len(found))))
        before = (ends[-1],) if ends else ()
        own = shifted(layer, len(found))
        found.append(replace(own[0], needs=(*before, *arrivals[lap])))
        found += own[1:]
        ends.append(len(found) - 1)
        found += [Operation("sum gradients", scatter, (ends[-1],)) for scatter in scatters]
    return tuple(found)


def _chain(named: Iterable[tuple[str, Kernel]]) -> Operations:
    return tuple(Operation(name, kernel) for name, kernel in named)
