"""What every schedule is: a rule that orders each mesh's computations, as arrays, and the memory it needs.

A schedule writes each row as letters (F forward, B whole backward, I and W its input- and weight-gradient halves), in
which forwards and backwards count their micro-batches: ``letters("FFBFBB", stage=0)`` is 1F1B's
``0F0 0F1 0B0 0F2 0B1 0B2``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from meshwright.errors import ScheduleError
from meshwright.simulate.limits import need_room
from meshwright.simulate.program import COMPUTES, Compute

Ints = NDArray[np.int32]
KINDS = "FBIW"  # a computation's code is its place in this word
FORWARD, WHOLE, INPUT, WEIGHT = range(len(KINDS))
CODE_OF_BYTE = np.array([KINDS.find(chr(byte)) for byte in range(256)], np.int32)
Edges = tuple[tuple[int, int], ...]
# 32h / (34h + 5as), Qi et al., ICLR 2024, table 1 (hidden size h, heads a = h / 128, sequence s = 1024)
KEPT_SHARE = 32 / (34 + 5 * 1024 / 128)


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

    Without ``microbatch`` each stage counts from 0 up: its forwards, and its backwards, whole (B) and halves (I)
    together. The k-th W of a stage is the other half of its k-th I.

    Raises:
        ScheduleError: a letter is none of F, B, I and W, or a W has no I before it.
    """
    kind = CODE_OF_BYTE[np.frombuffer(text.encode(), np.uint8)]
    if (kind < 0).any():
        raise ScheduleError(f"{text!r} is no row of a schedule; its letters are F, B, I and W")
    stages = np.ascontiguousarray(np.broadcast_to(np.asarray(stage, np.int32), kind.shape))
    if microbatch is None:
        numbers = _counted(kind, stages)
        if (numbers < 0).any():
            raise ScheduleError(f"{text!r} has a W before its I; the weight-gradient is the second half of a backward")
    else:
        numbers = np.ascontiguousarray(np.broadcast_to(np.asarray(microbatch, np.int32), kind.shape))
    return Row(kind, stages, numbers, np.ascontiguousarray(np.broadcast_to(np.asarray(joined, bool), kind.shape)))


def two_stages(text: str, upper: int, lower: int, microbatches: int) -> Row:
    """The row of a mesh that holds two stages, one written in upper and one in lower case, cut to what there is.

    A rule that holds from some number of micro-batches on is written for that many and cut to ``microbatches``.
    """
    stage = np.where(np.frombuffer(text.encode(), np.uint8) >= ord("a"), lower, upper)
    return first_microbatches(letters(text.upper(), stage), microbatches)


def first_microbatches(row: Row, microbatches: int) -> Row:
    """The computations of the first micro-batches alone."""
    kept = row.microbatch < microbatches
    return row if kept.all() else Row(row.kind[kept], row.stage[kept], row.microbatch[kept], row.joined[kept])


@njit(cache=True)
def _counted(kind: Ints, stage: Ints) -> Ints:
    """The micro-batch of each computation, as ``letters`` counts them."""
    stages = stage.max() + 1 if len(stage) else 0
    forwards, backwards = np.zeros(stages, np.int32), np.zeros(stages, np.int32)
    numbers = np.empty(len(kind), np.int32)
    next_half = np.zeros(stages, np.int64)  # where to look for the next I of this stage that has no W yet
    for i in range(len(kind)):
        s = stage[i]
        if kind[i] == FORWARD:
            numbers[i] = forwards[s]
            forwards[s] += 1
        elif kind[i] == WEIGHT:
            j = next_half[s]
            while j < i and not (kind[j] == INPUT and stage[j] == s):
                j += 1
            numbers[i] = numbers[j] if j < i else -1
            next_half[s] = j + 1
        else:
            numbers[i] = backwards[s]
            backwards[s] += 1
    return numbers


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


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each stage's forward and of the two halves of its backward, and of a hop from mesh to mesh.

    ``kept_share`` of what a stage saves for a micro-batch stays there from the first half of its backward to the end of
    the second; the default is that of a Transformer layer without fused attention, heads of 128 and sequences of 1024.
    ``saved_bytes`` of each stage, where given, are what it saves for a micro-batch: a limit of so many micro-batches is
    meant for the median stage, and one that saves more (a head's logits) may hold fewer.
    """

    forward_seconds: tuple[float, ...]
    input_seconds: tuple[float, ...]
    weight_seconds: tuple[float, ...]
    hop_seconds: float = 0.0
    kept_share: float = KEPT_SHARE
    saved_bytes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        of_stages = (self.forward_seconds, self.input_seconds, self.weight_seconds)
        if len({len(seconds) for seconds in of_stages}) > 1:
            raise ScheduleError(
                f"times of {', '.join(str(len(seconds)) for seconds in of_stages)} stages are given for forward, input "
                "and weight; as many are needed of each"
            )
        for seconds in (*self.forward_seconds, *self.input_seconds, *self.weight_seconds, self.hop_seconds):
            if not (isfinite(seconds) and seconds >= 0):
                raise ScheduleError(f"a time of {seconds} seconds is given; a finite one of at least 0 is needed")
        if not 0 <= self.kept_share <= 1:
            raise ScheduleError(f"a kept_share of {self.kept_share} is given; it is a share, from 0 to 1")

    @classmethod
    def equal(
        cls,
        stages: int,
        forward_seconds: float = 1.0,
        input_seconds: float = 1.0,
        weight_seconds: float = 1.0,
        hop_seconds: float = 0.0,
        kept_share: float = KEPT_SHARE,
    ) -> "Times":
        """The same seconds for every stage."""
        return cls(
            (forward_seconds,) * stages,
            (input_seconds,) * stages,
            (weight_seconds,) * stages,
            hop_seconds,
            kept_share,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What may be asked of some schedules.

    Args:
        chunks: stages on each mesh (virtual stages); None is the schedule's own number.
        atomic_pairs: run each overlapped forward–backward pair as one piece instead of one after the other.
        edges: the edges of a graph of stages; None is a chain.
        times: what the computations take, for schedules that are searched for; None is one second each, hops free.
    """

    chunks: int | None = None
    atomic_pairs: bool = False
    edges: Edges | None = None
    times: Times | None = None


NO_OPTIONS = Options()
INSTRUCTIONS_A_CELL = 6  # of one stage and micro-batch: forward, backward, and both halves of two transfers


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
        chunks = self.chunks if options.chunks is None else options.chunks
        if chunks < 1:
            raise ScheduleError(f"{chunks} chunks were asked for; at least 1 is needed")
        need_sizes(meshes, microbatches, chunks)
        for name in ("chunks", "atomic_pairs", "edges", "times"):
            if getattr(options, name) not in (None, False) and name not in self.takes:
                own = name == "chunks" and options.chunks == self.chunks
                if not own:
                    raise ScheduleError(f"schedule {self.name} takes no {name.replace('_', ' ')}; leave it out")
        return self.order(meshes, microbatches, options)


def need_sizes(stages: int, microbatches: int, chunks: int = 1) -> None:
    """Raise ``ScheduleError`` unless both sizes are at least 1 and their instructions fit into memory."""
    for name, count in (("stages", stages), ("micro-batches", microbatches)):
        if count < 1:
            raise ScheduleError(f"a schedule of {count} {name} was asked for; at least 1 is needed")
    need_room(INSTRUCTIONS_A_CELL * stages * chunks * microbatches, "instructions")
