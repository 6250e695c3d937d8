"""What every schedule is: a rule that orders each mesh's computations, as arrays, and the memory it needs.

A schedule writes each row as letters (F forward, B whole backward, I and W its input- and weight-gradient halves), in
which every kind counts its own micro-batches: ``letters("FFBFBB", stage=0)`` is 1F1B's ``0F0 0F1 0B0 0F2 0B1 0B2``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.errors import ScheduleError
from meshwright.simulate.program import COMPUTES, Compute

Ints = NDArray[np.int32]
KINDS = "FBIW"  # a computation's code is its place in this word
Edges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """The computations of one mesh in order, as arrays of one length.

    ``joined`` marks a computation that runs as one piece with the next: both wait for the inputs of both, and their
    results leave after the second.
    """

    kind: Ints
    stage: Ints
    microbatch: Ints
    joined: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.kind)


def letters(text: str, stage: ArrayLike, microbatch: ArrayLike | None = None, joined: ArrayLike = False) -> Row:
    """A row from letters; ``stage`` is one stage or one for each letter.

    Without ``microbatch`` each kind of letter counts its micro-batches from 0 up, for each stage by itself.

    Raises:
        ScheduleError: a letter is none of F, B, I and W.
    """
    codes = np.frombuffer(text.encode(), np.uint8)
    kind = np.full(len(codes), -1, np.int32)
    for code, letter in enumerate(KINDS):
        kind[codes == ord(letter)] = code
    if (kind < 0).any():
        raise ScheduleError(f"{text!r} is no row of a schedule; its letters are F, B, I and W")
    stages = np.ascontiguousarray(np.broadcast_to(np.asarray(stage, np.int32), kind.shape))
    if microbatch is None:
        numbers = np.empty(len(kind), np.int32)
        key = stages.astype(np.int64) * len(KINDS) + kind
        for value in np.unique(key):
            of_value = key == value
            numbers[of_value] = np.arange(of_value.sum(), dtype=np.int32)
    else:
        numbers = np.ascontiguousarray(np.broadcast_to(np.asarray(microbatch, np.int32), kind.shape))
    return Row(kind, stages, numbers, np.ascontiguousarray(np.broadcast_to(np.asarray(joined, bool), kind.shape)))


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """What a schedule decides: one row for each mesh, the edges between stages, and which stages are copies.

    ``edges`` are (source, target) pairs between which activations flow, cotangents flowing back. ``copies[s]`` is the
    stage of the model whose weights stage s holds; it differs from s only where a schedule keeps two replicas.
    """

    rows: tuple[Row, ...]
    edges: Edges
    copies: tuple[int, ...]

    @property
    def stages(self) -> int:
        """Number of stages, copies included."""
        return len(self.copies)

    @property
    def mesh_of_stage(self) -> tuple[int, ...]:
        """The mesh on which each stage lives."""
        home = {int(stage): mesh for mesh, row in enumerate(self.rows) for stage in np.unique(row.stage)}
        return tuple(home[stage] for stage in range(self.stages))

    def steps(self) -> tuple[tuple[Compute, ...], ...]:
        """The rows as instructions."""
        makers = [COMPUTES[letter] for letter in KINDS]
        return tuple(
            tuple(
                makers[kind](stage, microbatch)
                for kind, stage, microbatch in zip(
                    row.kind.tolist(), row.stage.tolist(), row.microbatch.tolist(), strict=True
                )
            )
            for row in self.rows
        )


def chain(stages: int) -> Edges:
    """The edges of a model whose stages follow one another."""
    return tuple((stage, stage + 1) for stage in range(stages - 1))


def in_a_line(rows: Sequence[Row], stages: int | None = None) -> Order:
    """The order of a chain of stages without copies; as many stages as rows unless said otherwise."""
    count = len(rows) if stages is None else stages
    return Order(tuple(rows), chain(count), tuple(range(count)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What may be asked of some schedules.

    Args:
        chunks: stages on each mesh (virtual stages); None is the schedule's own number.
        atomic_pairs: run each overlapped forward–backward pair as one piece instead of one after the other.
        edges: the edges of a graph of stages; None is a chain.
    """

    chunks: int | None = None
    atomic_pairs: bool = False
    edges: Edges | None = None


NO_OPTIONS = Options()


@dataclass(frozen=True, slots=True)
class Schedule:
    """One way to order the micro-batches of a pipeline.

    ``order(meshes, microbatches, options)`` gives the rows; it raises ``ScheduleError``, saying which sizes do, where
    its rule does not hold. ``live_microbatches(stage, stages, microbatches)`` is the most activations that a stage
    holds at once, where a closed form is known. ``takes`` names the options that mean something to it; ``chunks`` is
    its own number of stages a mesh, ``replicas`` how many copies of all weights it keeps. ``runnable`` is False where
    the executor cannot follow.
    """

    name: str
    summary: str
    order: Callable[[int, int, Options], Order]
    live_microbatches: Callable[[int, int, int], int] | None = None
    takes: frozenset[str] = field(default=frozenset())
    chunks: int = 1
    replicas: int = 1
    splits_backward: bool = False
    runnable: bool = True

    def make(self, meshes: int, microbatches: int, options: Options = NO_OPTIONS) -> Order:
        """The order for these sizes, checked first.

        Raises:
            ScheduleError: a size is below 1, an option means nothing here, or the schedule's rule does not hold.
        """
        need_sizes(meshes, microbatches)
        if options.chunks is not None and options.chunks < 1:
            raise ScheduleError(f"{options.chunks} chunks were asked for; at least 1 is needed")
        for name in ("chunks", "atomic_pairs", "edges"):
            if getattr(options, name) not in (None, False) and name not in self.takes:
                own = name == "chunks" and options.chunks == self.chunks
                if not own:
                    raise ScheduleError(f"schedule {self.name} takes no {name.replace('_', ' ')}; leave it out")
        return self.order(meshes, microbatches, options)


def need_sizes(stages: int, microbatches: int) -> None:
    """Raise ``ScheduleError`` unless both sizes are at least 1."""
    for name, count in (("stages", stages), ("micro-batches", microbatches)):
        if count < 1:
            raise ScheduleError(f"a schedule of {count} {name} was asked for; at least 1 is needed")
