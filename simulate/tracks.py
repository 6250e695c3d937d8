"""What pictures and traces of a timeline share: which meshes reduce beside their computation, and names of rows."""

from collections import defaultdict

from meshwright.simulate.program import Gather, Reduce, Send
from meshwright.simulate.timeline import Timeline


def collectives_beside(timeline: Timeline) -> frozenset[int]:
    """Meshes whose reductions or gathers run while something else does: those need a track of their own.

    A timeline does not say whether it had a collective stream; that things overlap by a nanosecond does.
    """
    work_until: defaultdict[int, float] = defaultdict(float)
    stream_until: defaultdict[int, float] = defaultdict(float)
    found = set()
    for event in timeline.events:  # by start
        if isinstance(event.instruction, Send) or event.end_seconds == event.start_seconds:
            continue
        collective = isinstance(event.instruction, Reduce | Gather)
        mine, other = (stream_until, work_until) if collective else (work_until, stream_until)
        if nanoseconds(event.start_seconds) < nanoseconds(other[event.mesh]):
            found.add(event.mesh)
        mine[event.mesh] = max(mine[event.mesh], event.end_seconds)
    return frozenset(found)


def nanoseconds(seconds: float) -> int:
    """Whole nanoseconds, so that slices which touch do not overlap by a rounding error."""
    return round(seconds * 1e9)


def devices_label(devices: tuple[int, ...]) -> str | None:
    """``device 4`` or ``devices 4–6``; None where their numbers do not follow each other."""
    if len(devices) == 1:
        return f"device {devices[0]}"
    if devices and devices == tuple(range(devices[0], devices[0] + len(devices))):
        return f"devices {devices[0]}–{devices[-1]}"
    return None
