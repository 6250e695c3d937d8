"""The least bottleneck of unequally replicated stages against every pipeline."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.plan.replicated import Piece, ReplicatedStage, least_bottleneck


def _pipelines(pieces: list[Piece], cut: int, devices: int, counts: list[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Every pipeline from a cut to the end: (piece, way, replicas) of each stage, first to last."""
    if cut == 0:
        yield []
    for n, piece in enumerate(pieces):
        if piece.upper == cut:
            for replicas in counts:
                if replicas * piece.width <= devices:
                    for rest in _pipelines(pieces, piece.lower, devices - replicas * piece.width, counts):
                        for way in range(len(piece.costs)):
                            yield [(n, way, replicas), *rest]


def _seconds(pieces: list[Piece], pipeline: list[tuple[int, int, int]], memory: float, most: int) -> float:
    """Its bottleneck, +inf where it does not fit."""
    worst, after = 0.0, 0
    for n, way, replicas in reversed(pipeline):
        work, sync, live, fixed = pieces[n].costs[way]
        after += replicas
        if fixed + np.ceil(after / replicas) * live > memory or after > most:
            return np.inf
        worst = max(worst, work / replicas + sync * ((replicas - 1) / replicas))
    return float(worst)


def _problem(seed: int) -> tuple[list[Piece], int, list[int], float, int]:
    rng = np.random.default_rng(seed)
    layers, devices = int(rng.integers(1, 4)), int(rng.integers(1, 7))
    counts = [d for d in (1, 2, 3, 4, 6) if d <= devices]
    pieces = [
        Piece(low, high, width, rng.integers(1, 9, (int(rng.integers(1, 3)), 4)).astype(float) * (high - low))
        for low in range(layers)
        for high in range(low + 1, layers + 1)
        for width in (1, 2)
        if rng.random() < 0.9
    ]
    whole = Piece(0, layers, 1, np.array([[9.0 * layers, 1.0, 1.0, 1.0]]))
    return [*pieces, whole], devices, counts, float(rng.integers(8, 40)), int(rng.integers(2, 9))


@given(st.integers(0, 100_000))
@settings(max_examples=150, deadline=None)
def test_no_pipeline_beats_the_answer(seed: int) -> None:
    pieces, devices, counts, memory, most = _problem(seed)
    top = max(piece.upper for piece in pieces)
    best = min(_seconds(pieces, pipeline, memory, most) for pipeline in _pipelines(pieces, top, devices, counts))
    stages = least_bottleneck(pieces, devices, counts, memory, most)
    answer = [(stage.piece, stage.way, stage.replicas) for stage in stages]
    assert sum(pieces[n].width * replicas for n, _, replicas in answer) <= devices
    assert [pieces[n].upper for n, _, _ in answer] == [top, *(pieces[n].lower for n, _, _ in answer[:-1])]
    assert pieces[answer[-1][0]].lower == 0
    assert max(stage.seconds for stage in stages) == pytest.approx(best, rel=1e-12)
    assert _seconds(pieces, answer, memory, most) == pytest.approx(best, rel=1e-12)


def test_replicas_go_where_the_work_is() -> None:
    """A layer of 6 s and one of 2 s on four devices: three and one, 2 s a sample each."""
    pieces = [Piece(1, 2, 1, np.array([[6.0, 0, 1, 1]])), Piece(0, 1, 1, np.array([[2.0, 0, 1, 1]]))]
    stages = least_bottleneck(pieces, 4, [1, 2, 3, 4], memory_bytes=10, most_replicas=8)
    assert stages == (ReplicatedStage(0, 0, 3, 2.0), ReplicatedStage(1, 0, 1, 2.0))


def test_a_first_stage_of_few_replicas_holds_the_micro_batches_of_those_after_it() -> None:
    """One replica before three holds ceil(4 / 1) = 4 micro-batches: with room for 3, it is rematerialised."""
    pieces = [
        Piece(1, 2, 1, np.array([[1.0, 0, 1.0, 0], [1.5, 0, 0.5, 0]])),
        Piece(0, 1, 1, np.array([[3.0, 0, 1.0, 0]])),
    ]
    roomy = least_bottleneck(pieces, 4, [1, 3], memory_bytes=4, most_replicas=8)
    tight = least_bottleneck(pieces, 4, [1, 3], memory_bytes=3, most_replicas=8)
    assert [stage.way for stage in roomy] == [0, 0]
    assert [stage.way for stage in tight] == [1, 0]


def test_what_cannot_fit_is_refused_with_the_limits() -> None:
    with pytest.raises(PlanError, match=r"no pipeline on 2 devices fits in 1\.00 GB .* at most 4 micro-batches"):
        least_bottleneck([Piece(0, 1, 1, np.array([[1.0, 0, 0, 2e9]]))], 2, [1, 2], 1e9, 4)
