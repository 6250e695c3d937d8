"""1F1B on a graph of stages: branches run side by side, and depth counts instead of the number of stages.

Source: Jeon et al., GraphPipe, ASPLOS 2025 (arXiv:2406.17145), section 4. With equal stages and times F and B the step
takes (M + D - 1)(F + B), D the number of stages on the longest path.
"""

from meshwright.errors import ScheduleError
from meshwright.simulate.schedules.base import Edges, Options, Order, Schedule, chain, letters
from meshwright.simulate.schedules.one_f_one_b import alternating


def graph_1f1b(meshes: int, microbatches: int, options: Options) -> Order:
    """1F1B whose warm-up on each stage is as long as the longest path from it to an end; any M.

    Raises:
        ScheduleError: an edge does not run from an earlier to a later of the stages.
    """
    edges = chain(meshes) if options.edges is None else options.edges
    heights = _heights(meshes, edges)
    rows = [
        letters(alternating(min(microbatches, height), microbatches), stage) for stage, height in enumerate(heights)
    ]
    return Order(tuple(rows), edges, tuple(range(meshes)))


def _heights(stages: int, edges: Edges) -> list[int]:
    """Stages on the longest path from each stage to an end, itself included."""
    heights = [1] * stages
    for source, target in sorted(edges, reverse=True):
        if not 0 <= source < target < stages:
            raise ScheduleError(
                f"edge {source} → {target} is not possible with {stages} stages; "
                "an edge runs from an earlier stage to a later one"
            )
        heights[source] = max(heights[source], 1 + heights[target])
    return heights


GRAPH_1F1B = Schedule(
    "graph-1f1b", "1F1B on a graph of stages, with warm-up by depth", graph_1f1b, takes=frozenset({"edges"})
)
