"""GPipe: all forwards, then all backwards.

Source: Huang et al., GPipe, NeurIPS 2019, section 2.3. With equal stages, times F and B and hop latency c the step
takes (M + S - 1)(F + B) + 2(S - 1)c.
"""

import numpy as np

from meshwright.simulate.schedules.base import Options, Order, Schedule, in_a_line, letters


def gpipe(meshes: int, microbatches: int, options: Options) -> Order:
    """All forwards of each stage, then its backwards, first in, first out."""
    text = "F" * microbatches + "B" * microbatches
    return in_a_line([letters(text, stage) for stage in range(meshes)])


def gpipe_lifo(meshes: int, microbatches: int, options: Options) -> Order:
    """All forwards of each stage, then its backwards from the last micro-batch to the first."""
    text = "F" * microbatches + "B" * microbatches
    numbers = np.concatenate([np.arange(microbatches), np.arange(microbatches)[::-1]])
    return in_a_line([letters(text, stage, numbers) for stage in range(meshes)])


def live_microbatches(stage: int, stages: int, microbatches: int) -> int:
    """Every stage holds all of them when the first backward starts."""
    return microbatches


GPIPE = Schedule("gpipe", "all forwards, then all backwards", gpipe, live_microbatches)
GPIPE_LIFO = Schedule(
    "gpipe-lifo", "all forwards, then all backwards, the last micro-batch first", gpipe_lifo, live_microbatches
)
