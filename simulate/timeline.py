"""When every instruction ran: predicted by the simulator or measured in a run, in one form."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar, overload

import numpy as np
from numba import njit
from numpy.typing import NDArray

from meshwright.errors import ScheduleError
from meshwright.simulate.program import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Gather,
    Instruction,
    Receive,
    Reduce,
    Send,
    Update,
)

Item = TypeVar("Item")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WORK = (Forward, Backward, BackwardInput, BackwardWeight, Reduce, Update, Gather)
CAUSES: dict[type[Instruction], str] = {
    Forward: "forward",
    Backward: "backward",
    BackwardInput: "input gradient",
    BackwardWeight: "weight gradient",
    Send: "transfer",
    Receive: "transfer",
    Reduce: "reduce",
    Update: "update",
    Gather: "gather",
}
COMMUNICATION = ("transfer", "reduce", "gather")


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


class Lazy(Sequence[Item], Generic[Item]):
    """A sequence made when it is first read: a step of a large pipeline has more events than most readers want."""

    def __init__(self, make: Callable[[], tuple[Item, ...]]) -> None:
        self._make = make

    @cached_property
    def _items(self) -> tuple[Item, ...]:
        return self._make()

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        return self._items == (other._items if isinstance(other, Lazy) else other)

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """The work of a timeline as arrays, by mesh and start: what its numbers are computed from."""

    mesh: Ints
    start_seconds: Floats
    end_seconds: Floats


MemoryStep = tuple[float, float]
Parts = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """All events of one training step, by start; ``mesh_devices`` names the devices of each mesh.

    ``live_bytes`` holds, for each mesh, (seconds, bytes on each of its devices from then on) steps, and ``peak_parts``
    what the highest of them is made of, as (name, bytes). ``critical_path`` is the simulator's and empty in a measured
    timeline. The fields named ``known`` are for those who know these numbers already.
    """

    mesh_devices: tuple[tuple[int, ...], ...]
    events: Sequence[Event]
    live_bytes: Sequence[tuple[MemoryStep, ...]] = ()
    critical_path: Sequence[CriticalStep] = field(default=(), repr=False)
    peak_parts: Sequence[Parts] = field(default=(), repr=False)
    known_spans: Callable[[], Spans] | None = field(default=None, repr=False, compare=False)
    known_makespan_seconds: float | None = field(default=None, repr=False, compare=False)
    known_peak_bytes: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    known_memory: tuple[tuple[Floats, Floats], ...] | None = field(default=None, repr=False, compare=False)

    @property
    def makespan_seconds(self) -> float:
        """From zero to the end of the last event."""
        if self.known_makespan_seconds is not None:
            return self.known_makespan_seconds
        return max((event.end_seconds for event in self.events), default=0.0)

    @property
    def span_seconds(self) -> float:
        """The longest that any mesh is engaged, from its first computation to the end of its last."""
        return float(_engaged(*self._work(), len(self.mesh_devices)).max(initial=0.0))

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """Seconds in which each mesh computes, reduces, updates or gathers; what runs side by side counts once."""
        return tuple(_busy(*self._work(), len(self.mesh_devices)).tolist())

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
        if self.known_peak_bytes is not None:
            return self.known_peak_bytes
        return tuple(max((held for _, held in steps), default=0.0) for steps in self.live_bytes)

    @property
    def memory(self) -> tuple[tuple[Floats, Floats], ...]:
        """``live_bytes`` of each mesh as two arrays: seconds, and bytes on each of its devices from then on."""
        if self.known_memory is not None:
            return self.known_memory
        pairs = (np.array(steps, np.float64).reshape(-1, 2) for steps in self.live_bytes)
        return tuple((each[:, 0], each[:, 1]) for each in pairs)

    @property
    def critical_seconds(self) -> dict[str, float]:
        """The makespan by cause along the critical path: forward, backward, transfer, reduce, update, contention."""
        causes: defaultdict[str, float] = defaultdict(float)
        for step in self.critical_path:
            causes[CAUSES[type(step.event.instruction)]] += step.own_seconds
            causes["transfer"] += step.latency_seconds
            causes["contention"] += step.contention_seconds
        return {cause: seconds for cause, seconds in causes.items() if seconds}

    @property
    def exposed_communication_seconds(self) -> float:
        """Seconds of the critical path spent on transfers, on reductions of gradients and on gathers.

        What shared links add to these is in it; what shared cores add to computations is not.
        """
        return sum(
            step.latency_seconds
            + (step.own_seconds + step.contention_seconds) * (CAUSES[type(step.event.instruction)] in COMMUNICATION)
            for step in self.critical_path
        )

    def _work(self) -> tuple[Ints, Floats, Floats]:
        spans = self.known_spans() if self.known_spans is not None else spans_of(self.events)
        return spans.mesh, spans.start_seconds, spans.end_seconds


def spans_of(events: Sequence[Event]) -> Spans:
    """The work among events as arrays."""
    work = sorted((e.mesh, e.start_seconds, e.end_seconds) for e in events if isinstance(e.instruction, WORK))
    return Spans(
        np.array([mesh for mesh, _, _ in work], np.int64),
        np.array([start for _, start, _ in work], np.float64),
        np.array([end for _, _, end in work], np.float64),
    )


@njit(cache=True)
def _engaged(mesh: Ints, start: Floats, end: Floats, meshes: int) -> Floats:
    first, last = np.full(meshes, np.inf), np.zeros(meshes)
    for i in range(len(mesh)):
        first[mesh[i]] = min(first[mesh[i]], start[i])
        last[mesh[i]] = max(last[mesh[i]], end[i])
    engaged: Floats = np.maximum(last - first, 0.0)
    return engaged


@njit(cache=True)
def _busy(mesh: Ints, start: Floats, end: Floats, meshes: int) -> Floats:
    busy, until = np.zeros(meshes), np.zeros(meshes)
    for i in range(len(mesh)):
        begin = max(start[i], until[mesh[i]])
        if end[i] > begin:
            busy[mesh[i]] += end[i] - begin
            until[mesh[i]] = end[i]
    return busy
