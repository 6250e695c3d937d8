"""From a schedule to a whole program: transfers between the computations, and the tail that ends the iteration."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from meshwright.errors import ScheduleError
from meshwright.simulate.program import ONCE, Backward, Forward, Instruction, Program, Receive, Reduce, Send, Update
from meshwright.simulate.schedules.table import find_schedule

Edges = Sequence[tuple[int, int]]


def build_program(
    schedule: str, stages: int, microbatches: int, edges: Edges | None = None, tied: Edges = ()
) -> Program:
    """The instructions of every mesh for one training step.

    A ``Send`` stands right after the computation that makes its payload, a ``Receive`` right before the one that
    needs it; nothing is sent between stages of one mesh. The tail of each mesh reduces, adds the gradients of tied
    weights where they are owned, updates, and returns the new parameter to its users; sends precede receives in each
    of these phases, so no pattern of ties can deadlock.

    Args:
        schedule: a name in ``SCHEDULES``.
        edges: all (source, target) pairs of stages between which activations flow, cotangents flowing back; None is
            the chain 0 → 1 → 2 ...; a skip connection is one more pair.
        tied: (owner, user) pairs of stages that share a weight.

    Raises:
        ScheduleError: the schedule is unknown, a size is below 1, or an edge does not run from an earlier stage to a
            later one.
    """
    rows = find_schedule(schedule).rows(stages, microbatches)
    chain = [(stage, stage + 1) for stage in range(stages - 1)]
    mesh_of = {step.stage: r for r, row in enumerate(rows) for step in row}
    targets = _neighbours(chain if edges is None else edges, mesh_of)
    sources = _reverse(targets)
    users = _ties(tied, mesh_of)
    owners = _reverse(users)

    def steps(row: Sequence[Forward | Backward]) -> Iterator[Instruction]:
        for step in row:
            stage, m = step.stage, step.microbatch
            match step:
                case Forward():
                    yield from (Receive(stage, source, "activation", m) for source in sources[stage])
                    yield step
                    yield from (Send(stage, target, "activation", m) for target in targets[stage])
                case Backward():
                    yield from (Receive(stage, target, "cotangent", m) for target in targets[stage])
                    yield step
                    yield from (Send(stage, source, "cotangent", m) for source in sources[stage])
        held = sorted({step.stage for step in row})
        yield from (Reduce(stage) for stage in held)
        yield from (Send(stage, owner, "gradient", ONCE) for stage in held for owner in owners[stage])
        yield from (Receive(stage, user, "gradient", ONCE) for stage in held for user in users[stage])
        yield from (Update(stage) for stage in held)
        yield from (Send(stage, user, "parameter", ONCE) for stage in held for user in users[stage])
        yield from (Receive(stage, owner, "parameter", ONCE) for stage in held for owner in owners[stage])

    return tuple(tuple(steps(row)) for row in rows)


def _neighbours(edges: Edges, mesh_of: dict[int, int]) -> defaultdict[int, list[int]]:
    """Targets of each stage on other meshes, in order and once each."""
    for source, target in edges:
        if not (source in mesh_of and target in mesh_of and source < target):
            raise ScheduleError(
                f"edge {source} → {target} is not possible with {len(mesh_of)} stages; "
                "an edge runs from an earlier stage to a later one"
            )
    return _grouped(edges, mesh_of)


def _ties(tied: Edges, mesh_of: dict[int, int]) -> defaultdict[int, list[int]]:
    """Users of each owner on other meshes, in order and once each."""
    for owner, user in tied:
        if not (owner in mesh_of and user in mesh_of and owner != user):
            raise ScheduleError(
                f"a weight tied between stages {owner} and {user} needs two of the {len(mesh_of)} stages"
            )
    return _grouped(tied, mesh_of)


def _grouped(pairs: Edges, mesh_of: dict[int, int]) -> defaultdict[int, list[int]]:
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
