"""DualPipe and DualPipeV: forwards of one direction overlap backwards of the other.

Source: DeepSeek-AI, DeepSeek-V3 Technical Report (arXiv:2412.19437), section 3.2.1, and the steps of its published
code. DualPipe keeps two replicas and sends half of the micro-batches each way; DualPipeV keeps one, whose two stages a
mesh lie in a V. With equal seconds F, I, W of a stage, the pair run forward then backward, the step takes
M(F + I + W) + (P/2 - 1)(F + I - W) by DualPipe, and 2M(f + i + w) + (P - 1)(f + i - w) of chunks by DualPipeV. Pairs
that are one piece of F + I + W (``atomic_pairs``) add (P/2 - 1)W, respectively (P - 1)w, where F = I = W.
"""

import numpy as np

from meshwright.errors import ScheduleError
from meshwright.simulate.schedules.base import Options, Order, Row, Schedule, in_a_line, letters
from meshwright.simulate.schedules.bidirectional import both_ways


def dual_pipe(meshes: int, microbatches: int, options: Options) -> Order:
    """Both directions' eight steps; mesh r holds down-stage r and up-stage P - 1 - r.

    Raises:
        ScheduleError: meshes or micro-batches are odd in number, or there are fewer than two micro-batches a mesh.
    """
    if meshes % 2 or microbatches % 2 or microbatches < 2 * meshes:
        raise ScheduleError(
            f"schedule dualpipe needs an even number of meshes P and an even number of micro-batches of at least 2P; "
            f"{meshes} meshes and {microbatches} micro-batches were asked for"
        )
    down = microbatches // 2

    def row(mesh: int) -> Row:
        own, other = mesh, 2 * meshes - 1 - mesh
        if mesh >= meshes // 2:  # the second half of the meshes is the first half of the way up
            own, other = other, own
        text = _steps(min(mesh, meshes - 1 - mesh), meshes // 2, down)
        return _paired(text, own, other, atomic=options.atomic_pairs)

    return both_ways([row(mesh) for mesh in range(meshes)], down)


def dual_pipe_v(meshes: int, microbatches: int, options: Options) -> Order:
    """The same steps on one replica; mesh r holds stages r and 2P - 1 - r.

    Raises:
        ScheduleError: there are fewer than two micro-batches a mesh.
    """
    if microbatches < 2 * meshes:
        raise ScheduleError(
            f"schedule dualpipe-v needs at least {2 * meshes} micro-batches on {meshes} meshes, two a mesh; "
            f"{microbatches} were asked for"
        )
    rows = [
        _paired(_steps(mesh, meshes, microbatches), mesh, 2 * meshes - 1 - mesh, atomic=options.atomic_pairs)
        for mesh in range(meshes)
    ]
    return in_a_line(rows, 2 * meshes)


def _steps(place: int, half: int, count: int) -> str:
    """What the mesh at this place of the first half of the way does.

    Upper case is the stage of the first half, lower case that of the second. ``&`` joins a pair; ``w`` is the oldest
    weight half that is still to do, whosever it is.
    """
    ahead, behind = half - place - 1, place + 1
    pairs = "F&bf&B" * (count - 2 * half + place + 1)
    if ahead == 0:
        pairs = pairs.replace("F&b", "Fb", 1)  # the mesh at the turn waits for its own first forward
    whole = (behind + (place % 2 == 0)) // 2  # backwards of the second half that are still in one piece
    ending = "".join(
        ("b" if number < whole else "i") + ("B" if number < behind // 2 else "I") for number in range(behind)
    )
    return (
        "FF" * ahead
        + "Ff" * behind
        + "iwf" * ahead
        + pairs
        + "bf&B" * ahead
        + ending
        + "wI" * ahead
        + "w" * behind
    )  # fmt: skip


def _paired(text: str, upper: int, lower: int, *, atomic: bool) -> Row:
    codes = np.frombuffer(text.encode(), np.uint8)
    joins = codes == ord("&")
    joined = np.roll(joins, -1)[~joins]
    text = text.replace("&", "")
    codes = codes[~joins]
    in_lower = codes >= ord("a")
    in_lower[codes == ord("w")] = in_lower[(codes == ord("i")) | (codes == ord("I"))]  # first in, first out
    return letters(text.upper(), np.where(in_lower, lower, upper), joined=joined & atomic)


DUAL_PIPE = Schedule(
    "dualpipe",
    "two replicas, forwards of one direction overlap backwards of the other",
    dual_pipe,
    takes=frozenset({"atomic_pairs"}),
    replicas=2,
    splits_backward=True,
    runnable=False,
)
DUAL_PIPE_V = Schedule(
    "dualpipe-v",
    "DualPipe on one replica, two stages a mesh in a V",
    dual_pipe_v,
    takes=frozenset({"atomic_pairs"}),
    chunks=2,
    splits_backward=True,
    runnable=False,
)
