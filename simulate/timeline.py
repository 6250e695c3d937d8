"""When every instruction ran: predicted by the simulator or measured in a run, in one form."""

from collections import defaultdict
from dataclasses import dataclass, field

from meshwright.errors import ScheduleError
from meshwright.simulate.program import Backward, Forward, Instruction, Receive, Reduce, Send, Update

COMPUTE = (Forward, Backward, Reduce, Update)


@dataclass(frozen=True, slots=True)
class Event:
    """One instruction on one mesh: a ``Send`` lasts until its bytes are there, a ``Receive`` while the mesh waits."""

    mesh: int
    instruction: Instruction
    start_seconds: float
    end_seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.start_seconds <= self.end_seconds:
            raise ScheduleError(f"{self.instruction} runs from {self.start_seconds} to {self.end_seconds} seconds")


@dataclass(frozen=True, slots=True)
class CriticalStep:
    """One link of the chain that decides the makespan.

    ``latency_seconds`` passed before this step could start, ``own_seconds`` in it and ``contention_seconds`` in what
    a shared resource added to it; summed over the chain they are the makespan.
    """

    event: Event
    own_seconds: float
    latency_seconds: float = 0.0
    contention_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """All events of one training step, by start; ``mesh_devices`` names the devices of each mesh.

    ``live_bytes`` holds, for each mesh, (seconds, bytes on each of its devices from then on) steps; ``critical_path``
    is the simulator's and empty in a measured timeline.
    """

    mesh_devices: tuple[tuple[int, ...], ...]
    events: tuple[Event, ...]
    live_bytes: tuple[tuple[tuple[float, float], ...], ...] = ()
    critical_path: tuple[CriticalStep, ...] = field(default=(), repr=False)

    @property
    def makespan_seconds(self) -> float:
        """From zero to the end of the last event."""
        return max((event.end_seconds for event in self.events), default=0.0)

    @property
    def span_seconds(self) -> float:
        """The longest that any mesh is engaged, from its first computation to the end of its last."""
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        for event in self.events:
            if isinstance(event.instruction, COMPUTE):
                first[event.mesh] = min(first.get(event.mesh, event.start_seconds), event.start_seconds)
                last[event.mesh] = max(last.get(event.mesh, 0.0), event.end_seconds)
        return max((last[mesh] - first[mesh] for mesh in first), default=0.0)

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """Seconds that each mesh computes, reduces or updates."""
        busy = [0.0] * len(self.mesh_devices)
        for event in self.events:
            if isinstance(event.instruction, COMPUTE):
                busy[event.mesh] += event.end_seconds - event.start_seconds
        return tuple(busy)

    @property
    def bubble_fraction(self) -> float:
        """Share of all device-seconds of the step in which a device has nothing to do."""
        devices = [len(devices) for devices in self.mesh_devices]
        total = self.makespan_seconds * sum(devices)
        busy = sum(seconds * count for seconds, count in zip(self.busy_seconds, devices, strict=True))
        return max(0.0, 1 - busy / total) if total else 0.0

    @property
    def peak_bytes(self) -> tuple[float, ...]:
        """The most that each device of each mesh holds at once."""
        return tuple(max((held for _, held in steps), default=0.0) for steps in self.live_bytes)

    @property
    def critical_seconds(self) -> dict[str, float]:
        """The makespan by cause along the critical path: forward, backward, transfer, reduce, update, contention."""
        causes: defaultdict[str, float] = defaultdict(float)
        for step in self.critical_path:
            instruction = step.event.instruction
            moves = isinstance(instruction, Send | Receive)
            causes["transfer" if moves else type(instruction).__name__.lower()] += step.own_seconds
            causes["transfer"] += step.latency_seconds
            causes["contention"] += step.contention_seconds
        return {cause: seconds for cause, seconds in causes.items() if seconds}

    @property
    def exposed_communication_seconds(self) -> float:
        """Seconds of the critical path spent on transfers and on reductions of gradients."""
        return self.critical_seconds.get("transfer", 0.0) + self.critical_seconds.get("reduce", 0.0)
