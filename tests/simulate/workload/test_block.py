"""Pieces become operations: their order, what they need, and layers whose weights travel."""

from meshwright.simulate.operations import Collective, Kernel, Operation, Pointwise
from meshwright.simulate.stage import run_operations
from meshwright.simulate.workload.block import (
    backward,
    forward,
    input_gradient,
    joined,
    layered,
    recomputed,
    weight_gradient,
)
from meshwright.simulate.workload.pieces import Piece


def work(seconds: float) -> Pointwise:
    return Pointwise(bytes=seconds)


def send(seconds: float) -> Collective:
    return Collective(kind="all_gather", message_bytes=seconds, ranks=2, axis="tensor")


def seconds_of(kernel: Kernel) -> float:
    return kernel.message_bytes if isinstance(kernel, Collective) else getattr(kernel, "bytes", 0.0)


def played(operations: tuple[Operation, ...]) -> float:
    return run_operations(operations, seconds_of).seconds


PIECES = (
    Piece("enter", (send(1),), (send(2),)),
    Piece("matrix", (work(10),), (work(11),), (work(12),)),
    Piece("core", (work(5),), (work(6),), core=True),
)


def test_a_backward_runs_the_pieces_from_last_to_first() -> None:
    order = [(operation.name, seconds_of(operation.kernel)) for operation in backward(PIECES, overlapped=False)]
    assert order == [("core", 6), ("matrix", 11), ("matrix", 12), ("enter", 2)]
    assert [seconds_of(operation.kernel) for operation in forward(PIECES)] == [1, 10, 5]


def test_overlap_hides_the_collective_behind_the_weight_gradient() -> None:
    assert played(backward(PIECES, overlapped=False)) == 6 + 11 + 12 + 2
    assert played(backward(PIECES, overlapped=True)) == 6 + 11 + 12


def test_inputs_gathered_again_come_beside_the_input_gradient() -> None:
    """Of 15 seconds, 11 hide behind the input-gradient; where nothing overlaps as where everything may."""
    gathered = (Piece("matrix", (work(10),), (work(11),), (send(15), work(12))), PIECES[2])
    assert played(backward(gathered, overlapped=False)) == played(backward(gathered, overlapped=True)) == 6 + 15 + 12


def test_halves_hold_each_kernel_once() -> None:
    whole = sorted(seconds_of(operation.kernel) for operation in backward(PIECES, overlapped=True))
    halves = [*input_gradient(PIECES), *weight_gradient(PIECES)]
    assert sorted(seconds_of(operation.kernel) for operation in halves) == whole


def test_policies_recompute_nothing_the_core_or_all() -> None:
    found = {policy: played(recomputed(PIECES, policy)) for policy in ("none", "selective", "full")}
    assert found == {"none": 0, "selective": 5, "full": 16}


def test_joined_lists_keep_what_they_need() -> None:
    both = joined(forward(PIECES), backward(PIECES, overlapped=True))
    assert played(both) == 16 + 6 + 11 + 12


def test_weights_are_gathered_one_layer_ahead() -> None:
    """Layers of 10 behind gathers of 4: the first is waited for; behind gathers of 13 every layer waits."""
    layer = (Operation("layer", work(10)),)
    assert played(layered(layer, 3, gathers=(send(4),))) == 4 + 30
    assert played(layered(layer, 3, gathers=(send(13),))) == 3 * 13 + 10
    assert played(layered(layer, 3)) == 30


def test_a_gather_waits_for_the_memory_of_the_layer_before_the_last() -> None:
    """With nothing fetched ahead, gathers and layers take turns."""
    layer = (Operation("layer", work(10)),)
    assert played(layered(layer, 3, gathers=(send(4),), prefetch=0)) == 3 * 14


def test_sums_of_gradients_run_beside_the_layers_to_come() -> None:
    layer = (Operation("layer", work(10)),)
    assert played(layered(layer, 3, scatters=(send(4),))) == 30 + 4
    assert played(layered(layer, 3, scatters=(send(14),))) == 10 + 3 * 14
