"""1F1B: after a warm-up, one forward and one backward in turn.

Source: Narayanan et al., SC 2021, section 2.2 (default schedule). With equal stages and times F and B the step takes
(M + S - 1)(F + B); a hop latency c adds 2c(M(S - 1)/S + S - 2) where S divides M: it is paid every S micro-batches.
"""

from meshwright.simulate.program import Backward, Forward
from meshwright.simulate.schedules.base import ComputeRows, Schedule, need_sizes


def one_f_one_b(stages: int, microbatches: int) -> ComputeRows:
    """Alternate forward and backward, keeping at most ``stages - s`` activations on stage s; any M, also M < S."""
    need_sizes(stages, microbatches)

    def row(stage: int) -> tuple[Forward | Backward, ...]:
        warmup = live_microbatches(stage, stages, microbatches) - 1
        forwards = [Forward(stage, m) for m in range(microbatches)]
        backwards = [Backward(stage, m) for m in range(microbatches)]
        pairs = zip(forwards[warmup:], backwards, strict=False)  # the shorter list ends the steady part
        steady = [step for pair in pairs for step in pair]
        return (*forwards[:warmup], *steady, *backwards[microbatches - warmup :])

    return tuple(row(stage) for stage in range(stages))


def live_microbatches(stage: int, stages: int, microbatches: int) -> int:
    """The first backward of a stage follows its ``stages - stage``-th forward."""
    return min(microbatches, stages - stage)


ONE_F_ONE_B = Schedule("1f1b", "after a warm-up, one forward and one backward in turn", one_f_one_b, live_microbatches)
