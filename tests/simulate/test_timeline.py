"""Timelines: their numbers by hand."""

import pytest

from meshwright.errors import ScheduleError
from meshwright.simulate.program import Backward, Forward, Receive, Send
from meshwright.simulate.timeline import Event, Timeline

MEASURED = Timeline(
    mesh_devices=((0,), (1, 2, 3)),
    events=(
        Event(0, Forward(0, 0), 0, 2),
        Event(1, Receive(1, 0, "activation", 0), 0, 3),
        Event(0, Send(0, 1, "activation", 0), 2, 3),
        Event(1, Forward(1, 0), 3, 4),
        Event(1, Backward(1, 0), 4, 8),
    ),
)


def test_the_numbers_of_a_measured_timeline() -> None:
    """Busy: 2 s on one device and 5 s on three, of 8 s on four; a wait is not work."""
    assert MEASURED.makespan_seconds == 8
    assert MEASURED.span_seconds == 5
    assert MEASURED.busy_seconds == (2, 5)
    assert MEASURED.bubble_fraction == pytest.approx(1 - 17 / 32)
    assert MEASURED.critical_seconds == {}


def test_nothing_has_no_bubble() -> None:
    empty = Timeline((), ())
    assert (empty.makespan_seconds, empty.span_seconds, empty.bubble_fraction) == (0, 0, 0)


def test_an_event_cannot_end_before_it_starts() -> None:
    with pytest.raises(ScheduleError, match="runs from 2 to 1"):
        Event(0, Forward(0, 0), 2, 1)


def test_memory_as_arrays_is_memory_as_pairs() -> None:
    steps = (((0.0, 4.0), (1.0, 6.0), (2.5, 4.0)), ((0.0, 1.0),))
    timeline = Timeline(mesh_devices=((0,), (1,)), events=(), live_bytes=steps)
    for (seconds, held), pairs in zip(timeline.memory, steps, strict=True):
        assert tuple(zip(seconds.tolist(), held.tolist(), strict=True)) == pairs
