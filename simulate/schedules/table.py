"""All schedules by name: the command line, the search and the tests take their choices from here."""

import difflib

from meshwright.errors import ScheduleError
from meshwright.simulate.schedules.base import Schedule
from meshwright.simulate.schedules.gpipe import GPIPE, GPIPE_LIFO
from meshwright.simulate.schedules.one_f_one_b import ONE_F_ONE_B

SCHEDULES: dict[str, Schedule] = {schedule.name: schedule for schedule in (GPIPE, GPIPE_LIFO, ONE_F_ONE_B)}


def find_schedule(name: str) -> Schedule:
    """The schedule of this name.

    Raises:
        ScheduleError: there is none; the message lists those that exist.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]
    close = difflib.get_close_matches(name, SCHEDULES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ScheduleError(f"schedule {name!r} is unknown; {hint}Known are {', '.join(SCHEDULES)}.")
