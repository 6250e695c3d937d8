"""Schedules against tables of published ones: makespans, spans, peaks and lists, where they are at hand."""

import re
from typing import Any

import pytest

from meshwright.simulate.schedules.base import Options
from meshwright.simulate.schedules.table import SCHEDULES
from tests.simulate.schedules.replay import Seconds, chunk_times, replay, words

TWO_BRANCHES = Options(edges=((0, 1), (1, 3), (2, 3)))  # the table's graph of four stages


def ours(published: str) -> tuple[str, Options]:
    """Our name and options for a name of the tables."""
    if published == "graph_1f1b_two_branch":
        return "graph-1f1b", TWO_BRANCHES
    if match := re.fullmatch(r"(interleaved|looped_bfs)(?:_1f1b)?_v(\d)", published):
        return match[1].replace("_", "-"), Options(chunks=int(match[2]))
    atomic = published.endswith("_atomic")
    name = re.sub("_(seq|atomic|F1B1)$", "", published).replace("_", "-")
    return name, Options(atomic_pairs=atomic)


def test_makespan_span_and_peak_of_every_row_hold_exactly(oracle: dict[str, Any]) -> None:
    for row in oracle["rows"]:
        name, options = ours(row["schedule"])
        order = SCHEDULES[name].make(row["S"], row["M"], options)
        result = replay(order, seconds_of(row["times"]))
        assert result == (row["makespan"], row["max_stage_span"], row["peak_activations"]), row


def seconds_of(times: dict[str, float]) -> Seconds:
    """The same for all stages."""
    return lambda kind, _: times[kind]


def test_lists_equal_the_published_ones_word_for_word(oracle: dict[str, Any]) -> None:
    for size, lists in oracle["golden_lists"].items():
        meshes, microbatches = (int(part.partition("=")[2]) for part in size.split(","))
        for published, rows in lists.items():
            name, options = ours(published)
            steps = SCHEDULES[name].make(meshes, microbatches, options).steps()
            golden = [as_ours(rows[str(mesh)], meshes, microbatches) for mesh in range(meshes)]
            assert [words(row) for row in steps] == golden, published


def as_ours(golden: list[str], meshes: int, microbatches: int) -> str:
    """Up-going stages and micro-batches (``1F0u``) count on after the down-going ones; pairs stand in a row."""

    def numbered(match: re.Match[str]) -> str:
        return f"{int(match[1]) + meshes}{match[2]}{int(match[3]) + microbatches // 2}"

    return " ".join(re.sub(r"(\d+)([FBIW])(\d+)u", numbered, re.sub("[();]", " ", word)).strip() for word in golden)


def test_few_microbatches_take_what_the_table_says(oracle: dict[str, Any]) -> None:
    for size, of_count in oracle["small_M"].items():
        for count, makespans in of_count.items():
            for published, makespan in makespans.items():
                rule = SCHEDULES[published.replace("_", "-")]
                order = rule.make(int(size.removeprefix("S=")), int(count))
                assert replay(order, chunk_times(chunks=rule.chunks)).makespan == makespan, (published, size, count)


def test_hop_latency_costs_what_the_table_says(oracle: dict[str, Any]) -> None:
    for key, makespans in oracle["comm"].items():
        meshes, microbatches, hop = (float(part.partition("=")[2]) for part in key.split(","))
        for published, makespan in makespans.items():
            if published.startswith("formula"):
                continue
            name, options = ours(published)
            order = SCHEDULES[name].make(int(meshes), int(microbatches), options)
            result = replay(order, chunk_times(chunks=SCHEDULES[name].chunks), hop)
            assert result.makespan == pytest.approx(makespan, abs=1e-9), (published, key)


@pytest.fixture(autouse=True)
def _every_name_is_known(oracle: dict[str, Any]) -> None:
    names = {row["schedule"] for row in oracle["rows"]}.union(*(lists for lists in oracle["golden_lists"].values()))
    assert {ours(name)[0] for name in names} <= set(SCHEDULES)
