"""The slow and obvious reference: a schedule replayed on a clock, one computation after another, in plain Python."""

from collections.abc import Callable
from typing import NamedTuple

from meshwright.simulate.program import Compute, word
from meshwright.simulate.schedules.base import KINDS, Order

Seconds = Callable[[str, int], float]  # kind of computation and stage → seconds
Hop = Callable[[int, int, int], float]  # source stage, target stage and micro-batch → seconds


class Replay(NamedTuple):
    """Seconds until the last end, the longest from a mesh's first start to its last end, and most live activations."""

    makespan: float
    span: float
    peaks: list[int]


def chunk_times(F: float = 1.0, I: float = 1.0, W: float = 1.0, *, chunks: int = 1) -> Seconds:  # noqa: E741
    """Seconds of a chunk where those of a whole stage are F, I and W and a whole backward takes I + W."""
    whole = {"F": F, "I": I, "W": W, "B": I + W}
    return lambda kind, stage: whole[kind] / chunks


def replay(order: Order, seconds: Seconds, hop: float | Hop = 0.0) -> Replay:
    """Run the rows in order; a computation starts when its mesh is free and all that it needs is there.

    A result is ``hop`` seconds on its way to another mesh. What is joined is one piece: it starts when all that any of
    its computations needs is there, and its results leave together at its end.
    """
    home = order.mesh_of_stage
    into: dict[int, list[int]] = {stage: [] for stage in range(order.stages)}
    out_of: dict[int, list[int]] = {stage: [] for stage in range(order.stages)}
    for source, target in order.edges:
        into[target].append(source)
        out_of[source].append(target)
    pieces = [_pieces(order, mesh) for mesh in range(len(order.rows))]
    at = [0] * len(pieces)
    free = [0.0] * len(pieces)
    begun: list[float | None] = [None] * len(pieces)
    live, peaks = [0] * len(pieces), [0] * len(pieces)
    done: dict[tuple[str, int, int], float] = {}

    def hop_seconds(source: int, target: int, m: int) -> float:
        if home[source] == home[target]:
            return 0.0
        return hop(source, target, m) if callable(hop) else hop

    def needs(kind: str, stage: int) -> list[tuple[str, int]]:
        if kind == "F":
            return [("F", source) for source in into[stage]]
        if kind == "W":
            return [("I", stage)]
        return [("F", stage), *(("I", target) for target in out_of[stage])]

    while any(at[mesh] < len(row) for mesh, row in enumerate(pieces)):
        moved = False
        for mesh, row in enumerate(pieces):
            while at[mesh] < len(row):
                piece = row[at[mesh]]
                inside = {("I" if kind == "B" else kind, stage, m) for kind, stage, m in piece}
                wanted = [((a, b, m), stage) for kind, stage, m in piece for a, b in needs(kind, stage)]
                wanted = [(key, stage) for key, stage in wanted if key not in inside]
                if not all(key in done for key, _ in wanted):
                    break
                arrivals = [done[key] + hop_seconds(key[1], stage, key[2]) for key, stage in wanted]
                start = max([free[mesh], *arrivals])
                begun[mesh] = start if begun[mesh] is None else begun[mesh]
                for kind, _, _ in piece:
                    live[mesh] += kind == "F"
                    peaks[mesh] = max(peaks[mesh], live[mesh])
                    live[mesh] -= kind in "BW"
                free[mesh] = start + sum(seconds(kind, stage) for kind, stage, _ in piece)
                for key in inside:
                    done[key] = free[mesh]
                at[mesh] += 1
                moved = True
        if not moved:
            waiting = [f"mesh {mesh} at {row[at[mesh]]}" for mesh, row in enumerate(pieces) if at[mesh] < len(row)]
            raise AssertionError("the schedule deadlocks: " + ", ".join(waiting))
    span = max(end - start for end, start in zip(free, begun, strict=True) if start is not None)
    return Replay(max(free), span, peaks)


def _pieces(order: Order, mesh: int) -> list[list[tuple[str, int, int]]]:
    row = order.rows[mesh]
    pieces: list[list[tuple[str, int, int]]] = [[]]
    for kind, stage, m, joined in zip(
        row.kind.tolist(), row.stage.tolist(), row.microbatch.tolist(), row.joined.tolist(), strict=True
    ):
        pieces[-1].append((KINDS[kind], stage, m))
        if not joined:
            pieces.append([])
    return [piece for piece in pieces if piece]


def words(row: tuple[Compute, ...]) -> str:
    """A row as text."""
    return " ".join(map(word, row))
