"""ZB-H1: 1F1B with split backwards, the weight halves moved to where the pipeline would wait.

Source: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024 (arXiv:2401.10241), section 2.3. With equal stages,
M ≥ S, W ≤ F and W ≤ I the step takes M(F + I + W) + (S - 1)(F + I - W): a third of 1F1B's bubble where F = I = W, at
its memory.
"""

from meshwright.simulate.schedules.base import Options, Order, Schedule, first_microbatches, in_a_line, letters


def zb_h1(meshes: int, microbatches: int, options: Options) -> Order:
    """At most ``meshes`` activations on each stage; any M: fewer than the meshes are the first of as many."""
    count = max(microbatches, meshes)

    def text(stage: int) -> str:
        ahead = meshes - 1 - stage
        return "F" * ahead + "FI" * stage + "FIW" * (count - meshes + 1) + "IW" * ahead + "W" * stage

    return in_a_line([first_microbatches(letters(text(stage), stage), microbatches) for stage in range(meshes)])


def live_microbatches(stage: int, stages: int, microbatches: int) -> int:
    """What 1F1B saves on later stages, weight halves that wait use up."""
    return min(microbatches, stages)


ZB_H1 = Schedule(
    "zb-h1", "split backwards, weight halves fill the bubble, 1F1B's memory", zb_h1, live_microbatches,
    splits_backward=True,
)  # fmt: skip
