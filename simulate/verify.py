"""Proof that a program is one correct training step: complete, in order, matched, and free of deadlock."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from meshwright.errors import ScheduleError
from meshwright.simulate.program import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    Gather,
    Instruction,
    Payload,
    Program,
    Receive,
    Reduce,
    Send,
    Update,
    makers,
    word,
)


def verify(
    program: Program,
    edges: Sequence[tuple[int, int]] | None = None,
    *,
    copies: Sequence[int] | None = None,
    mesh_devices: Sequence[Sequence[int]] | None = None,
    most_live: Sequence[int] | None = None,
) -> None:
    """Return if the program is right, and say what is wrong if it is not.

    Proved: every stage lives on one mesh and runs the forward and the backward of each of its micro-batches once, the
    forward first, the backward whole or as its two halves in order; each ``Send`` follows the computation that makes
    its payload and has one ``Receive``, which precedes the computation that needs it; every micro-batch crosses the
    same edges, and for each activation a cotangent comes back; on one mesh the stages of an edge run in its order;
    ``Reduce`` follows all backwards, ``Update`` follows ``Reduce`` and ``Gather`` follows ``Update``; no device has two
    rows, so that the collectives of each device have one order; no mesh holds more activations than it may; and all
    rows, run together, reach their ends.

    Args:
        edges: if given, the (source, target) pairs of stages that activations must cross, no more and no fewer.
        copies: if given, the stage of the model that each stage is a replica of; the replicas of a stage share the
            micro-batches among them. Otherwise every stage runs all.
        mesh_devices: if given, the devices of each row.
        most_live: if given, how many activations each mesh may hold at once, each from its forward to the end of its
            backward or weight-gradient.

    Raises:
        ScheduleError: the first violation found, in the words of the program's text form.
    """
    need_numbered(program)
    place = _places(program)
    microbatches = _complete(place, copies)
    _matched(program, place, microbatches, edges)
    if edges is not None:
        _in_order_at_home(place, edges)
    tail_in_order(program)
    if mesh_devices is not None:
        _one_row_a_device(program, mesh_devices)
    if most_live is not None:
        for mesh, (row, most) in enumerate(zip(program, most_live, strict=True)):
            _within(mesh, row, most)
    refuse_deadlock(program)


def need_numbered(program: Program) -> None:
    """Refuse numbers that no complete program of this length has, before anything counts up to them.

    Raises:
        ScheduleError: a stage or micro-batch has a number that is not below the number of instructions.
    """
    count = sum(map(len, program))
    for row in program:
        for step in row:
            for name in ("stage", "microbatch"):
                number = getattr(step, name, 0)
                if number >= count:
                    raise ScheduleError(
                        f"{word(step)} is of {name.replace('microb', 'micro-b')} {number}; {count} instructions are "
                        "too few for all before it, and they are numbered from 0"
                    )


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


def _complete(place: Place, copies: Sequence[int] | None) -> dict[int, set[int]]:
    """Each stage has all forwards and backwards, in this order; returns the micro-batches of each stage."""
    computed = [step for step in place if isinstance(step, Compute)]
    microbatches = set(range(1 + max((step.microbatch for step in computed), default=-1)))
    own: dict[int, set[int]] = {stage: set() for stage in sorted({step.stage for step in place})}
    for done in computed:
        own[done.stage].add(done.microbatch)
    if copies is None:
        own = dict.fromkeys(own, microbatches)
    else:
        _shared_out(own, microbatches, copies)
    for stage, numbers in own.items():
        for m in sorted(numbers):
            forward, whole = Forward(stage, m), Backward(stage, m)
            halves: tuple[Instruction, ...] = (BackwardInput(stage, m), BackwardWeight(stage, m))
            split = any(half in place for half in halves)
            if split and whole in place:
                raise ScheduleError(f"{word(whole)} stands beside its half {word(halves[0])}; choose one")
            steps = (forward, *halves) if split else (forward, whole)
            for step in steps:
                if step not in place:
                    raise ScheduleError(
                        f"{word(step)} is missing: stage {stage} must run micro-batches {_range(numbers)}"
                    )
            for early, late in pairwise(steps):
                if place[early] > place[late]:
                    raise ScheduleError(f"{word(late)} stands before {word(early)}")
    return own


def _shared_out(own: dict[int, set[int]], microbatches: set[int], copies: Sequence[int]) -> None:
    """The replicas of each stage run every micro-batch between them, and none twice."""
    replicas: dict[int, list[int]] = {}
    for stage in own:
        replicas.setdefault(copies[stage], []).append(stage)
    for model_stage, stages in sorted(replicas.items()):
        times = Counter(m for stage in stages for m in own[stage])
        for m in sorted(microbatches):
            if times[m] != 1:
                raise ScheduleError(
                    f"the replicas {stages} of stage {model_stage} run micro-batch {m} {times[m]} times; once is right"
                )


def _range(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}..{high}" if len(numbers) == high - low + 1 else ", ".join(map(str, sorted(numbers)))


def _matched(
    program: Program, place: Place, microbatches: dict[int, set[int]], edges: Sequence[tuple[int, int]] | None
) -> None:
    crossings: Counter[tuple[int, int]] = Counter()
    for step, (_, position) in place.items():
        match step:
            case Send(stage, target, what, m):
                other: Instruction = Receive(target, stage, what, m)
                made = makers(step)
                if not any(one in place and place[one][1] < position for one in made):
                    raise ScheduleError(f"{word(step)} sends what {word(made[0])} has not made yet")
                if what == "activation":
                    crossings[stage, target] += 1
                if what == "cotangent" and Send(target, stage, "activation", m) not in place:
                    raise ScheduleError(f"{word(step)} answers no activation: {target}>{stage}a{m} is missing")
            case Receive(stage, source, what, m):
                other = Send(source, stage, what, m)
                used = _users(stage, what, m)
                if used and not any(one in place and place[one][1] > position for one in used):
                    raise ScheduleError(f"{word(step)} comes too late for {word(used[0])}")
            case _:
                continue
        if other not in place:
            raise ScheduleError(f"{word(step)} has no partner {word(other)}")
    for (source, target), count in sorted(crossings.items()):
        if count != len(microbatches[source]):
            raise ScheduleError(
                f"edge {source} → {target} carries {count} of {len(microbatches[source])} micro-batches"
            )
    for step in place:
        if isinstance(step, Send) and step.what == "activation":
            answer = Send(step.target, step.stage, "cotangent", step.microbatch)
            if answer not in place:
                raise ScheduleError(f"{word(step)} has no answer: {word(answer)} is missing")
    if edges is not None:
        home = {step.stage: r for r, row in enumerate(program) for step in row}
        wanted = {(source, target) for source, target in edges if home[source] != home[target]}
        if wrong := sorted(wanted ^ set(crossings)):
            source, target = wrong[0]
            state = "is not sent" if wrong[0] in wanted else "is sent but is no edge"
            raise ScheduleError(f"the activation from stage {source} to stage {target} {state}")


def _users(stage: int, what: Payload, microbatch: int) -> tuple[Instruction, ...]:
    """The instructions one of which needs a payload; a returned parameter is needed only by the next iteration."""
    match what:
        case "activation":
            return (Forward(stage, microbatch),)
        case "cotangent":
            return Backward(stage, microbatch), BackwardInput(stage, microbatch)
        case "gradient" | "square" | "norm":
            return (Update(stage),)
        case "parameter":
            return ()


def _in_order_at_home(place: Place, edges: Sequence[tuple[int, int]]) -> None:
    """Where an edge stays on one mesh nothing is sent: there the row itself must keep the order."""
    home = {step.stage: mesh for step, (mesh, _) in place.items()}
    at_home = [(source, target) for source, target in edges if home[source] == home[target]]
    sources: dict[int, list[int]] = {target: [s for s, t in at_home if t == target] for _, target in at_home}
    targets: dict[int, list[int]] = {source: [t for s, t in at_home if s == source] for source, _ in at_home}
    for step, (_, position) in place.items():
        match step:
            case Forward(stage, m):
                needed: list[tuple[Instruction, ...]] = [(Forward(s, m),) for s in sources.get(stage, ())]
            case Backward(stage, m) | BackwardInput(stage, m):
                needed = [(Backward(t, m), BackwardInput(t, m)) for t in targets.get(stage, ())]
            case _:
                continue
        for one_of in needed:
            if not any(one in place and place[one][1] < position for one in one_of):
                raise ScheduleError(f"{word(step)} stands before {word(one_of[0])}, whose result it needs")


def _one_row_a_device(program: Program, mesh_devices: Sequence[Sequence[int]]) -> None:
    if len(mesh_devices) != len(program):
        raise ScheduleError(f"the program has {len(program)} rows, but devices are given for {len(mesh_devices)}")
    owner: dict[int, int] = {}
    for mesh, devices in enumerate(mesh_devices):
        for device in devices:
            if owner.setdefault(device, mesh) != mesh:
                raise ScheduleError(
                    f"device {device} is in mesh {owner[device]} and in mesh {mesh}: its collectives have no one order"
                )


def _within(mesh: int, row: Sequence[Instruction], most: int) -> None:
    live = 0
    for step in row:
        if isinstance(step, Forward):
            live += 1
            if live > most:
                raise ScheduleError(f"mesh {mesh} holds {live} activations from {word(step)} on; it may hold {most}")
        elif isinstance(step, Backward | BackwardWeight):
            live -= 1


def tail_in_order(program: Program) -> None:
    """Refuse a ``Reduce`` before a backward, an ``Update`` before its ``Reduce``, a ``Gather`` before its ``Update``.

    Raises:
        ScheduleError: the first that stands too early, or alone.
    """
    place = _places(program)
    last_backward = {
        step.stage: position
        for step, (_, position) in place.items()
        if isinstance(step, Backward | BackwardInput | BackwardWeight)
    }
    for step, (mesh, position) in place.items():
        match step:
            case Reduce(stage):
                if last_backward.get(stage, -1) > position:
                    late = program[mesh][last_backward[stage]]
                    raise ScheduleError(f"{word(step)} must follow {word(late)}")
                continue
            case Update(stage):
                before: Instruction = Reduce(stage)
            case Gather(stage):
                before = Update(stage)
            case _:
                continue
        if before not in place or place[before][1] > position:
            raise ScheduleError(f"{word(step)} must follow {word(before)}")


def refuse_deadlock(program: Program) -> None:
    """Run all rows together: a mesh that cannot go on sleeps until its message is sent.

    Raises:
        ScheduleError: some mesh sleeps for ever; the message says who waits where.
    """
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
