"""Clustering against brute force; repetition on GPT-like and ResNet-like lists."""

import json
from itertools import combinations, pairwise
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.plan.layers import MARKER, Span, cluster_layers, default_cuts, repeated_blocks

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "alpa" / "layer_clustering_golden.json"


def score(flops: np.ndarray, cut_bytes: np.ndarray, spans: list[Span]) -> tuple[float, float, float]:
    cuts = [cut_bytes[a] for a, _ in spans[1:]]
    mean = flops.sum() / len(spans)
    return max(cuts, default=0.0), sum(cuts), sum((flops[a:b].sum() - mean) ** 2 for a, b in spans)


def brute_force(
    flops: np.ndarray, cut_bytes: np.ndarray, layers: int, imbalance: float
) -> tuple[float, float, float] | None:
    largest = max((1 + imbalance) * flops.sum() / layers, flops.max()) * (1 + 1e-12)
    every = (list(pairwise((0, *cuts, len(flops)))) for cuts in combinations(range(1, len(flops)), layers - 1))
    fitting = [spans for spans in every if all(flops[a:b].sum() <= largest for a, b in spans)]
    return min((score(flops, cut_bytes, spans) for spans in fitting), default=None)


@st.composite
def operators(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    n = draw(st.integers(1, 9))
    small = st.integers(0, 4).map(float)
    flops = draw(st.lists(small, min_size=n, max_size=n))
    cut_bytes = draw(st.lists(small, min_size=n + 1, max_size=n + 1))
    return np.array(flops), np.array(cut_bytes), draw(st.integers(1, n))


@settings(deadline=None)  # the first example compiles
@given(operators(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_clusters_score_as_well_as_the_best_of_all_cuts(
    case: tuple[np.ndarray, np.ndarray, int], imbalance: float
) -> None:
    flops, cut_bytes, layers = case
    best = brute_force(flops, cut_bytes, layers, imbalance)
    if best is None:
        assert imbalance < 1, "an imbalance of 1 always has a solution"
        with pytest.raises(PlanError, match="use an imbalance of 1 or fewer layers"):
            cluster_layers(flops, cut_bytes, layers, imbalance)
    else:
        spans = cluster_layers(flops, cut_bytes, layers, imbalance)
        assert [spans[0][0], *(b for _, b in spans)] == [0, *(a for a, _ in spans[1:]), len(flops)]
        assert score(flops, cut_bytes, spans) == pytest.approx(best)


def test_five_thousand_operators_are_cut_quickly() -> None:
    rng = np.random.default_rng(0)
    flops, cut_bytes = rng.random(5000), rng.integers(0, 3, 5001) * 1.0
    cluster_layers(flops[:10], cut_bytes[:11], 2)  # compiles
    begin = perf_counter()
    spans = cluster_layers(flops, cut_bytes, 48)
    assert len(spans) == 48
    assert perf_counter() - begin < 2.0


@pytest.mark.skipif(not GOLDEN.exists(), reason="Alpa's recorded clustering (../shared/data) is not here")
def test_the_layers_are_alpas() -> None:
    """It breaks ties of the largest cut by FLOPs alone, and in none of its five recorded cases does that differ."""
    for case in json.loads(GOLDEN.read_text()):
        flops, cut_bytes = np.array(case["flops"]), np.array([0.0, *case["bytes_out"]])
        spans = cluster_layers(flops, cut_bytes, case["layer_num"], case["eps"])
        assert [stop for _, stop in spans] == case["boundaries"], case["name"]
        assert score(flops, cut_bytes, spans)[0] == case["max_input_bytes"], case["name"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aaM aaaM aa", [(0, 3), (3, 7), (7, 9)]),
        ("aMM aM", [(0, 3), (3, 5)]),  # two results of one layer; the end of the model needs no mark
        ("M aa", [(0, 1), (1, 3)]),
        ("aaaa M", [(0, 5)]),
    ],
)
def test_a_model_with_marks_is_cut_at_its_marks(text: str, expected: list[Span]) -> None:
    names = [(MARKER if letter == "M" else letter, ()) for letter in text.replace(" ", "")]
    assert default_cuts(np.ones(len(names)), np.zeros(len(names) + 1), names) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abababab", (0, 2, 4)),
        ("aaaa", (0, 1, 4)),
        ("e" + "aab" * 12 + "h", (1, 3, 12)),  # not the run of two a's
        ("xababyabcabcabc", (6, 3, 3)),  # the run that covers more
        ("eabcabcabca", (1, 3, 3)),  # a partial block does not count
        ("abcdef", (0, 6, 1)),
        ("a", (0, 1, 1)),
    ],
)
def test_the_dominant_repetition(text: str, expected: tuple[int, int, int]) -> None:
    assert repeated_blocks(text) == expected


@settings(deadline=None)
@given(st.text("ab", min_size=1, max_size=14))
def test_repetition_is_real_and_no_other_covers_more(text: str) -> None:
    start, period, count = repeated_blocks(text)
    assert text[start : start + period * count] == text[start : start + period] * count
    covered = [
        p * c
        for p in range(1, len(text))
        for c in range(2, len(text) // p + 1)
        for s in range(len(text) - p * c + 1)
        if text[s : s + p * c] == text[s : s + p] * c
    ]
    assert (count > 1) == bool(covered)
    assert count == 1 or period * count == max(covered)


def gpt(blocks: int, embed_flops: float, head_flops: float) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """embed | ln qkv attend out add ln up down add | ... | head: the residual stream alone crosses between blocks."""
    names = ["embed", *["ln", "qkv", "attend", "out", "add", "ln", "up", "down", "add"] * blocks, "head"]
    cost = {"embed": embed_flops, "head": head_flops, "qkv": 3.0, "attend": 1.0, "out": 1.0, "up": 4.0, "down": 4.0}
    flops = np.array([cost.get(name, 0.0) for name in names])
    after = {"ln": 2.0, "qkv": 4.0, "attend": 2.0, "out": 2.0, "up": 5.0, "down": 2.0}
    cut_bytes = np.array([0.0, *[after.get(name, 1.0) for name in names]])
    cut_bytes[-1] = 0.0
    return flops, cut_bytes, names


def test_blocks_of_a_gpt_become_layers_and_small_ends_join_them() -> None:
    spans = default_cuts(*gpt(12, embed_flops=0.0, head_flops=2.0))
    starts = [1 + 9 * b for b in range(12)]
    assert spans == [(0, 10), *[(s, s + 9) for s in starts[1:-1]], (starts[-1], 110)]


def test_a_large_head_stays_a_layer() -> None:
    spans = default_cuts(*gpt(12, embed_flops=0.0, head_flops=13.0))
    assert len(spans) == 13
    assert spans[-1] == (109, 110)


def test_two_equal_blocks_are_never_spoilt() -> None:
    assert default_cuts(*gpt(2, embed_flops=0.0, head_flops=0.0)) == [(0, 1), (1, 10), (10, 19), (19, 20)]


def test_blocks_start_where_the_least_bytes_cross() -> None:
    """The list repeats from its first operator on, but a block of it would end inside the feed-forward layer."""
    names = ["down", "add", *["qkv", "out", "up", "down", "add"] * 4]
    flops = np.array([0.0 if name == "add" else 1.0 for name in names])
    crossing = {"down": 2.0, "add": 1.0, "qkv": 3.0, "out": 2.0, "up": 4.0}
    cut_bytes = np.array([0.0, *[crossing[name] for name in names]])
    assert default_cuts(flops, cut_bytes, names) == [(0, 2), *[(2 + 5 * b, 7 + 5 * b) for b in range(4)]]


def test_each_group_of_a_wide_resnet_is_cut_by_its_own_blocks() -> None:
    """Groups of 3, 4, 6 and 3 blocks of differing widths; the first of a group has a projection too."""
    names, flops, cut_bytes = ["stem"], [0.5], [0.0, 8.0]
    for group, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            convolutions = ["project", "a", "b", "c"] if block == 0 else ["a", "b", "c"]
            names += [f"{name}{group}" for name in convolutions]
            flops += [0.2 if name == "project" else 1.0 for name in convolutions]
            inside = [20.0, 12.0, 12.0] if block == 0 else [12.0, 12.0]
            cut_bytes += [x / 2**group for x in inside] + [8.0 / 2**group]
    names, flops, cut_bytes = [*names, "head"], [*flops, 0.1], [*cut_bytes, 0.0]
    spans = default_cuts(np.array(flops), np.array(cut_bytes), names)
    layers = ["".join(names[a:b]) for a, b in spans]
    assert layers == [
        *("stemproject0a0b0c0", "a0b0c0", "a0b0c0"),
        *("project1a1b1c1", "a1b1c1", "a1b1c1", "a1b1c1"),
        *("project2a2b2c2", "a2b2c2", "a2b2c2", "a2b2c2", "a2b2c2", "a2b2c2"),
        *("project3a3b3c3", "a3b3c3", "a3b3c3", "head"),  # with its head the last would leave no two equals
    ]


def test_a_model_without_repetition_has_eight_layers_or_as_many_as_heavy_operators() -> None:
    names = [f"op{i}" for i in range(40)]
    assert len(default_cuts(np.ones(40), np.ones(41), names)) == 8
    few = np.zeros(40)
    few[[3, 20, 30]] = 1.0
    assert len(default_cuts(few, np.ones(41), names)) == 3
    assert default_cuts(np.zeros(5), np.zeros(6), names[:5]) == [(0, 5)]


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30))
def test_default_cuts_always_cover_the_list(names: list[str]) -> None:
    rng = np.random.default_rng(len(names))
    flops = np.array([{"a": 0.0, "b": 1.0, "c": 3.0}[name] for name in names])
    spans = default_cuts(flops, rng.random(len(names) + 1), names)
    assert [spans[0][0], *(b for _, b in spans)] == [0, *(a for a, _ in spans[1:]), len(names)]
    assert all(a < b for a, b in spans)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(PlanError, match="2 operators cannot be cut into 3 layers; use 1 to 2"):
        cluster_layers(np.ones(2), np.ones(3), 3)
    with pytest.raises(PlanError, match="2 operators have 3 cuts, got bytes of 2"):
        cluster_layers(np.ones(2), np.ones(2), 1)
    with pytest.raises(PlanError, match="2 operators have 1 signatures"):
        default_cuts(np.ones(2), np.ones(3), ["a"])
