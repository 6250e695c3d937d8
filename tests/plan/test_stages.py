"""Stages as chains of layers: every range against its layers joined one by one; nothing is solved twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.plan import stages
from meshwright.plan.space import STATIC, Memory
from meshwright.plan.stages import Setting, SpaceCache, StagePricer, mesh_kinds
from tests.plan.planned import cpus, graph_of


@given(st.text("abc", min_size=1, max_size=9))
def test_ranges_share_a_number_if_and_only_if_their_layers_are_equal(text: str) -> None:
    ranges = stages._Ranges.of([ord(c) for c in text])
    seen: dict[str, int] = {}
    for first in range(len(text)):
        assert (ranges.number[first, : first + 1] == -1).all()
        for last in range(first + 1, len(text) + 1):
            number = seen.setdefault(text[first:last], int(ranges.number[first, last]))
            assert ranges.number[first, last] == number
            shorter, layer_class = ranges.steps[number]
            assert layer_class == ord(text[last - 1])
            assert shorter == (seen[text[first : last - 1]] if last - first > 1 else -1)
    assert len(ranges.steps) == len(seen) == len(set(seen.values()))


@pytest.mark.parametrize("remat", [False, True])
def test_a_stage_costs_the_sum_of_its_layers_on_the_best_path_of_layouts(remat: bool) -> None:
    """Against a forward pass over the layouts at every cut, for every range, kind, entry and exit."""
    cluster, graph = cpus(), graph_of(4)
    pricer = StagePricer(Setting(graph, 4, remat, Memory()), mesh_kinds(cluster))
    table = pricer.stage_table(cluster)
    for kind, mesh_kind in enumerate(pricer.kinds):
        width = len(mesh_kind.layouts)
        for first in range(len(graph.layers)):
            layers = [pricer.layer_table(use.layer_class, kind) for use in graph.layers[first:]]
            path = np.where(np.eye(width, dtype=bool), 0.0, np.inf)
            for last, layer in enumerate(layers, first + 1):
                path = (path[:, :, None] + layer.objective).min(axis=1)
                for entry in range(width):
                    for leave in range(width):
                        cost = pricer.cost(first, last, kind, entry, leave)
                        steps = list(zip(cost.tables, cost.layouts[:-1], cost.layouts[1:], strict=True))
                        assert cost.tables == tuple(layers[: last - first])
                        assert sum(t.objective[a, b] for t, a, b in steps) == pytest.approx(path[entry, leave])
                        static = sum(t.costs[STATIC, a, b] for t, a, b in steps)
                        assert table.static_bytes[first, last, kind, entry, leave] == pytest.approx(static)
    assert np.isinf(table.seconds[stages._Ranges.of([0] * table.layers).number < 0]).all()


def test_pricers_that_share_a_cache_solve_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, graph = cpus(), graph_of(4)
    solved: list[object] = []
    solve = stages.solve_layer

    def counted(*args: object) -> object:
        solved.append(args)
        return solve(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "solve_layer", counted)
    shared = SpaceCache()
    kinds = mesh_kinds(cluster)
    setting = Setting(graph, 4, False, Memory())
    first = StagePricer(setting, kinds, spaces=shared).stage_table(cluster)
    once = len(solved)
    assert once == len(graph.classes) * len(kinds)
    again = StagePricer(setting, kinds, spaces=shared).stage_table(cluster)
    assert len(solved) == once
    np.testing.assert_array_equal(first.seconds, again.seconds)
    StagePricer(Setting(graph, 4, True, Memory()), kinds, spaces=shared).stage_table(cluster)
    assert len(solved) == 2 * once, "a forward pass that runs twice weighs otherwise"
