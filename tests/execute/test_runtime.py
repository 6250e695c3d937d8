"""The interpreter walks the simulated program, instruction by instruction, and holds no more than it must."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import jax
import numpy as np
import optax
import pytest

from meshwright.errors import ExecutionError
from meshwright.execute.train import Trainer, build
from meshwright.simulate.program import Receive, Send
from tests.execute.plain import batches, key, model_of, planned


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    """Three unequal stages of a model whose first and last share a weight."""
    jax.config.update("jax_disable_most_optimizations", True)
    model = model_of("gpt:layers=2,hidden=48,heads=3,seq=8,vocab=48")
    plan = planned(model, 16, 4, devices=4, stages=((1, 1), (2, 1), (1, 1)), schedule="1f1b")
    yield build(plan, model, optax.adam(1e-2))
    jax.config.update("jax_disable_most_optimizations", False)


def test_a_measured_step_is_the_simulated_program_in_order(trainer: Trainer) -> None:
    runtime = trainer.runtime
    trainer.step(trainer.init(key()), batches(trainer.model, 16, 1)[0], measure=True)
    for mesh, row in enumerate(runtime.program):
        events = [event for event in trainer.timeline.events if event.mesh == mesh]
        assert [event.instruction for event in events] == list(row)
        assert all(0 <= a.start_seconds <= a.end_seconds <= b.start_seconds for a, b in pairwise(events))
    sends = {}
    for event in trainer.timeline.events:
        if isinstance(i := event.instruction, Send):
            sends[i.stage, i.target, i.what, i.microbatch] = event
    for event in trainer.timeline.events:
        if isinstance(i := event.instruction, Receive):
            assert sends[i.source, i.stage, i.what, i.microbatch].end_seconds <= event.start_seconds


def test_every_send_has_a_route_and_every_route_a_send(trainer: Trainer) -> None:
    runtime = trainer.runtime
    sends = {(i.stage, i.target, i.what) for row in runtime.program for i in row if isinstance(i, Send)}
    receives = {(i.source, i.stage, i.what) for row in runtime.program for i in row if isinstance(i, Receive)}
    assert sends == receives == set(runtime.routes)
    numbers = [route.number for routes in runtime.routes.values() for route in routes]
    assert sorted(numbers) == list(range(len(numbers)))


def test_tied_weights_stay_equal_on_all_stages_that_read_them(trainer: Trainer) -> None:
    state = trainer.init(key())
    shared = set(state[0].parameters) & set(state[2].parameters)
    assert len(shared) == 1
    leaf = shared.pop()
    before = np.asarray(state[0].parameters[leaf])
    for batch in batches(trainer.model, 16, 2):
        state, _ = trainer.step(state, batch)
        np.testing.assert_array_equal(state[0].parameters[leaf], state[2].parameters[leaf])
    assert not np.array_equal(before, state[0].parameters[leaf])


def test_what_is_held_at_most_is_near_what_was_planned(trainer: Trainer) -> None:
    """Within a factor of two: a step that freed nothing would keep four micro-batches where 1F1B keeps one to three."""
    trainer.step(trainer.init(key()), batches(trainer.model, 16, 1)[0], measure=True)
    measured = trainer.runtime.peak_bytes
    assert set(measured) == {0, 1, 2}
    assert all(0.5 < measured[s] / stage.peak_memory_bytes < 2 for s, stage in enumerate(trainer.plan.stages))


def test_old_weights_count_beside_the_new_ones_while_the_optimizer_runs(trainer: Trainer) -> None:
    """At the update a stage holds gradients, old and new weights, and the optimizer's state."""

    def bytes_on_a_device(arrays: Iterable[jax.Array]) -> int:
        return sum(array.addressable_shards[0].data.nbytes for array in arrays)

    state = trainer.init(key())
    states, _ = trainer.step(state, batches(trainer.model, 16, 1)[0], measure=True)
    for stage, kept in states.items():
        weights = bytes_on_a_device(kept.parameters.values())
        assert trainer.runtime.peak_bytes[stage] >= 3 * weights + bytes_on_a_device(kept.optimizer)


def test_a_program_that_deadlocks_names_what_waits(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    program = trainer.runtime.program
    stuck = tuple(tuple(i for i in row if not (isinstance(i, Send) and i.stage == 0)) for row in program)
    monkeypatch.setattr(trainer.runtime, "program", stuck)
    with pytest.raises(ExecutionError, match=r"the program deadlocks: .*"):
        trainer.step(trainer.init(key()), batches(trainer.model, 16, 1)[0])
