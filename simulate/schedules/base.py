"""What every schedule is: a rule that orders each mesh's forwards and backwards, and the memory it needs."""

from collections.abc import Callable
from dataclasses import dataclass

from meshwright.errors import ScheduleError
from meshwright.simulate.program import Backward, Forward

ComputeRows = tuple[tuple[Forward | Backward, ...], ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """One way to order the micro-batches of a pipeline.

    ``rows(stages, microbatches)`` gives the forwards and backwards of each mesh in order;
    ``live_microbatches(stage, stages, microbatches)`` the most activations that the stage holds at once.
    """

    name: str
    summary: str
    rows: Callable[[int, int], ComputeRows]
    live_microbatches: Callable[[int, int, int], int]


def need_sizes(stages: int, microbatches: int) -> None:
    """Raise ``ScheduleError`` unless both sizes are at least 1."""
    for name, count in (("stages", stages), ("micro-batches", microbatches)):
        if count < 1:
            raise ScheduleError(f"a schedule of {count} {name} was asked for; at least 1 is needed")
