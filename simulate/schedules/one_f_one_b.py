"""1F1B: after a warm-up, one forward and one backward in turn.

Source: Narayanan et al., SC 2021, section 2.2 (default schedule). With equal stages and times F and B the step takes
(M + S - 1)(F + B); a hop latency c adds 2c(M(S - 1)/S + S - 2) where S divides M: it is paid every S micro-batches.
"""

from meshwright.simulate.schedules.base import Options, Order, Schedule, in_a_line, letters


def one_f_one_b(meshes: int, microbatches: int, options: Options) -> Order:
    """Alternate forward and backward, keeping at most ``meshes - s`` activations on stage s; any M, also M < S."""

    return in_a_line(
        [
            letters(alternating(live_microbatches(stage, meshes, microbatches), microbatches), stage)
            for stage in range(meshes)
        ]
    )


def alternating(live: int, microbatches: int) -> str:
    """A row that starts its first backward when ``live`` forwards are done and keeps that many activations."""
    return "F" * (live - 1) + "FB" * (microbatches - live + 1) + "B" * (live - 1)


def live_microbatches(stage: int, stages: int, microbatches: int) -> int:
    """The first backward of a stage follows its ``stages - stage``-th forward."""
    return min(microbatches, stages - stage)


ONE_F_ONE_B = Schedule("1f1b", "after a warm-up, one forward and one backward in turn", one_f_one_b, live_microbatches)
