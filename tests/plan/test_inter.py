"""The stage DP against exhaustive search of its own surrogate, closed forms, and Alpa's recorded answers."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshwright.errors import PlanError
from meshwright.plan.inter import PipelineSchedule, Stage, StageTable, best_stages, peak_bytes, surrogate_seconds

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "alpa" / "dp_golden.json"
SCHEDULES: tuple[PipelineSchedule, ...] = ("gpipe", "1f1b")


def random_table(
    rng: np.random.Generator,
    layers: int,
    kinds: list[int],
    layouts: int = 2,
    per_host: int = 2,
    total: int = 4,
    memory_bytes: float = np.inf,
    integers: bool = False,
    impossible: float = 0.05,
) -> StageTable:
    """Costs without any structure; as small integers if many ties are wanted."""
    shape = (layers, layers + 1, len(kinds), layouts, layouts)

    def costs(shape: tuple[int, ...], scale: float) -> np.ndarray:
        return rng.integers(0, 3, shape) * 1.0 if integers else rng.random(shape) * scale

    seconds = costs(shape, 1.0)
    seconds[rng.random(shape) < impossible] = np.inf
    hops = costs((layers + 1, 2, len(kinds), layouts, len(kinds), layouts), 0.4)
    hops[rng.random(hops.shape) < impossible] = np.inf
    return StageTable(
        seconds=seconds,
        once_seconds=costs(shape, 0.5),
        static_bytes=rng.random(shape) * 4e9,
        saved_bytes=rng.random(shape) * 2e9,
        transient_bytes=rng.random(shape) * 1e9,
        hop_seconds=hops,
        devices=np.array(kinds),
        memory_bytes=memory_bytes,
        devices_per_host=per_host,
        total_devices=total,
    )


def every_chain(table: StageTable, layer: int = 0, device: int = 0) -> Iterator[tuple[Stage, ...]]:
    """All chains of stages from a layer and a device on, by the placement rules alone."""
    if layer == table.layers:
        yield ()
        return
    layouts = range(table.seconds.shape[3])
    for kind, n in enumerate(table.devices.tolist()):
        inside = device % table.devices_per_host + n <= table.devices_per_host
        aligned = n > table.devices_per_host and device % table.devices_per_host == 0
        if not (inside or aligned) or device + n > table.total_devices:
            continue
        for last, entry, leave in product(range(layer + 1, table.layers + 1), layouts, layouts):
            for rest in every_chain(table, last, device + n):
                yield (Stage(layer, last, kind, entry, leave, device), *rest)


def exhaustive(
    table: StageTable, microbatches: int, schedule: PipelineSchedule, cross_mesh: bool, max_stages: int = 99
) -> list[tuple[float, int, int, tuple[Stage, ...]]]:
    """(total, idle devices, stages, plan) of every plan that fits, best first, each shape (cuts and kinds) once."""
    plans = []
    for stages in every_chain(table):
        total = surrogate_seconds(table, stages, microbatches, schedule, cross_mesh)
        if len(stages) > max_stages or not np.isfinite(total):
            continue
        if max(peak_bytes(table, stages, microbatches, schedule)) > table.memory_bytes:
            continue
        used = sum(int(table.devices[s.kind]) for s in stages)
        plans.append((total, table.total_devices - used, len(stages), stages))
    first_of_shape: dict[tuple[tuple[int, int], ...], tuple[float, int, int, tuple[Stage, ...]]] = {}
    for plan in sorted(plans):
        first_of_shape.setdefault(tuple((s.last_layer, s.kind) for s in plan[3]), plan)
    return list(first_of_shape.values())


@pytest.mark.parametrize("microbatches", [1, 2, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cross_mesh", [True, False])
@pytest.mark.parametrize("memory_bytes", [np.inf, 3e9])
def test_the_search_finds_what_exhaustive_search_finds(
    microbatches: int, schedule: PipelineSchedule, cross_mesh: bool, memory_bytes: float
) -> None:
    bitten = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        table = random_table(rng, 3 + seed % 2, [1, 2, 2, 4][: 2 + seed % 3], memory_bytes=memory_bytes)
        expected = exhaustive(table, microbatches, schedule, cross_mesh)
        if not expected:
            bitten += 1
            with pytest.raises(PlanError):
                best_stages(table, microbatches, schedule, cross_mesh=cross_mesh)
            continue
        bitten += expected[0] != exhaustive(replace(table, memory_bytes=np.inf), microbatches, schedule, cross_mesh)[0]
        for keep in (1, 4):
            found = best_stages(table, microbatches, schedule, keep, cross_mesh=cross_mesh)
            wanted = [plan for plan in expected[:keep] if plan[0] <= 1.05 * expected[0][0]]
            assert [p.surrogate_seconds for p in found] == pytest.approx([w[0] for w in wanted], rel=1e-9)
            assert [p.stages for p in found] == [w[3] for w in wanted]
    assert bitten or np.isinf(memory_bytes), "memory was meant to matter"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_ties_go_to_no_idle_devices_then_few_stages_then_the_first_in_order(
    schedule: PipelineSchedule, microbatches: int
) -> None:
    """Costs of 0, 1 or 2 seconds make most plans tie."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        table = random_table(rng, 3 + seed % 2, [1, 1, 2], integers=True, memory_bytes=8e9)
        for keep in (1, 3):
            expected = exhaustive(table, microbatches, schedule, True)[:keep]
            if expected:
                wanted = [stages for total, _, _, stages in expected if total <= 1.05 * expected[0][0]]
                assert [p.stages for p in best_stages(table, microbatches, schedule, keep)] == wanted


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_plan_has_more_stages_than_allowed(schedule: PipelineSchedule) -> None:
    for seed, most in product(range(4), (1, 2, 3)):
        table = random_table(np.random.default_rng(seed), 4, [1, 2, 4], impossible=0.0)
        (plan,) = best_stages(table, 8, schedule, max_stages=most)
        assert plan.stages == exhaustive(table, 8, schedule, True, most)[0][3]


def even_table(layers: int, total: int, per_host: int, hop_seconds: float, **other: Any) -> StageTable:
    """Layers of one second on one device, kinds of 1, 2, 4, ... devices that halve it, one layout."""
    devices = np.array([2**e for e in range(total.bit_length()) if 2**e <= total])
    count = np.maximum(np.arange(layers + 1) - np.arange(layers)[:, None], 0)
    seconds = (count[:, :, None] / devices)[..., None, None]
    zero = np.zeros_like(seconds)
    kinds = len(devices)
    hops = np.full((layers + 1, 2, kinds, 1, kinds, 1), hop_seconds)
    values = {"once_seconds": zero, "static_bytes": zero, "saved_bytes": zero, "transient_bytes": zero} | other
    return StageTable(seconds, **values, hop_seconds=hops, devices=devices, memory_bytes=8e9,
                      devices_per_host=per_host, total_devices=total)  # fmt: skip


def test_equal_stages_without_hops_take_the_closed_form_of_the_bubble() -> None:
    """p stages of t seconds and m micro-batches take (m + p - 1) t."""
    table = even_table(8, 8, 8, 0.0)
    stages = [Stage(s, s + 1, 0, 0, 0, s) for s in range(8)]
    assert surrogate_seconds(table, stages, 16, "1f1b") == surrogate_seconds(table, stages, 16, "gpipe") == 16 + 8 - 1


def test_gpipe_pays_a_hop_in_fill_and_drain_and_1f1b_for_every_microbatch() -> None:
    table = even_table(4, 4, 4, 0.5)
    stages = [Stage(s, s + 1, 0, 0, 0, s) for s in range(4)]
    assert surrogate_seconds(table, stages, 16, "gpipe") == (16 + 4 - 1) + 3 * 0.5
    assert surrogate_seconds(table, stages, 16, "1f1b") == (16 + 4 - 1) + 3 * 0.5 + 15 * 0.5


def test_1f1b_holds_fewer_microbatches_towards_the_end() -> None:
    table = even_table(4, 4, 4, 0.0, saved_bytes=np.ones((4, 5, 3, 1, 1)))
    stages = [Stage(s, s + 1, 0, 0, 0, s) for s in range(4)]
    assert peak_bytes(table, stages, 3, "1f1b") == (3, 3, 2, 1)
    assert peak_bytes(table, stages, 3, "gpipe") == (3, 3, 3, 3)


def test_stages_neither_straddle_hosts_nor_start_inside_one_that_they_fill() -> None:
    """Three devices beside two on a host of four would straddle; kinds of 3 and 4 alone cannot use all eight."""
    table = random_table(np.random.default_rng(0), 4, [3, 8], 1, per_host=4, total=8, impossible=0.0)
    for plan in best_stages(table, 4, "1f1b", keep=20):
        assert {(s.kind, s.first_device) for s in plan.stages} <= {(0, 0), (0, 4), (1, 0)}


def test_the_number_of_missing_gigabytes_is_said() -> None:
    """Two layers of 10 GB on two devices of 8 GB: the best attempt puts one on each and lacks 2 GB."""
    count = np.maximum(np.arange(3) - np.arange(2)[:, None], 0)[:, :, None, None, None]
    table = even_table(2, 2, 2, 0.0, static_bytes=1e10 * count * np.ones((1, 1, 2, 1, 1)))
    with pytest.raises(PlanError, match=r"needs 10.00 GB on its fullest device and lacks 2.00 GB"):
        best_stages(table, 4, "1f1b")


def test_a_layer_that_no_submesh_can_run_is_refused() -> None:
    table = even_table(2, 2, 2, 0.0)
    table.seconds[:] = np.inf
    with pytest.raises(PlanError, match="no chain of stages covers all 2 layers"):
        best_stages(table, 4, "gpipe")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_impossible_stages_may_hold_infinite_bytes(schedule: PipelineSchedule) -> None:
    table = even_table(2, 2, 2, 0.0, saved_bytes=np.array([[[0, 1], [1, 1], [np.inf, 1]]] * 2)[..., None, None])
    assert all(s.kind == 1 for s in best_stages(table, 4, schedule, all_devices=True)[0].stages)


def test_damaged_tables_are_refused() -> None:
    table = even_table(2, 4, 2, 0.0)
    with pytest.raises(PlanError, match=r"hop_seconds has shape \(1,\)"):
        replace(table, hop_seconds=np.zeros(1))
    with pytest.raises(PlanError, match="seconds holds nan"):
        replace(table, seconds=table.seconds * np.nan)
    with pytest.raises(PlanError, match="a submesh of 3 devices does not tile hosts of 2"):
        replace(table, devices=np.array([1, 2, 3]))


def alpa_table(seconds: np.ndarray, successors: np.ndarray, devices: list[int], total: int) -> StageTable:
    """Alpa's costs, [first, last (inclusive), submesh, config], as a table: configs become exit layouts.

    A stage of its model allows ``successors`` stages after it: with one byte saved per live micro-batch that is a
    memory of successors + 1 live ones, made equal for all stages by the static bytes. One flat host, since its search
    does not place stages.
    """
    layers, _, kinds, configs = seconds.shape
    shape = (layers, layers + 1, kinds, configs, configs)
    table = {name: np.zeros(shape) for name in ("once_seconds", "saved_bytes", "static_bytes", "transient_bytes")}
    times = np.full(shape, np.inf)
    times[:, 1:, :, 0, :] = seconds
    deepest = layers + 1.0
    table["saved_bytes"][:] = 1.0
    table["static_bytes"][:, 1:] = (deepest - np.clip(successors + 1.0, 0, deepest))[:, :, :, None, :]
    return StageTable(
        times,
        **table,
        hop_seconds=np.zeros((layers + 1, 2, kinds, configs, kinds, configs)),
        devices=np.array(devices),
        memory_bytes=deepest,
        devices_per_host=total,
        total_devices=total,
    )


def alpa_old_vs_new_inputs(cases: list[dict[str, Any]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Costs of the recorded cases, drawn in the order of Alpa's tests/pipeline_parallel/test_old_dp_vs_new_dp.py."""
    rng = np.random.RandomState(0)
    for case in cases:
        layers, total = case["layers"], case["hosts"] * case["devices_per_host"]
        speed, room = rng.rand() * 4 - 2, rng.rand() * 4
        assert (speed, room, rng.randint(1, 5)) == pytest.approx(
            (case["compute_cost_factor"], case["device_memory_size_factor"], case["configs"])
        )
        shape = (layers, layers, len(case["submeshes"]), case["configs"])
        seconds, successors = np.full(shape, np.inf), np.full(shape, -1)
        layer_seconds, layer_bytes = rng.rand(layers), rng.rand(layers)
        for first in range(layers):
            for last in range(first, layers):
                share = layer_bytes[first : last + 1].sum() / layer_bytes.sum()
                for m, n in enumerate(np.prod(case["submeshes"], axis=1).tolist()):
                    for config in range(case["configs"]):
                        factor = rng.rand() + 1
                        cell = (first, last, m, config)
                        seconds[cell] = layer_seconds[first : last + 1].sum() * factor * float(n) ** speed
                        successors[cell] = int(room * layers * (n / total) / share / factor)
        yield seconds, successors


@pytest.mark.skipif(not GOLDEN.exists(), reason="Alpa's recorded stage DP (../shared/data) is not here")
def test_alpas_recorded_plans_are_found() -> None:
    """Same least cost and same plan wherever B exceeds the number of stages.

    Alpa's memory rule does not look at B. With B = 1 only one micro-batch is ever live: more plans fit than it knows.
    """
    cases = json.loads(GOLDEN.read_text())
    seeded, drawn = cases[:1], cases[1:]
    assert [c["name"] for c in seeded] == ["test_dynamic_programming"]
    first = seeded[0]
    shape = (first["layers"], first["layers"], len(first["submeshes"]), first["configs"])
    seed_inputs = (np.random.RandomState(first["seed"]).rand(*shape), np.full(shape, 4096))
    for case, (seconds, successors) in zip(cases, [seed_inputs, *alpa_old_vs_new_inputs(drawn)], strict=True):
        devices = np.prod(case["submeshes"], axis=1).tolist()
        table = alpa_table(seconds, successors, devices, case["hosts"] * case["devices_per_host"])
        (plan,) = best_stages(table, case["micro_batches"], "1f1b", cross_mesh=False, all_devices=True)
        if case["micro_batches"] == 1:
            assert plan.surrogate_seconds <= case["cost"] * (1 + 1e-6)
        else:
            assert plan.surrogate_seconds == pytest.approx(case["cost"], rel=1e-6)  # Alpa's arithmetic is float32
            assert [[[s.first_layer, s.last_layer], s.kind, s.exit] for s in plan.stages] == case["solution"]
