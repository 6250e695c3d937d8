"""A run held against its prediction: which instructions and transfers differ, and what that does to the step.

Alike instructions form a *group*: one kind on one stage, or one payload from one stage to another. What a group did is
told as the logarithm of measured over predicted seconds, by medians: inside a step first, since its instructions share
what slowed that step, then over steps. What a group costs the step is asked of the simulator, by simulating the plan
with that group alone as it was measured; so a slow link that computation hides costs nothing.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from statistics import median

import numpy as np
from scipy.stats import t as student

from meshwright.errors import ClusterError
from meshwright.execute.record import Run
from meshwright.plan.predict import costs_of, program_of
from meshwright.simulate.costs import PipelineCosts, TransferCost
from meshwright.simulate.pipeline import simulate
from meshwright.simulate.program import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Gather,
    Instruction,
    Program,
    Receive,
    Reduce,
    Send,
    Update,
)
from meshwright.simulate.timeline import CAUSES, Timeline

NORMAL_MAD = 1.4826  # standard deviation over median absolute deviation of a normal distribution
MEDIAN_LOSS = 1.2533  # standard error of a median over that of a mean: the square root of pi / 2
ONE_SIGMA = 0.8413447460685429  # of a normal distribution is below its mean plus one standard deviation
LEAST_LOG_ERROR = 0.005  # clocks and a few steps tell no more
FEW_STEPS = 3  # with fewer, the spread inside steps has to do
CONVERGED, MOST_ROUNDS = 1e-3, 8  # of the costs whose timeline looks as measured
FIELDS: dict[type[Instruction], str] = {
    Forward: "forward_seconds",
    Backward: "backward_seconds",
    BackwardInput: "input_seconds",
    BackwardWeight: "weight_seconds",
    Reduce: "reduce_seconds",
    Update: "update_seconds",
    Gather: "gather_seconds",
}
COST_FIELDS = {CAUSES[kind]: field for kind, field in FIELDS.items()}


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """Alike instructions: ``what`` a stage computes, or what it sends to ``target``."""

    stage: int
    what: str
    target: int = -1

    @property
    def is_transfer(self) -> bool:
        """Whether this is a payload on its way, and not work of a stage."""
        return self.target >= 0

    def __str__(self) -> str:
        return f"{self.what} {self.stage} → {self.target}" if self.is_transfer else f"{self.what} of stage {self.stage}"


@dataclass(frozen=True, slots=True)
class Observation:
    """One group, predicted and measured.

    ``predicted_seconds`` and ``measured_seconds`` are medians of one instruction, ``low_seconds`` and ``high_seconds``
    the 10 % and 90 % quantiles. ``log_ratio`` is None where nothing was predicted to multiply. ``cost_seconds`` is what
    the plan says one instruction costs, ``found_seconds`` what it must cost for the simulated timeline to look as
    measured (cores that are shared stretch both). ``contribution_seconds`` is what this alone adds to the step.
    """

    group: Group
    count: int
    samples: int
    predicted_seconds: float
    measured_seconds: float
    low_seconds: float
    high_seconds: float
    log_ratio: float | None
    log_error: float
    cost_seconds: float
    found_seconds: float
    contribution_seconds: float


@dataclass(frozen=True, slots=True)
class Drift:
    """What differs between a run and its prediction; observations by contribution, the largest first.

    ``explained_step_seconds`` is the simulated step with all groups as measured: what is left to the measured step is
    in no instruction. ``unseen`` are groups of which no instruction could be timed: nobody waited for what they sent.
    """

    observations: tuple[Observation, ...]
    unseen: tuple[Group, ...]
    predicted_step_seconds: float
    explained_step_seconds: float
    step_seconds: float
    step_low_seconds: float
    step_high_seconds: float
    steps: int


def group_of(step: Instruction) -> Group | None:
    """The group of an instruction; waits belong to none, they follow from all others."""
    match step:
        case Receive():
            return None
        case Send(stage, target, what, _):
            return Group(stage, what, target)
        case _:
            return Group(step.stage, CAUSES[type(step)])


def spans(timeline: Timeline) -> dict[Instruction, float]:
    """Seconds of each instruction of a predicted timeline; those of a transfer end when its bytes are there."""
    return {e.instruction: e.end_seconds - e.start_seconds for e in timeline.events if group_of(e.instruction)}


def measured_spans(timeline: Timeline) -> Iterator[tuple[Instruction, float]]:
    """Seconds of each instruction that a measured timeline tells.

    A transfer is timed from the beginning of its send to the end of the wait for it, and only where somebody waited
    already: who comes later cannot tell when the bytes came.
    """
    waits = {event.instruction: event for event in timeline.events if isinstance(event.instruction, Receive)}
    for event in timeline.events:
        step = event.instruction
        if isinstance(step, Send):
            wait = waits.get(Receive(step.target, step.stage, step.what, step.microbatch))
            if wait is not None and wait.start_seconds <= event.start_seconds < wait.end_seconds:
                yield step, wait.end_seconds - event.start_seconds
        elif group_of(step) is not None:
            yield step, event.end_seconds - event.start_seconds


Samples = dict[Group, list[list[tuple[Instruction, float]]]]  # per step, the instructions that were timed


def collect(timelines: Sequence[Timeline]) -> Samples:
    """The measured seconds by group and step."""
    found: Samples = defaultdict(list)
    for timeline in timelines:
        step: dict[Group, list[tuple[Instruction, float]]] = defaultdict(list)
        for instruction, seconds in measured_spans(timeline):
            group = group_of(instruction)
            if group is not None and seconds > 0:
                step[group].append((instruction, seconds))
        for group, samples in step.items():
            found[group].append(samples)
    return dict(found)


def log_ratio(steps: Sequence[Sequence[tuple[Instruction, float]]], predicted: Mapping[Instruction, float]) -> float:
    """Logarithm of measured over predicted seconds: the median over steps of the median of each."""
    return median(_by_step(steps, predicted))


def log_error(steps: Sequence[Sequence[tuple[Instruction, float]]], predicted: Mapping[Instruction, float]) -> float:
    """Standard error of ``log_ratio``, by the median absolute deviation over steps.

    Of few steps it is larger by what Student's distribution says: three know little of their own spread.
    """
    few = float(student.ppf(ONE_SIGMA, max(len(steps) - 1, 1)))
    ratios = _by_step(steps, predicted)
    if len(ratios) < FEW_STEPS:
        ratios = [log(seconds / predicted[one]) for samples in steps for one, seconds in samples]
    deviation = NORMAL_MAD * median(abs(ratio - median(ratios)) for ratio in ratios)
    return max(LEAST_LOG_ERROR, few * MEDIAN_LOSS * deviation / sqrt(len(ratios)))


def _by_step(
    steps: Sequence[Sequence[tuple[Instruction, float]]], predicted: Mapping[Instruction, float]
) -> list[float]:
    return [median(log(seconds / predicted[one]) for one, seconds in samples) for samples in steps]


def cost_of(costs: PipelineCosts, group: Group) -> float:
    """What one instruction of a group costs, alone; of a transfer, with its latency."""
    if group.is_transfer:
        cost = TransferCost(*costs.transfers[group.stage, group.target, group.what])  # type: ignore[index]
        return float(cost.wire_seconds + cost.latency_seconds)
    seconds = getattr(costs.stages[group.stage], COST_FIELDS[group.what])
    return 0.0 if seconds is None else float(seconds)


def with_costs(costs: PipelineCosts, seconds: Mapping[Group, float]) -> PipelineCosts:
    """The costs with other seconds for some groups; a transfer keeps the shares of its wire and of its latency."""
    stages, transfers = list(costs.stages), dict(costs.transfers)
    for group, found in seconds.items():
        if group.is_transfer:
            key = (group.stage, group.target, group.what)
            cost = TransferCost(*transfers[key])  # type: ignore[index]
            before = cost.wire_seconds + cost.latency_seconds
            factor = found / before if before else 1.0
            latency_seconds = cost.latency_seconds * factor if before else found
            transfers[key] = cost._replace(  # type: ignore[index]
                wire_seconds=cost.wire_seconds * factor, latency_seconds=latency_seconds
            )
        else:
            stages[group.stage] = replace(stages[group.stage], **{COST_FIELDS[group.what]: found})  # type: ignore[arg-type]
    links = list(costs.link_bytes_per_second)
    for cost in (TransferCost(*cost) for cost in transfers.values()):
        for link, weight in zip(cost.links, cost.weights, strict=True):
            if cost.bytes:  # a link carries at least what was measured on it
                links[link] = max(links[link], weight * cost.bytes / cost.wire_seconds)
    return replace(costs, stages=tuple(stages), transfers=transfers, link_bytes_per_second=tuple(links))


def find_drift(run: Run) -> Drift:
    """What differs between a run and the prediction of its plan.

    Raises:
        ClusterError: the run was on another machine than its plan is for.
        ExecutionError: it measured instructions that the plan does not have, or none at all.
    """
    refuse_strangers(run)
    plan = run.plan
    program = program_of(plan.schedule, plan.microbatches, len(plan.stages), plan.transfers, plan.tied)
    costs = costs_of(plan.hardware, plan.stages, plan.transfers)
    samples = collect(run.timelines)
    predicted = simulate(program, costs)
    expected = spans(predicted)
    refuse_other_program(samples, expected)
    found = matching_costs(program, costs, samples)
    before = predicted.makespan_seconds
    observations = []
    for group, steps in samples.items():
        seconds = [each for step in steps for _, each in step]
        low, middle, high = np.quantile(seconds, (0.1, 0.5, 0.9)).tolist()
        known = all(expected[one] > 0 for step in steps for one, _ in step)
        alone = simulate(program, with_costs(costs, {group: found[group]})).makespan_seconds
        observations.append(
            Observation(
                group=group,
                count=sum(group_of(one) == group for one in expected),
                samples=len(seconds),
                predicted_seconds=median(expected[one] for step in steps for one, _ in step),
                measured_seconds=middle,
                low_seconds=low,
                high_seconds=high,
                log_ratio=log_ratio(steps, expected) if known else None,
                log_error=log_error(steps, expected) if known else 0.0,
                cost_seconds=cost_of(costs, group),
                found_seconds=found[group],
                contribution_seconds=alone - before,
            )
        )
    low, middle, high = np.quantile(run.summary.step_seconds, (0.1, 0.5, 0.9)).tolist()
    return Drift(
        observations=tuple(sorted(observations, key=lambda o: (-abs(o.contribution_seconds), o.group))),
        unseen=tuple(sorted({g for one in expected if (g := group_of(one)) is not None and g not in samples})),
        predicted_step_seconds=before,
        explained_step_seconds=simulate(program, with_costs(costs, found)).makespan_seconds,
        step_seconds=middle,
        step_low_seconds=low,
        step_high_seconds=high,
        steps=len(run.summary.step_seconds),
    )


def matching_costs(program: Program, costs: PipelineCosts, samples: Samples) -> dict[Group, float]:
    """Costs with which the simulated timeline looks as measured.

    What shares cores or links takes longer than it costs, by as much as others are busy meanwhile; so the costs are
    corrected by what the timeline shows until it shows what was measured.
    """
    found: dict[Group, float] = {}
    for _ in range(MOST_ROUNDS):
        now = spans(simulate(program, with_costs(costs, found)))
        moved = 0.0
        for group, steps in samples.items():
            if all(now[one] > 0 for step in steps for one, _ in step):
                ratio = log_ratio(steps, now)
                found[group] = found.get(group, cost_of(costs, group)) * exp(ratio)
                moved = max(moved, abs(ratio))
            else:
                found[group] = median(seconds for step in steps for _, seconds in step)
                moved = 1.0
        if moved < CONVERGED:
            break
    return found


def refuse_other_program(samples: Samples, expected: Mapping[Instruction, float]) -> None:
    """Raise ``ClusterError`` unless the run measured instructions of this plan."""
    strange = [
        str(group) for group, steps in samples.items() if any(one not in expected for s in steps for one, _ in s)
    ]
    if strange:
        raise ClusterError(f"the run measured {strange[0]}, which its plan does not have; run the plan again")
    if not samples:
        raise ClusterError("the run has no measured step; run the plan again with `meshwright execute PLAN -o RUN`")


def refuse_strangers(run: Run) -> None:
    """Raise ``ClusterError`` for a run on another machine than its plan is for: its times would spoil that file."""
    plan, cluster, rows = run.plan, run.plan.hardware, run.summary.devices
    wanted = sorted(device for stage in plan.stages for device in stage.devices)
    found = sorted(row.device for row in rows)
    if found != wanted:
        raise ClusterError(f"the plan uses devices {wanted} and the run had {found}; run the plan as it is")
    for row in rows:
        shares = cluster.hosts[cluster.host_of(row.device)].share_cores
        if shares != (row.platform == "cpu"):
            name = cluster.device(row.device).name
            raise ClusterError(
                f"the plan is for {cluster.name!r} ({name}), but device {row.device} of the run was a {row.platform} "
                f"({row.kind}); correct a machine only by a run on it, or calibrate that one"
            )
    if not run.summary.step_seconds or min(run.summary.step_seconds) <= 0:
        raise ClusterError("the run has no step that took any time; run the plan again with more --steps")
    hosts = {cluster.host_of(row.device) for row in rows}
    names = {row.host for row in rows}
    if len(hosts) != len(names):
        raise ClusterError(
            f"the plan spreads its devices over {len(hosts)} hosts and the run was on {len(names)} "
            f"({', '.join(sorted(names))}); run it on as many hosts as it is planned for"
        )
