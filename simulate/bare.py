"""Schedules and hand-written programs over equal stages: no model, no cluster, only times.

>>> timeline = play("1f1b", stages=4, microbatches=8, times=StageTimes(1, 1, 1))
>>> timeline.makespan_seconds, timeline.peak_bytes
(33.0, (4.0, 3.0, 2.0, 1.0))
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite

import numpy as np

from meshwright.errors import ScheduleError
from meshwright.simulate.build import weave
from meshwright.simulate.code import KIND, MICROBATCH, OTHER, SEND, STAGE, WHAT, WHATS, Code, decode, encode
from meshwright.simulate.costs import PipelineCosts, StageCosts, TransferCost
from meshwright.simulate.pipeline import simulate
from meshwright.simulate.program import Compute, Program, Receive, Send, compute_only
from meshwright.simulate.schedules.base import NO_OPTIONS, Edges, Options, Row, Times, chain, in_a_line
from meshwright.simulate.schedules.table import find_schedule
from meshwright.simulate.timeline import Timeline
from meshwright.simulate.verify import need_numbered, tail_in_order, verify

BETWEEN = ("activation", "cotangent")  # stages exchange these for each micro-batch


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of a whole stage's forward, input gradient and weight gradient; an unsplit backward is both halves."""

    forward_seconds: float = 1.0
    input_seconds: float = 1.0
    weight_seconds: float = 1.0

    def __post_init__(self) -> None:
        for name in ("forward_seconds", "input_seconds", "weight_seconds"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ScheduleError(f"{name} is {getattr(self, name)}; a finite number of at least 0 is needed")


UNIT_TIMES = StageTimes()


def play(
    schedule: str,
    stages: int,
    microbatches: int,
    times: StageTimes = UNIT_TIMES,
    hop_seconds: float = 0.0,
    options: Options = NO_OPTIONS,
) -> Timeline:
    """A schedule over ``stages`` equal devices, whose ``peak_bytes`` count live activations.

    A schedule with several chunks (virtual stages) on a device gives each its share of the device's times, and counts
    each one's activations; one with two replicas runs whole stages of both.

    Args:
        hop_seconds: what a message takes between two devices, while both go on computing.

    Raises:
        ScheduleError: the schedule is unknown, or its rule does not hold for these sizes.
    """
    code, share = bare_code(schedule, stages, microbatches, times, hop_seconds, options)
    return simulate(code, equal_costs(code, times, hop_seconds, share))


def bare_code(
    schedule: str,
    stages: int,
    microbatches: int,
    times: StageTimes = UNIT_TIMES,
    hop_seconds: float = 0.0,
    options: Options = NO_OPTIONS,
) -> tuple[Code, float]:
    """The program of a bare schedule without a tail, and each of its stages' share of a device's times.

    The times matter only to schedules that are searched for (zb-1p, zb-2p).
    """
    rule = find_schedule(schedule)
    if "times" in rule.takes and options.times is None:
        parts = (times.forward_seconds, times.input_seconds, times.weight_seconds)
        options = replace(options, times=Times.equal(stages, *parts, hop_seconds=hop_seconds))
    order = rule.make(stages, microbatches, options)
    return weave(order, order.edges, tail=False), stages * rule.replicas / order.stages


def play_program(program: Program, times: StageTimes = UNIT_TIMES, hop_seconds: float = 0.0) -> Timeline:
    """A program written by hand (``program.parse``), proved right first; each of its stages takes these times.

    Where it names no activation and no cotangent, its stages are taken for a chain and these are put in.

    Raises:
        ScheduleError: the program is no correct step; the message says where.
    """
    return simulate(*program_costs(program, times, hop_seconds))


def program_costs(
    program: Program, times: StageTimes = UNIT_TIMES, hop_seconds: float = 0.0
) -> tuple[Code, PipelineCosts]:
    """A program written by hand as the simulator wants it; ``play_program`` says how it is read and refused."""
    need_numbered(program)
    edges = None
    if not any(isinstance(step, Send | Receive) and step.what in BETWEEN for row in program for step in row):
        tail_in_order(program)
        program, edges = _chained(program)
    verify(program, edges)
    code = encode(program)
    return code, equal_costs(code, times, hop_seconds)


def _chained(program: Program) -> tuple[Program, Edges]:
    """Computations with the transfers of a chain of stages between them, what else there is after them; the edges."""
    code = encode(compute_only(program))
    if not code.count:
        return program, ()
    stages = 1 + int(code.table[:, STAGE].max())
    if missing := set(range(stages)) - set(code.table[:, STAGE].tolist()):
        raise ScheduleError(f"stage {min(missing)} is on no mesh; stages of a chain are numbered 0..{stages - 1}")
    rows = []
    for start, stop in pairwise(code.row_start.tolist()):
        kind, stage, microbatch = (code.table[start:stop, column].copy() for column in (KIND, STAGE, MICROBATCH))
        rows.append(Row(kind, stage, microbatch, np.zeros(stop - start, np.bool_)))
    woven = decode(weave(in_a_line(rows, stages), chain(stages), tail=False))
    tails = (tuple(step for step in row if not isinstance(step, Compute)) for row in program)
    return tuple(row + tail for row, tail in zip(woven, tails, strict=True)), chain(stages)


def equal_costs(code: Code, times: StageTimes, hop_seconds: float = 0.0, share: float = 1.0) -> PipelineCosts:
    """One device a mesh; every stage takes a share of the times, and a live micro-batch weighs one byte."""
    if not (isfinite(hop_seconds) and hop_seconds >= 0):
        raise ScheduleError(f"hop_seconds is {hop_seconds}; a finite number of at least 0 is needed")
    table = code.table
    home = np.zeros(1 + int(table[:, STAGE].max(initial=-1)), np.int64)
    home[table[:, STAGE]] = code.mesh
    forward, half, rest = (
        seconds * share for seconds in (times.forward_seconds, times.input_seconds, times.weight_seconds)
    )
    stages = tuple(
        StageCosts(
            devices=(mesh,),
            forward_seconds=forward,
            backward_seconds=half + rest,
            input_seconds=half,
            weight_seconds=rest,
            saved_bytes=1.0,
        )
        for mesh in home.tolist()
    )
    sends = np.unique(table[table[:, KIND] == SEND][:, [STAGE, OTHER, WHAT]], axis=0)
    hop = TransferCost(0.0, hop_seconds)
    return PipelineCosts(stages, {(source, target, WHATS[what]): hop for source, target, what in sends.tolist()})
