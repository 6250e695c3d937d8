"""What ends an iteration on one mesh, as kernels: gradients summed, their norm, the update, parameters gathered."""

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.errors import ScheduleError
from meshwright.simulate.memory import ZERO_LEVELS, Recipe
from meshwright.simulate.operations import Collective, Operation, OptimizerStep, Pointwise
from meshwright.simulate.stage import StageRunner

NORM_BYTES = 4.0  # one f32


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What is known of the end of an iteration.

    Args:
        parameters: those that a device holds before ZeRO shares them out.
        ranks: data-parallel devices that sum gradients, along mesh axis ``axis``.
        zero: from level 1 on gradients are reduce-scattered, each rank updates its share, and on levels 1 and 2 the
            parameters are gathered afterwards (level 3 gathers them before use).
        norm: whether the global norm of the gradients is found first (clipping).
        synced_seconds: seconds of the gradient sum that the last backward did not hide, where it ran beside it
            (``stage.with_gradient_sync``); None: it runs here, after the backward.
    """

    parameters: int
    recipe: Recipe
    ranks: int = 1
    axis: str = "data"
    zero: int = 0
    norm: bool = False
    synced_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.zero not in ZERO_LEVELS:
            raise ScheduleError(f"ZeRO level {self.zero} was asked for; there are 0 (none), 1, 2 and 3")
        if self.ranks < 1 or self.parameters < 1:
            raise ScheduleError(
                f"the tail of {self.parameters} parameters over {self.ranks} ranks was asked for; both are at least 1"
            )

    @property
    def updated(self) -> int:
        """Parameters that one device updates."""
        return -(-self.parameters // self.ranks) if self.zero else self.parameters

    def operations(self) -> dict[str, tuple[Operation, ...]]:
        """The kernels of each part, in order; parts without kernels are left out."""
        recipe, gradient_bytes = self.recipe, self.parameters * self.recipe.gradient_bytes
        parts: dict[str, list[Operation]] = {"reduce": [], "norm": [], "update": [], "gather": []}
        if self.ranks > 1 and self.synced_seconds is None:
            parts["reduce"].append(self._collective("reduce_scatter" if self.zero else "all_reduce", gradient_bytes))
        if self.norm:
            parts["norm"].append(Operation("square sum", Pointwise(bytes=self.updated * recipe.gradient_bytes)))
            if self.ranks > 1 and self.zero:
                parts["norm"].append(self._collective("all_reduce", NORM_BYTES))
        # The update reads gradient, weight and state, and writes weight and state.
        touched = recipe.gradient_bytes + 2 * (recipe.parameter_bytes + recipe.optimizer_bytes)
        update = OptimizerStep(parameters=self.updated, bytes_per_parameter=touched)
        parts["update"].append(Operation("optimizer", update))
        if self.ranks > 1 and self.zero in (1, 2):
            parts["gather"].append(self._collective("all_gather", self.parameters * recipe.parameter_bytes))
        return {name: tuple(operations) for name, operations in parts.items() if operations}

    def _collective(self, kind: str, message_bytes: float) -> Operation:
        collective = Collective(kind=kind, message_bytes=message_bytes, ranks=self.ranks, axis=self.axis)  # type: ignore[arg-type]
        return Operation(f"{kind} over {self.axis}", collective)


def tail_seconds(tail: Tail, runner: StageRunner) -> tuple[tuple[str, float], ...]:
    """Seconds of each part of the tail, by name, in order; their sum is what the iteration takes after its backwards.

    The norm's sum over meshes and tied weights are transfers of the program (``build_program``'s ``norm``, ``tied``).
    """
    parts = [(name, runner.run(operations).seconds) for name, operations in tail.operations().items()]
    if tail.synced_seconds is not None and tail.ranks > 1:
        parts.insert(0, ("reduce", tail.synced_seconds))
    return tuple(parts)


def seconds_named(parts: Sequence[tuple[str, float]], *names: str) -> float:
    """The sum of the named parts; 0 for those that are not there."""
    return sum(seconds for name, seconds in parts if name in names)
