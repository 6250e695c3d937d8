"""Proof that a program is one correct training step: complete, in order, matched, and free of deadlock."""

from collections import Counter
from collections.abc import Sequence

from meshwright.errors import ScheduleError
from meshwright.simulate.program import (
    Backward,
    Forward,
    Instruction,
    Program,
    Receive,
    Reduce,
    Send,
    Update,
    maker,
    word,
)


def verify(program: Program, edges: Sequence[tuple[int, int]] | None = None) -> None:
    """Return if the program is right, and say what is wrong if it is not.

    Proved: every stage lives on one mesh and runs the forward and the backward of each micro-batch 0..M-1 once, the
    forward first; each ``Send`` follows the computation that makes its payload and has one ``Receive``, which
    precedes the computation that needs it; every micro-batch crosses the same edges, cotangents only where
    activations went; ``Reduce`` follows all backwards and ``Update`` follows ``Reduce``; and all rows, run together,
    reach their ends.

    Args:
        edges: if given, the (source, target) pairs between meshes that activations must cross, no more and no fewer.

    Raises:
        ScheduleError: the first violation found, in the words of the program's text form.
    """
    place = _places(program)
    microbatches = _complete(place)
    _matched(program, place, microbatches, edges)
    _tail(program, place, microbatches)
    _no_deadlock(program)


Place = dict[Instruction, tuple[int, int]]  # instruction → (mesh, position)


def _places(program: Program) -> Place:
    place: Place = {}
    home: dict[int, int] = {}
    for r, row in enumerate(program):
        for i, step in enumerate(row):
            if step in place:
                raise ScheduleError(f"{word(step)} stands twice: on mesh {place[step][0]} and on mesh {r}")
            if home.setdefault(step.stage, r) != r:
                raise ScheduleError(f"stage {step.stage} is on mesh {home[step.stage]} and on mesh {r}; choose one")
            place[step] = (r, i)
    return place


def _complete(place: Place) -> int:
    """Each stage has all forwards and backwards, in this order; returns the number of micro-batches."""
    computed = [step for step in place if isinstance(step, Forward | Backward)]
    microbatches = 1 + max((step.microbatch for step in computed), default=-1)
    for stage in sorted({step.stage for step in place}):
        for m in range(microbatches):
            forward, backward = Forward(stage, m), Backward(stage, m)
            for step in (forward, backward):
                if step not in place:
                    raise ScheduleError(
                        f"{word(step)} is missing: stage {stage} must run micro-batches 0..{microbatches - 1}"
                    )
            if place[forward] > place[backward]:
                raise ScheduleError(f"{word(backward)} stands before {word(forward)}")
    return microbatches


def _matched(program: Program, place: Place, microbatches: int, edges: Sequence[tuple[int, int]] | None) -> None:
    crossings: Counter[tuple[int, int]] = Counter()
    for step, (_, position) in place.items():
        match step:
            case Send(stage, target, what, m):
                other: Instruction = Receive(target, stage, what, m)
                made = maker(step)
                if made not in place or place[made][1] > position:
                    raise ScheduleError(f"{word(step)} sends what {word(made)} has not made yet")
                if what == "activation":
                    crossings[stage, target] += 1
                if what == "cotangent" and Send(target, stage, "activation", m) not in place:
                    raise ScheduleError(f"{word(step)} answers no activation: {target}>{stage}a{m} is missing")
            case Receive(stage, source, what, m):
                other = Send(source, stage, what, m)
                used = _user(stage, what, m)
                if used is not None and (used not in place or place[used][1] < position):
                    raise ScheduleError(f"{word(step)} comes too late for {word(used)}")
            case _:
                continue
        if other not in place:
            raise ScheduleError(f"{word(step)} has no partner {word(other)}")
    for (source, target), count in sorted(crossings.items()):
        if count != microbatches:
            raise ScheduleError(f"edge {source} → {target} carries {count} of {microbatches} micro-batches")
    if edges is not None:
        home = {step.stage: r for r, row in enumerate(program) for step in row}
        wanted = {(source, target) for source, target in edges if home[source] != home[target]}
        if wrong := sorted(wanted ^ set(crossings)):
            source, target = wrong[0]
            state = "is not sent" if wrong[0] in wanted else "is sent but is no edge"
            raise ScheduleError(f"the activation from stage {source} to stage {target} {state}")


def _user(stage: int, what: str, microbatch: int) -> Instruction | None:
    """The instruction that needs a payload; a returned parameter is needed only by the next iteration."""
    match what:
        case "activation":
            return Forward(stage, microbatch)
        case "cotangent":
            return Backward(stage, microbatch)
        case "gradient":
            return Update(stage)
        case _:
            return None


def _tail(program: Program, place: Place, microbatches: int) -> None:
    for step, (_, position) in place.items():
        match step:
            case Reduce(stage):
                before: list[Instruction] = [Backward(stage, m) for m in range(microbatches)]
            case Update(stage):
                before = [Reduce(stage)]
            case _:
                continue
        for needed in before:
            if needed not in place or place[needed][1] > position:
                raise ScheduleError(f"{word(step)} must follow {word(needed)}")


def _no_deadlock(program: Program) -> None:
    """Run all rows together: a mesh that cannot go on sleeps until its message is sent."""
    position = [0] * len(program)
    sent: set[Instruction] = set()
    sleeping: dict[Instruction, int] = {}
    awake = list(range(len(program)))
    while awake:
        r = awake.pop()
        row = program[r]
        while position[r] < len(row):
            step = row[position[r]]
            if isinstance(step, Receive):
                send = Send(step.source, step.stage, step.what, step.microbatch)
                if send not in sent:
                    sleeping[send] = r
                    break
            elif isinstance(step, Send):
                sent.add(step)
                if step in sleeping:
                    awake.append(sleeping.pop(step))
            position[r] += 1
    if sleeping:
        stuck = sorted(sleeping.values())
        waits = ", ".join(f"mesh {r} waits at {word(program[r][position[r]])}" for r in stuck[:4])
        raise ScheduleError(f"the program deadlocks: {waits}" + (" ..." if len(stuck) > 4 else ""))
