"""GPipe: all forwards, then all backwards.

Source: Huang et al., GPipe, NeurIPS 2019, section 2.3. With equal stages, times F and B and hop latency c the step
takes (M + S - 1)(F + B) + 2(S - 1)c.
"""

from meshwright.simulate.program import Backward, Forward
from meshwright.simulate.schedules.base import ComputeRows, Schedule, need_sizes


def gpipe(stages: int, microbatches: int, lifo: bool = False) -> ComputeRows:
    """All forwards of each stage, then its backwards: first in, first out, or with ``lifo`` the last one first."""
    need_sizes(stages, microbatches)
    numbers = range(microbatches)

    def row(stage: int) -> tuple[Forward | Backward, ...]:
        forwards = (Forward(stage, m) for m in numbers)
        backwards = (Backward(stage, m) for m in (reversed(numbers) if lifo else numbers))
        return (*forwards, *backwards)

    return tuple(row(stage) for stage in range(stages))


def live_microbatches(stage: int, stages: int, microbatches: int) -> int:
    """Every stage holds all of them when the first backward starts."""
    return microbatches


GPIPE = Schedule("gpipe", "all forwards, then all backwards", gpipe, live_microbatches)
GPIPE_LIFO = Schedule(
    "gpipe-lifo",
    "all forwards, then all backwards, the last micro-batch first",
    lambda stages, microbatches: gpipe(stages, microbatches, lifo=True),
    live_microbatches,
)
