"""The cache of solved layers: same figures from the disk, nothing trusted that is not whole, never too large."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.errors import PlanError
from meshwright.plan import stages
from meshwright.plan.cache import CACHE_VARIABLE, LayerCache, LayerFigures, layer_cache
from meshwright.plan.inter import StageTable
from meshwright.plan.search import Fix, Request, search
from meshwright.plan.space import Memory
from meshwright.plan.stages import Setting, StagePricer, mesh_kinds
from tests.plan.planned import BATCH, cpus, graph_of


def table(cache: LayerCache | None, memory: Memory | None = None, microbatches: int = 4) -> StageTable:
    cluster = cpus()
    setting = Setting(graph_of(4), microbatches, False, memory or Memory())
    return StagePricer(setting, mesh_kinds(cluster), cache=cache).stage_table(cluster)


def same(one: StageTable, other: StageTable) -> bool:
    names = ("seconds", "once_seconds", "static_bytes", "saved_bytes", "transient_bytes", "hop_seconds")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each layer that is solved on a mesh."""
    seen: list[int] = []
    solve = stages.solve_layer

    def counted(*args: object) -> object:
        seen.append(1)
        return solve(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "solve_layer", counted)
    return seen


def test_a_second_search_solves_nothing_and_finds_the_same(tmp_path: Path, solves: list[int]) -> None:
    cache = LayerCache(tmp_path / "made" / "when-needed")
    first = table(cache)
    assert solves
    solves.clear()
    assert same(first, table(cache))
    assert not solves
    assert same(first, table(None))


def test_strategies_of_a_stage_from_the_cache_are_those_found_without(tmp_path: Path) -> None:
    cluster = cpus()
    setting = Setting(graph_of(4), 4, False, Memory())
    pricers = [StagePricer(setting, mesh_kinds(cluster), cache=c) for c in (LayerCache(tmp_path), LayerCache(tmp_path))]
    costs = [pricer.cost(0, 3, len(pricer.kinds) - 1, 0, 0) for pricer in pricers]
    assert costs[0].choices == costs[1].choices
    assert costs[0].static_bytes == costs[1].static_bytes


def test_a_request_may_bring_a_cache_and_the_plan_is_the_same(tmp_path: Path, solves: list[int]) -> None:
    request = Request(cpus(), BATCH, Fix(microbatches=4), cache=LayerCache(tmp_path))
    first = search(graph_of, request)
    cold = len(solves)
    again = search(graph_of, request)
    assert len(solves) - cold < cold
    assert again.stages == first.stages
    assert again.predicted == first.predicted
    assert again.stages == search(graph_of, replace(request, cache=None)).stages


@pytest.mark.parametrize("change", ["memory", "weights", "code"])
def test_what_the_figures_follow_from_tells_them_apart(
    change: str, tmp_path: Path, solves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = LayerCache(tmp_path)
    table(cache)
    solves.clear()
    match change:
        case "memory":
            other = replace(Memory(), optimizer_bytes=Memory().optimizer_bytes + 1)
            assert same(table(cache, other), table(None, other))
        case "weights":
            assert same(table(cache, microbatches=8), table(None, microbatches=8))
        case _:
            monkeypatch.setattr("meshwright.plan.cache.code_version", lambda: "another")
            table(cache)
    assert solves


def damaged(data: bytes, how: str) -> bytes:
    middle = len(data) // 2
    match how:
        case "empty":
            return b""
        case "cut":
            return data[:middle]
        case "one bit":
            return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        case "longer":
            return data + b"x"
        case _:
            return b"\x80\x04cos\nsystem\n."  # a pickle


@pytest.mark.parametrize("how", ["empty", "cut", "one bit", "longer", "foreign"])
def test_a_damaged_file_costs_one_line_and_is_made_anew(
    how: str, tmp_path: Path, solves: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    cache = LayerCache(tmp_path)
    right = table(cache)
    victim = sorted(tmp_path.iterdir())[0]
    whole = victim.read_bytes()
    victim.write_bytes(damaged(whole, how))
    solves.clear()
    with caplog.at_level(logging.WARNING):
        assert same(right, table(cache))
    assert [record.getMessage() for record in caplog.records] == [
        f"cache: {victim} is damaged or not ours; solving its layer again"
    ]
    assert solves
    solves.clear()
    table(cache)
    assert not solves, "the file is whole again"


def test_a_place_that_is_no_folder_costs_a_line_and_no_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert same(table(LayerCache(file)), table(None))
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert any("nothing can be stored" in record.getMessage() for record in caplog.records)
    assert file.read_text() == "not a folder"


def figures(value: float) -> list[LayerFigures]:
    return [LayerFigures(np.full((2, 2), value), np.full((8, 2, 2), value), np.zeros((2, 2)), np.zeros(2))]


def test_the_files_used_least_recently_go_first(tmp_path: Path) -> None:
    LayerCache(tmp_path).get(["size"], lambda: figures(0.0))
    (only,) = tmp_path.iterdir()
    size = only.stat().st_size
    only.unlink()
    cache = LayerCache(tmp_path, most_bytes=3 * size)
    (tmp_path / "mine.txt").write_text("x" * 10 * size)
    for n in range(3):
        cache.get([n], lambda n=n: figures(float(n)))  # type: ignore[misc]
        for path in tmp_path.glob("*.layers"):
            if path.stat().st_mtime > 100:
                os.utime(path, (n, n))
    cache.get([0], lambda: pytest.fail("it is there"))  # now the last one used
    cache.get([3], lambda: figures(3.0))
    kept = [cache._read(path) for path in tmp_path.glob("*.layers")]
    assert sorted(found[0].objective[0, 0] for found in kept if found) == [0.0, 2.0, 3.0]
    assert (tmp_path / "mine.txt").exists(), "only our own files go"
    assert not list(tmp_path.glob("new-*"))


def test_a_bound_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="at most 0 bytes holds nothing"):
        LayerCache(tmp_path, 0)


@pytest.mark.parametrize(
    ("variable", "folder", "use", "expected"),
    [
        (None, None, True, None),
        (None, "given", True, "given"),
        ("said", None, True, "said"),
        ("said", "given", True, "given"),
        ("off", "given", True, None),
        ("OFF", None, True, None),
        ("said", "given", False, None),
    ],
)
def test_where_the_cache_is(
    variable: str | None, folder: str | None, use: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is None:
        monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(CACHE_VARIABLE, variable)
    found = layer_cache(folder, use)
    assert (None if found is None else str(found.folder)) == expected
