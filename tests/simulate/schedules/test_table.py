"""Every schedule of the table is one: whole, free of deadlock, within its memory; and their closed forms hold.

The closed forms come from the papers named in each schedule's file. Times are multiples of a quarter, so that sums are
exact.
"""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.errors import ScheduleError
from meshwright.simulate.bare import StageTimes, play
from meshwright.simulate.schedules.base import FORWARD, INPUT, WEIGHT, WHOLE, Options, Order, Times
from meshwright.simulate.schedules.table import SCHEDULES, find_schedule
from tests.simulate.schedules.replay import chunk_times, replay, words

quarters = st.integers(1, 12).map(lambda n: n / 4)
latencies = st.integers(0, 12).map(lambda n: n / 4)
meshes_ = st.integers(1, 8)
CHUNKED = ("interleaved", "looped-bfs")


def made(name: str, meshes: int, microbatches: int, options: Options) -> Order:
    """The order, or no example at all where the rule does not hold."""
    try:
        return SCHEDULES[name].make(meshes, microbatches, options)
    except ScheduleError:
        assume(False)
        raise


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), meshes_, st.integers(1, 20), st.integers(1, 4), st.booleans())
def test_every_computation_is_there_once_and_none_waits_for_ever(
    name: str, meshes: int, microbatches: int, chunks: int, atomic: bool
) -> None:
    rule = SCHEDULES[name]
    options = Options(chunks=chunks if name in CHUNKED else None, atomic_pairs=atomic and "atomic_pairs" in rule.takes)
    order = made(name, meshes, microbatches, options)
    assert order.stages == meshes * rule.replicas * (chunks if name in CHUNKED else rule.chunks)
    seen = {(FORWARD, model_stage): list[int]() for model_stage in order.copies}
    seen |= {(INPUT, model_stage): [] for model_stage in order.copies}
    halves = {INPUT: set[tuple[int, int]](), WEIGHT: set[tuple[int, int]]()}
    for row in order.rows:
        for kind, stage, m in zip(row.kind.tolist(), row.stage.tolist(), row.microbatch.tolist(), strict=True):
            if kind != WEIGHT:
                seen[FORWARD if kind == FORWARD else INPUT, order.copies[stage]].append(m)
            if kind in halves:
                halves[kind].add((stage, m))
            if kind != FORWARD and kind != WHOLE:
                assert rule.splits_backward
        assert not (row.joined.any() and not atomic)
    assert all(sorted(numbers) == list(range(microbatches)) for numbers in seen.values())
    assert halves[INPUT] == halves[WEIGHT]
    assert replay(order, chunk_times()).makespan > 0  # it raises if rows wait for each other


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(sorted(SCHEDULES)), meshes_, st.integers(1, 16), latencies)
def test_the_simulator_agrees_with_the_slow_replay(
    data: st.DataObject, name: str, meshes: int, microbatches: int, hop: float
) -> None:
    rule = SCHEDULES[name]
    options = Options(atomic_pairs="atomic_pairs" in rule.takes and data.draw(st.booleans()))
    f, i, w = (data.draw(quarters) * rule.chunks for _ in "FIW")
    if "times" in rule.takes:
        options = Options(times=Times.equal(meshes, f, i, w, hop))
    order = made(name, meshes, microbatches, options)
    timeline = play(name, meshes, microbatches, StageTimes(f, i, w), hop, options)
    slow = replay(order, chunk_times(f, i, w, chunks=rule.chunks), hop)
    assert (timeline.makespan_seconds, timeline.span_seconds) == (slow.makespan, slow.span)
    assert timeline.peak_bytes == tuple(slow.peaks)


@pytest.mark.parametrize("name", [name for name, rule in SCHEDULES.items() if rule.live_microbatches])
@pytest.mark.parametrize(("meshes", "microbatches"), [(1, 1), (1, 5), (2, 4), (3, 2), (4, 4), (4, 16), (8, 3), (8, 32)])
def test_live_microbatches_is_the_peak_of_each_stage(name: str, meshes: int, microbatches: int) -> None:
    rule = SCHEDULES[name]
    order = rule.make(meshes, microbatches)
    for row in order.rows:
        for stage in np.unique(row.stage).tolist():
            kinds = row.kind[row.stage == stage]
            change = np.where(kinds == FORWARD, 1, np.where(kinds == INPUT, 0, -1))
            assert rule.live_microbatches is not None
            assert np.cumsum(change).max() == rule.live_microbatches(stage, order.stages // rule.chunks, microbatches)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["gpipe", "1f1b", "eager-1f1b", "gpipe-lifo", "graph-1f1b"]), meshes_, st.integers(1, 20), quarters, quarters)  # fmt: skip # noqa: E501
def test_without_hops_all_that_keep_backwards_whole_take_as_long(name: str, s: int, m: int, f: float, b: float) -> None:
    """T = (M + S - 1)(F + B)."""
    assert replay(SCHEDULES[name].make(s, m), chunk_times(f, b, 0)).makespan == (m + s - 1) * (f + b)


@settings(max_examples=60, deadline=None)
@given(meshes_, st.integers(1, 5), quarters, quarters, latencies)
def test_hops_cost_gpipe_once_each_way_and_1f1b_every_s_microbatches(
    s: int, k: int, f: float, b: float, c: float
) -> None:
    times, m = chunk_times(f, b, 0), k * s
    assert replay(SCHEDULES["gpipe"].make(s, m), times, c).makespan == (m + s - 1) * (f + b) + 2 * (s - 1) * c
    waits = 2 * (m * (s - 1) // s + s - 2) if s > 1 else 0
    assert replay(SCHEDULES["1f1b"].make(s, m), times, c).makespan == (m + s - 1) * (f + b) + waits * c


@settings(max_examples=60, deadline=None)
@given(meshes_, st.integers(1, 20), quarters, quarters, latencies)
def test_eager_1f1b_hides_hops_of_up_to_half_a_pair(s: int, m: int, f: float, b: float, c: float) -> None:
    """T = (M + S - 1)(F + B) + 2(S - 1)c while c ≤ (F + B)/2; the peak of stage s is min(M, 2(S - s) - 1)."""
    result = replay(SCHEDULES["eager-1f1b"].make(s, m), chunk_times(f, b, 0), min(c, (f + b) / 2))
    assert result.makespan == (m + s - 1) * (f + b) + 2 * (s - 1) * min(c, (f + b) / 2)
    assert result.peaks == [min(m, 2 * (s - stage) - 1) for stage in range(s)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), quarters, quarters)
def test_chunks_divide_the_bubble(p: int, k: int, v: int, f: float, b: float) -> None:
    """T = (vM + P - 1)(f + b) of chunk times; interleaved holds min(vM, (v - 1)P + 2(P - 1 - d) + 1) on mesh d."""
    m = k * p
    interleaved = replay(SCHEDULES["interleaved"].make(p, m, Options(chunks=v)), chunk_times(f, b, 0))
    assert interleaved.makespan == (v * m + p - 1) * (f + b)
    assert interleaved.peaks == [min(v * m, (v - 1) * p + 2 * (p - 1 - d) + 1) for d in range(p)]
    looped = replay(SCHEDULES["looped-bfs"].make(p, m, Options(chunks=v)), chunk_times(f, b, 0))
    assert looped.makespan == (v * m + p - 1) * (f + b)
    assert looped.peaks == [v * m] * p


@pytest.mark.parametrize(("meshes", "microbatches"), [(4, 5), (4, 6), (4, 7), (4, 10), (6, 11), (6, 14), (5, 18)])
def test_interleaved_in_larger_equal_groups_leaves_no_more_bubble(meshes: int, microbatches: int) -> None:
    """As torch does: M // P groups, if they are equal."""
    result = replay(SCHEDULES["interleaved"].make(meshes, microbatches), chunk_times(chunks=2))
    assert result.makespan == (2 * microbatches + meshes - 1) * 1.5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 12), quarters, quarters, quarters)
def test_zb_h1_saves_two_thirds_of_the_bubble(s: int, more: int, f: float, i: float, w: float) -> None:
    """T = M(F + I + W) + (S - 1)(F + I - W) where W ≤ F, W ≤ I and M ≥ S; every stage holds S."""
    m, w = s + more, min(f, i, w)
    result = replay(SCHEDULES["zb-h1"].make(s, m), chunk_times(f, i, w))
    assert result.makespan == m * (f + i + w) + (s - 1) * (f + i - w)
    assert result.peaks == [s] * s


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 12), quarters, quarters, quarters)
def test_zb_h2_saves_it_all_where_the_parts_are_equal(s: int, more: int, f: float, i: float, w: float) -> None:
    """Span = M(F + I + W) + (S - 1)(F + I - 2W) where W ≤ F, W ≤ I and M ≥ 2S - 1; every stage holds 2S - 1."""
    m, w = 2 * s - 1 + more, min(f, i, w)
    result = replay(SCHEDULES["zb-h2"].make(s, m), chunk_times(f, i, w))
    assert result.span == m * (f + i + w) + (s - 1) * (f + i - 2 * w)
    assert result.peaks == [2 * s - 1] * s
    equal = replay(SCHEDULES["zb-h2"].make(s, m), chunk_times(f, f, f))
    assert (equal.span, equal.makespan) == (3 * m * f, 3 * m * f + (s - 1) * f)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(0, 12))
def test_zb_v_has_no_bubble_in_the_memory_of_1f1b(p: int, more: int) -> None:
    """For equal parts of a chunk, M ≥ 2P - 1: span = 2M(f + i + w), T = span + (P - 1)f, 2P chunks on every mesh."""
    m = 2 * p - 1 + more
    result = replay(SCHEDULES["zb-v"].make(p, m), chunk_times())
    assert (result.span, result.makespan) == (6 * m, 6 * m + p - 1)
    assert result.peaks == [2 * p] * p


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 6), st.booleans())
def test_dualpipe_and_its_v_leave_the_published_bubble(half: int, more: int, atomic: bool) -> None:
    """(P/2 - 1)(F&B + B - 3W), F&B = F + B as one piece, or F + I - W run in turn; P - 1 in place of P/2 - 1 for V."""
    options = Options(atomic_pairs=atomic)
    bubble = 2 if atomic else 1  # with F = I = W = 1
    p, m = 2 * half, 4 * half + 2 * more
    dual = replay(SCHEDULES["dualpipe"].make(p, m, options), chunk_times())
    assert dual.makespan == 3 * m + (half - 1) * bubble
    assert dual.peaks == [p + 1] * p
    p, m = half, 2 * half + more
    single = replay(SCHEDULES["dualpipe-v"].make(p, m, options), chunk_times())
    assert single.makespan == 6 * m + (p - 1) * bubble
    assert single.peaks == [2 * p + 1] * p


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), quarters, quarters)
def test_chimera_in_units_of_p_microbatches(half: int, units: int, f: float, b: float) -> None:
    """T = P·F + (2P - 2)B + (M/P - 1)(2F + (2P - 2)B) where B ≥ F; mesh d holds P/2 + 1 + min(d, P - 1 - d)."""
    p, b = 2 * half, max(f, b)
    result = replay(SCHEDULES["chimera"].make(p, units * p), chunk_times(f, b, 0))
    assert result.makespan == p * f + (2 * p - 2) * b + (units - 1) * (2 * f + (2 * p - 2) * b)
    most = [half + 1 + min(d, p - 1 - d) for d in range(p)]
    assert result.peaks == (most if units > 1 else [min(peak, p) for peak in most])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 7), st.integers(1, 12), quarters, quarters)
def test_depth_counts_on_a_graph_of_stages(data: st.DataObject, s: int, m: int, f: float, b: float) -> None:
    """T = (M + D - 1)(F + B), D the stages on the longest path; stage s holds min(M, longest path from it)."""
    pairs = [(source, target) for target in range(s) for source in range(target)]
    edges = tuple(data.draw(st.lists(st.sampled_from(pairs), unique=True))) if pairs else ()
    heights = [longest_path(stage, edges) for stage in range(s)]
    result = replay(SCHEDULES["graph-1f1b"].make(s, m, Options(edges=edges)), chunk_times(f, b, 0))
    assert result.makespan == (m + max(heights) - 1) * (f + b)
    assert result.peaks == [min(m, height) for height in heights]


def longest_path(stage: int, edges: tuple[tuple[int, int], ...]) -> int:
    """Stages on it, by trying all."""
    return 1 + max((longest_path(target, edges) for source, target in edges if source == stage), default=0)


def test_two_branches_of_three_stages_are_as_quick_as_one() -> None:
    edges = (*pairwise(range(3)), (2, 6), *pairwise(range(3, 6)), (5, 6))
    assert replay(SCHEDULES["graph-1f1b"].make(7, 8, Options(edges=edges)), chunk_times()).makespan == (8 + 3) * 3


def test_one_f_one_b_of_two_stages_is_the_figure() -> None:
    assert [words(row) for row in SCHEDULES["1f1b"].make(2, 3).steps()] == [
        "0F0 0F1 0B0 0F2 0B1 0B2",
        "1F0 1B0 1F1 1B1 1F2 1B2",
    ]


def test_an_unknown_schedule_names_its_neighbour() -> None:
    with pytest.raises(ScheduleError, match="did you mean '1f1b'"):
        find_schedule("1f1")


@pytest.mark.parametrize(
    ("name", "meshes", "microbatches", "message"),
    [
        ("interleaved", 4, 13, "multiples of 4, and others as near as 12 and 15"),
        ("dualpipe", 3, 12, "an even number of meshes P and an even number of micro-batches of at least 2P"),
        ("dualpipe", 4, 6, "4 meshes and 6 micro-batches were asked for"),
        ("dualpipe-v", 4, 7, "at least 8 micro-batches on 4 meshes"),
        ("chimera", 3, 6, "an even number of meshes and at least 2 micro-batches"),
    ],
)
def test_sizes_without_a_rule_are_refused_with_those_that_have_one(
    name: str, meshes: int, microbatches: int, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        SCHEDULES[name].make(meshes, microbatches)


@pytest.mark.parametrize("name", ["interleaved", "looped-bfs"])
def test_more_chunks_than_memory_holds_are_refused_before_they_are_laid_out(name: str) -> None:
    with pytest.raises(ScheduleError, match="192,000,000,000 instructions need about 76,800 GB"):
        find_schedule(name).make(4, 8, Options(chunks=10**9))


def test_an_edge_back_is_refused() -> None:
    with pytest.raises(ScheduleError, match="edge 2 → 1 is not possible with 3 stages"):
        SCHEDULES["graph-1f1b"].make(3, 2, Options(edges=((0, 2), (2, 1))))
