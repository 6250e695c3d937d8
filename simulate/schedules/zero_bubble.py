"""Zero-bubble schedules that are searched for, from what the computations take: ZB-1p and ZB-2p.

Source: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024 (arXiv:2401.10241), section 3.1: within a limit of
memory, forwards ahead, then one forward and one input-gradient in turn, weight-gradients where a stage would wait
anyway or has no memory left. What the paper leaves to its solver (how far each stage runs ahead, how long a wait must
be for a weight-gradient to be worth it) is found here by a grid and then stage by stage. ``zb-1p`` and ``zb-2p`` allow
every stage the activations of P and 2P micro-batches, of which, as in the paper, ``Times.kept_share`` counts between
the halves of a backward. Where nothing is lost by it, they are counted whole until the second half.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from meshwright.errors import ScheduleError
from meshwright.simulate.schedules.base import (
    FORWARD,
    INPUT,
    KINDS,
    WEIGHT,
    Options,
    Order,
    Schedule,
    Times,
    in_a_line,
    letters,
)

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Kinds = NDArray[np.int8]
Cost = tuple[float, float]  # seconds: the longest span, the sum of all
SLOPES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25)  # forwards ahead while a micro-batch is on later stages; ZB-H2 has 2
LEADS = (1, 2, 3)  # forwards before the first backward of the last stage
PATIENCES = (0.0, 0.5, 1.0, np.inf)  # a wait of this many weight halves is filled with one
STARTS = 4  # policies of the grid that are improved
EFFORT = 40_000_000  # computations placed while improving: about 0.2 seconds
MOST_WORK = 100_000_000  # stages² × micro-batches: about 20 seconds of search
ROUNDING = 1e-9  # relative, of seconds and activations


class Policy(NamedTuple):
    """How far each stage runs ahead, in forwards without backward, and which waits it fills."""

    ahead: Counts
    patience: Floats


def zero_bubble(times: Times, microbatches: int, live_limits: Sequence[float]) -> Order:
    """The order, of those that the policy can make, whose slowest stage has the shortest span.

    Args:
        live_limits: the most activations that each stage may hold, in micro-batches.

    Raises:
        ScheduleError: there is not one limit for each stage, one is below one micro-batch, or the search would take
            minutes.
    """
    stages = len(times.forward_seconds)
    if len(live_limits) != stages or min(live_limits) < 1:
        raise ScheduleError(
            f"limits of {', '.join(map(str, live_limits))} live micro-batches are given for {stages} stages; "
            "one of at least 1 is needed for each"
        )
    if stages**2 * microbatches > MOST_WORK:
        raise ScheduleError(
            f"a search over {stages} stages and {microbatches} micro-batches takes minutes; use zb-h1 or zb-h2, whose "
            "order is known"
        )
    whole, whole_cost = _search(replace(times, kept_share=1.0), microbatches, live_limits)
    kinds, cost = _search(times, microbatches, live_limits) if times.kept_share < 1 else (whole, whole_cost)
    if whole_cost[0] <= cost[0] * (1 + ROUNDING):
        kinds = whole
    alphabet = np.frombuffer(KINDS.encode(), np.uint8)
    return in_a_line([letters(alphabet[row].tobytes().decode(), stage) for stage, row in enumerate(kinds)])


def _search(times: Times, microbatches: int, live_limits: Sequence[float]) -> tuple[Kinds, Cost]:
    """The best rows found, and their cost."""
    limits = np.array(live_limits, float)
    stages = len(limits)
    most = np.minimum(np.floor(limits).astype(np.int64), microbatches)
    arguments = (
        np.array(times.forward_seconds, float),
        np.array(times.input_seconds, float),
        np.array(times.weight_seconds, float),
        float(times.hop_seconds),
        float(times.kept_share),
        microbatches,
        limits,
    )
    starts: list[tuple[Cost, int, Policy]] = []
    for ahead in _aheads(times, most):
        ranked = [
            (_run(*arguments, ahead, np.full(stages, patience))[1], serial) for serial, patience in enumerate(PATIENCES)
        ]
        cost, serial = min(ranked)
        starts.append((cost, len(starts), Policy(ahead, np.full(stages, PATIENCES[serial]))))
    improved: list[tuple[Cost, int, Policy]] = []
    tries = EFFORT // (STARTS * 3 * stages * microbatches)
    for *_, start in sorted(starts, key=itemgetter(0, 1))[:STARTS]:
        policy = Policy(*_improved(*arguments, most, *start, np.array(PATIENCES), tries))
        improved.append((_run(*arguments, *policy)[1], len(improved), policy))
    *_, policy = min(improved, key=itemgetter(0, 1))
    return _run(*arguments, *policy)


def _aheads(times: Times, most: Counts) -> list[Counts]:
    """How far stages may run ahead: in proportion to what a micro-batch takes on all later stages, there and back.

    No stage runs further ahead than the one before it, which would have to send it more forwards than it makes.
    """
    own = np.array(times.forward_seconds) + np.array(times.input_seconds)
    later = np.cumsum(own[::-1])[::-1] - own
    hops = 2 * times.hop_seconds * np.arange(len(own))[::-1]
    aheads = []
    for there_and_back in (later, later + hops) if times.hop_seconds else (later,):
        forwards = np.divide(there_and_back, own, out=np.zeros_like(own), where=own > 0)
        for slope in SLOPES:
            for lead in LEADS:
                ahead = np.minimum(most, np.floor(slope * forwards + lead + ROUNDING).astype(np.int64))
                aheads.append(np.minimum.accumulate(ahead))
    return aheads


@njit(cache=True)
def _run(
    forward: Floats,
    input_: Floats,
    weight: Floats,
    hop: float,
    kept: float,
    microbatches: int,
    limits: Floats,
    ahead: Counts,
    patience: Floats,
) -> tuple[Kinds, Cost]:
    """The kinds of computation of each stage in order, and the cost."""
    stages = len(forward)
    clock, begin = np.zeros(stages), np.full(stages, -1.0)
    forwards, inputs, weights = np.zeros(stages, np.int64), np.zeros(stages, np.int64), np.zeros(stages, np.int64)
    forward_end, input_end = np.empty((stages, microbatches)), np.empty((stages, microbatches))
    kinds = np.empty((stages, 3 * microbatches), np.int8)
    placed = 0
    while placed < kinds.size:
        before = placed
        for s in range(stages):
            while inputs[s] < microbatches:
                is_forward = forwards[s] < microbatches and forwards[s] - inputs[s] < ahead[s]
                if is_forward:
                    if s > 0 and forwards[s - 1] == forwards[s]:
                        break
                    ready = forward_end[s - 1, forwards[s]] + hop if s > 0 else 0.0
                else:
                    if s < stages - 1 and inputs[s + 1] == inputs[s]:
                        break
                    ready = input_end[s + 1, inputs[s]] + hop if s < stages - 1 else forward_end[s, inputs[s]]
                while inputs[s] > weights[s]:
                    held = forwards[s] - inputs[s] + kept * (inputs[s] - weights[s])
                    full = is_forward and held + 1 > limits[s] + ROUNDING
                    wait = ready - clock[s]
                    if not full and (wait <= 0 or wait < patience[s] * weight[s]):
                        break
                    kinds[s, forwards[s] + inputs[s] + weights[s]] = WEIGHT
                    clock[s] += weight[s]
                    weights[s] += 1
                    placed += 1
                start = max(clock[s], ready)
                if begin[s] < 0:
                    begin[s] = start
                at = forwards[s] + inputs[s] + weights[s]
                if is_forward:
                    kinds[s, at] = FORWARD
                    clock[s] = start + forward[s]
                    forward_end[s, forwards[s]] = clock[s]
                    forwards[s] += 1
                else:
                    kinds[s, at] = INPUT
                    clock[s] = start + input_[s]
                    input_end[s, inputs[s]] = clock[s]
                    inputs[s] += 1
                placed += 1
            if inputs[s] == microbatches and weights[s] < microbatches:
                left = microbatches - weights[s]
                kinds[s, 3 * microbatches - left :] = WEIGHT
                clock[s] += left * weight[s]
                weights[s] = microbatches
                placed += left
        if placed == before:  # a stage runs further ahead than the one before it
            return kinds, (np.inf, np.inf)
    spans = clock - begin
    return kinds, (spans.max(), spans.sum())


@njit(cache=True)
def _improved(
    forward: Floats,
    input_: Floats,
    weight: Floats,
    hop: float,
    kept: float,
    microbatches: int,
    limits: Floats,
    most: Counts,
    ahead: Counts,
    patience: Floats,
    patiences: Floats,
    tries: int,
) -> tuple[Counts, Floats]:
    """The policy after changing it stage by stage wherever that shortens the longest span, or at equal one their sum.

    A stage's way of filling waits is changed alone; how far it runs ahead alone or together with all earlier stages.
    """
    stages = len(forward)
    ahead, patience = ahead.copy(), patience.copy()
    least = _run(forward, input_, weight, hop, kept, microbatches, limits, ahead, patience)[1]
    moves = 4 + len(patiences)  # of a stage: all stages up to it, or it alone, one less or more ahead; or its patience
    tried, unchanged = 0, 0
    while tried < tries and unchanged < stages * moves:
        s, move = tried // moves % stages, tried % moves
        changed, patient = ahead.copy(), patience.copy()
        if move < 4:
            first, step = (0 if move < 2 else s), (-1 if move % 2 == 0 else 1)
            for t in range(first, s + 1):
                changed[t] = min(max(changed[t] + step, 1), most[t])
        else:
            patient[s] = patiences[move - 4]
        cost = _run(forward, input_, weight, hop, kept, microbatches, limits, changed, patient)[1]
        tried += 1
        unchanged += 1
        if cost < least:
            least, ahead, patience, unchanged = cost, changed, patient, 0
    return ahead, patience


def _limited(meshes: int, microbatches: int, options: Options, *, per_mesh: int) -> Order:
    """The best order that holds ``per_mesh`` micro-batches a mesh on each, for the times of the options."""
    times = Times.equal(meshes) if options.times is None else options.times
    if len(times.forward_seconds) != meshes:
        raise ScheduleError(
            f"times of {len(times.forward_seconds)} stages are given for {meshes} meshes; one of each is needed"
        )
    saved = times.saved_bytes or (1.0,) * meshes
    if len(saved) != meshes or min(saved) <= 0:
        raise ScheduleError(f"saved_bytes are {saved}; a number above 0 is needed for each of {meshes} stages")
    usual = float(np.median(saved))
    limits = [max(1.0, per_mesh * meshes * min(1.0, usual / held)) for held in saved]
    return zero_bubble(times, microbatches, limits)


ZB_1P = Schedule(
    "zb-1p",
    "split backwards, searched for these times within 1F1B's memory",
    partial(_limited, per_mesh=1),
    takes=frozenset({"times"}),
    splits_backward=True,
)
ZB_2P = replace(
    ZB_1P,
    name="zb-2p",
    summary="split backwards, searched for these times within twice 1F1B's memory",
    order=partial(_limited, per_mesh=2),
)
