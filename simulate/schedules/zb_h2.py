"""ZB-H2: split backwards with twice the warm-up, so that no stage waits between its first forward and its last half.

Source: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024 (arXiv:2401.10241), section 2.3. With equal stages,
M ≥ 2S - 1, W ≤ F and W ≤ I the busiest stage spans M(F + I + W) + (S - 1)(F + I - 2W): no bubble where F = I = W. There
stage s ends s·F later than the first, so the whole bubble is saved only if the next step starts stage by stage.
"""

from meshwright.simulate.schedules.base import Options, Order, Schedule, first_microbatches, in_a_line, letters


def zb_h2(meshes: int, microbatches: int, options: Options) -> Order:
    """At most ``2 meshes - 1`` activations on each stage; any M: fewer than that are the first of as many."""
    count = max(microbatches, 2 * meshes - 1)

    def text(stage: int) -> str:
        ahead = meshes - 1 - stage
        steady = count - 2 * meshes + 2
        return "F" * 2 * ahead + "FI" * 2 * stage + "FIW" * steady + "IW" * 2 * ahead + "W" * 2 * stage

    return in_a_line([first_microbatches(letters(text(stage), stage), microbatches) for stage in range(meshes)])


def live_microbatches(stage: int, stages: int, microbatches: int) -> int:
    """One less than twice what ZB-H1 holds."""
    return min(microbatches, 2 * stages - 1)


ZB_H2 = Schedule(
    "zb-h2", "split backwards, no bubble on any stage, twice 1F1B's memory", zb_h2, live_microbatches,
    splits_backward=True,
)  # fmt: skip
