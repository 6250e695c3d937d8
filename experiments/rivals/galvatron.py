"""Our search of Galvatron's space under Galvatron's terms: per-layer strategies, micro-batches and pipeline depth.

The space is the whole of what its search engine enumerates: any strategy (tensor or sequence parallelism, ZeRO-2 or 3,
rematerialised or not) for each layer and for the embedding, every micro-batch count, every power of two of even stages.
A case fixes all but the layers' strategies; those are the undominated (seconds, bytes) of a chain. The cases come in
rising order of a lower bound, so most are never opened. Terms: ``experiments.rivals.galvatron_costs``.
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from experiments.rivals import galvatron_costs as costs
from experiments.rivals.galvatron_costs import Plan, Profile, Strategy
from meshwright.errors import PlanError
from meshwright.plan.frontier import FloatArray, Frontier, chain_frontier


@dataclass(frozen=True, slots=True)
class Answer:
    """The plan, Galvatron's prediction for it, a bound that no plan of the space is below, and the search time."""

    plan: Plan
    seconds: float
    bound_seconds: float
    memory_mb: tuple[int, ...]
    search_seconds: float


@dataclass(frozen=True, slots=True)
class _Case:
    """What is fixed before the layers choose: strategies at hand, and the buffer that the widest of them needs."""

    microbatches: int
    stages: tuple[int, ...]
    options: tuple[Strategy, ...]
    buffer_mb: int
    times: FloatArray  # (options, 2) seconds of a layer without and with the sum of gradients
    hops: FloatArray  # (options, options) seconds to change the split of activations between layers
    bound_seconds: float


def plan(profile: Profile, batch: int, limit_gb: int) -> Answer:
    """The plan that Galvatron predicts to be fastest.

    Raises:
        PlanError: no plan fits.
    """
    began = time.perf_counter()
    best: tuple[float, Plan] | None = None
    bound = math.inf
    for case in sorted(_cases(profile, batch), key=lambda case: case.bound_seconds):
        if best is not None and case.bound_seconds >= best[0]:
            bound = min(bound, best[0])
            break
        for found, least in _open(profile, batch, case, costs.usable_mb(limit_gb) - case.buffer_mb):
            seconds = costs.plan_seconds(profile, found)
            bound = min(bound, least)
            if best is None or seconds < best[0]:
                best = (seconds, found)
    if best is None:
        raise PlanError(
            f"no strategy of {profile.layers} layers fits in {limit_gb} GB on {profile.devices} devices at a batch of "
            f"{batch}. Use more devices or a smaller batch."
        )
    seconds, found = best
    memory = costs.plan_mb(profile, found)
    return Answer(found, seconds, min(bound, seconds), memory, time.perf_counter() - began)


def _cases(profile: Profile, batch: int) -> Iterator[_Case]:
    powers = [2**n for n in range(profile.devices.bit_length())]
    for microbatches in (b for b in range(1, batch + 1) if batch % b == 0):
        for depth in (p for p in powers if p <= microbatches):
            group = profile.devices // depth
            least = max(group // min(batch // microbatches, group), 1)  # fewest devices to split a sample among
            even = profile.layers // depth
            stages = (*(even,) * (depth - 1), profile.layers - even * (depth - 1))
            splits = [split for split in powers if least <= split <= group]
            yield _case(profile, batch, microbatches, stages, _strategies(group, splits, [False]), 0)
            for widest in splits:
                options = _strategies(group, [s for s in splits if s <= widest], [True, False])
                buffer = costs.buffer_mb(profile, batch, microbatches, depth, widest)
                yield _case(profile, batch, microbatches, stages, options, buffer)


def _strategies(group: int, splits: list[int], tensor: list[bool]) -> tuple[Strategy, ...]:
    """Every strategy of a layer on ``group`` devices; a split of one counts once."""
    found = []
    for split, by_tensor, zero3, again in itertools.product(splits, tensor, (False, True), (False, True)):
        strategy = Strategy(group // split, split if by_tensor else 1, 1 if by_tensor else split, zero3, again)
        if (strategy.data > 1 or not zero3) and strategy not in found:
            found.append(strategy)
    return tuple(found)


def _case(
    profile: Profile, batch: int, microbatches: int, stages: tuple[int, ...], options: tuple[Strategy, ...], buffer: int
) -> _Case:
    samples = [batch // microbatches // s.data for s in options]
    times = np.array([costs.layer_seconds(profile, s, n, len(stages)) for s, n in zip(options, samples, strict=True)])
    alone = [float(times[:, 0].min()) * layers for layers in stages]
    hops = np.array(
        [[_hop_seconds(profile, batch / microbatches, len(stages), a, b) for b in options] for a in options]
    )
    bound = costs.pipeline_seconds(alone, [0.0] * len(stages), microbatches)
    return _Case(microbatches, stages, options, buffer, times, hops, bound)


def _hop_seconds(profile: Profile, samples: float, depth: int, former: Strategy, latter: Strategy) -> float:
    """What Galvatron's search (not its prediction) charges where the split of activations changes."""
    if former.split == latter.split:
        return 0.0
    wide = max(former.split, latter.split)
    each = samples / (profile.devices // depth // wide) * profile.sequence_length * profile.hidden * 2
    return (wide - 1) / wide * each / profile.allreduce_mb_per_ms[f"{wide}_consec_1"] * 1e-7


def _open(profile: Profile, batch: int, case: _Case, room_mb: int) -> Iterator[tuple[Plan, float]]:
    """For each strategy of the embedding: good plans of the case, and a bound on all of them."""
    depth = len(case.stages)
    layers = [
        [
            costs.layer_mb(profile, s, batch // case.microbatches // s.data, case.microbatches, depth - n)
            for s in case.options
        ]
        for n in range(depth)
    ]
    embeddings = [s for s in case.options if not s.rematerialised]
    taken = [
        costs.embedding_mb(profile, s, batch // case.microbatches // s.data, case.microbatches, depth)
        for s in embeddings
    ]
    repeated = (case.times[:, 0] * case.microbatches, case.times[:, 0] * (case.microbatches - 1) + case.times[:, 1])
    chains: list[tuple[Frontier, Frontier]] = []
    for n, count in enumerate(case.stages):
        room = room_mb - min(mb[n] for mb in taken)
        held = np.tile(np.array(layers[n], dtype=float), (count, 1))
        try:
            alone, synced = (chain_frontier(np.tile(t, (count, 1)), held, case.hops, room) for t in repeated)
        except PlanError:
            return
        chains.append((alone, synced))
    for embedding, mb in zip(embeddings, taken, strict=True):
        rows = [[_fastest(f, room_mb - mb[n]) for f in pair] for n, pair in enumerate(chains)]
        if any(row is None for pair in rows for row in pair):
            continue
        extra = costs.embedding_seconds(profile, embedding, batch // case.microbatches // embedding.data, depth)
        least = _least(case, chains, rows, extra)
        for which in (0, 1):
            stages = [chains[n][which].picks[pair[which]] for n, pair in enumerate(rows)]
            chosen = tuple(strategy for picks in stages for strategy in _tidy([case.options[pick] for pick in picks]))
            yield Plan(batch, case.microbatches, case.stages, chosen, embedding), least


def _tidy(layers: list[Strategy]) -> Iterator[Strategy]:
    """Equal layers in a tidier order, the sequence of splits kept: nothing else depends on it."""
    for _, run in itertools.groupby(layers, key=lambda strategy: strategy.split):
        yield from sorted(run, key=lambda s: (s.rematerialised, s.zero3, s.tensor, s.sequence), reverse=True)


def _fastest(frontier: Frontier, room_mb: float) -> int | None:
    """The first row that fits: rows rise in seconds."""
    fitting = np.flatnonzero(frontier.costs[:, 1] <= room_mb)
    return int(fitting[0]) if len(fitting) else None


def _least(
    case: _Case, chains: list[tuple[Frontier, Frontier]], rows: list[list[int | None]], extra: tuple[float, ...]
) -> float:
    """No plan of the case with this embedding is predicted faster, changes of split included."""
    alone = [float(pair[0].costs[row[0], 0]) / case.microbatches for pair, row in zip(chains, rows, strict=True)]
    bound = costs.pipeline_seconds(
        [a + e for a, e in zip(alone, extra, strict=True)], [0.0] * len(alone), case.microbatches
    )
    if len(chains) > 1:
        return bound
    return max(bound, float(chains[0][1].costs[rows[0][1], 0]) + (case.microbatches - 1) * extra[0])
