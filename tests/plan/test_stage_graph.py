"""Stages of branching models: against brute force over all graphs of stages, and closed forms."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.plan.branches import Chain, Fork, decompose, span
from meshwright.plan.inter import best_stages
from meshwright.plan.stage_graph import best_stage_graph
from meshwright.plan.stage_table import Stage, StageTable
from meshwright.simulate.pipeline import PipelineCosts, StageCosts, TransferCost, compiled_schedule, simulate

TOWERS = decompose(5, [(0, 1), (2, 3), (1, 4), (3, 4)])


def table_of(
    seconds: np.ndarray, devices: tuple[int, ...] = (1,), total: int = 4, per_host: int = 4, memory: float = 1e9
) -> StageTable:
    """Stages whose seconds are given for (layer, kind): those of an interval add up; hops cost nothing."""
    layers, kinds = seconds.shape
    full = np.full((layers, layers + 1, kinds, 1, 1), np.inf)
    for first in range(layers):
        for last in range(first + 1, layers + 1):
            full[first, last, :, 0, 0] = seconds[first:last].sum(axis=0)
    sizes = np.where(np.isfinite(full), np.arange(layers + 1)[None, :, None, None, None] * 0.0 + 1.0, 0.0)
    return StageTable(
        seconds=full,
        once_seconds=np.zeros_like(full),
        static_bytes=sizes,
        saved_bytes=sizes,
        transient_bytes=np.zeros_like(full),
        hop_seconds=np.zeros((layers + 1, 2, kinds, 1, kinds, 1)),
        devices=np.array(devices, dtype=np.int64),
        memory_bytes=memory,
        devices_per_host=per_host,
        total_devices=total,
    )


def free(left: Stage, right: Stage, end: int) -> float:
    return 0.0


def by_distance(left: Stage, right: Stage, end: int) -> float:
    """A hop that depends on both ends, so that no end can be chosen for itself."""
    return 0.1 * (1 + (3 * left.last_layer + 5 * right.first_layer + 2 * left.kind + right.kind) % 4)


def cuts(chain: Chain) -> Iterator[tuple[object, ...]]:
    """Every way to cut a chain: stages as (first, last), forks that stay open as tuples of their branches' ways."""
    parts = chain.parts

    def rest(at: int) -> Iterator[tuple[object, ...]]:
        if at == len(parts):
            yield ()
            return
        for end in range(at + 1, len(parts) + 1):
            for more in rest(end):
                yield ((span(parts[at])[0], span(parts[end - 1])[1]), *more)
        fork = parts[at]
        if isinstance(fork, Fork):
            for ways in product(*(list(cuts(branch)) for branch in fork.branches)):
                for more in rest(at + 1):
                    yield (list(ways), *more)
            *others, last = fork.branches
            for kept in range(len(last.parts)):  # the end of the last branch and what joins are one stage
                open_branches = [*others, Chain(last.parts[:kept])] if kept else others
                for end in range(at + 2, len(parts) + 1):
                    joined = (span(last.parts[kept])[0], span(parts[end - 1])[1])
                    for ways in product(*(list(cuts(branch)) for branch in open_branches)):
                        for more in rest(end):
                            yield (list(ways), joined, *more)

    yield from rest(0)


def wired(
    way: tuple[object, ...], after: list[int], spans: list[tuple[int, int]], edges: set[tuple[int, int]]
) -> list[int]:
    """Add the stages of a way to ``spans`` and their edges; returns who heads it. Stages are numbered backwards."""
    heads = after
    for item in reversed(way):
        if isinstance(item, list):
            joined: list[int] = []
            for branch in reversed(item):
                joined = [*wired(branch, heads, spans, edges), *joined]
            heads = joined
        else:
            assert isinstance(item, tuple)
            spans.append(item)
            edges |= {(len(spans) - 1, head) for head in heads}
            heads = [len(spans) - 1]
    return heads


def brute_force(table: StageTable, chain: Chain, microbatches: int, hops: object) -> float:
    best = np.inf
    for way in cuts(chain):
        spans: list[tuple[int, int]] = []
        edges: set[tuple[int, int]] = set()
        wired(way, [], spans, edges)
        for kinds in product(range(len(table.devices)), repeat=len(spans)):
            position, stages = table.total_devices, []
            for (first, last), kind in zip(spans, kinds, strict=True):
                position -= int(table.devices[kind])
                stages.append(Stage(first, last, kind, 0, 0, position))
            if position < 0:
                continue
            path, height, joint = [0.0] * len(stages), [0] * len(stages), [0.0] * len(stages)
            fits = True
            for s, stage in enumerate(stages):
                after = sorted((t for u, t in edges if u == s), key=lambda t: stages[t].first_layer)
                ends = [*(stages[t].first_layer for t in after[1:]), table.layers][: len(after)]
                hop = sum(hops(stage, stages[t], end) for t, end in zip(after, ends, strict=True))  # type: ignore[operator]
                joint[s] = float(table.seconds[stage.cell]) + hop
                height[s] = 1 + max((height[t] for t in after), default=0)
                path[s] = joint[s] + max((path[t] for t in after), default=0.0)
                live = min(microbatches, height[s])
                fits &= bool(
                    table.static_bytes[stage.cell] + live * table.saved_bytes[stage.cell] <= table.memory_bytes
                )
            if fits:
                best = min(best, max(path) + (microbatches - 1) * max(joint))
    return best


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.1, 5.0), min_size=10, max_size=10),
    st.integers(1, 6),
    st.sampled_from([(1,), (1, 2)]),
    st.sampled_from([4.0, 3.0, 1e9]),
    st.sampled_from(
        [TOWERS, decompose(5, [(0, 1), (0, 2), (2, 3)]), decompose(5, [(0, 1), (1, 2), (1, 3), (2, 4), (3, 4)])]
    ),
)
def test_equal_to_brute_force_over_all_graphs_of_stages(
    seconds: list[float], microbatches: int, devices: tuple[int, ...], memory: float, chain: Chain
) -> None:
    layers = np.array(seconds).reshape(5, 2)[:, : len(devices)]
    table = table_of(layers, devices, total=5, per_host=5, memory=memory)
    found = best_stage_graph(table, chain, microbatches, by_distance)
    wanted = brute_force(table, chain, microbatches, by_distance)
    assert (found is None) == (wanted == np.inf)
    if found is not None:
        assert found.exact
        assert found.surrogate_seconds == pytest.approx(wanted, rel=1e-12)
        again = best_stage_graph(table, chain, microbatches, by_distance, upper_seconds=wanted * (1 + 1e-9))
        assert again is not None  # a bound that can be reached drops nothing that matters
        assert again.surrogate_seconds == found.surrogate_seconds


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.1, 5.0), min_size=8, max_size=8), st.integers(1, 8))
def test_a_chain_has_the_stages_of_the_chain_search(seconds: list[float], microbatches: int) -> None:
    table = table_of(np.array(seconds).reshape(4, 2), (1, 2))
    chain = decompose(4, [(0, 1), (1, 2), (2, 3)])
    found = best_stage_graph(table, chain, microbatches, free)
    assert found is not None
    (wanted,) = best_stages(table, microbatches, "1f1b")
    assert found.surrogate_seconds == pytest.approx(wanted.surrogate_seconds, rel=1e-9)


def test_towers_run_side_by_side_and_the_simulator_agrees() -> None:
    """Two towers of two layers of 1 s and a head of 1 s on 5 devices: depth 3, so B + 2 seconds, not B + 4."""
    table = table_of(np.ones((5, 1)), total=5, per_host=5)
    found = best_stage_graph(table, TOWERS, 4, free)
    assert found is not None
    assert [(s.first_layer, s.last_layer, s.first_device) for s in found.stages] == [(n, n + 1, n) for n in range(5)]
    assert found.surrogate_seconds == pytest.approx(6.0)
    work = {"forward_seconds": 0.4, "backward_seconds": 0.6, "reduce_seconds": 0.0, "update_seconds": 0.0}
    memory = {"static_bytes": 0.0, "saved_bytes": 1.0, "transient_bytes": 0.0}
    edges = ((0, 1), (1, 4), (2, 3), (3, 4))
    transfers = {(u, v, "activation"): TransferCost(0.0, 0.0) for u, v in edges}
    transfers |= {(v, u, "cotangent"): TransferCost(0.0, 0.0) for u, v in edges}
    stages = tuple(StageCosts(devices=(s,), **work, **memory) for s in range(5))  # type: ignore[arg-type]
    costs = PipelineCosts(stages, transfers)  # type: ignore[arg-type]
    program = compiled_schedule("graph-1f1b", 5, 4, edges, ())
    assert simulate(program, costs).makespan_seconds == pytest.approx(6.0)


def test_nothing_below_the_upper_bound_is_none() -> None:
    table = table_of(np.ones((5, 1)), total=5, per_host=5)
    assert best_stage_graph(table, TOWERS, 4, free, upper_seconds=6.0) is None
    assert best_stage_graph(table, TOWERS, 4, free, upper_seconds=6.01) is not None
