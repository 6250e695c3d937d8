"""Stages that begin or end inside a layer, and of which any operator may be recomputed.

Source: Liu et al., Aceso, EuroSys 2024, whose plans cut and recompute operator by operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from meshwright.errors import PlanError
from meshwright.simulate.workload.pieces import Local, Piece, layer_pieces

BEFORE = ("gather tokens", "sum cotangents", "keys and values")  # these go with the piece that follows


@dataclass(frozen=True, slots=True)
class Part:
    """What a stage holds of the layers."""

    pieces: tuple[Piece, ...]
    again: tuple[Piece, ...]  # of these the ones that the backward computes again
    layers: float  # operators over those of a layer: its share of weights
    core_share: float  # of the operators of the core of attention, those that are computed again
    rest_share: float  # and of the others


def operators(pieces: Sequence[Piece]) -> tuple[tuple[Piece, ...], ...]:
    """A layer's pieces, each that only communicates beside the one whose operand or result it moves."""
    found: list[list[Piece]] = []
    waiting: list[Piece] = []
    for piece in pieces:
        if piece.name in BEFORE:
            waiting.append(piece)
        elif piece.name in ("scatter tokens", "sum results"):
            found[-1].append(piece)
        else:
            found.append([*waiting, piece])
            waiting = []
    return tuple(tuple(group) for group in found)


def part_at(local: Local, stage: int) -> Part | None:
    """What a stage holds where the grid gives operators; ``local`` is seen from the stage's own mesh.

    Raises:
        PlanError: the operators of all stages are not those of the model's layers.
    """
    plan = local.grid.operators_per_stage
    if plan is None:
        return None
    layer = operators(layer_pieces(local))
    ends = list(accumulate(map(len, plan), initial=0))
    if ends[-1] != len(layer) * local.model.layers:
        raise PlanError(
            f"operators_per_stage names {ends[-1]} operators; {local.model.layers} layers of {len(layer)} each have "
            f"{len(layer) * local.model.layers}"
        )
    flagged = [(layer[number % len(layer)], flag) for number, flag in enumerate(plan[stage], start=ends[stage])]
    return Part(
        pieces=tuple(piece for group, _ in flagged for piece in group),
        again=tuple(piece for group, flag in flagged if flag for piece in group),
        layers=len(flagged) / len(layer),
        core_share=_share([flag for group, flag in flagged if _is_core(group)]),
        rest_share=_share([flag for group, flag in flagged if not _is_core(group)]),
    )


def border_bytes(local: Local, stage: int) -> float:
    """Bytes that a device of a stage needs of the one before: what goes round the block, its first operator's input."""
    model, grid = local.model, local.grid
    size = local.tokens * model.dtype_bytes
    hidden = float(size * model.hidden)
    if grid.operators_per_stage is None:
        return hidden
    layer = operators(layer_pieces(local))
    first = layer[sum(map(len, grid.operators_per_stage[:stage])) % len(layer)]
    piece = next(piece for piece in first if piece.name not in BEFORE)
    queries, keys = size * local.query_dim, size * local.key_dim
    between = size * local.ffn
    inputs = {
        "qkv": hidden,
        "scores": queries + 2 * keys,
        "attention": queries + 2 * keys,
        "projection": queries,
        "mlp up": hidden,
        "activation": (2 if model.gated else 1) * between,
        "mlp down": between,
        "attention residual": hidden,
        "mlp residual": hidden,
    }
    if piece.core and piece.name not in inputs:  # scores, and the values that they will weigh
        scores = grid.microbatch_size * local.heads * (model.sequence // grid.context) * model.sequence
        return hidden + scores * model.dtype_bytes + keys
    return hidden + inputs.get(piece.name, 0.0)


def _is_core(group: tuple[Piece, ...]) -> bool:
    return any(piece.core for piece in group)


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0
