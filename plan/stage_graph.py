"""Stages as a graph: where a model branches, each branch gets stages of its own, which run side by side.

1F1B on a graph of stages (``simulate.schedules.graph_1f1b``) fills along its longest path, not through all stages, and
keeps as many micro-batches alive on a stage as there are stages on the longest path from it to an end, its *height*.
With t_s the forward and backward of one micro-batch on stage s, x_s its hops to the stages that read it (one after the
other, as a device sends), u_s once per iteration and B micro-batches, the surrogate of the step is

    T = max over paths of sum_s (t_s + x_s)  +  (B - 1) max_s (t_s + x_s)  +  max_s u_s

which on a chain is that of ``meshwright.plan.inter`` for 1F1B. Stages are intervals of a chain of the decomposition
(``plan.branches``), or the end of a fork's last branch with what joins the branches; one that covers a whole fork is a
stage like any other, so a chain of stages is among the plans.
Source of the schedule and of stages as a series-parallel graph: Jeon et al., GraphPipe, ASPLOS 2025.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.plan.branches import Chain, Fork, span
from meshwright.plan.stage_table import Stage, StageTable

Hops = Callable[[Stage, Stage, int], float]
"""(left, right, end) -> seconds of moving what left's layers write and layers right.first_layer..end - 1 read."""

WIDTH = 64  # ways to run the rest of the model that are kept for each first device and each set of heads


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """Stages in the order of their layers, what the surrogate says of them, and bytes on a device of each.

    ``exact`` is whether nothing had to be left out on the way: then no plan has a smaller surrogate.
    """

    stages: tuple[Stage, ...]
    surrogate_seconds: float
    peak_bytes: tuple[float, ...]
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
    peak_bytes: tuple[float, ...]

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
    return GraphPlan(best.stages, best.seconds(microbatches), best.peak_bytes, not search.dropped)


def _without_ends(fork: Fork) -> Iterator[tuple[int, Fork]]:
    """The fork without the end of its last branch, from each layer on: a stage may hold that end and what joins."""
    *others, last = fork.branches
    for count, part in enumerate(last.parts):
        yield span(part)[0], Fork((*others, Chain(last.parts[:count])) if count else tuple(others))


class _Search:
    """Backwards over the chain: every rest that no other is better than in all respects."""

    def __init__(self, table: StageTable, chain: Chain, microbatches: int, hops: Hops, upper_seconds: float) -> None:
        self.table, self.chain, self.microbatches = table, chain, microbatches
        self.hops, self.upper_seconds = hops, upper_seconds
        self.least_seconds = table.seconds.min(axis=(2, 3, 4))  # (L, L+1) of any kind and layout
        self.dropped = False
        self.known: dict[Chain, tuple[float, ...]] = {}

    def run(self) -> list[_Rest]:
        return self._before(self.chain, _Rest(self.table.total_devices, (), 0.0, 0.0, (), ()))

    def _before(self, chain: Chain, after: _Rest) -> list[_Rest]:
        """All rests that begin with the chain and go on with ``after``."""
        parts = [span(part) for part in chain.parts]
        least_before = self._least_before(chain)
        rests: list[list[_Rest]] = [[] for _ in parts] + [[after]]
        for at in range(len(parts) - 1, -1, -1):
            found: list[_Rest] = []
            for end in range(at + 1, len(parts) + 1):
                layers = parts[at][0], parts[end - 1][1]
                if np.isfinite(self.least_seconds[layers]):
                    for rest in rests[end]:
                        found += self._with_stage(*layers, rest, least_before[at])
            fork = chain.parts[at]
            if isinstance(fork, Fork):
                for rest in rests[at + 1]:
                    found += self._with_fork(fork, rest)
                for end in range(at + 2, len(parts) + 1):
                    for first, shorter in _without_ends(fork):
                        for rest in rests[end]:
                            for joined in self._with_stage(first, parts[end - 1][1], rest, least_before[at]):
                                found += self._with_fork(shorter, joined)
            rests[at] = self._best(found)
        return rests[0]

    def _with_fork(self, fork: Fork, after: _Rest) -> list[_Rest]:
        """Every branch before the same rest, the last branch on the last devices."""
        ways: list[tuple[_Rest, tuple[_Head, ...]]] = [(after, ())]
        for branch in reversed(fork.branches):
            longer: list[tuple[_Rest, tuple[_Head, ...]]] = []
            for rest, heads in ways:
                there = replace(rest, heads=after.heads)
                longer += [(more, (*more.heads, *heads)) for more in self._before(branch, there)]
            ways = longer
        return [replace(rest, heads=heads) for rest, heads in ways]

    def _least_before(self, chain: Chain) -> tuple[float, ...]:
        """Seconds that the longest path takes at least from the start of the chain to each part, and to its end."""
        if chain not in self.known:
            parts = [span(part) for part in chain.parts]
            least = [0.0]
            for end in range(1, len(parts) + 1):
                ways = [least[at] + self._least_between(chain, at, end) for at in range(end)]
                least.append(min(ways))
            self.known[chain] = tuple(least)
        return self.known[chain]

    def _least_between(self, chain: Chain, at: int, end: int) -> float:
        """The least of parts at..end-1: as one stage, as a fork, or as a fork whose last end is in the stage behind."""
        first, last = span(chain.parts[at])[0], span(chain.parts[end - 1])[1]
        least = float(self.least_seconds[first, last])
        fork = chain.parts[at]
        if isinstance(fork, Fork):
            if end == at + 1:
                return min(least, self._least_of(fork))
            for start, shorter in _without_ends(fork):
                least = min(least, self._least_of(shorter) + float(self.least_seconds[start, last]))
        return least

    def _least_of(self, fork: Fork) -> float:
        return max(self._least_before(branch)[-1] for branch in fork.branches)

    def _with_stage(self, first: int, last: int, rest: _Rest, least_before: float) -> Iterator[_Rest]:
        """The rest behind one more stage, on every kind of submesh that fits, with all layouts.

        ``least_before`` seconds precede it on its path at least; what is then too slow is dropped.
        """
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
                    (float(peak[entry, leave]), *rest.peak_bytes),
                )
                if least_before + more.seconds(self.microbatches) < self.upper_seconds:
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
