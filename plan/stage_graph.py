"""Stages as a graph: where a model branches, each branch gets stages of its own, which run side by side.

1F1B on a graph of stages (``simulate.schedules.graph_1f1b``) fills along its longest path, not through all stages, and
keeps as many micro-batches alive on a stage as there are stages on the longest path from it to an end, its *height*.
With t_s the forward and backward of one micro-batch on stage s, x_s its hops to the stages that read it (one after the
other, as a device sends), u_s once per iteration and B micro-batches, the surrogate of the step is

    T = max over paths of sum_s (t_s + x_s)  +  (B - 1) max_s (t_s + x_s)  +  max_s u_s

which on a chain is that of ``meshwright.plan.inter`` for 1F1B. Stages are intervals of a chain of the decomposition
(``plan.branches``); one that covers a whole fork is a stage like any other, so a chain of stages is among the plans.
Source of the schedule and of stages as a series-parallel graph: Jeon et al., GraphPipe, ASPLOS 2025.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.plan.branches import Chain, Fork, span
from meshwright.plan.stage_table import Stage, StageTable

Hops = Callable[[Stage, Stage, int], float]
"""(left, right, end) -> seconds of moving what left's layers write and layers right.first_layer..end - 1 read."""

WIDTH = 64  # ways to run the rest of the model that are kept for each first device and each set of heads


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """Stages in the order of their layers, and what the surrogate says of them.

    ``exact`` is whether nothing had to be left out on the way: then no plan has a smaller surrogate.
    """

    stages: tuple[Stage, ...]
    surrogate_seconds: float
    exact: bool


@dataclass(frozen=True, slots=True)
class _Head:
    """A stage to which somebody may still have to send: stages on the longest path from it to an end, and its time."""

    stage: Stage
    height: int
    path_seconds: float


@dataclass(frozen=True, slots=True)
class _Rest:
    """One way to run the last layers: it takes all devices from ``first_device`` on."""

    first_device: int
    heads: tuple[_Head, ...]
    largest_seconds: float
    once_seconds: float
    stages: tuple[Stage, ...]

    def seconds(self, microbatches: int) -> float:
        path = max(head.path_seconds for head in self.heads)
        return path + (microbatches - 1) * self.largest_seconds + self.once_seconds

    @property
    def merits(self) -> tuple[float, ...]:
        """The less of each, the better."""
        paths = (each for head in self.heads for each in (head.path_seconds, float(head.height)))
        return (*paths, self.largest_seconds, self.once_seconds)


def best_stage_graph(
    table: StageTable, chain: Chain, microbatches: int, hops: Hops, upper_seconds: float = np.inf
) -> GraphPlan | None:
    """The stages of least surrogate time that fit, or None if none is below ``upper_seconds``.

    Devices are handed out from the last layer to the first, from the last device on; a stage smaller than a host stays
    inside one, a larger one starts at a host.

    Args:
        chain: the decomposition of all layers of the table.
        upper_seconds: what is known to be reachable; rests that cannot be below it are dropped.
    """
    search = _Search(table, chain, microbatches, hops, upper_seconds)
    rests = [rest for rest in search.run() if rest.seconds(microbatches) < upper_seconds]
    if not rests:
        return None
    best = min(rests, key=lambda rest: (rest.seconds(microbatches), len(rest.stages), rest.stages))
    return GraphPlan(best.stages, best.seconds(microbatches), not search.dropped)


class _Search:
    """Backwards over the chain: every rest that no other is better than in all respects."""

    def __init__(self, table: StageTable, chain: Chain, microbatches: int, hops: Hops, upper_seconds: float) -> None:
        self.table, self.chain, self.microbatches = table, chain, microbatches
        self.hops, self.upper_seconds = hops, upper_seconds
        self.least_seconds = table.seconds.min(axis=(2, 3, 4))  # (L, L+1) of any kind and layout
        self.dropped = False

    def run(self) -> list[_Rest]:
        return self._before(self.chain, _Rest(self.table.total_devices, (), 0.0, 0.0, ()))

    def _before(self, chain: Chain, after: _Rest) -> list[_Rest]:
        """All rests that begin with the chain and go on with ``after``."""
        parts = [span(part) for part in chain.parts]
        rests: list[list[_Rest]] = [[] for _ in parts] + [[after]]
        for at in range(len(parts) - 1, -1, -1):
            found: list[_Rest] = []
            for end in range(at + 1, len(parts) + 1):
                layers = parts[at][0], parts[end - 1][1]
                if np.isfinite(self.least_seconds[layers]):
                    for rest in rests[end]:
                        found += self._with_stage(*layers, rest)
            fork = chain.parts[at]
            if isinstance(fork, Fork):
                for rest in rests[at + 1]:
                    found += self._with_fork(fork, rest)
            rests[at] = self._best(found)
        return rests[0]

    def _with_fork(self, fork: Fork, after: _Rest) -> list[_Rest]:
        """Every branch before the same rest, the last branch on the last devices."""
        ways: list[tuple[_Rest, tuple[_Head, ...]]] = [(after, ())]
        for branch in reversed(fork.branches):
            longer: list[tuple[_Rest, tuple[_Head, ...]]] = []
            for rest, heads in ways:
                there = _Rest(rest.first_device, after.heads, rest.largest_seconds, rest.once_seconds, rest.stages)
                longer += [(more, (*more.heads, *heads)) for more in self._before(branch, there)]
            ways = longer
        return [
            _Rest(rest.first_device, heads, rest.largest_seconds, rest.once_seconds, rest.stages)
            for rest, heads in ways
        ]

    def _with_stage(self, first: int, last: int, rest: _Rest) -> Iterator[_Rest]:
        """The rest behind one more stage, on every kind of submesh that fits, with all layouts."""
        table = self.table
        height = 1 + max((head.height for head in rest.heads), default=0)
        live = min(self.microbatches, height)
        for kind, devices in enumerate(table.devices.tolist()):
            first_device = rest.first_device - devices
            if not self._fits_at(first_device, devices):
                continue
            cell = (first, last, kind)
            peak = table.static_bytes[cell] + live * table.saved_bytes[cell] + table.transient_bytes[cell]
            possible = np.isfinite(table.seconds[cell]) & (peak <= table.memory_bytes)
            for entry, leave in np.argwhere(possible).tolist():
                stage = Stage(first, last, kind, entry, leave, first_device)
                seconds = float(table.seconds[stage.cell]) + self._hop_seconds(stage, rest.heads)
                path = seconds + max((head.path_seconds for head in rest.heads), default=0.0)
                more = _Rest(
                    first_device,
                    (_Head(stage, height, path),),
                    max(rest.largest_seconds, seconds),
                    max(rest.once_seconds, float(table.once_seconds[stage.cell])),
                    (stage, *rest.stages),
                )
                if more.seconds(self.microbatches) < self.upper_seconds:
                    yield more

    def _fits_at(self, first_device: int, devices: int) -> bool:
        per_host = self.table.devices_per_host
        inside = first_device % per_host + devices <= per_host
        whole = first_device % per_host == 0 and devices % per_host == 0
        return first_device >= 0 and (inside or whole)

    def _hop_seconds(self, stage: Stage, heads: Sequence[_Head]) -> float:
        """To all that read it: a value is charged to the head before whose end it is first read."""
        ends = [*(head.stage.first_layer for head in heads[1:]), self.table.layers][: len(heads)]
        return sum(self.hops(stage, head.stage, end) for head, end in zip(heads, ends, strict=True))

    def _best(self, found: Sequence[_Rest]) -> list[_Rest]:
        """Those that none of the same first device and the same heads beats or equals in every merit."""
        alike: dict[object, list[_Rest]] = {}
        for rest in found:
            heads = tuple((h.stage.first_layer, h.stage.kind, h.stage.entry, h.stage.first_device) for h in rest.heads)
            alike.setdefault((rest.first_device, heads), []).append(rest)
        kept: list[_Rest] = []
        for rests in alike.values():
            rests.sort(key=lambda rest: (rest.seconds(self.microbatches), len(rest.stages), rest.stages))
            mine: list[_Rest] = []
            for rest in rests:
                merits = rest.merits
                if not any(all(a <= b for a, b in zip(other.merits, merits, strict=True)) for other in mine):
                    mine.append(rest)
            self.dropped |= len(mine) > WIDTH
            kept += mine[:WIDTH]
        return kept
