"""All schedules by name: the command line, the search and the tests take their choices from here."""

import difflib

from meshwright.errors import ScheduleError
from meshwright.simulate.schedules.base import Schedule
from meshwright.simulate.schedules.chimera import CHIMERA
from meshwright.simulate.schedules.dual_pipe import DUAL_PIPE, DUAL_PIPE_V
from meshwright.simulate.schedules.eager_1f1b import EAGER_1F1B
from meshwright.simulate.schedules.gpipe import GPIPE, GPIPE_LIFO
from meshwright.simulate.schedules.graph_1f1b import GRAPH_1F1B
from meshwright.simulate.schedules.interleaved import INTERLEAVED
from meshwright.simulate.schedules.looped_bfs import LOOPED_BFS
from meshwright.simulate.schedules.one_f_one_b import ONE_F_ONE_B
from meshwright.simulate.schedules.zb_h1 import ZB_H1
from meshwright.simulate.schedules.zb_h2 import ZB_H2
from meshwright.simulate.schedules.zb_v import ZB_V
from meshwright.simulate.schedules.zero_bubble import ZB_1P, ZB_2P

SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        GPIPE,
        GPIPE_LIFO,
        ONE_F_ONE_B,
        EAGER_1F1B,
        INTERLEAVED,
        LOOPED_BFS,
        ZB_H1,
        ZB_H2,
        ZB_V,
        ZB_1P,
        ZB_2P,
        GRAPH_1F1B,
        DUAL_PIPE,
        DUAL_PIPE_V,
        CHIMERA,
    )
}


def find_schedule(name: str) -> Schedule:
    """The schedule of this name.

    Raises:
        ScheduleError: there is none; the message lists those that exist.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]
    close = difflib.get_close_matches(name, SCHEDULES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ScheduleError(f"schedule {name!r} is unknown; {hint}known are {', '.join(SCHEDULES)}")
