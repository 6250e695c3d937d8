"""From a schedule to a whole program: transfers between the computations, and the tail that ends the iteration."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from meshwright.errors import ScheduleError
from meshwright.simulate.code import (
    FORWARD,
    NONE,
    RECEIVE,
    SEND,
    WEIGHT,
    WHATS,
    Code,
    Table,
    decode,
    encode,
)
from meshwright.simulate.program import ONCE, Gather, Instruction, Program, Receive, Reduce, Send, Update
from meshwright.simulate.schedules.base import Options, Order, Row
from meshwright.simulate.schedules.table import find_schedule

Edges = Sequence[tuple[int, int]]
Ints = NDArray[np.int64]
ACTIVATION, COTANGENT = WHATS.index("activation"), WHATS.index("cotangent")


def build_program(
    schedule: str,
    meshes: int,
    microbatches: int,
    edges: Edges | None = None,
    tied: Edges = (),
    *,
    chunks: int | None = None,
    atomic_pairs: bool = False,
    norm: bool = False,
    gather: bool = False,
) -> Program:
    """The instructions of every mesh for one training step; ``build_code`` says how and what the arguments mean."""
    return decode(
        build_code(
            schedule,
            meshes,
            microbatches,
            edges,
            tied,
            chunks=chunks,
            atomic_pairs=atomic_pairs,
            norm=norm,
            gather=gather,
        )
    )


def build_code(
    schedule: str,
    meshes: int,
    microbatches: int,
    edges: Edges | None = None,
    tied: Edges = (),
    *,
    chunks: int | None = None,
    atomic_pairs: bool = False,
    norm: bool = False,
    gather: bool = False,
) -> Code:
    """The instructions of every mesh for one training step, as a table.

    A ``Send`` stands right after the computation that makes its payload, a ``Receive`` right before the one that
    needs it; nothing is sent between stages of one mesh. The tail of each mesh reduces, adds the gradients of tied
    weights where they are owned, updates, and returns the new parameter to its users; sends precede receives in each
    of these phases, so no pattern of ties can deadlock.

    Args:
        schedule: a name in ``SCHEDULES``.
        meshes: number of meshes; each holds one stage, or ``chunks`` of them.
        edges: all (source, target) pairs of stages between which activations flow, cotangents flowing back; None is
            the schedule's own (a chain 0 → 1 → 2 ...); a skip connection is one more pair.
        tied: (owner, user) pairs of stages that share a weight.
        chunks: stages a mesh, for schedules that have a choice.
        atomic_pairs: run overlapped pairs of DualPipe and DualPipeV as one piece.
        norm: sum the squared gradients of all meshes before the update, on the mesh of stage 0.
        gather: end with a ``Gather`` of the updated parameters of each stage (ZeRO).

    Raises:
        ScheduleError: the schedule is unknown or its rule does not hold for these sizes, or an edge does not run from
            an earlier stage to a later one.
    """
    plan = find_schedule(schedule)
    graph = None if edges is None or "edges" not in plan.takes else tuple((s, t) for s, t in edges)
    options = Options(chunks=chunks, atomic_pairs=atomic_pairs, edges=graph)
    order = plan.make(meshes, microbatches, options)
    return weave(order, order.edges if edges is None else edges, tied, norm=norm, gather=gather)


def weave(
    order: Order, edges: Edges, tied: Edges = (), *, tail: bool = True, norm: bool = False, gather: bool = False
) -> Code:
    """Put transfers between the computations of an order, and the tail behind them (unless there shall be none).

    Stages of the order that are copies of one stage of the model sum their gradients as tied weights do.
    """
    mesh_of = order.mesh_of_stage
    targets = _neighbours(edges, mesh_of)
    sources = _reverse(targets)
    copies = [(first, stage) for stage, first in enumerate(order.copies) if first != stage]
    users = _ties([*tied, *copies], mesh_of)
    first_source, flat_sources = _csr(sources, order.stages)
    first_target, flat_targets = _csr(targets, order.stages)
    pieces: list[Table] = []
    lengths = []
    for mesh, row in enumerate(order.rows):
        woven = _weave(
            row.kind, row.stage, row.microbatch, row.joined, first_source, flat_sources, first_target, flat_targets
        )
        last = tuple(_tail(mesh, _done(row), mesh_of, users, norm=norm, gather=gather)) if tail else ()
        pieces += [woven, encode((last,)).table]
        lengths.append(len(woven) + len(last))
    return Code(np.concatenate(pieces), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


@njit(cache=True)
def _weave(
    kind: NDArray[np.int32],
    stage: NDArray[np.int32],
    microbatch: NDArray[np.int32],
    joined: NDArray[np.bool_],
    first_source: Ints,
    sources: Ints,
    first_target: Ints,
    targets: Ints,
) -> Table:
    """One row with its transfers. What is joined runs on end: all receives before it, all sends after it."""
    size = 0
    for i in range(len(kind)):
        s = stage[i]
        size += 1
        if kind[i] != WEIGHT:
            size += first_source[s + 1] - first_source[s] + first_target[s + 1] - first_target[s]
    table = np.empty((size, 5), np.int32)
    out = 0
    begin = 0
    while begin < len(kind):
        stop = begin + 1
        while stop < len(kind) and joined[stop - 1]:
            stop += 1
        for phase in range(3):  # receives, computations, sends
            for i in range(begin, stop):
                s, forward = stage[i], kind[i] == FORWARD
                if phase == 1:
                    table[out, 0], table[out, 1], table[out, 2] = kind[i], s, NONE
                    table[out, 3], table[out, 4] = NONE, microbatch[i]
                    out += 1
                elif kind[i] != WEIGHT:
                    upstream = forward == (phase == 0)  # from the sources, or back to them
                    first = first_source if upstream else first_target
                    others = sources if upstream else targets
                    for k in range(first[s], first[s + 1]):
                        table[out, 0], table[out, 1], table[out, 2] = RECEIVE if phase == 0 else SEND, s, others[k]
                        table[out, 3], table[out, 4] = ACTIVATION if forward else COTANGENT, microbatch[i]
                        out += 1
        begin = stop
    return table


def _done(row: Row) -> list[int]:
    """The stages of a row, whose gradients are ready first first: reductions may run beside what follows."""
    last = np.full(int(row.stage.max(initial=NONE)) + 1, NONE)
    last[row.stage] = np.arange(len(row))  # of positions for one stage NumPy keeps the last
    held: list[int] = np.flatnonzero(last != NONE).tolist()
    return sorted(held, key=last.__getitem__)


def _tail(
    mesh: int,
    held: Sequence[int],
    mesh_of: Sequence[int],
    users: dict[int, list[int]],
    *,
    norm: bool,
    gather: bool,
) -> Iterator[Instruction]:
    """What ends the iteration on one mesh, which holds these stages."""
    owners = _reverse(users)
    yield from (Reduce(stage) for stage in held)
    yield from (Send(stage, owner, "gradient", ONCE) for stage in held for owner in owners[stage])
    yield from (Receive(stage, user, "gradient", ONCE) for stage in held for user in users.get(stage, ()))
    if norm:
        meshes = max(mesh_of) + 1
        first_of = [mesh_of.index(other) for other in range(meshes)]  # each mesh speaks for itself by its first stage
        root = mesh_of[0]
        others = [first_of[other] for other in range(meshes) if other != root]
        if mesh == root:
            yield from (Receive(0, other, "square", ONCE) for other in others)
            yield from (Send(0, other, "norm", ONCE) for other in others)
        else:
            yield Send(first_of[mesh], 0, "square", ONCE)
            yield Receive(first_of[mesh], 0, "norm", ONCE)
    yield from (Update(stage) for stage in held)
    yield from (Send(stage, user, "parameter", ONCE) for stage in held for user in users.get(stage, ()))
    yield from (Receive(stage, owner, "parameter", ONCE) for stage in held for owner in owners[stage])
    if gather:
        yield from (Gather(stage) for stage in held)


def _csr(grouped: dict[int, list[int]], stages: int) -> tuple[Ints, Ints]:
    lists = [grouped.get(stage, []) for stage in range(stages)]
    flat = [other for others in lists for other in others]
    return np.concatenate([[0], np.cumsum([len(others) for others in lists], dtype=np.int64)]), np.array(flat, np.int64)


def _neighbours(edges: Edges, mesh_of: Sequence[int]) -> defaultdict[int, list[int]]:
    """Targets of each stage on other meshes, in order and once each."""
    for source, target in edges:
        if not 0 <= source < target < len(mesh_of):
            raise ScheduleError(
                f"edge {source} → {target} is not possible with {len(mesh_of)} stages; "
                "an edge runs from an earlier stage to a later one"
            )
    return _grouped(edges, mesh_of)


def _ties(tied: Edges, mesh_of: Sequence[int]) -> defaultdict[int, list[int]]:
    """Users of each owner on other meshes, in order and once each."""
    for owner, user in tied:
        if not (0 <= owner < len(mesh_of) and 0 <= user < len(mesh_of) and owner != user):
            raise ScheduleError(
                f"a weight tied between stages {owner} and {user} needs two of the {len(mesh_of)} stages"
            )
    return _grouped(tied, mesh_of)


def _grouped(pairs: Edges, mesh_of: Sequence[int]) -> defaultdict[int, list[int]]:
    grouped: defaultdict[int, list[int]] = defaultdict(list)
    for first, second in sorted(set(pairs)):
        if mesh_of[first] != mesh_of[second]:
            grouped[first].append(second)
    return grouped


def _reverse(grouped: dict[int, list[int]]) -> defaultdict[int, list[int]]:
    reverse: defaultdict[int, list[int]] = defaultdict(list)
    for first in sorted(grouped):
        for second in grouped[first]:
            reverse[second].append(first)
    return reverse
