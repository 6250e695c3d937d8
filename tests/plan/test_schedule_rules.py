"""What the search believes of schedules, held against the schedules themselves and against the event engine."""

import numpy as np
import pytest

from meshwright.errors import PlanError
from meshwright.plan.inter import Stage, StageTable, best_stages, peak_bytes, surrogate_seconds
from meshwright.plan.schedule_rules import ALL_SCHEDULES, GRAPH, RUNNABLE, SEVERAL_A_MESH, SIMPLE, find_rule
from meshwright.simulate.build import build_program
from meshwright.simulate.pipeline import PipelineCosts, StageCosts, TransferCost, simulate
from meshwright.simulate.schedules.table import SCHEDULES
from meshwright.simulate.timeline import Timeline
from tests.plan.test_inter import exhaustive, random_table

SPLITTING = [name for name, rule in SIMPLE.items() if rule.splits_backward]


def with_thirds(table: StageTable) -> StageTable:
    """The table of stages whose forward and halves of the backward take a third each."""
    third = np.full(table.seconds.shape[:3], 1 / 3)
    return StageTable(**{name: getattr(table, name) for name in StageTable.__slots__} | {
        "forward_share": third, "weight_share": third
    })  # fmt: skip


def simulated(name: str, seconds: list[float], microbatches: int, latency_seconds: float = 0.0) -> Timeline:
    """Stages with a third of their seconds in the forward and each half of the backward; one byte a micro-batch."""
    stages = tuple(
        StageCosts(devices=(s,), forward_seconds=t / 3, backward_seconds=2 * t / 3, input_seconds=t / 3,
                   weight_seconds=t / 3, saved_bytes=1.0)
        for s, t in enumerate(seconds)
    )  # fmt: skip
    hop = TransferCost(wire_seconds=0.0, latency_seconds=latency_seconds)
    transfers = {}
    for s in range(len(seconds) - 1):
        transfers |= {(s, s + 1, "activation"): hop, (s + 1, s, "cotangent"): hop}
    return simulate(build_program(name, len(seconds), microbatches), PipelineCosts(stages, transfers))


def surrogate(name: str, seconds: list[float], microbatches: int, hop_seconds: float = 0.0) -> float:
    """Of stages one layer long, one device each."""
    count = len(seconds)
    table = random_table(np.random.default_rng(0), count, [1], 1, per_host=count, total=count, impossible=0.0)
    table.seconds[np.arange(count), np.arange(count) + 1, 0, 0, 0] = seconds
    table.once_seconds[:] = 0.0
    table.hop_seconds[:] = hop_seconds
    stages = [Stage(s, s + 1, 0, 0, 0, s) for s in range(count)]
    return surrogate_seconds(with_thirds(table), stages, microbatches, name)


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 4), (2, 4), (4, 8), (8, 32)])
def test_the_surrogate_of_equal_stages_is_the_makespan(name: str, stages: int, microbatches: int) -> None:
    seconds = [3.0] * stages
    assert surrogate(name, seconds, microbatches) == pytest.approx(
        simulated(name, seconds, microbatches).makespan_seconds
    )


@pytest.mark.parametrize("latency_seconds", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "mean"), [("gpipe", 0.001), ("1f1b", 0.02), ("eager-1f1b", 0.05), ("zb-h1", 0.02), ("zb-h2", 0.05)]
)
def test_the_surrogate_of_unlike_stages_is_near_the_makespan(name: str, mean: float, latency_seconds: float) -> None:
    """Stages that differ by up to a half; 1F1B alone is known to be counted too slow where hops cost latency."""
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(40):
        seconds = rng.uniform(2.0, 3.0, int(rng.integers(2, 7))).tolist()
        microbatches = int(rng.integers(8, 33))
        truth = simulated(name, seconds, microbatches, latency_seconds).makespan_seconds
        errors.append(surrogate(name, seconds, microbatches, 2 * latency_seconds) / truth - 1)
    waits = SIMPLE[name].hops_wait and latency_seconds > 0
    assert np.abs(errors).mean() < mean + (0.1 if waits else 0.0)
    assert min(errors) > -0.07


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (3, 2), (4, 8), (5, 16)])
def test_the_live_microbatches_are_those_of_the_schedule(name: str, stages: int, microbatches: int) -> None:
    """The engine's peaks, one byte a micro-batch; and whether all stages matter to one is said rightly."""
    rule = find_rule(name)
    held = tuple(rule.live(to_end, stages, microbatches) for to_end in range(stages, 0, -1))
    peaks = simulated(name, [3.0] * stages, microbatches).peak_bytes
    assert all(peak <= live for peak, live in zip(peaks, held, strict=True))
    assert max(peaks) == max(held)
    if not rule.live_by_total:
        assert held == tuple(rule.live(to_end, to_end, microbatches) for to_end in range(stages, 0, -1))


@pytest.mark.parametrize("memory_bytes", [np.inf, 8e9, 5e9])
@pytest.mark.parametrize("microbatches", [1, 2, 8])
@pytest.mark.parametrize("name", ["eager-1f1b", *SPLITTING])
def test_the_stage_search_finds_what_exhaustive_search_finds(name: str, microbatches: int, memory_bytes: float) -> None:
    for seed in range(4):
        table = random_table(np.random.default_rng(seed), 3, [1, 2, 2], memory_bytes=memory_bytes)
        table = with_thirds(table)
        expected = exhaustive(table, microbatches, name, True)
        if not expected:
            with pytest.raises(PlanError):
                best_stages(table, microbatches, name)
            continue
        best = best_stages(table, microbatches, name)[0]
        assert best.surrogate_seconds == pytest.approx(expected[0][0], rel=1e-9)
        assert best.stages == expected[0][3]
        assert max(peak_bytes(table, best.stages, microbatches, name)) <= memory_bytes


def test_a_schedule_that_splits_backwards_asks_for_the_halves() -> None:
    table = random_table(np.random.default_rng(0), 3, [1, 2])
    with pytest.raises(PlanError, match="zb-h1 splits backwards, and the stage table does not say"):
        best_stages(table, 8, "zb-h1")
    assert best_stages(table, 1, "zb-h1")  # one micro-batch leaves nothing to fill waits with


def test_every_schedule_of_the_simulator_is_searched_or_refused_with_a_reason() -> None:
    for name in SCHEDULES:
        if name in SIMPLE or name in SEVERAL_A_MESH or name == GRAPH.name:
            assert find_rule(name).name == name
        else:
            with pytest.raises(PlanError, match=f"'{name}' cannot be planned: it "):
                find_rule(name)
    assert {find_rule(text).text for text in ALL_SCHEDULES} == set(ALL_SCHEDULES)
    assert [find_rule(name).runnable for name in (*RUNNABLE, "zb-h1")] == [True, True, True, True, False]


@pytest.mark.parametrize("text", ["1f1b:2", "zb-v:4", "interleaved:1", "interleaved:two", "looped-bfs:"])
def test_a_number_of_stages_a_mesh_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="cannot be planned"):
        find_rule(text)
