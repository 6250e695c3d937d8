"""Eager 1F1B: 1F1B that starts forwards earlier, so that a hop's latency is hidden.

Source: Zhuang et al., On Optimizing the Communication of Model Parallelism, MLSys 2023 (arXiv:2211.05322), section 4.
With equal stages and times F and B the step takes (M + S - 1)(F + B) + 2(S - 1)c for every hop latency
c ≤ (F + B) / 2, where 1F1B pays for hops every S micro-batches.
"""

from meshwright.simulate.schedules.base import Options, Order, Schedule, in_a_line, letters
from meshwright.simulate.schedules.one_f_one_b import alternating


def eager_1f1b(meshes: int, microbatches: int, options: Options) -> Order:
    """1F1B with up to twice the activations, less one: each hop of a micro-batch has a slack of one; any M."""
    return in_a_line(
        [
            letters(alternating(live_microbatches(stage, meshes, microbatches), microbatches), stage)
            for stage in range(meshes)
        ]
    )


def live_microbatches(stage: int, stages: int, microbatches: int) -> int:
    """The first backward of a stage follows its ``2(stages - stage) - 1``-th forward."""
    return min(microbatches, 2 * (stages - stage) - 1)


EAGER_1F1B = Schedule("eager-1f1b", "1F1B with twice the warm-up, which hides the hops", eager_1f1b, live_microbatches)
