"""ZB-V: split backwards on two stages a mesh, placed as a V, so that the last stage is on the first mesh.

Source: Qi et al., Pipeline Parallelism with Controllable Memory, NeurIPS 2024 (arXiv:2405.15362), section 4 and
appendix; lists as in torch.distributed.pipelining. With P meshes, M ≥ 2P - 1 and equal seconds t for every forward and
half of a chunk each mesh spans 6Mt, without a bubble, and the step takes 6Mt + (P - 1)t. With unequal ones it waits.
"""

from meshwright.simulate.schedules.base import Options, Order, Row, Schedule, in_a_line, two_stages


def zb_v(meshes: int, microbatches: int, options: Options) -> Order:
    """Mesh d holds stages d and 2P - 1 - d and at most 2P activations; any M: few are the first of 2P - 1."""
    count = max(microbatches, 2 * meshes - 1)
    return in_a_line([_row(mesh, meshes, count, microbatches) for mesh in range(meshes)], 2 * meshes)


def _row(mesh: int, meshes: int, count: int, microbatches: int) -> Row:
    rest = meshes - mesh
    text = (
        "F" * (2 * rest - 1)
        + "fF" * mesh
        + "fiw" * rest
        + "FIWfiw" * (count - 2 * meshes + 1 + mesh)
        + "IWfiw" * (rest - 1)
        + "Ii" * mesh
        + "IW" * rest
        + "w" * mesh
        + "W" * mesh
    )
    return two_stages(text, mesh, 2 * meshes - 1 - mesh, microbatches)


ZB_V = Schedule(
    "zb-v", "split backwards on two stages a mesh in a V, no bubble at 1F1B's memory", zb_v, chunks=2,
    splits_backward=True,
)  # fmt: skip
